"""The calls that several threads execute together, and which threads that are."""

from dataclasses import dataclass

import numpy as np
import z3

from verify import ir, ops
from verify.encode import Hypothesis, constants_of
from verify.intarith import constant_of
from verify.sync.evaluate import evaluate
from verify.sync.order import Point
from verify.walk import Site

WARP_THREADS = 32
WARPGROUP_THREADS = 128
FULL_MASK = 0xFFFFFFFF
BLOCK_BARRIER = 0  # what __syncthreads uses
MAX_BARRIER = 15
# The two barriers of a level of TileLang's reduction (tl_templates/cuda/reduce.h), by its policy.
REDUCE_NAMED_BARRIERS = (1, 2)

# fmt: off
# .aligned or with an implied full mask: every thread of the warp executes them together.
WARP_OPS = frozenset(
    {
        "tl_shuffle_elect", "ptx_ldmatrix", "ptx_stmatrix", "warp_reduce_sum", "warp_reduce_max",
        "warp_reduce_min", "warp_reduce_bitand", "warp_reduce_bitor", "get_warp_idx_sync", "ballot",
        "ptx_mma"
    }
)
# The first argument is a mask of lanes.
MASKED_OPS = frozenset(
    {
        "any_sync", "all_sync", "ballot_sync", "shfl_sync", "shfl_xor_sync", "shfl_down_sync",
        "shfl_up_sync", "match_any_sync", "match_all_sync", "tvm_warp_shuffle", "tvm_warp_shuffle_up",
        "tvm_warp_shuffle_down", "sync_warp"
    }
)
WARPGROUP_OPS = frozenset(
    {
        "ptx_wgmma_ss", "ptx_wgmma_rs", "warpgroup_arrive", "warpgroup_commit_batch", "warpgroup_wait",
        "wait_wgmma", "set_max_nreg"
    }
)
GRID_OPS = frozenset({"sync_grid"})
# A barrier of the grid is one of each block too; what it orders between blocks is not used.
BLOCK_OPS = frozenset({"syncthreads_count", "syncthreads_and", "syncthreads_or"}) | GRID_OPS
# Synchronise clusters: without a meaning here.
UNKNOWN_OPS = frozenset({"cluster_sync", "cluster_arrive", "cluster_arrive_relaxed", "cluster_wait"})
# fmt: on


@dataclass(frozen=True)
class Barrier:
    """One execution of a hardware barrier of the block in the text.

    Attributes:
        number: of the barrier, 0 to 15.
        count: threads that it waits for.
        waits: False for bar.arrive.
    """

    point: Point
    number: int
    count: int
    waits: bool
    what: str


@dataclass(frozen=True)
class Collective:
    """A call that whole groups of `group` consecutive threads execute together."""

    site: Site
    group: int
    what: str


def sync_barriers(site: Site, index: int, threads: int) -> list[Barrier]:
    """Return the barriers that the call at `site`, the `index`-th of the text, executes.

    Raises:
        UnsupportedIR: it synchronises in a way that is not known here.
    """
    call = site.node
    if not isinstance(call, ir.Call):
        return []
    if call.op in UNKNOWN_OPS:
        raise ir.UnsupportedIR(f"operation {call.op}")
    if call.op in BLOCK_OPS:
        return [Barrier(Point(site, (index, 0)), BLOCK_BARRIER, threads, True, call.op)]
    if call.op == "tvm_storage_sync":
        return _storage_sync(site, call, index, threads)
    if call.op == "named_barrier_arrive":
        number, count = (_integer(a) for a in call.args)
        return [Barrier(Point(site, (index, 0)), number, count, False, call.op)]
    reduction = ops.all_reduce(call)
    if reduction is not None and reduction.threads > WARP_THREADS:
        found = ops.ALL_REDUCE.fullmatch(call.args[0].value)  # type: ignore[attr-defined]
        named = found is not None and found["barrier"]
        barriers = []
        for level, _ in enumerate(reduce_levels(reduction.threads, reduce_scale(call))):
            for half in (0, 1):
                number = REDUCE_NAMED_BARRIERS[half] if named else BLOCK_BARRIER
                count = int(found["barrier"]) if found is not None and named else threads
                position = (index, REDUCE_PARTS * level + (REDUCE_SECOND_SYNC if half else 0))
                barriers.append(Barrier(Point(site, position), number, count, True, "reduction"))
        return barriers
    return []


