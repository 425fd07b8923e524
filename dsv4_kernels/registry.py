"""Find every kernel: any module of PACKAGES that defines SPEC or SPECS."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch

from dsv4_kernels import data_checks, runtime
from dsv4_kernels.contract import Contract
from dsv4_kernels.replay import replayed

PACKAGES = ("dsv4_kernels", "megamoe")

Tensors = tuple[torch.Tensor, ...]
_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Case:
    """One shape; `tags` says who uses it: test, bench, slow."""

    id: str
    dims: Mapping[str, int]
    tags: tuple[str, ...] = ("test",)


@dataclass(frozen=True)
class Variant:
    """One kernel that ships: what `make_kernel` is called with. Compiled, proved and timed as a unit."""

    id: str
    kwargs: Mapping[str, Any]

    def dims(self) -> dict[str, int]:
        """Return the dims that this variant fixes at compile time."""
        return {name: value for name, value in self.kwargs.items() if isinstance(value, int)}


@dataclass(frozen=True)
class KernelSpec:
    """Everything tests, bench and verify need to know about one kernel.

    Attributes:
        name: unique; the public function's name.
        fn: the public function; takes what `make_inputs` returns.
        reference: plain PyTorch, shares no helper or constant with the kernel.
        make_inputs: (dims, device, seed) -> arguments of `fn`.
        make_kernel: (**variant.kwargs) -> PrimFunc; the one that is compiled, proved and interpreted.
        variants: every kernel that the dispatcher may choose for the shapes we ship.
        select: dims -> the variant that the dispatcher runs for them.
        contract: clauses over the dims of `fn`; the symbolic dims of the PrimFunc are named alike.
        cases: shapes for tests and benchmarks.
        tolerance: (reference outputs, *inputs) -> elementwise bound on |got - want| for each output,
            derived from the arithmetic; None means equal bit for bit.
        num_bytes: dims -> bytes that any implementation must move.
        num_flops: dims -> multiply-adds times two; 0 where bytes alone bound it.
        peers: names of `bench.peers` adapters to time beside us.
        source: where the operation is specified.
        small: dims of an instance that runs all of a variant's code (each stage of a ring, and again) and no
            more: the proofs' strength is measured on it, and it can be interpreted thread by thread.
        max_bank_conflict: passes that an access of shared memory may take, to be proved; None: report only.
        row_invariant: output row i depends on input row i alone, bit for bit, for any row count.
        batch_dims: symbolic dims of the PrimFunc that count rows (tokens, scale blocks). The property
            `batch_invariance` proves that a row's bits depend on no such dim, for every variant that
            `select` may choose. Empty for a kernel whose result is meant to depend on the batch.
        in_place: tensors of the PrimFunc that the caller fills and the kernel updates. Any other tensor
            that the kernel writes is an output, and may not be read (property `init`).
        shared_rows: tensor of the PrimFunc -> how many consecutive rows have one entry in it, or equal
            ones (the expert of each tile of a grouped product); that entry is then the row's own data. The
            number may be the name of a dim that variants fix.
        workspace_bytes: dims -> bytes that a call allocates beside its outputs.
    """

    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    make_inputs: Callable[[Mapping[str, int], torch.device, int], Tensors]
    make_kernel: Callable[..., Any]
    variants: tuple[Variant, ...]
    select: Callable[[Mapping[str, int]], Variant]
    contract: Contract
    cases: tuple[Case, ...]
    num_bytes: Callable[[Mapping[str, int]], int]
    source: str
    num_flops: Callable[[Mapping[str, int]], int] = field(default=lambda dims: 0)
    tolerance: Callable[..., Tensors] | None = None
    peers: tuple[str, ...] = ()
    row_invariant: bool = True
    small: Mapping[str, int] = field(default_factory=dict)
    max_bank_conflict: int | None = None
    batch_dims: tuple[str, ...] = ("m",)
    in_place: tuple[str, ...] = ()
    shared_rows: Mapping[str, int | str] = field(default_factory=dict)
    workspace_bytes: Callable[[Mapping[str, int]], int] = field(default=lambda dims: 0)

    def fixed_dims(self, variant: Variant) -> dict[str, int]:
        """Return the dims that a variant fixes and that a call's rows do not count."""
        return {name: value for name, value in variant.dims().items() if name not in self.batch_dims}


def operator(
    name: str, fake: Callable[..., Any], writes: tuple[str, ...] = ()
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Make a function the operator `dsv4::name`; calls that no part of torch has to see bypass it.

    The dispatcher is asked while torch.compile traces, inside a dispatch mode (fake tensors, profilers of
    operations) and for a tensor that needs a gradient, so that a backward pass meets an operator without one
    and says so. Other calls run the function, or what was noted of an earlier one like it: see `replay`.

    Args:
        name: of the operator; unique.
        fake: (its arguments) -> outputs without values, which tracing takes for it.
        writes: arguments that are written in place; none of them may be returned.

    Returns:
        What decorates the function. Its annotations are the operator's schema.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)

        def outputs(*args: Any, **kwargs: Any) -> Any:  # tracing leaves out arguments that have a default
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return fake(*bound.args)

        def dispatched(direct: Callable[..., Any]) -> Callable[..., Any]:
            traced = torch.library.custom_op(f"dsv4::{name}", direct, mutates_args=writes)
            traced.register_fake(outputs)
            return traced

        return replayed(name, data_checks.looks_first(function), runtime.replays, dispatched)

    return decorate


@cache
def all_kernels() -> tuple[KernelSpec, ...]:
    """Import PACKAGES and return every spec, sorted by name."""
    specs: dict[str, KernelSpec] = {}
    for package in PACKAGES:
        path = importlib.import_module(package).__path__
        for info in pkgutil.walk_packages(path, f"{package}."):
            module = importlib.import_module(info.name)
            found = getattr(module, "SPECS", None) or [s for s in [getattr(module, "SPEC", None)] if s]
            for spec in found:
                if specs.setdefault(spec.name, spec) is not spec:
                    raise RuntimeError(f"{info.name}: kernel name {spec.name!r} is already taken")
    return tuple(specs[name] for name in sorted(specs))


def get_kernel(name: str) -> KernelSpec:
    """Return the spec called `name`; KeyError lists the names there are."""
    for spec in all_kernels():
        if spec.name == name:
            return spec
    raise KeyError(f"no kernel {name!r}; there are: {', '.join(s.name for s in all_kernels())}")
