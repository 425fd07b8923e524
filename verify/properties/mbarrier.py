"""Every mbarrier is initialised once, every phase gets what it counts, every wait its own phase.

`verify/sync/protocol.py` proves it for all trip counts: arrivals and bytes of each phase, parities,
phases carried over persistent tiles, nobody a phase ahead or behind, no cycle of waits. Where that
fails, `verify/sync/rehearsal.py` looks for a run that shows the fault.
"""

from typing import Any

import z3

from verify import ir
from verify.encode import constants_of
from verify.properties import Claims, Context, Issue
from verify.solve import Answer, Obligation
from verify.sync.phases import Phases
from verify.sync.protocol import Fact, Protocol
from verify.sync.rehearsal import Fault, find_fault
from verify.verdict import Verdict
from verify.walk import Site

NAME = "mbarrier"
_ELECTION = "elect.sync picks the same one lane of a warp each time, once all its lanes have come there"


class Mbarrier:
    """Property `mbarrier`."""

    name = NAME
    depends = ("overflow", "bounds")

    def claims(self, context: Context) -> Claims:
        """Return what was proved of the kernel's mbarriers, or what goes wrong with them."""
        claims = Claims()
        protocol = Protocol(context)
        if not protocol.uses:
            claims.notes.append("the kernel has no mbarrier")
            return claims
        claims.spent.append(protocol.phases.prover)
        why: ir.UnsupportedIR | None = None
        try:
            facts = protocol.check()
        except ir.UnsupportedIR as error:
            facts, why = protocol.facts, error
        claims.answers += [_answer(f.what, f.site, Verdict.PROVED) for f in facts if f.shown]
        missing = [f for f in facts if not f.shown]
        claims.answers += [_certain(context, f) for f in missing if f.certain]
        doubtful = [f for f in missing if not f.certain]
        if doubtful or why is not None:
            fault = find_fault(context, protocol.phases)
            if fault is not None:
                claims.answers.append(_refuted(fault))
            else:
                claims.unknown += [Issue(f.site.span, f"{f.what}: {f.why}") for f in doubtful]
            if fault is None and why is not None:
                claims.unknown.append(Issue(None, str(why)))
        if any(u.elected for u in protocol.uses):
            claims.assumptions.append(_ELECTION)
        claims.notes.append(_summary(protocol.phases))
        return claims


PROPERTY = Mbarrier()


def _answer(what: str, site: Site, verdict: Verdict, **rest: Any) -> Answer:
    shown = rest.get("shown", {})
    obligation = Obligation(what, site.span, (), z3.BoolVal(True), shown, site)
    return Answer(obligation, verdict, **rest)


def _certain(context: Context, fact: Fact) -> Answer:
    """Return the refutation of a fact that fails in every run of the statement."""
    solver = z3.Solver()
    solver.add(*(h.term for h in fact.site.scope.hypotheses))
    values = {}
    if solver.check() == z3.sat:
        model = solver.model()
        values = {d.name(): model[d].as_long() for d in model.decls() if z3.is_int_value(model[d])}
    names = set().union(*(constants_of(h.term) for h in fact.site.scope.hypotheses))
    values |= {n: 0 for n in names if n not in values}
    return _answer(
        fact.what, fact.site, Verdict.REFUTED, reason=fact.why, model=values, shown={"why": fact.why}
    )


def _refuted(fault: Fault) -> Answer:
    return _answer(fault.what, fault.site, Verdict.REFUTED, model=fault.values, shown=fault.shown)


def _summary(phases: Phases) -> str:
    kinds = [u.kind for u in phases.uses]
    found = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
    return f"uses of mbarriers: {found}"
