"""Sparse attention of single tokens, straight from paged FP8 rows: window and selected entries (report 2.3).

A block takes one query and 64 of its heads, over all keys of both lists in their order (`decode_tile`).
Nothing is split over keys, so a row's bits depend on no batch. Fewer heads are padded in the block, not in
memory.
Design and measurements: docs/attention.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tilelang import language as T
from tilelang.layout import make_full_bank_swizzled_layout

from dsv4_kernels import runtime
from dsv4_kernels.attention import decode_reference, reference
from dsv4_kernels.attention.cache_layout import (
    HEAD_DIM,
    MAX_PLACES,
    NOPE_DIM,
    PAGE_ROWS,
    ROPE_DIM,
    SCALE_BYTES,
    VALUE_BYTES,
    page_bytes,
)
from dsv4_kernels.attention.cache_rows import SCALE_WORDS
from dsv4_kernels.attention.decode_tile import (
    AHEAD,
    BLOCK_HEADS,
    CHUNK,
    EXP2_SCALE,
    F32_INF,
    F32_MINUS_INF,
    HALF,
    HALVES_AT,
    LOG2_E,
    SLOTS,
    SOFTMAX_SCALE,
    THREADS,
    WARPGROUPS,
    Rows,
    Softmax,
    attend,
    expand,
    gather,
    join_totals,
)
from dsv4_kernels.contract import Contract, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

NAME = "sparse_decode"
WINDOW = AHEAD * CHUNK  # keys of the window: 128, the chunks that come before the others
MAX_QUERIES = 65535  # the second launch extent
MAX_PAGES = MAX_PLACES // PAGE_ROWS


@dataclass(frozen=True)
class Config:
    """Blocks that share out the 512 dims of the output; each computes all logits."""

    splits: int


CONTRACT = Contract(
    (
        "0 <= m",
        "m <= MAX_QUERIES",
        "0 < num_heads",
        "num_heads % HEADS == 0",
        "0 < topk",
        "topk % CHUNK == 0",
        "topk <= 4096",
        "0 < window_pages",
        "window_pages <= MAX_PAGES",
        "0 < entry_pages",
        "entry_pages <= MAX_PAGES",
    ),
    consts={"MAX_QUERIES": MAX_QUERIES, "MAX_PAGES": MAX_PAGES, "CHUNK": CHUNK, "HEADS": 8},
)


def make_kernel(num_heads: int, topk: int, config: Config) -> Any:
    """Return the PrimFunc; queries and the pages of both caches stay symbolic.

    A cache comes three times, as what its bytes are seen as: e4m3, bf16 and 32-bit words.
    """
    m, window_pages, entry_pages = T.dynamic("m"), T.dynamic("window_pages"), T.dynamic("entry_pages")
    size, num_keys = page_bytes(PAGE_ROWS), WINDOW + topk
    num_chunks, num_dims = num_keys // CHUNK, HEAD_DIM // config.splits

    def head(bh: Any, i: Any) -> Any:
        """Return the head of a block's row; rows past the last head repeat it."""
        own = bh * BLOCK_HEADS + i
        return own if num_heads % BLOCK_HEADS == 0 else T.min(own, num_heads - 1)

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
        with T.Kernel(config.splits, T.ceildiv(num_heads, BLOCK_HEADS), m, threads=THREADS) as (bd, bh, bm):
            q_tile = T.alloc_shared((BLOCK_HEADS, HEAD_DIM), T.bfloat16)
            ring = T.alloc_shared((SLOTS, CHUNK, HEAD_DIM), T.bfloat16)
            weights = T.alloc_shared((BLOCK_HEADS, CHUNK), T.bfloat16)
            places = T.alloc_shared((num_keys + AHEAD * CHUNK,), T.int32)
            mask = T.alloc_shared((num_keys,), T.float32)  # 0 or -inf, which logits start from
            exchange = T.alloc_shared((2, WARPGROUPS, BLOCK_HEADS), T.float32)
            out_tile = T.alloc_shared((BLOCK_HEADS, num_dims), T.bfloat16)
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
            acc = T.alloc_fragment((BLOCK_HEADS, num_dims), T.float32)
            rows = Rows(place, nope, wide, rope, scales)
            state = Softmax(
                logits, halves, half_max, half_sum, half_total, row_max, factor, exchange, weights
            )
            window = (window_values, window_halves, window_words)
            entries = (entry_values, entry_halves, entry_words)
            T.annotate_layout(
                {**rows.layout(), halves: HALVES_AT, out_tile: make_full_bank_swizzled_layout(out_tile)}
            )

            for j in T.Parallel(WINDOW):
                places[j] = T.if_then_else(
                    (j < window_length[bm]) & (window_idx[bm, j] < window_pages * PAGE_ROWS),
                    window_idx[bm, j],
                    -1,
                )
            for j in T.Parallel(topk):
                places[WINDOW + j] = T.if_then_else(
                    (j < entry_length[bm]) & (entry_idx[bm, j] < entry_pages * PAGE_ROWS),
                    entry_idx[bm, j],
                    -1,
                )
            for j in T.Parallel(AHEAD * CHUNK):
                places[num_keys + j] = -1
            for j in T.Parallel(num_keys):
                mask[j] = T.if_then_else(places[j] >= 0, 0.0, T.reinterpret(F32_MINUS_INF, "float32"))
            gather(window, places, 0, rows)
            for i, d in T.Parallel(BLOCK_HEADS, HEAD_DIM):
                q_tile[i, d] = q[bm, head(bh, i), d]
            expand(rows, ring, 0)
            gather(window, places, CHUNK, rows)
            attend(num_chunks, entries, places, mask, q_tile, ring, rows, state, acc, bd * num_dims, num_dims)
            join_totals(state, total)
            for i in T.Parallel(BLOCK_HEADS):
                factor[i] = total[i] + T.exp2(sink[head(bh, i)] * LOG2_E - row_max[i] * EXP2_SCALE)
            for i in T.Parallel(BLOCK_HEADS):
                factor[i] = T.if_then_else(total[i] == 0.0, 0.0, 1.0 / factor[i])
            if bd == 0:
                for i in T.Parallel(BLOCK_HEADS):
                    if bh * BLOCK_HEADS + i < num_heads:
                        lse[bm, bh * BLOCK_HEADS + i] = T.if_then_else(
                            total[i] == 0.0,
                            T.reinterpret(F32_INF, "float32"),
                            T.log(total[i]) + row_max[i] * SOFTMAX_SCALE,
                        )
            for i, j in T.Parallel(BLOCK_HEADS, num_dims):
                out_tile[i, j] = T.cast(acc[i, j] * factor[i], "bfloat16")
            for i, j in T.Parallel(BLOCK_HEADS, num_dims):
                if bh * BLOCK_HEADS + i < num_heads:
                    out[bm, bh * BLOCK_HEADS + i, bd * num_dims + j] = out_tile[i, j]

    return sparse_decode_kernel


