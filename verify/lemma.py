"""Small facts that an encoding needs before it can say what to prove, by both solvers.

Most of these questions come again with other names: what was proved, or fails, is kept by its text.
"""

import re
from collections.abc import Sequence

import z3

from verify.encode import Hypothesis, constants_of
from verify.query import stated
from verify.solve import Obligation, Prover
from verify.symbols import text_of
from verify.verdict import Verdict

LOOK_RLIMIT = 2_000_000  # z3 resource units for one look at what a term can be
_CVC5_RLIMIT = 200_000  # cvc5 resource units for a lemma; those that hold need a few thousand
_PROVED: set[str] = set()
_FAILING: set[str] = set()  # those that z3 has a counterexample to


def small_prover() -> Prover:
    """Return a prover that gives up early: a lemma that is hard is one to do without."""
    return Prover(rlimit=LOOK_RLIMIT, cvc5_rlimit=_CVC5_RLIMIT)


def look(terms: Sequence[z3.BoolRef]) -> z3.Solver:
    """Return a solver for a look at whether something can be; no verdict rests on it."""
    solver = z3.Solver()
    solver.set("rlimit", LOOK_RLIMIT)
    solver.add(*terms)
    return solver


def near(given: Sequence[Hypothesis], *terms: z3.ExprRef) -> tuple[Hypothesis, ...]:
    """Return those of `given` that speak of nothing but what `terms` speak of."""
    names = set[str]().union(*(constants_of(t) for t in terms))
    return tuple(h for h in given if constants_of(h.term) <= names)


def holds(prover: Prover, given: Sequence[Hypothesis], goal: z3.BoolRef) -> bool:
    """Return whether both solvers prove `goal`, from the hypotheses next to it or from all."""
    if z3.is_true(z3.simplify(goal)):
        return True
    for hypotheses in dict.fromkeys((near(given, goal), tuple(given))):
        # With what names say, of types and of promises: the text has other names.
        text = _canonical(stated(hypotheses, [goal]), goal)
        if text in _PROVED:
            return True
        if text in _FAILING:
            continue
        if look([*(h.term for h in hypotheses), z3.Not(goal)]).check() == z3.sat:
            _FAILING.add(text)
            continue
        answer = prover.prove([Obligation("lemma", None, hypotheses, goal)])[0]
        if answer.verdict is Verdict.PROVED:
            _PROVED.add(text)
            return True
    return False


def decided(prover: Prover, given: Sequence[Hypothesis], term: z3.ExprRef) -> z3.ExprRef:
    """Return `term` less the choices whose condition `given` decides; equal to it under `given`."""
    while True:
        for choice in _choices(term):
            condition = choice.arg(0)
            if holds(prover, given, condition):
                term = z3.substitute(term, (choice, choice.arg(1)))
                break
            if holds(prover, given, z3.Not(condition)):
                term = z3.substitute(term, (choice, choice.arg(2)))
                break
        else:
            return term


def _choices(term: z3.ExprRef) -> list[z3.ExprRef]:
    """Return the choices in `term`, inner ones first."""
    found: dict[int, z3.ExprRef] = {}
    stack = [(term, False)]
    seen: set[int] = set()
    while stack:
        node, done = stack.pop()
        if done:
            found.setdefault(node.get_id(), node)
            continue
        if node.get_id() in seen:
            continue
        seen.add(node.get_id())
        if z3.is_app(node) and node.decl().kind() == z3.Z3_OP_ITE:
            stack.append((node, True))
        stack.extend((child, False) for child in node.children())
    return list(found.values())


def _canonical(given: Sequence[Hypothesis], goal: z3.BoolRef) -> str:
    """Return text that is equal for questions that differ in the names of constants alone."""
    text = "\n".join([*dict.fromkeys(text_of(h.term) for h in given), text_of(goal)])
    known = constants_of(goal).union(*(constants_of(h.term) for h in given))
    names: dict[str, str] = {}

    def renamed(match: re.Match[str]) -> str:
        token = match[0]
        return names.setdefault(token, f"?{len(names)}") if token.strip("|") in known else token

    return re.sub(r"\|[^|]*\||[^\s()|]+", renamed, text)
