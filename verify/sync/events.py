"""Accesses and synchronisation of a kernel, as the property race sees them.

An access is made by a thread (generic proxy) or by an agent that a thread starts: cp.async, TMA,
wgmma. What an agent does begins at the call and ends where its completion is observed; `Agent` says
which that is.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import z3

from verify import ir, ops
from verify.access import Access, TmaCopy
from verify.descriptors import DescriptorUse, mma_shape
from verify.storage import BYTE_BITS, Storage
from verify.sync.collectives import (
    GRID_OPS,
    REDUCE_PARTS,
    REDUCE_READ,
    REDUCE_WRITE,
    Barrier,
    reduce_levels,
    reduce_scale,
    static_threads,
    sync_barriers,
)
from verify.sync.order import Point
from verify.text import show
from verify.walk import Site

if TYPE_CHECKING:
    from verify.properties import Context


class Agent(StrEnum):
    """Who makes an access, and with what its end is observed."""

    THREAD = "thread"
    CP_ASYNC = "cp.async"  # generic proxy; ptx_wait_group, or an arrival that cp.async makes
    WGMMA = "wgmma"  # async proxy; warpgroup_wait
    TMA_LOAD = "TMA load"  # async proxy; the phase that its bytes belong to
    TMA_STORE = "TMA store"  # async proxy; tma_store_wait, of reads or of all


ASYNC_PROXY = frozenset({Agent.WGMMA, Agent.TMA_LOAD, Agent.TMA_STORE})


@dataclass(frozen=True)
class Space:
    """Memory in which byte addresses are compared.

    Attributes:
        kind: shared (of a block), global (of all) or local (of a thread).
        key: which one; the shared arena is one.
    """

    kind: str
    key: object
    name: str


@dataclass(frozen=True, eq=False)
class Event:
    """One access in the text.

    Attributes:
        writes, reads: of memory; `atomic` where it is one atomic operation.
        first, last: byte addresses [first, last) in the space, terms of the point's scope.
        box: for the global side of a TMA copy, instead of addresses: (coordinate, extent) by dimension.
        frame: of a box: dims and strides that its coordinates count in.
        shape: of the wgmma instruction, for its registers.
    """

    what: str
    point: Point
    agent: Agent
    reads: bool
    writes: bool
    atomic: bool
    space: Space
    storage: Storage | None
    first: z3.ArithRef
    last: z3.ArithRef
    box: tuple[tuple[z3.ArithRef, int], ...] = ()
    shape: str = ""
    frame: str = ""


@dataclass
class Events:
    """Everything of one kernel that orders or is ordered.

    Attributes:
        threads: of a block.
        barriers: of the block, named ones included; warps: sync_warp.
        waits, arrivals: on mbarriers; cp_arrivals are made when earlier cp.async of the thread end.
        fences: of the async proxy; register_fences: warpgroup_arrive.
        inits, init_fences: of mbarriers.
        commits, group_waits: of the agents that complete in groups, with the groups left pending.
        store_reads: the group waits that are for reads alone.
    """

    threads: int
    accesses: list[Event] = field(default_factory=list)
    barriers: list[Barrier] = field(default_factory=list)
    warps: list[Point] = field(default_factory=list)
    waits: list[Point] = field(default_factory=list)
    arrivals: list[Point] = field(default_factory=list)
    cp_arrivals: list[Point] = field(default_factory=list)
    fences: list[Point] = field(default_factory=list)
    register_fences: list[Point] = field(default_factory=list)
    init_fences: list[Point] = field(default_factory=list)
    inits: list[Point] = field(default_factory=list)
    commits: dict[Agent, list[Point]] = field(default_factory=dict)
    group_waits: dict[Agent, list[tuple[Point, int, bool]]] = field(default_factory=dict)
    unsupported: list[tuple[Site, str]] = field(default_factory=list)


_COMMITS = {
    "ptx_commit_group": Agent.CP_ASYNC,
    "warpgroup_commit_batch": Agent.WGMMA,
    "tma_store_arrive": Agent.TMA_STORE,
}
_GROUP_WAITS = {
    "ptx_wait_group": Agent.CP_ASYNC,
    "warpgroup_wait": Agent.WGMMA,
    "wait_wgmma": Agent.WGMMA,
    "tma_store_wait": Agent.TMA_STORE,
}
_WAITS = frozenset({"mbarrier_wait_parity", "ptx_wait_barrier"})
_ARRIVALS = frozenset({"ptx_arrive_barrier", "ptx_arrive_barrier_expect_tx"})
_CP_ARRIVALS = frozenset({"ptx_cp_async_barrier", "ptx_cp_async_barrier_noinc"})
_MBARRIER_INIT = "ptx_init_barrier_thread_count"
# fmt: off
# Nothing that other threads' accesses are ordered by.
_NEUTRAL = frozenset(
    {
        "set_max_nreg", "no_set_max_nreg", "annotate_producer_reg_dealloc", "annotate_consumer_reg_alloc",
        "prefetch_tma_descriptor", "device_assert", "device_assert_with_msg", "mbarrier_expect_tx",
        "tvm_storage_sync", "named_barrier_arrive", "syncthreads_count", "syncthreads_and", "syncthreads_or",
        "pdl_trigger", "pdl_sync"
    }
)
# fmt: on


def read_events(context: "Context") -> Events:
    """Return the accesses and the synchronisation of the device IR.

    Raises:
        UnsupportedIR: the block is not one row of a fixed number of threads.
    """
    from verify.encode import Scope

    extents = {tag: context.encoder.term(e, Scope()) for tag, e in context.host.extents.items()}
    events = Events(static_threads(extents))
    for index, site in enumerate(context.device_sites):
        try:
            _synchronise(events, site, index)
        except ir.UnsupportedIR as error:
            events.unsupported.append((site, str(error)))
    positions = {id(site.node): index for index, site in enumerate(context.device_sites)}
    for access in context.memory.accesses:
        events.accesses += _of_access(context, access, positions)
    for copy in context.memory.tma:
        events.accesses.append(_global_side(copy, positions))
    for use in context.memory.descriptors:
        events.accesses += [_of_operand(use, positions, part) for part in range(use.parts[0])]
    return events


# --------------------------------------------------------------------------- synchronisation
def _synchronise(events: Events, site: Site, index: int) -> None:
    call = site.node
    if not isinstance(call, ir.Call):
        return
    point = Point(site, (index, 0))
    events.barriers += sync_barriers(site, index, events.threads)
    op = call.op
    lists = {
        "sync_warp": events.warps,
        "fence_proxy_async": events.fences,
        "warpgroup_arrive": events.register_fences,
        "ptx_fence_barrier_init": events.init_fences,
        _MBARRIER_INIT: events.inits,
    }
    if op in lists:
        lists[op].append(point)
    elif op in _WAITS:
        events.waits.append(point)
    elif op in _ARRIVALS:
        events.arrivals.append(point)
    elif op in _CP_ARRIVALS:
        events.cp_arrivals.append(point)
    elif op in _COMMITS:
        events.commits.setdefault(_COMMITS[op], []).append(point)
    elif op in _GROUP_WAITS:
        pending, *rest = call.args
        if not isinstance(pending, ir.Const):
            raise ir.UnsupportedIR(f"{op} of a computed number of groups")
        read = not rest or bool(getattr(rest[0], "value", True))
        waits = events.group_waits.setdefault(_GROUP_WAITS[op], [])
        waits.append((point, int(pending.value), op == "tma_store_wait" and read))
    elif op in ops.EARLY_EXIT:
        raise ir.UnsupportedIR(f"{op}: what follows may not run")
    elif op in ops.SYNC - GRID_OPS and op not in _NEUTRAL:
        raise ir.UnsupportedIR(f"operation {op}")


# --------------------------------------------------------------------------- accesses
def _of_access(context: "Context", access: Access, positions: dict[int, int]) -> Iterator[Event]:
    node = access.site.node
    op = node.op if isinstance(node, ir.Call) else ""
    if access.mode == "pointer" or op == "warpgroup_fence_operand":
        return  # an address alone; an empty instruction that stops the C++ compiler
    if access.storage.kind == "local" and not op.startswith("ptx_wgmma"):
        yield from _register(access, positions)
        return
    if op == "call_extern" and isinstance(node, ir.Call) and ops.all_reduce(node) is not None:
        yield from _reduction(access, positions)
        return
    agent = Agent.THREAD
    if op == "ptx_cp_async":
        agent = Agent.CP_ASYNC
    elif op.startswith("ptx_wgmma"):
        agent = Agent.WGMMA
    elif op in ("tma_load", "tma_store"):
        agent = Agent.TMA_LOAD if op == "tma_load" else Agent.TMA_STORE
    atomic = op.startswith("atomic_") and access.mode == "rw"  # not what it reads its values from
    reads, writes = "r" in access.mode, "w" in access.mode
    if op == "atomic_load_elem_op":
        writes = False
    if access.storage.kind == "barrier":
        statement = access.site.statement
        made_by = (
            statement.value.op
            if isinstance(statement, ir.Eval) and isinstance(statement.value, ir.Call)
            else ""
        )
        atomic = made_by != _MBARRIER_INIT
    index = positions[id(node)]
    shape = str(node.args[0].value) if op.startswith("ptx_wgmma") else ""  # type: ignore[union-attr]
    yield _event(access, Point(access.site, (index, 0)), agent, reads, writes, atomic, shape)


def _register(access: Access, positions: dict[int, int]) -> Iterator[Event]:
    point = Point(access.site, (positions[id(access.site.node)], 0))
    yield _event(access, point, Agent.THREAD, "r" in access.mode, "w" in access.mode, False, "")


def _event(
    access: Access, point: Point, agent: Agent, reads: bool, writes: bool, atomic: bool, shape: str
) -> Event:
    storage, unit = access.storage, access.unit_bits
    first, last = _bytes(storage, access.start, access.count, unit)
    return Event(
        access.what,
        point,
        agent,
        reads,
        writes,
        atomic,
        space_of(storage),
        storage,
        first,
        last,
        shape=shape,
    )


def space_of(storage: Storage) -> Space:
    """Return the memory that a storage is a part of."""
    if storage.kind == "shared":
        key = "arena" if storage.arena_bytes is not None else id(storage)
        return Space("shared", key, "shared memory" if key == "arena" else storage.name)
    if storage.kind == "global":
        return Space("global", id(storage.tensor), storage.name)
    kind = "shared" if storage.kind == "barrier" else storage.kind
    return Space(kind, id(storage), storage.name)


def _bytes(
    storage: Storage, start: z3.ArithRef, count: z3.ArithRef, unit: int
) -> tuple[z3.ArithRef, z3.ArithRef]:
    """Return the bytes [first, last) of `count` units from `start`."""
    base = storage.arena_bytes or 0
    if unit % BYTE_BITS == 0:
        size = unit // BYTE_BITS
        first, last = start * size + base, (start + count) * size + base
    else:
        first = start * unit / BYTE_BITS + base
        last = ((start + count) * unit + BYTE_BITS - 1) / BYTE_BITS + base
    return z3.simplify(first), z3.simplify(last)


def _of_operand(use: DescriptorUse, positions: dict[int, int], part: int) -> Event:
    """A part of a wgmma operand: whole swizzle atoms, which is the most that it may read."""
    storage = use.base.storage
    base = storage.arena_bytes or 0
    start = use.start_bytes
    first = start - start % use.atom_bytes if use.swizzle else start
    first = first + part * use.parts[1]
    last = z3.simplify(first + use.part_bytes + base)
    first = z3.simplify(first + base)
    node = use.site.node
    shape = mma_shape(node.args[0])  # type: ignore[union-attr]
    point = Point(use.site, (positions[id(node)], 0))
    what = f"wgmma operand {use.name} from {storage.name}"
    return Event(
        what,
        point,
        Agent.WGMMA,
        True,
        False,
        False,
        space_of(storage),
        storage,
        first,
        last,
        shape=str(shape),
    )


def _global_side(copy: TmaCopy, positions: dict[int, int]) -> Event:
    tensor = copy.descriptor.tensor
    agent = Agent.TMA_STORE if copy.store else Agent.TMA_LOAD
    box = tuple(zip(copy.coordinates, copy.descriptor.box, strict=True))
    point = Point(copy.site, (positions[id(copy.site.node)], 0))
    what = f"{agent} {'to' if copy.store else 'of'} {tensor.name}"
    space, zero = Space("global", id(tensor), tensor.name), z3.IntVal(0)
    reads = not copy.store or copy.reduce
    frame = " ".join(show(e) for e in (*copy.descriptor.dims, *copy.descriptor.strides))
    return Event(
        what, point, agent, reads, copy.store, copy.reduce, space, None, zero, zero, box=box, frame=frame
    )


def _reduction(access: Access, positions: dict[int, int]) -> Iterator[Event]:
    """A reduction's workspace: at each level a thread writes its own slot and reads a partner's."""
    site = access.site
    call = site.node
    reduction = ops.all_reduce(call) if isinstance(call, ir.Call) else None
    if not isinstance(call, ir.Call) or reduction is None:
        raise ir.UnsupportedIR(f"external function in {access.what}")
    index = positions[id(call)]
    thread = next(i.const for i in site.scope.launch if i.tag == "threadIdx.x")
    slot = thread - reduction.offset
    # `access` covers the group's slots; the workspace starts where the first group's do.
    group = slot - slot % reduction.threads
    base = z3.simplify(access.start - group)
    for level, distance in enumerate(reduce_levels(reduction.threads, reduce_scale(call))):
        partner = z3.If(slot / distance % 2 == 0, slot + distance, slot - distance)
        for part, where, reads in ((REDUCE_WRITE, slot, False), (REDUCE_READ, partner, True)):
            point = Point(site, (index, REDUCE_PARTS * level + part))
            first, last = _bytes(access.storage, base + where, z3.IntVal(1), access.unit_bits)
            yield Event(
                access.what,
                point,
                Agent.THREAD,
                reads,
                not reads,
                False,
                space_of(access.storage),
                access.storage,
                first,
                last,
            )
