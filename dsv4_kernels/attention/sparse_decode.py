"""Sparse attention of single tokens, straight from paged FP8 rows: window and selected entries (report 2.3).

A block takes one query and `block_h` of its heads, over all keys of both lists in their order. Each chunk
of 64 keys has its own maximum, and what it adds is folded into the sums so far: the same operations in the
same order as a block for each chunk and `hca_fold` perform (`sparse_parts`), which few queries get. So a
row's bits depend on no batch.
64 heads of a block are four warpgroups with roles (`decode_roles`), fewer one loop of all (`decode_body`).
Design and measurements: docs/attention.md.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import decode_body, decode_lists, decode_reference, decode_roles
from dsv4_kernels.attention.cache_layout import HEAD_DIM, PAGE_ROWS, WINDOW, page_bytes
from dsv4_kernels.attention.decode_body import Config, are_few, choose
from dsv4_kernels.attention.decode_lists import CONTRACT, SHAPES
from dsv4_kernels.attention.hca_fold import hca_fold
from dsv4_kernels.attention.sparse_parts import sparse_parts
from dsv4_kernels.contract import require_input
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.own_sync import own_sync
from dsv4_kernels.tile.roles import split_roles

NAME = "sparse_decode"


def make_kernel(num_heads: int, topk: int, config: Config) -> Any:
    """Return the PrimFunc; queries and the pages of both caches stay symbolic.

    A cache comes three times, as what its bytes are seen as: e4m3, bf16 and 32-bit words.
    """
    m, window_pages, entry_pages = T.dynamic("m"), T.dynamic("window_pages"), T.dynamic("entry_pages")
    block_h, size = config.block_h, page_bytes(PAGE_ROWS)
    by_roles = config.threads == decode_roles.THREADS
    if by_roles:
        attend = decode_roles.make_attend(topk, window_pages, entry_pages)
    else:
        attend = decode_body.make_attend(topk, config, window_pages, entry_pages)

    @T.macro
    def put(out: Any, bm: Any, bh: Any, tile: Any):
        for h, d in T.Parallel(block_h, HEAD_DIM):
            out[bm, bh * block_h + h, d] = tile[h, d]

    @T.prim_func
    def sparse_decode_kernel(
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
        out: T.Tensor[(m, num_heads, HEAD_DIM), T.bfloat16],
        lse: T.Tensor[(m, num_heads), T.float32],
    ):
        with T.Kernel(num_heads // block_h, m, threads=config.threads) as (bh, bm):
            window = (window_values, window_halves, window_words)
            entries = (entry_values, entry_halves, entry_words)
            lists = (window, window_idx, window_length, entries, entry_idx, entry_length)
            attend(q, *lists, sink, lse, bh, bm, put, out)

    if by_roles:
        return split_roles(own_sync(sparse_decode_kernel), decode_roles.EXPANDERS, *decode_roles.REGISTERS)
    return sparse_decode_kernel


def _empty_outputs(q: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


@operator(NAME, _empty_outputs)
def whole(
    q: torch.Tensor,
    window_cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    entry_cache: torch.Tensor,
    entry_idx: torch.Tensor,
    entry_length: torch.Tensor,
    sink: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `sparse_decode` does in one launch, however few queries there are: a block walks all chunks."""
    lists = (q, window_cache, window_idx, window_length, entry_cache, entry_idx, entry_length)
    decode_lists.check(NAME, *lists)
    (m, num_heads, _), topk = q.shape, entry_idx.shape[1]
    require_input(NAME, "sink", sink, (num_heads,), dtype=torch.float32, device=q.device)
    if runtime.uses_reference(q):
        return decode_reference.sparse_decode(*lists, sink)
    out, lse = _empty_outputs(q)
    if m:
        inputs = (*decode_lists.views(*lists), sink)
        runtime.launch(make_kernel, _variant(num_heads, topk).kwargs, (*inputs, out, lse))
    return out, lse


