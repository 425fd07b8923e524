"""Operations that threads of one warp, or of the block, take part in together.

A lane that reads from a lane which does not take part is an error, as its value would be undefined.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from verify import ir
from verify.interp import arith, dtypes
from verify.interp.errors import InterpreterError
from verify.interp.lanes import THREAD_AXIS, Value

if TYPE_CHECKING:
    from verify.interp.exprs import Expressions

WARP_THREADS = 32
_WARPS_A_GROUP = 4
_THREAD_DIM = -1 - THREAD_AXIS
_BUTTERFLY = (16, 8, 4, 2, 1)  # the order of TileLang's warp_reduce on sm_90
_REDUCTIONS = {
    "warp_reduce_sum": "add",
    "warp_reduce_max": "max",
    "warp_reduce_min": "min",
    "warp_reduce_bitand": "bitand",
    "warp_reduce_bitor": "bitor",
}
_EXTERN_NAMES = {"__match_any_sync": "match_any_sync", "__match_all_sync": "match_all_sync"}


def extern_op(node: ir.Call) -> str | None:
    """Return the warp op that a call_extern of CUDA's own intrinsic stands for, if any."""
    if node.op in ("call_extern", "call_pure_extern") and isinstance(node.args[0], ir.Str):
        return _EXTERN_NAMES.get(node.args[0].value)
    return None


def names_threads(node: object) -> bool:
    """Return whether an IR node means that threads differ: then they have to be lanes."""
    return isinstance(node, ir.Call) and (node.op in OPS or extern_op(node) is not None)


def apply(machine: "Expressions", node: ir.Call) -> Value:
    """Return the value of the warp or block operation `node` in each lane."""
    op, args = node.op, node.args
    named = extern_op(node)
    if named is not None:
        op, args = named, args[1:]
    if machine.is_block_wide:
        raise ir.UnsupportedIR(f"{op} inside a block-wide operation")
    return OPS[op](machine, op, args, node.dtype)


# --------------------------------------------------------------------------- lanes of a warp
def _threads(machine: "Expressions") -> int:
    return machine.lanes.extents[THREAD_AXIS]


def _over_threads(machine: "Expressions", value: torch.Tensor) -> torch.Tensor:
    """Return `value` with its thread dimension written out, and first."""
    rank = max(value.dim(), THREAD_AXIS + 1)
    value = value.reshape(*[1] * (rank - value.dim()), *value.shape)
    shape = list(value.shape)
    shape[_THREAD_DIM] = _threads(machine)
    return value.broadcast_to(shape).movedim(_THREAD_DIM, 0)


def _as_lanes(value: torch.Tensor) -> torch.Tensor:
    return value.movedim(0, _THREAD_DIM)


def _active(machine: "Expressions") -> torch.Tensor:
    mask = torch.ones((), dtype=torch.bool) if machine.mask is None else machine.mask
    return _over_threads(machine, mask)


