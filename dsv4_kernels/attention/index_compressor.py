"""The indexer's compressor: keys of 128 dims, one for four tokens, normed (report 2.3.1).

The pooling of `compressor` with its order and bits, a warp for each entry. Keys leave in bf16: `hadamard_fp4`
or `hadamard_fp8` rotates, transforms and casts them, `index_cache_write` puts them into pages.
"""

from collections.abc import Mapping
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import compressor_reference
from dsv4_kernels.attention.compressor_pool import (
    CLAUSES,
    CONSTS,
    Config,
    channels,
    make_rows,
    pooling,
    require_rows,
    rms_norm,
)
from dsv4_kernels.attention.compressor_state import OVERLAPPING, state_rows
from dsv4_kernels.contract import Contract
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

NAME = "index_compressor"
DIM = 128
PAIRS = DIM // 2
RATIO = OVERLAPPING
CONTRACT = Contract(CLAUSES, consts=CONSTS)


def make_kernel(config: Config) -> Any:
    """Return the PrimFunc; entries, tokens and slots stay symbolic."""
    m, num_tokens, num_slots = T.dynamic("m"), T.dynamic("num_tokens"), T.dynamic("num_slots")
    rows, width = state_rows(RATIO), channels(RATIO, DIM)
    pool = pooling(RATIO, DIM, config)

    @T.prim_func
    def index_compressor_kernel(
        kv: T.Tensor[(num_tokens, width), T.float32],
        score: T.Tensor[(num_tokens, width), T.float32],
        kv_state: T.Tensor[(num_slots, rows, width), T.float32],
        score_state: T.Tensor[(num_slots, rows, width), T.float32],
        blocks: T.Tensor[(m, 4), T.int32],
        ape: T.Tensor[(RATIO, width), T.float32],
        weight: T.Tensor[(PAIRS,), T.int32],
        out: T.Tensor[(m, PAIRS), T.int32],
    ):
        with T.Kernel(m, threads=config.threads(DIM)) as entry:
            T.annotate_min_blocks_per_sm(config.blocks)
            mean = T.alloc_shared((DIM,), T.float32)
            words = T.alloc_fragment((PAIRS,), T.int32)
            norm_weight = T.alloc_fragment((PAIRS,), T.int32)
            for p in T.Parallel(PAIRS):
                norm_weight[p] = weight[p]
            pool(mean, kv, score, kv_state, score_state, ape, blocks, entry)
            rms_norm(mean, norm_weight, words, DIM)
            for p in T.Parallel(PAIRS):
                out[entry, p] = words[p]

    return index_compressor_kernel


def _empty_output(kv: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    return kv.new_empty((inputs[3].shape[0], DIM), dtype=torch.bfloat16)


@operator(NAME, _empty_output)
def index_compressor(
    kv: torch.Tensor,
    score: torch.Tensor,
    kv_state: torch.Tensor,
    score_state: torch.Tensor,
    blocks: torch.Tensor,
    ape: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Compress overlapping blocks of four tokens into the indexer's keys: `compressor`'s means, normed.

    Args:
        kv: [num_tokens, 256] fp32, this call's tokens: series b, then a.
        score: as kv, before the bias; finite.
        kv_state: [num_slots, 8, 256] fp32, see `compressor`.
        score_state: as kv_state, before the bias.
        blocks: [m, 4] int32, see `compressor_state.plan`; m = 0 is allowed. Of no block: zeros.
        ape: [4, 256] fp32.
        weight: [128] bf16, of the norm.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        [m, 128] bf16, not yet rotated.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_rows(NAME, DIM, (RATIO,), kv, score, kv_state, score_state, blocks, ape, weight)
    m = blocks.shape[0]
    CONTRACT.check(NAME, m=m, num_tokens=kv.shape[0], num_slots=kv_state.shape[0])
    args = (kv, score, kv_state, score_state, blocks, ape, weight)
    if runtime.uses_reference(kv):
        return compressor_reference.index_compressor(*args)
    out = _empty_output(*args)
    if m:
        words = (weight.view(torch.int32), out.view(torch.int32))
        runtime.launch(make_kernel, _VARIANT.kwargs, (*args[:-1], *words))
    return out


_VARIANT = Variant("r4", {"config": Config(groups=1, step=8, blocks=20)})


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    return make_rows({**dims, "ratio": RATIO}, DIM, device, seed)


def _case(case_id: str, m: int, num_slots: int, decode: int, *tags: str) -> Case:
    num_tokens = max(m, 1) if decode else m * RATIO
    dims = {"m": m, "num_tokens": num_tokens, "num_slots": num_slots, "num_positions": 8192}
    return Case(case_id, {**dims, "decode": decode}, tags or ("test",))


SPEC = KernelSpec(
    name=NAME,
    fn=index_compressor,
    reference=compressor_reference.index_compressor,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=(_VARIANT,),
    select=lambda dims: _VARIANT,
    contract=CONTRACT,
    cases=(
        _case("empty", 0, 1, 1),
        _case("one-row", 1, 1, 1),
        _case("m3-decode", 3, 4, 1),
        *(_case(f"m{tokens}", tokens // RATIO, 1, 0, "gpu", "bench") for tokens in (4096, 65536)),
        _case("decode64", 64, 64, 1, "gpu", "bench"),
    ),
    num_bytes=lambda d: d["m"] * ((2 if d["decode"] else 1) * RATIO * channels(RATIO, DIM) * 8 + 2 * DIM),
    row_invariant=False,  # rows of the first tensor are tokens: tests/kernels/test_compressor.py
    source="DeepSeek-V4 report 2.3.1 and 3.5.1; reference model's indexer",
    small={"m": 1, "num_tokens": 4, "num_slots": 1},
)
