"""Variants of a registered kernel for dims that the library does not ship.

A kernel is compiled for some of its dims (weight rows, channels, heads) and symbolic in the others. The
library's certificates are of the dims of its models; of any others, the variants are whatever the dispatcher
chooses for them over all batches, and they are proved like the registered ones.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

from dsv4_kernels.contract import Contract
from dsv4_kernels.registry import KernelSpec, Variant, get_kernel
from verify.signature.choice import UndecidedError, batch_bounds, ranges
from verify.signature.dispatch import Dispatch, dispatch_of
from verify.tasks import Dims

_UNKNOWN = re.compile(r"<verify\.signature\.choice\._Interval[^>]*>")


class ShapeError(ValueError):
    """No variant serves such dims."""


@cache
def variants_for(kernel: str, dims: Dims) -> dict[str, Variant]:
    """Return the variants that the dispatcher chooses for these dims, over all batches, by id.

    Raises:
        ShapeError: a clause of the contract is broken, or the dispatcher refuses, or it needs another dim.
    """
    spec, fixed = get_kernel(kernel), dict(dims)
    _check(spec, fixed)
    found: dict[str, Variant] = {}

    def select(values: Mapping[str, Any]) -> str:
        variant = spec.select(values)
        found[variant.id] = variant
        return variant.id

    try:
        chosen = list(ranges(select, fixed, batch_bounds(spec.contract, fixed, spec.batch_dims)))
    except UndecidedError as error:
        raise _refused(spec, fixed, str(error)) from error
    for part in chosen:
        if part.variant is None:
            raise _refused(spec, fixed, part.error)
    return {name: found[name] for part in chosen if (name := part.variant) is not None}


def made(kernel: str, dims: Dims, variant: str) -> Any:
    """Return a variant's PrimFunc: one object, so that its tile stage is lowered once.

    Raises:
        ShapeError: there is no such kernel.
    """
    try:
        return _made(kernel, dims, variant)
    except (ValueError, ArithmeticError, LookupError, AssertionError) as error:
        raise _refused(get_kernel(kernel), dict(dims), f"{type(error).__name__} {error}") from error


def _refused(spec: KernelSpec, fixed: Mapping[str, int], why: str) -> ShapeError:
    given = ", ".join(f"{name}={value}" for name, value in fixed.items()) or "none"
    why = _UNKNOWN.sub("a dim that was not given", why)
    known = dict.fromkeys(name for case in spec.cases for name in case.dims if name not in spec.batch_dims)
    return ShapeError(f"{spec.name}: no variants for dims {given}, of {', '.join(known)}: {why}")


def _check(spec: KernelSpec, fixed: Mapping[str, int]) -> None:
    """Refuse batch dims, which stay symbolic, and what a clause on these dims alone refuses."""
    if batch := sorted(set(fixed) & set(spec.batch_dims)):
        raise ShapeError(f"{spec.name}: requires no dim {', '.join(batch)}, which stays symbolic")
    names = {clause: spec.contract.names_of(clause) for clause in spec.contract.clauses}
    ours = tuple(clause for clause, its in names.items() if its and its <= set(fixed))
    try:
        Contract(ours, spec.contract.consts).check(spec.name, **fixed)
    except ValueError as error:
        raise ShapeError(str(error)) from error


@cache
def _made(kernel: str, dims: Dims, variant: str) -> Any:
    return get_kernel(kernel).make_kernel(**variants_for(kernel, dims)[variant].kwargs)


def dispatch_for(kernel: str, dims: Dims, variant: str) -> Dispatch:
    """Return the dispatcher for such dims, seen from one variant."""
    found = variants_for(kernel, dims)
    seen = dispatch_of(replace(get_kernel(kernel), variants=tuple(found.values())), found[variant])
    return replace(seen, siblings={name: partial(_made, kernel, dims, name) for name in seen.siblings})
