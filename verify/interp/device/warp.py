"""Operations of a warp: shuffles, votes, elections, reductions, matrix fragments."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from verify import ir, ops
from verify.interp import arith, dtypes
from verify.interp.device import access, errors
from verify.interp.device.async_copy import pointer
from verify.interp.device.block import Group, Wait
from verify.interp.device.code import Instruction
from verify.interp.lanes import Value

if TYPE_CHECKING:
    from verify.interp.device.values import Values

WARP = 32
_ALL = 0xFFFFFFFF
_ROW_BYTES = 16  # of an 8x8 matrix of 16-bit elements


def converged(m: "Values", what: str) -> None:
    """Raise unless the active lanes are whole warps, less exited threads."""
    _, threads = m.active
    wanted = np.isin(np.arange(m.block.threads) // WARP, np.unique(threads // WARP)) & ~m.block.exited
    if int(wanted.sum()) != len(threads):
        raise m.block.fault(errors.BarrierDivergenceError, f"{what} by part of a warp", threads)


def synchronise(m: "Values") -> None:
    """Order the lanes of each warp after each other (__syncwarp)."""
    _, threads = m.active
    for warp in np.unique(threads // WARP):
        who = threads[threads // WARP == warp]
        m.block.clocks.acquire(who, m.block.clocks.release(who))


def _linear(m: "Values") -> torch.Tensor:
    return torch.from_numpy(m.threads)


def _elect(m: "Values", node: ir.Call) -> Value:
    """True in one lane of every `extent / 32`-th warp; of warp 0 alone for extent 0."""
    converged(m, "election")
    extent = m.uniform(node.args[0], "extent of an election")
    thread = _linear(m)
    warp, lane = thread // WARP, thread % WARP
    chosen = (warp == 0) if extent == 0 else warp % -(-extent // WARP) == 0
    # Any lane may be elected: the schedule chooses one of those that are there.
    return chosen & (lane == m.block.run.elected_lane)


def _shuffle(
    source: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
) -> Callable[["Values", ir.Call], Value]:
    def apply(m: "Values", node: ir.Call) -> Value:
        converged(m, node.op)
        mask, value, operand, *rest = node.args
        if m.uniform(mask, "mask of a shuffle") & _ALL != _ALL:
            raise ir.UnsupportedIR(f"{node.op} of part of a warp")
        width = m.uniform(rest[0], "width of a shuffle") if rest else WARP
        return shuffle(m, m.tensor(value), source(_linear(m) % WARP, m.tensor(operand), width))

    return apply


def shuffle(m: "Values", value: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Return in each lane the value of lane `source` of its warp; its own if that lane is not there."""
    position = torch.arange(m.width)
    first = position // WARP * WARP
    target = first + source
    inside = (source >= 0) & (source < WARP) & (target < m.width)
    target = torch.where(inside, target, position)
    lanes, threads = m.active
    there = np.zeros(m.width, bool)
    there[lanes] = True
    absent = ~there[np.broadcast_to(target.numpy(), (m.width,))[lanes]]
    if absent.any():
        text = "shuffle from a lane that does not take part"
        raise m.block.fault(errors.BarrierDivergenceError, text, threads[absent])
    return value.expand(*value.shape[:-1], m.width)[..., target] if value.dim() else value


def _indexed(lane: torch.Tensor, operand: torch.Tensor, width: int) -> torch.Tensor:
    return lane // width * width + operand % width