def _empty_outputs(q: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


@operator(NAME, _empty_outputs)
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
    Keys are taken in the order of the lists, the window's first, in chunks of 64: a query's bits depend
    on nothing but its own data, whatever the number of queries.

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
    require_tensor(NAME, "q", q, dtype=torch.bfloat16, ndim=3)
    lists = (
        ("window", window_cache, window_idx, window_length),
        ("entry", entry_cache, entry_idx, entry_length),
    )
    for name, cache_pages, idx, length in lists:
        require_tensor(NAME, f"{name}_cache", cache_pages, dtype=torch.uint8, ndim=2, device=q.device)
        require_tensor(NAME, f"{name}_idx", idx, dtype=torch.int32, ndim=2, device=q.device)
        require_tensor(NAME, f"{name}_length", length, dtype=torch.int32, ndim=1, device=q.device)
    require_tensor(NAME, "sink", sink, dtype=torch.float32, ndim=1, device=q.device)
    (m, num_heads, _), topk = q.shape, entry_idx.shape[1]
    pages = {"window_pages": window_cache.shape[0], "entry_pages": entry_cache.shape[0]}
    CONTRACT.check(NAME, m=m, num_heads=num_heads, topk=topk, **pages)
    require_shape(NAME, "q", q, (m, num_heads, HEAD_DIM))
    require_shape(NAME, "sink", sink, (num_heads,))
    for (name, cache_pages, idx, length), width in zip(lists, (WINDOW, topk), strict=True):
        require_shape(NAME, f"{name}_cache", cache_pages, (pages[f"{name}_pages"], page_bytes(PAGE_ROWS)))
        require_shape(NAME, f"{name}_idx", idx, (m, width))
        require_shape(NAME, f"{name}_length", length, (m,))
    args = (q, window_cache, window_idx, window_length, entry_cache, entry_idx, entry_length, sink)
    if runtime.uses_reference(q):
        return decode_reference.sparse_decode(*args)
    out, lse = _empty_outputs(*args)
    if m:
        window, entry = _views(window_cache), _views(entry_cache)
        inputs = (q, *window, window_idx, window_length, *entry, entry_idx, entry_length, sink)
        runtime.launch(make_kernel, _variant(num_heads, topk).kwargs, (*inputs, out, lse))
    return out, lse


def _views(pages: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(pages.view(dtype) for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.int32))


@cache
def _variant(num_heads: int, topk: int) -> Variant:
    return Variant(f"h{num_heads}-k{topk}", {"num_heads": num_heads, "topk": topk, "config": Config(1)})


SHAPES = ((64, 512), (128, 1024))  # (heads, top-k): Flash, Pro


def make_cache(pages: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """Return pages of random rows as the cache writer leaves them."""
    nope = torch.randn(pages * PAGE_ROWS, NOPE_DIM, generator=generator, device=device)
    rope = torch.randn(pages * PAGE_ROWS, ROPE_DIM, generator=generator, device=device)
    entry = torch.cat((nope, rope), dim=-1).to(torch.bfloat16)
    empty = torch.zeros(pages, page_bytes(PAGE_ROWS), dtype=torch.uint8, device=device)
    slots = torch.arange(pages * PAGE_ROWS, device=device)
    return decode_reference.cache_write(empty, slots, *reference.fp8_entry(entry))


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    m, num_heads, topk = dims["m"], dims["num_heads"], dims["topk"]
    window_pages, entry_pages = dims["window_pages"], dims["entry_pages"]

    is_ragged = bool(dims["ragged"])

    def places(width: int, pages: int) -> torch.Tensor:
        """Return random places; of ragged lists a few are outside the cache."""
        high = pages * PAGE_ROWS
        idx = torch.randint(0, high, (m, width), generator=generator, device=device, dtype=torch.int32)
        kind = torch.randint(0, 64, (m, width), generator=generator, device=device)
        return torch.where(kind == 0, -1, torch.where(kind == 1, idx + high, idx)) if is_ragged else idx

    def length(width: int) -> torch.Tensor:
        """Return full lists; where they are ragged a quarter have any length, and a quarter none."""
        some = torch.randint(0, width + 1, (m,), generator=generator, device=device, dtype=torch.int32)
        kind = torch.randint(0, 4, (m,), generator=generator, device=device)
        kind = kind if is_ragged else torch.full_like(kind, 2)
        return torch.where(kind == 0, some, torch.where(kind == 1, 0, width)).to(torch.int32)

    q = torch.randn(m, num_heads, HEAD_DIM, generator=generator, device=device).to(torch.bfloat16)
    sink = torch.randn(num_heads, generator=generator, device=device)
    window = make_cache(window_pages, device, generator), places(WINDOW, window_pages), length(WINDOW)
    entry = make_cache(entry_pages, device, generator), places(topk, entry_pages), length(topk)
    return q, *window, *entry, sink


def _case(case_id: str, m: int, num_heads: int, topk: int, pages: int, *tags: str) -> Case:
    dims = {"m": m, "num_heads": num_heads, "topk": topk, "window_pages": pages, "entry_pages": pages}
    return Case(case_id, {**dims, "ragged": int("bench" not in tags)}, tags or ("test",))


SPEC = KernelSpec(
    name=NAME,
    fn=sparse_decode,
    reference=decode_reference.sparse_decode,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(*shape) for shape in SHAPES),
    select=lambda d: _variant(d["num_heads"], d["topk"]),
    contract=CONTRACT,
    cases=(
        _case("empty", 0, 8, 64, 1),
        _case("one-row", 1, 8, 64, 1),
        _case("four-rows", 4, 16, 128, 3, "gpu"),
        *(
            _case(f"m{m}-h{h}-k{k}", m, h, k, 1024, "gpu", "bench")
            for h, k in SHAPES
            for m in (2, 64, 128, 256)
        ),
        _case("h8", 3, 8, 512, 64, "gpu"),
        _case("h16", 70, 16, 512, 64, "gpu"),
        _case("h32", 130, 32, 1024, 64, "gpu"),
    ),
    tolerance=decode_reference.sparse_decode_tolerance,
    num_bytes=lambda d: (
        d["m"] * ((WINDOW + d["topk"]) * (VALUE_BYTES + SCALE_BYTES + 4) + d["num_heads"] * HEAD_DIM * 4)
    ),
    num_flops=lambda d: 4 * d["m"] * d["num_heads"] * (WINDOW + d["topk"]) * HEAD_DIM,
    peers=("flashmla",),
    row_invariant=False,  # queries come with their lists: tests/kernels/test_decode.py
    source="DeepSeek-V4 report 2.3; reference model's sparse attention; FlashMLA's two paged caches",
    small={"num_heads": 64, "topk": 64},
)
