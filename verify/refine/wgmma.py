"""gemm steps: which elements each wgmma instruction multiplies and where it adds the products."""

import itertools
from dataclasses import replace

import numpy as np
import z3

from verify import ir
from verify.encode import Hypothesis
from verify.ir import UnsupportedIR
from verify.layouts import swizzle_address, swizzle_period
from verify.refine.device import Site
from verify.refine.evaluate import Cond
from verify.refine.frame import Frame, Orders, join
from verify.refine.instructions import (
    REGISTER_BITS,
    ROWS,
    WARPGROUP,
    Instruction,
    InstructionReader,
    Matrix,
    clearing,
    constant,
    k_major,
    mn_major,
    uniform,
)
from verify.refine.keys import element_name, tile_key
from verify.refine.model import Model, Outcome, Storage, launched_threads
from verify.refine.sym import Sym, const, z3_term
from verify.refine.tile import Gemm, thread_of_starts
from verify.solve import Obligation

_MAX_ENUMERATED = 64  # values of loop counters that are tried one by one


def check_gemm(model: Model, step: Gemm, sites: list[Site]) -> Outcome:
    """Compare a gemm step with its wgmma instructions.

    Raises:
        UnsupportedIR: something in the step or its sites is not understood.
    """
    assert step.a is not None, "a gemm has operands"
    assert step.b is not None, "a gemm has operands"
    used = {v.name for r in (step.a, step.b) for m in r.mins for v in ir.walk(m) if isinstance(v, ir.Var)}
    loops = [x for x in step.loops if x.var.name in used and isinstance(x.start, ir.Const)]
    loops = [x for x in loops if isinstance(x.extent, ir.Const)]
    ranges = [range(int(x.start.value), int(x.start.value) + int(x.extent.value)) for x in loops]  # type: ignore[attr-defined]
    if np.prod([len(r) for r in ranges], dtype=np.int64) > _MAX_ENUMERATED:
        loops, ranges = [], []
    outcome = Outcome()
    for values in itertools.product(*ranges):
        fixed = {x.var.name: v for x, v in zip(loops, values, strict=True)}
        one = _GemmCheck(model, step, sites, fixed).run()
        outcome.compared += one.compared
        outcome.obligations += one.obligations
        outcome.orders |= one.orders
    return outcome


