"""wgmma instructions as the device IR issues them: operands, descriptors, warpgroups.

Register and descriptor layouts are those of the PTX manual (wgmma.mma_async, "register fragments"
and "shared memory matrix layout"); nothing of the compiler's own layout code is used.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

import numpy as np

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.device import Site
from verify.refine.evaluate import Cond, Evaluator
from verify.refine.frame import Frame, SitePoints, expand_site
from verify.refine.model import Model, Storage
from verify.refine.order import shared_loops
from verify.refine.sym import Sym, const
from verify.refine.tile import Gemm

WARPGROUP = 128  # threads that issue one wgmma together
ROWS = 64  # rows of D and A of one instruction
_CORE_ROWS = 8  # rows of a core matrix
_CHUNK = 16  # bytes of a row of a core matrix
REGISTER_BITS = 32
_SPAN_BYTES = {0: 0, 1: 128, 2: 64, 3: 32}  # descriptor layout type -> swizzle span
_INSTRUCTIONS = ("ptx_wgmma_rs", "ptx_wgmma_ss")


@dataclass(frozen=True)
class Matrix:
    """A descriptor: bytes from the start of shared memory, layout type, and strides in bytes."""

    storage: Storage
    start: Sym
    span: int
    leading: int
    stride: int


@dataclass(frozen=True)
class Instruction:
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


class InstructionReader:
    """Expands the sites of one gemm step, tracking descriptors in program order."""

    def __init__(self, model: Model, step: Gemm, frame: Frame, guards: Cond) -> None:
        """Set up for one step; `guards` is when the tile program executes it."""
        assert step.a is not None, "a gemm has operands"
        assert step.b is not None, "a gemm has operands"
        assert step.c is not None, "a gemm has a product"
        self.model, self.step, self.frame, self.guards = model, step, frame, guards
        self.a, self.b, self.c = step.a, step.b, step.c

    def read(self, sites: list[Site]) -> list[Instruction]:
        """Return the instructions of all warpgroups.

        Raises:
            UnsupportedIR: an argument or operand is not understood.
        """
        products = [s for s in sites if isinstance(s.stmt, ir.Eval) and s.stmt.value.op in _INSTRUCTIONS]  # type: ignore[attr-defined]
        if any(shared_loops(self.step, a, b) for a, b in combinations(products, 2)):
            raise UnsupportedIR(f"{self.step.what}: several instructions in one device loop")
        descriptors: dict[tuple[ir.Expr, int], Matrix] = {}
        found: list[Instruction] = []
        for site in sites:
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
                    added = uniform(device.int(call.args[1]))
                    if not added.divisible_by(_CHUNK):
                        raise UnsupportedIR("descriptor moved by no multiple of 16 bytes")
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
            extra = extra + uniform(device.int(pointer.args[1]))
            pointer = pointer.args[0]
        if not isinstance(pointer, ir.AccessPtr):
            raise UnsupportedIR("descriptor of a computed pointer")
        storage = self.model.device_storage.get(pointer.data)
        if storage is None or storage.shared is None:
            raise UnsupportedIR("descriptor of something that is not a shared buffer")
        bits = uniform(device.int(pointer.offset)).scaled(pointer.element.bits)
        if not bits.divisible_by(8):
            raise UnsupportedIR("descriptor that starts inside a byte")
        start = bits.divided(8) + extra + const(self.model.device.arena_start[pointer.data])
        if not start.divisible_by(_CHUNK):
            raise UnsupportedIR("descriptor of an address that is no multiple of 16 bytes")
        layout, lead, step = (constant(uniform(device.int(x))) for x in (kind, leading, stride))
        if layout not in _SPAN_BYTES:
            raise UnsupportedIR(f"descriptor of layout type {layout}")
        return Matrix(storage, start, _SPAN_BYTES[layout], lead * _CHUNK, step * _CHUNK)

    def _read(
        self,
        site: Site,
        call: ir.Call,
        device: Evaluator,
        group: int,
        where: dict,
        lookup: Callable[[ir.Expr], Matrix],
    ) -> Instruction:
        from_registers = call.op == "ptx_wgmma_rs"
        shape = re.fullmatch(r"m64n(\d+)k(\d+)", _text(call.args[0]))
        if shape is None:
            raise UnsupportedIR(f"wgmma shape {_text(call.args[0])}")
        flags, rest = (1, call.args[2:]) if from_registers else (2, call.args[3:])
        a_major = True if from_registers else _flag(call.args[1])
        b_major = _flag(call.args[flags])
        kinds = [ir.MATRIX_TYPES.get(_text(x)) for x in rest[:3]]
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
            a = replace(matrix, start=matrix.start + uniform(device.int(a_offset)).scaled(_CHUNK))
        b = lookup(b_var)
        b = replace(b, start=b.start + uniform(device.int(b_offset)).scaled(_CHUNK))
        target, c_bit = self._registers(c_var, c_offset, device)
        if target is not self.model.tile_storage.get(self.c.buffer.data):
            raise UnsupportedIR("wgmma accumulates into another buffer")
        n, k = int(shape[1]), int(shape[2])
        return Instruction(site, group, n, k, a, b, not a_major, not b_major, c_bit, keeps, where, device)

    def _registers(self, var: ir.Expr, offset: ir.Expr, device: Evaluator) -> tuple[Storage, int]:
        """Return the fragment and bit where the operand starts: pointers count in the declared type."""
        storage = self.model.device_storage.get(var)  # type: ignore[call-overload]
        alloc = self.model.device.allocs.get(var)  # type: ignore[call-overload]
        if storage is None or storage.fragment is None or alloc is None:
            raise UnsupportedIR("wgmma on registers that are no fragment")
        return storage, constant(uniform(device.int(offset))) * alloc.dtype.bits


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


def uniform(value: Sym) -> Sym:
    """Return an argument that all threads of a warpgroup agree on.

    Raises:
        UnsupportedIR: they may not.
    """
    if any(isinstance(c, np.ndarray) for c in value.terms.values()):
        raise UnsupportedIR("wgmma argument that differs between threads of a warpgroup")
    return value


def constant(value: Sym) -> int:
    """Return a constant argument.

    Raises:
        UnsupportedIR: it depends on a symbol.
    """
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


def clearing(device: Evaluator, keeps: ir.Expr) -> Cond:
    """Return when the scale-d argument is zero, which drops the old value of D.

    Raises:
        UnsupportedIR: the argument is not understood.
    """
    if isinstance(keeps, ir.Select):
        cond = device.cond(keeps.cond)
        if cond.is_true or (not cond.literals and not np.any(cond.mask)):
            return clearing(device, keeps.a if cond.is_true else keeps.b)
        yes, no = clearing(device, keeps.a), clearing(device, keeps.b)
        if yes.is_true and no.key == Cond(False).key:
            return cond
        if no.is_true and yes.key == Cond(False).key:
            return device.cond(ir.Not(ir.BOOL, keeps.cond))
        raise UnsupportedIR("wgmma that clears on a condition that is not understood")
    if isinstance(keeps, ir.Cast) and keeps.a.dtype.name == "bool":
        return device.cond(ir.Not(ir.BOOL, keeps.a))
    return Cond(constant(uniform(device.int(keeps))) == 0)


def k_major(matrix: Matrix, row: np.ndarray, k: np.ndarray, bits: int) -> np.ndarray:
    """Byte offset of (row, k) where k is contiguous: core matrices of 8 rows by 16 bytes."""
    byte = k * bits // 8
    block = row // _CORE_ROWS * matrix.stride
    if matrix.span:
        return block + row % _CORE_ROWS * matrix.span + byte
    return block + byte // _CHUNK * matrix.leading + row % _CORE_ROWS * _CHUNK + byte % _CHUNK


def mn_major(matrix: Matrix, row: np.ndarray, k: np.ndarray, bits: int) -> np.ndarray:
    """Byte offset of (row, k) where rows are contiguous: core matrices of 8 k by 16 bytes."""
    byte = row * bits // 8
    chunk, rest = byte // _CHUNK, byte % _CHUNK
    if not matrix.span:
        return chunk * matrix.stride + k % _CORE_ROWS * _CHUNK + k // _CORE_ROWS * matrix.leading + rest
    width = matrix.span // _CHUNK
    within = chunk % width * _CHUNK + k % _CORE_ROWS * matrix.span + rest
    return within + chunk // width * matrix.leading + k // _CORE_ROWS * matrix.stride
