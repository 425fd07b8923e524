"""refinement: the device IR reads and writes what the tile IR says, address by address.

For every statement and tile operation of the tile program, at every point (element, thread, lane,
loop iteration, block, shape): the device statement writes the place where the layout and the
pipeline stage put that element, nothing else, every place that holds it, under the same condition;
and each operand is read from the place of the operand that the author wrote, combined by the same
operations. Addresses of the tile level are mathematical integers; those of the device IR are the
expressions that are compiled, so a constant that the compiler wrapped shows (tilelang #2560), and
intermediate values are covered by `overflow`.

Points of the finite coordinates are enumerated exactly; blocks, serial loops and shapes stay
symbolic and are settled by normal form or by the solvers. What the two levels have in common (one
step after the other, in program order) and what synchronisation must add is in the ledger.

Where the two are too far apart to be compared, both are run on a few small shapes: other results are a
counterexample, equal ones say nothing.
"""

from collections.abc import Mapping

import z3

from verify import ir
from verify.properties import Claims, Context, Issue
from verify.refine.run import refine
from verify.solve import Answer, Obligation
from verify.verdict import Counterexample, Verdict

_ALWAYS = (
    "refinement: what `race` and `mbarrier` order, they order as the tile program does: a consumer reads a "
    "stage after the producer filled it in the same iteration",
    "refinement: arithmetic, casts and intrinsics of one name mean the same in the tile IR and in CUDA",
)
_MAX_STEPS = 2000  # instructions of groups in one run
_BY_USE = {
    "tma": "PTX: TMA moves the box of its descriptor in the documented swizzle; out-of-range elements read "
    "as zero; dynamic shared memory starts at a multiple of 1024 bytes",
    "wgmma": "PTX: wgmma reads registers and shared-memory descriptors, and holds D, in the documented "
    "layouts",
    "uniform": "a variable of the threads' own that a tile operation uses holds the same in all of them",
    "reduce": "tl::AllReduce<op, threads, scale, offset>: thread t gets op over the threads "
    "offset + ((t - offset) ^ (scale * k)), k < threads / scale",
}


class Refinement:
    """The device IR computes what the tile IR says; see the module."""

    name = "refinement"
    depends = ("overflow", "race")

    def claims(self, context: Context) -> Claims:
        """Return what normal forms leave open; what they settle is counted in the notes.

        Raises:
            UnsupportedIR: the host side is not understood.
        """
        found = context.refinement
        shown = _shown(context) if found.unsupported else None
        return Claims(
            answers=[] if shown is None else [shown],
            obligations=found.obligations,
            unsupported=[Issue(span, reason) for span, reason in found.unsupported],
            assumptions=[*_ALWAYS, *(_BY_USE[use] for use in sorted(found.uses))],
            notes=[
                f"{found.steps} statements; enumerated: {found.compared} addresses, operands and conditions; "
                f"{len(found.obligations)} left to the solvers"
            ],
        )


def changed(context: Context, known: Mapping[int, str]) -> list[Obligation]:
    """Return the obligations of those steps alone whose device statements read otherwise than in `known`.

    What fails among them fails among all: a look at what an edit touched, before the rest is compared.

    Args:
        context: an edited kernel.
        known: `verify.refine.run.readings` of the kernel before the edit.
    """
    return refine(context.extracted, context.host, context.hypotheses, known).obligations


def _shown(context: Context) -> Answer | None:
    """Return a refutation by runs of both levels, of kernels that are soon run."""
    from verify.confirm import shapes_of
    from verify.interp.device.outcome import difference
    from verify.interp.errors import InterpreterError

    extracted = context.extracted
    # Random data would break a contract on them.
    zeroed = {b.name for b in extracted.tile.buffers.values()} & context.contract.names()
    for shape in shapes_of(context, Counterexample({}, {}, {}, {}, {})):
        env = {**shape, **dict.fromkeys(zeroed, 0)}
        named = context.contract.terms(env, only=lambda names: bool(names & zeroed))
        if not all(holds is True for _, holds in named):
            continue
        try:
            found = difference(extracted, shape, _MAX_STEPS, zeroed)
        except (InterpreterError, ir.UnsupportedIR):
            return None
        if found is not None:
            span, reason = context.refinement.unsupported[0]
            what = f"results of the device are those of the tile program: {found}, where {reason}"
            obligation = Obligation(what, span, (), z3.BoolVal(True))
            return Answer(obligation, Verdict.REFUTED, model=shape, shown=shape)
    return None


PROPERTY = Refinement()
