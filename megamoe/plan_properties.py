"""Properties of the plan's kernel that follow data, for every routing: suites `properties-plan*`.

Where an expert's rows begin is a fact about counting, so the verifier leaves `coverage`, `schedule`, `init`
and `race` open. The suites `plan*` prove it of the same CUDA text; a property is composed mechanically, as of
the fused kernel: each place of the device IR that touches a storage has to be one that `plan_follow` has
followed, or an atomic access of the words by which ranks meet. What is not, or rests on a claim that is not
PROVED of this text, is UNKNOWN. What those claims leave is proved here: which elements of the outputs are
written, by whom, and that what a row gets is a function of its entry alone (`batch_invariance`).
"""

from collections.abc import Iterator

import z3

from megamoe.plan_count import BLOCKS, MINE, RANK, given
from megamoe.plan_follow import Follower
from megamoe.plan_guide import NO_ROW, WEIGHT, PlanGuide
from megamoe.plan_proof import OUTPUTS
from megamoe.properties_proof import Missing, Use, uses
from verify import ir
from verify.ir import UnsupportedIR
from verify.properties import Claims, Issue
from verify.solve import Obligation
from verify.symbols import summary

CLAIMS = ("coverage", "schedule", "init", "race", "batch_invariance")
LASTING = ("signals", "epochs", "status")  # words that outlive a launch
ASSUMPTIONS = (
    "accesses are in bounds (property `bounds`), all threads come to a barrier (property `barrier`)",
    "`signals`, `epochs` and `status` are what the launch before left, or zero at first",
)
_ATOMIC = "atomic_"
_COUNTED = ("counting", "walk", "nothing-else")
_RESTS = {
    "coverage": (*_COUNTED, "outputs", "order", "apart"),
    "schedule": (*_COUNTED, "outputs", "order", "apart"),
    "init": (*_COUNTED, "written", "contents", "order", "apart"),
    "race": (*_COUNTED, "order", "apart", "contents", "outputs"),
    "batch_invariance": (*_COUNTED, "outputs", "promises"),
}
_ONCE = (
    "once: as the last writes leave it; `row_source` holds the numbers of entries before, at rows of its own"
)


def claims(function: ir.Function, guide: PlanGuide, missing: Missing) -> dict[str, Claims]:
    """Return what has to be proved of a kernel, by the names of CLAIMS.

    Args:
        function: device IR.
        guide: of the kernel's config.
        missing: says why a claim, written plan:claim, is not proved of it; "": it is.

    Where something has no meaning, all of them are UNSUPPORTED.
    """
    try:
        kernel = _Kernel(function, guide)
        found = {
            "coverage": Claims(obligations=list(kernel.coverage()), notes=[_ONCE]),
            "schedule": Claims(obligations=list(kernel.schedule())),
            "init": Claims(),
            "race": Claims(),
            "batch_invariance": Claims(obligations=list(kernel.of_entries())),
        }
        for name, claim in found.items():
            kernel.compose(name, claim, missing)
    except UnsupportedIR as error:
        return {name: Claims(unsupported=[Issue(None, str(error))]) for name in CLAIMS}
    return found


