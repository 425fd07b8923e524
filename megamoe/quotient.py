"""value / (1 + exp(-value)) without a branch, rounded as IEEE division rounds it.

CUDA's division branches to code for operands out of the common range, and the compiler does not mix what
stands around branches. Here both operands are scaled where the divisor is large, and an infinite one is taken
for a large one, so that nothing is out of range: a reciprocal by Newton's iteration, and a quotient that is
corrected once. Only constants are chosen between: of two computed values, the compiler computes one in a
branch. Newton ends at or below the reciprocal, and stays below that of 2 - 2^-23: the last step is one ulp
up. Every bf16 value was checked with divisors off by up to two ulps of the exponential
(`tests/megamoe/test_quotient.py`).

Kernel and test call the same functions; `ops` has the operations: fma, bits, value, select.
"""

from typing import Any, Protocol

import torch

FAR = -64.0  # below it the divisor, 2^92 and more, is scaled
SCALE = 2.0**-64
ROUNDS = 3  # of Newton's iteration
_RECIPROCAL = 0x7EF311C7  # less the bits of a number: bits of its reciprocal, to an eighth
_MAGNITUDE = 0x7FFFFFFF
_ENDLESS = 2.0**100  # a finite divisor, once scaled, is below it


class Ops(Protocol):
    """Operations on float32 values of a kernel or of a test."""

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """Return a * b + c, rounded once."""
        ...

    def bits(self, a: Any) -> Any:
        """Return the int32 of the same bits."""
        ...

    def value(self, a: Any) -> Any:
        """Return the float32 of the same bits."""
        ...

    def select(self, condition: Any, a: Any, b: Any) -> Any:
        """Return a where the condition holds, else b."""
        ...


class TileOps:
    """Of a kernel."""

    def fma(self, a: Any, b: Any, c: Any) -> Any:  # noqa: D102
        from tilelang import language as T

        return T.ieee_fmaf(a, b, T.float32(c) if isinstance(c, float) else c)  # pyright: ignore[reportCallIssue]

    def bits(self, a: Any) -> Any:  # noqa: D102
        from tilelang import language as T

        return T.reinterpret(a, "int32")

    def value(self, a: Any) -> Any:  # noqa: D102
        from tilelang import language as T

        return T.reinterpret(a, "float32")

    def select(self, condition: Any, a: Any, b: Any) -> Any:  # noqa: D102
        from tilelang import language as T

        both = (T.float32(v) if isinstance(v, float) else v for v in (a, b))  # pyright: ignore[reportCallIssue]
        return T.if_then_else(condition, *both)


class TorchOps:
    """Of tensors."""

    def fma(self, a: Any, b: Any, c: Any) -> Any:  # noqa: D102
        # Exact in float64 but for the sum, which is rounded to odd before it is rounded to float32.
        product, addend = a.double() * b.double(), torch.as_tensor(c, dtype=torch.float64).expand(a.shape)
        total = product + addend
        back = total - product
        error = (product - (total - back)) + (addend - back)
        bits = total.view(torch.int64)
        is_off = (error != 0) & total.isfinite() & (bits & 1 == 0)
        bits = torch.where(is_off, bits + torch.where((error > 0) == (total > 0), 1, -1), bits)
        return bits.view(torch.float64).float()

    def bits(self, a: Any) -> Any:  # noqa: D102
        return a.view(torch.int32)

    def value(self, a: Any) -> Any:  # noqa: D102
        return a.view(torch.float32)

    def select(self, condition: Any, a: Any, b: Any) -> Any:  # noqa: D102
        return torch.where(condition, a, b)


def scale(ops: Ops, low: Any) -> Any:
    """Return what divisor and quotient are multiplied by."""
    return ops.select(low < FAR, SCALE, 1.0)


def bounded(ops: Ops, scaled: Any) -> Any:
    """Return a scaled divisor, or a large one for one that is infinite."""
    return ops.select(scaled > _ENDLESS, _ENDLESS, scaled)


def guess(ops: Ops, scaled: Any) -> Any:
    """Return the reciprocal of a positive number, to an eighth."""
    return ops.value(_RECIPROCAL - ops.bits(scaled))


def closer(ops: Ops, scaled: Any, near: Any) -> Any:
    """Return a reciprocal with twice the correct digits."""
    return ops.fma(near, ops.fma(-scaled, near, 1.0), near)


def quotient(ops: Ops, low: Any, scaled: Any, near: Any) -> Any:
    """Return the quotient, from the value, its scaled divisor and the reciprocal of that."""
    above = ops.value(ops.bits(near) + 1)
    first = low * above
    # What is divided by infinity is 0, or nan.
    factor = ops.select(scaled < _ENDLESS, scale(ops, low), 0.0)
    found = ops.fma(above, ops.fma(-scaled, first, low), first) * factor
    # The correction loses the sign of a zero.
    return ops.value((ops.bits(found) & _MAGNITUDE) | (ops.bits(low) & ~_MAGNITUDE))
