"""What cases share is what each of them finds: kept results, and signatures with and without them."""

import pytest
import z3

from tests.verify import invariance_kernels as kernels
from verify import extract
from verify.encode import Hypothesis
from verify.ir import UnsupportedIR
from verify.refine.evaluate import Cond, compare
from verify.refine.sym import Algebra, const
from verify.signature.memo import Memo, Supposed
from verify.signature.rows import _Reader, signature
from verify.signature.statements import Statements
from verify.signature.values import Values

ALGEBRA = Algebra()
I = ALGEBRA.var("i", 0, 7)  # noqa: E741 (as kernels call it)
J = ALGEBRA.var("j", 0, 15)
OF_I, OF_J = compare("lt", I, const(4)), compare("lt", J, const(4))
OTHER_J = compare("ge", J, const(4))
OF_DATA = compare("lt", ALGEBRA.call("load", ("x", I), 0, 3), const(1))
_M = z3.Int("m")
GIVEN = (Hypothesis("0 <= m", "contract", _M >= 0), Hypothesis("m <= 65536", "contract", _M <= 1 << 16))


class Kept:
    """A memo, what is supposed, and how often its result was computed."""

    def __init__(self, *questions: tuple[Cond, bool], whether: bool = False) -> None:
        self.supposed, self.computed = Supposed(Cond()), 0
        self.memo: Memo[int] = Memo(self.supposed)
        self.questions, self.whether = questions, whether

    def make(self) -> int:
        self.computed += 1
        self.supposed.asked.whether |= self.whether
        for cond, alone in self.questions:
            self.supposed.note(cond, alone)
        return self.computed

    def under(self, *cases: Cond) -> int:
        """Return the result where `cases` are supposed."""
        facts = Cond()
        for case in cases:
            facts &= case
        self.supposed.facts, self.supposed.cases = facts, tuple(facts.literals)
        return self.memo.get("key", self.make)


def test_a_case_that_nothing_asked_about_finds_what_another_found():
    kept = Kept((OF_I, True))
    assert [kept.under(), kept.under(OF_J), kept.under(OTHER_J), kept.under(OF_J)] == [1, 1, 1, 1]
    assert Kept().under(OF_I) == 1


@pytest.mark.parametrize(
    "question",
    [(OF_J, True), (compare("lt", J, I), True), (OF_I, False), (OF_DATA, True)],
    ids=["its variable", "one of its variables", "a solver's", "data"],
)
def test_a_case_that_a_question_may_read_is_followed(question):
    kept = Kept(question)
    assert [kept.under(), kept.under(OF_J), kept.under(OTHER_J)] == [1, 2, 3]
    assert [kept.under(), kept.under(OF_J), kept.under(OTHER_J)] == [1, 2, 3]


def test_a_case_that_is_not_computed_is_read_by_every_question():
    kept = Kept((OF_I, True))
    assert [kept.under(), kept.under(OF_DATA)] == [1, 2]
    assert [kept.under(OF_I), kept.under(OF_I, OF_J), kept.under(OF_I, OF_DATA)] == [3, 3, 4]


def test_whether_there_are_cases_is_a_question():
    kept = Kept((OF_I, True), whether=True)
    assert [kept.under(), kept.under(OF_J), kept.under(OTHER_J)] == [1, 2, 2]


def test_a_result_asks_what_its_parts_asked():
    """Kept parts too, and those that ended in an error."""
    kept = Kept((OF_J, True))
    whole: Memo[int] = Memo(kept.supposed)

    def of_part() -> int:
        return 10 * kept.memo.get("key", kept.make)

    def of_error() -> int:
        with pytest.raises(UnsupportedIR):
            kept.memo.get("error", fail)
        return kept.supposed.facts is OTHER_J

    def fail() -> int:
        kept.supposed.note(OF_J, True)
        raise UnsupportedIR("not understood")

    found = []
    for case in (OF_J, OTHER_J):
        kept.supposed.facts, kept.supposed.cases = case, tuple(case.literals)
        found += [kept.under(case), whole.get("first", of_part), whole.get("second", of_part)]
        kept.supposed.facts = case
        found.append(whole.get("third", of_error))
    assert found == [1, 10, 10, False, 2, 20, 20, True]


# --------------------------------------------------------------------------- signatures
KERNELS = {
    "halves in halves": kernels.halves_in_halves,
    "of the other's": lambda: kernels.halves_in_halves(swapped=True),
    "halves of a tile": lambda: kernels.column_scales(True),
    "halves of tiles": kernels.column_tiles,
    "sums in two places": lambda: kernels.moving_sums(2),
    "tiles": lambda: kernels.grid_stride(False),
    "product": lambda: kernels.product(64, 64),
}


def found(make) -> tuple[dict[str, str], list[str]]:
    """Return the digests of a kernel's outputs, and its obligations."""
    result = signature(extract.tile_function(make()), ("m",), GIVEN, lambda step: "any")
    assert not result.problems, result.problems
    assert not result.unsupported, result.unsupported
    digests = {name: output.digest for name, output in result.outputs.items()}
    return digests, [str(o.goal) for o in result.obligations]


@pytest.mark.parametrize("name", KERNELS)
def test_signatures_are_those_of_cases_and_statements_followed_alone(name, monkeypatch):
    shared = found(KERNELS[name])
    monkeypatch.setattr(Memo, "_like", lambda self, key: None)
    monkeypatch.setattr(
        _Reader, "_values", lambda self, settings, *_: Values(self.algebra, self.terms, settings)
    )
    assert found(KERNELS[name]) == shared


def test_halves_are_of_their_own_halves():
    digests = [found(KERNELS[name])[0] for name in ("halves in halves", "of the other's")]
    assert digests[0] != digests[1]


def test_what_no_case_decides_is_found_once(monkeypatch):
    reduced = []
    follow = Statements._reduced
    monkeypatch.setattr(
        Statements, "_reduced", lambda self, *args: reduced.append(args) or follow(self, *args)
    )
    found(KERNELS["halves in halves"])
    assert len(reduced) == 1
