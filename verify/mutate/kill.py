"""Whether a property notices a mutant."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Protocol

from dsv4_kernels.contract import Contract
from verify import ir
from verify.confirm import data_of, elements_of, violated
from verify.engine import finding_of
from verify.extract import Extracted
from verify.interp.errors import InterpreterError
from verify.mutate.equivalence import Difference, Referee
from verify.origin import Origins
from verify.properties import Claims, Context, Property, all_properties
from verify.properties.refinement import PROPERTY as REFINEMENT_PROPERTY
from verify.properties.refinement import changed
from verify.refine.run import readings
from verify.signature.dispatch import Dispatch
from verify.solve import Obligation, Prover, by_z3_alone
from verify.verdict import Counterexample, Verdict

# z3 resource units a query: five times what any query of a kernel needs, so that a mutant is not waited for.
RLIMIT = 1_000_000


class BaselineError(RuntimeError):
    """The kernel itself is not PROVED, so that its mutants say nothing."""


@dataclass(frozen=True)
class Kill:
    """What became of a mutant.

    Attributes:
        verdict: PROVED where every property still holds: nothing noticed the fault.
        prop: the property that gave the verdict; empty for PROVED.
        message: its reason.
        counterexample: of REFUTED.
        evaluated: that its claim fails in exact integers, where that was looked at.
        runs: of the mutant beside the kernel; None: none was made.
        shown: what they showed; of REFUTED by them alone, the fault.
    """

    verdict: Verdict
    prop: str = ""
    message: str = ""
    counterexample: Counterexample | None = None
    evaluated: str = ""
    runs: int | None = None
    shown: str = ""


@dataclass
class Judge:
    """Checks the mutants of one kernel.

    Attributes:
        extracted: the kernel as it is.
        dispatch: batch dims, and what else the dispatcher may choose.
        minimise: make counterexamples small, to be replayed.
        referee: runs the mutants that a property does not decide; None: they stay undecided.
    """

    extracted: Extracted
    contract: Contract
    dims: Mapping[str, int]
    dispatch: Dispatch = field(default_factory=Dispatch)
    minimise: bool = False
    referee: Referee | None = None
    _proved: set[str] = field(default_factory=set)

    @cached_property
    def _sound(self) -> Context:
        return self.context(self.extracted)

    @cached_property
    def _readings(self) -> dict[int, str]:
        sound = self._sound
        return readings(sound.extracted, sound.host, sound.hypotheses)

    def context(self, extracted: Extracted) -> Context:
        """Return what the properties are given of a mutant."""
        return Context(extracted, self.contract, self.dims, dispatch=self.dispatch)

    def kill(self, mutated: Extracted, likely: tuple[str, ...] = ()) -> Kill:
        """Check a mutant; each property is first proved of the kernel itself, which leaves few new queries.

        Raises:
            BaselineError: the kernel is not PROVED in a property that would decide.
        """

        def first(context: Context, prop: Property) -> list[Obligation]:
            return changed(context, self._readings) if prop.name == REFINEMENT_PROPERTY.name else []

        def decided(run: Callable[[], Kill | None]) -> Kill:
            return decide(self.context(mutated), likely, self.minimise, self._prove, run, first)

        return with_runs(decided, self.referee, mutated)

    def prove(self) -> None:
        """Prove every property of the kernel itself, which is otherwise done as mutants ask for them.

        Raises:
            BaselineError: it is not PROVED.
        """
        with by_z3_alone():
            for prop in all_properties():
                self._prove(prop)

    def _prove(self, prop: Property) -> None:
        if prop.name in self._proved:
            return
        failed = next(_failures(self._sound, prop, False), None)
        if failed is not None:
            raise BaselineError(f"{failed.verdict} {failed.prop}: {failed.message}")
        self._proved.add(prop.name)


class Runner(Protocol):
    """Runs mutants beside their kernel.

    Attributes:
        runs: how many runs the last answer rests on.
    """

    runs: int

    def difference(self, mutated: Extracted) -> Difference | None:
        """Return how a run tells a mutant from the kernel; None if none does."""


def with_runs(
    decided: Callable[[Callable[[], Kill | None]], Kill], referee: Runner | None, mutated: Extracted
) -> Kill:
    """Return what `decided` says of a mutant, with what runs showed where it asked for them.

    Args:
        decided: is given what runs the mutant, to be called once at most; a REFUTED by it is the answer.
        referee: makes the runs; None: they show nothing.
        mutated: the mutant.
    """
    seen: list[Kill] = []

    def run() -> Kill | None:
        seen[:] = [_by_run(referee, mutated)]
        return seen[0] if seen[0].verdict is Verdict.REFUTED else None

    killed = decided(run)
    if killed.verdict is Verdict.REFUTED or not seen:
        return killed
    return replace(killed, runs=seen[0].runs, shown=seen[0].shown)


def _by_run(referee: Runner | None, mutated: Extracted) -> Kill:
    """Run a mutant beside the kernel: REFUTED where that shows a fault of a property, or other bytes."""
    if referee is None:
        return Kill(Verdict.UNKNOWN)
    try:
        found = referee.difference(mutated)
    except (ir.UnsupportedIR, InterpreterError, ImportError) as error:
        return Kill(Verdict.UNKNOWN, runs=referee.runs, shown=f"not decided by runs: {error}")
    runs = referee.runs
    if found is None:
        return Kill(Verdict.UNKNOWN, runs=runs)
    if not found.prop:
        return Kill(Verdict.UNKNOWN, runs=runs, shown=found.note)
    return Kill(Verdict.REFUTED, found.prop, f"by a run: {found.note}", runs=runs, shown=found.note)


def decide(
    context: Context,
    likely: tuple[str, ...] = (),
    minimise: bool = False,
    before: Callable[[Property], None] = lambda prop: None,
    run: Callable[[], Kill | None] = lambda: None,
    first: Callable[[Context, Property], list[Obligation]] = lambda context, prop: [],
) -> Kill:
    """Check properties, the `likely` ones first, until one is REFUTED; call `before` with each.

    Of each, `first` says what is worth a look before all is claimed. At the first property that is UNKNOWN or
    UNSUPPORTED, `run` may know better. Without a REFUTED that one decides:
    the kernel would not have passed. z3 alone is asked, so that no mutant is killed by the second solver's
    budget.
    """
    undecided: Kill | None = None
    with by_z3_alone():
        for prop in _ordered(likely):
            before(prop)
            for found in chain(_looked(context, prop, minimise, first), _failures(context, prop, minimise)):
                if found.verdict is Verdict.REFUTED:
                    return found
                if undecided is None:
                    undecided = found
                    if (shown := run()) is not None:
                        return shown
                break
    return undecided or Kill(Verdict.PROVED)


def _ordered(likely: tuple[str, ...]) -> list[Property]:
    rank = {name: position for position, name in enumerate(likely)}
    return sorted(all_properties(), key=lambda p: rank.get(p.name, len(rank)))


def _undecided(prop: Property, claims: Claims) -> Iterator[Kill]:
    yield from (Kill(Verdict.UNSUPPORTED, prop.name, i.message) for i in claims.unsupported)
    yield from (Kill(Verdict.UNKNOWN, prop.name, i.message) for i in claims.unknown)


def _looked(
    context: Context,
    prop: Property,
    minimise: bool,
    first: Callable[[Context, Property], list[Obligation]],
) -> Iterator[Kill]:
    """Yield the violation among what is looked at first, if there is one."""
    try:
        claims = Claims(first(context, prop))
    except ir.UnsupportedIR:
        return  # which the property says again
    yield from (f for f in _violated(context, prop, claims, minimise) if f.verdict is Verdict.REFUTED)


def _failures(context: Context, prop: Property, minimise: bool) -> Iterator[Kill]:
    """Yield what keeps a property from PROVED: its violations before what it cannot decide."""
    try:
        claims = prop.claims(context)
    except ir.UnsupportedIR as error:
        yield Kill(Verdict.UNSUPPORTED, prop.name, str(error))
        return
    yield from _violated(context, prop, claims, minimise)


def _violated(context: Context, prop: Property, claims: Claims, minimise: bool) -> Iterator[Kill]:
    undecided = [*_undecided(prop, claims)]
    answers = Prover(RLIMIT, recheck=False, minimise=minimise).answers(claims.obligations)
    for answer in chain(claims.answers, answers):
        message = answer.obligation.what
        if answer.verdict is Verdict.REFUTED:
            found = finding_of(context, Origins(context.extracted.tile), answer).counterexample
            shown = None
            if minimise:  # to be replayed, for which what memory holds may matter
                data = data_of(answer)
                shown = violated(answer, data)
                if found is not None and (held := elements_of(context, data)):
                    found = replace(found, values={**found.values, **held})
            yield Kill(answer.verdict, prop.name, message, found, shown or "")
            return
        if answer.verdict is not Verdict.PROVED:
            undecided.append(Kill(answer.verdict, prop.name, f"{message} ({answer.reason})"))
    yield from undecided
