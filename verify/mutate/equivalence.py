"""Whether a mutant differs from its kernel at all: both run thread by thread, in several schedules.

A mutant is equivalent if it gives the same bytes without a fault for every input, shape and schedule
tried. This is the interpreter's word, never a person's. A kernel whose run takes many steps (products, at a
quarter of a minute each) is tried at its smallest shape alone.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import torch

from verify import ir
from verify.extract import Extracted
from verify.interp.errors import InterpreterError, UnsupportedOpError
from verify.mutate.instances import Instance

INPUT_SEEDS = (0,)
SCHEDULE_SEEDS = (0, 1, 2)
_POLICIES = ("random", "late", "ahead")  # one a seed
_MANY_STEPS = 2000  # instructions of groups in one run
_WAVE_THREADS = 128  # groups start as warpgroups: faster, with fewer schedules
_POISON = 0xA5  # what outputs hold before a run


@dataclass
class Referee:
    """Runs the mutants of one kernel beside it.

    Attributes:
        runs: how many runs of a mutant equivalence rests on.
    """

    instance: Instance
    original: Extracted
    _wanted: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)
    runs: int = 0
    _steps: int = 0

    @cached_property
    def is_slow(self) -> bool:
        """Whether one run takes so long that only mutants that are PROVED are run, at one shape."""
        seed = INPUT_SEEDS[0]
        self._want(seed, 0, next(self.instance.arguments(seed)))
        return self._steps > _MANY_STEPS

    def difference(self, mutated: Extracted) -> str | None:
        """Return how a run tells the mutant from the kernel; None if none does.

        Raises:
            UnsupportedIR: the interpreter cannot run the kernel.
        """
        self.runs = 0
        for seed in INPUT_SEEDS:
            shapes = islice(self.instance.arguments(seed), 1 if self.is_slow else None)
            for number, args in enumerate(shapes):
                want = self._want(seed, number, args)
                for schedule in SCHEDULE_SEEDS:
                    self.runs += 1
                    try:
                        got, _ = _run(mutated, args, schedule)
                    except (UnsupportedOpError, ir.UnsupportedIR):
                        raise
                    except InterpreterError as error:
                        return f"{type(error).__name__}: {error}"
                    for a, b in zip(want, got, strict=True):
                        if not torch.equal(a, b):
                            return f"other bytes (shape {number}, schedule {schedule})"
        return None

    def _want(self, seed: int, number: int, args: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        if (seed, number) not in self._wanted:
            self._wanted[seed, number], self._steps = _run(self.original, args, SCHEDULE_SEEDS[0])
        return self._wanted[seed, number]


def _run(
    extracted: Extracted, args: tuple[torch.Tensor, ...], schedule: int
) -> tuple[list[torch.Tensor], int]:
    device = importlib.import_module("verify.interp.device")
    copies = [a.clone() for a in args]
    outputs = list(_outputs(extracted, copies))
    for tensor in outputs:
        tensor.view(torch.uint8).fill_(_POISON)
    policy = _POLICIES[schedule % len(_POLICIES)]
    done = device.run(extracted, *copies, seed=schedule, policy=policy, wave_threads=_WAVE_THREADS)
    return [t.view(torch.uint8) for t in copies], done.steps


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
