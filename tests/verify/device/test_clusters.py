"""Clusters: multicast, arrivals at another block's mbarriers, the cluster's barrier, and a block's end."""

from dataclasses import replace

import pytest
import torch

from tests.verify.device import build as b
from tests.verify.device import cluster_ring as ring
from tests.verify.device.build import (
    BX,
    TX,
    buffer,
    call,
    edit,
    ints,
    is_call,
    load,
    op,
    store,
    value_of,
    when,
)
from verify import ir
from verify.interp import device

N = 64
NOBODY = -1
ALL = tuple(device.POLICIES)
SYNC = call("cluster_sync")
RANK = value_of("block_rank_in_cluster", "int32")
RACES = device.DataRaceError, device.UninitialisedReadError


# --------------------------------------------------------------------------- a product by multicast
def run(extracted, policy="late"):
    tensors = ring.inputs()
    device.run(extracted, *tensors, policy=policy, seed=1, wave_threads=128)
    return tensors


@pytest.mark.parametrize("policy", ALL)
def test_both_blocks_get_the_shared_operand(policy):
    x, w, out = run(ring.ring(), policy)
    assert torch.equal(out, x.float() @ w.float().T)


def without_last(name):
    """Drop the last call of a name."""
    count = sum(is_call(n, name) for n in ir.walk(ring.ring().device.body))
    return nth(name, count - 1, lambda node: None)


def nth(name, number, change):
    """Change the call of `name` with that number in program order."""
    seen = iter(range(1 << 20))

    def apply(node):
        return change(node) if is_call(node, name) and next(seen) == number else node

    return edit(ring.ring(), apply)


def argument(position, value):
    """Put another argument into a call."""

    def change(node):
        args = list(node.value.args)
        args[position] = value if isinstance(value, ir.Expr) else ir.Const(args[position].dtype, value)
        return replace(node, value=replace(node.value, args=tuple(args)))

    return change


def everywhere(node):
    """Let every block start the multicast."""
    found = [n for n in ir.walk(node) if is_call(n, "tma_load_multicast")]
    return (
        found[0] if isinstance(node, ir.If) and found and is_call(node.then, "tma_load_multicast") else node
    )


def in_block(node):
    """Let threads meet their own block only, once mbarriers are initialised."""
    return b.sync() if is_call(node, "tvm_storage_sync") else node


