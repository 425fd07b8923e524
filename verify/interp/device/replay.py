"""Replays a counterexample of the prover: the kernel at the model's shape, in the blocks it names.

Tensors of any size are made page by page where they are touched, so that a model with 2**31 rows needs
no memory for them. Whether the fault is there is the run's word: a model that no run confirms is not.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from verify import host, ir
from verify.extract import Extracted
from verify.interp.device import errors, outcome
from verify.interp.device.api import view_sizes
from verify.interp.device.run import Checks, Run, Tensor
from verify.interp.device.schedule import POLICIES, Policy, hurrying, starving
from verify.interp.errors import InterpreterError, UnsupportedOpError
from verify.ops import WARP_THREADS
from verify.verdict import Counterexample

MAX_STEPS = 400_000
MAX_BYTES = 1 << 26  # of tensors whose values are compared
MAX_BLOCKS = 8  # grids up to this size are run whole
SPARSE_SEED = 1
_WARPGROUP = 128
_ROLES = (0, WARP_THREADS, _WARPGROUP, 2 * _WARPGROUP)  # first threads of what may have a role of its own
_FIRST_THREAD = re.compile(r"\d+")  # in what a counterexample says of threads
_PHASES = "phase'"  # it says that a use of an mbarrier falls in one phase or another
_FEW = 2  # trials of a claim about results, whose results were compared already
_WIDE_BITS = 64
_OCTET = 8
_MODEL = "model"  # contents: what the counterexample says
_PAGE_MIX = 0x9E3779B1  # spreads page numbers over seeds

NOTHING = Checks(races=False, uninitialised=False, alignment=False, overflow=False, products=False)
_RACES = (
    errors.DataRaceError,
    errors.UninitialisedReadError,
    errors.AsyncRegisterError,
    errors.BarrierInitError,  # of an mbarrier: its use, and an initialisation that nothing orders before it
)
_WAITS = (
    errors.DeadlockError,
    errors.BarrierDivergenceError,
    errors.ArrivalError,
    errors.TransactionError,
    errors.BarrierInitError,
    errors.BarrierIndexError,
)
_OF_EMPTY = (errors.OutOfBoundsError, errors.LaunchError)  # what an empty tensor leads to


@dataclass(frozen=True)
class Expectation:
    """What confirms a refutation of one property.

    Attributes:
        kinds: classes of faults.
        checks: what a run looks for.
    """

    kinds: tuple[type[errors.DeviceError], ...]
    checks: Checks


EXPECTED: dict[str, Expectation] = {
    "bounds": Expectation((errors.OutOfBoundsError,), NOTHING),
    "overflow": Expectation(
        (errors.AddressOverflowError, errors.OutOfBoundsError, errors.LaunchError),
        Checks(races=False, uninitialised=False, alignment=False, names=True, products=False),
    ),
    "alignment": Expectation(
        (errors.MisalignedError, errors.LaunchError),
        Checks(races=False, uninitialised=False, overflow=False, products=False),
    ),
    "race": Expectation(_RACES, Checks(alignment=False, overflow=False, products=False)),
    "barrier": Expectation(_WAITS, NOTHING),
    "mbarrier": Expectation((*_WAITS, *_RACES), Checks(alignment=False, overflow=False, products=False)),
    "init": Expectation(
        (errors.UninitialisedReadError,),
        Checks(races=False, alignment=False, overflow=False, products=False),
    ),
}
# Refutations of what is computed: of bytes written, or of the result.
VALUES = frozenset({"coverage", "refinement", "layout", "format"})
PLACES = frozenset(EXPECTED)  # of what one thread, or two, do somewhere
_WRITTEN = frozenset({"coverage", "refinement", "schedule", "layout"})
_ANY_SCHEDULE = frozenset({"bounds", "overflow", "alignment"})  # one shows what another does
ANY = Expectation((errors.DeviceError,), Checks())


@dataclass(frozen=True)
class Replay:
    """What replaying found.

    Attributes:
        confirmed: a run has a fault of a class that the property is about.
        exact: it is at the model's thread and block.
        fault: of the last run that had one.
        runs: how many were made.
        note: one line for people.
    """

    confirmed: bool
    exact: bool
    fault: InterpreterError | None
    runs: int
    note: str


def replay(
    extracted: Extracted,
    counterexample: Counterexample,
    property_name: str | None = None,
    *,
    sound: Extracted | None = None,
    max_steps: int | outcome.Budget = MAX_STEPS,
) -> Replay:
    """Run `extracted` as `counterexample` says and report whether the fault shows.

    Args:
        extracted: the kernel.
        counterexample: of a REFUTED verdict.
        property_name: the property; without it any fault confirms.
        sound: the kernel before it was edited: a fault that it has too, on the same bytes, confirms nothing.
        max_steps: instructions of groups before a run is given up, or for all runs together.

    Raises:
        UnsupportedOpError: the kernel uses something that has no meaning here.
    """
    try:
        trials = _Trials(extracted, counterexample, property_name, sound, max_steps)
    except ir.UnsupportedIR as error:
        raise UnsupportedOpError(str(error)) from error
    return trials.replay()


class _Trials:
    """Runs of one counterexample.

    Attributes:
        last: the fault of the last run that had one which confirms nothing.
        runs: how many were made.
    """

    def __init__(
        self,
        extracted: Extracted,
        model: Counterexample,
        property_name: str | None,
        sound: Extracted | None,
        max_steps: int | outcome.Budget,
    ) -> None:
        self.extracted, self.model, self.name = extracted, model, property_name
        self.sound = sound
        self.budget = max_steps if isinstance(max_steps, outcome.Budget) else outcome.Budget(max_steps)
        self.expectation = EXPECTED.get(property_name or "", ANY)
        self.last: InterpreterError | None = None
        self.runs = 0
        self._launch, self._sizes = _launch_of(extracted), _sizes_of(extracted)

    def replay(self) -> Replay:
        """Compare results where they are what is refuted, then look for a fault."""
        planned = [*self._planned()]
        if self.name in VALUES:
            found = self._difference() or self._each(planned[:_FEW], only_model=True)
            if found is not None or self.name != "coverage":
                return found or self._nothing()
        if self.name in _ANY_SCHEDULE:  # one shows what another does, unless another fault comes before it
            found = self._each([t for t in planned if t[1] == "late"])
            if found is not None or self.last is None:
                return found or self._nothing()
            planned = [t for t in planned if t[1] != "late"]
        return self._phases() or self._each(planned) or self._nothing()

    def _phases(self) -> Replay | None:
        """Look for two runs in which one use of an mbarrier falls in two phases, if that is refuted."""
        if self.name != "mbarrier" or _PHASES not in self.model.values:
            return None
        found = self._landing(self.extracted)
        if found is None or (self.sound is not None and self._landing(self.sound) is not None):
            return None
        return Replay(True, True, None, self.runs, f"confirmed by two runs: {found}")

    def _landing(self, extracted: Extracted) -> str | None:
        first: dict[tuple[int, int, int, int], tuple[str, int, str]] = {}
        for policy in self._near() + [p for p in POLICIES if POLICIES[p].elects_first]:
            self.runs += 1
            made = self._made(extracted, "zeros", policy)
            made.landings = {}
            with suppress(errors.DeviceError):
                self._execute(made, _blocks(made, self.model)[:1])
            for place, (name, phase) in made.landings.items():
                known = first.setdefault(place, (name, phase, made.policy.name))
                if known[:2] != (name, phase):
                    block, _, thread, count = place
                    return (
                        f"use {count} of {known[0]} by thread {thread} of block {block} is in phase "
                        f"{known[1]} ({known[2]}), and of {name} in phase {phase} ({made.policy.name})"
                    )
        return None

    def _difference(self) -> Replay | None:
        self.runs += 1
        try:
            different = outcome.difference(
                self.extracted,
                self.model.shape,
                self.budget,
                max_bytes=MAX_BYTES,
                held=_contents_of(self.model),
            )
        except UnsupportedOpError:
            raise
        except InterpreterError as error:
            self.last = error
            return None
        if different is None:
            return None
        return Replay(True, True, None, self.runs, f"confirmed: {different}")

    def _planned(self) -> Iterator[tuple[str, str | Policy]]:
        value = self.model.values.get("value") if self.name == "overflow" else None
        if isinstance(value, int):
            yield str(value), "late"
        if _contents_of(self.model):
            yield _MODEL, "late"
        if isinstance(self.model.values.get("late"), int):
            yield "zeros", self._near()[0]
        yield from _TRIALS
        if self.name not in _ANY_SCHEDULE:
            yield from _SCHEDULES
        if self.name == "mbarrier":
            yield from (("zeros", policy) for policy in self._near())

    def _near(self) -> list[Policy]:
        """Return policies about the threads that the model speaks of: late, or ahead of the others."""
        late = self.model.values.get("late")
        if isinstance(late, int):
            return [starving(late)]
        named = _FIRST_THREAD.search(str(self.model.values.get("threads", "")))
        if named is None:
            return []
        thread = int(named[0])
        found = [make(thread, late) for make in (starving, hurrying) for late in (False, True)]
        roles = [starving(r, late=False) for r in _ROLES if r != thread]
        return [*roles, *found] if "arrivals_missing" in self.model.values else [*found, *roles]

    def _each(self, planned: list[tuple[str, str | Policy]], only_model: bool = False) -> Replay | None:
        for contents, policy in planned:
            if not self.budget.left:
                return None
            self.runs += 1
            try:
                missing = self._run(self.extracted, contents, policy, only_model)
                if missing is not None and self.name in _WRITTEN:
                    return Replay(True, True, None, self.runs, f"confirmed under {_named(policy)}: {missing}")
            except errors.StepLimitError as error:
                self.last = self.last or error
                return None  # no schedule ends it
            except errors.DeviceError as error:
                if isinstance(error, self.expectation.kinds) and not self._is_usual(contents, policy, error):
                    exact = _is_at(error, self.model, self.extracted.device)
                    note = f"confirmed under {_named(policy)}: {error}"
                    return Replay(True, exact, error, self.runs, note)
                self.last = error
            except UnsupportedOpError:
                raise
            except InterpreterError as error:
                self.last = error
        return None

    def _made(self, extracted: Extracted, contents: str, policy: str | Policy) -> Run:
        """Return a launch that is not begun."""
        return Run(
            extracted.device,
            self._launch if extracted is self.extracted else _launch_of(extracted),
            sparse_tensors(extracted.tile, self.model.shape, contents, _contents_of(self.model)),
            self.model.shape,
            policy=POLICIES[policy] if isinstance(policy, str) else policy,
            seed=0,
            checks=self.expectation.checks,
            view_sizes=self._sizes if extracted is self.extracted else _sizes_of(extracted),
            max_steps=self.budget.of_next,
            wave_threads=_WARPGROUP if isinstance(policy, str) else WARP_THREADS,
        )

    def _execute(self, made: Run, blocks: list[int]) -> None:
        try:
            made.execute(blocks)
        finally:
            self.budget.charge(made)

    def _run(
        self, extracted: Extracted, contents: str, policy: str | Policy, only_model: bool = False
    ) -> str | None:
        """Return what a run that ends leaves unwritten."""
        made = self._made(extracted, contents, policy)
        blocks = _blocks(made, self.model)
        if (only_model or isinstance(policy, Policy)) and not made.runs_together:
            blocks = blocks[:1]
        self._execute(made, blocks)
        return outcome.unwritten(made) if len(blocks) == math.prod(made.grid) else None

    def _is_usual(self, contents: str, policy: str | Policy, error: errors.DeviceError) -> bool:
        """Whether the kernel without the fault breaks down on these bytes, too: they may be no legal ones.

        Zeros are, but as indices of a tensor that has no row.
        """
        is_legal = contents == "zeros" and (
            not isinstance(error, _OF_EMPTY) or is_full(self.extracted.tile, self.model.shape)
        )
        if self.sound is None or is_legal:
            return False
        try:
            self._run(self.sound, contents, policy)
        except errors.DeviceError as error:
            return isinstance(error, self.expectation.kinds)
        return False

    def _nothing(self) -> Replay:
        note = f"not confirmed in {self.runs} runs" + (f"; last: {self.last}" if self.last else "")
        return Replay(False, False, self.last, self.runs, note)


def _named(policy: str | Policy) -> str:
    return policy if isinstance(policy, str) else policy.name


def _launch_of(extracted: Extracted) -> host.Host:
    return host.read_host(extracted.host, extracted.device, extracted.tile)


def _sizes_of(extracted: Extracted) -> Mapping[ir.Var, tuple[ir.DType, int]]:
    return view_sizes(extracted.device, extracted.lowered)


# Contents of tensors and policy, the most telling first.
_TRIALS = (
    ("zeros", "late"),
    ("random", "late"),
    ("random", "ahead"),
    ("random", "behind"),
    ("random", "random"),
    ("random", "eager"),
    ("ones", "late"),
    ("more", "late"),
)
# Where random bytes as indices let every thread go home, no schedule of those shows anything.
_SCHEDULES = tuple(("zeros", name) for name in ("eager", "ahead", "behind", "random"))


# --------------------------------------------------------------------------- tensors
def sparse_tensors(
    tile: ir.Function,
    dims: Mapping[str, int],
    contents: str,
    held: Mapping[str, Mapping[int, int]] | None = None,
) -> dict[str, Tensor]:
    """Return memory for every tensor of a kernel, which exists where it is touched.

    Args:
        tile: the kernel's tile stage.
        dims: values by shape parameter.
        contents: "zeros", "ones" (every bit: -1), "random", "more" (other random bytes), "model" (`held`), or
            the value of every 64-bit integer, whose fellows are 0.
        held: elements by tensor and place, for "model"; the others are 0.
    """
    found = {}
    for number, buffer in enumerate(tile.buffers.values()):
        shape = [integer(s, dims) for s in buffer.shape]
        strides = [integer(s, dims) for s in buffer.strides]
        if strides:
            count = 1 + sum((e - 1) * s for e, s in zip(shape, strides, strict=True))
        else:
            count = math.prod(shape)
        elements = (held or {}).get(buffer.name, {}) if contents == _MODEL else {}
        filler = _filler("zeros" if contents == _MODEL else contents, number, buffer.dtype)
        if elements:
            filler = _filler_of(elements, buffer.dtype)
        found[buffer.name] = Tensor(count * buffer.dtype.bits, None, filler)
    return found


_ELEMENT = re.compile(r"(\w+)\[(\d+)\]")


def _contents_of(model: Counterexample) -> dict[str, dict[int, int]]:
    """Return what a counterexample says of elements of tensors: `name[place]` among its values."""
    found: dict[str, dict[int, int]] = {}
    for name, value in model.values.items():
        match = _ELEMENT.fullmatch(name)
        if match is not None and _is_number(value):
            found.setdefault(match[1], {})[int(match[2])] = int(value)
    return found


def _filler_of(elements: Mapping[int, int], dtype: ir.DType) -> Callable[[int, int], np.ndarray]:
    size = dtype.bits // _OCTET

    def fill(first: int, count: int) -> np.ndarray:
        found = np.zeros(count, np.uint8)
        for place, value in elements.items():
            octets = (value % (1 << dtype.bits)).to_bytes(size, "little")
            for number, octet in enumerate(octets, place * size - first):
                if 0 <= number < count:
                    found[number] = octet
        return found

    return fill


def _filler(contents: str, number: int, dtype: ir.DType) -> Callable[[int, int], np.ndarray]:
    def zeros(first: int, size: int) -> np.ndarray:
        return np.zeros(size, np.uint8)

    def ones(first: int, size: int) -> np.ndarray:
        return np.full(size, 0xFF, np.uint8)

    def random(first: int, size: int) -> np.ndarray:
        seed = (SPARSE_SEED + (contents == "more"), number, first * _PAGE_MIX & 0xFFFFFFFF)
        return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)

    def constant(first: int, size: int) -> np.ndarray:
        octets = np.frombuffer(int(contents).to_bytes(_WIDE_BITS // 8, "little", signed=True), np.uint8)
        return octets[(first + np.arange(size)) % len(octets)].copy()

    named = {"zeros": zeros, "ones": ones, "random": random, "more": random}
    if contents in named:
        return named[contents]
    return constant if dtype.is_int and dtype.bits == _WIDE_BITS else zeros


def is_full(tile: ir.Function, dims: Mapping[str, int]) -> bool:
    """Return whether no tensor of a kernel is empty.

    Raises:
        UnsupportedIR: an extent is not arithmetic over `dims`.
    """
    return all(integer(s, dims) > 0 for b in tile.buffers.values() for s in b.shape)


def integer(node: ir.Expr, dims: Mapping[str, int]) -> int:
    """Return an extent, arithmetic over shape parameters.

    Raises:
        UnsupportedIR: it is anything else.
    """
    match node:
        case ir.Const(value=value):
            return int(value)
        case ir.Var(name=name) if name in dims:
            return dims[name]
        case ir.BinOp(op=op, a=a, b=b) if op in _OPS:
            return _OPS[op](integer(a, dims), integer(b, dims))
        case ir.Cast(a=a):
            return integer(a, dims)
    raise ir.UnsupportedIR("tensor extent that is not arithmetic over shape parameters")


_OPS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "floormod": lambda a, b: a % b,
    "min": min,
    "max": max,
}


# --------------------------------------------------------------------------- places
def _blocks(run: Run, counterexample: Counterexample) -> list[int]:
    """Return the blocks to run: all of a small grid, else the model's and the other one of a race."""
    names = {v.name: tag for tag, v in _launch_vars(run.device).items() if tag.startswith("blockIdx")}
    first = _number(run, {names[n]: v for n, v in counterexample.block.items() if n in names})
    others = {
        names[n.removeprefix("other ")]: int(v)
        for n, v in counterexample.values.items()
        if n.startswith("other ") and n.removeprefix("other ") in names and _is_number(v)
    }
    found = [first]
    if others:
        same = {names[n]: v for n, v in counterexample.block.items() if n in names}
        found.append(_number(run, {**same, **others}))
    total = math.prod(run.grid)
    if total <= MAX_BLOCKS:
        found += range(total)
    return list(dict.fromkeys(n for n in found if 0 <= n < total)) or ([0] if total else [])


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or str(value).lstrip("-").isdigit()


def _number(run: Run, at: Mapping[str, int]) -> int:
    x, y, z = (at.get(f"blockIdx.{a}", 0) for a in "xyz")
    nx, ny, _ = run.grid
    return x + nx * (y + ny * z)


def _launch_vars(function: ir.Function) -> dict[str, ir.Var]:
    return {n.tag: n.var for n in ir.walk(function.body) if isinstance(n, ir.Launch)}


def _is_at(error: errors.DeviceError, counterexample: Counterexample, function: ir.Function) -> bool:
    """Whether a fault is at the model's thread and block."""
    names = {v.name: tag for tag, v in _launch_vars(function).items()}
    block = {names[n]: v for n, v in counterexample.block.items() if n in names}
    thread = {names[n]: v for n, v in counterexample.thread.items() if n in names}
    where = error.where
    if where.block and any(
        block.get(f"blockIdx.{a}", at) != at for a, at in zip("xyz", where.block, strict=True)
    ):
        return False
    if set(thread) - {"threadIdx.x"} and any(thread[t] for t in thread if t != "threadIdx.x"):
        return False  # threads of several dimensions are reported by linear number
    return not where.threads or "threadIdx.x" not in thread or thread["threadIdx.x"] in where.threads
