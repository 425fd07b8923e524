"""Where the elements of tile buffers live: registers of threads, shared-memory addresses, tensors.

Addresses are in bits, so that packed 4-bit types and views of one storage under several types need
no special case. A register's address is (thread, bits from the start of the thread's array).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from verify import ir, parse
from verify.ir import UnsupportedIR
from verify.refine.evaluate import Evaluator
from verify.refine.sym import Algebra, Sym, const

MAX_POINTS = 1 << 20  # points of a finite domain that are enumerated; beyond it is UNSUPPORTED
NO_ELEMENT, OUTSIDE = -1, -2  # a register that holds nothing of the tile; no register of the array


def extents(shape: tuple[ir.Expr, ...], what: str) -> tuple[int, ...]:
    """Return a constant shape as integers.

    Raises:
        UnsupportedIR: an extent is not a constant.
    """
    if not all(isinstance(s, ir.Const) for s in shape):
        raise UnsupportedIR(f"{what} of symbolic shape")
    return tuple(int(s.value) for s in shape if isinstance(s, ir.Const))


def row_major(indices: tuple[Sym, ...], shape: tuple[int, ...]) -> Sym:
    """Return the flat position of `indices` in an array of `shape`."""
    flat = const(0)
    for index, extent in zip(indices, shape, strict=True):
        flat = flat.scaled(extent) + index
    return flat


def grid(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Return the coordinates of every point of a box, in row-major order.

    Raises:
        UnsupportedIR: there are more than MAX_POINTS.
    """
    count = int(np.prod(shape, dtype=np.int64)) if shape else 1
    if count > MAX_POINTS:
        raise UnsupportedIR(f"{count} points are too many to enumerate")
    return tuple(a.astype(np.int64) for a in np.unravel_index(np.arange(count), shape)) if shape else ()


@dataclass
class FragmentPlace:
    """The registers that hold a fragment.

    Attributes:
        shape: of the fragment, as the layout sees it.
        bits: of one element.
        thread, local: for each replica (row) and flat element (column) the threadIdx.x that holds it
            and the position in that thread's array.
        holder: for each thread and position the flat element there, or NO_ELEMENT.
        first_thread: threadIdx.x of row 0 of `holder`.
    """

    shape: tuple[int, ...]
    bits: int
    thread: np.ndarray
    local: np.ndarray
    holder: np.ndarray
    first_thread: int

    @classmethod
    def of(cls, layout: Any, bits: int) -> "FragmentPlace":
        """Tabulate a compiler's Fragment.

        Raises:
            UnsupportedIR: two elements share a register, or an index leaves the array.
        """
        shape = tuple(int(s) for s in layout.get_input_shape())
        replicas = int(layout.replicate_size)
        inputs = tuple(layout.get_forward_vars())
        has_replica = len(inputs) == len(shape) + 1
        if replicas > 1 and not has_replica:
            raise UnsupportedIR("replicated fragment without a replica coordinate")
        points = grid((replicas, *shape))
        coordinates = points if has_replica else points[1:]
        exprs = [layout.forward_thread, *layout.forward_index]
        values = [v.constant for v in _evaluate(exprs, inputs, coordinates)]
        out_shape = tuple(int(s) for s in layout.get_output_shape())
        local = row_major(tuple(const(v) for v in values[1:]), out_shape).constant
        count = int(np.prod(shape, dtype=np.int64))
        first = int(layout.thread_range.min) if layout.thread_range is not None else 0
        thread = _table(values[0], replicas, count) + first
        local = _table(local, replicas, count)
        size = int(np.prod(out_shape, dtype=np.int64))
        if local.min() < 0 or local.max() >= size or thread.min() < 0:
            raise UnsupportedIR("fragment layout leaves the thread's array")
        holder = np.full((int(thread.max()) - first + 1, size), NO_ELEMENT, dtype=np.int64)
        element = np.broadcast_to(np.arange(count), thread.shape)
        holder[thread - first, local] = element
        if not (holder[thread - first, local] == element).all():
            raise UnsupportedIR("fragment layout puts two elements into one register")
        return cls(shape, bits, thread, local, holder, first)

    def element_at(self, thread: np.ndarray, local: np.ndarray) -> np.ndarray:
        """Return the flat element at (threadIdx.x, position); NO_ELEMENT, or OUTSIDE of the array."""
        row = thread - self.first_thread
        rows, size = self.holder.shape
        inside = (row >= 0) & (row < rows) & (local >= 0) & (local < size)
        found = self.holder[np.where(inside, row, 0), np.where(inside, local, 0)]
        return np.where(inside, found, np.where((local >= 0) & (local < size), NO_ELEMENT, OUTSIDE))


