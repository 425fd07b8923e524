"""Sparse prefill whose output is what `wo_a_fp8` multiplies: rotated back, cast to e4m3 with scales of 128.

The sums are those of `sparse_prefill`; codes and scales have the bits that inverse RoPE and `act_quant` of
its bf16 output have. The output leaves in half the bytes, and neither is a launch of its own.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import output_reference, sparse_prefill
from dsv4_kernels.attention.output_cast import (
    BLOCK_K,
    BLOCKS,
    ROPE_DIM,
    Fp8Output,
    blocks_of,
    empty_fp8_output,
    make_put,
    require_epilogue,
    with_table,
)
from dsv4_kernels.attention.prefill_tile import BLOCK_HEADS, HEAD_DIM, THREADS, make_attend
from dsv4_kernels.attention.sparse_prefill import SHARDS
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.own_sync import own_sync

NAME = "sparse_prefill_fp8"
CONTRACT = with_table(sparse_prefill.CONTRACT)


def make_kernel(num_heads: int) -> Any:
    """Return the PrimFunc for `num_heads` heads; queries, entries, indices and positions stay symbolic."""
    m, n, topk, num_positions = (T.dynamic(name) for name in ("m", "n", "topk", "num_positions"))
    attend, put = make_attend(n, topk), make_put(BLOCK_HEADS, THREADS)
    groups = -(-num_heads // BLOCK_HEADS)

    @T.prim_func
    def sparse_prefill_fp8_kernel(
        q: T.Tensor[(m, num_heads, HEAD_DIM), T.bfloat16],
        idx: T.Tensor[(m, topk), T.int32],
        kv: T.Tensor[(n, HEAD_DIM), T.bfloat16],
        sink: T.Tensor[(num_heads,), T.float32],
        positions: T.Tensor[(m,), T.int32],
        cos_sin: T.Tensor[(num_positions, ROPE_DIM), T.float32],
        out: T.Tensor[(m, num_heads, BLOCKS, BLOCK_K), T.float8_e4m3fn],
        scale: T.Tensor[(m, num_heads, BLOCKS), T.uint8],
        lse: T.Tensor[(m, num_heads), T.float32],
    ):
        # A query's heads are neighbours in the grid: they gather the same rows at the same time.
        with T.Kernel(m * groups, threads=THREADS) as block:
            token, bh = block // groups, block % groups  # pyright: ignore[reportOperatorIssue]
            out_tile = T.alloc_shared((BLOCK_HEADS, HEAD_DIM), T.bfloat16)
            attend(q, idx, kv, sink, lse, token, bh, out_tile)
            put(Fp8Output(positions, cos_sin, out, scale), token, bh, out_tile)

    return own_sync(sparse_prefill_fp8_kernel)


def _empty_outputs(q: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_fp8_output(q, *q.shape[:2])


@operator(NAME, _empty_outputs)
def sparse_prefill_fp8(
    q: torch.Tensor,
    idx: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend as `sparse_prefill`, rotate the last 64 dims of each head back, and cast to FP8.

    Seen as [m, groups, 4096] and [m, groups, 32], codes and scales are operands of `wo_a_fp8`.

    Args:
        q: [m, num_heads, 512] bf16, num_heads a multiple of 8; m = 0 is allowed. Of the last 64 heads
            of a token those that there are, are read and written, no more.
        idx: [m, topk] int32, in any order; one outside 0..n-1 (by custom -1) is masked.
        kv: [n, 512] bf16: window and selected entries, as attention sees them; n = 0 is allowed.
        sink: [num_heads] fp32, a logit without a value that joins the denominator; -inf: none.
        positions: [m] int32. A position outside the table makes the rotated dims zero.
        cos_sin: [num_positions, 64] fp32: 32 cosines, then 32 sines.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        codes: [m, num_heads, 512] e4m3; zeros where nothing is attended.
        scale: [m, num_heads, 4] e8m0, one for 128 dims.
        lse: [m, num_heads] fp32, natural, without the sink; +inf where nothing is attended.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    sparse_prefill.check(NAME, q, idx, kv)
    m, num_heads, _ = q.shape
    require_epilogue(NAME, sink, positions, cos_sin, m=m, num_heads=num_heads, device=q.device)
    if runtime.uses_reference(q):
        return output_reference.sparse_attention_fp8(q, idx, kv, sink, positions, cos_sin)
    outputs = _empty_outputs(q)
    if m:
        args = (q, idx, kv, sink, positions, cos_sin, *blocks_of(*outputs))
        runtime.launch(make_kernel, _variant(num_heads).kwargs, args)
    return outputs


@cache
def _variant(num_heads: int) -> Variant:
    return Variant(f"h{num_heads}", {"num_heads": num_heads})


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Return the inputs of `sparse_prefill`, and positions of which one is outside the table."""
    angles = output_reference.make_angles(dims, device, seed)
    return *sparse_prefill.SPEC.make_inputs(dims, device, seed), *angles


def _case(case_id: str, m: int, num_heads: int, topk: int, n: int, *tags: str) -> Case:
    dims = {"m": m, "num_heads": num_heads, "topk": topk, "n": n, "num_positions": 300}
    return Case(case_id, dims, tags or ("test",))


SPEC = KernelSpec(
    name=NAME,
    fn=sparse_prefill_fp8,
    reference=output_reference.sparse_attention_fp8,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(h) for h in SHARDS),
    select=lambda dims: _variant(dims["num_heads"]),
    contract=CONTRACT,
    cases=(
        _case("empty", 0, 64, 64, 5),
        _case("one-row", 1, 64, 1, 1),
        _case("ragged", 3, 64, 100, 300, "test", "gpu"),
        _case("pro", 2, 128, 64, 129, "gpu"),
        _case("flash-4096-k640-n8192", 4096, 64, 640, 8192, "gpu", "bench"),
        _case("pro-4096-k1152-n8192", 4096, 128, 1152, 8192, "gpu", "bench"),
    ),
    tolerance=output_reference.sparse_attention_fp8_tolerance,
    num_bytes=lambda d: (
        d["m"] * (d["num_heads"] * (HEAD_DIM * 3 + BLOCKS + 4) + d["topk"] * 4 + ROPE_DIM * 4)
        + d["n"] * HEAD_DIM * 2
    ),
    num_flops=lambda d: d["m"] * d["num_heads"] * d["topk"] * HEAD_DIM * 4,
    source="DeepSeek-V4 report 2.3 and 5.2.1; the reference model's attention",
    small={"m": 1, "n": 3, "topk": 130, "num_heads": 64, "num_positions": 2},
)
