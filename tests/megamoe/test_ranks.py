"""The fused kernel over processes that share memory: one GPU each, and on one GPU for its code alone."""

import os
import pickle
import signal
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.multiprocessing.spawn import spawn

from megamoe import MegaMoE
from megamoe.layer import config_for, one_of
from megamoe.virtual import WatchdogError
from tests.megamoe import compiled, layers

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
TOKENS = 16  # most of a rank
REPEATS = 20
# Tokens of ranks in turn, share of masked slots, and how uneven the routing is.
CASES = (
    ((5, 16, 3, 8), 0.2, 1.0),
    ((7, 0, 1, 12), 0.0, 1.0),
    ((0, 0, 0, 0), 0.0, 1.0),
    ((16, 8, 0, 4), 0.1, 12.0),
)
DISPATCHERS = {"dispatchers": True, "wave_experts": 2}  # more than one wave, so that they have work
LOST_S = 4.0  # until a rank that waits 2 s says that its peer is lost
SAME_GPU = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
TIMEOUT_S, LIMIT_S = 60.0, 2.0  # of a wait; where a rank is killed


def configs_of(ranks, sizes=(TOKENS, 8), timeout_s=TIMEOUT_S, has_options=False):
    """Return the kernels of the ranks' layers."""
    count = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 132
    found = []
    for size in sizes:
        one = config_for(
            size,
            topk=layers.TOPK,
            hidden=layers.HIDDEN,
            inter=layers.INTER,
            num_experts=layers.EXPERTS // ranks,
            clamp=10.0,
            multiprocessors=count,
            shared=has_options,
            ranks=ranks,
        )
        changes = DISPATCHERS if has_options else {}
        found += [replace(one_of(one, ranks, rank, timeout_s), **changes) for rank in range(ranks)]
    return found


def work_of(ranks, has_options=False):
    """Return what `check_ranks` compiles."""
    sizes = (TOKENS,) if has_options else (TOKENS, 8)
    found = compiled.kernels(configs_of(ranks, sizes, has_options=has_options))
    found += compiled.products(TOKENS * ranks)
    return found + (compiled.products(TOKENS * ranks, fp8=True) if has_options else [])


def work_of_lost(ranks, limit_s=LIMIT_S):
    """Return what `check_lost` compiles."""
    return compiled.kernels(configs_of(ranks, (TOKENS,), limit_s))


def _inputs(case, ranks):
    counts, masked, skew = CASES[case]
    return [layers.tokens(counts[r % len(counts)], 10 * case + r, masked, skew) for r in range(ranks)]


def _start(rank, ranks, folder, one_gpu):
    if one_gpu:
        os.environ[SAME_GPU] = "1"
    torch.cuda.set_device(0 if one_gpu else rank)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", meet, timedelta(minutes=5), rank=rank, world_size=ranks)


def _layer(rank, ranks, timeout_s=TIMEOUT_S, shared=None):
    l1, l2 = (layers.share(raw, rank, ranks) for raw in layers.both())
    sizes = {"num_experts": layers.EXPERTS, "topk": layers.TOPK, "max_tokens": TOKENS, "shared": shared}
    options = {**sizes, "backend": "fused", "count_received": True, "timeout_s": timeout_s}
    return MegaMoE(l1, l2, **options).cuda()  # pyright: ignore[reportArgumentType]


def _shared(has_options):
    return layers.both_fp8(5, experts=1) if has_options else None


def _work(rank, ranks, folder, one_gpu, has_options):
    _start(rank, ranks, folder, one_gpu)
    moe = _layer(rank, ranks, shared=_shared(has_options))
    if has_options:
        moe.fused.changes = DISPATCHERS
    outputs = []
    for case in range(len(CASES)):
        mine = [t.cuda() for t in _inputs(case, ranks)[rank]]
        sizes = (TOKENS, 8) if max(CASES[case][0]) <= 8 and not has_options else (TOKENS,)
        found = [moe(*mine, most_tokens=most).cpu() for most in sizes for _ in range(REPEATS)]
        assert all(torch.equal(y.view(torch.int16), found[0].view(torch.int16)) for y in found)
        outputs.append(found[0])
    mine = [t.cuda() for t in _inputs(0, ranks)[rank]]
    graph, fixed = torch.cuda.CUDAGraph(), [t.clone() for t in mine]
    raw = [fixed[0], fixed[1].int(), fixed[2]]
    moe.bad_routing = "mask"  # checks on the device alone
    dist.barrier()
    with torch.cuda.graph(graph):
        y = moe(*raw)
    for _ in range(REPEATS):
        graph.replay()
    moe.check()
    assert torch.equal(y.cpu().view(torch.int16), outputs[0].view(torch.int16))
    assert moe.received is not None
    torch.save((outputs, moe.received.cpu()), os.path.join(folder, f"{rank}.pt"))
    _keep_configs(moe, rank, folder)
    dist.barrier()
    moe.fused.close()
    dist.destroy_process_group()


