"""Loads and stores of elements: address, bounds, alignment, contents, races."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from verify import ir
from verify.interp import dtypes
from verify.interp.device import errors
from verify.interp.device.memory import Storage
from verify.interp.device.shadow import Actor, Conflict
from verify.interp.exprs import row_major
from verify.interp.lanes import Value

if TYPE_CHECKING:
    from verify.interp.device.block import Block
    from verify.interp.device.values import Values

BYTE_BITS = 8
MAX_VECTOR_BYTES = 16  # widest single access of a thread; wider ones are split by the assembler


def load(m: "Values", node: ir.Load) -> Value:
    """Return `buffer[indices]` for the active lanes."""
    storage = m.block.storage(node.buffer.data)
    start, count = _start(m, node.buffer, node.indices, node.dtype.lanes)
    kind = node.buffer.dtype
    if count is None:  # each element has an address of its own
        assert isinstance(start, torch.Tensor), "a vector of addresses is a tensor"
        rows = start.expand(node.dtype.lanes, m.width) if start.dim() == 2 else start.expand(1, m.width)
        values = [_load_span(m, storage, kind, row, 1) for row in rows]
        return torch.stack([v[0] for v in values])
    value = _load_span(m, storage, kind, start, count)
    return value if count > 1 else value[0]


def store(m: "Values", buffer: ir.Buffer, indices: tuple[ir.Expr, ...], value: ir.Expr) -> None:
    """Write `value` to `buffer[indices]` for the active lanes."""
    storage = m.block.storage(buffer.data)
    lanes = value.dtype.lanes
    result = m.tensor(value)
    start, count = _start(m, buffer, indices, lanes)
    if not len(m.active[0]):
        return
    if count is None:
        assert isinstance(start, torch.Tensor), "a vector of addresses is a tensor"
        for k, row in enumerate(start.expand(lanes, m.width)):
            part = result if result.dim() < 2 else result[k]
            _store_span(m, storage, buffer.dtype, row, part.expand(1, m.width))
        return
    _store_span(m, storage, buffer.dtype, start, result.expand(count, m.width))


def _start(
    m: "Values", buffer: ir.Buffer, indices: tuple[ir.Expr, ...], lanes: int
) -> tuple[Any, int | None]:
    """Return the bit address of element 0, and the number of consecutive elements (None: see `load`)."""
    count: int | None = 1
    with m.watching():
        if len(indices) == 1 and not buffer.strides:
            index = indices[0]
            if isinstance(index, ir.Ramp) and _is_one(index.stride):
                flat, count = m.evaluate(index.base), index.dtype.lanes
            else:
                flat = m.evaluate(index)
                count = 1 if index.dtype.lanes == 1 else None
        else:
            shape = tuple(m.integer(s, "buffer shape") for s in buffer.shape)
            strides = tuple(m.integer(s, "buffer stride") for s in buffer.strides) or row_major(shape)
            flat = 0
            for index, stride in zip(indices, strides, strict=True):
                flat = flat + m.evaluate(index) * stride  # type: ignore[operator]
                count = None if index.dtype.lanes > 1 else count
        offset = buffer.offset
        if not (isinstance(offset, ir.Const) and offset.value == 0):
            flat = flat + m.evaluate(offset)  # type: ignore[operator]
    if isinstance(flat, torch.Tensor) and flat.dim() == 0:
        flat = int(flat)
    if lanes > 1 and count == 1:
        count = lanes  # a vector element type
    return flat * buffer.dtype.bits, count  # type: ignore[operator]


def _is_one(node: ir.Expr) -> bool:
    return isinstance(node, ir.Const) and node.value == 1


# --------------------------------------------------------------------------- spans of bits
def _load_span(m: "Values", storage: Storage, kind: ir.DType, start: Any, count: int) -> torch.Tensor:
    """Return (count, lanes) values of consecutive elements from bit `start`."""
    lanes, threads = m.active
    full = torch.zeros((count, m.width), dtype=dtypes.carrier_dtype(kind.name))
    if not len(lanes):
        return full
    bits = count * kind.bits
    first = start if isinstance(start, int) else m.lanes_of(start)
    _in_bounds(m, storage, first, bits, threads, "read")
    if kind.bits < BYTE_BITS and (bits % BYTE_BITS or np.any(np.asarray(first) % BYTE_BITS)):
        codes = _nibbles(m, storage, first, count, kind.bits, threads)
        full[:, torch.from_numpy(lanes)] = torch.from_numpy(codes.T.copy())
        return full
    octets = read_bytes(m, storage, first // BYTE_BITS, bits // BYTE_BITS, threads)
    stored = dtypes.retype(torch.from_numpy(octets), "uint8", kind.name)
    value = dtypes.to_carrier(stored, kind.name).t()
    if len(lanes) == m.width:
        return value
    full[:, torch.from_numpy(lanes)] = value
    return full


def _store_span(m: "Values", storage: Storage, kind: ir.DType, start: Any, value: torch.Tensor) -> None:
    """Write (count, lanes) values to consecutive elements from bit `start`."""
    lanes, threads = m.active
    count = value.shape[0]
    bits = count * kind.bits
    first = start if isinstance(start, int) else m.lanes_of(start)
    _in_bounds(m, storage, first, bits, threads, "write")
    chosen = value if len(lanes) == m.width else value[:, torch.from_numpy(lanes)]
    octets = octets_of(chosen.t(), kind.name)
    if kind.bits < BYTE_BITS:
        _store_nibbles(m, storage, first, octets, kind.bits, threads)
        return
    write_bytes(m, storage, first // BYTE_BITS, octets, threads)


def _nibbles(
    m: "Values", storage: Storage, first: Any, count: int, bits: int, threads: np.ndarray
) -> np.ndarray:
    """Return (lanes, count) codes of packed elements."""
    first = np.broadcast_to(np.asarray(first), threads.shape)
    low = first // BYTE_BITS
    size = int(((first + count * bits - 1) // BYTE_BITS - low).max()) + 1
    octets = read_bytes(m, storage, low, size, threads)
    at = (first % BYTE_BITS)[:, None] + np.arange(count) * bits
    codes = np.take_along_axis(octets, at // BYTE_BITS, 1) >> (at % BYTE_BITS) & ((1 << bits) - 1)
    return codes.astype(np.uint8)


def _store_nibbles(
    m: "Values", storage: Storage, first: Any, codes: np.ndarray, bits: int, threads: np.ndarray
) -> None:
    """Write packed elements; part of a byte is read first, as the hardware has to."""
    first = np.broadcast_to(np.asarray(first), threads.shape)
    per = BYTE_BITS // bits
    if codes.shape[1] % per == 0 and not (first % BYTE_BITS).any():
        grouped = codes.reshape(len(codes), -1, per)
        octets = (grouped << (np.arange(per, dtype=np.uint8) * bits)).sum(-1).astype(np.uint8)
        write_bytes(m, storage, first // BYTE_BITS, octets, threads)
        return
    for k in range(codes.shape[1]):
        at = first + k * bits
        old = read_bytes(m, storage, at // BYTE_BITS, 1, threads, is_partial=True)[:, 0]
        shift = (at % BYTE_BITS).astype(np.uint8)
        kept = old & ~(((1 << bits) - 1) << shift).astype(np.uint8)
        write_bytes(
            m, storage, at // BYTE_BITS, (kept | codes[:, k] << shift).astype(np.uint8)[:, None], threads
        )


def _in_bounds(m: "Values", storage: Storage, first: Any, bits: int, threads: np.ndarray, what: str) -> None:
    first = np.broadcast_to(np.asarray(first), threads.shape)
    bad = (first < 0) | (first + bits > storage.size_bits)
    if bad.any():
        who, at = threads[bad], int(first[bad][0])
        raise m.block.fault(
            errors.OutOfBoundsError,
            f"{what} of {storage.name}, which has {storage.size_bytes} bytes",
            who,
            storage,
            at // BYTE_BITS,
            -(-bits // BYTE_BITS),
        )


# --------------------------------------------------------------------------- bytes
def octets_of(value: torch.Tensor, name: str) -> np.ndarray:
    """Return values of `name` as the bytes that memory holds, those of one element next to each other."""
    stored = dtypes.to_stored(value, name).clone(memory_format=torch.contiguous_format)
    return stored.view(torch.uint8).numpy()


def read_bytes(
    m: "Values", storage: Storage, first: Any, size: int, threads: np.ndarray, is_partial: bool = False
) -> np.ndarray:
    """Return (lanes, size) bytes of a generic read; `is_partial` if unwritten bytes do not matter."""
    if storage.registers is not None:
        return _read_registers(m, storage, first, size, threads, is_partial)
    at = _addresses(m, storage, first, size, threads)
    space = storage.space
    assert space is not None, "memory that is no registers has a space"
    at = space.slots(at)
    if not is_partial:
        check_written(m.block, storage, at, threads)
    record(m.block, storage, at, lanes_actor(m.block, threads), is_write=False, threads=threads)
    return space.data[at]


def write_bytes(m: "Values", storage: Storage, first: Any, octets: np.ndarray, threads: np.ndarray) -> None:
    """Make a generic write of (lanes, size) bytes."""
    if storage.registers is not None:
        _write_registers(m, storage, first, octets, threads)
        return
    at = _addresses(m, storage, first, octets.shape[1], threads)
    space = storage.space
    assert space is not None, "memory that is no registers has a space"
    at = space.slots(at)
    record(m.block, storage, at, lanes_actor(m.block, threads), is_write=True, threads=threads)
    put(storage, at, octets)


def put(storage: Storage, at: np.ndarray, octets: np.ndarray) -> None:
    """Write bytes at positions of the storage's space, without a check."""
    space = storage.space
    assert space is not None, "memory that is no registers has a space"
    space.changes += not np.array_equal(space.data[at], octets)
    space.data[at] = octets
    if space.written is not None and space.owner is not None:
        space.written[at] = True
        space.owner[at] = storage.number