class _GemmCheck:
    def __init__(self, model: Model, step: Gemm, sites: list[Site], fixed: dict[str, int]) -> None:
        assert step.a is not None, "a gemm has operands"
        assert step.b is not None, "a gemm has operands"
        assert step.c is not None, "a gemm has a product"
        self.model, self.step, self.sites, self.fixed = model, step, sites, fixed
        self.frame = Frame.of(model, step, frozenset())
        self.pinned = [
            Hypothesis(f"{n} == {v}", "loop", z3_term(self.frame.symbols[n], 0) == v)
            for n, v in fixed.items()
        ]
        self.frame = replace(
            self.frame, symbols={**self.frame.symbols, **{n: const(v) for n, v in fixed.items()}}
        )
        self.a, self.b, self.c = step.a, step.b, step.c
        env = {x.var: self.frame.symbols[x.var.name] for x in step.loops}
        self.tile = model.evaluator("tile", env)
        self.m, self.k = self._sizes(self.a, step.trans_a)
        self.n, depth = self._sizes(self.b, not step.trans_b)
        if depth != self.k:
            raise UnsupportedIR(f"{step.what} over {self.k} and {depth}")
        self.outcome = Outcome()
        self.done = np.zeros((self.m, self.n, self.k), dtype=np.int8)
        self.chunks: dict[tuple[bytes, bytes], list[tuple[int, ...]]] = {}  # of K, by rows and columns
        self.elements: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, Sym]] = {}
        self.orders: Orders = {}
        self.is_wrong = False

    def _sizes(self, region: ir.Region, transposed: bool) -> tuple[int, int]:
        """Return (rows or columns of the product, k) of an operand."""
        wide = [int(e.value) for e in region.extents if isinstance(e, ir.Const)]
        if len(wide) != len(region.extents) or any(w != 1 for w in wide[:-2]):
            raise UnsupportedIR(f"operand {region.buffer.name} is no matrix")
        first, second = wide[-2:]
        return (second, first) if transposed else (first, second)

    def run(self) -> Outcome:
        place = self._storage(self.c.buffer.data).fragment
        if place is None or len(place.thread) != 1 or place.shape != (self.m, self.n):
            raise UnsupportedIR("accumulator that is no fragment, or a replicated one")
        self.guards = self.model.together(self.tile, self.step.guards)
        for instruction in InstructionReader(self.model, self.step, self.frame, self.guards).read(self.sites):
            self._instruction(instruction)
        if self.is_wrong:  # products of a wrong instruction are not counted
            return self.outcome
        missing = np.argwhere(self.done != 1)
        self.outcome.compared += self.done.size - len(missing)
        if len(missing):
            i, j, k = (int(x) for x in missing[0])
            self._refute(
                f"{len(missing)} products are not added once",
                {"tile i": i, "tile j": j, "tile k": k},
                "added once",
                f"added {int(self.done[i, j, k])} times",
            )
        self.outcome.orders |= {tuple(chunks) for chunks in self.chunks.values()}
        return self.outcome

    def _storage(self, data: ir.Var) -> Storage:
        storage = self.model.tile_storage.get(data)
        if storage is None:
            raise UnsupportedIR(f"{data.name} is no storage of the program")
        return storage

    # ------------------------------------------------------------------ one instruction
    def _instruction(self, ins: Instruction) -> None:
        bits = self.a.buffer.dtype.bits
        accumulator = self._accumulator(ins)
        if accumulator is None:
            return
        rows, columns = accumulator
        if thread_of_starts(self.b, self.model.tile.launch) is not None:
            # `signature` takes a row's operands to be those of the warpgroup with the row's number over 64.
            wanted = np.arange(ROWS) + ins.group * ROWS
            if not np.array_equal(np.sort(rows), wanted):
                raise UnsupportedIR("an operand by thread where a warpgroup has other rows")
        if isinstance(ins.a, Matrix):
            a_row, a_k = self._shared(ins, ins.a, self.a, self.step.trans_a, ins.trans_a, ROWS)
        else:
            found = self._fragment(ins, ins.a, bits)
            if found is None:
                return
            a_row, a_k = found
        b_col, b_k = self._shared(ins, ins.b, self.b, not self.step.trans_b, ins.trans_b, ins.n)
        # The k of an instruction is whatever element of A it reads first; all the rest must agree.
        k_of = a_k[0]
        if len(np.unique(k_of)) != len(k_of):
            self._refute("k of A", ins.where, f"{len(k_of)} of them", f"{len(np.unique(k_of))} of them")
            return
        checks = (
            ("row of A", a_row, rows[:, None]),
            ("column of B", b_col, columns[:, None]),
            ("k of A", a_k, k_of[None, :]),
            ("k of B against k of A", b_k, k_of[None, :]),
        )
        for what, got, wanted in checks:
            wrong = np.argwhere(got != np.broadcast_to(wanted, got.shape))
            self.outcome.compared += got.size - len(wrong)
            if len(wrong):
                r, k = (int(x) for x in wrong[0])
                where = {**ins.where, "instruction row or column": r, "instruction k": k}
                expected = int(np.broadcast_to(wanted, got.shape)[r, k])
                actual = int(got[r, k])
                self._refute(what, where, expected, actual if actual >= 0 else "no element of the operand")
                return
        self._clears(ins, rows, columns)
        box = np.ix_(rows, columns, k_of)
        self.done[box] += 1
        chunks = self.chunks.setdefault((rows.tobytes(), columns.tobytes()), [])
        chunks.append(tuple(k_of.tolist()))

    def _clears(self, ins: Instruction, rows: np.ndarray, columns: np.ndarray) -> None:
        """The first instruction on an accumulator clears it exactly where the step says so."""
        started = self.done[np.ix_(rows, columns)].any(axis=2)
        if started.any() and not started.all():
            raise UnsupportedIR("wgmma on accumulators of different progress")
        wanted = Cond(False) if started.any() else self.tile.cond(self.step.clear)
        got = clearing(ins.device, ins.keeps)
        if got.varies:
            raise UnsupportedIR("wgmma that clears for some threads of a warpgroup")
        self.outcome.compared += 1
        if got.key == wanted.key:
            return
        show = {**ins.where, "expected": wanted.z3_at(0), "actual": got.z3_at(0)}
        self._claim("clearing of the accumulator", wanted.z3_at(0) == got.z3_at(0), show)

    def _accumulator(self, ins: Instruction) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the row and column of the product that each row and column of D holds."""
        storage = self._storage(self.c.buffer.data)
        place = storage.fragment
        assert place is not None, "checked before"
        if place.bits != REGISTER_BITS:
            raise UnsupportedIR("accumulator of other than 32 bits")
        thread, register = np.meshgrid(np.arange(WARPGROUP), np.arange(ins.n // 2), indexing="ij")
        lane = thread % 32
        row = thread // 32 * 16 + lane // 4 + register // 2 % 2 * 8
        column = register // 4 * 8 + lane % 4 * 2 + register % 2
        element = place.element_at(ins.group * WARPGROUP + thread, ins.c_bit // place.bits + register)
        i, j = np.full((ROWS, ins.n), -1), np.full((ROWS, ins.n), -1)
        i[row, column], j[row, column] = element // self.n, element % self.n
        bad = np.argwhere((i != i[:, :1]) | (j != j[:1, :]) | (i < 0))
        if len(bad):
            r, c = (int(x) for x in bad[0])
            where = {**ins.where, "instruction row": r, "instruction column": c}
            actual = element_name(
                storage, int(i[r, c] * self.n + j[r, c]) * place.bits if i[r, c] >= 0 else -1
            )
            expected = f"{storage.buffer.name}[{int(i[r, 0])}, {int(j[0, c])}]"
            self._refute("accumulator register", where, expected, actual)
            return None
        return i[:, 0], j[0]

    def _fragment(
        self, ins: Instruction, operand: tuple[Storage, int], bits: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Return row and k of the element of A in each register of an instruction that reads registers."""
        storage, first = operand
        if storage is not self._storage(self.a.buffer.data):
            raise UnsupportedIR("wgmma multiplies another fragment")
        place = storage.fragment
        assert place is not None, "checked before"
        per = REGISTER_BITS // bits
        thread, e = np.meshgrid(np.arange(WARPGROUP), np.arange(ROWS * ins.k // WARPGROUP), indexing="ij")
        register, lane = e // per, thread % 32
        row = thread // 32 * 16 + lane // 4 + register % 2 * 8
        k = lane % 4 * per + e % per + register // 2 * per * 4
        at = first + e * bits
        element = place.element_at(ins.group * WARPGROUP + thread, at // place.bits)
        if place.bits % bits:
            raise UnsupportedIR("fragment in smaller units than the operand")
        # Both views number bits in the order of the tile buffer, so a word's bytes follow its number.
        outside = np.argwhere(element < 0)
        if len(outside):
            t, x = (int(v) for v in outside[0])
            size = place.holder.shape[1] * place.bits // bits
            where = {**ins.where, "threadIdx.x": ins.group * WARPGROUP + t}
            expected = f"one of {size} elements of the thread's {storage.buffer.name}"
            self._refute("A register", where, expected, f"element {int(at[t, x]) // bits}")
            return None
        logical = (element * place.bits + at % place.bits) // bits
        return self._matrix(row, k, logical, self.a, self.step.trans_a, (ROWS, ins.k))

    def _matrix(
        self,
        row: np.ndarray,
        k: np.ndarray,
        logical: np.ndarray,
        region: ir.Region,
        transposed: bool,
        shape: tuple,
    ) -> tuple[np.ndarray, np.ndarray]:
        columns = int(region.buffer.shape[-1].value)  # type: ignore[attr-defined]
        lows = [constant(self.tile.int(m)) for m in region.mins]
        if any(lows) or [e.value for e in region.extents] != [s.value for s in region.buffer.shape]:  # type: ignore[attr-defined]
            raise UnsupportedIR("part of a fragment as operand")
        first, second = logical // columns, logical % columns
        out, out_k = np.full(shape, -1), np.full(shape, -1)
        out[row, k], out_k[row, k] = (second, first) if transposed else (first, second)
        return out, out_k

    def _shared(
        self,
        ins: Instruction,
        matrix: Matrix,
        region: ir.Region,
        transposed: bool,
        along_rows: bool,
        size: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return row (or column) and k of the element that a descriptor addresses at each position."""
        if matrix.storage is not self._storage(region.buffer.data):
            raise UnsupportedIR(f"wgmma reads {matrix.storage.buffer.name} for {region.buffer.name}")
        bits = region.buffer.dtype.bits
        r, k = (x.ravel() for x in np.meshgrid(np.arange(size), np.arange(ins.k), indexing="ij"))
        offset = mn_major(matrix, r, k, bits) if along_rows else k_major(matrix, r, k, bits)
        period = swizzle_period(matrix.span)
        if not matrix.start.symbolic().divisible_by(period):
            raise UnsupportedIR("descriptor whose stage offset is no multiple of the swizzle period")
        address = swizzle_address(np.asarray(matrix.start.constant + offset), matrix.span)
        got = matrix.start.symbolic().scaled(8) + const(address * 8)
        first, second, key = self._operand(matrix.storage, region, ins.group)
        rows = join([key], [got], len(first), len(r), self.orders)
        found_first = np.where(rows < 0, -1, first[rows]).reshape(size, ins.k)
        found_second = np.where(rows < 0, -1, second[rows]).reshape(size, ins.k)
        return (found_second, found_first) if transposed else (found_first, found_second)

    def _operand(self, storage: Storage, region: ir.Region, group: int) -> tuple[np.ndarray, np.ndarray, Sym]:
        """Return both coordinates of each element of an operand in shared memory, and where it lies.

        Instructions of one warpgroup take parts of one operand: that is worked out once for all of them.
        """
        place = (id(region), group)
        if place not in self.elements:
            extent = [int(e.value) for e in region.extents[-2:]]  # type: ignore[attr-defined]
            first, second = (x.ravel() for x in np.meshgrid(*(np.arange(e) for e in extent), indexing="ij"))
            lows = self._starts(region, group)
            indices = (*lows[:-2], lows[-2] + const(first), lows[-1] + const(second))
            stage = lambda stages: self.frame.stage(stages, {})  # noqa: E731
            key = tile_key(self.model, storage, region.buffer, indices, stage)
            self.elements[place] = (first, second, key)
        return self.elements[place]

    def _starts(self, region: ir.Region, group: int) -> list[Sym]:
        """Return where an operand starts for a warpgroup: a start may name the thread.

        Raises:
            UnsupportedIR: a start that differs between a warpgroup's threads.
        """
        thread = thread_of_starts(region, self.model.tile.launch)
        if thread is None:
            return [self.tile.int(m) for m in region.mins]
        if launched_threads(self.model.tile) != launched_threads(self.model.device):
            raise UnsupportedIR("an operand by thread where the device adds threads")
        own = const(np.arange(group * WARPGROUP, group * WARPGROUP + WARPGROUP))
        tile = replace(self.tile, env={**self.tile.env, thread: own})
        return [uniform(tile.int(m)) for m in region.mins]

    # ------------------------------------------------------------------ findings
    def _refute(self, what: str, where: dict, expected: object, actual: object) -> None:
        self.is_wrong = True
        self._claim(what, z3.BoolVal(False), {**where, "expected": expected, "actual": actual})

    def _claim(self, what: str, goal: z3.BoolRef, show: dict) -> None:
        hypotheses = (*self.model.hypotheses, *self.frame.facts, *self.pinned)
        if self.guards.literals:
            hypotheses += (Hypothesis("guards of the step", "guard", self.guards.z3_at(0)),)
        text = f"{self.step.what}: {what}"
        self.outcome.obligations.append(
            Obligation(text, self.step.span, hypotheses, goal, {**show, **self.fixed})
        )
