"""What there is to check: variants of registered kernels, or the KERNELS of a file; and processes for it."""

import gc
import importlib.util
import shlex
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dsv4_kernels.contract import Contract

BANK_LIMIT = "MAX_BANK_CONFLICT"  # constant of a contract: the greatest degree that an access may have
Dims = tuple[tuple[str, int], ...]  # by name
if TYPE_CHECKING:
    from dsv4_kernels.registry import Variant
    from verify.signature.dispatch import Dispatch


class TaskError(ValueError):
    """What was asked for cannot be checked: no such kernel, or a file without KERNELS."""


@dataclass(frozen=True)
class Loaded:
    """What is checked.

    Attributes:
        prim_func: the tirx.PrimFunc.
        contract: preconditions on its dims.
        dims: those that it fixes.
        pass_configs: of the compiler, as `tilelang.jit` takes them.
    """

    prim_func: Any
    contract: Contract
    dims: dict[str, int]
    pass_configs: Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One variant to check: of a registered kernel, or of a file's KERNELS; or a suite of proofs."""

    kernel: str
    variant: str
    file: str | None = None
    is_suite: bool = False
    dims: Dims = ()  # of a registered kernel, which the library does not ship

    def registered(self) -> "Variant":
        """Return the variant of a registered kernel."""
        from dsv4_kernels import registry
        from verify import shapes

        if self.dims:
            return shapes.variants_for(self.kernel, self.dims)[self.variant]
        return next(v for v in registry.get_kernel(self.kernel).variants if v.id == self.variant)

    def load(self) -> "Loaded":
        """Import what defines the variant."""
        if self.file is not None:
            module = load_file(Path(self.file))
            clauses = getattr(module, "CONTRACTS", {}).get(self.variant, ())
            limit = getattr(module, "BANK_LIMITS", {}).get(self.variant)
            configs = getattr(module, "PASS_CONFIGS", {}).get(self.variant, {})
            contract = limited(Contract(tuple(clauses)), limit)
            return Loaded(module.KERNELS[self.variant], contract, {}, configs)
        from dsv4_kernels import registry
        from verify import frontend

        frontend.keep()  # the variants of a kernel are one function's
        spec, variant = registry.get_kernel(self.kernel), self.registered()
        contract = limited(spec.contract, spec.max_bank_conflict)
        return Loaded(spec.make_kernel(**variant.kwargs), contract, variant.dims(), {})

    @property
    def command(self) -> str:
        """The command line that checks this variant alone."""
        what = [self.file] if self.file is not None else ["--kernel", self.kernel]
        if self.dims:
            what += ["--dims", ",".join(f"{name}={value}" for name, value in self.dims)]
        return shlex.join(["dsv4-verify", *what, "--variant", self.variant])

    def compiler(self) -> AbstractContextManager[None]:
        """Return the state of the compiler: corrected for the library's own, for a file's as it says."""
        if self.file is not None:
            own = getattr(load_file(Path(self.file)), "COMPILERS", {}).get(self.variant)
            return nullcontext() if own is None else own()
        from dsv4_kernels.tile.corrections import corrected

        return corrected()

    def dispatch(self) -> "Dispatch":
        """Return the batch dims and what else may run: of a file, what its BATCH_DIMS, IN_PLACE ... say."""
        from verify.signature.dispatch import Dispatch, dispatch_of

        if self.file is not None:
            module = load_file(Path(self.file))
            declared = getattr(module, "BATCH_DIMS", {}).get(self.variant)
            in_place = tuple(getattr(module, "IN_PLACE", {}).get(self.variant, ()))
            batch_dims = None if declared is None else tuple(declared)
            shared = getattr(module, "SHARED_ROWS", {}).get(self.variant, {})
            exchanged = getattr(module, "EXCHANGED", {}).get(self.variant, {})
            return Dispatch(
                batch_dims, self.variant, in_place=in_place, shared_rows=shared, exchanged=exchanged
            )
        from dsv4_kernels import registry
        from verify import shapes

        if self.dims:
            return shapes.dispatch_for(self.kernel, self.dims, self.variant)
        return dispatch_of(registry.get_kernel(self.kernel), self.registered())


def limited(contract: Contract, max_bank_conflict: int | None) -> Contract:
    """Return the contract with a limit for the property `banks`, which certificates then hold too."""
    if max_bank_conflict is None:
        return contract
    return replace(contract, consts={**contract.consts, BANK_LIMIT: max_bank_conflict})