def sparse_decode(
    q: torch.Tensor,
    window_cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    entry_cache: torch.Tensor,
    entry_idx: torch.Tensor,
    entry_length: torch.Tensor,
    sink: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend each query to the cache rows that its two index lists name; K and V are the same row.

    Logits are q . k / sqrt(512). The sink is one more logit of the softmax's denominator, without a value.
    Keys are taken in the order of the lists, the window's first, in chunks of 64 that are folded one after
    the other: a query's bits depend on nothing but its own data, whatever the number of queries. Few queries
    are two launches, `sparse_parts` and `hca_fold`.

    Args:
        q: [m, num_heads, 512] bf16, normed and rotated; the tokens of a request one after the other. m = 0 is
            allowed; num_heads a multiple of 8.
        window_cache: [pages, 37440] uint8, pages of 64 rows: see `cache_layout`.
        window_idx: [m, 128] int32, places (page * 64 + row); outside the cache: masked.
        window_length: [m] int32: places of `window_idx` from there on are masked.
        entry_cache: as window_cache, compressed entries.
        entry_idx: [m, topk] int32; topk a multiple of 64.
        entry_length: [m] int32.
        sink: [num_heads] fp32; -inf: none.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        out: [m, num_heads, 512] bf16, not yet rotated back; zeros where nothing is attended.
        lse: [m, num_heads] fp32, natural, without the sink; +inf where nothing is attended.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    lists = (q, window_cache, window_idx, window_length, entry_cache, entry_idx, entry_length)
    if are_few(q) and not runtime.uses_reference(q):
        # The fold asks for the same, but after a launch.
        require_input(NAME, "sink", sink, (q.shape[1],), dtype=torch.float32, device=q.device)
        return hca_fold(*sparse_parts(*lists), sink)
    return whole(*lists, sink)


@cache
def _variant(num_heads: int, topk: int) -> Variant:
    config = choose(num_heads)
    if config.block_h == decode_roles.HEADS:
        config = replace(config, threads=decode_roles.THREADS)
    return Variant(f"h{num_heads}-k{topk}", {"num_heads": num_heads, "topk": topk, "config": config})


def _case(case_id: str, m: int, num_heads: int, topk: int, pages: int, *tags: str) -> Case:
    dims = {"m": m, "num_heads": num_heads, "topk": topk, "window_pages": pages, "entry_pages": pages}
    return Case(case_id, {**dims, "ragged": int("bench" not in tags)}, tags or ("test",))


def _num_bytes(dims: Mapping[str, int]) -> int:
    return decode_lists.list_bytes(dims) + dims["m"] * dims["num_heads"] * HEAD_DIM * 4


# Of the kernel above alone: what few queries get is `sparse_parts` and `hca_fold`.
SPEC = KernelSpec(
    name=NAME,
    fn=whole,
    reference=decode_reference.sparse_decode,
    make_inputs=decode_lists.make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(*shape) for shape in SHAPES),
    select=lambda d: _variant(d["num_heads"], d["topk"]),
    contract=CONTRACT,
    cases=(
        _case("empty", 0, 8, 64, 1),
        _case("one-row", 1, 8, 64, 1),
        _case("four-rows", 4, 16, 128, 3, "gpu"),
        *(_case(f"m{m}-h{h}-k{k}", m, h, k, 1024, "gpu", "bench") for h, k in SHAPES for m in (64, 128, 256)),
        _case("h8", 3, 8, 512, 64, "gpu"),
        _case("h16", 70, 16, 512, 64, "gpu"),
        _case("h32", 130, 32, 1024, 64, "gpu"),
    ),
    tolerance=decode_reference.sparse_decode_tolerance,
    num_bytes=_num_bytes,
    num_flops=lambda d: 4 * d["m"] * d["num_heads"] * (WINDOW + d["topk"]) * HEAD_DIM,
    peers=("flashmla",),
    row_invariant=False,  # queries come with their lists: tests/kernels/test_decode.py
    source="DeepSeek-V4 report 2.3; reference model's sparse attention; FlashMLA's two paged caches",
    small={"num_heads": 64, "topk": 64},
)
