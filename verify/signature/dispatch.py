"""The dispatcher of a kernel, as far as batch invariance needs it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from dsv4_kernels.registry import KernelSpec, Variant, get_kernel


@dataclass(frozen=True)
class Dispatch:
    """Which dims count rows, and what else may run for the same row.

    Attributes:
        batch_dims: names of dims; None where nobody has said.
        variant: id of the variant that is checked.
        fixed: dims that it fixes, other than batch dims.
        siblings: the other variants for these dims: id -> function that makes the PrimFunc.
        select: dims -> id of the variant that the dispatcher runs; None where there is no dispatcher.
        in_place: tensors that the caller fills and the kernel updates.
        shared_rows: tensor -> how many consecutive rows have one entry, or equal ones.
        exchanged: tensor that blocks write for each other within a launch -> the claim that proves that each
            block reads what is there by then, as `kernel/suite:claim` of `verify.suites`.
        kernel: name of the registered kernel, for the certificates of its variants.
    """

    batch_dims: tuple[str, ...] | None = None
    variant: str = ""
    fixed: Mapping[str, int] = field(default_factory=dict)
    siblings: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    select: Callable[[Mapping[str, Any]], str] | None = None
    in_place: tuple[str, ...] = ()
    shared_rows: Mapping[str, int] = field(default_factory=dict)
    exchanged: Mapping[str, str] = field(default_factory=dict)
    kernel: str = ""


@cache
def _made(kernel: str, variant: str) -> Any:
    """Return a registered variant's PrimFunc: one object, so that its tile stage is lowered once."""
    spec = get_kernel(kernel)
    return spec.make_kernel(**next(v.kwargs for v in spec.variants if v.id == variant))


def dispatch_of(spec: KernelSpec, variant: Variant) -> Dispatch:
    """Return the dispatcher of a registered kernel, seen from one variant."""

    def fixed(other: Variant) -> dict[str, int]:
        return {n: v for n, v in other.dims().items() if n not in spec.batch_dims}

    def maker(other: Variant) -> Callable[[], Any]:
        return lambda: _made(spec.name, other.id)

    own = fixed(variant)
    siblings = {v.id: maker(v) for v in spec.variants if v.id != variant.id and fixed(v) == own}
    return Dispatch(
        spec.batch_dims,
        variant.id,
        own,
        siblings,
        lambda dims: spec.select(dims).id,
        spec.in_place,
        {t: own[rows] if isinstance(rows, str) else rows for t, rows in spec.shared_rows.items()},
        kernel=spec.name,
    )
