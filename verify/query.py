"""One question to the solvers, as SMT-LIB text, and z3's model of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import z3

from verify.encode import Hypothesis, constants_of, facts_of, instances_of, is_of_every_element
from verify.symbols import summary, text_of

SEED = 0
_NAMED = ("contract", "assume")  # kinds of hypotheses of which a report says whether proofs used them
_ORDER = {"contract": 0, "shape": 0, "launch": 1, "loop": 2}


_WITH_CORES = "(set-option :produce-unsat-cores true)\n"

# The assertions of one satisfiability question, each as text, and whether it has a name.
Question = tuple[str | tuple[str], ...]
# Those among its contract clauses and assumptions that a proof of unsatisfiability used.
Core = frozenset[str]


@dataclass
class Query:
    """One satisfiability question as text: hypotheses, and that some goal fails.

    Attributes:
        text, named_text: the same assertions, and with names for unsat cores.
        labels: name of a hypothesis in the text -> its label; only contract clauses and assumptions have one.
        order: integer constants, shape parameters first, then launch indices, then loop counters.
        question: what is asserted, whatever is declared besides.
        core: labels that a proof used.
    """

    text: str
    named_text: str
    labels: dict[str, str]
    order: list[str]
    question: "Question"
    core: frozenset[str] = frozenset()

    @classmethod
    def of(cls, hypotheses: Sequence[Hypothesis], goals: Sequence[z3.BoolRef]) -> "Query":
        """Build the query that is unsatisfiable iff every goal follows from the hypotheses."""
        labelled = stated(hypotheses, goals)
        head, functions = _head([*(h.term for h in labelled), *goals])
        texts = [text_of(h.term) for h in labelled]
        plain = [f"(assert {text})" for text in texts]
        named = [
            f"(assert (! {text} :named h{number}))" if h.kind in _NAMED else f"(assert {text})"
            for number, (h, text) in enumerate(zip(labelled, texts, strict=True))
        ]
        violated = [_violated(goals)] if goals else []
        rank: dict[str, int] = {}
        for hypothesis in labelled:
            for name in constants_of(hypothesis.term):
                rank.setdefault(name, _ORDER.get(hypothesis.kind, _ORDER["loop"]))
        constants = [n for n, d in functions.items() if d.arity() == 0 and d.range() == z3.IntSort()]
        order = sorted(constants, key=lambda name: (rank.get(name, _ORDER["loop"]), name))
        labels = {f"h{number}": h.label for number, h in enumerate(labelled) if h.kind in _NAMED}
        text, named_text = ("\n".join([*head, *part, *violated, ""]) for part in (plain, named))
        return cls(text, named_text, labels, order, (*(_asked(h) for h in labelled), *violated))

    def solver(self, rlimit: int) -> z3.Solver:
        """Return a z3 solver, in a context of its own, that holds this query."""
        solver = z3.Solver(ctx=z3.Context())
        solver.set("rlimit", rlimit)
        solver.set("random_seed", SEED)
        solver.from_string(self.text)
        return solver


@dataclass
class Script:
    """Questions with hypotheses in common, asked one after the other of one solver.

    Contract clauses and assumptions have a name in the text, and nothing else has, as each name costs time.

    Attributes:
        head: declarations and what all questions share.
        cases: each question's own hypotheses and goals.
        questions: what each asserts, as in `Query`.
        names: name in the text -> the assertion that has it.
        labels: for each question, its named assertions -> label of the hypothesis.
        shared: named assertions of the head.
        bare: head and cases without what has a name.
    """

    head: str
    cases: list[str]
    questions: list[Question]
    names: dict[str, str]
    labels: list[dict[str, str]]
    shared: frozenset[str]
    bare: tuple[str, list[str]]

    @classmethod
    def of(cls, questions: Sequence[tuple[Sequence[Hypothesis], Sequence[z3.BoolRef]]]) -> "Script":
        """Build the script of questions, each hypotheses and goals as in `Query.of`."""
        known = [stated(hypotheses, goals) for hypotheses, goals in questions]
        shared = frozenset.intersection(*(frozenset(h.term.get_id() for h in given) for given in known))
        common = [h for h in known[0] if h.term.get_id() in shared]
        terms = [h.term for given in known for h in given]
        head, _ = _head([*terms, *(goal for _, goals in questions for goal in goals)])
        names: dict[str, str] = {}

        def stated_as(hypothesis: Hypothesis) -> str:
            text = text_of(hypothesis.term)
            if hypothesis.kind not in _NAMED:
                return _assertion(text)
            name = f"h{len(names)}"
            names[name] = text
            return f"(assert (! {text} :named {name}))"

        first = "\n".join([*head, *(stated_as(h) for h in common), ""])
        bare_first = "\n".join(
            [*head, *(_assertion(text_of(h.term)) for h in common if h.kind not in _NAMED), ""]
        )
        cases, bare_cases, asserted, labels = [], [], [], []
        for given, (_, goals) in zip(known, questions, strict=True):
            own, violated = [h for h in given if h.term.get_id() not in shared], _violated(goals)
            cases.append("\n".join([*(stated_as(h) for h in own), violated, ""]))
            bare = [_assertion(text_of(h.term)) for h in own if h.kind not in _NAMED]
            bare_cases.append("\n".join([*bare, violated, ""]))
            asserted.append((*(_asked(h) for h in given), violated))
            found: dict[str, str] = {}
            for hypothesis in given:
                if hypothesis.kind in _NAMED:
                    found.setdefault(text_of(hypothesis.term), hypothesis.label)
            labels.append(found)
        in_head = frozenset(text_of(h.term) for h in common if h.kind in _NAMED)
        return cls(first, cases, asserted, names, labels, in_head, (bare_first, bare_cases))

    def text(self, chosen: Sequence[int]) -> str:
        """Return the commands that ask the chosen questions."""
        asked = "".join(f"(push 1)\n{self.cases[n]}(check-sat)\n(pop 1)\n" for n in chosen)
        return self.head + asked

    def reduced(self, cores: Mapping[int, Core]) -> str:
        """Return the commands that ask questions without the named assertions that no core has.

        What all questions share is said once, for all that need it.

        Args:
            cores: of what is asked, by its number.
        """
        head, cases = self.bare
        needed = frozenset[str]().union(*cores.values()) & self.shared
        parts = [head, *(f"{_assertion(text)}\n" for text in sorted(needed))]
        for number, core in cores.items():
            own = "".join(f"{_assertion(text)}\n" for text in sorted(core - self.shared))
            parts.append(f"(push 1)\n{own}{cases[number]}(check-sat)\n(pop 1)\n")
        return "".join(parts)

    def solver(self, rlimit: int) -> z3.Solver:
        """Return a z3 solver, in a context of its own, that holds the head and can tell cores.

        Questions have no quantifiers, so which terms are relevant need not be followed: the largest are
        answered in a third of the time without.
        """
        solver = z3.SimpleSolver(ctx=z3.Context())
        solver.set("rlimit", rlimit)
        solver.set("random_seed", SEED)
        solver.set("relevancy", 0)
        solver.from_string(_WITH_CORES + self.head)
        return solver

    def core(self, number: int, solver: z3.Solver) -> Core:
        """Return the named assertions of a question that `solver` needed to refute it just now."""
        if not self.labels[number]:
            return frozenset()
        return frozenset(self.names[str(name)] for name in solver.unsat_core())


def stated(hypotheses: Sequence[Hypothesis], goals: Sequence[z3.BoolRef]) -> list[Hypothesis]:
    """Return the hypotheses with what is known of the data that they and the goals speak of."""
    general = [h for h in hypotheses if is_of_every_element(h)]
    plain = [h for h in hypotheses if h not in general] if general else list(hypotheses)
    terms = [*(h.term for h in plain), *goals]
    return [*plain, *instances_of(general, terms), *facts_of(terms)]


def _head(terms: Sequence[z3.ExprRef]) -> tuple[list[str], dict[str, z3.FuncDeclRef]]:
    """Return the logic and the declarations of `terms`, and the symbols by name."""
    found = [summary(t) for t in terms]
    functions = {name: a.decl() for s in found for name, a in s.applications}
    logic = "QF_UFLIA" if all(s.linear for s in found) else "QF_UFNIA"
    return [f"(set-logic {logic})", *(functions[name].sexpr() for name in sorted(functions))], functions


def _asked(hypothesis: Hypothesis) -> str | tuple[str]:
    text = text_of(hypothesis.term)
    return (text,) if hypothesis.kind in _NAMED else text


def _assertion(text: str) -> str:
    return f"(assert {text})"


def _violated(goals: Sequence[z3.BoolRef]) -> str:
    negated = " ".join(f"(not {text_of(goal)})" for goal in goals)
    return f"(assert (or false {negated}))"


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
