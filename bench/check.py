"""Compare a kernel's outputs with its reference before anything is timed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dsv4_kernels.registry import KernelSpec

_ELEMENTS = 1 << 25  # compared at a time
_POISON = 0xFF  # nan in bf16, e4m3 and e8m0; no output is meant to hold it everywhere


class WrongResultError(ValueError):
    """An output differs from the reference by more than the kernel's stated bound."""


@dataclass(frozen=True)
class Check:
    """How outputs compared.

    Attributes:
        kind: `bitwise` or `tolerance`.
        worst_error: largest |got - want| / bound; 0 where equal bit for bit.
    """

    kind: str
    worst_error: float


def check_case(spec: KernelSpec, dims: Mapping[str, int], inputs: tuple[Any, ...]) -> Check:
    """Run the kernel and its reference on `inputs` and compare every output.

    Raises:
        WrongResultError: naming the output, the index and both values.
    """
    want = _outputs(spec.reference(*inputs))
    _poison_freed_memory(want)
    got = _outputs(spec.fn(*inputs))
    if len(got) != len(want):
        raise WrongResultError(f"{spec.name} {dict(dims)}: {len(got)} outputs, the reference has {len(want)}")
    bounds = None if spec.tolerance is None else spec.tolerance(*want, *inputs)
    worst = 0.0
    for index, (g, w) in enumerate(zip(got, want, strict=True)):
        where = f"{spec.name} {dict(dims)}: output {index}"
        if g.shape != w.shape or g.dtype != w.dtype:
            raise WrongResultError(f"{where} is {g.dtype} {tuple(g.shape)}, want {w.dtype} {tuple(w.shape)}")
        if bounds is None:
            _require_equal_bits(g, w, where)
        else:
            worst = max(worst, _require_within(g, w, bounds[index], where))
    return Check("bitwise" if bounds is None else "tolerance", worst)


def _outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def _poison_freed_memory(like: tuple[torch.Tensor, ...]) -> None:
    """Leave nan bytes where the caching allocator will place outputs of these sizes next.

    An output element that the kernel does not write then differs from the reference, instead of
    holding the right value left over from an earlier run.
    """
    blocks = [
        torch.full((t.numel() * t.element_size(),), _POISON, dtype=torch.uint8, device=t.device) for t in like
    ]
    del blocks


def _require_equal_bits(got: torch.Tensor, want: torch.Tensor, where: str) -> None:
    differs = got.contiguous().view(torch.uint8) != want.contiguous().view(torch.uint8)
    if bool(differs.any()):
        flat = int(differs.flatten().nonzero()[0]) // got.element_size()
        raise WrongResultError(_message(got, want, flat, f"{where} is not equal bit for bit"))


def _require_within(got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor, where: str) -> float:
    if got.ndim and got.numel() > _ELEMENTS and got.shape[0] > 1:  # some rows at a time, to spare memory
        rows = max(_ELEMENTS * got.shape[0] // got.numel(), 1)
        parts = zip(got.split(rows), want.split(rows), bound.split(rows), strict=True)
        return max(
            _require_within(*part, f"{where}, rows from {number * rows}") for number, part in enumerate(parts)
        )
    g, w = got.double(), want.double()
    same = (g == w) | (g.isnan() & w.isnan())  # infinities of one sign, nan for nan
    error = torch.where(same, 0.0, (g - w).abs() / bound)
    outside = ~(error <= 1)  # a nan on one side compares false
    if bool(outside.any()):
        flat = int(outside.flatten().nonzero()[0])
        raise WrongResultError(_message(got, want, flat, f"{where} is off by more than its bound"))
    return float(error.max()) if error.numel() else 0.0


def _message(got: torch.Tensor, want: torch.Tensor, flat: int, text: str) -> str:
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), got.shape))
    return f"{text}: at {index} got {float(got[index].double())}, want {float(want[index].double())}"