def _table(values: Any, rows: int, columns: int) -> np.ndarray:
    flat = values if isinstance(values, np.ndarray) else np.full(rows * columns, values, dtype=np.int64)
    return flat.reshape(rows, columns)


def _evaluate(exprs: Any, inputs: Any, coordinates: tuple[np.ndarray, ...]) -> list[Sym]:
    names = tuple(ir.Var(ir.INT32, f"i{k}") for k in range(len(inputs)))
    env = {v: const(c) for v, c in zip(names, coordinates, strict=True)}
    evaluator = Evaluator(Algebra(), env)
    return [evaluator.int(e) for e in parse.parse_layout_index(exprs, inputs, names)]


@dataclass
class SharedPlace:
    """The addresses of a shared buffer.

    Attributes:
        shape: of the tile buffer, without pipeline stages.
        stages: pipeline stages that the storage is laid out for.
        bits: of one element of the layout.
        start: bits from the start of the block's shared memory.
        inputs, forward: the layout's index expressions; the first input is the stage if stages > 1.
        out_shape: physical shape.
    """

    shape: tuple[int, ...]
    stages: int
    bits: int
    start: int
    inputs: tuple[ir.Var, ...]
    forward: tuple[ir.Expr, ...]
    out_shape: tuple[int, ...]

    @classmethod
    def of(
        cls, buffer: ir.Buffer, layout: Any | None, lowered_shape: tuple[int, ...], start: int
    ) -> "SharedPlace":
        """Read the compiler's Layout; without one the lowered buffer is row-major.

        Raises:
            UnsupportedIR: the layout is not of this buffer, with or without a stage in front.
        """
        shape = extents(buffer.shape, buffer.name)
        in_shape = tuple(int(s) for s in layout.get_input_shape()) if layout is not None else lowered_shape
        if in_shape == shape:
            stages = 1
        elif in_shape[1:] == shape:
            stages = in_shape[0]
        else:
            raise UnsupportedIR(f"layout of {buffer.name} is for {in_shape}, the tile is {shape}")
        inputs = tuple(ir.Var(ir.INT32, f"i{k}") for k in range(len(in_shape)))
        if layout is None:
            forward: tuple[ir.Expr, ...] = inputs
            out_shape = in_shape
        else:
            forward = parse.parse_layout_index(layout.get_forward_index(), layout.get_forward_vars(), inputs)
            out_shape = tuple(int(s) for s in layout.get_output_shape())
        return cls(shape, stages, buffer.dtype.bits, start, inputs, forward, out_shape)

    def address(self, algebra: Algebra, indices: tuple[Sym, ...], stage: Sym) -> Sym:
        """Return the bit address of an element."""
        coordinates = indices if len(self.inputs) == len(self.shape) else (stage, *indices)
        evaluator = Evaluator(algebra, dict(zip(self.inputs, coordinates, strict=True)))
        flat = row_major(tuple(evaluator.int(e) for e in self.forward), self.out_shape)
        return flat.scaled(self.bits) + const(self.start)

    @property
    def size_bits(self) -> int:
        """Bits that the storage takes, all stages included."""
        return int(np.prod(self.out_shape, dtype=np.int64)) * self.bits


def swizzle_address(address: np.ndarray, span_bytes: int) -> np.ndarray:
    """Return byte addresses after the hardware swizzle of a 32, 64 or 128 byte span (0: none).

    The 16-byte chunk number within the span is xored with the number of the 128-byte line.
    """
    if not span_bytes:
        return address
    chunk_bits = {32: 1, 64: 2, 128: 3}[span_bytes]
    line = (address >> 7) & ((1 << chunk_bits) - 1)
    return address ^ (line << 4)


def swizzle_period(span_bytes: int) -> int:
    """Return the bytes after which the swizzle repeats."""
    return span_bytes * 8 if span_bytes else 16
