"""Calls that are evaluated for their effect: synchronisation, asynchronous copies, matrix products."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from verify import ir
from verify.interp.device import async_copy, atomics, cluster, errors, extern, mma, tma, warp, wgmma
from verify.interp.device.barriers import NAMED_BARRIERS, Mbarrier, NamedBarrier
from verify.interp.device.block import Group, Wait

if TYPE_CHECKING:
    from verify.interp.device.values import Values

Effect = Callable[["Values", Group, ir.Call], Wait | None]
_WARPGROUP = 128
_SETMAXNREG_LEAST, _SETMAXNREG_MOST, _SETMAXNREG_STEP = 24, 256, 8


def run(m: "Values", group: Group, call: ir.Call) -> Wait | None:
    """Run `call` for the active lanes; return what they have to wait for, if anything.

    Raises:
        UnsupportedIR: the call has no meaning here.
    """
    effect = _EFFECTS.get(call.op)
    if effect is not None:
        return effect(m, group, call)
    m.evaluate(call)
    return None


# --------------------------------------------------------------------------- barriers of the block
def _storage_sync(m: "Values", group: Group, call: ir.Call) -> Wait | None:
    scope, *rest = call.args
    if not isinstance(scope, ir.Str):
        raise ir.UnsupportedIR("storage sync of a computed scope")
    if scope.value == "warp":
        return None  # printed as nothing
    if scope.value == "cluster":
        return cluster.sync(m)
    if scope.value not in ("shared", "shared.dyn"):
        raise ir.UnsupportedIR(f"storage sync of scope {scope.value}")
    number = m.uniform(rest[0], "barrier number") if rest else 0
    count = m.uniform(rest[1], "thread count of a barrier") if len(rest) > 1 else None
    return bar_sync(m, number, count)


def bar_sync(m: "Values", number: int, count: int | None) -> Wait | None:
    """Arrive at a hardware barrier and wait for it; `count` None: all threads of the block."""
    block, (_, threads) = m.block, m.active
    barrier = _named(m, number)
    generation = barrier.generation
    barrier.arrive(block, threads, count, waits=True)
    if barrier.generation > generation:
        return None
    text = f"barrier {number} ({barrier.count} threads)"
    return Wait("barrier", text, lambda: barrier.generation > generation, target=barrier)


def _named(m: "Values", number: int) -> NamedBarrier:
    if not 0 <= number < NAMED_BARRIERS:
        raise m.block.fault(errors.OutOfBoundsError, f"barrier {number} of {NAMED_BARRIERS}", m.active[1])
    return m.block.named.setdefault(number, NamedBarrier(number))


def _named_arrive(m: "Values", group: Group, call: ir.Call) -> None:
    number = m.uniform(call.args[0], "barrier number")
    count = m.uniform(call.args[1], "thread count of a barrier")
    _named(m, number).arrive(m.block, m.active[1], count, waits=False)


def _sync_warp(m: "Values", group: Group, call: ir.Call) -> None:
    if call.args:
        mask = m.uniform(call.args[0], "mask of __syncwarp") & 0xFFFFFFFF
        if mask != 0xFFFFFFFF:
            raise ir.UnsupportedIR("__syncwarp of part of a warp")
    warp.synchronise(m)


def _sync_grid(m: "Values", group: Group, call: ir.Call) -> Wait | None:
    run, clocks, threads = m.block.run, m.block.clocks, m.active[1]
    run.grid_arrived += len(threads)
    epoch = run.epoch
    if run.shares_clocks:
        run.grid_rows[epoch] = clocks.join(run.grid_rows.get(epoch), clocks.release(threads))
    if run.grid_arrived == run.grid_threads:
        run.grid_arrived = 0
        run.epoch += 1

    def finish() -> None:
        if run.shares_clocks:
            clocks.acquire(threads, run.grid_rows[epoch])

    return Wait("barrier", "the grid's barrier", lambda: run.epoch > epoch, finish, target="grid")


# --------------------------------------------------------------------------- mbarriers
def _init(m: "Values", group: Group, call: ir.Call) -> None:
    count = m.uniform(call.args[1], "arrival count")
    for barrier, threads in m.block.barrier(call.args[0]):
        barrier.init(m.block, threads, count)


def _fence_init(m: "Values", group: Group, call: ir.Call) -> None:
    """Make the initialisations that these threads made visible to the async proxy."""
    _, threads = m.active
    for barrier in m.block.mbarriers.values():
        if barrier.initialiser is not None and barrier.initialiser[0] in threads:
            barrier.is_fenced = True


def _arrive(m: "Values", group: Group, call: ir.Call) -> None:
    for barrier, threads in m.block.barrier(call.args[0]):
        barrier.check_visible(m.block, threads, is_async=False)
        m.block.note_landing(barrier, threads, barrier.phase, m.block.statement)
        barrier.arrive(m.block, threads, m.block.clocks.release(threads))


def _arrive_expect(m: "Values", group: Group, call: ir.Call) -> None:
    if len(call.args) != 2:
        cluster.arrive_expecting(m, call)
        return
    size = m.uniform(call.args[1], "transaction bytes")
    for barrier, threads in m.block.barrier(call.args[0]):
        barrier.check_visible(m.block, threads, is_async=False)
        barrier.expect(m.block, size * len(threads), threads)
        m.block.note_landing(barrier, threads, barrier.phase, m.block.statement)
        barrier.arrive(m.block, threads, m.block.clocks.release(threads))


def _expect(m: "Values", group: Group, call: ir.Call) -> None:
    size = m.uniform(call.args[1], "transaction bytes")
    for barrier, threads in m.block.barrier(call.args[0]):
        barrier.check_visible(m.block, threads, is_async=False)
        barrier.expect(m.block, size * len(threads), threads)


def _wait_parity(m: "Values", group: Group, call: ir.Call) -> Wait | None:
    parity = m.lanes_of(m.evaluate(call.args[1])) & 1
    waits: list[tuple[Mbarrier, np.ndarray, int]] = []
    position = {int(t): k for k, t in enumerate(m.active[1])}
    for barrier, threads in m.block.barrier(call.args[0]):
        barrier.check_visible(m.block, threads, is_async=False)
        mine = parity[[position[int(t)] for t in threads]]
        for value in np.unique(mine).tolist():
            waits.append((barrier, threads[mine == value], value))

    statement = m.block.statement

    def finish() -> None:
        for barrier, threads, _ in waits:
            m.block.note_landing(barrier, threads, barrier.phase, statement)
            if barrier.done is not None:
                m.block.clocks.acquire(threads, barrier.done)

    def ready() -> bool:
        return all(barrier.has_passed(value) for barrier, _, value in waits)

    text = ", ".join(f"parity {value} of {barrier.name}" for barrier, _, value in waits)
    return Wait("mbarrier", text, ready, finish, target=[b for b, _, _ in waits])


# --------------------------------------------------------------------------- the rest
def _fence_proxy(m: "Values", group: Group, call: ir.Call) -> None:
    m.block.clocks.fence(m.active[1])


def _max_nreg(m: "Values", group: Group, call: ir.Call) -> None:
    """Check setmaxnreg's operand; that all warps of the warpgroup execute it is in the log."""
    registers = m.uniform(call.args[0], "register count")
    legal = _SETMAXNREG_LEAST <= registers <= _SETMAXNREG_MOST and registers % _SETMAXNREG_STEP == 0
    if not legal:
        raise m.block.fault(errors.LaunchError, f"setmaxnreg of {registers} registers", m.active[1])
    wgmma.log(m, ("setmaxnreg", registers))