# Parts of one level of a reduction, in order: barrier, write, barrier, read.
REDUCE_PARTS, REDUCE_WRITE, REDUCE_SECOND_SYNC, REDUCE_READ = 4, 1, 2, 3


def reduce_levels(threads: int, scale: int) -> list[int]:
    """Return the lane distances of the levels that go through shared memory, in order."""
    distances = []
    while threads > scale and threads // 2 >= WARP_THREADS:
        distances.append(threads // 2)
        threads //= 2
    return distances


def reduce_scale(call: ir.Call) -> int:
    """Return the distance between threads that a reduction combines."""
    name = call.args[0]
    found = ops.ALL_REDUCE.fullmatch(name.value) if isinstance(name, ir.Str) else None
    if found is None:
        raise ir.UnsupportedIR("reduction of another form")
    return int(found["scale"])


def _storage_sync(site: Site, call: ir.Call, index: int, threads: int) -> list[Barrier]:
    scope = call.args[0]
    if not isinstance(scope, ir.Str) or scope.value not in ("shared", "shared.dyn", "warp"):
        raise ir.UnsupportedIR("tvm_storage_sync of another scope")
    if scope.value == "warp":
        return []  # the CUDA text has nothing for it
    number = _integer(call.args[1]) if len(call.args) > 1 else BLOCK_BARRIER
    count = _integer(call.args[2]) if len(call.args) > 2 else threads
    if count == 0:  # the count left out
        count = threads
    return [Barrier(Point(site, (index, 0)), number, count, True, "barrier")]


def collective(site: Site, threads: int) -> Collective | None:
    """Return the group of threads that has to execute the call at `site` together, or None.

    Raises:
        UnsupportedIR: a lane mask that is not known to be full.
    """
    call = site.node
    if not isinstance(call, ir.Call):
        return None
    if call.op in WARPGROUP_OPS:
        return Collective(site, WARPGROUP_THREADS, call.op)
    if call.op in WARP_OPS:
        return Collective(site, WARP_THREADS, call.op)
    if call.op in MASKED_OPS:
        mask = call.args[0] if call.args else None
        if mask is not None and not (isinstance(mask, ir.Const) and int(mask.value) % 2**32 == FULL_MASK):
            raise ir.UnsupportedIR(f"{call.op} of a part of a warp")
        return Collective(site, WARP_THREADS, call.op)
    if ops.all_reduce(call) is not None:
        return Collective(site, WARP_THREADS, "reduction")
    return None


def members(hypotheses: tuple[Hypothesis, ...], thread: z3.ArithRef, threads: int) -> np.ndarray:
    """Return which threads the conditions on the thread index alone let through."""
    name = thread.decl().name()
    inside = np.ones(threads, dtype=bool)
    for hypothesis in hypotheses:
        if constants_of(hypothesis.term) == {name}:
            inside &= np.asarray(evaluate(hypothesis.term, {name: np.arange(threads)}), dtype=bool)
    return inside


def static_threads(extents: dict[str, z3.ArithRef]) -> int:
    """Return the number of threads of a block.

    Raises:
        UnsupportedIR: it is not a constant, or the block is not one-dimensional.
    """
    value = constant_of(extents.get("threadIdx.x", z3.IntVal(1)))
    flat = all(constant_of(extents.get(t, z3.IntVal(1))) == 1 for t in ("threadIdx.y", "threadIdx.z"))
    if value is None or not flat:
        raise ir.UnsupportedIR("a block that is not one row of a fixed number of threads")
    return value


def _integer(node: ir.Expr) -> int:
    if not isinstance(node, ir.Const):
        raise ir.UnsupportedIR("barrier with a computed number or count")
    return int(node.value)


def elections(terms: list[z3.ExprRef]) -> list[z3.ExprRef]:
    """Return every application of an election in `terms`."""
    found: dict[int, z3.ExprRef] = {}
    seen: set[int] = set()
    stack = list(terms)
    while stack:
        term = stack.pop()
        if term.get_id() in seen:
            continue
        seen.add(term.get_id())
        if z3.is_app(term) and term.decl().name().startswith("elect!"):
            found[term.get_id()] = term
        stack.extend(term.children())
    return list(found.values())