def load_file(path: Path) -> ModuleType:
    """Import a Python file that defines KERNELS.

    Raises:
        TaskError: it is no Python file, or defines no such dict.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise TaskError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not isinstance(getattr(module, "KERNELS", None), dict):
        raise TaskError(f"{path} defines no dict KERNELS (name -> PrimFunc)")
    return module


def select(
    file: Path | None, kernels: tuple[str, ...], variants: tuple[str, ...], dims: Dims = ()
) -> list[Task]:
    """Return what to check, all of it where nothing is named.

    Args:
        file: with KERNELS; None: registered kernels.
        kernels: names.
        variants: ids.
        dims: of one kernel, in place of those that the library ships.

    Raises:
        TaskError: a name selects nothing, or no variant serves the dims.
    """
    if dims:
        tasks = _of_dims(kernels, dims)
    elif file is not None:
        tasks = [Task(file.stem, name, str(file)) for name in load_file(file).KERNELS]
        kernels = ()
    else:
        from dsv4_kernels import registry

        tasks = [Task(s.name, v.id) for s in registry.all_kernels() for v in s.variants]
        from verify.suites import suites

        tasks += [Task(kernel, name, is_suite=True) for kernel, name in suites()]
    unknown = (set(kernels) - {t.kernel for t in tasks}) | (set(variants) - {t.variant for t in tasks})
    if unknown:
        raise TaskError(f"no kernel or variant called {', '.join(sorted(unknown))}")
    chosen = [
        t for t in tasks if (not kernels or t.kernel in kernels) and (not variants or t.variant in variants)
    ]
    if not chosen:
        raise TaskError("nothing to check")
    return chosen


def _of_dims(kernels: tuple[str, ...], dims: Dims) -> list[Task]:
    from dsv4_kernels import registry
    from verify import shapes

    if len(kernels) != 1:
        raise TaskError(f"dims are of one kernel, got {len(kernels)}")
    if kernels[0] not in {spec.name for spec in registry.all_kernels()}:
        raise TaskError(f"no kernel or variant called {kernels[0]}")
    try:
        tasks = [Task(kernels[0], name, dims=dims) for name in shapes.variants_for(kernels[0], dims)]
        for task in tasks:
            shapes.made(task.kernel, dims, task.variant)
    except shapes.ShapeError as error:
        raise TaskError(str(error)) from error
    return tasks


_COLLECT_AFTER = 200_000  # objects made and not freed before cycles are looked for: some hundred megabytes


@cache
def collect_seldom() -> None:
    """Look for garbage in cycles seldom in this process, and not among what the compiler's modules hold.

    A check makes millions of objects, hardly any in cycles: by default a twentieth of its time goes there.
    """
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, *gc.get_threshold()[1:])


LONG = 4  # times the median cost: parts with such tasks begin first, so that none is left at the end
MAX_PART = 12  # tasks that a process takes at a time


def parts_of(tasks: Sequence[Task], costs: Sequence[int]) -> list[list[int]]:
    """Return positions of tasks as the processes shall take them: see `Workers.map`.

    What is worked out once in a process stays together: signatures of variants for the same dims, which are
    compared, and the kernel that several suites are about.

    Args:
        tasks: as selected.
        costs: of each, in any unit; 0 where it is not known.
    """
    parts: list[list[int]] = []
    open_parts: dict[Hashable, list[int]] = {}  # those that take more
    for n, task in enumerate(tasks):
        key = _shared(task)
        part = open_parts.get(key)
        if key is None or part is None or len(part) == MAX_PART:
            part = []
            parts.append(part)
            open_parts[key] = part
        part.append(n)
    # The first of some variants has those of later batches lowered last, and few that are lowered are kept.
    parts = [p if tasks[p[0]].is_suite else [p[0], *reversed(p[1:])] for p in parts]
    known = [c for c in costs if c]
    limit = LONG * median(known) if known else 0
    long = [p for p in parts if any(costs[n] > limit or tasks[n].is_suite for n in p)]
    long.sort(key=lambda part: -sum(costs[n] for n in part))
    return [*long, *(part for part in parts if part not in long)]


def _shared(task: Task) -> Hashable:
    """Return what tasks have in common whose work is better done in one process; None: nothing.

    Of variants those that the dispatcher chooses from for a call; of suites, which are named after their
    claims and the kernel (`signals-flash-fp4-64`), those of one kernel.
    """
    if task.file is not None:
        return None
    if task.is_suite:
        return task.kernel, task.variant.partition("-")[2]
    from dsv4_kernels import registry

    fixed = registry.get_kernel(task.kernel).fixed_dims(task.registered())
    return task.kernel, tuple(sorted(fixed.items()))


def _each(function: Callable[[Any, Any], Any], items: list[Any], options: Any) -> list[Any]:
    return [function(item, options) for item in items]


class Workers:
    """Processes that map a function over tasks; none for one job, which runs in this process."""

    def __init__(self, jobs: int, pool: ProcessPoolExecutor | None) -> None:
        """Use `pool`, if there is one."""
        self.jobs = jobs
        self._pool = pool

    def map(
        self,
        function: Callable[[Any, Any], Any],
        items: list[Any],
        options: Any,
        parts: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[Any]:
        """Yield function(item, options) for every item, in order.

        Args:
            function: what the processes do.
            items: its first arguments.
            options: its second.
            parts: positions of items that one process takes one after the other, in the order in which
                the parts begin; each position once. Each item by itself, in order, by default.
        """
        if self._pool is None or len(items) == 1:
            return (function(item, options) for item in items)
        if parts is None:
            return self._pool.map(function, items, [options] * len(items))
        found: dict[int, tuple[Future[list[Any]], int]] = {}
        for part in parts:
            future = self._pool.submit(_each, function, [items[n] for n in part], options)
            found |= {n: (future, place) for place, n in enumerate(part)}
        return (found[n][0].result()[found[n][1]] for n in range(len(items)))


@contextmanager
def workers(jobs: int) -> Iterator[Workers]:
    """Start `jobs` processes; they import the compiler while the caller does."""
    if jobs == 1:
        yield Workers(1, None)
        return
    # A fresh process each: the compiler keeps state, and threads do not survive a fork.
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_one_thread) as pool:
        for _ in range(jobs):
            pool.submit(_import_kernels)
        yield Workers(jobs, pool)


def _one_thread() -> None:
    """Keep a worker to one core: the interpreters' products would take them all."""
    import torch

    torch.set_num_threads(1)


def _import_kernels() -> None:
    from dsv4_kernels import registry

    registry.all_kernels()
    collect_seldom()
