"""Obligations, and the two solvers that decide them.

An obligation is valid iff its hypotheses together with the negation of its goal are unsatisfiable.
Obligations of one context are one question, and contexts of one kernel are asked as one script, in
which what they share is said once; a question that its script does not prove is asked again by
itself, and only one that is not unsatisfiable is taken apart: into its goals, and a goal into cases by
tails and warp roles (`verify/cases.py`). Every text is SMT-LIB 2 and read into
a fresh context of each solver, so an answer depends on that text alone and not on what the process
did before. Budgets are resource units, never wall clock.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import z3

from verify.cases import cases_of
from verify.encode import Hypothesis, is_exact
from verify.ir import Span, UnsupportedIR
from verify.query import SEED, Core, Model, Query, Question, Script
from verify.stopwatch import SECOND
from verify.symbols import summary
from verify.verdict import Verdict
from verify.walk import Site

Z3_RLIMIT = 10_000_000  # z3 resource units a query, some tens of seconds; kernels need 0.2 million
CVC5_RLIMIT = 1_000_000  # cvc5 resource units a query, likewise
MINIMISE_RLIMIT = 4_000_000  # z3 resource units for each check while a model is made smaller
TOGETHER_RLIMIT = 1_000_000  # z3 resource units for several contexts at once: easy ones, or each alone
CVC5_TOGETHER_RLIMIT = 100_000  # cvc5 resource units a context there, likewise
MAX_TOGETHER = 64  # contexts of one script
_BY_Z3_ALONE = "proved by z3, not by cvc5 within its budget"
MAX_OPEN = 8  # obligations that stay open by cases too, before no more are taken apart so
MAX_REFUTED = 6  # violations looked for in one group before the rest of it is left undecided


# Questions that were unsatisfiable -> resource units that z3 spent on each, and its core where that is known.
Proved = dict[Question, tuple[int, Core | None]]
_remembered: Proved | None = None  # inside `remembering`


@contextmanager
def remembering(kept: Proved | None = None) -> Iterator[None]:
    """Ask z3 no question twice that it proved: of one kernel, or of many that differ little.

    Questions are the same if they assert the same texts: what else the script declares and asks, in which one
    of them stands, does not change whether they can be satisfied. What a question cost counts each time that
    it is asked.

    Args:
        kept: what was proved before, to which is added; by default what is remembered around this.
    """
    global _remembered
    outer = _remembered
    if kept is not None:
        _remembered = kept
    elif outer is None:
        _remembered = {}
    try:
        yield
    finally:
        _remembered = outer


# Inside `by_z3_alone`: no prover asks cvc5, whatever it was made for.
_z3_alone = False


@contextmanager
def by_z3_alone() -> Iterator[None]:
    """Prove nothing again, also where a property asks by itself: for measurements, not for verdicts."""
    global _z3_alone
    outer, _z3_alone = _z3_alone, True
    try:
        yield
    finally:
        _z3_alone = outer


def is_z3_alone() -> bool:
    """Return whether nothing is to be proved again."""
    return _z3_alone


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
        core: labels of the contract clauses and assumptions that the proof (of its whole group) used: z3's,
            where a script was asked, of which cvc5 had only what cores of that script hold; else cvc5's.
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
        decided: number of questions by solver and answer; with `recheck`, `z3 unsat` are those that cvc5
            proved too, each counted once, and `z3 alone unsat` those that it did not.
        smt2: folder that gets every query as an SMT-LIB file, with the answer.
        minimise: make models small, which takes more queries.
        by_cases: take apart by cases what is open as a whole, if it is proved again; for verdicts, where a
            search does without what is hard.
        still_open: how many obligations that left open.
    """

    rlimit: int = Z3_RLIMIT
    cvc5_rlimit: int = CVC5_RLIMIT
    recheck: bool = True
    queries: int = 0
    rlimit_used: int = 0
    decided: dict[str, int] = field(default_factory=dict)
    smt2: Path | None = None
    minimise: bool = True
    by_cases: bool = False
    still_open: int = 0

    def __post_init__(self) -> None:
        """Do without cvc5 where that is asked for."""
        self.recheck = self.recheck and not _z3_alone

    def prove(self, obligations: Iterable[Obligation]) -> list[Answer]:
        """Answer every obligation, those of one context after the other."""
        known = list(obligations)
        answers = {id(a.obligation): a for a in self.answers(known)}
        return [answers[id(o)] for group in _contexts(known) for o in group]

    def holding(self, obligations: Iterable[Obligation]) -> set[int]:
        """Return the identities of the obligations that z3 proves: a search for what to ask both solvers.

        Of contexts that it refutes no counterexample is made.
        """
        known: set[int] = set()
        for groups in _batches(_contexts(obligations)):
            script = Script.of([(g[0].hypotheses, [o.goal for o in g]) for g in groups])
            proved, refuted = self._z3_proves(script)
            for number, group in enumerate(groups):
                if number in proved:
                    known |= {id(o) for o in group}
                elif len(group) > 1 or number not in refuted:
                    known |= {id(a.obligation) for a in self._group(group) if a.verdict is Verdict.PROVED}
        return known

    def answers(self, obligations: Iterable[Obligation]) -> Iterator[Answer]:
        """Yield the answers as they are found."""
        for groups in _batches(_contexts(obligations)):
            yield from self._together(groups)

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
    def _together(self, groups: Sequence[list[Obligation]]) -> Iterator[Answer]:
        """Answer contexts by one script, and what that does not prove by a query of its own."""
        if len(groups) == 1:
            yield from self._group(groups[0])
            return
        script = Script.of([(g[0].hypotheses, [o.goal for o in g]) for g in groups])
        proved, _ = self._z3_proves(script)
        if self.smt2 is not None:
            self._store(script.text(range(len(groups))))
        agreed = self._cvc5_proves(script, proved) if self.recheck else set(proved)
        for number, group in enumerate(groups):
            if number in agreed:
                self._count("z3", "unsat")
                core = frozenset(script.labels[number][text] for text in proved[number] if self.recheck)
                yield from (Answer(o, Verdict.PROVED, core=core) for o in group)
            elif number in proved:
                yield from self._again(group)
            else:
                yield from self._group(group)

    def _again(self, group: list[Obligation]) -> Iterator[Answer]:
        """Answer a context that z3 proved in its script and cvc5 did not: by cvc5 alone, or in parts."""
        query = Query.of(group[0].hypotheses, [o.goal for o in group])
        answer = self._second(query)
        if answer == "unsat":
            yield from (Answer(o, Verdict.PROVED, core=query.core) for o in group)
        else:
            yield from self._halves(group, _BY_Z3_ALONE)

    def _halves(self, group: list[Obligation], reason: str) -> Iterator[Answer]:
        """Answer in two parts what was not decided together."""
        if len(group) == 1:
            yield self._cases(group[0], reason)
            return
        half = len(group) // 2
        yield from self._group(group[:half])
        yield from self._group(group[half:])

    def _cases(self, obligation: Obligation, reason: str) -> Answer:
        """Answer by cases what is open as a whole: proved if all cases of one split are, refuted if one is.

        A counterexample to a case is one to the whole: it satisfies all hypotheses, and one more.
        """
        splits = []
        if self.by_cases and self.recheck and self.still_open < MAX_OPEN:
            splits = cases_of(obligation.hypotheses, obligation.goal)
        for cases in splits:
            open_cases, core = [], frozenset[str]()
            for case in cases:
                part = replace(obligation, hypotheses=(*obligation.hypotheses, case))
                query = Query.of(part.hypotheses, [part.goal])
                answer, model, _ = self._decide(query)
                if model is not None and model.value(part.goal) == 0:
                    return replace(self._refuted(part, model), obligation=obligation)
                if answer == "unsat":
                    core |= query.core
                else:
                    open_cases.append(case.label)
            if not open_cases:
                return Answer(obligation, Verdict.PROVED, core=core)
            reason += f"; by cases open where {' or '.join(open_cases)}"
        self.still_open += bool(splits)
        return Answer(obligation, Verdict.UNKNOWN, reason)

    def _group(self, group: list[Obligation]) -> Iterator[Answer]:
        pending, refuted = list(group), 0
        while pending:
            query = Query.of(pending[0].hypotheses, [o.goal for o in pending])
            answer, model, reason = self._decide(query)
            if answer == "unsat":
                yield from (Answer(o, Verdict.PROVED, core=query.core) for o in pending)
                return
            if model is None:
                yield from self._halves(pending, reason)
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

    def _refuted(self, obligation: Obligation, model: Model) -> Answer:
        query = Query.of(obligation.hypotheses, [obligation.goal])
        model = self._smallest(query, model) if self.minimise else model
        shown = {n: model.value(t) if isinstance(t, z3.ExprRef) else t for n, t in obligation.show.items()}
        values = model.values()
        if obligation.exact and is_exact([*(h.term for h in obligation.hypotheses), obligation.goal]):
            return Answer(obligation, Verdict.REFUTED, model=values, shown=shown)
        reason = "fails for some value of data that is not tracked"
        return Answer(obligation, Verdict.UNKNOWN, reason, model=values, shown=shown)

    # ------------------------------------------------------------------ solvers
    def _decide(self, query: Query) -> tuple[str, Model | None, str]:
        answer, model, reason = self._z3(query)
        if self.smt2 is not None:
            self._store(f"(set-info :status {answer})\n{query.text}(check-sat)\n")
        if answer == "sat" or (answer == "unsat" and not self.recheck):
            self._count("z3", answer)
            return answer, model, reason
        if answer == "unsat":
            again = self._second(query)
            return ("unsat", None, "") if again == "unsat" else ("unknown", None, _BY_Z3_ALONE)
        if self.recheck and self._cvc5(query) == "unsat":
            self._count("cvc5 alone", "unsat")
            return "unknown", None, f"proved by cvc5, not by z3 ({reason})"
        return "unknown", None, reason

    def _second(self, query: Query) -> str:
        """Return cvc5's answer to what z3 proved; a question counts as proved by z3 once both have said so.

        Raises:
            RuntimeError: cvc5 has a model. One of the two is wrong: no verdict at all.
        """
        answer = self._cvc5(query)
        if answer == "sat":
            raise RuntimeError(f"z3 and cvc5 disagree on:\n{query.text}")
        if answer == "unsat":
            self._count("cvc5", answer)
        self._count("z3" if answer == "unsat" else "z3 alone", "unsat")
        return answer

    def _count(self, solver: str, answer: str) -> None:
        key = f"{solver} {answer}"
        self.decided[key] = self.decided.get(key, 0) + 1

    def _z3(self, query: Query) -> tuple[str, Model | None, str]:
        self.queries += 1
        if _remembered is not None and query.question in _remembered:
            self.rlimit_used += _remembered[query.question][0]
            return "unsat", None, ""
        solver = query.solver(self.rlimit)
        answer = str(solver.check())
        spent = _rlimit_count(solver)
        self.rlimit_used += spent
        if answer == "unknown":
            return answer, None, solver.reason_unknown()
        if answer == "unsat" and _remembered is not None:
            _remembered[query.question] = spent, None
        return answer, Model(solver) if answer == "sat" else None, ""

    def _z3_proves(self, script: Script) -> tuple[dict[int, Core], list[int]]:
        """Return which questions of a script z3 refutes, with their cores, and of which it has a model."""
        solver = script.solver(min(self.rlimit, TOGETHER_RLIMIT))
        proved: dict[int, Core] = {}
        failed: list[int] = []
        total = 0
        for number, (case, key) in enumerate(zip(script.cases, script.questions, strict=True)):
            self.queries += 1
            spent, core = (0, None) if _remembered is None else _remembered.get(key, (0, None))
            if core is None:
                solver.push()
                solver.from_string(case)
                answer = solver.check()
                core = script.core(number, solver) if answer == z3.unsat else None
                solver.pop()
                before, total = total, _rlimit_count(solver)
                spent = total - before
                if answer == z3.sat:
                    failed.append(number)
                if core is not None and _remembered is not None:
                    _remembered[key] = spent, core
            self.rlimit_used += spent
            if core is not None:
                proved[number] = core
        return proved, failed

    def _cvc5_proves(self, script: Script, cores: Mapping[int, Core]) -> set[int]:
        """Return which questions that z3 proved cvc5 proves too, from what z3's cores leave of them."""
        pending, proved = iter(cores), set[int]()
        with SECOND.running():
            answers = list(self._cvc5_run(script.reduced(cores), incremental=True))
        for result, _ in answers:
            number = next(pending)
            if result.isSat():
                raise RuntimeError(f"z3 and cvc5 disagree on:\n{script.head}{script.cases[number]}")
            if result.isUnsat():
                self._count("cvc5", "unsat")
                proved.add(number)
        return proved

    def _cvc5(self, query: Query) -> str:
        text = f"{query.named_text}(check-sat)\n"
        with SECOND.running():
            ((result, names),) = self._cvc5_run(text, incremental=False, cores=True)
            if result.isUnknown():
                # Where cvc5 has to keep the named hypotheses apart it simplifies less: now all count as used.
                ((result, _),) = self._cvc5_run(text, incremental=False)
                names = list(query.labels)
        if result.isUnsat():
            query.core = frozenset(query.labels[name] for name in names)
            return "unsat"
        return "sat" if result.isSat() else "unknown"

    def _cvc5_run(self, text: str, incremental: bool, cores: bool = False) -> Iterator[tuple[Any, list[str]]]:
        """Yield each answer in a text, and the names in its unsat core."""
        import cvc5  # here: what only reads certificates, as a launch does, must run without it

        solver = cvc5.Solver(cvc5.TermManager())
        # Of scripts z3 gives the cores: cvc5 takes a quarter less where it has none to give.
        solver.setOption("produce-unsat-cores", "true" if cores else "false")
        solver.setOption("incremental", "true" if incremental else "false")
        if incremental:
            # Integer equations are seldom what a proof turns on, nor the nearest integers to a rational
            # solution, and each takes a quarter to a third of the time: what needs them is asked again
            # by itself.
            solver.setOption("dio-solver", "false")
            solver.setOption("arith-brab", "false")
        limit = min(self.cvc5_rlimit, CVC5_TOGETHER_RLIMIT) if incremental else self.cvc5_rlimit
        solver.setOption("rlimit-per", str(limit))
        solver.setOption("seed", str(SEED))
        parser = cvc5.InputParser(solver)
        parser.setStringInput(cvc5.InputLanguage.SMT_LIB_2_6, text, "query")
        symbols = parser.getSymbolManager()
        while not (command := parser.nextCommand()).isNull():
            if command.getCommandName() != "check-sat":
                command.invoke(solver, symbols)
                continue
            result = solver.checkSat()
            core = set(solver.getUnsatCore()) if result.isUnsat() and cores else set()
            named = symbols.getNamedTerms() if core else {}
            yield result, [name for term, name in named.items() if term in core]

    def _store(self, text: str) -> None:
        """Keep a query as a file."""
        assert self.smt2 is not None, "asked for only where there is a folder"
        self.smt2.mkdir(parents=True, exist_ok=True)
        (self.smt2 / f"{self.queries:04}.smt2").write_text(text)

    def _smallest(self, query: Query, model: Model) -> Model:
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


