"""Cases into which an obligation is taken apart that the solvers leave open as a whole.

A launch is regular but for its tail, and a specialised block but for its warp roles: what is hard to see
for all of them at once may be easy for the last block, for those before it, or for one role. That cases
cover is no claim of their author: each is one condition and the negation of all before it, and the last
is that none of the conditions holds. So conditions may be chosen freely; a bad choice proves nothing.
"""

from collections.abc import Sequence

import z3

from verify.encode import Hypothesis
from verify.intarith import constant_of
from verify.symbols import NUMERAL, name_of, names_of, summary

WARPGROUP_THREADS = 128
MAX_CASES = 8  # of one split
MAX_SPLITS = 3  # of one obligation by tails, and as many by roles

# Comparison of an index with a number c -> where, counted from c, its truth changes.
_CHANGES = {
    z3.Z3_OP_LT: (0,),
    z3.Z3_OP_GE: (0,),
    z3.Z3_OP_LE: (1,),
    z3.Z3_OP_GT: (1,),
    z3.Z3_OP_EQ: (0, 1),
    z3.Z3_OP_DISTINCT: (0, 1),
}
_MIRRORED = {
    z3.Z3_OP_LT: z3.Z3_OP_GT,
    z3.Z3_OP_GT: z3.Z3_OP_LT,
    z3.Z3_OP_LE: z3.Z3_OP_GE,
    z3.Z3_OP_GE: z3.Z3_OP_LE,
}


def cases_of(hypotheses: Sequence[Hypothesis], goal: z3.BoolRef) -> list[list[Hypothesis]]:
    """Return the splits of an obligation: of each, the hypotheses of which one more holds in each case.

    First the last block along each launch index, then the threads of `threadIdx.x` by role. Indices of which
    nothing but their range speaks are left alone.
    """
    tails, roles = [], []
    for ranged in hypotheses:
        if (found := _range(ranged)) is None:
            continue
        index, extent = found
        others = [h.term for h in hypotheses if h is not ranged] + [goal]
        if name_of(index) not in names_of(others):
            continue
        if not ranged.label.startswith("threadIdx"):
            if constant_of(extent) != 1:
                tails.append(covering([(f"{index} is the last", index == extent - 1)]))
        elif ranged.label.startswith("threadIdx.x"):
            bounds = _boundaries(index, extent, others)
            if bounds:
                roles.append(covering([(f"{index} < {n}", index < n) for n in bounds]))
    return [*tails[:MAX_SPLITS], *roles[:MAX_SPLITS]]


def covering(conditions: Sequence[tuple[str, z3.BoolRef]]) -> list[Hypothesis]:
    """Return cases, one more than conditions, of which exactly one holds whatever the conditions are.

    Args:
        conditions: what each says, and the term.
    """
    cases, before, said = [], list[z3.BoolRef](), list[str]()
    for label, condition in conditions:
        cases.append(Hypothesis(", ".join([*said, label]), "guard", z3.And(*before, condition)))
        before.append(z3.Not(condition))
        said = [f"not {label}"]  # of bounds that rise, the one before says most
    return [*cases, Hypothesis(", ".join(said), "guard", z3.And(*before))]


def _range(hypothesis: Hypothesis) -> tuple[z3.ArithRef, z3.ArithRef] | None:
    """Return a launch index and its extent, where the hypothesis is its range."""
    term = hypothesis.term
    if hypothesis.kind != "launch" or not z3.is_and(term) or term.num_args() != 2:
        return None
    low, high = term.children()
    if not (z3.is_ge(low) and z3.is_lt(high)) or not low.arg(0).eq(high.arg(0)):
        return None
    index = low.arg(0)
    is_index = z3.is_const(index) and index.decl().kind() == z3.Z3_OP_UNINTERPRETED
    return (index, high.arg(1)) if is_index and constant_of(low.arg(1)) == 0 else None


def _boundaries(index: z3.ArithRef, extent: z3.ArithRef, terms: Sequence[z3.BoolRef]) -> list[int]:
    """Return where roles may change: at numbers that `terms` compare the index with, and at warpgroups.

    Where these would be too many cases, at warpgroups alone.
    """
    threads = constant_of(extent)
    groups = range(WARPGROUP_THREADS, threads or 0, WARPGROUP_THREADS)
    compared = {
        n for term in terms for n in _compared(index, term) if n > 0 and (threads is None or n < threads)
    }
    for bounds in ({*compared, *groups}, set(groups)):
        if len(bounds) < MAX_CASES:
            return sorted(bounds)
    return []


def _compared(index: z3.ArithRef, term: z3.BoolRef) -> set[int]:
    """Return where comparisons of the index with a number, anywhere in `term`, change their truth."""
    nodes, found = summary(term).nodes, set[int]()
    for node in nodes:
        if node.kind not in _CHANGES or len(node.operands) != 2:
            continue
        a, b = (nodes[n] for n in node.operands)
        kind = node.kind
        if a.kind == NUMERAL:
            a, b, kind = b, a, _MIRRORED.get(kind, kind)
        if a.value == name_of(index) and b.kind == NUMERAL and isinstance(b.value, int):
            found |= {b.value + change for change in _CHANGES[kind]}
    return found
