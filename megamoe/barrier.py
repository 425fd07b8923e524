"""The two barriers of the fused kernel as transition systems: proved for any size, explored for small ones.

`protocol` reads off the compiled kernel that its events are those of the models: what is added, stored
and waited for. The models are sequentially consistent; that release and acquire are where they have to be
is checked on the compiled kernel too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import z3

from verify.encode import Hypothesis
from verify.solve import Obligation

FLIP = 1 << 31
MAX_CTAS = 1 << 16
WORDS = 1 << 32  # values of a word


def _given(*terms: z3.BoolRef) -> tuple[Hypothesis, ...]:
    return tuple(Hypothesis(str(t), "definition", t) for t in terms)


def grid_barrier(master: int = FLIP, spread: int = 1) -> Iterator[Obligation]:
    """Bit 31 of the word turns over when the last of n CTAs has added, not before; the rest is then zero.

    One CTA adds `master` - (n - `spread`), each other one adds 1; a mutant changes either.
    """
    ctas, others, base = z3.Ints("ctas others base")
    has_master = z3.Bool("has_master")
    added = others + z3.If(has_master, master - (ctas - spread), 0)
    word = (base + added) % WORDS
    turned = word / FLIP != base / FLIP
    complete = z3.And(has_master, others == ctas - 1)
    is_base = z3.Or(base == 0, base == FLIP)
    given = _given(ctas >= 1, ctas <= MAX_CTAS, others >= 0, others <= ctas - 1, is_base)
    yield Obligation("turned over if and only if all have come", None, given, turned == complete)
    goal = z3.Implies(complete, z3.Or(word == 0, word == FLIP))
    yield Obligation("the next round starts like the first", None, given, goal)


def rank_barrier(ahead: int = 1) -> Iterator[Obligation]:
    """Barriers over any number of ranks, by an invariant about each two of them.

    passed(i) counts the barriers that rank i has passed, sent(i, j) is its word at rank j. A rank that has
    passed e stores e + 1 to its peers, one after another, and passes e + 1 once every word of its own is at
    least e + `ahead` (1; a mutant waits for less).
    """
    passed_i, passed_j, sent_ij, sent_ji = z3.Ints("passed_i passed_j sent_ij sent_ji")
    given = _given(invariant := _pair(passed_i, passed_j, sent_ij, sent_ji), passed_i >= 0, passed_j >= 0)
    yield Obligation("at the start", None, (), _pair(*(z3.IntVal(0),) * 4))
    stored = _pair(passed_i, passed_j, passed_i + 1, sent_ji)
    yield Obligation("after a store of i to j", None, given, stored)
    # i passes only after it has stored to every peer, and seen every word.
    may_pass = _given(sent_ij == passed_i + 1, sent_ji >= passed_i + ahead)
    after = _pair(passed_i + 1, passed_j, sent_ij, sent_ji)
    yield Obligation("after i has passed", None, (*given, *may_pass), after)
    has_come = sent_ji >= passed_i + 1
    yield Obligation("i passes only when j has come", None, (*given, *may_pass), has_come)
    apart = z3.And(passed_i - passed_j <= 1, passed_j - passed_i <= 1)
    yield Obligation("no rank is two barriers ahead", None, _given(invariant), apart)
    word, wanted = z3.Ints("word wanted")
    apart_by = (word % WORDS - wanted % WORDS + WORDS + FLIP) % WORDS - FLIP  # the difference as int32
    near = _given(word >= 0, wanted >= 0, word - wanted <= 1, wanted - word <= 1)
    sign = (apart_by >= 0) == (word >= wanted)
    yield Obligation("the sign of the difference compares epochs that wrap", None, near, sign)


def _pair(
    passed_i: z3.ArithRef, passed_j: z3.ArithRef, sent_ij: z3.ArithRef, sent_ji: z3.ArithRef
) -> z3.BoolRef:
    def one(passed: z3.ArithRef, sent: z3.ArithRef, other: z3.ArithRef) -> z3.BoolRef:
        """A word is what its rank has passed, or one more; no rank passes what the word does not show."""
        return z3.And(passed <= sent, sent <= passed + 1, other <= sent)

    return z3.And(one(passed_i, sent_ij, passed_j), one(passed_j, sent_ji, passed_i))


# --------------------------------------------------------------------------- every interleaving
@dataclass(frozen=True)
class Outcome:
    """What exploring every interleaving found.

    Attributes:
        states: reached.
        early: a rank passed a barrier that another had not come to.
        stuck: a state without a next one in which some rank had barriers left.
    """

    states: int
    early: bool
    stuck: bool


def explore(
    ranks: int, barriers: int, *, phases: int | None = None, skip: tuple[int, int] | None = None
) -> Outcome:
    """Run `barriers` barriers of `ranks` ranks in every interleaving.

    Args:
        ranks: at most 4 in reasonable time.
        barriers: of each rank.
        phases: words hold the epoch modulo this and waits are for equality; None: whole epochs. 2 is what a
            barrier with a flag that is not reset would do.
        skip: (rank, peer): this rank does not signal this peer.
    """

    def shown(epoch: int) -> int:
        return epoch if phases is None else epoch % phases

    # A rank: barriers passed, and which peers it has signalled for the next one.
    alone = [frozenset({i}) for i in range(ranks)]  # its own word is stored and read by one thread
    start = (tuple((0, mine) for mine in alone), tuple((0,) * ranks for _ in range(ranks)))
    seen, todo, early, stuck = {start}, [start], False, False
    everyone = frozenset(range(ranks))
    while todo:
        states, words = todo.pop()  # words[j][i]: rank i's word at rank j
        following = []
        for i, (passed, signalled) in enumerate(states):
            if passed == barriers:
                continue
            for j in everyone - signalled:
                changed = [list(row) for row in words]
                if skip != (i, j):
                    changed[j][i] = shown(passed + 1)
                moved = (*states[:i], (passed, signalled | {j}), *states[i + 1 :])
                following.append((moved, tuple(tuple(row) for row in changed)))
            wanted = shown(passed + 1)
            sees = [w == wanted if phases else w >= wanted for w in words[i]]
            sees[i] = True
            if signalled == everyone and all(sees):
                early |= any(
                    k != i and (other < passed or (other == passed and i not in sent))
                    for k, (other, sent) in enumerate(states)
                )
                moved = (*states[:i], (passed + 1, alone[i]), *states[i + 1 :])
                following.append((moved, words))
        stuck |= not following and any(passed < barriers for passed, _ in states)
        for state in following:
            if state not in seen:
                seen.add(state)
                todo.append(state)
    return Outcome(len(seen), early, stuck)


def grid_interleavings(ctas: int, rounds: int, master: int = FLIP) -> Outcome:
    """Run `rounds` grid barriers of `ctas` CTAs in every interleaving, on the word itself."""
    start = (
        0,
        tuple((0, -1) for _ in range(ctas)),
    )  # the word; rounds done and the word before the CTA's add
    seen, todo, early, stuck = {start}, [start], False, False
    while todo:
        word, states = todo.pop()
        following = []
        for i, (done, before) in enumerate(states):
            if before < 0 and done < rounds:
                step = master - (ctas - 1) if i == 0 else 1
                moved = (*states[:i], (done, word), *states[i + 1 :])
                following.append(((word + step) % WORDS, moved))
            elif before >= 0 and (word ^ before) & FLIP:
                early |= any(other < done or (other == done and held < 0) for other, held in states)
                following.append((word, (*states[:i], (done + 1, -1), *states[i + 1 :])))
        stuck |= not following and any(done < rounds for done, _ in states)
        for state in following:
            if state not in seen:
                seen.add(state)
                todo.append(state)
    return Outcome(len(seen), early, stuck)


def ranks_and_rounds() -> Iterator[tuple[int, int]]:
    """Yield the sizes that are explored in full."""
    yield from product((1, 2, 3), (4,))
    yield 4, 2
