"""The calls of the device IR that have a meaning here; any other is UNSUPPORTED.

`access.py` gives the meaning of those that take pointers.
"""

import re
from dataclasses import dataclass

from verify import ir

# fmt: off
# Values of a warp's lanes: which threads take part depends on where it is evaluated.
WARP = frozenset(
    {
        "any_sync", "all_sync", "ballot_sync", "ballot", "activemask", "shfl_sync", "shfl_xor_sync",
        "shfl_down_sync", "shfl_up_sync", "match_any_sync", "match_all_sync", "warp_reduce_sum",
        "warp_reduce_max", "warp_reduce_min", "warp_reduce_bitand", "warp_reduce_bitor",
        "get_warp_idx_sync", "tl_shuffle_elect", "tvm_warp_shuffle", "tvm_warp_shuffle_up",
        "tvm_warp_shuffle_down", "tvm_warp_activemask"
    }
)

# Values in, value out: no memory, no other thread's state beyond shuffles and votes of registers.
PURE = frozenset(
    {
        "abs", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "ceil", "clz", "copysign", "cos",
        "cosh", "erf", "exp", "exp10", "exp2", "fabs", "floor", "fma", "fmod", "hypot", "isfinite", "isinf",
        "isnan", "ldexp", "log", "log10", "log1p", "log2", "nearbyint", "nextafter", "popcount", "pow",
        "round", "rsqrt", "sigmoid", "sin", "sinh", "sqrt", "tan", "tanh", "trunc", "reinterpret", "clamp",
        "bitwise_not", "likely", "large_uint_imm", "type_annotation", "max_nan", "min_nan", "__exp",
        "__exp10", "__log", "__log2", "__log10", "__tan", "__cos", "__sin", "ieee_add", "ieee_sub",
        "ieee_mul", "ieee_fmaf", "ieee_frcp", "ieee_fsqrt", "ieee_frsqrt", "ieee_fdiv", "fmul", "fast_rcp",
        "add2", "sub2", "mul2", "fma2", "max2", "min2", "max2_nan", "min2_nan", "abs2", "pack_b16",
        "pack_b8x4", "get_lane_idx", "get_warp_idx", "get_warp_group_idx", "block_rank_in_cluster", "__ffs",
        "__fns"
    }
) | WARP

# Ordering between threads. They touch mbarriers, named as Loads among their arguments, and nothing else.
SYNC = frozenset(
    {
        "tvm_storage_sync", "mbarrier_wait_parity", "mbarrier_expect_tx", "ptx_arrive_barrier",
        "ptx_arrive_barrier_expect_tx", "ptx_init_barrier_thread_count", "ptx_fence_barrier_init",
        "ptx_wait_barrier", "ptx_cp_async_barrier", "ptx_cp_async_barrier_noinc",
        "ptx_arrive_cluster_barrier", "fence_proxy_async", "set_max_nreg", "no_set_max_nreg",
        "annotate_producer_reg_dealloc", "annotate_consumer_reg_alloc", "warpgroup_arrive",
        "warpgroup_commit_batch", "warpgroup_wait", "wait_wgmma", "tma_store_arrive", "tma_store_wait",
        "ptx_commit_group", "ptx_wait_group", "sync_warp", "sync_grid", "named_barrier_arrive",
        "pdl_trigger", "pdl_sync", "cluster_arrive", "cluster_arrive_relaxed", "cluster_wait",
        "cluster_sync", "syncthreads_count", "syncthreads_and", "syncthreads_or", "prefetch_tma_descriptor",
        "device_assert", "device_assert_with_msg"
    }
)

# fmt: on
# Leave the kernel or a loop early: what follows them may not run.
EARLY_EXIT = frozenset({"thread_return", "loop_break"})

ALL_REDUCE = re.compile(
    r"tl::AllReduce<tl::(?P<reducer>\w+), (?P<threads>\d+), (?P<scale>\d+), (?P<offset>\d+)"
    r"(, tl::(SyncThreadsBarrier|NamedBarrier<(?P<barrier>\d+)>)(?P<batch>, \d+, \d+)?)?>::run"
)
WARP_THREADS = 32


@dataclass(frozen=True)
class AllReduce:
    """A call of TileLang's reduction over `threads` threads from thread `offset` of the block on.

    Levels of 32 threads or more go through shared memory: each thread writes its own slot and reads
    one of the same `threads` slots (TileLang's reduce.h).
    """

    threads: int
    offset: int
    workspace: ir.Expr | None


def is_plain(call: ir.Call) -> bool:
    """Return whether `call` touches no memory but mbarriers."""
    return call.op in PURE or call.op in SYNC or call.op in EARLY_EXIT


def is_of_many(expr: ir.Expr) -> bool:
    """Return whether threads that evaluate `expr` take part in what they do together or wait for."""
    calls = (n for n in ir.walk(expr) if isinstance(n, ir.Call))
    return any(c.op in WARP or c.op in SYNC or c.op == "call_extern" for c in calls)


def all_reduce(call: ir.Call) -> AllReduce | None:
    """Return `call` as a reduction of one value a thread, or None where it is something else."""
    if call.op != "call_extern" or not isinstance(call.args[0], ir.Str):
        return None
    found = ALL_REDUCE.fullmatch(call.args[0].value)
    if found is None or found["batch"] or not 2 <= len(call.args) <= 3:
        return None
    threads = int(found["threads"])
    if threads > WARP_THREADS and len(call.args) == 2:
        return None
    workspace = call.args[2] if len(call.args) == 3 else None
    return AllReduce(threads, int(found["offset"]), workspace)
