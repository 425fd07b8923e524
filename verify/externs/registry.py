"""The registered device functions, and which of them a kernel brings in."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from verify import ir
from verify.externs import ctext, signals
from verify.externs.ctext import WORD_BYTES
from verify.externs.words import Words
from verify.ir import UnsupportedIR

SOURCE_ATTRIBUTE = "pragma_import_c"  # under which the compiler keeps T.import_source
_BUILT_IN = "tl::"  # functions of TileLang's own headers

# words, the word parameters by name, the words read -> the result, or the words written
Meaning = Callable[[Words, Mapping[str, Any], Mapping[tuple[str, int], Any]], Any]


@dataclass(frozen=True)
class Extern:
    """A device function.

    Attributes:
        name: as kernels call it.
        text: its definition, as the kernel's source holds it, ending in a newline.
        meaning: what it is for, over `Words`: a word, or {(pointer parameter, word index): word}.
        needs: names of the functions it calls.
        requires: condition on the word parameters; callers have to meet it.
    """

    name: str
    text: str
    meaning: Meaning
    needs: tuple[str, ...] = ()
    requires: Callable[[Words, Mapping[str, Any]], Any] | None = None

    @cached_property
    def function(self) -> ctext.Function:
        """The parsed text."""
        parsed = ctext.parse(self.text, {n: _EXTERNS[n].function for n in self.needs})
        if parsed.name != self.name:
            raise UnsupportedIR(f"{self.name}: its text defines {parsed.name}")
        return parsed

    @property
    def word_parameters(self) -> list[str]:
        """The names of the parameters that are words, in order."""
        return [p.name for p in self.function.parameters if not p.is_pointer]

    @property
    def accesses(self) -> dict[int, tuple[str, int]]:
        """For each pointer parameter, by position: mode (r or w) and bytes from the pointer on."""
        found = {}
        for position, parameter in enumerate(self.function.parameters):
            if parameter.is_pointer:
                touched = self.function.reads if parameter.is_const else self.function.writes
                indices = {i for name, i in touched if name == parameter.name}
                if indices != set(range(len(indices))):
                    raise UnsupportedIR(f"{self.name}: {parameter.name} is touched with gaps")
                found[position] = ("r" if parameter.is_const else "w", len(indices) * WORD_BYTES)
        return found

    @property
    def is_pure(self) -> bool:
        """Words in, a word out: no memory."""
        return not self.accesses


_EXTERNS: dict[str, Extern] = {}


def register(extern: Extern) -> Extern:
    """Add a device function; its text is parsed now.

    Raises:
        ValueError: the name is taken, or needs something unknown.
        UnsupportedIR: the text is not of the form that `ctext` reads.
    """
    if extern.name in _EXTERNS:
        raise ValueError(f"register: requires a new name, got name={extern.name!r}")
    if missing := [n for n in extern.needs if n not in _EXTERNS]:
        raise ValueError(f"register: requires registered functions in needs, got {missing}")
    _EXTERNS[extern.name] = extern
    try:
        extern.function  # noqa: B018  (parsed here, so that a wrong text fails where it is written)
    except UnsupportedIR:
        del _EXTERNS[extern.name]
        raise
    return extern


def find(name: str) -> Extern | None:
    """Return the function registered as `name`."""
    return _EXTERNS.get(name)


def everything() -> tuple[Extern, ...]:
    """Return every registered function."""
    return tuple(_EXTERNS.values())


def source(*names: str) -> str:
    """Return the text to import for `names` and all that they call, each definition once.

    Raises:
        KeyError: a name is not registered.
    """
    ordered: dict[str, None] = {}
    for name in names:
        for inner in _closure(name):
            ordered.setdefault(inner)
    return "".join(_EXTERNS[n].text for n in ordered)


def _closure(name: str) -> Iterator[str]:
    for inner in _EXTERNS[name].needs:
        yield from _closure(inner)
    yield name


# --------------------------------------------------------------------------- kernels
def called(call: ir.Expr) -> Extern | None:
    """Return the registered function that `call` calls, None for any other expression."""
    match call:
        case ir.Call(op="call_extern" | "call_pure_extern", args=(ir.Str(value=name), *_)):
            return _EXTERNS.get(name)
    return None


def imported(function: ir.Function) -> set[str]:
    """Return the names of the registered functions whose text a kernel (any stage) brings in.

    Raises:
        UnsupportedIR: it brings in any other text.
    """
    found: set[str] = set()
    for node in ir.walk(function.body):
        text = None
        if isinstance(node, ir.Attr) and node.key == SOURCE_ATTRIBUTE:
            text = node.value.value if isinstance(node.value, ir.Str) else node.value
        elif isinstance(node, ir.Block):
            text = node.annotations.get(SOURCE_ATTRIBUTE)
        if text is not None:
            found |= _definitions(str(text))
    return found


def _definitions(text: str) -> set[str]:
    """Take a text apart into registered definitions, word for word."""
    found: set[str] = set()
    rest = text.strip()
    by_text = {e.text.strip(): e.name for e in (*_EXTERNS.values(), *signals.SIGNALS.values())}
    while rest:
        match = next((t for t in by_text if rest.startswith(t)), None)
        if match is None:
            raise UnsupportedIR(f"imported source that is not registered, from {rest[:60]!r}")
        found.add(by_text[match])
        rest = rest[len(match) :].strip()
    return found


def check_calls(function: ir.Function) -> Sequence[str]:
    """Return the registered functions that a kernel calls, in order of their first call.

    Raises:
        UnsupportedIR: it imports a text that is not registered, or calls a registered function without
            importing its text, or with arguments that do not fit.
    """
    names, order = imported(function), {}
    for node in ir.walk(function.body):
        extern = called(node)
        if extern is None:
            continue
        if extern.name not in names:
            raise UnsupportedIR(f"{extern.name} is called, and its registered text is not imported")
        arguments = node.args[1:]
        if len(arguments) != len(extern.function.parameters):
            raise UnsupportedIR(f"{extern.name} with {len(arguments)} arguments")
        for parameter, argument in zip(extern.function.parameters, arguments, strict=True):
            is_word = argument.dtype.is_int and argument.dtype.lanes == 1 and argument.dtype.bits <= 32
            if parameter.is_pointer == is_word:
                raise UnsupportedIR(f"{extern.name}: argument {parameter.name} of type {argument.dtype}")
        if extern.function.returns and str(node.dtype) not in ("int32", "uint32"):
            raise UnsupportedIR(f"{extern.name} as {node.dtype}: it returns a 32-bit word")
        order.setdefault(extern.name)
    return tuple(order)
