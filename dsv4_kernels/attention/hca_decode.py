"""Decode over all compressed entries of a request, straight from paged FP8 rows: HCA (report 2.3.2).

Keys are cut into parts of fixed places: the window, then every 512 entries. A block takes one part of one
query, and a second kernel (`hca_fold`) folds the parts in ascending order. Both do the same for every
batch: a row's bits depend on nothing but its own keys, and one long request fills the GPU.
Design and measurements: docs/attention.md.
"""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import cache_rows, decode_reference
from dsv4_kernels.attention.cache_layout import (
    HEAD_DIM,
    NOPE_DIM,
    PAGE_ROWS,
    ROPE_DIM,
    SCALE_BYTES,
    VALUE_BYTES,
    page_bytes,
)
from dsv4_kernels.attention.cache_rows import expand_rows, load_rows
from dsv4_kernels.attention.hca_fold import HEADS, MAX_PARTS, hca_fold
from dsv4_kernels.attention.sparse_decode import (
    CHUNK,
    FLOOR,
    LOG2_E,
    MASKED,
    MAX_PAGES,
    MAX_QUERIES,
    WINDOW,
    Config,
    make_cache,
)
from dsv4_kernels.contract import Contract, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

NAME = "hca_decode"
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
        "0 < window_pages",
        "window_pages <= MAX_PAGES",
        "0 < entry_pages",
        "entry_pages <= MAX_PAGES",
    ),
    consts={"MAX_QUERIES": MAX_QUERIES, "MAX_PAGES": MAX_PAGES, "MAX_PARTS": MAX_PARTS, "HEADS": 8},
)