def _addresses(m: "Values", storage: Storage, first: Any, size: int, threads: np.ndarray) -> np.ndarray:
    first = np.broadcast_to(np.asarray(first, np.int64), threads.shape)
    needed = min(size & -size, MAX_VECTOR_BYTES)
    bad = (storage.base + first) % needed != 0
    if bad.any() and m.block.run.checks.alignment:
        raise m.block.fault(
            errors.MisalignedError,
            f"access of {size} bytes to {storage.name} at an address that is no multiple of {needed}",
            threads[bad],
            storage,
            int(first[bad][0]),
            size,
        )
    return storage.base + first[:, None] + np.arange(size)


def check_written(block: "Block", storage: Storage, at: np.ndarray, threads: np.ndarray) -> None:
    """Raise unless every byte was written through this allocation."""
    space = storage.space
    if space is None or space.written is None or not block.run.checks.uninitialised:
        return
    bad = ~space.written[at]
    if not bad.any() and space.owner is not None:
        bad = space.owner[at] != storage.number
    if bad.any():
        row, column = (int(x) for x in np.argwhere(bad)[0])
        who = threads[row : row + 1] if len(threads) == len(at) else threads[:1]
        raise block.fault(
            errors.UninitialisedReadError,
            f"read of {storage.name} before it is written",
            who,
            storage,
            int(at[row, column]) - storage.base,
            1,
        )


