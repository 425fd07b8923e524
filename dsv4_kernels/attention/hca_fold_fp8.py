"""Fold the parts of a query's attention, rotate the sums back and cast them to e4m3 with scales of 128.

What `hca_fold` does, with the epilogue of `sparse_decode_fp8`, whose last launch it is for few queries; and
that of `hca_decode_fp8`.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import hca_fold, output_reference
from dsv4_kernels.attention.hca_fold import CHUNKS, GROUPS, HEADS, SHAPES, THREAD_DIMS, THREADS, make_fold
from dsv4_kernels.attention.output_cast import (
    BLOCK_K,
    BLOCKS,
    HEAD_DIM,
    ROPE_DIM,
    Fp8Output,
    blocks_of,
    empty_fp8_output,
    make_put,
    require_epilogue,
    with_table,
)
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

NAME = "hca_fold_fp8"
CONTRACT = with_table(hca_fold.CONTRACT)


def make_kernel(num_heads: int, num_parts: int) -> Any:
    """Return the PrimFunc that folds so many parts; queries and positions stay symbolic."""
    m, num_positions = T.dynamic("m"), T.dynamic("num_positions")
    fold, put_heads = make_fold(num_parts), make_put(1, THREADS, BLOCK_K // THREAD_DIMS)

    @T.macro
    def put(outputs: Any, bm: Any, head: Any, acc: Any, factor: Any):
        tile = T.alloc_shared((1, HEAD_DIM), T.bfloat16)
        for d in T.Parallel(HEAD_DIM):
            tile[0, d] = T.cast(acc[d] * factor[0], "bfloat16")
        T.sync_threads()
        put_heads(outputs, bm, head, tile)

    @T.prim_func
    def hca_fold_fp8_kernel(
        acc_in: T.Tensor[(m, num_parts, num_heads, HEAD_DIM), T.float32],
        top_in: T.Tensor[(m, num_parts, num_heads), T.float32],
        total_in: T.Tensor[(m, num_parts, num_heads), T.float32],
        sink: T.Tensor[(num_heads,), T.float32],
        positions: T.Tensor[(m,), T.int32],
        cos_sin: T.Tensor[(num_positions, ROPE_DIM), T.float32],
        out: T.Tensor[(m, num_heads, BLOCKS, BLOCK_K), T.float8_e4m3fn],
        scale: T.Tensor[(m, num_heads, BLOCKS), T.uint8],
        lse: T.Tensor[(m, num_heads), T.float32],
    ):
        with T.Kernel(num_heads, m, threads=THREADS) as (head, bm):
            outputs = Fp8Output(positions, cos_sin, out, scale)
            fold(acc_in, top_in, total_in, sink, lse, head, bm, put, outputs)

    return hca_fold_fp8_kernel


def _empty_outputs(acc: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_fp8_output(acc, acc.shape[0], acc.shape[2])


@operator(NAME, _empty_outputs)
def hca_fold_fp8(
    acc: torch.Tensor,
    top: torch.Tensor,
    total: torch.Tensor,
    sink: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fold as `hca_fold`, rotate the last 64 dims of each head back, and cast to FP8.

    Args:
        acc: [m, parts, num_heads, 512] fp32; m = 0 is allowed.
        top: [m, parts, num_heads] fp32.
        total: [m, parts, num_heads] fp32.
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
    hca_fold.check(NAME, acc, top, total)
    m, num_parts, num_heads, _ = acc.shape
    require_epilogue(NAME, sink, positions, cos_sin, m=m, num_heads=num_heads, device=acc.device)
    args = (acc, top, total, sink, positions, cos_sin)
    if runtime.uses_reference(acc):
        return output_reference.fold_fp8(*args)
    outputs = _empty_outputs(acc)
    if m:
        kwargs = _variant(num_heads, num_parts).kwargs
        runtime.launch(make_kernel, kwargs, (*args, *blocks_of(*outputs)))
    return outputs


@cache
def _variant(num_heads: int, num_parts: int) -> Variant:
    return Variant(f"h{num_heads}-p{num_parts}", {"num_heads": num_heads, "num_parts": num_parts})


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Return the inputs of `hca_fold`, and positions of which one is outside the table."""
    angles = output_reference.make_angles(dims, device, seed)
    return *hca_fold.FOLD_SPEC.make_inputs(dims, device, seed), *angles


def _case(case_id: str, m: int, num_heads: int, num_parts: int, *tags: str) -> Case:
    dims = {"m": m, "num_heads": num_heads, "num_parts": num_parts, "num_positions": 300}
    return Case(case_id, dims if "bench" in tags else {**dims, "max_m": 9}, tags or ("test",))


SPEC = KernelSpec(
    name=NAME,
    fn=hca_fold_fp8,
    reference=output_reference.fold_fp8,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(*shape) for shape in SHAPES),
    select=lambda d: _variant(d["num_heads"], d["num_parts"]),
    contract=CONTRACT,
    cases=(
        _case("empty", 0, 8, 1),
        _case("one-row", 1, 8, 1),
        _case("three-rows", 3, 16, 9, "test", "gpu"),
        *(_case(f"m{m}-h{h}", m, h, GROUPS, "gpu", "bench") for h in HEADS for m in (1, 64)),
        *(_case(f"m2-h{h}-p{p}", 2, h, p, "gpu", "bench") for h, p in CHUNKS.items()),
    ),
    tolerance=output_reference.fold_fp8_tolerance,
    num_bytes=lambda d: (
        d["m"]
        * (d["num_heads"] * (HEAD_DIM + BLOCKS + 4 + d["num_parts"] * (HEAD_DIM + 2) * 4) + ROPE_DIM * 4)
    ),
    source="DeepSeek-V4 report 2.3.2, 3.3 and 5.2.1",
    small={"num_heads": 64, "num_parts": 10, "num_positions": 2},
)