def _rlimit_count(solver: z3.Solver) -> int:
    stats = solver.statistics()
    return next((int(stats.get_key_value(k)) for k in stats.keys() if k == "rlimit count"), 0)  # noqa: SIM118


# --------------------------------------------------------------------------- contexts
def _key(obligation: Obligation) -> tuple[int, ...]:
    return tuple(h.term.get_id() for h in obligation.hypotheses)


def _contexts(obligations: Iterable[Obligation]) -> list[list[Obligation]]:
    """Put obligations together that have the same hypotheses."""
    groups: dict[tuple[int, ...], list[Obligation]] = {}
    for obligation in obligations:
        groups.setdefault(_key(obligation), []).append(obligation)
    return list(groups.values())


def _batches(groups: Sequence[list[Obligation]]) -> Iterator[list[list[Obligation]]]:
    """Put contexts together that one script may take: linear ones, and those that are not."""
    batches: dict[bool, list[list[Obligation]]] = {}
    for group in groups:
        terms = (*(h.term for h in group[0].hypotheses), *(o.goal for o in group))
        batches.setdefault(all(summary(t).linear for t in terms), []).append(group)
    for batch in batches.values():
        for start in range(0, len(batch), MAX_TOGETHER):
            yield batch[start : start + MAX_TOGETHER]
