"""Decode over all compressed entries of a request, straight from paged FP8 rows: HCA (report 2.3.2).

Keys are cut into parts of fixed places: the window, then every 512 entries. A block takes one part of one
query (`decode_tile`), and a second kernel (`hca_fold`) folds the parts in ascending order. Both do the same
for every batch: a row's bits depend on nothing but its own keys, and one long request fills the GPU.
Design and measurements: docs/attention.md.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import decode_reference
from dsv4_kernels.attention.cache_layout import (
    HEAD_DIM,
    MAX_PAGES,
    MAX_QUERIES,
    NOPE_DIM,
    PAGE_ROWS,
    ROPE_DIM,
    SCALE_BYTES,
    VALUE_BYTES,
    WINDOW,
    page_bytes,
)
from dsv4_kernels.attention.cache_rows import SCALE_WORDS, views
from dsv4_kernels.attention.decode_lists import make_cache
from dsv4_kernels.attention.decode_tile import (
    AHEAD,
    BLOCK_HEADS,
    CHUNK,
    EXP2_SCALE,
    F32_MINUS_INF,
    FLOOR,
    HALF,
    HALVES_AT,
    SLOTS,
    THREADS,
    WARPGROUPS,
    Rows,
    Softmax,
    attend,
    expand,
    gather,
    join_totals,
)
from dsv4_kernels.attention.hca_fold import HEADS, MAX_PARTS, hca_fold
from dsv4_kernels.attention.hca_fold_fp8 import hca_fold_fp8
from dsv4_kernels.attention.output_cast import require_epilogue
from dsv4_kernels.contract import Contract, ContractError, require_input, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

NAME = "hca_decode"
FP8_NAME = "hca_decode_fp8"
PARTS = "hca_parts"
PART_PAGES = 8  # pages of a part
PART = PART_PAGES * PAGE_ROWS  # keys of a part

CONTRACT = Contract(
    (
        "0 <= m",
        "m <= MAX_QUERIES",
        "0 < num_heads",
        "num_heads % HEADS == 0",
        "0 < num_parts",
        "num_parts <= MAX_PARTS",
        "0 < pages",
        "pages <= MAX_PAGES",
    ),
    consts={"MAX_QUERIES": MAX_QUERIES, "MAX_PAGES": MAX_PAGES, "MAX_PARTS": MAX_PARTS, "HEADS": 8},
)


def make_parts(num_heads: int, num_parts: int) -> Any:
    """Return the PrimFunc of so many parts of entries; queries and the cache's pages stay symbolic.

    The cache comes three times, as what its bytes are seen as: e4m3, bf16 and 32-bit words.
    """
    m, pages = T.dynamic("m"), T.dynamic("pages")
    size = page_bytes(PAGE_ROWS)

    def head(bh: Any, i: Any) -> Any:
        """Return the head of a block's row; rows past the last head repeat it."""
        own = bh * BLOCK_HEADS + i
        return own if num_heads % BLOCK_HEADS == 0 else T.min(own, num_heads - 1)

    def entry_place(part: Any, j: Any, page: Any, length: Any, num_pages: Any) -> Any:
        """Return the place of key j of a part of entries; -1 in the window's part, and where nothing is."""
        return T.if_then_else(
            (part > 0) & ((part - 1) * PART + j < length) & (page >= 0) & (page < num_pages),
            page * PAGE_ROWS + j % PAGE_ROWS,
            -1,
        )

    @T.prim_func
    def hca_parts_kernel(
        q: T.Tensor[(m, num_heads, HEAD_DIM), T.bfloat16],
        values: T.Tensor[(pages, size), T.float8_e4m3fn],
        halves_of: T.Tensor[(pages, size // 2), T.bfloat16],
        words: T.Tensor[(pages, size // 4), T.int32],
        window_idx: T.Tensor[(m, WINDOW), T.int32],
        window_length: T.Tensor[(m,), T.int32],
        page_table: T.Tensor[(m, num_parts, PART_PAGES), T.int32],
        entry_length: T.Tensor[(m,), T.int32],
        acc_out: T.Tensor[(m, num_parts + 1, num_heads, HEAD_DIM), T.float32],
        top_out: T.Tensor[(m, num_parts + 1, num_heads), T.float32],
        total_out: T.Tensor[(m, num_parts + 1, num_heads), T.float32],
    ):
        with T.Kernel(num_parts + 1, T.ceildiv(num_heads, BLOCK_HEADS), m, threads=THREADS) as (part, bh, bm):
            q_tile = T.alloc_shared((BLOCK_HEADS, HEAD_DIM), T.bfloat16)
            ring = T.alloc_shared((SLOTS, CHUNK, HEAD_DIM), T.bfloat16)
            weights = T.alloc_shared((BLOCK_HEADS, CHUNK), T.bfloat16)
            places = T.alloc_shared((PART + AHEAD * CHUNK,), T.int32)
            mask = T.alloc_shared((PART,), T.float32)  # 0 or -inf, which logits start from
            exchange = T.alloc_shared((2, WARPGROUPS, BLOCK_HEADS), T.float32)
            place = T.alloc_fragment((CHUNK,), T.int32)
            nope = T.alloc_fragment((CHUNK, NOPE_DIM), T.float8_e4m3fn)
            wide = T.alloc_fragment((CHUNK, NOPE_DIM), T.bfloat16)
            rope = T.alloc_fragment((CHUNK, ROPE_DIM), T.bfloat16)
            scales = T.alloc_fragment((CHUNK, SCALE_WORDS), T.int32)
            logits = T.alloc_fragment((BLOCK_HEADS, CHUNK), T.float32)
            halves = T.alloc_fragment((WARPGROUPS, BLOCK_HEADS, HALF), T.float32)
            half_max = T.alloc_fragment((WARPGROUPS, BLOCK_HEADS), T.float32)
            half_sum = T.alloc_fragment((WARPGROUPS, BLOCK_HEADS), T.float32)
            half_total = T.alloc_fragment((WARPGROUPS, BLOCK_HEADS), T.float32)
            row_max = T.alloc_fragment((BLOCK_HEADS,), T.float32)
            factor = T.alloc_fragment((BLOCK_HEADS,), T.float32)
            total = T.alloc_fragment((BLOCK_HEADS,), T.float32)
            acc = T.alloc_fragment((BLOCK_HEADS, HEAD_DIM), T.float32)
            rows = Rows(place, nope, wide, rope, scales)
            state = Softmax(
                logits, halves, half_max, half_sum, half_total, row_max, factor, exchange, weights
            )
            cache_pages = (values, halves_of, words)
            T.annotate_layout({**rows.layout(), halves: HALVES_AT})

            for j in T.Parallel(WINDOW):
                window_place = T.if_then_else(
                    (part == 0) & (j < window_length[bm]) & (window_idx[bm, j] < pages * PAGE_ROWS),
                    window_idx[bm, j],
                    -1,
                )
                page = page_table[bm, T.max(part - 1, 0), j // PAGE_ROWS]
                places[j] = T.max(window_place, entry_place(part, j, page, entry_length[bm], pages))
            for j in T.Parallel(PART - WINDOW):
                page = page_table[bm, T.max(part - 1, 0), (WINDOW + j) // PAGE_ROWS]
                places[WINDOW + j] = entry_place(part, WINDOW + j, page, entry_length[bm], pages)
            for j in T.Parallel(AHEAD * CHUNK):
                places[PART + j] = -1
            for j in T.Parallel(PART):
                mask[j] = T.if_then_else(places[j] >= 0, 0.0, T.reinterpret(F32_MINUS_INF, "float32"))
            gather(cache_pages, places, 0, rows)
            for i, d in T.Parallel(BLOCK_HEADS, HEAD_DIM):
                q_tile[i, d] = q[bm, head(bh, i), d]
            expand(rows, ring, 0)
            gather(cache_pages, places, CHUNK, rows)
            attend(PART_PAGES, cache_pages, places, mask, q_tile, ring, rows, state, acc, 0, HEAD_DIM)
            join_totals(state, total)
            for i, d in T.Parallel(BLOCK_HEADS, HEAD_DIM):
                if bh * BLOCK_HEADS + i < num_heads:
                    acc_out[bm, part, bh * BLOCK_HEADS + i, d] = acc[i, d]
            for i in T.Parallel(BLOCK_HEADS):
                if bh * BLOCK_HEADS + i < num_heads:
                    top_out[bm, part, bh * BLOCK_HEADS + i] = T.if_then_else(
                        total[i] == 0.0, FLOOR, row_max[i] * EXP2_SCALE
                    )
            for i in T.Parallel(BLOCK_HEADS):
                if bh * BLOCK_HEADS + i < num_heads:
                    total_out[bm, part, bh * BLOCK_HEADS + i] = total[i]

    return hca_parts_kernel


def _empty_parts(
    q: torch.Tensor,
    cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    page_table: torch.Tensor,
    entry_length: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, num_heads, dim = q.shape
    parts = page_table.shape[1] // PART_PAGES + 1
    acc = q.new_empty((m, parts, num_heads, dim), dtype=torch.float32)
    return acc, acc.new_empty((m, parts, num_heads)), acc.new_empty((m, parts, num_heads))


@operator(PARTS, _empty_parts)
def hca_parts(
    q: torch.Tensor,
    cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    page_table: torch.Tensor,
    entry_length: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend each query to each part of its keys: the first half of `hca_decode`, whose arguments these are.

    Returns:
        acc: [m, parts, num_heads, 512] fp32: keys times exp2(logit - top); part 0 is the window.
        top: [m, parts, num_heads] fp32: the largest logit times log2(e); -1e30 where a part has no key.
        total: [m, parts, num_heads] fp32: sum of exp2(logit - top).

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    args = (q, cache, window_idx, window_length, page_table, entry_length)
    _check(*args)
    if runtime.uses_reference(q):
        return decode_reference.hca_parts(*args)
    outputs = _empty_parts(*args)
    if q.shape[0]:
        table = page_table.view(q.shape[0], -1, PART_PAGES)
        inputs = (q, *views(cache), window_idx, window_length, table, entry_length)
        runtime.launch(make_parts, _parts_variant(q.shape[1], table.shape[1]).kwargs, (*inputs, *outputs))
    return outputs


def hca_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    page_table: torch.Tensor,
    entry_length: torch.Tensor,
    sink: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend each query to its window and to all of its compressed entries; K and V are the same row.

    Logits are q . k / sqrt(512). The sink is one more logit of the softmax's denominator, without a value.
    Keys are taken in parts: the window, then each 512 entries, in chunks of 64; parts are folded in ascending
    order. A query's bits depend on nothing but its own data, whatever the number of queries or pages.

    Args:
        q: [m, num_heads, 512] bf16, normed and rotated; the tokens of a request one after the other. m = 0 is
            allowed; num_heads a multiple of 8.
        cache: [pages, 37440] uint8, pages of 64 rows: see `cache_layout`. One pool: some pages are
            of windows, others of compressed entries.
        window_idx: [m, 128] int32, places (page * 64 + row); outside the cache: masked.
        window_length: [m] int32: places of `window_idx` from there on are masked.
        page_table: [m, num_pages] int32, the pages of each query's entries in order; num_pages a multiple of
            8. A page outside the cache is masked.
        entry_length: [m] int32: entries that the query sees.
        sink: [num_heads] fp32; -inf: none.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        out: [m, num_heads, 512] bf16, not yet rotated back; zeros where nothing is attended.
        lse: [m, num_heads] fp32, natural, without the sink; +inf where nothing is attended.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    args = (q, cache, window_idx, window_length, page_table, entry_length)
    _check_fold(args, sink)
    return hca_fold(*hca_parts(*args), sink)


def hca_decode_fp8(
    q: torch.Tensor,
    cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    page_table: torch.Tensor,
    entry_length: torch.Tensor,
    sink: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend as `hca_decode`, rotate the last 64 dims of each head back, and cast to FP8.

    Codes and scales have the bits that inverse RoPE and `act_quant` of `hca_decode`'s output have. Seen as
    [m, groups, 4096] and [m, groups, 32] they are operands of `wo_a_fp8`.

    Args:
        q: [m, num_heads, 512] bf16, as of `hca_decode`.
        cache: [pages, 37440] uint8, likewise.
        window_idx: [m, 128] int32.
        window_length: [m] int32.
        page_table: [m, num_pages] int32.
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
    args = (q, cache, window_idx, window_length, page_table, entry_length)
    _check_fold(args, sink, positions, cos_sin)
    return hca_fold_fp8(*hca_parts(*args), sink, positions, cos_sin)


def _check(
    q: torch.Tensor,
    cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    page_table: torch.Tensor,
    entry_length: torch.Tensor,
) -> None:
    require_tensor(PARTS, "q", q, dtype=torch.bfloat16, ndim=3)
    require_tensor(PARTS, "cache", cache, dtype=torch.uint8, ndim=2, device=q.device)
    for name, tensor, ndim in (
        ("window_idx", window_idx, 2),
        ("window_length", window_length, 1),
        ("page_table", page_table, 2),
        ("entry_length", entry_length, 1),
    ):
        require_tensor(PARTS, name, tensor, dtype=torch.int32, ndim=ndim, device=q.device)
    (m, num_heads, _), num_pages, pages = q.shape, page_table.shape[1], cache.shape[0]
    CONTRACT.check(PARTS, m=m, num_heads=num_heads, num_parts=num_pages // PART_PAGES, pages=pages)
    require_shape(PARTS, "q", q, (m, num_heads, HEAD_DIM))
    require_shape(PARTS, "cache", cache, (pages, page_bytes(PAGE_ROWS)))
    require_shape(PARTS, "page_table", page_table, (m, num_pages // PART_PAGES * PART_PAGES))
    require_shape(PARTS, "window_idx", window_idx, (m, WINDOW))
    require_shape(PARTS, "window_length", window_length, (m,))
    require_shape(PARTS, "entry_length", entry_length, (m,))


def _check_fold(args: tuple[torch.Tensor, ...], sink: torch.Tensor, *angles: torch.Tensor) -> None:
    """Check what the fold takes, which would refuse it after a launch; faults of `args` are named first."""
    try:
        q, (m, num_heads) = args[0], (*args[0].shape, 0, 0)[:2]
        if angles:
            require_epilogue(FP8_NAME, sink, *angles, m=m, num_heads=num_heads, device=q.device)
        else:
            require_input(NAME, "sink", sink, (num_heads,), dtype=torch.float32, device=q.device)
    except (AttributeError, ContractError):
        _check(*args)
        raise


@cache
def _parts_variant(num_heads: int, num_parts: int) -> Variant:
    return Variant(f"h{num_heads}-p{num_parts}", {"num_heads": num_heads, "num_parts": num_parts})


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Return queries of random lengths; of ragged ones some have no entry, and some pages are missing."""
    generator = torch.Generator(device).manual_seed(seed)
    m, num_heads, num_pages = dims["m"], dims["num_heads"], dims["num_parts"] * PART_PAGES
    pages = dims["pages"]

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=torch.int32)

    q = torch.randn(m, num_heads, HEAD_DIM, generator=generator, device=device).to(torch.bfloat16)
    window_idx = integers(0, pages * PAGE_ROWS, m, WINDOW)
    table = integers(0, pages, m, num_pages)
    window_length = torch.full((m,), WINDOW, dtype=torch.int32, device=device)
    entry_length = torch.full((m,), num_pages * PAGE_ROWS, dtype=torch.int32, device=device)
    if dims["ragged"]:
        table = torch.where(integers(0, 16, m, num_pages) == 0, -1, table)
        window_length, entry_length = integers(0, WINDOW + 1, m), integers(0, num_pages * PAGE_ROWS + 1, m)
        entry_length = torch.where(integers(0, 4, m) == 0, 0, entry_length)
    return q, make_cache(pages, device, generator), window_idx, window_length, table, entry_length


def _case(case_id: str, m: int, num_heads: int, num_parts: int, pages: int, *tags: str) -> Case:
    dims = {"m": m, "num_heads": num_heads, "num_parts": num_parts, "pages": pages}
    dims["ragged"] = int("bench" not in tags)
    # A block is long in the interpreter: two rows do there.
    return Case(case_id, dims if tags else {**dims, "max_m": 2}, tags or ("test",))


MILLION = 8192 // PART  # parts of 2**20 tokens
_BENCH = tuple((m, h) for h in HEADS for m in (1, 64))
PARTS_SPEC = KernelSpec(
    name=PARTS,
    fn=hca_parts,
    reference=decode_reference.hca_parts,
    make_inputs=_make_inputs,
    make_kernel=make_parts,
    variants=tuple(_parts_variant(h, MILLION) for h in HEADS),
    select=lambda d: _parts_variant(d["num_heads"], d["num_parts"]),
    contract=CONTRACT,
    cases=(
        _case("empty", 0, 8, 1, 1),
        _case("one-row", 1, 8, 1, 1),
        _case("three-rows", 3, 16, 2, 20, "gpu"),
        *(_case(f"m{m}-h{h}-1m", m, h, MILLION, m * 128, "gpu", "bench") for m, h in _BENCH),
    ),
    tolerance=decode_reference.hca_parts_tolerance,
    num_bytes=lambda d: (
        d["m"]
        * (
            (WINDOW + d["num_parts"] * PART) * (VALUE_BYTES + SCALE_BYTES)
            + d["num_heads"] * (HEAD_DIM * 2 + (d["num_parts"] + 1) * (HEAD_DIM + 2) * 4)
        )
    ),
    num_flops=lambda d: 4 * d["m"] * d["num_heads"] * (WINDOW + d["num_parts"] * PART) * HEAD_DIM,
    row_invariant=False,  # queries come with their pages: tests/kernels/test_hca_decode.py
    source="DeepSeek-V4 report 2.3.2 and 3.3; FlashMLA's paged rows",
    small={"num_heads": 64, "num_parts": 1},
)
SPECS = (PARTS_SPEC,)