PLANTED = {
    "released in the own block only": (
        lambda: nth("ptx_arrive_cluster_barrier", 0, argument(1, RANK)),
        RACES,
    ),
    "released in the first block only": (
        lambda: nth("ptx_arrive_cluster_barrier", 0, argument(1, 0)),
        (*RACES, device.ArrivalError, device.DeadlockError, device.TransactionError),
    ),
    "released nowhere": (
        lambda: nth("ptx_arrive_cluster_barrier", 0, lambda node: None),
        (device.DeadlockError, device.TransactionError),
    ),
    "released in a block that is not there": (
        lambda: nth("ptx_arrive_cluster_barrier", 0, argument(1, ring.SIZE)),
        (device.ClusterRankError,),
    ),
    "released before the product": (lambda: edit(ring.ring(), early), RACES),
    "arrivals of one block complete a phase": (
        lambda: nth("ptx_init_barrier_thread_count", 2, argument(1, ring.CONSUMERS // ring.WARP)),
        (*RACES, device.ArrivalError),
    ),
    "multicast to the first block only": (
        lambda: nth("tma_load_multicast", 0, argument(3, 1)),
        (device.TransactionError,),
    ),
    "multicast to the second block only": (
        lambda: nth("tma_load_multicast", 0, argument(3, 2)),
        (device.TransactionError,),
    ),
    "multicast to a block that is not there": (
        lambda: nth("tma_load_multicast", 0, argument(3, 7)),
        (device.ClusterRankError,),
    ),
    "multicast to no block": (
        lambda: nth("tma_load_multicast", 0, argument(3, 0)),
        (device.ClusterRankError,),
    ),
    "both blocks multicast": (lambda: edit(ring.ring(), everywhere), (*RACES, device.TransactionError)),
    "too few bytes expected": (
        lambda: nth("mbarrier_expect_tx", 0, argument(1, ring.A_BYTES // 2)),
        (device.TransactionError,),
    ),
    "too many bytes expected": (
        lambda: nth("mbarrier_expect_tx", 0, argument(1, 2 * ring.A_BYTES)),
        (device.TransactionError,),
    ),
    "a block ends while the other releases stages": (
        lambda: without_last("cluster_sync"),
        (device.ClusterLifetimeError,),
    ),
    "only the block meets after the initialisation": (
        lambda: edit(ring.ring(), in_block),
        (device.BarrierInitError,),
    ),
}


def early(node):
    """Let consumers release a stage where its product begins."""
    if isinstance(node, ir.For) and any(is_call(n, "ptx_wgmma_ss") for n in ir.walk(node)):
        releases = [
            n for n in ir.walk(node) if isinstance(n, ir.If) and is_call(n.then, "ptx_arrive_cluster_barrier")
        ]
        waits = [n for n in ir.walk(node) if is_call(n, "mbarrier_wait_parity")]
        rest = b.rewrite(node.body, lambda n: None if n in releases or n in waits else n)
        return replace(node, body=ir.Seq(None, (*waits, *releases, rest)))
    return node


@pytest.mark.parametrize("name", PLANTED)
def test_planted(name):
    make, kinds = PLANTED[name]
    edited = make()
    for policy in ("late", "behind"):
        with pytest.raises(kinds):
            run(edited, policy)


def test_what_the_compiler_specialises_by_itself_is_wrong():
    """TileLang 0.1.15: blocks do not wait for each other's mbarriers, stages or end (docs/clusters.md)."""
    for policy in ("late", "random"):
        with pytest.raises(device.BarrierInitError):
            run(ring.specialised(), policy)


# --------------------------------------------------------------------------- the cluster's barrier
def shift(*between, blocks=2, cluster=(2, 1, 1), reader=1):
    """Block 0 writes global memory, and after `between` another copies it."""
    data, out = buffer("data", "int32", N, "global"), buffer("out", "int32", N, "global")
    body = [
        when(op("eq", BX, 0), store(data, TX, b.add(TX, 1))),
        *between,
        when(op("eq", BX, reader), store(out, TX, load(data, TX))),
    ]
    return b.Kernel(threads=N, blocks=blocks, tensors=[data, out], body=body, cluster=cluster)


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize(
    "between",
    [
        (SYNC,),
        (call("cluster_arrive"), call("cluster_wait")),
        (call("tvm_storage_sync", "cluster"),),
        (SYNC, call("cluster_arrive_relaxed"), call("cluster_wait")),
    ],
    ids=["sync", "parts", "storage", "twice"],
)
def test_the_barrier_orders_blocks(policy, between):
    out = ints(N)
    shift(*between).run(ints(N), out, policy=policy, seed=1)
    assert torch.equal(out, torch.arange(1, N + 1, dtype=torch.int32))


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize(
    ("between", "options", "kind"),
    [
        ((), {}, device.DataRaceError),
        ((b.sync(),), {}, device.DataRaceError),
        ((call("cluster_arrive_relaxed"), call("cluster_wait")), {}, device.DataRaceError),
        ((call("cluster_arrive"),), {}, device.DataRaceError),
        ((call("cluster_arrive"), call("cluster_arrive")), {}, device.BarrierDivergenceError),
        ((call("cluster_wait"),), {}, device.BarrierDivergenceError),
        ((when(op("lt", TX, 32), SYNC),), {"reader": NOBODY}, device.BarrierDivergenceError),
        ((when(op("lt", TX, 16), SYNC),), {"reader": NOBODY}, device.BarrierDivergenceError),
        ((when(op("eq", RANK, 0), SYNC),), {"reader": NOBODY}, device.BarrierDivergenceError),
        ((SYNC,), {"blocks": 3}, device.LaunchError),
        ((SYNC,), {"blocks": 16, "cluster": (16, 1, 1)}, device.LaunchError),
    ],
)
def test_planted_at_the_barrier(policy, between, options, kind):
    with pytest.raises(kind):
        shift(*between, **options).run(ints(N), ints(N), policy=policy, seed=1)


def test_clusters_do_not_know_of_each_other():
    """The barrier is of one cluster: the block that reads is in the next."""
    with pytest.raises(device.DataRaceError):
        shift(SYNC, blocks=4, reader=3).run(ints(N), ints(N), seed=1)


def test_ranks_count_x_first():
    out = buffer("out", "int32", 8, "global")
    kernel = b.Kernel(
        threads=32,
        blocks=8,
        tensors=[out],
        cluster=(4, 1, 1),
        body=[when(op("eq", TX, 0), store(out, BX, RANK))],
    )
    found = ints(8)
    kernel.run(found)
    assert found.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


# --------------------------------------------------------------------------- arrivals elsewhere
BAR = buffer("bar", "uint64", 1, "shared.barrier")


def handover(*, init=SYNC, arrive=None, wait_first=(), last=SYNC, count=N):
    """Rank 0 writes global memory and arrives at the mbarrier of rank 1, which waits and copies."""
    data, out = buffer("data", "int32", N, "global"), buffer("out", "int32", N, "global")
    arrive = arrive or call("ptx_arrive_cluster_barrier", load(BAR, 0), 1)
    body = [
        when(op("eq", TX, 0), call("ptx_init_barrier_thread_count", load(BAR, 0), count)),
        call("ptx_fence_barrier_init"),
        init,
        when(
            op("eq", RANK, 0),
            store(data, TX, b.add(TX, 1)),
            arrive,
            other=(
                *wait_first,
                call("mbarrier_wait_parity", load(BAR, 0), 0),
                store(out, TX, load(data, TX)),
            ),
        ),
        last,
    ]
    return b.Kernel(threads=N, blocks=2, tensors=[data, out], allocs=[BAR], body=body, cluster=(2, 1, 1))


@pytest.mark.parametrize("policy", ALL)
def test_an_arrival_elsewhere_passes_on_what_is_known(policy):
    out = ints(N)
    handover(last=b.sync()).run(ints(N), out, policy=policy, seed=1)
    assert torch.equal(out, torch.arange(1, N + 1, dtype=torch.int32))


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"init": b.sync()}, device.BarrierInitError),
        ({"arrive": call("ptx_arrive_cluster_barrier", load(BAR, 0), 2)}, device.ClusterRankError),
        ({"arrive": call("ptx_arrive_cluster_barrier", load(BAR, 0), -1)}, device.ClusterRankError),
        ({"arrive": call("ptx_arrive_cluster_barrier", load(BAR, 0), 0)}, device.DeadlockError),
        ({"count": N - 1}, device.ArrivalError),
        ({"arrive": call("ptx_arrive_barrier_expect_tx", load(BAR, 0), 16, 1, 1)}, device.TransactionError),
        ({"wait_first": (call("thread_return"),), "last": b.sync()}, device.ClusterLifetimeError),
    ],
    ids=["init", "rank", "negative", "own", "count", "bytes", "exit"],
)
def test_planted_at_an_arrival(policy, options, kind):
    with pytest.raises(kind):
        handover(**options).run(ints(N), ints(N), policy=policy, seed=1)


