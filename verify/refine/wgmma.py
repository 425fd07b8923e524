"""gemm steps: which elements each wgmma instruction multiplies and where it adds the products.

Register and descriptor layouts are those of the PTX manual (wgmma.mma_async, "register fragments"
and "shared memory matrix layout"); nothing of the compiler's own layout code is used.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import z3

from verify import ir
from verify.encode import Hypothesis
from verify.ir import UnsupportedIR
from verify.layouts import swizzle_address, swizzle_period
from verify.refine.assign import Frame, SitePoints, expand_site, join
from verify.refine.compare import element_name, tile_key
from verify.refine.device import Site
from verify.refine.evaluate import Cond, Evaluator
from verify.refine.model import Model, Outcome, Storage
from verify.refine.sym import Sym, const
from verify.refine.tile import Gemm
from verify.solve import Obligation

WARPGROUP = 128  # threads that issue one wgmma together
_ROWS = 64  # rows of D and A of one instruction
_CORE_ROWS = 8  # rows of a core matrix
_CHUNK = 16  # bytes of a row of a core matrix
_REGISTER_BITS = 32
_SPAN_BYTES = {0: 0, 1: 128, 2: 64, 3: 32}  # descriptor layout type -> swizzle span
_TYPES = {
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "bf16": "bfloat16",
    "fp16": "float16",
    "tf32": "float32",
    "fp32": "float32",
    "int8": "int8",
    "uint8": "uint8",
    "int32": "int32",
}
_INSTRUCTIONS = ("ptx_wgmma_rs", "ptx_wgmma_ss")
_MAX_ENUMERATED = 64  # values of loop counters that are tried one by one


@dataclass(frozen=True)
class Matrix:
    """A descriptor: bytes from the start of shared memory, layout type, and strides in bytes."""

    storage: Storage
    start: Sym
    span: int
    leading: int
    stride: int


@dataclass(frozen=True)
class _Instruction:
    """One wgmma of one warpgroup: its arguments as constants or symbols."""

    site: Site
    group: int
    n: int
    k: int
    a: "Matrix | tuple[Storage, int]"  # a descriptor, or a fragment and the bit its registers start at
    b: Matrix
    trans_a: bool
    trans_b: bool
    c_bit: int
    keeps: ir.Expr
    where: dict[str, object]
    device: Evaluator


def check_gemm(model: Model, step: Gemm, sites: list[Site]) -> Outcome:
    """Compare a gemm step with its wgmma instructions.

    Raises:
        UnsupportedIR: something in the step or its sites is not understood.
    """
    assert step.a is not None and step.b is not None, "a gemm has operands"
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
    return outcome


class _GemmCheck:
    def __init__(self, model: Model, step: Gemm, sites: list[Site], fixed: dict[str, int]) -> None:
        assert step.a is not None and step.b is not None and step.c is not None, "a gemm has operands"
        self.model, self.step, self.sites, self.fixed = model, step, sites, fixed
        self.frame = Frame.of(model, step, frozenset())
        self.frame = replace(self.frame, symbols={**self.frame.symbols, **{n: const(v) for n, v in fixed.items()}})
        self.a, self.b, self.c = step.a, step.b, step.c
        env = {x.var: self.frame.symbols[x.var.name] for x in step.loops}
        self.tile = model.evaluator("tile", env)
        self.m, self.k = self._sizes(self.a, step.trans_a)
        self.n, depth = self._sizes(self.b, not step.trans_b)
        if depth != self.k:
            raise UnsupportedIR(f"{step.what} over {self.k} and {depth}")
        self.outcome = Outcome()
        self.done = np.zeros((self.m, self.n, self.k), dtype=np.int8)

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
        self._guards()
        for instruction in self._instructions():
            self._instruction(instruction)
        if self.outcome.obligations:  # products of a wrong instruction are not counted
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
        return self.outcome

    def _storage(self, data: ir.Var) -> Storage:
        storage = self.model.tile_storage.get(data)
        if storage is None:
            raise UnsupportedIR(f"{data.name} is no storage of the program")
        return storage

    def _guards(self) -> None:
        guards = Cond()
        for guard in self.step.guards:
            guards &= self.tile.cond(guard)
        self.guards = guards

    # ------------------------------------------------------------------ reading the device side
    def _instructions(self) -> list[_Instruction]:
        """Expand the sites into instructions, tracking descriptors in program order."""
        descriptors: dict[tuple[ir.Expr, int], Matrix] = {}
        found: list[_Instruction] = []
        for site in self.sites:
            call = site.stmt.value if isinstance(site.stmt, ir.Eval) else None
            if not isinstance(call, ir.Call):
                raise UnsupportedIR(f"{self.step.what} became element-wise stores")
            expanded = expand_site(self.model, self.frame, site, {})
            if call.op not in _INSTRUCTIONS and len(expanded.points.values) > 1:
                raise UnsupportedIR("descriptor set up in a loop")
            if expanded.guard.key != self.guards.key:
                raise UnsupportedIR(f"{self.step.what} under another condition")
            for rows in _warpgroups(expanded):
                device = self.model.evaluator("device", expanded.take(self.model, rows).env)
                group = int(expanded.points.values["threadIdx.x"][rows[0]]) // WARPGROUP
                if call.op == "initialize_wgmma_descriptor":
                    descriptors[_descriptor_name(call), group] = self._initialize(call, device)
                elif call.op == "increase_descriptor_offset":
                    name = _descriptor_name(call)
                    matrix = self._known(descriptors, name, group)
                    added = _uniform(device.int(call.args[1]))
                    descriptors[name, group] = replace(matrix, start=matrix.start + added)
                else:
                    where = {n: int(v[rows[0]]) for n, v in expanded.points.values.items()}
                    lookup = partial(self._known, descriptors, group=group)
                    found.append(self._read(site, call, device, group, where, lookup))
        return found

    def _known(self, descriptors: dict, name: ir.Expr, group: int) -> Matrix:
        if (name, group) not in descriptors:
            raise UnsupportedIR("wgmma with a descriptor that is not initialised here")
        return descriptors[name, group]

    def _initialize(self, call: ir.Call, device: Evaluator) -> Matrix:
        _, pointer, kind, leading, stride = call.args
        extra = const(0)
        while isinstance(pointer, ir.Call) and pointer.op == "handle_add_byte_offset":
            extra = extra + _uniform(device.int(pointer.args[1]))
            pointer = pointer.args[0]
        if not isinstance(pointer, ir.AccessPtr):
            raise UnsupportedIR("descriptor of a computed pointer")
        storage = self.model.device_storage.get(pointer.data)
        if storage is None or storage.shared is None:
            raise UnsupportedIR("descriptor of something that is not a shared buffer")
        bits = _uniform(device.int(pointer.offset)).scaled(pointer.element.bits)
        if not bits.divisible_by(8):
            raise UnsupportedIR("descriptor that starts inside a byte")
        start = bits.divided(8) + extra + const(self.model.device.arena_start[pointer.data])
        layout, lead, step = (_value(_uniform(device.int(x))) for x in (kind, leading, stride))
        if layout not in _SPAN_BYTES:
            raise UnsupportedIR(f"descriptor of layout type {layout}")
        return Matrix(storage, start, _SPAN_BYTES[layout], lead * _CHUNK, step * _CHUNK)

    def _read(
        self, site: Site, call: ir.Call, device: Evaluator, group: int, where: dict, lookup: Callable[[ir.Expr], Matrix]
    ) -> _Instruction:
        from_registers = call.op == "ptx_wgmma_rs"
        shape = re.fullmatch(r"m64n(\d+)k(\d+)", _text(call.args[0]))
        if shape is None:
            raise UnsupportedIR(f"wgmma shape {_text(call.args[0])}")
        flags, rest = (1, call.args[2:]) if from_registers else (2, call.args[3:])
        a_major = True if from_registers else _flag(call.args[1])
        b_major = _flag(call.args[flags])
        kinds = [_TYPES.get(_text(x)) for x in rest[:3]]
        wanted = [r.buffer.dtype.name for r in (self.a, self.b, self.c)]
        if kinds != wanted:
            raise UnsupportedIR(f"wgmma of {kinds} for operands of {wanted}")
        a_var, a_offset, b_var, b_offset, c_var, c_offset, keeps, sign_a, sign_b = rest[3:12]
        if any(not isinstance(s, ir.Const) or s.value != 1 for s in (sign_a, sign_b)):
            raise UnsupportedIR("wgmma that negates an operand")
        if from_registers:
            a: Matrix | tuple[Storage, int] = self._registers(a_var, a_offset, device)
        else:
            matrix = lookup(a_var)
            a = replace(matrix, start=matrix.start + _uniform(device.int(a_offset)).scaled(_CHUNK))
        b = lookup(b_var)
        b = replace(b, start=b.start + _uniform(device.int(b_offset)).scaled(_CHUNK))
        target, c_bit = self._registers(c_var, c_offset, device)
        if target is not self._storage(self.c.buffer.data):
            raise UnsupportedIR("wgmma accumulates into another buffer")
        n, k = int(shape[1]), int(shape[2])
        return _Instruction(site, group, n, k, a, b, not a_major, not b_major, c_bit, keeps, where, device)

    def _registers(self, var: ir.Expr, offset: ir.Expr, device: Evaluator) -> tuple[Storage, int]:
        """Return the fragment and bit where the operand starts: pointers count in the declared type."""
        storage = self.model.device_storage.get(var)  # type: ignore[call-overload]
        alloc = self.model.device.allocs.get(var)  # type: ignore[call-overload]
        if storage is None or storage.fragment is None or alloc is None:
            raise UnsupportedIR("wgmma on registers that are no fragment")
        return storage, _value(_uniform(device.int(offset))) * alloc.dtype.bits

    # ------------------------------------------------------------------ one instruction
    def _instruction(self, ins: _Instruction) -> None:
        bits = self.a.buffer.dtype.bits
        accumulator = self._accumulator(ins)
        if accumulator is None:
            return
        rows, columns = accumulator
        if isinstance(ins.a, Matrix):
            a_row, a_k = self._shared(ins, ins.a, self.a, self.step.trans_a, ins.trans_a, _ROWS)
        else:
            a_row, a_k = self._fragment(ins, ins.a, bits)
        b_col, b_k = self._shared(ins, ins.b, self.b, not self.step.trans_b, ins.trans_b, ins.n)
        # The k of an instruction is whatever element of A it reads first; all the rest must agree.
        k_of = a_k[0]
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

    def _clears(self, ins: _Instruction, rows: np.ndarray, columns: np.ndarray) -> None:
        """The first instruction on an accumulator clears it exactly where the step says so."""
        started = self.done[np.ix_(rows, columns)].any(axis=2)
        if started.any() and not started.all():
            raise UnsupportedIR("wgmma on accumulators of different progress")
        wanted = Cond(False) if started.any() else self.tile.cond(self.step.clear)
        got = _clearing(ins.device, ins.keeps)
        self.outcome.compared += 1
        if got.key == wanted.key:
            return
        show = {**ins.where, "expected": wanted.z3_at(0), "actual": got.z3_at(0)}
        self._claim("clearing of the accumulator", wanted.z3_at(0) == got.z3_at(0), show)

    def _accumulator(self, ins: _Instruction) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the row and column of the product that each row and column of D holds."""
        storage = self._storage(self.c.buffer.data)
        place = storage.fragment
        assert place is not None, "checked before"
        if place.bits != _REGISTER_BITS:
            raise UnsupportedIR("accumulator of other than 32 bits")
        thread, register = np.meshgrid(np.arange(WARPGROUP), np.arange(ins.n // 2), indexing="ij")
        lane = thread % 32
        row = thread // 32 * 16 + lane // 4 + register // 2 % 2 * 8
        column = register // 4 * 8 + lane % 4 * 2 + register % 2
        element = place.element_at(ins.group * WARPGROUP + thread, ins.c_bit // place.bits + register)
        i, j = np.full((_ROWS, ins.n), -1), np.full((_ROWS, ins.n), -1)
        i[row, column], j[row, column] = element // self.n, element % self.n
        bad = np.argwhere((i != i[:, :1]) | (j != j[:1, :]) | (i < 0))
        if len(bad):
            r, c = (int(x) for x in bad[0])
            where = {**ins.where, "instruction row": r, "instruction column": c}
            actual = element_name(storage, int(i[r, c] * self.n + j[r, c]) * place.bits if i[r, c] >= 0 else -1)
            expected = f"{storage.buffer.name}[{int(i[r, 0])}, {int(j[0, c])}]"
            self._refute("accumulator register", where, expected, actual)
            return None
        return i[:, 0], j[0]

    def _fragment(self, ins: _Instruction, operand: tuple[Storage, int], bits: int) -> tuple[np.ndarray, np.ndarray]:
        """Return row and k of the element of A in each register of an instruction that reads registers."""
        storage, first = operand
        if storage is not self._storage(self.a.buffer.data):
            raise UnsupportedIR("wgmma multiplies another fragment")
        place = storage.fragment
        assert place is not None, "checked before"
        per = _REGISTER_BITS // bits
        thread, e = np.meshgrid(np.arange(WARPGROUP), np.arange(_ROWS * ins.k // WARPGROUP), indexing="ij")
        register, lane = e // per, thread % 32
        row = thread // 32 * 16 + lane // 4 + register % 2 * 8
        k = lane % 4 * per + e % per + register // 2 * per * 4
        at = first + e * bits
        element = place.element_at(ins.group * WARPGROUP + thread, at // place.bits)
        if place.bits % bits:
            raise UnsupportedIR("fragment in smaller units than the operand")
        # Both views number bits in the order of the tile buffer, so a word's bytes follow its number.
        logical = np.where(element < 0, -1, (element * place.bits + at % place.bits) // bits)
        return self._matrix(row, k, logical, self.a, self.step.trans_a, (_ROWS, ins.k))

    def _matrix(
        self, row: np.ndarray, k: np.ndarray, logical: np.ndarray, region: ir.Region, transposed: bool, shape: tuple
    ) -> tuple[np.ndarray, np.ndarray]:
        columns = int(region.buffer.shape[-1].value)  # type: ignore[attr-defined]
        lows = [_value(self.tile.int(m)) for m in region.mins]
        if any(lows) or [e.value for e in region.extents] != [s.value for s in region.buffer.shape]:  # type: ignore[attr-defined]
            raise UnsupportedIR("part of a fragment as operand")
        first = np.where(logical < 0, -1, logical // columns)
        second = np.where(logical < 0, -1, logical % columns)
        out, out_k = np.full(shape, -1), np.full(shape, -1)
        out[row, k], out_k[row, k] = (second, first) if transposed else (first, second)
        return out, out_k

    def _shared(
        self, ins: _Instruction, matrix: Matrix, region: ir.Region, transposed: bool, mn_major: bool, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return row (or column) and k of the element that a descriptor addresses at each position."""
        if matrix.storage is not self._storage(region.buffer.data):
            raise UnsupportedIR(f"wgmma reads {matrix.storage.buffer.name} for {region.buffer.name}")
        bits = region.buffer.dtype.bits
        r, k = (x.ravel() for x in np.meshgrid(np.arange(size), np.arange(ins.k), indexing="ij"))
        offset = _mn_major(matrix, r, k, bits) if mn_major else _k_major(matrix, r, k, bits)
        period = swizzle_period(matrix.span)
        if not matrix.start.symbolic().divisible_by(period):
            raise UnsupportedIR("descriptor whose stage offset is no multiple of the swizzle period")
        address = swizzle_address(np.asarray(matrix.start.constant + offset), matrix.span)
        got = matrix.start.symbolic().scaled(8) + const(address * 8)
        extent = [int(e.value) for e in region.extents[-2:]]  # type: ignore[attr-defined]
        first, second = (x.ravel() for x in np.meshgrid(*(np.arange(e) for e in extent), indexing="ij"))
        lows = [self.tile.int(m) for m in region.mins]
        indices = (*lows[:-2], lows[-2] + const(first), lows[-1] + const(second))
        stage = lambda stages: self.frame.stage(stages, {})  # noqa: E731
        key = tile_key(self.model, matrix.storage, region.buffer, indices, stage)
        rows = join([key], [got], len(first), len(r))
        found_first = np.where(rows < 0, -1, first[rows]).reshape(size, ins.k)
        found_second = np.where(rows < 0, -1, second[rows]).reshape(size, ins.k)
        return (found_second, found_first) if transposed else (found_first, found_second)

    # ------------------------------------------------------------------ findings
    def _refute(self, what: str, where: dict, expected: object, actual: object) -> None:
        self._claim(what, z3.BoolVal(False), {**where, "expected": expected, "actual": actual})

    def _claim(self, what: str, goal: z3.BoolRef, show: dict) -> None:
        hypotheses = (*self.model.hypotheses, *self.frame.facts)
        for name, value in self.fixed.items():
            hypotheses += (Hypothesis(f"{name} == {value}", "loop", z3.Int(name) == value),)
        if self.guards.literals:
            hypotheses += (Hypothesis("guards of the step", "guard", self.guards.z3_at(0)),)
        text = f"{self.step.what}: {what}"
        self.outcome.obligations.append(Obligation(text, self.step.span, hypotheses, goal, {**show, **self.fixed}))


def _warpgroups(expanded: SitePoints) -> Iterator[np.ndarray]:
    """Yield the points of one warpgroup in one iteration of the local loops, in program order.

    Raises:
        UnsupportedIR: part of a warpgroup is active.
    """
    values = expanded.points.values
    groups = values["threadIdx.x"] // WARPGROUP
    loops = [v for name, v in values.items() if name != "threadIdx.x"]
    table = np.stack([*loops, groups], axis=1)
    kinds, inverse = np.unique(table, axis=0, return_inverse=True)
    for number in range(len(kinds)):
        rows = np.flatnonzero(inverse.reshape(-1) == number)
        if len(rows) != WARPGROUP:
            raise UnsupportedIR("wgmma by part of a warpgroup")
        yield rows


def _descriptor_name(call: ir.Call) -> ir.Var:
    target = call.args[0]
    if not isinstance(target, ir.Load) or [getattr(i, "value", None) for i in target.indices] != [0]:
        raise UnsupportedIR("descriptor that is no variable")
    return target.buffer.data


def _uniform(value: Sym) -> Sym:
    if any(isinstance(c, np.ndarray) for c in value.terms.values()):
        raise UnsupportedIR("wgmma argument that differs between threads of a warpgroup")
    return value


def _value(value: Sym) -> int:
    if not value.is_constant or isinstance(value.constant, np.ndarray):
        raise UnsupportedIR("wgmma argument that is not constant")
    return value.constant


def _text(expr: ir.Expr) -> str:
    if not isinstance(expr, ir.Str):
        raise UnsupportedIR("computed type of a wgmma")
    return expr.value


def _flag(expr: ir.Expr) -> bool:
    if not isinstance(expr, ir.Const):
        raise UnsupportedIR("computed flag of a wgmma")
    return bool(expr.value)


def _clearing(device: Evaluator, keeps: ir.Expr) -> Cond:
    """Return when the scale-d argument is zero, which drops the old value of D."""
    if isinstance(keeps, ir.Select):
        cond = device.cond(keeps.cond)
        if cond.is_true or (not cond.literals and not np.any(cond.mask)):
            return _clearing(device, keeps.a if cond.is_true else keeps.b)
        yes, no = _clearing(device, keeps.a), _clearing(device, keeps.b)
        if yes.is_true and no.key == Cond(False).key:
            return cond
        if no.is_true and yes.key == Cond(False).key:
            return device.cond(ir.Not(ir.BOOL, keeps.cond))
        raise UnsupportedIR("wgmma that clears on a condition that is not understood")
    if isinstance(keeps, ir.Cast) and keeps.a.dtype.name == "bool":
        return device.cond(ir.Not(ir.BOOL, keeps.a))
    return Cond(_value(_uniform(device.int(keeps))) == 0)


def _k_major(matrix: Matrix, row: np.ndarray, k: np.ndarray, bits: int) -> np.ndarray:
    """Byte offset of (row, k) where k is contiguous: core matrices of 8 rows by 16 bytes."""
    byte = k * bits // 8
    block = row // _CORE_ROWS * matrix.stride
    if matrix.span:
        return block + row % _CORE_ROWS * matrix.span + byte
    return block + byte // _CHUNK * matrix.leading + row % _CORE_ROWS * _CHUNK + byte % _CHUNK


def _mn_major(matrix: Matrix, row: np.ndarray, k: np.ndarray, bits: int) -> np.ndarray:
    """Byte offset of (row, k) where rows are contiguous: core matrices of 8 k by 16 bytes."""
    byte = row * bits // 8
    chunk, rest = byte // _CHUNK, byte % _CHUNK
    if not matrix.span:
        return chunk * matrix.stride + k % _CORE_ROWS * _CHUNK + k // _CORE_ROWS * matrix.leading + rest
    width = matrix.span // _CHUNK
    within = chunk % width * _CHUNK + k % _CORE_ROWS * matrix.span + rest
    return within + chunk // width * matrix.leading + k // _CORE_ROWS * matrix.stride
