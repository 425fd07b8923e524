"""The kernels that are mutated: every Config of every registered kernel, at small fixed dims."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from typing import Any

import torch

from dsv4_kernels import registry, runtime
from dsv4_kernels.registry import KernelSpec
from dsv4_kernels.tile.corrections import corrected
from verify import extract, ir
from verify.extract import Extracted
from verify.signature.dispatch import Dispatch

_CASES = 3  # shapes on which survivors are run
_REDUCED = "k"  # the dim over which a kernel's pipeline runs
_SHARED_OUT = "n"  # the dim that a kernel's blocks share out
_ROWS = "m"  # the rows of a launch, in every case


@dataclass(frozen=True)
class Instance:
    """One Config of one kernel.

    Attributes:
        variant: the registered variant with that Config, at its own dims.
        small: arguments of `spec.make_kernel`, with the spec's small dims in place of the variant's.
        own: the variant's.
    """

    spec: KernelSpec
    variant: str
    small: Mapping[str, Any]
    own: Mapping[str, Any]

    @cached_property
    def kwargs(self) -> dict[str, Any]:
        """The small arguments, with a block at least, and with a reduction in which rings of stages go round.

        Where that takes more channels than the variant's own, its ring is never full twice either. A Config
        that does not serve so few has the variant's own.
        """
        kwargs, most = dict(self.small), self.own.get(_SHARED_OUT, 0)
        if not self._is_served(kwargs) and _REDUCED in kwargs:
            kwargs[_REDUCED] = self.own[_REDUCED]
        while kwargs.get(_SHARED_OUT, most) < most and not self._has_blocks(kwargs):
            kwargs[_SHARED_OUT] += self.small[_SHARED_OUT]
        most = self.own.get(_REDUCED, 0)
        while _REDUCED in kwargs and 2 * kwargs[_REDUCED] <= most and not self._goes_round(kwargs):
            kwargs[_REDUCED] *= 2
        return kwargs

    @property
    def _small_dims(self) -> dict[str, int]:
        return {name: self.kwargs.get(name, value) for name, value in self.spec.small.items()}

    def _is_served(self, kwargs: Mapping[str, Any]) -> bool:
        try:
            self.spec.make_kernel(**kwargs)
        except ValueError:
            return False
        return True

    def _has_blocks(self, kwargs: Mapping[str, Any]) -> bool:
        tile = extract.tile_function(self.spec.make_kernel(**kwargs))
        extents = [n.extent for n in ir.walk(tile.body) if isinstance(n, ir.Launch)]
        return not any(isinstance(extent, ir.Const) and extent.value == 0 for extent in extents)

    def _goes_round(self, kwargs: Mapping[str, Any]) -> bool:
        tile = extract.tile_function(self.spec.make_kernel(**kwargs))
        loops = [n for n in ir.walk(tile.body) if isinstance(n, ir.For)]
        depths = [(n.extent, n.annotations["num_stages"]) for n in loops if "num_stages" in n.annotations]
        return all(
            not isinstance(extent, ir.Const) or extent.value > getattr(depth, "value", depth)
            for extent, depth in depths
        )

    @property
    def id(self) -> str:
        """Kernel and variant."""
        return f"{self.spec.name}/{self.variant}"

    @property
    def dims(self) -> dict[str, int]:
        """The dims that the instance fixes."""
        return {name: value for name, value in self.kwargs.items() if isinstance(value, int)}

    @property
    def dispatch(self) -> Dispatch:
        """The batch dims; no other variant is compiled at these dims."""
        spec = self.spec
        shared = {
            t: self.dims[rows] if isinstance(rows, str) else rows for t, rows in spec.shared_rows.items()
        }
        return Dispatch(spec.batch_dims, self.variant, in_place=spec.in_place, shared_rows=shared)

    def extract(self) -> Extracted:
        """Lower the kernel."""
        with corrected():
            return extract.extract(self.spec.make_kernel(**self.kwargs))

    def arguments(self, seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield kernel arguments (inputs, then outputs) for a few shapes, the smallest first."""
        yield from islice(self._launches(seed), _CASES)

    def _launches(self, seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
        for dims in self.shapes():
            inputs = self.spec.make_inputs(dims, torch.device("cpu"), seed)
            if (args := _launched(self.spec, inputs)) is not None:  # an empty batch launches nothing
                yield args

    def shapes(self) -> list[dict[str, int]]:
        """Return dims of the test cases that this instance's kernel serves, the smallest first.

        Where none of these has a row, those of the other cases too, whose sizes the small dims bound.
        """
        found = self._of_cases(tests=True)
        if any(dims[_ROWS] for dims in found):
            return found
        return found + self._of_cases(tests=False)

    def _of_cases(self, tests: bool) -> list[dict[str, int]]:
        found = []
        for case in self.spec.cases:
            if ("test" in case.tags) == tests:
                dims = {**case.dims, **self._small_dims}
                chosen = self.spec.select(dims).kwargs
                fixed = {n: v for n, v in self.kwargs.items() if isinstance(v, (int, str))}
                same = all(chosen[name] == value for name, value in fixed.items())
                if same and dims not in found:
                    found.append(dims)
        return sorted(found, key=lambda d: sorted(d.items()))


class _LaunchedError(Exception):
    """Ends a call at its kernel's first launch."""

    def __init__(self, args: tuple[torch.Tensor, ...]) -> None:
        self.taken = args


def _launched(spec: KernelSpec, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """Return what a call of the public function hands to its kernel, which does not run, or None.

    Kernels of other specs that are launched before it make what it takes, so they run.
    """
    before = runtime.launch

    def launch(make_kernel: Any, kwargs: Any, args: tuple[torch.Tensor, ...]) -> None:
        if make_kernel is spec.make_kernel:
            raise _LaunchedError(args)  # what comes after it would use the results
        before(make_kernel, kwargs, args)

    runtime.launch = launch
    try:
        with runtime.backend("interpret"):
            spec.fn(*inputs)
    except _LaunchedError as launched:
        return launched.taken
    finally:
        runtime.launch = before
    return None


@cache
def instances() -> tuple[Instance, ...]:
    """Return every Config of every kernel; dims that `spec.small` names do not tell Configs apart."""
    found: dict[tuple[str, str], Instance] = {}
    for spec in registry.all_kernels():
        for variant in spec.variants:
            kwargs = {name: spec.small.get(name, value) for name, value in variant.kwargs.items()}
            found.setdefault((spec.name, repr(kwargs)), Instance(spec, variant.id, kwargs, variant.kwargs))
    return tuple(found.values())


def get(instance_id: str) -> Instance:
    """Return the instance of that id."""
    return next(i for i in instances() if i.id == instance_id)
