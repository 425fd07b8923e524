"""Shared memory that two buffers take in turn: neither may be in use while the other is.

A consumer's buffer may follow one that other roles use too, such as stages that a producer fills: all of the
consumer's own uses of that one come first, and nobody, since there is no arrival any more, can be behind the
consumer's first use of its buffer. So where `race` finds the two in order, the other role was first.
"""

from dataclasses import dataclass

from verify import ir, ops
from verify.ir import UnsupportedIR
from verify.refine.device import ROLE_SCOPE, DeviceProgram, role_split

_OFFSET = "handle_add_byte_offset"
# fmt: off
_OWN = frozenset(  # of ops.SYNC: no thread outside of the warp may go on because of them
    {
        "mbarrier_wait_parity", "ptx_wait_barrier", "fence_proxy_async", "ptx_fence_barrier_init",
        "set_max_nreg", "no_set_max_nreg", "annotate_producer_reg_dealloc", "annotate_consumer_reg_alloc",
        "warpgroup_arrive", "warpgroup_commit_batch", "warpgroup_wait", "wait_wgmma", "tma_store_arrive",
        "tma_store_wait", "ptx_commit_group", "ptx_wait_group", "sync_warp", "prefetch_tma_descriptor",
        "device_assert", "device_assert_with_msg"
    }
)
# fmt: on


@dataclass
class _Use:
    """One mention of a storage: its place in program order, the loops around it, its role."""

    order: int
    loops: tuple[int, ...]
    role: str


def check_arena(function: ir.Function, device: DeviceProgram, known: dict[ir.Var, int]) -> None:
    """Check that storages which overlap in shared memory are used one after the other.

    Args:
        function: the device function.
        device: its storages.
        known: bytes of the program's own buffers; the compiler's workspaces get theirs from their views.

    Raises:
        UnsupportedIR: two storages share bytes, and their uses are not plainly one after the other.
    """
    sizes = _sizes(function, device, known)
    arena = {n.args[0] for n in ir.walk(function.body) if isinstance(n, ir.Call) and n.op == _OFFSET}
    sizes = {var: size for var, size in sizes.items() if var not in arena}
    starts = device.arena_start
    spans = ((starts[var], starts[var] + size, var.name, var) for var, size in sizes.items())
    taken = sorted(spans, key=lambda span: span[:3])  # workspaces of one name may share their place
    uses: dict[ir.Var, list[_Use]] = {}
    released: list[int] = []
    _collect(function.body, (), "all", uses, [0], released)
    for k, (_, end, name, var) in enumerate(taken):
        for start, _, other_name, other in taken[k + 1 :]:
            pair = uses.get(var, []), uses.get(other, [])
            if start < end and not (_in_turn(*pair) or _after_stages(*pair, max(released, default=0))):
                raise UnsupportedIR(f"{name} and {other_name} share bytes of shared memory at one time")


def _sizes(function: ir.Function, device: DeviceProgram, known: dict[ir.Var, int]) -> dict[ir.Var, int]:
    """Return the bytes of each storage in the arena, the largest of its views."""
    sizes = dict.fromkeys(device.arena_start, 0) | known
    for node in ir.walk(function.body):
        for buffer in _buffers(node):
            if buffer.data in sizes:
                count = 1
                for extent in buffer.shape:
                    if not isinstance(extent, ir.Const):
                        raise UnsupportedIR(f"{buffer.name} of symbolic size in shared memory")
                    count *= int(extent.value)
                sizes[buffer.data] = max(sizes[buffer.data], (count * buffer.dtype.bits + 7) // 8)
        if isinstance(node, ir.AccessPtr) and node.data in sizes and node.data not in known:
            sizes[node.data] = max(sizes[node.data], _reach(node))
    return sizes


def _reach(pointer: ir.AccessPtr) -> int:
    if isinstance(pointer.offset, ir.Const) and isinstance(pointer.extent, ir.Const):
        return (int(pointer.offset.value + pointer.extent.value) * pointer.element.bits + 7) // 8
    raise UnsupportedIR(f"computed pointer into {pointer.data.name}, whose size is not known")


def _buffers(node: object) -> tuple[ir.Buffer, ...]:
    match node:
        case (
            ir.Load(buffer=buffer)
            | ir.Store(buffer=buffer)
            | ir.Decl(buffer=buffer)
            | ir.Alloc(buffer=buffer)
        ):
            return (buffer,)
    return ()


def _collect(
    node: object,
    loops: tuple[int, ...],
    role: str,
    uses: dict[ir.Var, list[_Use]],
    clock: list[int],
    released: list[int],
) -> None:
    """Note every use of a storage, and when a thread arrives anywhere that the producer may wait at."""
    clock[0] += 1
    if isinstance(node, ir.Call) and _releases(node):
        released.append(clock[0])
    if isinstance(node, (ir.Load, ir.Store)):
        uses.setdefault(node.buffer.data, []).append(_Use(clock[0], loops, role))
    elif isinstance(node, ir.AccessPtr):
        uses.setdefault(node.data, []).append(_Use(clock[0], loops, role))
    elif isinstance(node, (ir.For, ir.While)):
        loops = (*loops, id(node))
    elif isinstance(node, ir.Attr) and node.key == ROLE_SCOPE:
        split = role_split(node.body)
        for stmt in node.body.stmts if isinstance(node.body, ir.Seq) else (node.body,):
            if split is not None and stmt is split:
                _collect(split.then, loops, "producer", uses, clock, released)
                _collect(split.orelse, loops, "consumer", uses, clock, released)
            else:
                _collect(stmt, loops, role, uses, clock, released)
        return
    for child in ir.children(node):
        _collect(child, loops, role, uses, clock, released)


def _in_turn(a: list[_Use], b: list[_Use]) -> bool:
    if not a or not b:
        return True
    one_role = len({use.role for use in (*a, *b)}) == 1
    first, second = [u.order for u in a], [u.order for u in b]
    apart = max(first) < min(second) or max(second) < min(first)
    together = {loop for use in a for loop in use.loops} & {loop for use in b for loop in use.loops}
    return one_role and apart and not together


def _releases(call: ir.Call) -> bool:
    """Return whether what is behind `call` in another role may come after it."""
    is_partial = call.op == "tvm_storage_sync" and len(call.args) > 1  # of the consumer's threads alone
    return call.op in ops.SYNC and call.op not in _OWN and not is_partial


def _after_stages(a: list[_Use], b: list[_Use], released: int) -> bool:
    """Return whether a consumer begins to use one storage after all that it did with the other."""
    for first, second in ((a, b), (b, a)):
        own = [use for use in first if use.role != "producer"]
        start = min(use.order for use in second)
        if {use.role for use in second} != {"consumer"} or not own:
            continue
        apart = max(use.order for use in own) < start
        together = {x for use in own for x in use.loops} & {x for use in second for x in use.loops}
        if apart and not together and released < start:
            return True
    return False
