"""Comparison of kernel outputs with references, bit for bit or within a derived bound."""

import torch

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_ELEMENTS = 1 << 25  # compared at a time


def bits(tensor):
    """Return the raw bits of a tensor; every nan of a 16- or 32-bit float becomes one pattern."""
    if tensor.dtype in (torch.bfloat16, torch.float16, torch.float32):
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
    return tensor.contiguous().view(_BITS[tensor.element_size()])


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def call(kernel, inputs):
    """Return what a kernel's function returns; one that works in place gets copies."""
    if kernel.in_place:
        inputs = tuple(i.clone() if isinstance(i, torch.Tensor) else i for i in inputs)
    return kernel.fn(*inputs)


def _beyond(got, want, bound):
    """Return where |got - want| is above the bound; large outputs some rows at a time, to spare memory."""
    if got.ndim and got.numel() > _ELEMENTS and got.shape[0] > 1:
        rows = max(_ELEMENTS * got.shape[0] // got.numel(), 1)
        parts = zip(got.split(rows), want.split(rows), bound.split(rows), strict=True)
        return torch.cat([_beyond(*part) for part in parts])
    close = (got.double() - want.double()).abs() <= bound
    return ~(close | (got.isnan() & want.isnan()) | (got == want))


def mismatch(spec, inputs, got):
    """Return a sentence about the first output of `got` that differs from the reference, or None."""
    want = as_tuple(spec.reference(*inputs))
    bounds = spec.tolerance(*want, *inputs) if spec.tolerance else (None,) * len(want)
    for place, (g, w, bound) in enumerate(zip(as_tuple(got), want, bounds, strict=True)):
        if g.shape != w.shape or g.dtype != w.dtype:
            return f"output {place}: {g.shape} {g.dtype}, reference {w.shape} {w.dtype}"
        wrong = bits(g) != bits(w) if bound is None else _beyond(g, w, bound)
        if wrong.any():
            where = tuple(wrong.nonzero()[0].tolist())
            return f"output {place} at {where}: {int(wrong.sum())} of {wrong.numel()} elements differ"
    return None
