"""What proofs know of private variables is what they hold: random device programs, run and encoded.

The walker follows private integers through branches and loops (`walk`, `induction`), and `contents` bounds
all that is ever stored in one. Both are held against the device interpreter: after every store of a program
the variable is written to a tensor, so that each round of each thread is compared.
"""

import itertools
import random
from dataclasses import dataclass, field
from functools import cache

import torch
import z3

from tests.verify.device import build
from tests.verify.device.build import TX, add, const, op
from tests.verify.test_encoder_against_interpreter import as_int
from verify import ir
from verify.contents import contents
from verify.encode import Encoder, is_exact
from verify.ranges import Range
from verify.walk import walk

THREADS, ROUNDS, DEPTH = 32, 5, 2
SLOTS = ROUNDS**DEPTH
MISSING = -(2**31)
TABLE = [3, -1, 4, 1, -5, 9, 2, 6]
PROGRAMS = 24
ENOUGH = 20  # probes of a program: then no more branches and loops are opened
TERMS = {"Set", "Copied", "Added", "Flipped", "Swapped", "Loaded", "Branch", "For", "Computed", "While"}


def variable(name: str) -> ir.Buffer:
    return build.buffer(name, "int32", 1, "local.var")


def held(buffer: ir.Buffer) -> ir.Expr:
    return build.load(buffer, 0)


@dataclass
class Program:
    """A random program; `probes` are the stores that show a variable."""

    seed: int
    probes: list[tuple[ir.Store, ir.Buffer, tuple[ir.Var | ir.Buffer, ...]]] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.out = build.buffer("out", "int32", 1 << 16, "global")
        self.table = build.buffer("table", "int32", len(TABLE), "global")
        self.vars = [variable(f"v{n}") for n in range(3)]
        self.counters: list[ir.Buffer] = []  # of while loops

    def kernel(self) -> build.Kernel:
        body = [s for v in self.vars for s in self._set(v, const(self.rng.randint(0, 1)), ())]
        body += self.block(3, 0, ())
        return build.Kernel(
            threads=THREADS, tensors=[self.out, self.table], allocs=[*self.vars, *self.counters], body=body
        )

    # ------------------------------------------------------------------ statements
    def block(self, count: int, depth: int, around: tuple[ir.Var | ir.Buffer, ...]) -> list[ir.Stmt]:
        return [s for _ in range(count) for s in self._statement(depth, around)]

    def _set(self, target: ir.Buffer, value: ir.Expr, around: tuple) -> list[ir.Stmt]:
        return [build.store(target, 0, value), self._shown(target, around)]

    def _shown(self, target: ir.Buffer, around: tuple) -> ir.Stmt:
        place: ir.Expr = const(0)
        for counter in around:
            place = add(op("mul", place, ROUNDS), counter if isinstance(counter, ir.Var) else held(counter))
        row = add(const(len(self.probes) * THREADS), TX)
        probe = build.store(self.out, add(op("mul", row, SLOTS), place), held(target))
        self.probes.append((probe, target, around))
        return probe

    def _statement(self, depth: int, around: tuple) -> list[ir.Stmt]:
        forms = ["Set", "Copied", "Added", "Added", "Flipped", "Swapped", "Loaded"]
        if len(self.probes) < ENOUGH:
            forms += ["Branch", "Branch", *(["For", "For", "While", "Computed"] if depth < DEPTH else [])]
        form, target = self.rng.choice(forms), self.rng.choice(self.vars)
        self.seen.add(form)
        match form:
            case "Set":
                return self._set(target, self._number(around), around)
            case "Copied":
                source = self.rng.choice(self.vars)
                return self._set(target, add(held(source), self.rng.randint(-2, 2)), around)
            case "Added":
                kind, amount = self.rng.choice(("add", "sub")), self.rng.randint(1, 3)
                return self._set(target, op(kind, held(target), amount), around)
            case "Flipped":
                return self._set(target, op("bitxor", held(target), 1), around)
            case "Swapped":
                return self._set(target, op("sub", const(1), held(target)), around)
            case "Loaded":
                index = op("bitand", self._number(around), 7)
                return self._set(target, build.load(self.table, index), around)
            case "Branch":
                cond = self._cond(around)
                other = self.block(1, depth, around) if self.rng.random() < 0.5 else []
                branch = build.when(cond, *self.block(2, depth, around), other=other)
                return [branch, *(self._shown(v, around) for v in self.vars)]
            case "While":
                return self._while(depth, around)
        counter = ir.Var(build.I32, f"k{len(self.probes)}")
        extent = op("bitand", TX, 3) if form == "Computed" else const(self.rng.randint(1, ROUNDS - 1))
        loop = build.loop(counter, extent, *self.block(2, depth + 1, (*around, counter)))
        return [loop, *(self._shown(v, around) for v in self.vars)]

    def _while(self, depth: int, around: tuple) -> list[ir.Stmt]:
        number = variable(f"round{len(self.counters)}")
        self.counters.append(number)
        limit = self.rng.choice((const(self.rng.randint(0, ROUNDS - 1)), op("bitand", TX, 3)))
        body = self.block(2, depth + 1, (*around, number))
        body.append(build.store(number, 0, add(held(number), 1)))
        loop = ir.While(build.span(), op("lt", held(number), limit), ir.Seq(None, tuple(body)))
        return [build.store(number, 0, const(0)), loop]

    def _number(self, around: tuple) -> ir.Expr:
        counters = [c for c in around if isinstance(c, ir.Var)]
        leaf = self.rng.choice([TX, *counters, const(self.rng.randint(-3, 6))])
        return self.rng.choice([leaf, op("mul", leaf, 2), op("min", leaf, 5), op("bitand", leaf, 3)])

    def _cond(self, around: tuple) -> ir.Expr:
        left = self.rng.choice([self._number(around), held(self.rng.choice(self.vars))])
        return op(self.rng.choice(("lt", "ge", "eq", "ne")), left, const(self.rng.randint(0, 4)))