def lanes_actor(block: "Block", threads: np.ndarray) -> Actor:
    """Return the actor of generic accesses by `threads`."""
    clocks = block.clocks
    return block.actor(threads + clocks.first, clocks.own(threads), clocks.known[threads], None)


def record(
    block: "Block",
    storage: Storage,
    at: np.ndarray,
    actor: Actor,
    *,
    is_write: bool,
    threads: np.ndarray,
    is_atomic: bool = False,
) -> None:
    """Enter an access into the shadow memory; raise if it races."""
    shadow = storage.space.shadow if storage.space is not None else None
    if shadow is None or not block.run.checks.races:
        return
    found = shadow.write(at, actor, is_atomic) if is_write else shadow.read(at, actor)
    if found is not None:
        raise _race(block, storage, at, found, is_write, threads)


def _race(
    block: "Block", storage: Storage, at: np.ndarray, found: Conflict, is_write: bool, threads: np.ndarray
) -> errors.DeviceError:
    what = "write to" if is_write else "read of"
    who = threads[found.row : found.row + 1] if len(threads) == len(at) else threads
    other = "another block" if found.component < 0 else block.agent_name(found.component)
    byte = int(at[found.row, found.column]) - storage.base
    span = block.run.program.spans[found.statement] if found.statement >= 0 else None
    if found.kind == "fence":
        text = f"asynchronous {what} {storage.name} without a proxy fence after the write by {other}"
        return block.fault(errors.ProxyFenceError, text, who, storage, byte, 1, other=span)
    text = f"{what} {storage.name} races with a {found.kind} by {other}"
    return block.fault(errors.DataRaceError, text, who, storage, byte, 1, other=span)


