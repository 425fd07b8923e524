"""Shipped kernels run clean under several policies and compute what the tile level computes.

Bit for bit, on data whose sums are exact; sums that no rounding of the data makes exact, within the bound
that the kernel's reference derives from the order of its additions (`KernelSpec.tolerance`): each level is
that near to the exact result.
"""

import math
from collections import defaultdict
from functools import cache

import pytest
import torch

import dsv4_kernels
from bench import outputs
from dsv4_kernels import runtime
from tests.verify.device import ring
from verify import interp
from verify.interp import device
from verify.interp.device import api as device_api
from verify.mutate.instances import get, instances

WARPGROUP = 128
_LEAST_RUNS = 2  # of each kernel
# The cut of the keys is not a Config's; 50,000 counts of one score each; bodies that run for bf16 outputs.
_ONCE = (
    "hca_chunks",
    "hca_fold_fp8",
    "hca_groups",
    "hca_join",
    "hca_join_fp8",
    "sparse_decode_fp8",
    "sparse_parts",
    "topk",
)
_LONG = ("topk",)  # 20,000 steps a block: of several the first and the last run, for their faults
# Sizes in the place of those of the least cases: that of three positions is a model's, of 64 requests.
_LESS = {"index_logits_fp4": {"m": 2, "num_pages": 3}}
# Sums of exponentials, and of products with scales of any value.
_NEVER_EXACT = (
    "sparse_prefill_fp8",
    "hca_chunks",
    "hca_fold",
    "hca_fold_fp8",
    "hca_groups",
    "hca_join",
    "hca_join_fp8",
    "hca_prefill",
    "index_logits",
    "index_logits_fp4",
    "index_logits_fp4_dense",
    "index_logits_paged",
    "sparse_decode",
    "sparse_decode_fp8",
    "sparse_parts",
    "sparse_prefill",
)


@cache
def stages(instance_id):
    """Return the stages of a registered kernel at its small dims."""
    instance = get(instance_id)
    return instance.extract()


def agrees(extracted, tensors, outputs=None, **options):
    """Run at both levels; `outputs` are positions of the tensors to compare, None for all."""
    mine = [t.clone() for t in tensors]
    theirs = [t.clone() for t in tensors]
    summary = device.run(extracted, *mine, **options)
    interp.run_function(extracted.tile, tuple(theirs))
    for k in range(len(mine)) if outputs is None else outputs:
        assert torch.equal(mine[k].view(torch.uint8), theirs[k].view(torch.uint8))
    return summary


def _runs():
    """Return (instance, policy): each variant of a kernel under another policy, each kernel twice."""
    by_kernel = defaultdict(list)
    for instance in instances():
        by_kernel[instance.spec.name].append(instance.id)
    policies = list(device.POLICIES)
    found = []
    for name, ids in by_kernel.items():
        for k in range(1 if name in _ONCE else max(len(ids), _LEAST_RUNS)):
            found.append((ids[k % len(ids)], policies[k % len(policies)]))
    return found


def _exact(instance, tensors):
    """Round bf16 data of kernels that add: sums of small integers are exact, so their order does not show."""
    if instance.spec.tolerance is None:
        return tensors
    return [t.round() if t.dtype == torch.bfloat16 else t for t in tensors]


@pytest.mark.parametrize(("instance_id", "policy"), _runs())
def test_both_levels_agree(instance_id, policy):
    """The smallest shape of the registry's cases, whose last tile is ragged."""
    instance = get(instance_id)
    options = {"policy": policy, "seed": 1, "wave_threads": WARPGROUP}
    if instance.spec.name in _NEVER_EXACT:
        assert _distance(instance, **options) <= 1
        return
    args = _exact(instance, next(instance.arguments(1)))
    launched = device_api.launched(stages(instance_id), *args, **options)
    blocks = math.prod(launched.grid)
    if instance.spec.name in _LONG and blocks > 1:
        launched.execute([0, blocks - 1])
    else:
        agrees(stages(instance_id), args, **options)


def _inputs(instance):
    """Return inputs of the smallest case with a query."""
    dims = next(d for d in instance.shapes() if d["m"]) | _LESS.get(instance.spec.name, {})
    return instance.spec.make_inputs(dims, torch.device("cpu"), 1)


def _distance(instance, **options):
    """Return how far the levels are apart on a kernel's own random data, in units of the bound on that."""
    spec = instance.spec
    inputs = _inputs(instance)

    def launch(
        make_kernel, kwargs, args
    ):  # of few rows the dispatcher may choose a variant with the same bits
        device.run(stages(instance.id), *args, **options)

    with dsv4_kernels.backend("interpret"):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(runtime, "launch", launch)
            mine = outputs.as_tuple(spec.fn(*inputs))
        theirs = outputs.interpreted(spec, inputs)
    assert not any(torch.equal(a, torch.zeros_like(a)) for a in mine)
    return outputs.deviation(spec, inputs, mine, theirs)


def test_a_level_that_is_off_is_beyond_the_bound():
    instance = get("sparse_prefill/h8")
    inputs = _inputs(instance)
    want = outputs.interpreted(instance.spec, inputs)
    assert outputs.deviation(instance.spec, inputs, want, want) == 0
    first = want[0].double()
    off = (first + first.abs().max() / 64).to(want[0].dtype)  # a few units of bf16
    assert outputs.deviation(instance.spec, inputs, (off, *want[1:]), want) > 1


@pytest.mark.parametrize("instance_id", ["act_quant/b32", "fp4_quant/b32"])
def test_special_values(instance_id):
    instance = get(instance_id)
    x, *outputs = next(instance.arguments(2))
    patterns = torch.tensor(
        [0, 0x8000, 1, 0x7F, 0x80, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0, 0x7F81], dtype=torch.int32
    )
    halves = x.view(torch.int16)
    halves.view(-1)[: len(patterns)] = patterns.to(torch.int16)
    agrees(stages(instance_id), (x, *outputs), policy="random", seed=2)


@pytest.mark.parametrize("policy", list(device.POLICIES))
def test_warp_by_warp(policy):
    agrees(ring.ring(), ring.inputs(), policy=policy, seed=2)


def test_explore():
    runs = device.explore(ring.ring(), *ring.inputs(), seeds=1, wave_threads=WARPGROUP)
    assert [r.policy for r in runs] == list(device.POLICIES)
