"""Outputs of MegaMoE's kernels on a GPU, as rows like those of `bench.outputs`; they are not registered.

Cases are small launches of the kernels that `dsv4-verify megamoe/kernels.py` proves: two virtual ranks on one
GPU. Outputs are compared by their bits, with plain PyTorch where a row is made and with the interpreter
anywhere. That needs inputs on which nobody's products round, for the tensor core cuts what it adds to 13 bits
below the largest term:

- x holds integers up to X_MOST, linear 1's weights integers of few bits (e2m1 with scales of a row that span
  one bit, e4m3 up to E4M3_MOST): the magnitudes of 128 channels add up to less than 2^13 units;
- a row of linear 2's weights has one channel other than zero of each 128: there is nothing to add;
- scales are powers of two, and each rank's other sums are IEEE additions in a fixed order.

What is left is the exponential of the SwiGLU, whose last bits are the library's: `SEED` gives hidden states
that round to the same bf16 with any exponential within 3 ulps. `tests/megamoe/test_outputs.py` asks for all
of this.
"""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any

import torch

from bench.outputs import Outputs, digest
from bench.status import OUTPUTS_PREFIX
from dsv4_kernels.quant.reference import act_quant
from megamoe import fused, instances, lowering, plan_kernel, proofs, stage_kernel
from megamoe.config import Config
from megamoe.experts import Experts
from megamoe.launches import fused_arguments
from megamoe.reference import Fp8Experts, RawExperts, mega_moe
from megamoe.routing import with_shared
from megamoe.virtual import PASS_CONFIGS, VirtualRanks, compile_kernel, packed_experts
from megamoe.weights import Packed
from verify import interp
from verify.extract import Extracted, cuda_sha256, extract
from verify.interp import device

KERNEL = "mega_moe"  # of every row; the variant says which of its kernels
SEED = 4
X_MOST, E4M3_MOST = 2, 15
UNTOUCHED = 7  # what lies in the outputs of stage and plan before the call
STAGED = 7  # tokens of the call that is staged, of 10
_BLOCK = 128  # channels a scale of activations and e4m3 weights
_FP4_BLOCK = 32
# Biased exponents from one to before the other: a few gates are beyond the clamp.
_FP4_SCALES, _E4M3_SCALES = (123, 125), (121, 123)
# Of the interpreter, for values alone: other tests look at schedules, and for faults in them.
_VALUES: dict[str, Any] = {
    "wave_threads": 256,
    "checks": device.Checks(races=False, uninitialised=False, alignment=False, overflow=False),
}

Tensors = tuple[torch.Tensor, ...]
Weights = RawExperts | Fp8Experts


@dataclass(frozen=True)
class Case:
    """One launch of one kernel.

    Attributes:
        name: of the kernel, as in `megamoe.kernels`.
        config: of the kernel.
        make: the PrimFunc of a config.
        inputs: what the call is given, on the CPU.
        expected: the outputs by plain PyTorch.
        interpreted: those of the interpreter.
        on_gpu: those of a GPU, on the CPU.
    """

    name: str
    config: Config
    make: Callable[[Config], Any]
    inputs: Callable[[], Tensors]
    expected: Callable[[], Tensors]
    interpreted: Callable[[], Tensors]
    on_gpu: Callable[[], Tensors]

    def extracted(self) -> Extracted:
        """Return the kernel's IR and CUDA text."""
        return _extracted(self.config, self.make)


@cache
def _extracted(config: Config, make: Callable[[Config], Any]) -> Extracted:
    if make is fused.make_kernel:
        return proofs.extracted(config)  # seconds, and the proofs may have it already
    with lowering.as_launched():
        return extract(make(config), pass_configs=PASS_CONFIGS)


