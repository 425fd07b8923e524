"""Obligations, and the two solvers that decide them.

An obligation is valid iff its hypotheses together with the negation of its goal are unsatisfiable.
Obligations of one context go out as one query; only a query that is not unsatisfiable is taken
apart. Every query is printed as SMT-LIB 2 and read back into a fresh context of each solver, so an
answer depends on the text of the query alone and not on what the process did before. Budgets are
resource units, never wall clock.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import z3

from verify.encode import Hypothesis, constants_of, facts_of, instances_of, is_exact, is_of_every_element
from verify.ir import Span, UnsupportedIR
from verify.symbols import summary, text_of
from verify.verdict import Verdict
from verify.walk import Site

Z3_RLIMIT = 10_000_000  # z3 resource units a query, some tens of seconds; kernels need 0.2 million
CVC5_RLIMIT = 1_000_000  # cvc5 resource units a query, likewise
SEED = 0
MINIMISE_RLIMIT = 4_000_000  # z3 resource units for each check while a model is made smaller
MAX_REFUTED = 6  # violations looked for in one group before the rest of it is left undecided


# Inside `remembering`: text of a query that was unsatisfiable -> resource units that z3 spent on it.
_remembered: dict[str, int] | None = None


@contextmanager
def remembering() -> Iterator[None]:
    """Ask z3 no query twice that it proved: of one kernel, or of many that differ little.

    An answer depends on the text of a query alone, so this changes none; and what the query cost counts
    each time that it is asked.
    """
    global _remembered
    outer = _remembered
    _remembered = {} if outer is None else outer
    try:
        yield
    finally:
        _remembered = outer


@dataclass(frozen=True)
class Obligation:
    """One thing to prove.

    Attributes:
        what: what the goal says, e.g. "store to out in bounds".
        span: the statement that gives rise to it.
        hypotheses: what may be used; the facts about data symbols are added when solving.
        goal: a Z3 Boolean.
        show: values to print from a model, by name; Z3 terms or constants.
        site: where in the device IR, for the report's launch and loop indices and excerpt.
        exact: False where a model may not be a run of the kernel (an untracked value takes part):
            then a model gives UNKNOWN, not REFUTED.
    """

    what: str
    span: Span | None
    hypotheses: tuple[Hypothesis, ...]
    goal: z3.BoolRef
    show: Mapping[str, z3.ExprRef | int | str] = field(default_factory=dict)
    site: Site | None = None
    exact: bool = True


@dataclass(frozen=True)
class Answer:
    """What the solvers said to one obligation.

    Attributes:
        model: values of the integer constants by name, where the goal can fail.
        shown: `show` under that model.
        core: labels of the hypotheses that the proof (of its whole group) used.
    """

    obligation: Obligation
    verdict: Verdict
    reason: str = ""
    model: Mapping[str, int] = field(default_factory=dict)
    shown: Mapping[str, int | str] = field(default_factory=dict)
    core: frozenset[str] = frozenset()


@dataclass
class Prover:
    """Decides obligations; counts what it spent.

    Attributes:
        recheck: prove again with cvc5 what z3 proved; without it PROVED rests on z3 alone.
        smt2: folder that gets every query as an SMT-LIB file, with the answer.
        minimise: make models small, which takes more queries.
    """

    rlimit: int = Z3_RLIMIT
    cvc5_rlimit: int = CVC5_RLIMIT
    recheck: bool = True
    queries: int = 0
    rlimit_used: int = 0
    decided: dict[str, int] = field(default_factory=dict)
    smt2: Path | None = None
    minimise: bool = True

    def prove(self, obligations: Iterable[Obligation]) -> list[Answer]:
        """Answer every obligation; the answers of one context are found together."""
        return list(self.answers(obligations))

    def answers(self, obligations: Iterable[Obligation]) -> Iterator[Answer]:
        """Yield the answers as they are found, one context after the other."""
        groups: dict[tuple[int, ...], list[Obligation]] = {}
        for obligation in obligations:
            key = tuple(h.term.get_id() for h in obligation.hypotheses)
            groups.setdefault(key, []).append(obligation)
        for group in groups.values():
            yield from self._group(group)

    def absorb(self, other: "Prover") -> None:
        """Count what `other` spent too."""
        self.queries += other.queries
        self.rlimit_used += other.rlimit_used
        for key, number in other.decided.items():
            self.decided[key] = self.decided.get(key, 0) + number

    def satisfiable(self, terms: Sequence[z3.BoolRef]) -> Mapping[str, int] | None:
        """Return a model of `terms`, or None where there is none.

        Raises:
            UnsupportedIR: the solver cannot tell.
        """
        query = Query.of([Hypothesis("", "definition", t) for t in terms], [])
        answer, model, _ = self._z3(query)
        if answer == "unknown":
            raise UnsupportedIR("satisfiability of the contract is beyond the solver")
        return self._smallest(query, model).values() if model else None

    # ------------------------------------------------------------------ groups
    def _group(self, group: list[Obligation]) -> Iterator[Answer]:
        pending, refuted = list(group), 0
        while pending:
            query = Query.of(pending[0].hypotheses, [o.goal for o in pending])
            answer, model, reason = self._decide(query)
            if answer == "unsat":
                yield from (Answer(o, Verdict.PROVED, core=query.core) for o in pending)
                return
            if model is None:
                if len(pending) == 1:
                    yield Answer(pending[0], Verdict.UNKNOWN, reason)
                    return
                half = len(pending) // 2
                yield from self._group(pending[:half])
                yield from self._group(pending[half:])
                return
            failed = next((o for o in pending if model.value(o.goal) == 0), None)
            if failed is None:  # the solver's model leaves every goal open
                if len(pending) == 1:
                    yield Answer(pending[0], Verdict.UNKNOWN, "model without a value for the goal")
                    return
                for obligation in pending:
                    yield from self._group([obligation])
                return
            yield self._refuted(failed, model)
            pending.remove(failed)
            refuted += 1
            if refuted >= MAX_REFUTED:
                reason = f"not decided: {MAX_REFUTED} violations in the same context come first"
                yield from (Answer(o, Verdict.UNKNOWN, reason) for o in pending)
                return

    def _refuted(self, obligation: Obligation, model: "Model") -> Answer:
        query = Query.of(obligation.hypotheses, [obligation.goal])
        model = self._smallest(query, model) if self.minimise else model
        shown = {n: model.value(t) if isinstance(t, z3.ExprRef) else t for n, t in obligation.show.items()}
        values = model.values()
        if obligation.exact and is_exact([*(h.term for h in obligation.hypotheses), obligation.goal]):
            return Answer(obligation, Verdict.REFUTED, model=values, shown=shown)
        reason = "fails for some value of data that is not tracked"
        return Answer(obligation, Verdict.UNKNOWN, reason, model=values, shown=shown)

    # ------------------------------------------------------------------ solvers
    def _decide(self, query: "Query") -> tuple[str, "Model | None", str]:
        answer, model, reason = self._z3(query)
        if self.smt2 is not None:
            self.smt2.mkdir(parents=True, exist_ok=True)
            text = f"(set-info :status {answer})\n{query.text}(check-sat)\n"
            (self.smt2 / f"{self.queries:04}.smt2").write_text(text)
        if answer == "sat" or (answer == "unsat" and not self.recheck):
            self._count("z3", answer)
            return answer, model, reason
        again = self._cvc5(query)
        if answer == "unsat":
            self._count("z3", answer)
            if again == "unsat":
                self._count("cvc5", again)
                return "unsat", None, ""
            if again == "sat":  # one of the two is wrong: no verdict at all
                raise RuntimeError(f"z3 and cvc5 disagree on:\n{query.text}")
            return "unknown", None, "proved by z3, not by cvc5 within its budget"
        if again == "unsat":
            self._count("cvc5", again)
            return "unknown", None, f"proved by cvc5, not by z3 ({reason})"
        return "unknown", None, reason

    def _count(self, solver: str, answer: str) -> None:
        key = f"{solver} {answer}"
        self.decided[key] = self.decided.get(key, 0) + 1

    def _z3(self, query: "Query") -> tuple[str, "Model | None", str]:
        self.queries += 1
        if _remembered is not None and query.text in _remembered:
            self.rlimit_used += _remembered[query.text]
            return "unsat", None, ""
        solver = query.solver(self.rlimit)
        answer = str(solver.check())
        spent = _rlimit_count(solver)
        self.rlimit_used += spent
        if answer == "unknown":
            return answer, None, solver.reason_unknown()
        if answer == "unsat" and _remembered is not None:
            _remembered[query.text] = spent
        return answer, Model(solver) if answer == "sat" else None, ""

    def _cvc5(self, query: "Query") -> str:
        import cvc5  # here: what only reads certificates, as a launch does, must run without it

        solver = cvc5.Solver(cvc5.TermManager())
        solver.setOption("produce-unsat-cores", "true")
        solver.setOption("rlimit-per", str(self.cvc5_rlimit))
        solver.setOption("seed", str(SEED))
        parser = cvc5.InputParser(solver)
        parser.setStringInput(cvc5.InputLanguage.SMT_LIB_2_6, query.named_text, "query")
        symbols = parser.getSymbolManager()
        while not (command := parser.nextCommand()).isNull():
            command.invoke(solver, symbols)
        result = solver.checkSat()
        if result.isUnsat():
            named = symbols.getNamedTerms()
            core = {named[t] for t in solver.getUnsatCore() if t in named}
            query.core = frozenset(label for name, label in query.labels.items() if name in core)
            return "unsat"
        return "sat" if result.isSat() else "unknown"

    def _smallest(self, query: "Query", model: "Model") -> "Model":
        """Lower each variable in turn (shape, then launch, then loops) as far as a few checks allow."""
        solver = query.solver(MINIMISE_RLIMIT)
        for name in query.order:
            var = z3.Int(name, solver.ctx)
            low, best = 0, model.constant(name)
            if best is None:
                continue
            while low < best:
                middle = (low + best) // 2
                solver.push()
                solver.add(var >= 0, var <= middle)
                if str(solver.check()) == "sat":
                    model = Model(solver)
                    best = model.constant(name) or 0
                else:
                    low = middle + 1
                solver.pop()
            solver.add(var == best)
        return model


class Model:
    """A model of a query; answers for terms of the main context."""

    def __init__(self, solver: z3.Solver) -> None:
        """Keep the model that `solver` has just found."""
        self._model = solver.model()
        self._context = solver.ctx

    def value(self, term: z3.ExprRef) -> int | str:
        """Return the value of `term`; unconstrained symbols are 0."""
        result = self._model.eval(term.translate(self._context), model_completion=True)
        if z3.is_int_value(result):
            return result.as_long()
        if z3.is_true(result) or z3.is_false(result):
            return int(z3.is_true(result))
        return str(result)

    def constant(self, name: str) -> int | None:
        """Return the value of the integer constant `name`, or None if the model leaves it open."""
        value = self._model.eval(z3.Int(name, self._context))
        return value.as_long() if z3.is_int_value(value) else None

    def values(self) -> dict[str, int]:
        """Return every constant that the model fixes."""
        constants = [d for d in self._model.decls() if d.arity() == 0]
        values = {d.name(): self._model[d] for d in constants}
        return {n: v.as_long() if z3.is_int_value(v) else int(z3.is_true(v)) for n, v in values.items()}


@dataclass
class Query:
    """One satisfiability question as text: hypotheses, and that some goal fails.

    Attributes:
        text, named_text: the same assertions, and with names for unsat cores.
        labels: name of a hypothesis in the text -> its label.
        order: integer constants, shape parameters first, then launch indices, then loop counters.
        core: labels that a proof used.
    """

    text: str
    named_text: str
    labels: dict[str, str]
    order: list[str]
    core: frozenset[str] = frozenset()

    @classmethod
    def of(cls, hypotheses: Sequence[Hypothesis], goals: Sequence[z3.BoolRef]) -> "Query":
        """Build the query that is unsatisfiable iff every goal follows from the hypotheses."""
        general = [h for h in hypotheses if is_of_every_element(h)]
        plain_ones = [h for h in hypotheses if h not in general] if general else list(hypotheses)
        terms = [*(h.term for h in plain_ones), *goals]
        labelled = [*plain_ones, *instances_of(general, terms), *facts_of(terms)]
        found = [summary(t) for t in (*(h.term for h in labelled), *goals)]
        functions = {name: a.decl() for s in found for name, a in s.applications}
        logic = "QF_UFLIA" if all(s.linear for s in found) else "QF_UFNIA"
        lines = [f"(set-logic {logic})", *(functions[name].sexpr() for name in sorted(functions))]
        texts = [text_of(h.term) for h in labelled]
        plain = [f"(assert {text})" for text in texts]
        named = [f"(assert (! {text} :named h{number}))" for number, text in enumerate(texts)]
        violated = []
        if goals:
            negated = " ".join(f"(not {text_of(goal)})" for goal in goals)
            violated.append(f"(assert (or false {negated}))")
        rank: dict[str, int] = {}
        for hypothesis in labelled:
            for name in constants_of(hypothesis.term):
                rank.setdefault(name, _ORDER.get(hypothesis.kind, _ORDER["loop"]))
        constants = [n for n, d in functions.items() if d.arity() == 0 and d.range() == z3.IntSort()]
        order = sorted(constants, key=lambda name: (rank.get(name, _ORDER["loop"]), name))
        labels = {f"h{number}": h.label for number, h in enumerate(labelled)}
        text, named_text = ("\n".join([*lines, *part, *violated, ""]) for part in (plain, named))
        return cls(text, named_text, labels, order)

    def solver(self, rlimit: int) -> z3.Solver:
        """Return a z3 solver, in a context of its own, that holds this query."""
        solver = z3.Solver(ctx=z3.Context())
        solver.set("rlimit", rlimit)
        solver.set("random_seed", SEED)
        solver.from_string(self.text)
        return solver


_ORDER = {"contract": 0, "shape": 0, "launch": 1, "loop": 2}


def _rlimit_count(solver: z3.Solver) -> int:
    stats = solver.statistics()
    return next((int(stats.get_key_value(k)) for k in stats.keys() if k == "rlimit count"), 0)  # noqa: SIM118
