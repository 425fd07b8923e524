"""Whether a mutant differs from its kernel at all: both run thread by thread, in several schedules.

A mutant is equivalent if it gives the same bytes without a fault for every input, shape and schedule
tried. This is the interpreter's word, never a person's. Of a kernel whose run takes many steps (products) the
first block runs (under one policy) and the last (under the others), at the largest of the small shapes alone.
"""

import importlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from verify import ir
from verify.extract import Extracted
from verify.interp.device import errors
from verify.interp.device.errors import StepLimitError
from verify.interp.errors import InterpreterError, UnsupportedOpError
from verify.mutate.instances import Instance

INPUT_SEEDS = (0,)
SCHEDULE_SEEDS = (0, 1, 2)
_POLICIES = ("random", "late", "ahead")  # one a seed
_MANY_STEPS = 2000  # instructions of groups in one run
_WAVE_THREADS = 128  # groups start as warpgroups: faster, with fewer schedules
_POISON = 0xA5  # what outputs hold before a run
# The property that each class of fault is about, the narrower class first.
_ABOUT: tuple[tuple[type[InterpreterError], str], ...] = (
    (errors.OutOfBoundsError, "bounds"),
    (errors.MisalignedError, "alignment"),
    (errors.LaunchError, "alignment"),
    (errors.AddressOverflowError, "overflow"),
    (errors.UninitialisedReadError, "init"),
    (errors.DataRaceError, "race"),
    (errors.AsyncRegisterError, "race"),
    (errors.BarrierDivergenceError, "barrier"),
    (errors.DeadlockError, "mbarrier"),
    (errors.ArrivalError, "mbarrier"),
    (errors.TransactionError, "mbarrier"),
    (errors.BarrierInitError, "mbarrier"),
)
_Ran = tuple[tuple[int, int, int], list[torch.Tensor]]  # the grid, the bytes of every argument


@dataclass(frozen=True)
class Difference:
    """What tells a mutant from its kernel, on the inputs of a test case.

    Attributes:
        prop: the property that the fault breaks; of other bytes, `refinement`: the kernel, whose bytes
            these are not, is PROVED to compute what its tile program does. Empty for a run without end.
        note: one line for people.
    """

    prop: str
    note: str


@dataclass
class Referee:
    """Runs the mutants of one kernel beside it.

    Attributes:
        runs: how many runs of a mutant equivalence rests on.
    """

    instance: Instance
    original: Extracted
    _wanted: dict[tuple[int, int, int | None], _Ran] = field(default_factory=dict)
    runs: int = 0

    @cached_property
    def blocks(self) -> list[int] | None:
        """The blocks that run, by number: the first and the last where all take long; None: all."""
        every = [*self.instance.arguments(INPUT_SEEDS[0])]
        if not every:
            raise ir.UnsupportedIR("no test case launches it")
        smallest, largest = (
            _launched(self.original, args, SCHEDULE_SEEDS[0]) for args in (every[0], every[-1])
        )
        count = math.prod(smallest.grid)
        if smallest.runs_together:
            return None
        smallest.max_steps = _MANY_STEPS // count
        try:
            smallest.execute([0])
        except StepLimitError:
            return sorted({0, math.prod(largest.grid) - 1})
        return None

    @property
    def is_slow(self) -> bool:
        """Whether one run takes so long that mutants are run at one shape."""
        return self.blocks is not None

    def difference(self, mutated: Extracted) -> Difference | None:
        """Return how a run tells the mutant from the kernel; None if none does.

        Raises:
            UnsupportedIR: the interpreter cannot run the kernel.
        """
        self.runs = 0
        for seed in INPUT_SEEDS:
            shapes = [*enumerate(self.instance.arguments(seed))]
            for number, args in shapes[-1:] if self.is_slow else shapes:
                for schedule in SCHEDULE_SEEDS:
                    self.runs += 1
                    blocks = None if self.blocks is None else [self.blocks[-1 if schedule else 0]]
                    try:
                        grid, got = _run(mutated, args, schedule, blocks)
                    except (UnsupportedOpError, ir.UnsupportedIR):
                        raise
                    except InterpreterError as error:
                        about = next((prop for kind, prop in _ABOUT if isinstance(error, kind)), "")
                        return Difference(about, f"{type(error).__name__}: {error}")
                    same_grid, want = self._want(seed, number, args, blocks)
                    if self.blocks is not None and grid != same_grid:
                        return Difference("refinement", f"a grid of {grid} blocks, not {same_grid}")
                    for a, b in zip(want, got, strict=True):
                        if not torch.equal(a, b):
                            where = f"shape {number}, schedule {schedule}"
                            return Difference("refinement", f"other bytes ({where})")
        return None

    def _want(self, seed: int, number: int, args: tuple[torch.Tensor, ...], blocks: list[int] | None) -> _Ran:
        key = (seed, number, blocks[0] if blocks else None)
        if key not in self._wanted:
            self._wanted[key] = _run(self.original, args, SCHEDULE_SEEDS[0], blocks)
        return self._wanted[key]


def _run(
    extracted: Extracted, args: tuple[torch.Tensor, ...], schedule: int, blocks: list[int] | None
) -> _Ran:
    copies = [a.clone() for a in args]
    for tensor in _outputs(extracted, copies):
        tensor.view(torch.uint8).fill_(_POISON)
    run = _launched(extracted, copies, schedule)
    count = math.prod(run.grid)
    run.execute(None if blocks is None else [n for n in blocks if n < count])
    return run.grid, [t.view(torch.uint8) for t in copies]


def _launched(extracted: Extracted, args: Sequence[torch.Tensor], schedule: int) -> Any:
    """Return a launch of the device IR on `args`, not begun."""
    device = importlib.import_module("verify.interp.device.api")
    policy = _POLICIES[schedule % len(_POLICIES)]
    return device.launched(extracted, *args, seed=schedule, policy=policy, wave_threads=_WAVE_THREADS)


def _outputs(extracted: Extracted, args: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the arguments that the tile program writes and never reads."""
    tile = extracted.tile
    reads, writes = set(), set()
    for node in ir.walk(tile.body):
        match node:
            case ir.Store(buffer=buffer):
                writes.add(buffer.data)
            case ir.Load(buffer=buffer):
                reads.add(buffer.data)
            case ir.Region(buffer=buffer, mode=mode):
                reads |= {buffer.data} if "r" in mode else set()
                writes |= {buffer.data} if "w" in mode else set()
    for param, value in zip(tile.params, args, strict=True):
        buffer = tile.buffers.get(param)
        if buffer is not None and buffer.data in writes - reads:
            yield value