def _xor(lane: torch.Tensor, operand: torch.Tensor, width: int) -> torch.Tensor:
    target = lane ^ operand
    return torch.where(target // width > lane // width, lane, target)


def _up(lane: torch.Tensor, operand: torch.Tensor, width: int) -> torch.Tensor:
    return torch.where(lane % width < operand, lane, lane - operand)


def _down(lane: torch.Tensor, operand: torch.Tensor, width: int) -> torch.Tensor:
    return torch.where(lane % width + operand >= width, lane, lane + operand)


# --------------------------------------------------------------------------- votes
def _per_warp(m: "Values", what: str, function: Callable[[np.ndarray, np.ndarray], Any]) -> torch.Tensor:
    """Return function(lane ids, positions in the wave) of each warp, in all its lanes."""
    converged(m, what)
    lanes, threads = m.active
    result = torch.zeros(m.width, dtype=torch.int64)
    for warp in np.unique(threads // WARP):
        mine = threads // WARP == warp
        result[torch.from_numpy(lanes[mine])] = torch.as_tensor(function(threads[mine] % WARP, lanes[mine]))
    return result


def _vote(kind: str) -> Callable[["Values", ir.Call], Value]:
    def apply(m: "Values", node: ir.Call) -> Value:
        cond = m.lanes.tensor(m.evaluate(node.args[-1])).expand(m.width).numpy() != 0

        def count(ids: np.ndarray, at: np.ndarray) -> int:
            if kind == "any":
                return int(cond[at].any())
            return int(cond[at].all()) if kind == "all" else int((1 << ids[cond[at]]).sum())

        result = _per_warp(m, node.op, count)
        return dtypes.wrap(result, node.dtype.name) if node.dtype.name != "bool" else result != 0

    return apply


def _match_any(m: "Values", node: ir.Call) -> Value:
    value = dtypes.to_bits(m.tensor(node.args[1]), node.args[1].dtype.name).expand(m.width).numpy()

    def same(ids: np.ndarray, at: np.ndarray) -> np.ndarray:
        return ((value[at][:, None] == value[at][None, :]) * (1 << ids)[None, :]).sum(1)

    return dtypes.wrap(_per_warp(m, node.op, same), node.dtype.name)


def _match_all(m: "Values", node: ir.Call) -> Value:
    value = dtypes.to_bits(m.tensor(node.args[1]), node.args[1].dtype.name).expand(m.width).numpy()

    def same(ids: np.ndarray, at: np.ndarray) -> int:
        return int((1 << ids).sum()) if len(np.unique(value[at])) == 1 else 0

    return dtypes.wrap(_per_warp(m, node.op, same), node.dtype.name)


def _active_mask(m: "Values", node: ir.Call) -> Value:
    lanes, threads = m.active
    result = torch.zeros(m.width, dtype=torch.int64)
    for warp in np.unique(threads // WARP):
        mine = threads // WARP == warp
        result[torch.from_numpy(lanes[mine])] = int((1 << threads[mine] % WARP).sum())
    return dtypes.wrap(result, node.dtype.name)


def _position(kind: str) -> Callable[["Values", ir.Call], Value]:
    def apply(m: "Values", node: ir.Call) -> Value:
        sizes = [m.uniform(a, "warp size") for a in node.args]
        size = sizes[0] if sizes else WARP
        if kind == "lane":
            return _linear(m) % size
        per = size * ((sizes[1] if len(sizes) > 1 else 4) if kind == "group" else 1)
        return _linear(m) // per

    return apply


# --------------------------------------------------------------------------- reductions
_FOLDS = {
    "SumOp": "add",
    "MaxOp": "max",
    "MinOp": "min",
    "BitAndOp": "bitand",
    "BitOrOp": "bitor",
    "BitXorOp": "bitxor",
}
_NAN_FOLDS = {"MaxOpNan": torch.maximum, "MinOpNan": torch.minimum}
_NAN_TYPES = ("float16", "bfloat16")  # of other types TileLang's NaN reducers are the plain ones


def _combine(m: "Values", reducer: str, kind: ir.DType, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if reducer in _NAN_FOLDS:
        if kind.name in _NAN_TYPES:
            return _NAN_FOLDS[reducer](x, y)
        reducer = reducer.removesuffix("Nan")
    if reducer not in _FOLDS:
        raise ir.UnsupportedIR(f"reduction {reducer}")
    return m.lanes.tensor(arith.binary(_FOLDS[reducer], kind, x, y, m.lanes, None))


def reduction_level(m: "Values", group: Group, ins: Instruction) -> Wait | None:
    """Run one phase of one level of TileLang's AllReduce (reduce.h); the value is kept under the call.

    Phase 0 computes the operand. A level over more than a warp is: 1 synchronise, 2 write the thread's
    slot, 3 synchronise, 4 combine with the partner's slot. Within a warp, 5 combines by shuffle.
    """
    from verify.interp.device import effects

    call, (offset, phase) = ins.call, ins.level
    assert call is not None, "a reduction has its call"
    found = ops.ALL_REDUCE.fullmatch(call.args[0].value)  # type: ignore[attr-defined]
    assert found is not None, "flattened as a reduction"
    kind = call.args[1].dtype
    if phase == 0:
        group.env.pop(call, None)
        group.env[call] = m.tensor(call.args[1]).expand(m.width)
        return None
    value = group.env[call]
    if phase in (1, 3):
        number = 1 if phase == 1 else 2
        named = found["barrier"]
        return effects.bar_sync(m, number, int(named)) if named else effects.bar_sync(m, 0, None)
    if phase == 5:
        converged(m, "reduction")
        partner = shuffle(m, value, _linear(m) % WARP ^ offset)
    else:
        partner = _slot(m, call, int(found["offset"]), offset, phase, kind, value)
        if partner is None:
            return None
    group.env[call] = _combine(m, found["reducer"], kind, value, partner)
    return None


def _slot(
    m: "Values", call: ir.Call, base: int, offset: int, phase: int, kind: ir.DType, value: torch.Tensor
) -> torch.Tensor | None:
    storage, first, threads = pointer(m, call.args[2], None)
    lanes, _ = m.active
    size = kind.bits // access.BYTE_BITS
    slot = threads - base
    slot = slot if phase == 2 else slot ^ offset
    at = first + slot * size
    bad = (at < 0) | (at + size > storage.size_bytes)
    if bad.any():
        text = f"reduction workspace {storage.name} of {storage.size_bytes} bytes"
        raise m.block.fault(errors.OutOfBoundsError, text, threads[bad], storage, int(at[bad][0]), size)
    if phase == 2:
        chosen = value[torch.from_numpy(lanes)]
        octets = access.octets_of(chosen, kind.name).reshape(len(lanes), size)
        access.write_bytes(m, storage, at, octets, threads)
        return None
    octets = torch.from_numpy(access.read_bytes(m, storage, at, size, threads))
    partner = value.clone()
    partner[torch.from_numpy(lanes)] = dtypes.to_carrier(
        dtypes.retype(octets, "uint8", kind.name), kind.name
    )[:, 0]
    return partner


def _warp_reduce(reducer: str) -> Callable[["Values", ir.Call], Value]:
    def apply(m: "Values", node: ir.Call) -> Value:
        converged(m, node.op)
        kind = node.args[0].dtype
        value = m.tensor(node.args[0]).expand(m.width)
        for step in (16, 8, 4, 2, 1):
            value = _combine(m, reducer, kind, value, shuffle(m, value, _linear(m) % WARP ^ step))
        return value

    return apply


# --------------------------------------------------------------------------- matrix fragments
def _ldmatrix(m: "Values", group: Group, call: ir.Call) -> None:
    """Load 8x8 matrices of 16 bits; args: transposed, number, source (a row a lane), destination."""
    converged(m, call.op)
    trans, number = (m.uniform(a, "form of ldmatrix") for a in call.args[:2])
    source, first, threads = pointer(m, call.args[2], None)
    target, begin, _ = pointer(m, call.args[3], 4 * number)
    rows = _matrix_rows(m, source, first, threads, number)
    octets = access.read_bytes(m, source, first[rows], _ROW_BYTES, threads[rows])
    matrices = octets.view(np.uint16).reshape(-1, number, 8, 8)  # warps, matrices, rows, columns
    matrices = matrices.transpose(0, 1, 3, 2) if trans else matrices
    lane = np.arange(WARP)
    left = matrices[:, :, lane // 4, lane % 4 * 2]
    right = matrices[:, :, lane // 4, lane % 4 * 2 + 1]
    words = np.stack([left, right], -1).transpose(0, 2, 1, 3)  # warps, lanes, matrices, halves
    data = np.ascontiguousarray(words).view(np.uint8).reshape(-1, 4 * number)
    access.write_bytes(m, target, begin, data, threads)


def _matrix_rows(
    m: "Values", storage: Any, first: np.ndarray, threads: np.ndarray, number: int
) -> np.ndarray:
    """Return positions of the lanes that give row addresses: the first 8 * number of each warp."""
    if storage.kind != "shared" or len(threads) % WARP:
        raise ir.UnsupportedIR("ldmatrix or stmatrix outside of shared memory or by part of a warp")
    rows = np.flatnonzero(threads % WARP < 8 * number)
    bad = (first[rows] < 0) | (first[rows] + _ROW_BYTES > storage.size_bytes)
    if bad.any():
        text = f"matrix row outside of {storage.name}, which has {storage.size_bytes} bytes"
        at = int(first[rows][bad][0])
        raise m.block.fault(errors.OutOfBoundsError, text, threads[rows][bad], storage, at, _ROW_BYTES)
    return rows


def _stmatrix(m: "Values", group: Group, call: ir.Call) -> None:
    """Store 8x8 matrices of 16 bits; args: transposed, number, destination (a row a lane), words."""
    converged(m, call.op)
    if isinstance(call.args[-1], ir.Str) and call.args[-1].value != "m8n8":
        raise ir.UnsupportedIR(f"stmatrix of {call.args[-1].value}")
    trans, number = (m.uniform(a, "form of stmatrix") for a in call.args[:2])
    target, first, threads = pointer(m, call.args[2], None)
    rows = _matrix_rows(m, target, first, threads, number)
    words = np.stack([m.lanes_of(_word(m, a)) for a in call.args[3 : 3 + number]], 1)
    halves = np.stack([words & 0xFFFF, words >> 16 & 0xFFFF], -1).reshape(-1, WARP, number, 2)
    lane = np.arange(WARP)
    matrices = np.zeros((len(halves), number, 8, 8), np.uint16)
    for half in (0, 1):
        matrices[:, :, lane // 4, lane % 4 * 2 + half] = halves[:, :, :, half].transpose(0, 2, 1)
    matrices = matrices.transpose(0, 1, 3, 2) if trans else matrices
    octets = np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, _ROW_BYTES)
    access.write_bytes(m, target, first[rows], octets, threads[rows])


def _word(m: "Values", node: ir.Expr) -> Value:
    if node.dtype.bits * node.dtype.lanes != 32:
        raise ir.UnsupportedIR(f"stmatrix of a {node.dtype}")
    return m.evaluate(
        ir.Call(ir.DType("uint32"), "reinterpret", (node,)) if node.dtype.name != "uint32" else node
    )


VALUES: dict[str, Callable[["Values", ir.Call], Value]] = {
    "tl_shuffle_elect": _elect,
    "shfl_sync": _shuffle(_indexed),
    "shfl_xor_sync": _shuffle(_xor),
    "shfl_up_sync": _shuffle(_up),
    "shfl_down_sync": _shuffle(_down),
    "tvm_warp_shuffle": _shuffle(_indexed),
    "tvm_warp_shuffle_up": _shuffle(_up),
    "tvm_warp_shuffle_down": _shuffle(_down),
    "any_sync": _vote("any"),
    "all_sync": _vote("all"),
    "ballot_sync": _vote("ballot"),
    "ballot": _vote("ballot"),
    "match_any_sync": _match_any,
    "match_all_sync": _match_all,
    "activemask": _active_mask,
    "tvm_warp_activemask": _active_mask,
    "get_lane_idx": _position("lane"),
    "get_warp_idx": _position("warp"),
    "get_warp_idx_sync": _position("warp"),
    "get_warp_group_idx": _position("group"),
    "warp_reduce_sum": _warp_reduce("SumOp"),
    "warp_reduce_max": _warp_reduce("MaxOp"),
    "warp_reduce_min": _warp_reduce("MinOp"),
    "warp_reduce_bitand": _warp_reduce("BitAndOp"),
    "warp_reduce_bitor": _warp_reduce("BitOrOp"),
}
EFFECTS = {"ptx_ldmatrix": _ldmatrix, "ptx_stmatrix": _stmatrix}
