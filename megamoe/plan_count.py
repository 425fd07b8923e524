"""What the plan's kernel computes, as counts of entries, and the facts about counts that its proof needs.

Entry n is the n-th (rank, token, slot); it is of expert e if its number says so. By definition, as in
`plan.make_plan`, an expert's rows stand behind the blocks of the experts before it, in the order of entries:
the row of entry n is `blocks_before(e) * block_m + count(e, n)`, where count(e, n) is how many of the entries
before n are of e. All functions here are defined by recursion, and each fact about them is proved by
induction, base and step, for any routing; the number of entries and other sizes are constants of a kernel.

Facts reach a proof as instances for the terms that it speaks of (`Counts.about`), so no solver meets a
quantifier. An instance is a consequence of the facts, so what is proved holds; what is not may lack one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, permutations

import z3

from verify.encode import Hypothesis
from verify.solve import Obligation
from verify.symbols import summary

LANES = 32  # threads of a warp
MINE, RANK, THREAD = z3.Ints("mine rank thread")  # the CTA's expert and rank; the thread
_INT = z3.IntSort()
_ROUNDS = 2  # of instances: facts speak of terms that the question does not


def given(*terms: z3.BoolRef) -> tuple[Hypothesis, ...]:
    """Return terms as what a proof may use."""
    return tuple(Hypothesis("definition", "definition", t) for t in terms)


def least(a: z3.ArithRef, b: z3.ArithRef | int) -> z3.ArithRef:
    """Return the smaller one."""
    return z3.If(a <= b, a, z3.IntVal(b) if isinstance(b, int) else b)


def one_if(term: z3.BoolRef) -> z3.ArithRef:
    """Return 1 where the term holds, else 0."""
    return z3.If(term, z3.IntVal(1), z3.IntVal(0))


def _function(name: str, arguments: int) -> z3.FuncDeclRef:
    return z3.Function(name, *[_INT] * (arguments + 1))


EXPERT_OF = _function("topk_idx[]", 1)  # what the routing holds: a number of an expert of any rank
COUNT = _function("count", 2)  # (e, n): entries before n that are of e
COUNTS = _function("counts", 2)  # (i, n): sum of count(e, n) over e < i
BLOCKS = _function("blocks", 1)  # (i): blocks of the experts before i
STRIDED = _function("strided", 3)  # (e, l, w): entries of e that lane l of the first w warps has
LANES_SUM = _function("lanes", 2)  # (e, l): sum of strided(e, lane, warps) over lanes < l
WITHIN = _function("within", 3)  # (e, l, w): sum over the first w warps, of each the first l lanes
WITNESS = _function("entry_of", 3)  # (e, r, n): the entry before n that is the r-th of e
_FUNCTIONS = (COUNT, BLOCKS, STRIDED, LANES_SUM, WITNESS)


@dataclass(frozen=True)
class Counts:
    """The definitions for a kernel's sizes.

    Attributes:
        entries: of all ranks.
        share: entries of a thread.
        threads: of a CTA.
        experts: of a rank.
        block_m: rows of a block.
        pool: blocks of a rank.
        first_expert: number of the first expert of the launch's first rank.
    """

    entries: int
    share: int
    threads: int
    experts: int
    block_m: int
    pool: int
    first_expert: int

    @property
    def warps(self) -> int:
        """Warps of a CTA."""
        return self.threads // LANES

    # ------------------------------------------------------------------ definitions
    def is_of(self, expert: z3.ArithRef, entry: z3.ArithRef) -> z3.BoolRef:
        """Return whether an entry is of an expert of this rank."""
        return EXPERT_OF(entry) == self.first_expert + RANK * self.experts + expert

    def until(self, thread: z3.ArithRef, number: z3.ArithRef | int = 0) -> z3.ArithRef:
        """Return the entry behind the first `number` ones of a thread's share."""
        own = least(z3.IntVal(number) if isinstance(number, int) else number, self.share)
        return least(thread * self.share + own, self.entries)

    def before(self, expert: z3.ArithRef, thread: z3.ArithRef) -> z3.ArithRef:
        """Return how many entries of the threads before `thread` are of an expert."""
        return COUNT(expert, self.until(thread))

    def of_thread(self, expert: z3.ArithRef, thread: z3.ArithRef) -> z3.ArithRef:
        """Return how many of a thread's entries are of an expert."""
        return self.before(expert, thread + 1) - self.before(expert, thread)

    def rows(self, expert: z3.ArithRef) -> z3.ArithRef:
        """Return the rows of an expert."""
        return COUNT(expert, z3.IntVal(self.entries))

    def blocks(self, expert: z3.ArithRef) -> z3.ArithRef:
        """Return the blocks of an expert."""
        return (self.rows(expert) + (self.block_m - 1)) / self.block_m

    def entry(self, expert: z3.ArithRef, row: z3.ArithRef) -> z3.ArithRef:
        """Return the entry that is the `row`-th of an expert."""
        return WITNESS(expert, row, z3.IntVal(self.entries))

    # ------------------------------------------------------------------ instances
    def about(self, terms: Iterable[z3.ExprRef]) -> list[z3.BoolRef]:
        """Return instances of the definitions and facts for what the terms speak of."""
        facts: dict[int, z3.BoolRef] = {}
        todo = list(terms)
        found: dict[str, dict[int, z3.ExprRef]] = {f.name(): {} for f in _FUNCTIONS}
        for _ in range(_ROUNDS):
            for name, of in (a for term in todo for a in summary(term).applications):
                if name in found:
                    found[name][of.get_id()] = of
            apps = {name: list(of.values()) for name, of in found.items()}
            todo = [f for f in self._instances(apps) if f.get_id() not in facts]
            facts |= {f.get_id(): f for f in todo}
        return list(facts.values())

    def _instances(self, apps: dict[str, list[z3.ExprRef]]) -> Iterator[z3.BoolRef]:
        total, last = self.entries, z3.IntVal(self.entries)
        for term in apps["count"]:
            e, n = term.children()
            yield _implied([n >= 0, n <= total], term >= 0, term <= n)
            yield _implied([n == 0], term == 0)
        for a, b in permutations(apps["count"], 2):
            (e, n), (f, m) = a.children(), b.children()
            same = [] if z3.eq(e, f) else [e == f]
            yield _implied([*same, n >= 0, n <= m, m <= total], a <= b, b <= a + (m - n))
            yield _implied([*same, n >= 0, m == n + 1, m <= total], b == a + one_if(self.is_of(e, n)))
            yield _implied([*same, n >= 0, n < m, m <= total, self.is_of(e, n)], a + 1 <= b)
        for term in apps["blocks"]:
            (i,) = term.children()
            yield _implied([i >= 0, i <= self.experts], term >= 0, term <= self.pool)
            yield _implied([i == 0], term == 0)
            yield _implied([i >= 0, i < self.experts], term + self.blocks(i) <= self.pool)
        for a, b in permutations(apps["blocks"], 2):
            (i,), (j,) = a.children(), b.children()
            yield _implied([i >= 0, i < j, j <= self.experts], a + self.blocks(i) <= b)
            yield _implied([i >= 0, j == i + 1, j <= self.experts], b == a + self.blocks(i))
        for term in apps["strided"]:
            _, lane, warp = term.children()
            inside = [lane >= 0, lane < LANES, warp >= 0, warp <= self.warps]
            yield _implied(inside, term >= 0, term <= total)
            yield _implied([warp == 0], term == 0)
        for a, b in permutations(apps["strided"], 2):
            (e, lane, w), (f, other, v) = a.children(), b.children()
            same = [x == y for x, y in ((e, f), (lane, other)) if not z3.eq(x, y)]
            inside = [w >= 0, v == w + 1, v <= self.warps]
            yield _implied([*same, *inside], b == a + self.of_thread(e, w * LANES + lane))
        for term in apps["lanes"]:
            e, lane = term.children()
            yield _implied([lane >= 0, lane <= LANES], term >= 0, term <= total)
            yield _implied([lane == 0], term == 0)
            yield _implied([lane == LANES], term == COUNT(e, last))
        for a, b in permutations(apps["lanes"], 2):
            (e, lane), (f, other) = a.children(), b.children()
            same = [] if z3.eq(e, f) else [e == f]
            inside = [lane >= 0, other == lane + 1, other <= LANES]
            yield _implied([*same, *inside], b == a + STRIDED(e, lane, z3.IntVal(self.warps)))
        for term in apps["entry_of"]:
            e, r, n = term.children()
            inside = [r >= 0, r < COUNT(e, n), n >= 0, n <= total]
            yield _implied(inside, term >= 0, term < n, self.is_of(e, term), COUNT(e, term) == r)

    # ------------------------------------------------------------------ proofs of the facts
    def facts(self) -> Iterator[Obligation]:
        """Prove what `about` says beyond the definitions: each from those before it."""
        yield from self._counted()
        yield from self._pool()
        yield from self._sums()
        yield from self._placed()

    def _step(self, e: z3.ArithRef, n: z3.ArithRef) -> z3.BoolRef:
        return COUNT(e, n + 1) == COUNT(e, n) + one_if(self.is_of(e, n))

    def _counted(self) -> Iterator[Obligation]:
        e, n, m = z3.Ints("e n m")

        def ascends(low: z3.ArithRef, high: z3.ArithRef) -> z3.BoolRef:
            return z3.And(COUNT(e, low) <= COUNT(e, high), COUNT(e, high) <= COUNT(e, low) + (high - low))

        inside = z3.And(n >= 0, n <= m, m < self.entries)
        yield Obligation("counts ascend: at the start", None, (), ascends(n, n))
        known = given(inside, ascends(n, m), self._step(e, m))
        yield Obligation("counts ascend, by at most one an entry", None, known, ascends(n, m + 1))
        known = given(COUNT(e, z3.IntVal(0)) == 0, ascends(z3.IntVal(0), n))
        yield Obligation(
            "a count is at most the entries", None, known, z3.And(COUNT(e, n) >= 0, COUNT(e, n) <= n)
        )
        known = given(inside, n + 1 <= m, self.is_of(e, n), self._step(e, n), ascends(n + 1, m))
        yield Obligation("an entry is counted behind it", None, known, COUNT(e, n) + 1 <= COUNT(e, m))

    def _pool(self) -> Iterator[Obligation]:
        """The blocks of all experts fit the pool: an entry is of one expert at most."""
        i, n, j = z3.Ints("i n j")
        e = i
        number = EXPERT_OF(n) - self.first_expert - RANK * self.experts

        def defined(at: z3.ArithRef) -> z3.BoolRef:
            return COUNTS(i + 1, at) == COUNTS(i, at) + COUNT(e, at)

        def grown(to: z3.ArithRef) -> z3.BoolRef:
            return COUNTS(to, n + 1) == COUNTS(to, n) + one_if(z3.And(number >= 0, number < to))

        zero, last = z3.IntVal(0), z3.IntVal(self.entries)
        known = given(COUNTS(zero, n) == 0, COUNTS(zero, n + 1) == 0)
        yield Obligation("an entry is of one expert: of none, at the start", None, known, grown(zero))
        known = given(i >= 0, defined(n), defined(n + 1), self._step(e, n), grown(i))
        yield Obligation("an entry is of one expert at most", None, known, grown(i + 1))
        known = given(COUNTS(i, zero) == 0, COUNT(e, zero) == 0, defined(zero))
        yield Obligation(
            "no entries, no rows: none at the start",
            None,
            given(COUNTS(zero, zero) == 0),
            COUNTS(zero, zero) == 0,
        )
        yield Obligation("no entries, no rows", None, known, COUNTS(i + 1, zero) == 0)
        yield Obligation("rows at the start", None, given(COUNTS(i, zero) == 0), COUNTS(i, zero) <= 0)
        yield Obligation(
            "rows are at most entries", None, given(grown(i), COUNTS(i, n) <= n), COUNTS(i, n + 1) <= n + 1
        )

        def fits(to: z3.ArithRef) -> z3.BoolRef:
            return z3.And(
                BLOCKS(to) >= 0,
                BLOCKS(to) <= COUNTS(to, last),
                self.block_m * BLOCKS(to) <= COUNTS(to, last) + to * (self.block_m - 1),
            )

        next_blocks = BLOCKS(i + 1) == BLOCKS(i) + self.blocks(i)
        counted = self.rows(i) >= 0
        yield Obligation(
            "blocks at the start", None, given(BLOCKS(zero) == 0, COUNTS(zero, last) == 0), fits(zero)
        )
        known = given(i >= 0, fits(i), next_blocks, counted, defined(last))
        yield Obligation("blocks of more experts", None, known, fits(i + 1))
        all_experts = z3.IntVal(self.experts)
        known = given(fits(all_experts), COUNTS(all_experts, last) <= last)
        yield Obligation("the pool holds all blocks", None, known, BLOCKS(all_experts) <= self.pool)

        def follows(to: z3.ArithRef) -> z3.BoolRef:
            return BLOCKS(j) + self.blocks(j) <= BLOCKS(to)

        known = given(BLOCKS(j + 1) == BLOCKS(j) + self.blocks(j))
        yield Obligation("blocks ascend: the next", None, known, follows(j + 1))
        known = given(j >= 0, j < i, follows(i), next_blocks, counted)
        yield Obligation("blocks ascend", None, known, follows(i + 1))
        known = given(
            BLOCKS(i) + self.blocks(i) <= BLOCKS(all_experts), counted, BLOCKS(all_experts) <= self.pool
        )
        behind = BLOCKS(i) + self.blocks(i)
        fewer = z3.And(BLOCKS(i) <= self.pool, behind <= self.pool)
        yield Obligation("the pool holds the blocks of fewer", None, known, fewer)

    def _sums(self) -> Iterator[Obligation]:
        """Sums over warps and lanes are those over threads."""
        e, lane, w = z3.Ints("e lane w")
        warps, total = z3.IntVal(self.warps), self.entries

        def first(warp: z3.ArithRef) -> z3.ArithRef:
            return self.before(e, warp * LANES)

        def of(thread: z3.ArithRef) -> z3.ArithRef:
            return self.before(e, thread)

        at = w * LANES + lane
        next_strided = STRIDED(e, lane, w + 1) == STRIDED(e, lane, w) + self.of_thread(e, at)

        def ascending(*threads: z3.ArithRef) -> z3.BoolRef:
            """Counts of these threads, which ascend, do, and are at most the entries."""
            values = [z3.IntVal(0), *(of(t) for t in threads), z3.IntVal(total)]
            return z3.And(*(a <= b for a, b in pairwise(values)))

        inside = z3.And(lane >= 0, lane < LANES, w >= 0, w < self.warps)
        before = (w - 1) * LANES + lane + 1

        def strided(warp: z3.ArithRef, behind: z3.ArithRef) -> z3.BoolRef:
            """Strided sums are at most the count behind their last thread."""
            some = z3.And(STRIDED(e, lane, warp) >= 0, STRIDED(e, lane, warp) <= of(behind))
            return z3.Or(z3.And(warp == 0, STRIDED(e, lane, warp) == 0), z3.And(warp > 0, some))

        zero = z3.IntVal(0)
        yield Obligation(
            "strided sums at the start", None, given(STRIDED(e, lane, zero) == 0), strided(zero, before)
        )
        for what, count in (("the first warp's", w == 0), ("the next warp's", w > 0)):
            ordered = ascending(at, at + 1) if what.startswith("the first") else ascending(before, at, at + 1)
            known = given(inside, count, strided(w, before), next_strided, ordered)
            yield Obligation(f"strided sums: {what}", None, known, strided(w + 1, at + 1))
        # `ascending` itself: threads in order have entries in order.
        a, b = z3.Ints("a b")
        known = given(a >= 0, a <= b)
        order = z3.And(self.until(a) >= 0, self.until(a) <= self.until(b), self.until(b) <= total)
        yield Obligation("threads have entries in order", None, known, order)
        everything = self.until(z3.IntVal(self.threads)) == total
        yield Obligation("threads have all entries", None, (), everything)

        next_within = WITHIN(e, lane, w + 1) == WITHIN(e, lane, w) + of(at) - first(w)
        more_within = WITHIN(e, lane + 1, w + 1) == WITHIN(e, lane + 1, w) + of(at + 1) - first(w)

        def widened(warp: z3.ArithRef) -> z3.BoolRef:
            return WITHIN(e, lane + 1, warp) == WITHIN(e, lane, warp) + STRIDED(e, lane, warp)

        start = [WITHIN(e, lane, zero) == 0, WITHIN(e, lane + 1, zero) == 0, STRIDED(e, lane, zero) == 0]
        yield Obligation("sums by lanes and by warps at the start", None, given(*start), widened(zero))
        known = given(inside, widened(w), next_within, more_within, next_strided)
        yield Obligation("sums by lanes and by warps are the same", None, known, widened(w + 1))

        def bounded(warp: z3.ArithRef) -> z3.BoolRef:
            return z3.And(WITHIN(e, lane, warp) >= 0, WITHIN(e, lane, warp) <= first(warp))

        wide = z3.And(lane >= 0, lane <= LANES, w >= 0, w < self.warps)
        known = given(WITHIN(e, lane, zero) == 0, ascending(zero))
        yield Obligation("sums of first lanes at the start", None, known, bounded(zero))
        known = given(wide, bounded(w), next_within, ascending(w * LANES, at, (w + 1) * LANES))
        yield Obligation("sums of first lanes are at most those of warps", None, known, bounded(w + 1))
        none, full = WITHIN(e, zero, w), WITHIN(e, z3.IntVal(LANES), w)
        known = given(none == 0, WITHIN(e, zero, w + 1) == none + first(w) - first(w))
        yield Obligation("sums of no lanes", None, known, WITHIN(e, zero, w + 1) == 0)
        known = given(
            full == first(w), WITHIN(e, z3.IntVal(LANES), w + 1) == full + of(w * LANES + LANES) - first(w)
        )
        yield Obligation("sums of all lanes", None, known, WITHIN(e, z3.IntVal(LANES), w + 1) == first(w + 1))
        known = given(WITHIN(e, z3.IntVal(LANES), zero) == 0, COUNT(e, zero) == 0)
        yield Obligation(
            "sums of all lanes at the start", None, known, WITHIN(e, z3.IntVal(LANES), zero) == first(zero)
        )

        same = LANES_SUM(e, lane) == WITHIN(e, lane, warps)
        start = given(LANES_SUM(e, zero) == 0, WITHIN(e, zero, warps) == 0)
        yield Obligation("the sum of lanes at the start", None, start, z3.substitute(same, (lane, zero)))
        known = given(
            same, widened(warps), LANES_SUM(e, lane + 1) == LANES_SUM(e, lane) + STRIDED(e, lane, warps)
        )
        yield Obligation(
            "the sum of lanes", None, known, LANES_SUM(e, lane + 1) == WITHIN(e, lane + 1, warps)
        )
        last = COUNT(e, z3.IntVal(total))
        known = given(same, bounded(warps), last <= total, first(warps) == last)
        yield Obligation(
            "the sum of some lanes is at most the entries",
            None,
            known,
            z3.And(LANES_SUM(e, lane) >= 0, LANES_SUM(e, lane) <= total),
        )
        full = WITHIN(e, z3.IntVal(LANES), warps)
        known = given(lane == LANES, same, full == first(warps))
        yield Obligation("the sum of all lanes counts all entries", None, known, LANES_SUM(e, lane) == last)

    def _placed(self) -> Iterator[Obligation]:
        """Each of an expert's rows is some entry's: of those before n, the last that began it."""
        e, r, n = z3.Ints("e r n")

        def found(at: z3.ArithRef) -> z3.BoolRef:
            entry = WITNESS(e, r, at)
            held = z3.And(entry >= 0, entry < at, self.is_of(e, entry), COUNT(e, entry) == r)
            return z3.Implies(r < COUNT(e, at), held)

        yield Obligation(
            "rows of no entries", None, given(r >= 0, COUNT(e, z3.IntVal(0)) == 0), found(z3.IntVal(0))
        )
        is_next = z3.And(self.is_of(e, n), COUNT(e, n) == r)
        chosen = WITNESS(e, r, n + 1) == z3.If(is_next, n, WITNESS(e, r, n))
        known = given(r >= 0, n >= 0, n < self.entries, found(n), self._step(e, n), chosen)
        yield Obligation("each row is an entry's", None, known, found(n + 1))


def _implied(conditions: list[z3.BoolRef], *goals: z3.BoolRef) -> z3.BoolRef:
    return z3.Implies(z3.And(*conditions), z3.And(*goals) if len(goals) > 1 else goals[0])
