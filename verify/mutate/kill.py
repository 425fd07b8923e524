"""Whether a property notices a mutant."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dsv4_kernels.contract import Contract
from verify import ir
from verify.extract import Extracted
from verify.properties import Claims, Context, Property, all_properties
from verify.solve import Prover
from verify.verdict import Verdict


@dataclass(frozen=True)
class Kill:
    """What became of a mutant.

    Attributes:
        verdict: PROVED where every property still holds: nothing noticed the fault.
        prop: the property that gave the verdict; empty for PROVED.
        message: its reason.
    """

    verdict: Verdict
    prop: str = ""
    message: str = ""


def kill(
    extracted: Extracted, contract: Contract, dims: Mapping[str, int], likely: tuple[str, ...] = ()
) -> Kill:
    """Check properties, the `likely` ones first, until one is REFUTED.

    Without one, the first that is UNKNOWN or UNSUPPORTED decides: the kernel would not have passed.
    z3 alone is asked, so that no mutant is killed by the second solver's budget.
    """
    context = Context(extracted, contract, dims)
    undecided: Kill | None = None
    for prop in _ordered(likely):
        for found in _failures(context, prop):
            if found.verdict is Verdict.REFUTED:
                return found
            undecided = undecided or found
            break
    return undecided or Kill(Verdict.PROVED)


def _ordered(likely: tuple[str, ...]) -> list[Property]:
    rank = {name: position for position, name in enumerate(likely)}
    return sorted(all_properties(), key=lambda p: rank.get(p.name, len(rank)))


def _failures(context: Context, prop: Property) -> Iterator[Kill]:
    """Yield what keeps a property from PROVED: its violations before what it cannot decide."""
    try:
        claims = prop.claims(context)
    except ir.UnsupportedIR as error:
        yield Kill(Verdict.UNSUPPORTED, prop.name, str(error))
        return
    undecided = [*_undecided(prop, claims)]
    answers = Prover(recheck=False, minimise=False).answers(claims.obligations)
    for answer in (*claims.answers, *answers):
        if answer.verdict is Verdict.REFUTED:
            yield Kill(answer.verdict, prop.name, answer.obligation.what)
            return
        if answer.verdict is not Verdict.PROVED:
            undecided.append(Kill(answer.verdict, prop.name, f"{answer.obligation.what} ({answer.reason})"))
    yield from undecided


def _undecided(prop: Property, claims: Claims) -> Iterator[Kill]:
    yield from (Kill(Verdict.UNSUPPORTED, prop.name, i.message) for i in claims.unsupported)
    yield from (Kill(Verdict.UNKNOWN, prop.name, i.message) for i in claims.unknown)