def make_parts(num_heads: int, num_parts: int, config: Config) -> Any:
    """Return the PrimFunc of so many parts of entries; queries and the pages of both caches stay symbolic.

    A cache comes three times, as what its bytes are seen as: e4m3, bf16 and 32-bit words.
    """
    m = T.dynamic("m")
    window_pages, entry_pages = T.dynamic("window_pages"), T.dynamic("entry_pages")
    block_h, size = config.block_h, page_bytes(PAGE_ROWS)
    head_lanes = config.threads // block_h
    values_at, rope_at, scales_at = cache_rows.layouts(config.threads)
    weights_at = T.Fragment((block_h, CHUNK), lambda h, j: (h * head_lanes + j % head_lanes, j // head_lanes))

    @T.macro
    def load(rows: Any, places: Any, first: Any, nope: Any, rope: Any, scales: Any):
        load_rows(rows[0], rows[1], rows[2], places, first, nope, rope, scales)

    @T.prim_func
    def hca_parts_kernel(
        q: T.Tensor[(m, num_heads, HEAD_DIM), T.bfloat16],
        window_values: T.Tensor[(window_pages, size), T.float8_e4m3fn],
        window_halves: T.Tensor[(window_pages, size // 2), T.bfloat16],
        window_words: T.Tensor[(window_pages, size // 4), T.int32],
        window_idx: T.Tensor[(m, WINDOW), T.int32],
        window_length: T.Tensor[(m,), T.int32],
        entry_values: T.Tensor[(entry_pages, size), T.float8_e4m3fn],
        entry_halves: T.Tensor[(entry_pages, size // 2), T.bfloat16],
        entry_words: T.Tensor[(entry_pages, size // 4), T.int32],
        page_table: T.Tensor[(m, num_parts, PART_PAGES), T.int32],
        entry_length: T.Tensor[(m,), T.int32],
        acc_out: T.Tensor[(m, num_parts + 1, HEAD_DIM, num_heads), T.float32],
        top_out: T.Tensor[(m, num_parts + 1, num_heads), T.float32],
        total_out: T.Tensor[(m, num_parts + 1, num_heads), T.float32],
    ):
        with T.Kernel(num_parts + 1, num_heads // block_h, m, threads=config.threads) as (part, bh, bm):
            q_tile = T.alloc_shared((block_h, HEAD_DIM), T.bfloat16)
            keys = T.alloc_shared((CHUNK, HEAD_DIM), T.bfloat16)
            logits = T.alloc_shared((block_h, CHUNK + 4), T.float32)
            weights = T.alloc_shared((block_h, CHUNK), T.bfloat16)
            places = T.alloc_shared((PART,), T.int32)
            factor = T.alloc_shared((block_h,), T.float32)
            tile = T.alloc_shared((HEAD_DIM, block_h), T.float32)  # takes the place of queries and keys
            nope = T.alloc_fragment((CHUNK, NOPE_DIM), T.float8_e4m3fn)
            rope = T.alloc_fragment((CHUNK, ROPE_DIM), T.bfloat16)
            scales = T.alloc_fragment((CHUNK, cache_rows.SCALE_WORDS), T.int32)
            wide = T.alloc_fragment((CHUNK, NOPE_DIM), T.bfloat16)
            products = T.alloc_fragment((CHUNK, block_h), T.float32)
            weight = T.alloc_fragment((block_h, CHUNK), T.float32)
            rounded = T.alloc_fragment((block_h, CHUNK), T.bfloat16)
            top = T.alloc_fragment((block_h,), T.float32)
            top_before = T.alloc_fragment((block_h,), T.float32)
            total = T.alloc_fragment((block_h,), T.float32)
            chunk_total = T.alloc_fragment((block_h,), T.float32)
            acc = T.alloc_fragment((HEAD_DIM, block_h), T.float32)
            T.annotate_layout(
                {
                    nope: values_at,
                    wide: values_at,
                    rope: rope_at,
                    scales: scales_at,
                    weight: weights_at,
                    rounded: weights_at,
                }
            )

            for h, d in T.Parallel(block_h, HEAD_DIM):
                q_tile[h, d] = q[bm, bh * block_h + h, d]
            for j in T.Parallel(PART):
                in_window = part == 0 and j < WINDOW
                window_place = T.if_then_else(
                    in_window and j < window_length[bm], window_idx[bm, T.min(j, WINDOW - 1)], -1
                )
                entry = (part - 1) * PART + j
                page = T.if_then_else(
                    part > 0 and entry < entry_length[bm],
                    page_table[bm, T.max(part - 1, 0), j // PAGE_ROWS],
                    -1,
                )
                entry_place = T.if_then_else(
                    page >= 0 and page < entry_pages, page * PAGE_ROWS + j % PAGE_ROWS, -1
                )
                places[j] = T.if_then_else(
                    part == 0,
                    T.if_then_else(window_place < window_pages * PAGE_ROWS, window_place, -1),
                    entry_place,
                )
            T.clear(acc)
            T.clear(total)
            T.fill(top, FLOOR)
            window = (window_values, window_halves, window_words)
            entries = (entry_values, entry_halves, entry_words)
            if part == 0:
                load(window, places, 0, nope, rope, scales)
            else:
                load(entries, places, 0, nope, rope, scales)
            for c in T.serial(PART_PAGES):
                expand_rows(nope, rope, scales, wide, keys)
                # The next chunk is on its way while this one is multiplied.
                if c + 1 < PART_PAGES:
                    if part == 0:
                        load(window, places, (c + 1) * CHUNK, nope, rope, scales)
                    else:
                        load(entries, places, (c + 1) * CHUNK, nope, rope, scales)
                T.gemm(keys, q_tile, products, transpose_B=True, clear_accum=True, policy=_COLUMNS)
                for j, h in T.Parallel(CHUNK, block_h):
                    logits[h, j] = products[j, h]
                for h, j in T.Parallel(block_h, CHUNK):
                    weight[h, j] = T.if_then_else(
                        places[c * CHUNK + j] >= 0, logits[h, j] * (LOG2_E / HEAD_DIM**0.5), MASKED
                    )
                T.copy(top, top_before)
                T.reduce_max(weight, top, dim=1, clear=False)
                for h, j in T.Parallel(block_h, CHUNK):
                    weight[h, j] = T.exp2(weight[h, j] - top[h])
                T.reduce_sum(weight, chunk_total, dim=1)
                for h in T.Parallel(block_h):
                    total[h] = total[h] * T.exp2(top_before[h] - top[h]) + chunk_total[h]
                for h in T.Parallel(block_h):
                    factor[h] = T.exp2(top_before[h] - top[h])
                for h, j in T.Parallel(block_h, CHUNK):
                    rounded[h, j] = T.cast(weight[h, j], "bfloat16")
                for h, j in T.Parallel(block_h, CHUNK):
                    weights[h, j] = rounded[h, j]
                for d, h in T.Parallel(HEAD_DIM, block_h):
                    acc[d, h] *= factor[h]
                T.gemm(keys, weights, acc, transpose_A=True, transpose_B=True, policy=_ROWS)
            for d, h in T.Parallel(HEAD_DIM, block_h):
                tile[d, h] = acc[d, h]
            for d, h in T.Parallel(HEAD_DIM, block_h):
                acc_out[bm, part, d, bh * block_h + h] = tile[d, h]
            for h in T.Parallel(block_h):
                top_out[bm, part, bh * block_h + h] = top[h]
            for h in T.Parallel(block_h):
                total_out[bm, part, bh * block_h + h] = total[h]

    return hca_parts_kernel


_COLUMNS, _ROWS = T.GemmWarpPolicy.FullCol, T.GemmWarpPolicy.FullRow


def _empty_parts(
    q: torch.Tensor,
    window_cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    entry_cache: torch.Tensor,
    page_table: torch.Tensor,
    entry_length: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, num_heads, dim = q.shape
    parts = page_table.shape[1] // PART_PAGES + 1
    acc = q.new_empty((m, parts, dim, num_heads), dtype=torch.float32)
    return acc, acc.new_empty((m, parts, num_heads)), acc.new_empty((m, parts, num_heads))


@operator(PARTS, _empty_parts)
def hca_parts(
    q: torch.Tensor,
    window_cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    entry_cache: torch.Tensor,
    page_table: torch.Tensor,
    entry_length: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend each query to each part of its keys: the first half of `hca_decode`, whose arguments these are.

    Returns:
        acc: [m, parts, 512, num_heads] fp32: keys times exp2(logit - top); part 0 is the window.
        top: [m, parts, num_heads] fp32: the largest logit times log2(e); -1e30 where a part has no key.
        total: [m, parts, num_heads] fp32: sum of exp2(logit - top).

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    _check(q, window_cache, window_idx, window_length, entry_cache, page_table, entry_length)
    args = (q, window_cache, window_idx, window_length, entry_cache, page_table, entry_length)
    if runtime.uses_reference(q):
        return decode_reference.hca_parts(*args)
    outputs = _empty_parts(*args)
    if q.shape[0]:
        table = page_table.view(q.shape[0], -1, PART_PAGES)
        window, entry = _views(window_cache), _views(entry_cache)
        inputs = (q, *window, window_idx, window_length, *entry, table, entry_length)
        runtime.launch(make_parts, _parts_variant(q.shape[1], table.shape[1]).kwargs, (*inputs, *outputs))
    return outputs


def hca_decode(
    q: torch.Tensor,
    window_cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    entry_cache: torch.Tensor,
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
        window_cache: [pages, 37440] uint8, pages of 64 rows: see `cache_layout`.
        window_idx: [m, 128] int32, places (page * 64 + row); outside the cache: masked.
        window_length: [m] int32: places of `window_idx` from there on are masked.
        entry_cache: as window_cache, compressed entries.
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
    lists = (window_cache, window_idx, window_length, entry_cache, page_table, entry_length)
    return hca_fold(*hca_parts(q, *lists), sink)


def _check(
    q: torch.Tensor,
    window_cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    entry_cache: torch.Tensor,
    page_table: torch.Tensor,
    entry_length: torch.Tensor,
) -> None:
    require_tensor(PARTS, "q", q, dtype=torch.bfloat16, ndim=3)
    for name, tensor, ndim in (
        ("window_idx", window_idx, 2),
        ("window_length", window_length, 1),
        ("page_table", page_table, 2),
        ("entry_length", entry_length, 1),
    ):
        require_tensor(PARTS, name, tensor, dtype=torch.int32, ndim=ndim, device=q.device)
    for name, tensor in (("window_cache", window_cache), ("entry_cache", entry_cache)):
        require_tensor(PARTS, name, tensor, dtype=torch.uint8, ndim=2, device=q.device)
    (m, num_heads, _), num_pages = q.shape, page_table.shape[1]
    pages = {"window_pages": window_cache.shape[0], "entry_pages": entry_cache.shape[0]}
    CONTRACT.check(PARTS, m=m, num_heads=num_heads, num_parts=num_pages // PART_PAGES, **pages)
    require_shape(PARTS, "q", q, (m, num_heads, HEAD_DIM))
    require_shape(PARTS, "page_table", page_table, (m, num_pages // PART_PAGES * PART_PAGES))
    require_shape(PARTS, "window_idx", window_idx, (m, WINDOW))
    require_shape(PARTS, "window_length", window_length, (m,))
    require_shape(PARTS, "entry_length", entry_length, (m,))
    for name, tensor in (("window", window_cache), ("entry", entry_cache)):
        shape = (pages[f"{name}_pages"], page_bytes(PAGE_ROWS))
        require_shape(PARTS, f"{name}_cache", tensor, shape)


def _views(pages: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(pages.view(dtype) for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.int32))


@cache
def _parts_variant(num_heads: int, num_parts: int) -> Variant:
    block_h = math.gcd(num_heads, 64)
    config = Config(block_h, 256 if block_h > 8 else 128)
    kwargs = {"num_heads": num_heads, "num_parts": num_parts, "config": config}
    return Variant(f"h{num_heads}-p{num_parts}", kwargs)


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Return queries of random lengths; of ragged ones some have no entry, and some pages are missing."""
    generator = torch.Generator(device).manual_seed(seed)
    m, num_heads, num_pages = dims["m"], dims["num_heads"], dims["num_parts"] * PART_PAGES
    window_pages, entry_pages = dims["window_pages"], dims["entry_pages"]

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=torch.int32)

    q = torch.randn(m, num_heads, HEAD_DIM, generator=generator, device=device).to(torch.bfloat16)
    window_idx = integers(0, window_pages * PAGE_ROWS, m, WINDOW)
    table = integers(0, entry_pages, m, num_pages)
    window_length = torch.full((m,), WINDOW, dtype=torch.int32, device=device)
    entry_length = torch.full((m,), num_pages * PAGE_ROWS, dtype=torch.int32, device=device)
    if dims["ragged"]:
        table = torch.where(integers(0, 16, m, num_pages) == 0, -1, table)
        window_length, entry_length = integers(0, WINDOW + 1, m), integers(0, num_pages * PAGE_ROWS + 1, m)
        entry_length = torch.where(integers(0, 4, m) == 0, 0, entry_length)
    window, entry = (make_cache(pages, device, generator) for pages in (window_pages, entry_pages))
    return q, window, window_idx, window_length, entry, table, entry_length


def _case(case_id: str, m: int, num_heads: int, num_parts: int, pages: int, *tags: str) -> Case:
    dims = {"m": m, "num_heads": num_heads, "num_parts": num_parts}
    dims |= {"window_pages": min(pages, 256), "entry_pages": pages, "ragged": int("bench" not in tags)}
    return Case(case_id, dims, tags or ("test",))


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
SPECS = ()  # not proved yet: tests/kernels/test_hca_decode.py