class Flips(Program):
    """Bits that a round flips twice, or as often as an inner loop runs."""

    def block(self, count: int, depth: int, around: tuple[ir.Var | ir.Buffer, ...]) -> list[ir.Stmt]:
        outer, inner = ir.Var(build.I32, "outer"), ir.Var(build.I32, "inner")
        once, twice, often = self.vars
        flips = [
            *self._set(once, op("bitxor", held(once), 1), (outer,)),
            *self._set(twice, op("sub", const(1), held(twice)), (outer,)),
            *self._set(twice, op("bitxor", held(twice), 1), (outer,)),
            build.loop(
                inner, op("bitand", TX, 3), *self._set(often, op("bitxor", held(often), 1), (outer, inner))
            ),
        ]
        return [build.loop(outer, ROUNDS - 1, *flips)]


@dataclass
class Seen:
    """What a variable held after one store: of each thread, by the rounds around it."""

    program: Program
    kernel: build.Kernel
    result: torch.Tensor

    def at(self, probe: int, thread: int, rounds: tuple[int, ...]) -> int:
        place = 0
        for value in rounds:
            place = place * ROUNDS + value
        return int(self.result[(probe * THREADS + thread) * SLOTS + place])


def ran(program: Program) -> Seen:
    kernel = program.kernel()
    result = torch.full((1 << 16,), MISSING, dtype=torch.int32)
    assert len(program.probes) * THREADS * SLOTS <= 1 << 16
    kernel.run(result, torch.tensor(TABLE, dtype=torch.int32), policy="late")
    return Seen(program, kernel, result)


@cache
def runs() -> list[Seen]:
    return [ran(Program(seed)) for seed in range(PROGRAMS)]


def test_ranges_hold_all_that_is_stored():
    bounded = 0
    for seen in runs():
        found = contents(seen.kernel.function, lambda load: Range())
        for number, (_, target, _) in enumerate(seen.program.probes):
            limits = found.get((target.data, 0))
            if limits is None:
                continue
            rows = seen.result[number * THREADS * SLOTS : (number + 1) * THREADS * SLOTS]
            stored = rows[rows != MISSING]
            bounded += len(stored)
            if len(stored):
                assert limits.low is not None
                assert limits.high is not None
                assert limits.low <= int(stored.min()), (seen.program.seed, target.name)
                assert int(stored.max()) <= limits.high, (seen.program.seed, target.name)
    assert bounded > 1000


def compared(seen: Seen) -> int:
    """Return at how many points a variable's term is known, and is what the variable holds."""
    count, encoder, table = 0, Encoder(), seen.program.table
    sites = list(walk(seen.kernel.function, encoder, ()))
    for number, (probe, target, around) in enumerate(seen.program.probes):
        site = next(s for s in sites if s.node is probe)
        term = encoder.contents(target, site.scope)
        if not is_exact([term]):
            continue
        entries = [
            (encoder.term(build.load(table, i), site.scope), z3.IntVal(v)) for i, v in enumerate(TABLE)
        ]
        indices = [i for i in site.scope.indices if i.tag == "loop"]
        thread = next(i.const for i in site.scope.indices if i.tag == "threadIdx.x")
        assert len(indices) == len(around)
        for rounds in itertools.product(range(ROUNDS), repeat=len(around)):
            for lane in (0, 1, 3, 6, THREADS - 1):
                want = seen.at(number, lane, rounds)
                if want == MISSING:
                    continue
                known = [(i.const, z3.IntVal(v)) for i, v in zip(indices, rounds, strict=True)]
                placed = z3.simplify(z3.substitute(term, (thread, z3.IntVal(lane)), *known))
                got = as_int(z3.simplify(z3.substitute(placed, *entries)))
                if got is not None:  # else a variable that is known in other rounds alone
                    assert got == want, (seen.program.seed, target.name, lane, rounds)
                    count += 1
    return count


def test_terms_are_what_variables_hold():
    assert sum(compared(seen) for seen in runs()) > 1000
    assert {form for seen in runs() for form in seen.program.seen} == TERMS


def test_flips_are_counted():
    assert compared(ran(Flips(0))) > 60
