"""wgmma: products of a warpgroup, one operation for each of its four warps.

A warp owns 16 of the 64 rows. The operation reads B (and A, unless it is in registers) from shared
memory through descriptors, and its accumulators are in flight until the warp has waited. Layouts of
registers and descriptors are those of the PTX manual ("Asynchronous warpgroup level matrix
instructions"). Products are summed exactly (float64) and rounded once to the accumulator's type.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from verify import ir
from verify.descriptors import mma_shape
from verify.interp import dtypes
from verify.interp.device import access, errors
from verify.interp.device.async_copy import pointer
from verify.interp.device.block import Group, Wait
from verify.interp.device.flight import Entry, Operation
from verify.interp.device.memory import Registers, Space, Storage
from verify.interp.device.operands import numbers, register_operand
from verify.interp.device.shadow import Actor
from verify.layouts import swizzle_address

if TYPE_CHECKING:
    from verify.interp.device.block import Block
    from verify.interp.device.values import Values

WARP, WARPGROUP = 32, 128
WARP_ROWS = 16
ATOM_ROWS = 8  # rows of a core matrix, and of a swizzle atom
UNIT_BYTES = 16  # of addresses and strides in a descriptor
FIELD = (1 << 14) - 1
_LEADING_BIT, _STRIDE_BIT, _TYPE_BIT = 16, 32, 62
_SPAN_BYTES = {0: 0, 1: 128, 2: 64, 3: 32}  # layout type -> span of the swizzle
K_BYTES = 32  # of K in one instruction
_MOST_OPERANDS = 256  # whose places are kept: a ring has as many as its stages have instructions


@dataclass(frozen=True)
class Matrix:
    """A decoded descriptor; byte addresses of shared memory."""

    start: int
    leading: int
    stride: int
    span: int

    def addresses(self, rows: int, k: int, size: int, is_k_major: bool) -> np.ndarray:
        """Return (rows, k) addresses of the elements, of `size` bytes each."""
        return swizzle_address(self.start + _offsets(self, rows, k, size, is_k_major), self.span)


@cache
def _offsets(matrix: Matrix, rows: int, k: int, size: int, is_k_major: bool) -> np.ndarray:
    r, c = np.meshgrid(np.arange(rows), np.arange(k), indexing="ij")
    if is_k_major:
        at = c * size
        if matrix.span:
            return r // ATOM_ROWS * matrix.stride + r % ATOM_ROWS * matrix.span + at
        return (
            r // ATOM_ROWS * matrix.stride
            + r % ATOM_ROWS * UNIT_BYTES
            + at // UNIT_BYTES * matrix.leading
            + at % UNIT_BYTES
        )
    row_bytes = matrix.span or UNIT_BYTES
    per = row_bytes // size  # elements along the contiguous direction in an atom
    across, deep = r // per, c // ATOM_ROWS
    inner = c % ATOM_ROWS * row_bytes + r % per * size
    if matrix.span:
        return across * matrix.leading + deep * matrix.stride + inner
    return across * matrix.stride + deep * matrix.leading + inner


def decode(word: int) -> Matrix:
    """Return the fields of a 64-bit descriptor."""
    unit = UNIT_BYTES
    start, leading, stride = ((word >> bit & FIELD) * unit for bit in (0, _LEADING_BIT, _STRIDE_BIT))
    return Matrix(start, leading, stride, _SPAN_BYTES[word >> _TYPE_BIT & 3])


# --------------------------------------------------------------------------- descriptors
def _initialize(m: "Values", group: Group, call: ir.Call) -> None:
    target, base, kind, leading, stride = call.args
    storage, first, threads = pointer(m, base, None)
    if storage.kind != "shared":
        raise ir.UnsupportedIR(f"wgmma descriptor of {storage.kind} memory")
    fields = [m.uniform(f, "descriptor field") for f in (kind, leading, stride)]
    high = (fields[0] & 3) << _TYPE_BIT | (fields[2] & FIELD) << _STRIDE_BIT
    address = storage.base + first
    low = (address >> 4) & FIELD | (fields[1] & FIELD) << _LEADING_BIT
    _write_words(m, target, low.astype(np.uint64) | np.uint64(high), threads)


def _increase(m: "Values", group: Group, call: ir.Call) -> None:
    target, offset = call.args
    moved = m.lanes_of(m.address(offset))
    _, threads = m.active
    bad = moved % UNIT_BYTES != 0
    if bad.any() and m.block.run.checks.alignment:
        text = f"wgmma descriptor moved by {int(moved[bad][0])} bytes, no multiple of {UNIT_BYTES}"
        raise m.block.fault(errors.MisalignedError, text, threads[bad])
    words = _words(m, target)
    low = (words & np.uint64(0xFFFFFFFF)) + (moved >> 4).astype(np.uint64)
    _write_words(m, target, words & np.uint64(0xFFFFFFFF00000000) | low & np.uint64(0xFFFFFFFF), threads)


def _words(m: "Values", node: ir.Expr) -> np.ndarray:
    """Return the descriptor of each active lane."""
    data = node.buffer.data if isinstance(node, ir.Load) else node
    if not isinstance(data, ir.Var):
        raise ir.UnsupportedIR("wgmma descriptor that is no variable")
    octets = access.read_bytes(m, m.block.storage(data), 0, 8, m.active[1])
    return octets.view(np.uint64)[:, 0]


def _write_words(m: "Values", node: ir.Expr, words: np.ndarray, threads: np.ndarray) -> None:
    if not isinstance(node, ir.Load):
        raise ir.UnsupportedIR("wgmma descriptor that is no variable")
    octets = np.ascontiguousarray(words[:, None]).view(np.uint8)
    access.write_bytes(m, m.block.storage(node.buffer.data), 0, octets, threads)


# --------------------------------------------------------------------------- instructions
@dataclass
class _Warp:
    """One warp's part of an instruction."""

    block: "Block"
    threads: np.ndarray
    n: int
    k: int
    a_type: str
    b_type: str
    c_type: str
    c: Registers
    c_first: int
    scale_out: bool
    signs: tuple[int, int]
    b_at: np.ndarray
    a_at: np.ndarray | None
    a: Registers | None
    a_first: int
    space: Space

    @property
    def c_bytes(self) -> int:
        return self.n // 2 * dtypes.stored_dtype(self.c_type).itemsize

    def run(self) -> None:
        """Multiply and put the result into the accumulators."""
        columns = slice(self.c_first, self.c_first + self.c_bytes)
        if not self.block.run.checks.products:
            self.c.data[self.threads, columns] = 0
            self.c.written[self.threads, columns] = True
            return
        a = numbers(self._a_bytes(), self.a_type) * self.signs[0]
        b = numbers(self.space.data[self.b_at], self.b_type) * self.signs[1]
        total = a @ b.t()
        lane = np.arange(WARP)[:, None]
        register = np.arange(self.n // 2)
        row = lane // 4 + register // 2 % 2 * 8
        column = register // 4 * 8 + lane % 4 * 2 + register % 2
        new = total[torch.from_numpy(row), torch.from_numpy(column)]
        if self.scale_out:
            octets = torch.from_numpy(np.ascontiguousarray(self.c.data[self.threads, columns]))
            old = dtypes.to_carrier(dtypes.retype(octets, "uint8", self.c_type), self.c_type)
            new = new + old.to(new.dtype)
        value = (
            dtypes.wrap(new, "int32")
            if self.c_type == "int32"
            else dtypes.narrow(new, dtypes.stored_dtype(self.c_type))
        )
        stored = dtypes.to_stored(value, self.c_type).clone(memory_format=torch.contiguous_format)
        self.c.data[self.threads, columns] = stored.view(torch.uint8).numpy()
        self.c.written[self.threads, columns] = True

    def _a_bytes(self) -> np.ndarray:
        """Return (16, k, bytes) of this warp's rows of A."""
        if self.a_at is not None:
            return self.space.data[self.a_at]
        assert self.a is not None, "A is in shared memory or in registers"
        octets = self.a.data[self.threads, self.a_first : self.a_first + WARP_ROWS]
        lane, byte = np.arange(WARP)[:, None], np.arange(WARP_ROWS)
        register = byte // 4
        rows = lane // 4 + register % 2 * 8
        columns = lane % 4 * 4 + register // 2 * WARP_ROWS + byte % 4
        matrix = np.zeros((WARP_ROWS, K_BYTES), np.uint8)
        matrix[rows, columns] = octets
        return matrix.reshape(WARP_ROWS, self.k, -1)


def _wgmma_rs(m: "Values", group: Group, call: ir.Call) -> None:
    shape, b_major, a_t, b_t, c_t, a, a_off, b, b_off, c, c_off, scale, *signs = call.args
    _issue(m, shape, (a_t, b_t, c_t), None, (a, a_off), (b, b_off, b_major), (c, c_off), scale, signs)


def _wgmma_ss(m: "Values", group: Group, call: ir.Call) -> None:
    shape, a_major, b_major, a_t, b_t, c_t, a, a_off, b, b_off, c, c_off, scale, *signs = call.args
    _issue(m, shape, (a_t, b_t, c_t), a_major, (a, a_off), (b, b_off, b_major), (c, c_off), scale, signs)


def _issue(
    m: "Values", shape: Any, types: Any, a_major: Any, a: Any, b: Any, c: Any, scale: Any, signs: Any
) -> None:
    rows, n, k = mma_shape(shape)
    names = [ir.MATRIX_TYPES.get(t.value, "") if isinstance(t, ir.Str) else "" for t in types]
    if rows != 4 * WARP_ROWS or "" in names:
        raise ir.UnsupportedIR("wgmma of this shape or these types")
    a_type, b_type, c_type = names
    scale_out = m.lanes_of(m.evaluate(scale)) != 0
    factors = tuple(-1 if m.uniform(s, "sign of an operand") in (-1, 0) else 1 for s in signs)
    b_words = _words(m, b[0]) + m.lanes_of(m.address(b[1])).astype(np.uint64)
    a_words = None if a_major is None else _words(m, a[0]) + m.lanes_of(m.address(a[1])).astype(np.uint64)
    c_storage, c_first = register_operand(m, c, n // 2 * dtypes.stored_dtype(c_type).itemsize)
    a_storage, a_first = (None, 0) if a_words is not None else register_operand(m, a, WARP_ROWS)
    _, threads = m.active
    for warp in np.unique(threads // WARP).tolist():
        lanes = threads // WARP == warp
        who = threads[lanes]
        if len(who) != WARP:
            raise m.block.fault(errors.BarrierDivergenceError, "wgmma by part of a warp", who)
        b_word = _one(m, b_words[lanes], "wgmma descriptor", who)
        keep = bool(_one(m, scale_out[lanes], "scale of the accumulator", who))
        log_warp(m, warp, ("wgmma", m.block.statement, b_word, keep), who)
        shared = [_operand(b_word, n, k, bool(b[2].value))]
        a_at = None
        if a_words is not None:
            assert a_major is not None, "A in shared memory has a major direction"
            word = _one(m, a_words[lanes], "wgmma descriptor", who)
            shared.insert(0, _operand(word, rows, k, bool(a_major.value)))
            a_at = shared[0].at
        first = warp % 4 * WARP_ROWS
        part = _Warp(
            m.block, who, n, k, a_type, b_type, c_type, _of(c_storage), c_first, keep, factors,  # type: ignore[arg-type]
            shared[-1].at, None if a_at is None else a_at[first : first + WARP_ROWS],
            None if a_storage is None else a_storage.registers, a_first, _shared(m.block),
        )  # fmt: skip
        _launch(m, warp, part, c_storage, a_storage, shared)


def _of(storage: Storage) -> Registers:
    assert storage.registers is not None, "checked on the way"
    return storage.registers


def _one(m: "Values", values: np.ndarray, what: str, threads: np.ndarray) -> int:
    if len(np.unique(values)) != 1:
        raise m.block.fault(
            errors.BarrierDivergenceError, f"{what} differs between the lanes of a warp", threads
        )
    return int(values[0])


@dataclass(frozen=True)
class _Operand:
    """Where an operand in shared memory lies: bytes of each element, and all of them in order."""

    at: np.ndarray
    touched: np.ndarray


@lru_cache(maxsize=_MOST_OPERANDS)
def _operand(word: int, rows: int, k: int, is_k_major: bool) -> _Operand:
    size = K_BYTES // k
    at = decode(word).addresses(rows, k, size, is_k_major)[..., None] + np.arange(size)
    touched = np.unique(at)
    for array in (at, touched):  # shared by all who ask for the same
        array.flags.writeable = False
    return _Operand(at, touched)


def _shared(block: "Block") -> Space:
    space = block.shared
    if space is None:
        raise ir.UnsupportedIR("wgmma in a block without shared memory")
    return space


def _launch(
    m: "Values", warp: int, part: _Warp, c: Storage, a: Storage | None, shared: list[_Operand]
) -> None:
    block, who = m.block, part.threads
    component, tick = block.clocks.agent(("wgmma", warp))
    known = block.clocks.known[who].max(axis=0)[None, :]
    fenced = block.clocks.fenced[who].max(axis=0)[None, :]
    actor = block.actor(np.array([component]), np.array([tick], np.int32), known, fenced)
    for operand in shared:
        _check_shared(block, operand.touched, actor, who)
    _check_registers(block, part, c, a)
    c_columns = slice(part.c_first, part.c_first + part.c_bytes)
    part.c.writing[who, c_columns] += 1
    part.c.flights += 1
    if part.a is not None:
        part.a.reading[who, part.a_first : part.a_first + WARP_ROWS] += 1
        part.a.flights += 1

    def settled(threads: np.ndarray) -> None:
        part.c.writing[threads, c_columns] -= 1
        if part.a is not None:
            part.a.reading[threads, part.a_first : part.a_first + WARP_ROWS] -= 1

    before = block.last_wgmma.get(warp)
    op = Operation(f"wgmma of warp {warp}", part.run, needs=() if before is None else (before,))
    block.last_wgmma[warp] = op
    block.pending.append(op)
    ids = np.full(len(who), component), np.full(len(who), tick, np.int32)
    block.queues["wgmma"].add(Entry(op, op, who, who, {"read": ids}, settled))
    block.clocks.release(who)


def _check_shared(block: "Block", flat: np.ndarray, actor: Actor, who: np.ndarray) -> None:
    """Check the bytes an operand is read from, in order: inside one allocation, written, ordered."""
    storage = block.shared_storage(int(flat[0]))
    if storage is None or flat[-1] >= storage.base + storage.size_bytes:
        name = storage.name if storage is not None else "shared memory"
        text = f"wgmma operand leaves {name}"
        raise block.fault(
            errors.OutOfBoundsError, text, who, storage, int(flat[-1]) - (storage.base if storage else 0)
        )
    access.check_written(block, storage, flat[None, :], who)
    access.record(block, storage, flat[None, :], actor, is_write=False, threads=who)


def _check_registers(block: "Block", part: _Warp, c: Storage, a: Storage | None) -> None:
    """Check that registers hold values, and that a wgmma fence follows the last ordinary write to them.

    One fence at least comes before the first wgmma, whatever its registers held before (PTX, wgmma.fence).
    """
    fences = block.wgmma_fences[part.threads][:, None]
    if block.run.checks.races and not fences.all():
        text = "wgmma before any warpgroup_arrive"
        raise block.fault(errors.AsyncRegisterError, text, part.threads, c, part.c_first)
    spans = []
    if part.a is not None and a is not None:
        spans.append((a, part.a, slice(part.a_first, part.a_first + WARP_ROWS), True))
    spans.append((c, part.c, slice(part.c_first, part.c_first + part.c_bytes), part.scale_out))
    for storage, registers, columns, is_read in spans:
        index = part.threads, columns
        if is_read and block.run.checks.uninitialised:
            pending = registers.writing[index] > 0  # an earlier wgmma will have written it
            if not (registers.written[index] | pending).all():
                text = f"wgmma reads {storage.name} before it is written"
                raise block.fault(errors.UninitialisedReadError, text, part.threads, storage, columns.start)
        if block.run.checks.races and (registers.written[index] & (registers.stamp[index] >= fences)).any():
            text = f"wgmma uses {storage.name}, written after the last warpgroup_arrive"
            raise block.fault(errors.AsyncRegisterError, text, part.threads, storage, columns.start)


# --------------------------------------------------------------------------- fences and groups
def log(m: "Values", what: Any) -> None:
    """Note that the active warps execute a warpgroup-wide instruction (see `log_warp`)."""
    _, threads = m.active
    for warp in np.unique(threads // WARP).tolist():
        log_warp(m, warp, what, threads[threads // WARP == warp])


def log_warp(m: "Values", warp: int, what: Any, threads: np.ndarray) -> None:
    """Append to a warp's log of warpgroup-wide instructions; all four warps must have the same one.

    Raises:
        BarrierDivergenceError: another warp of the warpgroup executed something else here.
    """
    block = m.block
    entries = block.wgmma_log.setdefault(warp, [])
    entries.append((what, block.span))
    position = len(entries) - 1
    for other in range(warp // 4 * 4, warp // 4 * 4 + 4):
        theirs = block.wgmma_log.get(other, [])
        if position < len(theirs) and theirs[position][0] != what:
            text = f"warps {other} and {warp} of a warpgroup execute different instructions"
            raise block.fault(errors.BarrierDivergenceError, text, threads, other=theirs[position][1])


def _fence(m: "Values", group: Group, call: ir.Call) -> None:
    m.block.wgmma_fences[m.active[1]] += 1
    log(m, "fence")


def _commit(m: "Values", group: Group, call: ir.Call) -> None:
    m.block.queues["wgmma"].commit(m.active[1])
    log(m, "commit")


def _wait(m: "Values", group: Group, call: ir.Call) -> Wait:
    keep = m.uniform(call.args[0], "number of wgmma groups")
    block, (_, threads) = m.block, m.active
    queue = block.queues["wgmma"]
    log(m, ("wait", keep))
    ops = queue.outstanding(threads, keep)

    def finish() -> None:
        queue.settle(threads, keep, block.clocks)

    return Wait(
        "flight", f"its wgmma groups but {keep}", lambda: all(op.is_done for op in ops), finish, target=ops
    )


def _register_fence(m: "Values", group: Group, call: ir.Call) -> None:
    """A compiler barrier on registers; the array must have them."""
    _, data, offset, count = call.args
    register_operand(m, (data, offset), 4 * m.uniform(count, "register count"))


EFFECTS = {
    "initialize_wgmma_descriptor": _initialize,
    "increase_descriptor_offset": _increase,
    "ptx_wgmma_rs": _wgmma_rs,
    "ptx_wgmma_ss": _wgmma_ss,
    "warpgroup_arrive": _fence,
    "warpgroup_commit_batch": _commit,
    "warpgroup_wait": _wait,
    "wait_wgmma": _wait,
    "warpgroup_fence_operand": _register_fence,
}