def _nothing(m: "Values", group: Group, call: ir.Call) -> None:
    return


def _assert(m: "Values", group: Group, call: ir.Call) -> None:
    cond = m.evaluate(call.args[0])
    bad = m.lanes_of(cond) == 0
    if bad.any():
        text = "device assertion fails"
        if len(call.args) > 1 and isinstance(call.args[1], ir.Str):
            text += f": {call.args[1].value}"
        raise m.block.fault(errors.DeviceError, text, m.active[1][bad])


_EFFECTS: dict[str, Effect] = {
    "tvm_storage_sync": _storage_sync,
    "named_barrier_arrive": _named_arrive,
    "sync_warp": _sync_warp,
    "sync_grid": _sync_grid,
    "ptx_init_barrier_thread_count": _init,
    "ptx_fence_barrier_init": _fence_init,
    "ptx_arrive_barrier": _arrive,
    "ptx_arrive_barrier_expect_tx": _arrive_expect,
    "mbarrier_expect_tx": _expect,
    "mbarrier_wait_parity": _wait_parity,
    "fence_proxy_async": _fence_proxy,
    "set_max_nreg": _max_nreg,
    "device_assert": _assert,
    "device_assert_with_msg": _assert,
    **dict.fromkeys(
        (
            "no_set_max_nreg", "annotate_producer_reg_dealloc", "annotate_consumer_reg_alloc",
            "prefetch_tma_descriptor", "pdl_trigger", "pdl_sync",
        ),
        _nothing,
    ),
    **cluster.EFFECTS,
    **async_copy.EFFECTS,
    **tma.EFFECTS,
    **wgmma.EFFECTS,
    **warp.EFFECTS,
    **atomics.EFFECTS,
    **mma.EFFECTS,
    **extern.EFFECTS,
}  # fmt: skip