# --------------------------------------------------------------------------- stage
def _stage_inputs(c: Config) -> Tensors:
    generator = torch.Generator().manual_seed(SEED)
    routed, experts = c.topk - c.shared, c.num_ranks * (c.num_experts - c.shared)
    x = torch.randint(0, 256, (STAGED, c.hidden), generator=generator, dtype=torch.uint8)
    x_scale = torch.randint(0, 256, (STAGED, c.hidden // _BLOCK), generator=generator, dtype=torch.uint8)
    idx = torch.randint(-1, experts, (STAGED, routed), generator=generator, dtype=torch.int32)
    return x.view(torch.float8_e4m3fn), x_scale, idx, torch.rand(STAGED, routed, generator=generator)


def stage_parts(c: Config, at: torch.device | str = "cpu") -> Tensors:
    """Return rows, scales, experts and weights of all ranks before the call, as `staged` returns them."""
    rows = torch.full((c.num_ranks, c.x_rows, c.hidden), UNTOUCHED, dtype=torch.uint8, device=at)
    scales = torch.full(
        (c.num_ranks, c.scale_rows, c.hidden // _BLOCK), UNTOUCHED, dtype=torch.uint8, device=at
    )
    words = torch.full((c.num_ranks, c.routing_words), UNTOUCHED, dtype=torch.int32, device=at)
    return rows.view(torch.float8_e4m3fn), scales, words, words.float()


def staged(
    c: Config, x: torch.Tensor, x_scale: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor
) -> Tensors:
    """Return the parts of all ranks after a call of rank `c.first_rank`, by plain PyTorch.

    Args:
        c: of the kernel.
        x: [count, hidden] e4m3.
        x_scale: [count, hidden / 128] uint8.
        idx: [count, routed slots] int32 experts, numbered without the shared ones.
        weights: [count, routed slots] float32.

    Returns:
        rows [ranks, x_rows, hidden] e4m3, scales [ranks, scale_rows, hidden / 128] uint8, experts and weights
        [ranks, routing_words] int32 and float32; UNTOUCHED where the call writes nothing.
    """
    count, mine = len(x), slice(c.first_rank * c.tokens * c.topk, (c.first_rank + 1) * c.tokens * c.topk)
    rows, scales, words, factors = stage_parts(c)
    rows.view(torch.uint8)[c.first_rank, :count], scales[c.first_rank, :count] = x.view(torch.uint8), x_scale
    numbers = torch.full((c.tokens, c.topk), -1, dtype=torch.int32)
    own = factors[0, mine].view(c.tokens, c.topk).clone()
    if c.shared:
        local = c.num_experts - 1  # routed ones of a rank, behind its shared one
        numbers[:count, :-1] = torch.where(idx < 0, idx, idx + idx // local + 1)
        numbers[:count, -1] = c.first_rank * c.num_experts
        own[:count, :-1], own[:count, -1] = weights, 1.0
    else:
        numbers[:count], own[:count] = idx, weights
    words[:, mine], factors[:, mine] = numbers.flatten(), own.flatten()
    return rows, scales, words, factors


def _stage(name: str, c: Config) -> Case:
    def interpreted() -> Tensors:
        parts = stage_parts(c)
        interp.run(stage_kernel.make_kernel(c), *_stage_inputs(c), *parts)
        return parts

    def on_gpu() -> Tensors:
        parts = stage_parts(c, "cuda")
        compile_kernel(c, stage_kernel.make_kernel)(*(t.cuda() for t in _stage_inputs(c)), *parts)
        return tuple(t.cpu() for t in parts)

    return Case(
        name,
        c,
        stage_kernel.make_kernel,
        lambda: _stage_inputs(c),
        lambda: staged(c, *_stage_inputs(c)),
        interpreted,
        on_gpu,
    )


# --------------------------------------------------------------------------- plan
def _plan_inputs(c: Config) -> Tensors:
    """Return a routing [ranks, tokens, topk] with masked slots, and its weights."""
    generator = torch.Generator().manual_seed(SEED)
    routed, local = c.topk - c.shared, c.num_experts - c.shared
    scores = torch.rand(c.num_ranks, c.tokens, c.num_ranks * local, generator=generator)
    idx = scores.topk(routed, dim=-1).indices.int()
    idx[torch.rand(idx.shape, generator=generator) < 1 / 4] = -1
    weights = torch.rand(idx.shape, generator=generator)
    return with_shared(idx, weights, local) if c.shared else (idx, weights)


def _plan_buffers(c: Config, at: torch.device | str = "cpu") -> tuple[Tensors, Tensors]:
    """Return the plan's tensors, and the words by which ranks meet with the status behind them."""
    idx, weights = _plan_inputs(c)
    like = proofs.plan(idx, weights, c)
    plan = tuple(torch.full_like(t, UNTOUCHED, device=at) for t in vars(like).values())
    words = (c.signal_words, 1, c.status_words)
    return plan, tuple(torch.zeros(c.num_ranks, n, dtype=torch.int32, device=at) for n in words)


def _planned(c: Config) -> Tensors:
    """Return the plan of plain PyTorch, its places behind a rank's last block as the kernel leaves them."""
    idx, weights = _plan_inputs(c)
    found = proofs.plan(idx, weights, c)
    for rank, blocks in enumerate(found.firsts[:, -1].tolist()):
        found.block_expert[rank, blocks:] = UNTOUCHED
        for rows in (found.row_source, found.row_target, found.row_weight):
            rows[rank, blocks * c.block_m :] = UNTOUCHED
    return (*vars(found).values(), torch.zeros(c.num_ranks, c.status_words, dtype=torch.int32))


def _plan(name: str, c: Config) -> Case:
    def interpreted() -> Tensors:
        (plan, words), routing = _plan_buffers(c), (t.flatten() for t in _plan_inputs(c))
        kernel = _extracted(c, plan_kernel.make_kernel)
        device.run(kernel, *routing, *plan, *words, **_VALUES)
        return (*plan, words[-1])

    def on_gpu() -> Tensors:
        plan, words = _plan_buffers(c, "cuda")
        routing = (t.flatten().cuda() for t in _plan_inputs(c))
        compile_kernel(c, plan_kernel.make_kernel)(*routing, *plan, *words)
        return tuple(t.cpu() for t in (*plan, words[-1]))

    return Case(
        name, c, plan_kernel.make_kernel, lambda: _plan_inputs(c), lambda: _planned(c), interpreted, on_gpu
    )


# --------------------------------------------------------------------------- fused
@dataclass(frozen=True)
class Layer:
    """Tokens of all ranks, their routing and the weights of all experts.

    Attributes:
        x: [ranks * tokens, hidden] e4m3.
        x_scale: [ranks * tokens, hidden / 128] e8m0.
        topk_idx: [ranks * tokens, routed slots] int32, numbered without the shared experts; -1: none.
        topk_weights: of the same shape, float32.
        l1, l2: of all routed experts.
        shared: of the shared expert.
    """

    x: torch.Tensor
    x_scale: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    l1: Weights
    l2: Weights
    shared: tuple[Fp8Experts, Fp8Experts] | None

    def tensors(self) -> Tensors:
        """Return all tensors."""
        shared = () if self.shared is None else (*self.shared[0], *self.shared[1])
        return (self.x, self.x_scale, self.topk_idx, self.topk_weights, *self.l1, *self.l2, *shared)


def _one_of_each_block(experts: int, n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """Return a mask [experts, n, k]: one channel of each 128 a row, each channel as often as the others."""
    shape = (experts, 1, k // _BLOCK)
    step = 2 * torch.randint(0, _BLOCK // 2, shape, generator=generator) + 1  # odd: it meets all of them
    first = torch.randint(0, _BLOCK, shape, generator=generator)
    chosen = (first + step * torch.arange(n)[:, None]) % _BLOCK
    return (chosen[..., None] == torch.arange(_BLOCK)).flatten(2)


def _weights(experts: int, n: int, k: int, generator: torch.Generator, *, fp8: bool, sparse: bool) -> Weights:
    def scales(*shape: int) -> torch.Tensor:
        found = torch.randint(
            *(_E4M3_SCALES if fp8 else _FP4_SCALES), shape, generator=generator, dtype=torch.uint8
        )
        return found.view(torch.float8_e8m0fnu)

    mask = _one_of_each_block(experts, n, k, generator)
    if fp8:
        most = E4M3_MOST
        values = torch.randint(-most, most, (experts, n, k), generator=generator)
        values = torch.where(values < 0, values, values + 1)  # none is zero
        values = torch.where(mask, values, 0) if sparse else values
        return Fp8Experts(values.float().to(torch.float8_e4m3fn), scales(experts, n // _BLOCK, k // _BLOCK))
    magnitudes = torch.randint(1, 8, (experts, n, k), generator=generator, dtype=torch.uint8)
    codes = magnitudes + 8 * torch.randint(0, 2, magnitudes.shape, generator=generator, dtype=torch.uint8)
    if sparse:
        codes = torch.where(mask, codes, 0).to(torch.uint8)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return RawExperts(packed, scales(experts, n, k // _FP4_BLOCK))


def _routing(c: Config) -> torch.Tensor:
    """Return a routing of a block on each rank: rows of both ranks, tokens with two experts, one and none."""
    other, own = c.num_experts - c.shared, 1  # the first expert of rank 1, the second of rank 0
    idx = torch.full((c.num_ranks * c.tokens, c.topk - c.shared), -1, dtype=torch.int32)
    idx[: c.tokens, 0] = other
    idx[1 : c.tokens : 3, 1] = own
    idx[c.tokens, 1], idx[c.tokens + 1, 0] = own, own
    idx[c.tokens + 1, 1], idx[c.tokens + 3, 1] = other, other
    return idx


@cache
def layer(c: Config) -> Layer:
    """Return the inputs of a fused case."""
    generator = torch.Generator().manual_seed(SEED)
    local = c.num_experts - c.shared

    def both(experts: int, fp8: bool) -> tuple[Any, Any]:
        first = _weights(experts, 2 * c.inter, c.hidden, generator, fp8=fp8, sparse=False)
        return first, _weights(experts, c.hidden, c.inter, generator, fp8=fp8, sparse=True)

    idx = _routing(c)
    x = torch.randint(-X_MOST, X_MOST + 1, (len(idx), c.hidden), generator=generator).bfloat16()
    l1, l2 = both(c.num_ranks * local, c.fp8)
    return Layer(
        *act_quant(x, _BLOCK),
        idx,
        torch.rand(idx.shape, generator=generator),
        l1,
        l2,
        both(1, True) if c.shared else None,
    )


def _packed(c: Config, whole: Layer) -> Packed:
    local = c.num_experts - c.shared

    def share(weights: Weights, rank: int) -> Any:
        mine = slice(rank * local, (rank + 1) * local)
        scale = weights.w_scale.view(torch.uint8)[mine].view(torch.float8_e8m0fnu)
        return type(weights)(weights.w[mine], scale)

    ranks = [Experts(share(whole.l1, r), share(whole.l2, r), c.clamp) for r in range(c.num_ranks)]
    return packed_experts(ranks, None if whole.shared is None else Experts(*whole.shared, c.clamp))


def _by_rank(c: Config, whole: Layer) -> Tensors:
    """Return x, its scales, experts and weights rank by rank, the shared expert's slot among them."""
    shape = (c.num_ranks, c.tokens, -1)
    routing = whole.topk_idx.view(shape), whole.topk_weights.view(shape)
    if c.shared:
        routing = with_shared(*routing, c.num_experts - 1)
    return (whole.x.view(shape), whole.x_scale.view(torch.uint8).view(shape), *routing)


def _fused(name: str, c: Config) -> Case:
    def expected() -> Tensors:
        w = layer(c)
        y = mega_moe(w.x, w.x_scale, w.topk_idx, w.topk_weights, w.l1, w.l2, c.clamp, w.shared)
        return (y.view(c.num_ranks, c.tokens, c.hidden),)

    def interpreted() -> Tensors:
        x, x_scale, idx, weights = _by_rank(c, layer(c))
        plan = proofs.plan(idx, weights, c)
        arguments = fused_arguments(c, x, x_scale, idx, _packed(c, layer(c)), plan)
        device.run(_extracted(c, fused.make_kernel), *arguments, **_VALUES)
        assert not arguments[-2].any(), "a wait was given up"
        return (arguments[-1],)

    def on_gpu() -> Tensors:
        w = _packed(c, layer(c))
        ranks = VirtualRanks(c, Packed(w.words.cuda(), w.offsets.cuda(), w.factors.cuda()))
        x, x_scale, idx, weights = (t.cuda() for t in _by_rank(c, layer(c)))
        y = ranks.launch(x, x_scale, idx, ranks.plan(idx, weights))
        ranks.check()
        return (y.cpu(),)

    return Case(name, c, fused.make_kernel, lambda: layer(c).tensors(), expected, interpreted, on_gpu)


CASES = (
    _stage("stage", instances.CONFIG),
    _stage("stage-options", instances.OPTIONS),
    _plan("plan", instances.CONFIG),
    _plan("plan-options", instances.OPTIONS),
    _fused("fused", instances.CONFIG),
    _fused("fused-fp8", instances.FP8),
    _fused("fused-wide", instances.WIDE),
    _fused("fused-options", instances.OPTIONS),
)


# --------------------------------------------------------------------------- rows
def _compile(number: int) -> None:
    compile_kernel(CASES[number].config, CASES[number].make)


def precompile() -> None:
    """Put all kernels into the compiler's cache, side by side: one after the other they take a minute."""
    context = multiprocessing.get_context("spawn")  # the compiler runs threads of its own
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(CASES)), mp_context=context) as pool:
        list(pool.map(_compile, range(len(CASES))))


def record(case: Case) -> Outputs:
    """Run a case on the GPU and compare its bits with those of plain PyTorch."""
    given, got = tuple(map(digest, case.inputs())), tuple(map(digest, case.on_gpu()))
    return Outputs(
        kernel=KERNEL,
        variant=case.name,
        cuda_sha256=cuda_sha256(compile_kernel(case.config, case.make).get_kernel_source()),
        test=f"{OUTPUTS_PREFIX}{case.name}",
        case=case.name,
        inputs=given,
        outputs=got,
        deviation=None,
        passed=got == tuple(map(digest, case.expected())),
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        commit=os.environ.get("DSV4_COMMIT", ""),
        date=datetime.now(UTC).date().isoformat(),
    )
