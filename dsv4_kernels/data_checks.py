"""What a contract says of the elements of a tensor, checked before a launch by who asks for it.

Clauses on shapes are checked at every call. What a contract says of elements (`expert < num_experts`,
`distinct(slots)`) and what a proof takes rows to share (`KernelSpec.shared_rows`) are the caller's promise:
they lie on the device, and to look at them is to wait for it. Inside `check_data()`, and everywhere in a
process with DSV4_CHECK_DATA=1, each launch looks first.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

import torch

from dsv4_kernels import replay
from dsv4_kernels.contract import ContractError, distinct_of

if TYPE_CHECKING:
    from dsv4_kernels.registry import KernelSpec

VARIABLE = "DSV4_CHECK_DATA"
Tensors = Mapping[str, torch.Tensor]
Dims = Mapping[str, int]


class CapturedCheckError(RuntimeError):
    """Data are to be checked in a stream that is being captured, where nothing can be read back."""


class _State(threading.local):
    """Of a thread: whether it is in a block, and in a call whose launches are looked at and left out."""

    is_on: bool = False
    is_dry: bool = False


_state = _State()
_is_everywhere = os.environ.get(VARIABLE, "0") not in ("", "0")
if _is_everywhere:
    replay.blocks.count += 1  # for good: what no call looks at while there are no blocks would be passed by


def is_on() -> bool:
    """Return whether launches of this thread check data."""
    return _is_everywhere or _state.is_on


@contextlib.contextmanager
def check_data() -> Iterator[None]:
    """Check inside the block, in this thread, what contracts say of elements before each launch.

    Each such launch waits for the device. Calls run their own functions, as with `replay.disabled`. Of CPU
    tensors, which the reference takes, the launches that a GPU would get are looked at.

    Raises:
        ContractError: (by calls) an element breaks a clause. Names clause, tensor, its first place and value.
        CapturedCheckError: (by calls) the stream is being captured, and there is a clause to check.
    """
    before, _state.is_on = _state.is_on, True
    try:
        with replay.blocks.entered():
            yield
    finally:
        _state.is_on = before


def looks_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return an operator's function that, of what the reference takes, first checks what it would launch."""

    @wraps(function)
    def call(*args: Any) -> Any:
        if is_on() and not _state.is_dry:
            from dsv4_kernels import runtime

            if any(isinstance(a, torch.Tensor) and runtime.uses_reference(a) for a in args):
                with _dry(), runtime.backend("interpret"):
                    function(*args)
        return function(*args)

    return call


@contextlib.contextmanager
def _dry() -> Iterator[None]:
    _state.is_dry = True
    try:
        yield
    finally:
        _state.is_dry = False


def before_launch(
    make_kernel: Callable[..., Any], kwargs: Mapping[str, Any], args: tuple[torch.Tensor, ...]
) -> bool:
    """Check what the kernel's contract says of the elements of `args`; return whether it is to be launched.

    Raises:
        ContractError: an element breaks a clause.
        CapturedCheckError: nothing can be read back here.
    """
    spec = _with_data().get(make_kernel)
    if spec is not None:
        if args[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise CapturedCheckError(
                f"{spec.name}: requires a stream that is not captured while data are checked, got one that is"
            )
        message = broken(spec, *_named(make_kernel, tuple(kwargs.items()), args))
        if message is not None:
            raise ContractError(f"{spec.name}: requires {message}")
    return not _state.is_dry


@cache
def _with_data() -> "dict[Callable[..., Any], KernelSpec]":
    """Return the kernels that promise something of elements, by what makes them."""
    from dsv4_kernels.registry import all_kernels

    return {s.make_kernel: s for s in all_kernels() if s.contract.tensors or s.shared_rows}


@cache
def _parameters(
    make_kernel: Callable[..., Any], items: tuple[tuple[str, Any], ...]
) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
    """Return the name of each parameter and of its dims; a dim that is no name has none."""
    kernel = make_kernel(**dict(items))
    buffers = [kernel.buffer_map[p] for p in kernel.params]
    return tuple((b.name, tuple(getattr(d, "name", None) for d in b.shape)) for b in buffers)


def _named(
    make_kernel: Callable[..., Any], items: tuple[tuple[str, Any], ...], args: tuple[torch.Tensor, ...]
) -> tuple[Tensors, Dims]:
    """Return a launch's tensors by the names of the PrimFunc, and the dims, fixed and symbolic."""
    dims = {name: value for name, value in items if isinstance(value, int)}
    parameters = _parameters(make_kernel, items)
    for (_, shape), tensor in zip(parameters, args, strict=True):
        dims |= {name: size for name, size in zip(shape, tensor.shape, strict=True) if name is not None}
    return {name: tensor for (name, _), tensor in zip(parameters, args, strict=True)}, dims


def broken(spec: "KernelSpec", tensors: Tensors, dims: Dims) -> str | None:
    """Return the first promise that elements break and the first that does; None where all are kept.

    Args:
        spec: of the kernel.
        tensors: by the names of the PrimFunc.
        dims: by name, those that the variant fixes and the symbolic ones.
    """
    contract, of_data = spec.contract, spec.contract.tensors
    wide = {name: tensors[name].to(torch.int64) for name in of_data}  # arithmetic of clauses does not wrap
    for clause in contract.clauses:
        names = contract.names_of(clause)
        if not names & of_data:
            continue
        if (name := distinct_of(clause)) is not None:
            places = _equal(wide[name].flatten())
            if places is not None:
                return _said(clause, {name: tensors[name].flatten()}, [(p,) for p in places])
            continue
        for _, term in contract.terms({**dims, **wide}, only=lambda found, names=names: found == names):
            place = _first(~torch.as_tensor(term))
            if place is not None:
                own = {name: tensors[name] for name in sorted(names & of_data)}
                return _said(clause, own, [place], {n: dims[n] for n in sorted(names - of_data)})
    for name, rows in spec.shared_rows.items():
        count = dims[rows] if isinstance(rows, str) else rows
        blocks = tensors[name].view(-1, count)
        place = _first((blocks != blocks[:, :1]) & (blocks >= 0))
        if place is not None:
            start = place[0] * count
            clause = f"one {name} in each {count} consecutive rows, but for negative ones"
            return _said(clause, {name: tensors[name]}, [(start,), (start + place[1],)])
    return None


def _first(wrong: torch.Tensor) -> tuple[int, ...] | None:
    """Return the place of the first element that is true."""
    return tuple(wrong.nonzero()[0].tolist()) if bool(wrong.any()) else None


def _equal(vector: torch.Tensor) -> tuple[int, int] | None:
    """Return the places of the first element that equals an earlier one, and of that one before it.

    Negative elements equal none.
    """
    values, order = vector.sort(stable=True)
    again = (values[1:] == values[:-1]) & (values[1:] >= 0)
    if not bool(again.any()):
        return None
    second = int(order[1:][again].min())
    return int((vector == vector[second]).nonzero()[0]), second


def _said(clause: str, tensors: Tensors, places: list[tuple[int, ...]], dims: Dims | None = None) -> str:
    """Return the clause and what there is instead, as all errors of contracts say it."""
    got = [f"{n}{list(p)}={t[p].item()}" for n, t in tensors.items() for p in places]
    got += [f"{name}={value}" for name, value in (dims or {}).items()]
    return f"{clause}, got {', '.join(got)}"
