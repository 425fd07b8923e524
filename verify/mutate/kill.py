"""Whether a property notices a mutant."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

from dsv4_kernels.contract import Contract
from verify import ir
from verify.confirm import data_of, elements_of, violated
from verify.engine import finding_of
from verify.extract import Extracted
from verify.origin import Origins
from verify.properties import Claims, Context, Property, all_properties
from verify.signature.dispatch import Dispatch
from verify.solve import Prover, by_z3_alone
from verify.verdict import Counterexample, Verdict

# z3 resource units a query: five times what any query of a kernel needs, so that a mutant is not waited for.
_RLIMIT = 1_000_000


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
    """

    verdict: Verdict
    prop: str = ""
    message: str = ""
    counterexample: Counterexample | None = None
    evaluated: str = ""


@dataclass
class Judge:
    """Checks the mutants of one kernel.

    Attributes:
        extracted: the kernel as it is.
        dispatch: batch dims, and what else the dispatcher may choose.
        minimise: make counterexamples small, to be replayed.
    """

    extracted: Extracted
    contract: Contract
    dims: Mapping[str, int]
    dispatch: Dispatch = field(default_factory=Dispatch)
    minimise: bool = False
    _proved: set[str] = field(default_factory=set)

    @cached_property
    def _sound(self) -> Context:
        return self.context(self.extracted)

    def context(self, extracted: Extracted) -> Context:
        """Return what the properties are given of a mutant."""
        return Context(extracted, self.contract, self.dims, dispatch=self.dispatch)

    def kill(self, mutated: Extracted, likely: tuple[str, ...] = ()) -> Kill:
        """Check a mutant; each property is first proved of the kernel itself, which leaves few new queries.

        Raises:
            BaselineError: the kernel is not PROVED in a property that would decide.
        """
        return decide(self.context(mutated), likely, self.minimise, self._prove)

    def _prove(self, prop: Property) -> None:
        if prop.name in self._proved:
            return
        failed = next(_failures(self._sound, prop, False), None)
        if failed is not None:
            raise BaselineError(f"{failed.verdict} {failed.prop}: {failed.message}")
        self._proved.add(prop.name)


def decide(
    context: Context,
    likely: tuple[str, ...] = (),
    minimise: bool = False,
    before: Callable[[Property], None] = lambda prop: None,
) -> Kill:
    """Check properties, the `likely` ones first, until one is REFUTED; call `before` with each.

    Without one, the first that is UNKNOWN or UNSUPPORTED decides: the kernel would not have passed.
    z3 alone is asked, so that no mutant is killed by the second solver's budget.
    """
    undecided: Kill | None = None
    with by_z3_alone():
        for prop in _ordered(likely):
            before(prop)
            for found in _failures(context, prop, minimise):
                if found.verdict is Verdict.REFUTED:
                    return found
                undecided = undecided or found
                break
    return undecided or Kill(Verdict.PROVED)


def _ordered(likely: tuple[str, ...]) -> list[Property]:
    rank = {name: position for position, name in enumerate(likely)}
    return sorted(all_properties(), key=lambda p: rank.get(p.name, len(rank)))


def _undecided(prop: Property, claims: Claims) -> Iterator[Kill]:
    yield from (Kill(Verdict.UNSUPPORTED, prop.name, i.message) for i in claims.unsupported)
    yield from (Kill(Verdict.UNKNOWN, prop.name, i.message) for i in claims.unknown)


def _failures(context: Context, prop: Property, minimise: bool) -> Iterator[Kill]:
    """Yield what keeps a property from PROVED: its violations before what it cannot decide."""
    try:
        claims = prop.claims(context)
    except ir.UnsupportedIR as error:
        yield Kill(Verdict.UNSUPPORTED, prop.name, str(error))
        return
    undecided = [*_undecided(prop, claims)]
    answers = Prover(_RLIMIT, recheck=False, minimise=minimise).answers(claims.obligations)
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
