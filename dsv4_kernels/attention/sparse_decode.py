"""Sparse attention of single tokens, straight from paged FP8 rows: window and selected entries (report 2.3).

A block takes one query and `block_h` of its heads, over all keys of both lists in their order. Nothing is
split over keys, so a row's bits depend on no batch. Keys are the matrix instruction's rows and heads its
columns: few heads are no padded tile.
Design and measurements: docs/attention.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import cache_rows, decode_reference, reference
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
from dsv4_kernels.attention.cache_rows import expand_rows, load_rows
from dsv4_kernels.contract import Contract, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

NAME = "sparse_decode"
WINDOW = 128  # keys of the window
CHUNK = cache_rows.ROWS  # keys between two rescalings
HEAD_LANES = 4  # threads that add a head's weights
LOG2_E = 1.4426950408889634
FLOOR = -1e30  # below any logit; finite, so that the difference of two is no nan
MASKED = -2e30  # below the floor by more than any exponent: exp2(MASKED - FLOOR) is 0
INFINITY_BITS = 0x7F800000
MOST_HEADS, FEW_HEADS = 64, 32  # of a block; the fewer, where the blocks then are one wave
MULTIPROCESSORS = 132  # of an H100
MAX_QUERIES = 65535  # the second launch extent
MAX_PAGES = MAX_PLACES // PAGE_ROWS


@dataclass(frozen=True)
class Config:
    """Heads a block, and its threads: a warpgroup multiplies at least eight heads."""

    block_h: int
    threads: int


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
    block_h, size = config.block_h, page_bytes(PAGE_ROWS)
    num_chunks = (WINDOW + topk) // CHUNK
    values_at, rope_at, scales_at = cache_rows.layouts(config.threads)
    # Equally many threads add a head's weights whatever the block: their tree decides a row's last bits. In
    # blocks of fewer heads the threads that are left over compute the same once more.
    copies = config.threads // (block_h * HEAD_LANES)
    weights_at = T.Fragment(
        (block_h, CHUNK),
        forward_fn=lambda h, j, rep=0: ((rep * block_h + h) * HEAD_LANES + j % HEAD_LANES, j // HEAD_LANES),
        replicate=copies,
    )

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
            q_tile = T.alloc_shared((block_h, HEAD_DIM), T.bfloat16)
            keys = T.alloc_shared((CHUNK, HEAD_DIM), T.bfloat16)
            logits = T.alloc_shared((block_h, CHUNK + 4), T.float32)
            weights = T.alloc_shared((block_h, CHUNK), T.bfloat16)
            places = T.alloc_shared((WINDOW + topk,), T.int32)
            factor = T.alloc_shared((block_h,), T.float32)
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
            T.clear(acc)
            T.clear(total)
            T.fill(top, FLOOR)
            load_rows(window_values, window_halves, window_words, places, 0, nope, rope, scales)
            for c in T.serial(num_chunks):
                expand_rows(nope, rope, scales, wide, keys)
                # The next chunk is on its way while this one is multiplied. The window's second is named by
                # its number: the compiler puts it in for c + 1, and the proofs compare texts.
                if c == 0:
                    load_rows(window_values, window_halves, window_words, places, CHUNK, nope, rope, scales)
                elif c + 1 < num_chunks:
                    load_rows(
                        entry_values, entry_halves, entry_words, places, (c + 1) * CHUNK, nope, rope, scales
                    )
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
            for h in T.Parallel(block_h):
                factor[h] = T.if_then_else(
                    total[h] > 0, 1.0 / (total[h] + T.exp2(sink[bh * block_h + h] * LOG2_E - top[h])), 0.0
                )
            for d, h in T.Parallel(HEAD_DIM, block_h):
                q_tile[h, d] = T.cast(acc[d, h] * factor[h], "bfloat16")
            for h, d in T.Parallel(block_h, HEAD_DIM):
                out[bm, bh * block_h + h, d] = q_tile[h, d]
            for h in T.Parallel(block_h):
                lse[bm, bh * block_h + h] = T.if_then_else(
                    total[h] > 0,
                    (top[h] + T.log2(total[h])) * (1 / LOG2_E),
                    T.reinterpret(INFINITY_BITS, "float32"),
                )

    return sparse_decode_kernel


_COLUMNS, _ROWS = T.GemmWarpPolicy.FullCol, T.GemmWarpPolicy.FullRow


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
        runtime.launch(make_kernel, _select(m, num_heads, topk).kwargs, (*inputs, out, lse))
    return out, lse


def _views(pages: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(pages.view(dtype) for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.int32))


def _select(m: int, num_heads: int, topk: int) -> Variant:
    return _variant(
        num_heads, topk, FEW_HEADS if m * (num_heads // FEW_HEADS) <= MULTIPROCESSORS else MOST_HEADS
    )


@cache
def _variant(num_heads: int, topk: int, most: int) -> Variant:
    block_h = math.gcd(num_heads, most)
    config = Config(block_h, 256 if block_h > 8 else 128)
    name = f"h{num_heads}-k{topk}" + (f"-b{block_h}" if block_h != math.gcd(num_heads, MOST_HEADS) else "")
    return Variant(name, {"num_heads": num_heads, "topk": topk, "config": config})


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
    variants=tuple(_variant(*shape, most) for shape in SHAPES for most in (FEW_HEADS, MOST_HEADS)),
    select=lambda d: _select(d["m"], d["num_heads"], d["topk"]),
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
