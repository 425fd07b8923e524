"""Lanes: every instance of an expression that one evaluation computes.

A value is a Python int or bool (the same in every lane), an Affine integer, or a torch tensor that
broadcasts to the lane shape. Lane axes are numbered from the innermost dimension outwards, so that
torch's own broadcasting aligns a value made outside a loop with one made inside it:

    axis 0, 1, 2    blockIdx.x, .y, .z of the blocks that run together
    axis 3          threads, where the kernel names its thread; else of extent 1
    axis 4 ...      the enclosing T.Parallel loops, outermost first
"""

import math
from dataclasses import dataclass, field

import torch

from verify import ir

BLOCK_AXES = 3
THREAD_AXIS = 3
FIXED_AXES = 4
_INT64 = torch.iinfo(torch.int64)


@dataclass(frozen=True, slots=True)
class Affine:
    """The integer `base + sum(coefficient * index of axis)`; never out of its type's range."""

    base: int
    coeffs: tuple[tuple[int, int], ...]

    def shifted(self, amount: int) -> "Affine":
        """Return self + amount."""
        return Affine(self.base + amount, self.coeffs)

    def scaled(self, factor: int) -> "int | Affine":
        """Return self * factor."""
        if factor == 0:
            return 0
        return Affine(self.base * factor, tuple((axis, c * factor) for axis, c in self.coeffs))

    def plus(self, other: "Affine") -> "int | Affine":
        """Return self + other."""
        coeffs = dict(self.coeffs)
        for axis, c in other.coeffs:
            coeffs[axis] = coeffs.get(axis, 0) + c
        kept = tuple((axis, c) for axis, c in sorted(coeffs.items()) if c)
        base = self.base + other.base
        return Affine(base, kept) if kept else base


Value = int | bool | Affine | torch.Tensor
Mask = torch.Tensor | None


@dataclass
class Lanes:
    """The extents of the lane axes in force."""

    extents: list[int] = field(default_factory=lambda: [1] * FIXED_AXES)

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.extents)

    @property
    def shape(self) -> tuple[int, ...]:
        """The lane shape as torch orders it: axis 0 last."""
        return tuple(reversed(self.extents))

    @property
    def count(self) -> int:
        """Number of lanes."""
        return math.prod(self.extents)

    def index(self, axis: int) -> torch.Tensor:
        """Return the lane's index along `axis`, int64 (extent, 1, ..., 1)."""
        return torch.arange(self.extents[axis]).view(-1, *[1] * axis)

    def bounds(self, value: int | Affine) -> tuple[int, int]:
        """Return the least and greatest `value` over all lanes."""
        if isinstance(value, int):
            return value, value
        low = high = value.base
        for axis, c in value.coeffs:
            reach = c * (self.extents[axis] - 1)
            low, high = low + min(reach, 0), high + max(reach, 0)
        return low, high

    def tensor(self, value: Value) -> torch.Tensor:
        """Return an integer value as an int64 tensor (a bool stays bool)."""
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, Affine):
            result = torch.tensor(value.base)
            for axis, c in value.coeffs:
                result = result + self.index(axis) * c
            return result
        if isinstance(value, int) and value > _INT64.max:
            return torch.tensor(value - (1 << 64))  # uint64 is carried as its bits
        return torch.tensor(value)

    def normalize(self, value: int | Affine, kind: ir.DType) -> Value:
        """Return `value` reduced to the range of `kind`, Affine only if that changes nothing."""
        low, high = kind.int_range
        least, greatest = self.bounds(value)
        if low <= least and greatest <= high:
            return value
        if isinstance(value, int):
            return (value - low) % (1 << kind.bits) + low
        return (self.tensor(value) - low) % (1 << kind.bits) + low if kind.bits < 64 else self.tensor(value)


def both(a: Mask, b: Mask) -> Mask:
    """Return the conjunction of two masks; None is all lanes."""
    if a is None:
        return b
    return a if b is None else a & b


def holds_anywhere(cond: torch.Tensor, mask: Mask) -> bool:
    """Return whether `cond` holds in an active lane."""
    return bool((cond if mask is None else cond & mask).any())


def is_active(mask: Mask) -> bool:
    """Return whether any lane is active."""
    return mask is None or bool(mask.any())
