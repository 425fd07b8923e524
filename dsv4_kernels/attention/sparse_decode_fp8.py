"""Sparse decode whose output is what `wo_a_fp8` multiplies: rotated back, cast to e4m3 with scales of 128.

The sums are those of `sparse_decode`; codes and scales have the bits that inverse RoPE and `act_quant` of its
bf16 output have. Few queries are `sparse_parts` and a fold with the same epilogue (`hca_fold_fp8`).
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import decode_lists, output_reference
from dsv4_kernels.attention.cache_layout import PAGE_ROWS, WINDOW, page_bytes
from dsv4_kernels.attention.decode_body import Config, are_few, choose, make_attend
from dsv4_kernels.attention.decode_lists import SHAPES
from dsv4_kernels.attention.hca_fold_fp8 import hca_fold_fp8
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
from dsv4_kernels.attention.sparse_parts import sparse_parts
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

NAME = "sparse_decode_fp8"
CONTRACT = with_table(decode_lists.CONTRACT)


def make_kernel(num_heads: int, topk: int, config: Config) -> Any:
    """Return the PrimFunc; queries, the pages of both caches and positions stay symbolic."""
    m, num_positions = T.dynamic("m"), T.dynamic("num_positions")
    window_pages, entry_pages = T.dynamic("window_pages"), T.dynamic("entry_pages")
    block_h, threads, size = config.block_h, config.threads, page_bytes(PAGE_ROWS)
    attend, put = make_attend(topk, config, window_pages, entry_pages), make_put(block_h, threads)

    @T.prim_func
    def sparse_decode_fp8_kernel(
        q: T.Tensor[(m, num_heads, HEAD_DIM), T.bfloat16],
        window_values: T.Tensor[(window_pages, size), T.float8_e4m3fn],
        window_halves: T.Tensor[(window_pages, size // 2), T.bfloat16],
        window_words: T.Tensor[(window_pages, size // 4), T.int32],
        window_idx: T.Tensor[(m, WINDOW), T.int32],
        window_length: T.Tensor[(m,), T.int32],
        entry_values: T.Tensor[(entry_pages, size), T.float8_e4m3fn],
        entry_halves: T.Tensor[(entry_pages, size // 2), T.bfloat16],
        entry_words: T.Tensor[(entry_pages, size // 4), T.int32],
        entry_idx: T.Tensor[(m, topk), T.int32],
        entry_length: T.Tensor[(m,), T.int32],
        sink: T.Tensor[(num_heads,), T.float32],
        positions: T.Tensor[(m,), T.int32],
        cos_sin: T.Tensor[(num_positions, ROPE_DIM), T.float32],
        out: T.Tensor[(m, num_heads, BLOCKS, BLOCK_K), T.float8_e4m3fn],
        scale: T.Tensor[(m, num_heads, BLOCKS), T.uint8],
        lse: T.Tensor[(m, num_heads), T.float32],
    ):
        with T.Kernel(num_heads // block_h, m, threads=threads) as (bh, bm):
            window = (window_values, window_halves, window_words)
            entries = (entry_values, entry_halves, entry_words)
            lists = (window, window_idx, window_length, entries, entry_idx, entry_length)
            outputs = Fp8Output(positions, cos_sin, out, scale)
            attend(q, *lists, sink, lse, bh, bm, put, outputs)

    return sparse_decode_fp8_kernel


def _empty_outputs(q: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_fp8_output(q, *q.shape[:2])


@operator(NAME, _empty_outputs)
def whole_fp8(
    q: torch.Tensor,
    window_cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    entry_cache: torch.Tensor,
    entry_idx: torch.Tensor,
    entry_length: torch.Tensor,
    sink: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what `sparse_decode_fp8` does in one launch, however few queries there are."""
    lists = (q, window_cache, window_idx, window_length, entry_cache, entry_idx, entry_length)
    decode_lists.check(NAME, *lists)
    (m, num_heads, _), topk = q.shape, entry_idx.shape[1]
    require_epilogue(NAME, sink, positions, cos_sin, m=m, num_heads=num_heads, device=q.device)
    if runtime.uses_reference(q):
        return output_reference.sparse_decode_fp8(*lists, sink, positions, cos_sin)
    outputs = _empty_outputs(q)
    if m:
        inputs = (*decode_lists.views(*lists), sink, positions, cos_sin)
        runtime.launch(make_kernel, _variant(num_heads, topk).kwargs, (*inputs, *blocks_of(*outputs)))
    return outputs


