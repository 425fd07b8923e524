"""Registered device functions that are atomic operations between GPUs.

TileLang's atomics are ordered for the threads of one GPU. A word that another GPU writes needs operations at
system scope, which these functions are: one PTX instruction each, from which operation, order and scope are
read. A call of one is translated to TileLang's own atomic with the scope as one more argument, so that
whatever follows atomics (interpreter, proofs, `megamoe.protocol`) follows them too.

    T.import_source(signals.source("dsv4_store_release_sys", "dsv4_load_acquire_sys"))
    signals.store_release(words[i], value)
    signals.load_acquire(words[i])
"""

import re
from dataclasses import dataclass
from typing import Any

from verify.ir import UnsupportedIR

_ORDERS = {"relaxed": 0, "acquire": 2, "release": 3}  # TileLang's numbers
DEVICE, SYSTEM = 0, 1  # scopes
_SCOPES = {"gpu": DEVICE, "sys": SYSTEM}
_LOAD = re.compile(
    r"static __device__ __forceinline__ int (?P<name>\w+)\(const int\* from\) \{\n"
    r"  int value;\n"
    r'  asm volatile\("ld\.(?P<order>\w+)\.(?P<scope>\w+)\.global\.s32 %0, \[%1\];"'
    r' : "=r"\(value\) : "l"\(from\) : "memory"\);\n'
    r"  return value;\n\}\n"
)
_STORE = re.compile(
    r"static __device__ __forceinline__ void (?P<name>\w+)\(int\* to, int value\) \{\n"
    r'  asm volatile\("st\.(?P<order>\w+)\.(?P<scope>\w+)\.global\.s32 \[%0\], %1;"'
    r' : : "l"\(to\), "r"\(value\) : "memory"\);\n\}\n'
)


@dataclass(frozen=True)
class Signal:
    """An atomic operation on a 32-bit word of global memory.

    Attributes:
        name: as kernels call it.
        text: its definition.
        op: TileLang's name of the operation.
        order: memory order, TileLang's number.
        scope: DEVICE or SYSTEM.
    """

    name: str
    text: str
    op: str
    order: int
    scope: int


def parse(text: str) -> Signal:
    """Return the operation that a definition is.

    Raises:
        UnsupportedIR: it is not a single load or store in the form above.
    """
    for op, form in (("atomic_load_elem_op", _LOAD), ("atomic_store_elem_op", _STORE)):
        found = form.fullmatch(text)
        if found and found["order"] in _ORDERS and found["scope"] in _SCOPES:
            return Signal(found["name"], text, op, _ORDERS[found["order"]], _SCOPES[found["scope"]])
    raise UnsupportedIR(f"a signal's text: {text!r}")


def _load(name: str, order: str) -> str:
    return (
        f"static __device__ __forceinline__ int {name}(const int* from) {{\n"
        "  int value;\n"
        f'  asm volatile("ld.{order}.sys.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");\n'
        "  return value;\n}\n"
    )


def _store(name: str, order: str) -> str:
    return (
        f"static __device__ __forceinline__ void {name}(int* to, int value) {{\n"
        f'  asm volatile("st.{order}.sys.global.s32 [%0], %1;" : : "l"(to), "r"(value) : "memory");\n}}\n'
    )


SIGNALS = {
    signal.name: signal
    for signal in map(
        parse,
        (
            _load("dsv4_load_acquire_sys", "acquire"),
            _store("dsv4_store_release_sys", "release"),
        ),
    )
}


def scope_of(args: tuple[Any, ...], op: str) -> int:
    """Return the scope of an atomic operation in the project's IR; one without a scope has the device's."""
    position = 2 if op == "atomic_load_elem_op" else 3
    return int(args[position].value) if len(args) > position else DEVICE


# --------------------------------------------------------------------------- for kernels
def source() -> str:
    """Return the text to import."""
    return "".join(signal.text for signal in SIGNALS.values())


def load_acquire(word: Any) -> Any:
    """Return an int32 element of a global tensor, read with acquire at system scope."""
    from tilelang import language as T

    return T.call_extern("int32", "dsv4_load_acquire_sys", T.access_ptr(word, "r"))  # pyright: ignore[reportAttributeAccessIssue]


def store_release(word: Any, value: Any) -> Any:
    """Write an int32 element of a global tensor with release at system scope."""
    from tilelang import language as T

    return T.call_extern("handle", "dsv4_store_release_sys", T.access_ptr(word, "w"), value)  # pyright: ignore[reportAttributeAccessIssue]