class _Kernel:
    def __init__(self, function: ir.Function, guide: PlanGuide) -> None:
        self.guide, self.counts = guide, guide.counts
        self.followed = Follower(function, guide)
        self.uses = uses(function, {})
        calls = [n for n in ir.walk(function.body) if isinstance(n, ir.Call) and n.op.startswith(_ATOMIC)]
        self.atomics = {id(arg) for call in calls for arg in call.args if isinstance(arg, ir.AccessPtr)}

    def _obligation(self, what: str, known: list[z3.BoolRef], goal: z3.BoolRef) -> Obligation:
        facts = self.counts.about([*known, goal])
        return Obligation(what, None, given(*known, *facts), goal, exact=not facts)

    def _launched(self) -> list[z3.BoolRef]:
        c = self.guide.config
        return [MINE >= 0, c.num_experts > MINE, RANK >= 0, c.launch_ranks > RANK]

    # ------------------------------------------------------------------ outputs
    def coverage(self) -> Iterator[Obligation]:
        """Which elements are written: all that a plan has."""
        c, at = self.guide.config, z3.Int("at")
        for name in OUTPUTS:
            *earlier, last = self.guide.writes[name]
            for written in earlier:
                known = [*self._launched(), written.is_in(at)]
                yield self._obligation(f"rows of {name} are written again", known, last.is_in(at))
        rows = self.guide.writes["row_source"][-1].is_in(at)
        for name in ("row_target", "row_weight"):
            same = self.guide.writes[name][-1].is_in(at) == rows
            yield self._obligation(f"{name} has the rows of row_source", self._launched(), same)
        block, row = z3.Ints("block row")
        known = [*self._launched(), self.guide.writes["block_expert"][-1].is_in(block)]
        inside = [row >= block * c.block_m, row < (block + 1) * c.block_m]
        goal = z3.substitute(rows, (at, row))
        yield self._obligation("a block of an expert has all of its rows", [*known, *inside], goal)
        experts, length = c.num_experts, self.guide.firsts_len
        for name, size, mine in (("counts", experts, at % experts), ("firsts", length, z3.IntVal(0))):
            is_in = z3.substitute(self.guide.writes[name][-1].is_in(at), (RANK, at / size), (MINE, mine))
            known = [at >= 0, at < c.launch_ranks * size]
            yield self._obligation(f"each element of {name} is some CTA's", known, is_in)
        firsts = self.guide.writes["firsts"][-1]
        behind = RANK * length + (length - 1)
        goal = firsts.value(behind) == BLOCKS(z3.IntVal(c.num_experts))
        yield self._obligation("the last of firsts is the number of blocks", self._launched(), goal)

    def schedule(self) -> Iterator[Obligation]:
        """A thread writes an element of its CTA's in a round of its own: numbers of rounds tell elements."""
        a, b = z3.Ints("a b")
        for name in OUTPUTS:
            last = self.guide.writes[name][-1]
            known = [
                *self._launched(),
                last.is_in(a),
                last.is_in(b),
                last.thread(a) == last.thread(b),
                last.rounds(a) == last.rounds(b),
            ]
            yield self._obligation(f"an element of {name} is of one thread and round", known, a == b)
            known = [*self._launched(), last.is_in(a)]
            thread = last.thread(a)
            inside = z3.And(thread >= 0, thread < self.counts.threads, last.rounds(a) >= 0)
            yield self._obligation(f"that thread of {name} is of the CTA", known, inside)

    # ------------------------------------------------------------------ what an entry gets
    def of_entries(self) -> Iterator[Obligation]:
        """What is put down for an entry is a function of that entry and its weight alone."""
        entry, at = z3.Ints("entry at")
        wanted = {
            "row_source": entry / self.guide.config.topk,
            "row_target": self.guide.target(entry),
            "row_weight": WEIGHT(entry),
        }
        number = at - self.guide.first_row
        own = self.counts.entry(MINE, number)
        for name, value in wanted.items():
            names = {called for called, _ in summary(value).applications}
            alone = names <= {entry.decl().name(), WEIGHT.name()}
            yield Obligation(f"{name} is of its entry alone", None, (), z3.BoolVal(alone))
            last = self.guide.writes[name][-1]
            known = [*self._launched(), last.is_in(at), number < self.counts.rows(MINE), own == entry]
            yield self._obligation(f"{name} of an entry", known, last.value(at) == value)
        last = self.guide.writes["row_target"][-1]
        known = [*self._launched(), last.is_in(at), number >= self.counts.rows(MINE)]
        yield self._obligation("other rows have no target", known, last.value(at) == NO_ROW)

    # ------------------------------------------------------------------ composition
    def compose(self, name: str, claim: Claims, missing: Missing) -> None:
        """Add to a property what it rests on, and what is not covered."""
        rests = [f"plan:{what}" for what in _RESTS[name]]
        if any(use.storage == LASTING[0] for use in self.uses):
            rests.append("plan:meeting")
        left = sorted({message for use in self.uses if (message := self._uncovered(use))})
        claim.unknown += [Issue(None, message) for message in left]
        for what in rests:
            reason = missing(what)
            if reason:
                claim.unknown.append(Issue(None, f"rests on {what}: {reason}"))
        if not left:
            what = f"{len(self.uses)} accesses are covered"
            claim.obligations.append(Obligation(what, None, (), z3.BoolVal(bool(self.uses))))
        claim.assumptions += ASSUMPTIONS
        claim.notes.append(f"rests on {', '.join(rests)}")

    def _uncovered(self, use: Use) -> str:
        """Return why no claim is about an access; empty if one is."""
        what = f"{use.how} of {use.storage} ({use.kind})"
        if use.storage not in LASTING:
            return "" if use.key in self.followed.seen else f"{what} is followed by no claim"
        is_atomic = use.key in self.atomics
        covered = is_atomic if use.storage != "epochs" else use.how == "load" and not is_atomic
        return "" if covered and use.kind == "global" else f"{what}, a word that outlives a launch"