def _keep_configs(moe, rank, folder):
    """Write down which kernels ran, for `_configs`."""
    sizes = [sized.ranks.config for sized in moe.fused._sizes.values()]
    Path(folder, f"{rank}.configs").write_bytes(pickle.dumps(sizes))


def _configs(folder):
    return [c for path in sorted(Path(folder).glob("*.configs")) for c in pickle.loads(path.read_bytes())]


def check_ranks(ranks, *, one_gpu, has_options=False):
    """Hold ranks against one process with all experts; return the ranks' kernels."""
    compiled.side_by_side(work_of(ranks, has_options))
    sizes: dict[str, Any] = {"num_experts": layers.EXPERTS, "topk": layers.TOPK, "max_tokens": TOKENS * ranks}
    alone = MegaMoE(*layers.both(), **sizes, shared=_shared(has_options)).cuda()
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, (ranks, folder, one_gpu, has_options), nprocs=ranks)
        saved = [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(ranks)]
        configs = _configs(folder)
    for case in range(len(CASES)):
        everything = [torch.cat(parts).cuda() for parts in zip(*_inputs(case, ranks), strict=True)]
        got = torch.cat([outputs[case] for outputs, _ in saved])
        assert torch.equal(got.view(torch.int16), alone(*everything).cpu().view(torch.int16)), CASES[case]
    return configs


def _lose(rank, ranks, folder, one_gpu, limit_s):
    _start(rank, ranks, folder, one_gpu)
    moe = _layer(rank, ranks, limit_s)
    mine = [t.cuda() for t in _inputs(0, ranks)[rank]]
    moe(*mine)
    moe.check()
    Path(folder, f"{rank}.ready").touch()
    with pytest.raises(WatchdogError, match=rf"rank {rank} gave up in .*: waiting for rank {ranks - 1}"):
        _call_until_an_error(moe, mine, os.path.join(folder, f"{rank}.began"))
    took_s = time.time() - os.path.getmtime(os.path.join(folder, f"{rank}.began"))
    Path(folder, f"{rank}.took").write_text(str(took_s))
    _keep_configs(moe, rank, folder)
    assert torch.ones(2, device="cuda").sum().item() == 2  # the context lives
    os._exit(0)


def _call_until_an_error(moe, mine, begun):
    """Call again and again; the file's time is that of the last call."""
    while True:
        open(begun, "w").close()
        moe(*mine)
        moe.check()


def check_lost(ranks=2, *, one_gpu, limit_s=LIMIT_S):
    """Kill the last rank among its calls; return how long the others took to report it, and their kernels."""
    compiled.side_by_side(work_of_lost(ranks, limit_s))
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        args = [(rank, ranks, folder, one_gpu, limit_s) for rank in range(ranks)]
        processes = [context.Process(target=_lose, args=a) for a in args]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 300
        while len(list(Path(folder).glob("*.ready"))) < ranks:
            assert all(process.is_alive() for process in processes)
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
        *keepers, lost = processes
        assert lost.pid is not None
        os.kill(lost.pid, signal.SIGKILL)
        for keeper in keepers:
            keeper.join(60)
        assert [keeper.exitcode for keeper in keepers] == [0] * len(keepers)
        took = [float(path.read_text()) for path in Path(folder).glob("*.took")]
        assert len(took) == len(keepers)
        return max(took), _configs(folder)


@pytest.fixture
def record_all(layer_record):
    """Return a function that records a test of each rank's kernels: (configs, test, passed)."""

    def record(configs, test, passed):
        for c in configs:
            variant = f"rank {c.first_rank} of {c.num_ranks}, {c.tokens} tokens" + ", shared" * c.shared
            layer_record(c, variant, test, passed)

    return record


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_with_a_gpu_each(ranks, record_all):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"requires {ranks} GPUs")
    record_all(check_ranks(ranks, one_gpu=False), f"ranks, {ranks} GPUs", True)


def test_a_shared_expert_and_dispatchers_with_a_gpu_each(record_all):
    if torch.cuda.device_count() < 2:
        pytest.skip("requires 2 GPUs")
    record_all(check_ranks(2, one_gpu=False, has_options=True), "ranks, 2 GPUs", True)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_killed_rank_is_an_error_that_names_it(ranks, record_all):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"requires {ranks} GPUs")
    took_s, configs = check_lost(ranks, one_gpu=False)
    record_all(configs, f"ranks, {ranks} GPUs, one killed: an error after {took_s:.1f} s", took_s < LOST_S)
    assert took_s < LOST_S


def test_two_processes_on_one_gpu(record_all):
    """The GPU switches between the processes, whose kernels wait for each other all the same."""
    record_all(check_ranks(2, one_gpu=True), "ranks, one GPU", True)
