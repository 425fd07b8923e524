"""Statements over bit-vectors of machine width, decided by z3 and again by cvc5.

As in `solve`: each question is printed as SMT-LIB 2 and read by a fresh solver, and budgets are
resource units.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import z3

from verify.solve import CVC5_RLIMIT, SEED, Z3_RLIMIT, is_z3_alone
from verify.stopwatch import SECOND

_CACHED = 4096  # questions remembered by their text: variants ask the same ones


@dataclass(frozen=True)
class Decision:
    """An answer: valid, or the values of a counterexample, or why it is not known."""

    is_valid: bool
    reason: str = ""
    model: tuple[tuple[str, int], ...] = ()

    @property
    def is_refuted(self) -> bool:
        """There is a counterexample."""
        return bool(self.model)


@dataclass
class Question:
    """Does `goal` follow from `given` for all values of their bit-vector constants?"""

    what: str
    given: Sequence[z3.BoolRef]
    goal: z3.BoolRef
    logic: str = "QF_BV"

    @property
    def text(self) -> str:
        """The SMT-LIB text that is unsatisfiable iff it does."""
        solver = z3.Solver()
        solver.add(*self.given, z3.Not(self.goal))
        return f"(set-logic {self.logic})\n{solver.to_smt2()}"

    def decide(self, recheck: bool = True) -> Decision:
        """Return z3's answer, which cvc5 has to repeat where it is `valid`."""
        return decide_text(self.text, recheck and not is_z3_alone())


@lru_cache(maxsize=_CACHED)
def decide_text(text: str, recheck: bool = True) -> Decision:
    """Return the answer to the SMT-LIB text of a question."""
    logic = text.partition("(set-logic ")[2].partition(")")[0]
    solver = z3.SolverFor(logic, ctx=z3.Context())
    solver.set("rlimit", Z3_RLIMIT)
    solver.set("random_seed", SEED)
    solver.from_string(text)
    answer = str(solver.check())
    if answer == "sat":
        model = solver.model()
        values = tuple(sorted((d.name(), _number(model[d])) for d in model.decls()))
        shown = ", ".join(f"{n} = {v:#x}" for n, v in values)
        return Decision(False, f"fails for {shown or 'every input'}", values or (("any", 0),))
    if answer != "unsat":
        return Decision(False, f"z3: {solver.reason_unknown()}")
    if recheck:
        with SECOND.running():
            second = _cvc5(text)
        if second != "unsat":
            return Decision(False, f"cvc5 says {second}, z3 unsat")
    return Decision(True)


def _number(value: z3.ExprRef) -> int:
    return value.as_long() if z3.is_bv_value(value) or z3.is_int_value(value) else int(z3.is_true(value))


def _cvc5(text: str) -> str:
    import cvc5

    solver = cvc5.Solver(cvc5.TermManager())
    solver.setOption("rlimit-per", str(CVC5_RLIMIT))
    solver.setOption("seed", str(SEED))
    parser = cvc5.InputParser(solver)
    parser.setStringInput(cvc5.InputLanguage.SMT_LIB_2_6, text.replace("(check-sat)", ""), "query")
    symbols = parser.getSymbolManager()
    while not (command := parser.nextCommand()).isNull():
        command.invoke(solver, symbols)
    result = solver.checkSat()
    return "unsat" if result.isUnsat() else "sat" if result.isSat() else "unknown"
