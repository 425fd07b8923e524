"""Fold what HCA's chunks left, rotate the sums back and cast them to e4m3 with scales of 128; few queries.

What `hca_join` does, with the epilogue of `hca_fold_fp8`: a block's dims are those of one scale.
"""

from collections.abc import Mapping
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import hca_join, output_reference
from dsv4_kernels.attention.hca_join import (
    CHUNKS,
    DIMS,
    LANES,
    QUARTERS,
    SHAPES,
    VARIANTS,
    make_join,
    threads_of,
    variant_of,
)
from dsv4_kernels.attention.output_cast import (
    BLOCK_K,
    BLOCKS,
    HEAD_DIM,
    ROPE_DIM,
    Fp8Output,
    blocks_of,
    by_row,
    empty_fp8_output,
    quantize,
    require_epilogue,
    rotate_back,
    with_table,
)
from dsv4_kernels.registry import Case, KernelSpec, operator

NAME = "hca_join_fp8"
CONTRACT = with_table(hca_join.CONTRACT)
assert DIMS == BLOCK_K, "a block has the dims of one scale"


def make_kernel(num_heads: int, num_chunks: int) -> Any:
    """Return the PrimFunc that joins so many chunks; queries and positions stay symbolic."""
    m, num_positions = T.dynamic("m"), T.dynamic("num_positions")
    join = make_join(num_chunks)
    dims_at = by_row(1, LANES, LANES, 1)
    scale_at = T.Fragment((1, 1), forward_fn=lambda i, b, rep: (rep, 0), replicate=LANES)

    @T.macro
    def put(outputs: Any, bm: Any, quarter: Any, head: Any, acc: Any, factor: Any):
        tile = T.alloc_shared((1, DIMS), T.bfloat16)
        rotated = T.alloc_fragment((1, ROPE_DIM), T.float32)
        values = T.alloc_fragment((1, 1, BLOCK_K), T.bfloat16)
        magnitude = T.alloc_fragment((1, 1, BLOCK_K), T.int32)
        codes = T.alloc_fragment((1, 1, BLOCK_K), T.float8_e4m3fn)
        amax = T.alloc_fragment((1, 1), T.int32)
        exponent = T.alloc_fragment((1, 1), T.int32)
        scale_bytes = T.alloc_fragment((1, 1), T.uint8)
        T.annotate_layout({values: dims_at, codes: dims_at})
        T.annotate_layout({amax: scale_at, exponent: scale_at, scale_bytes: scale_at})
        for i, d in T.Parallel(1, DIMS):
            tile[i, d] = T.cast(acc[i, d] * factor[i], "bfloat16")
        T.sync_threads()
        # A choice of values, not a branch: the signature follows no store under a condition.
        rotate_back(
            tile,
            rotated,
            outputs.cos_sin,
            outputs.positions[bm],
            1,
            DIMS - ROPE_DIM,
            quarter == QUARTERS - 1,
        )
        quantize(tile, values, magnitude, amax, exponent, codes, scale_bytes, 1, 1)
        for i, b, j in T.Parallel(1, 1, BLOCK_K):
            outputs.codes[bm, head + i, quarter + b, j] = codes[i, b, j]
        for i, b in T.Parallel(1, 1):
            outputs.scale[bm, head + i, quarter + b] = scale_bytes[i, b]

    @T.prim_func
    def hca_join_fp8_kernel(
        acc_in: T.Tensor[(m, num_chunks, num_heads, HEAD_DIM), T.float32],
        top_in: T.Tensor[(m, num_chunks, num_heads), T.float32],
        total_in: T.Tensor[(m, num_chunks, num_heads), T.float32],
        sink: T.Tensor[(num_heads,), T.float32],
        positions: T.Tensor[(m,), T.int32],
        cos_sin: T.Tensor[(num_positions, ROPE_DIM), T.float32],
        out: T.Tensor[(m, num_heads, BLOCKS, BLOCK_K), T.float8_e4m3fn],
        scale: T.Tensor[(m, num_heads, BLOCKS), T.uint8],
        lse: T.Tensor[(m, num_heads), T.float32],
    ):
        with T.Kernel(QUARTERS, num_heads, m, threads=threads_of(num_chunks)) as (quarter, head, bm):
            outputs = Fp8Output(positions, cos_sin, out, scale)
            join(acc_in, top_in, total_in, sink, lse, quarter, head, bm, put, outputs)

    return hca_join_fp8_kernel


def _empty_outputs(acc: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_fp8_output(acc, acc.shape[0], acc.shape[2])


@operator(NAME, _empty_outputs)
def hca_join_fp8(
    acc: torch.Tensor,
    top: torch.Tensor,
    total: torch.Tensor,
    sink: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fold as `hca_join`, rotate the last 64 dims of each head back, and cast to FP8.

    Args:
        acc: [m, chunks, num_heads, 512] fp32; m = 0 is allowed; 3 to 208 chunks.
        top: [m, chunks, num_heads] fp32.
        total: [m, chunks, num_heads] fp32.
        sink: [num_heads] fp32; -inf: none.
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
    hca_join.check(NAME, acc, top, total)
    m, num_chunks, num_heads, _ = acc.shape
    require_epilogue(NAME, sink, positions, cos_sin, m=m, num_heads=num_heads, device=acc.device)
    args = (acc, top, total, sink, positions, cos_sin)
    if runtime.uses_reference(acc):
        return output_reference.fold_fp8(*args)
    outputs = _empty_outputs(acc)
    if m:
        kwargs = variant_of(num_heads, num_chunks).kwargs
        runtime.launch(make_kernel, kwargs, (*args, *blocks_of(*outputs)))
    return outputs


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Return the inputs of `hca_join`, and positions of which one is outside the table."""
    return *hca_join.make_inputs(dims, device, seed), *output_reference.make_angles(dims, device, seed)


def _case(case_id: str, m: int, num_heads: int, num_chunks: int, *tags: str) -> Case:
    dims = {"m": m, "num_heads": num_heads, "num_chunks": num_chunks, "num_positions": 300}
    return Case(case_id, dims if "bench" in tags else {**dims, "max_m": 9}, tags or ("test",))


SPEC = KernelSpec(
    name=NAME,
    fn=hca_join_fp8,
    reference=output_reference.fold_fp8,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=VARIANTS,
    select=lambda d: variant_of(d["num_heads"], d["num_chunks"]),
    contract=CONTRACT,
    cases=(
        _case("empty", 0, 8, 3),
        _case("one-row", 1, 8, 3),
        _case("three-rows", 3, 16, 21, "test", "gpu"),
        *(_case(f"m{m}-h{h}", m, h, CHUNKS, "gpu", "bench") for m, h in SHAPES),
    ),
    tolerance=output_reference.fold_fp8_tolerance,
    num_bytes=lambda d: hca_join.num_bytes(d, HEAD_DIM + BLOCKS + 4) + d["m"] * ROPE_DIM * 4,
    source="DeepSeek-V4 report 2.3.2, 3.3 and 5.2.1",
    small={"num_heads": 8, "num_chunks": 18, "num_positions": 2},
)