# --------------------------------------------------------------------------- data elsewhere
@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("bulk", [True, False], ids=["bulk", "elements"])
def test_blocks_exchange_their_tiles(policy, bulk):
    x, out = torch.randn(2, ring.EXCHANGED), torch.zeros(2, ring.EXCHANGED)
    device.run(ring.exchange(bulk), x, out, policy=policy, seed=1)
    assert torch.equal(out, x.flip(0))


def exchanged(bulk, name, number, change):
    """Change one call of the exchange."""
    seen = iter(range(1 << 20))
    return edit(ring.exchange(bulk), lambda n: change(n) if is_call(n, name) and next(seen) == number else n)


EXCHANGES = {
    "no wait for the bytes": (True, "mbarrier_wait_parity", 0, lambda n: None, RACES),
    "fewer bytes": (True, "tma_store_cluster", 0, argument(3, 64), (*RACES, device.UninitialisedReadError)),
    "ends before its tile was read": (
        True,
        "cluster_sync",
        0,
        lambda n: None,
        (device.ClusterLifetimeError,),
    ),
    "the other may not have started": (
        False,
        "cluster_sync",
        0,
        lambda n: None,
        (device.ClusterLifetimeError,),
    ),
    "no barrier before the read": (
        False,
        "cluster_sync",
        1,
        lambda n: None,
        (*RACES, device.ClusterLifetimeError),
    ),
    "an index beyond the tile": (
        False,
        "ptx_cluster_store",
        0,
        argument(3, b.add(ring.EXCHANGED, 0)),
        (device.OutOfBoundsError,),
    ),
    "a rank beyond the cluster": (False, "ptx_cluster_store", 0, argument(2, 2), (device.ClusterRankError,)),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_planted_in_an_exchange(name):
    bulk, op_name, number, change, kinds = EXCHANGES[name]
    edited = exchanged(bulk, op_name, number, change)
    for policy in ("late", "behind"):
        with pytest.raises(kinds):
            device.run(edited, torch.randn(2, ring.EXCHANGED), torch.zeros(2, ring.EXCHANGED), policy=policy)