# --------------------------------------------------------------------------- registers
def _index(threads: np.ndarray, first: Any, size: int) -> Any:
    """Return the index of `size` bytes of each thread's array, a slice where all threads start together."""
    if isinstance(first, int):
        return threads, slice(first, first + size)
    low = int(first[0])
    if (first == low).all():
        return threads, slice(low, low + size)
    return threads[:, None], first[:, None] + np.arange(size)


def _read_registers(
    m: "Values", storage: Storage, first: Any, size: int, threads: np.ndarray, is_partial: bool
) -> np.ndarray:
    registers = storage.registers
    assert registers is not None, "checked by the caller"
    index = _index(threads, first, size)
    if registers.flights and m.block.run.checks.races:
        bad = registers.writing[index] > 0
        _in_flight(m, storage, bad, threads, "read of", "writes")
    if not is_partial and m.block.run.checks.uninitialised:
        missing = ~registers.written[index]
        if missing.any():
            row, column = (int(x) for x in np.argwhere(missing)[0])
            low = first if isinstance(first, int) else int(first[row])
            raise m.block.fault(
                errors.UninitialisedReadError,
                f"read of {storage.name} before it is written",
                threads[row : row + 1],
                storage,
                low + column,
                1,
            )
    return np.ascontiguousarray(registers.data[index])


def _write_registers(
    m: "Values", storage: Storage, first: Any, octets: np.ndarray, threads: np.ndarray
) -> None:
    registers = storage.registers
    assert registers is not None, "checked by the caller"
    index = _index(threads, first, octets.shape[1])
    if registers.flights and m.block.run.checks.races:
        bad = (registers.writing[index] > 0) | (registers.reading[index] > 0)
        _in_flight(m, storage, bad, threads, "write to", "uses")
    registers.data[index] = octets
    registers.written[index] = True
    if registers.stamp.size:
        fences = m.block.wgmma_fences[threads]
        registers.stamp[index] = fences[:, None]


def _in_flight(
    m: "Values", storage: Storage, bad: np.ndarray, threads: np.ndarray, what: str, does: str
) -> None:
    if bad.any():
        row, column = (int(x) for x in np.argwhere(bad)[0])
        raise m.block.fault(
            errors.AsyncRegisterError,
            f"{what} {storage.name} while a wgmma in flight {does} it",
            threads[row : row + 1],
            storage,
            column,
            1,
        )
