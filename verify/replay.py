"""REFUTED, shown by running it: the counterexample's shape and block in the device interpreter.

A fault that the interpreter raises confirms the verdict, and so do output bytes that nobody writes, or
that are not those of the tile program. Tensors too large to hold are made where they are touched, and
then only the counterexample's block runs.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from verify import extract, host, ir
from verify.extract import Extracted
from verify.interp.errors import InterpreterError
from verify.tasks import Task
from verify.verdict import Counterexample, VariantReport, Verdict

MAX_BYTES = 1 << 26  # of all tensors together, where they are held
MAX_BLOCKS = 16  # that run together; else the counterexample's block alone
SEEDS = (0, 1)
POISONS = (0xA5, 0x5A)  # what tensors that are only written hold before a run
_BYTE_BITS = 8

_SCRIPT = '''"""{title}

Runs the counterexample in the interpreter; exit status 0 where it shows the fault, 1 where it does not.
Inputs are drawn by a fixed seed.
"""

import sys

from verify.replay import replay

# {message}
found = replay(
    kernel={kernel!r},
    variant={variant!r},
    file={file!r},
    shape={shape!r},
    block={block!r},  # of the counterexample, thread {thread!r}, loops {loops!r}
)
sys.stdout.write((found or "not shown by the interpreter") + "\\n")
sys.exit(0 if found else 1)
'''


@dataclass(frozen=True)
class Replayed:
    """A REFUTED finding and what running it showed.

    Attributes:
        script: that runs it again.
        shown: the fault; None where the run shows none.
    """

    prop: str
    script: Path
    shown: str | None


def write(report: VariantReport, task: Task, folder: Path) -> list[Replayed]:
    """Write and run a script for each REFUTED finding of a report."""
    done = []
    folder.mkdir(parents=True, exist_ok=True)
    for result in report.properties:
        refuted = [f for f in result.findings if f.verdict is Verdict.REFUTED]
        for number, finding in enumerate(refuted):
            found = finding.counterexample or Counterexample({}, {}, {}, {}, {})
            shape = dict(found.shape) or dict(report.witness)
            name = "-".join((task.kernel, task.variant, result.name, str(number)))
            script = folder / (re.sub(r"[^\w.-]", "_", name) + ".py")
            script.write_text(
                _SCRIPT.format(
                    title=f"{task.kernel}/{task.variant}: REFUTED {result.name}.",
                    message=" ".join(finding.message.split()),
                    kernel=task.kernel,
                    variant=task.variant,
                    file=str(Path(task.file).resolve()) if task.file else None,
                    shape=shape,
                    block=dict(found.block),
                    thread=dict(found.thread),
                    loops=dict(found.loops),
                )
            )
            shown = replay(
                kernel=task.kernel, variant=task.variant, file=task.file, shape=shape, block=found.block
            )
            done.append(Replayed(result.name, script, shown))
    return done


def replay(
    *,
    kernel: str,
    variant: str,
    file: str | None,
    shape: Mapping[str, int],
    block: Mapping[str, int],
) -> str | None:
    """Run a kernel at `shape` and return the fault that shows, or None.

    Args:
        kernel: registered name, or the file's.
        variant: its id, or the name in the file's KERNELS.
        file: that defines the kernel; None for a registered one.
        shape: value of each dim.
        block: launch indices by name; the block to run where not all of them are.
    """
    loaded = Task(kernel, variant, file).load()
    try:
        extracted = extract.extract(loaded.prim_func, pass_configs=loaded.pass_configs)
        return _Runner(extracted, {**loaded.dims, **shape}, block).fault()
    except ir.UnsupportedIR:  # a run that the interpreter cannot make shows nothing
        return None


class _Runner:
    def __init__(self, extracted: Extracted, dims: Mapping[str, int], block: Mapping[str, int]) -> None:
        self.extracted = extracted
        self.launch = host.read_host(extracted.host, extracted.device, extracted.tile)
        self.dims = dict(dims)
        self.block = block
        self.buffers = [b for p in extracted.tile.params if (b := extracted.tile.buffers.get(p)) is not None]
        self.bits = {b.name: self._bits(b) for b in self.buffers}
        self.written = _written_only(extracted.tile)

    def fault(self) -> str | None:
        """Return the first fault of a few schedules, or what is wrong with the outputs."""
        small = sum(self.bits.values()) <= MAX_BYTES * _BYTE_BITS
        blocks = self._blocks()
        outputs = []
        for poison in POISONS:
            for policy, seed in self._schedules():
                try:
                    outputs.append((poison, self._run(poison, policy, seed, small, blocks)))
                except InterpreterError as error:
                    return f"{type(error).__name__} ({policy}, seed {seed}): {error}"
        if not small or blocks is not None:
            return None
        return self._unwritten(outputs) or self._other_bytes(outputs[0][1])

    def _schedules(self) -> Iterator[tuple[str, int]]:
        from verify.interp.device import POLICIES

        yield from ((policy, seed) for policy in POLICIES for seed in SEEDS)

    def _run(
        self, poison: int, policy: str, seed: int, small: bool, blocks: list[int] | None
    ) -> dict[str, np.ndarray]:
        from verify.interp.device.api import run_function, view_sizes
        from verify.interp.device.run import Tensor

        held = self._held(poison) if small else {}
        tensors = {
            name: Tensor(bits, held[name]) if small else Tensor(bits, None, _made)
            for name, bits in self.bits.items()
        }
        run_function(
            self.extracted.device,
            self.launch,
            tensors,
            self.dims,
            view_sizes=view_sizes(self.extracted.device, self.extracted.lowered),
            seed=seed,
            policy=policy,
            blocks=blocks,
        )
        return held

    def _held(self, poison: int) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(0)
        held = {}
        for buffer in self.buffers:
            size = -(-self.bits[buffer.name] // _BYTE_BITS)
            drawn = generator.integers(0, 256, size, dtype=np.uint8)
            held[buffer.name] = np.full(size, poison, np.uint8) if buffer.name in self.written else drawn
        return held

    def _blocks(self) -> list[int] | None:
        """Return the counterexample's block alone if the grid is large, else None for all."""
        grid = [self._grid(axis) for axis in "xyz"]
        if grid[0] * grid[1] * grid[2] <= MAX_BLOCKS:
            return None
        indices = {
            node.tag: self.block.get(node.var.name, 0)
            for node in ir.walk(self.extracted.device.body)
            if isinstance(node, ir.Launch)
        }
        x, y, z = (indices.get(f"blockIdx.{axis}", 0) for axis in "xyz")
        return [x + grid[0] * (y + grid[1] * z)]

    def _grid(self, axis: str) -> int:
        extent = self.launch.extents.get(f"blockIdx.{axis}")
        return 1 if extent is None else self._value(extent)

    def _bits(self, buffer: ir.Buffer) -> int:
        total = buffer.dtype.bits
        for extent in buffer.shape:
            total *= self._value(extent)
        return total

    def _value(self, expr: ir.Expr) -> int:
        from verify.interp.machine import Machine

        machine = Machine()
        for node in ir.walk(expr):
            if isinstance(node, ir.Var):
                machine.env[node] = self.dims.get(node.name, 0)
        return machine.integer(expr, "extent")

    def _unwritten(self, outputs: list[tuple[int, dict[str, np.ndarray]]]) -> str | None:
        for name in sorted(self.written):
            kept = np.logical_and.reduce([held[name] == poison for poison, held in outputs])
            if kept.any():
                return f"byte {int(np.argmax(kept))} of {name} is written by nobody"
        return None

    def _other_bytes(self, got: dict[str, np.ndarray]) -> str | None:
        """Compare with what the tile program means on the same inputs."""
        from verify.interp import dtypes, run_function

        held = self._held(POISONS[0])
        machine_args: list[Any] = []
        for param in self.extracted.tile.params:
            buffer = self.extracted.tile.buffers.get(param)
            if buffer is None:
                machine_args.append(self.dims[param.name])
                continue
            stored = dtypes.argument_dtypes(buffer.dtype.name)[0]
            shape = [self._value(e) for e in buffer.shape]
            if buffer.dtype.bits < _BYTE_BITS:
                shape[-1] = shape[-1] * buffer.dtype.bits // _BYTE_BITS
            machine_args.append(torch.from_numpy(held[buffer.name]).view(stored).reshape(shape))
        run_function(self.extracted.tile, tuple(machine_args))
        for name in sorted(self.written):
            other = got[name] != held[name]
            if other.any():
                return f"byte {int(np.argmax(other))} of {name} is not what the tile program writes"
        return None


def _made(first: int, count: int) -> np.ndarray:
    """Return bytes of a tensor that is not held: any fixed function of the address."""
    address = np.arange(first, first + count, dtype=np.uint64)
    return ((address * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(56)).astype(np.uint8)


def _written_only(tile: ir.Function) -> set[str]:
    """Return the names of the tensors that the tile program writes and never reads."""
    reads, writes = set(), set()
    for node in ir.walk(tile.body):
        match node:
            case ir.Store(buffer=buffer):
                writes.add(buffer.name)
            case ir.Load(buffer=buffer):
                reads.add(buffer.name)
            case ir.Region(buffer=buffer, mode=mode):
                reads |= {buffer.name} if "r" in mode else set()
                writes |= {buffer.name} if "w" in mode else set()
    return (writes - reads) & {b.name for b in tile.buffers.values()}