def _gather(machine: "Expressions", op: str, value: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Return the `value` of thread `source`, both (threads, ...)."""
    value, source, active = torch.broadcast_tensors(value, source, _active(machine))
    inside = source < _threads(machine)
    place = torch.where(inside, source, 0)
    reads_dead = active & ~(inside & active.gather(0, place))
    if bool(reads_dead.any()):
        raise InterpreterError(f"{op}: a thread reads from a thread that does not take part")
    return value.gather(0, place)


def _thread_index(machine: "Expressions", like: torch.Tensor) -> torch.Tensor:
    return torch.arange(_threads(machine)).view(-1, *[1] * (like.dim() - 1))


def _shuffle(machine: "Expressions", op: str, args: tuple[ir.Expr, ...], kind: ir.DType) -> Value:
    """Args: member mask, value, source lane or delta, width."""
    value = _over_threads(machine, machine.tensor(args[1]))
    operand = _over_threads(machine, machine.tensor(args[2]))
    width = machine.integer(args[3], "shuffle width") if len(args) > 3 else WARP_THREADS
    thread = _thread_index(machine, value)
    lane = thread % WARP_THREADS
    segment = lane // width * width
    match op.removesuffix("_sync"):
        case "shfl":
            target = segment + operand % width
        case "shfl_xor":
            target = lane ^ operand
            target = torch.where(target < segment + width, target, lane)
        case "shfl_up":
            target = lane - operand
            target = torch.where(target >= segment, target, lane)
        case _:
            target = lane + operand
            target = torch.where(target < segment + width, target, lane)
    return _as_lanes(_gather(machine, op, value, thread - lane + target))


def _reduce(machine: "Expressions", op: str, args: tuple[ir.Expr, ...], kind: ir.DType) -> Value:
    value = _over_threads(machine, machine.tensor(args[0]))
    thread = _thread_index(machine, value)
    for step in _BUTTERFLY:
        other = _gather(machine, op, value, thread ^ step)
        combined = arith.binary(_REDUCTIONS[op], kind, value, other, machine.lanes, None)
        value = machine.lanes.tensor(combined)
    return _as_lanes(value)


# --------------------------------------------------------------------------- votes
def _warps(value: torch.Tensor) -> torch.Tensor:
    """Return (threads, ...) as (warps, 32, ...), with False or 0 for threads that there are not."""
    missing = -value.shape[0] % WARP_THREADS
    if missing:
        value = torch.cat([value, value.new_zeros((missing, *value.shape[1:]))])
    return value.view(-1, WARP_THREADS, *value.shape[1:])


def _unwarp(machine: "Expressions", value: torch.Tensor) -> torch.Tensor:
    return _as_lanes(value.reshape(-1, *value.shape[2:])[: _threads(machine)])


def _members(machine: "Expressions", mask: ir.Expr | None) -> torch.Tensor:
    """Return which threads of each warp take part: those active and, if given, in the member mask."""
    active = _warps(_active(machine))
    if mask is None:
        return active
    bits = machine.integer(mask, "member mask")
    lanes = torch.arange(WARP_THREADS).view(1, -1, *[1] * (active.dim() - 2))
    return active & ((bits >> lanes) & 1 == 1)


def _bits(votes: torch.Tensor) -> torch.Tensor:
    """Return (warps, 32, ...) votes as a bit mask, the same in each lane of the warp."""
    lanes = torch.arange(WARP_THREADS).view(1, -1, *[1] * (votes.dim() - 2))
    return (votes.to(torch.int64) << lanes).sum(1, keepdim=True).expand(votes.shape)


def _predicate(machine: "Expressions", node: ir.Expr) -> torch.Tensor:
    value = _warps(_over_threads(machine, machine.tensor(node) != 0))
    return value


def _vote(machine: "Expressions", op: str, args: tuple[ir.Expr, ...], kind: ir.DType) -> Value:
    has_mask = op.endswith("_sync")
    members = _members(machine, args[0] if has_mask else None)
    if op == "activemask":
        return _unwarp(machine, _bits(members))
    votes, members = torch.broadcast_tensors(_predicate(machine, args[-1]), members)
    yes = _bits(votes & members)
    if op == "any_sync":
        result = (yes != 0).to(torch.int64)
    elif op == "all_sync":
        result = (yes == _bits(members)).to(torch.int64)
    else:
        result = yes
    return _unwarp(machine, result)


def _match(machine: "Expressions", op: str, args: tuple[ir.Expr, ...], kind: ir.DType) -> Value:
    members = _members(machine, args[0])
    pattern = dtypes.to_bits(machine.tensor(args[1]), args[1].dtype.name)
    value, members = torch.broadcast_tensors(_warps(_over_threads(machine, pattern)), members)
    equal = (value.unsqueeze(1) == value.unsqueeze(2)) & members.unsqueeze(1)  # (warps, lane, other, ...)
    lanes = torch.arange(WARP_THREADS).view(1, 1, -1, *[1] * (value.dim() - 2))
    same = (equal.to(torch.int64) << lanes).sum(2)
    if op == "match_any_sync":
        return _unwarp(machine, same)
    everyone = _bits(members)
    return _unwarp(machine, torch.where(same == everyone, everyone, 0))


def _block_vote(machine: "Expressions", op: str, args: tuple[ir.Expr, ...], kind: ir.DType) -> Value:
    votes, active = torch.broadcast_tensors(
        _over_threads(machine, machine.tensor(args[0]) != 0), _active(machine)
    )
    yes = (votes & active).sum(0, keepdim=True)
    match op:
        case "syncthreads_count":
            result = yes
        case "syncthreads_and":
            result = (yes == active.sum(0, keepdim=True)).to(torch.int64)
        case _:
            result = (yes != 0).to(torch.int64)
    return _as_lanes(result.expand(votes.shape))


# --------------------------------------------------------------------------- own place
def _own_index(machine: "Expressions", op: str, args: tuple[ir.Expr, ...], kind: ir.DType) -> Value:
    size = machine.integer(args[0], "warp size") if args else WARP_THREADS
    thread = machine.lanes.index(THREAD_AXIS)
    match op:
        case "get_lane_idx":
            return thread % size
        case "get_warp_group_idx":
            group = machine.integer(args[1], "warps a group") if len(args) > 1 else _WARPS_A_GROUP
            return thread // (size * group)
        case _:
            return thread // size


def _elect(machine: "Expressions", op: str, args: tuple[ir.Expr, ...], kind: ir.DType) -> Value:
    """One thread of each group of `extent` threads (0: of the block): here the first."""
    extent = machine.integer(args[0], "extent") or _threads(machine)
    return machine.lanes.index(THREAD_AXIS) % extent == 0


OPS: dict[str, Callable[["Expressions", str, tuple[ir.Expr, ...], ir.DType], Value]] = {
    **dict.fromkeys(("shfl_sync", "shfl_xor_sync", "shfl_up_sync", "shfl_down_sync"), _shuffle),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(("any_sync", "all_sync", "ballot_sync", "ballot", "activemask"), _vote),
    **dict.fromkeys(("match_any_sync", "match_all_sync"), _match),
    **dict.fromkeys(("syncthreads_count", "syncthreads_and", "syncthreads_or"), _block_vote),
    **dict.fromkeys(("get_lane_idx", "get_warp_idx", "get_warp_idx_sync", "get_warp_group_idx"), _own_index),
    "tl_shuffle_elect": _elect,
}