def sparse_decode_fp8(
    q: torch.Tensor,
    window_cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    entry_cache: torch.Tensor,
    entry_idx: torch.Tensor,
    entry_length: torch.Tensor,
    sink: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend as `sparse_decode`, rotate the last 64 dims of each head back, and cast to FP8.

    Seen as [m, groups, 4096] and [m, groups, 32], codes and scales are operands of `wo_a_fp8`.

    Args:
        q: [m, num_heads, 512] bf16, as of `sparse_decode`.
        window_cache: [pages, 37440] uint8, likewise.
        window_idx: [m, 128] int32.
        window_length: [m] int32.
        entry_cache: [pages, 37440] uint8.
        entry_idx: [m, topk] int32.
        entry_length: [m] int32.
        sink: [num_heads] fp32.
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
    lists = (q, window_cache, window_idx, window_length, entry_cache, entry_idx, entry_length)
    if are_few(q) and not runtime.uses_reference(q):
        # The fold asks for the same, but after a launch.
        m, num_heads, _ = q.shape
        require_epilogue(NAME, sink, positions, cos_sin, m=m, num_heads=num_heads, device=q.device)
        return hca_fold_fp8(*sparse_parts(*lists), sink, positions, cos_sin)
    return whole_fp8(*lists, sink, positions, cos_sin)


@cache
def _variant(num_heads: int, topk: int) -> Variant:
    config = choose(num_heads)
    return Variant(f"h{num_heads}-k{topk}", {"num_heads": num_heads, "topk": topk, "config": config})


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Return the inputs of `sparse_decode`, and positions of which one is outside the table."""
    return *decode_lists.make_inputs(dims, device, seed), *output_reference.make_angles(dims, device, seed)


def _case(case_id: str, m: int, num_heads: int, topk: int, pages: int, *tags: str) -> Case:
    dims = {"m": m, "num_heads": num_heads, "topk": topk, "window_pages": pages, "entry_pages": pages}
    dims |= {"num_positions": 300, "ragged": int("bench" not in tags)}
    # A block is long in the interpreter, and `sparse_decode` has run there with as many rows as others.
    return Case(case_id, dims if "bench" in tags else {**dims, "max_m": 5}, tags or ("test",))


# Of the kernel above alone: what few queries get is `sparse_parts` and `hca_fold_fp8`.
SPEC = KernelSpec(
    name=NAME,
    fn=whole_fp8,
    reference=output_reference.sparse_decode_fp8,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(*shape) for shape in SHAPES),
    select=lambda d: _variant(d["num_heads"], d["topk"]),
    contract=CONTRACT,
    cases=(
        _case("empty", 0, 8, 64, 1),
        _case("one-row", 1, 8, 64, 1),
        _case("four-rows", 4, 16, 128, 3, "test", "gpu"),
        *(_case(f"m{m}-h{h}-k{k}", m, h, k, 1024, "gpu", "bench") for h, k in SHAPES for m in (64, 128, 256)),
    ),
    tolerance=output_reference.sparse_decode_fp8_tolerance,
    num_bytes=lambda d: (
        decode_lists.list_bytes(d) + d["m"] * (d["num_heads"] * (HEAD_DIM * 3 + BLOCKS + 4) + ROPE_DIM * 4)
    ),
    num_flops=lambda d: 4 * d["m"] * d["num_heads"] * (WINDOW + d["topk"]) * HEAD_DIM,
    peers=("flashmla",),
    row_invariant=False,  # queries come with their lists: tests/kernels/test_decode.py
    source="DeepSeek-V4 report 2.3 and 5.2.1; the reference model's attention",
    small={"num_heads": 64, "topk": 64, "num_positions": 2},
)
