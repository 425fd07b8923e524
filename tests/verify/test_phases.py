"""Phases of mbarriers, derived from the device IR."""

import pytest
import z3

from dsv4_kernels.contract import Contract
from tests.verify import barrier_kernels as kernels
from tests.verify import samples
from verify import ir
from verify.properties import Context
from verify.sync.phases import Phases

ROWS = Contract(("0 <= m", "m <= 65536"))
STEPS = 8  # of the pipeline of every kernel here


def phases_of(prim_func):
    context = Context(samples.extracted(prim_func), ROWS, {})
    phases = Phases(context)
    found = []
    for use in phases.uses:
        if use.kind == "init":
            continue
        wait = use.kind == "wait"
        phase = phases.of_wait(use.site) if wait else phases.of_arrival(use.site)
        found.append((use, phase))
    return found


def at(term, use, wave, step):
    loops = [i.const for i in use.site.scope.loops if i.tag == "loop"]
    values = ([wave, step] if len(loops) > 1 else [step])[: len(loops)]
    pairs = [(c, z3.IntVal(v)) for c, v in zip(loops, values, strict=True)]
    return z3.simplify(z3.substitute(term, *pairs)).as_long()


@pytest.mark.parametrize("kernel", [kernels.persistent, kernels.waves, kernels.by_hand])
def test_phases_count_visits_over_all_loops(kernel):
    found = phases_of(kernel())
    persistent = kernel is not kernels.by_hand
    assert {use.kind for use, _ in found} == {"wait", "arrive", "expect", "copy"}
    for use, phase in found:
        producer_wait = use.kind == "wait" and any(
            u.kind == "arrive" and u.barrier is use.barrier and len(u.threads) == kernels.ROLE
            for u, p in found
            if at(p.slot, u, 0, 0) == at(phase.slot, use, 0, 0)
        )
        for wave, step in [(0, 0), (0, 7), (1, 0), (1, 5), (4, 3)]:
            visit = (STEPS * wave if persistent else 0) + step
            expected = visit // kernels.STAGES - (1 if producer_wait else 0)
            assert at(phase.number, use, wave, step) == expected
            assert at(phase.slot, use, wave, step) % kernels.STAGES == visit % kernels.STAGES


def test_an_operation_that_is_no_use_has_no_phase():
    context = Context(samples.extracted(kernels.by_hand()), ROWS, {})
    store = next(s for s in context.device_sites if isinstance(s.node, ir.Store))
    with pytest.raises(ir.UnsupportedIR, match="no use of an mbarrier"):
        Phases(context).of_wait(store)
