"""The lightning indexer's scores in decode, straight from pages of FP4 keys (report 2.3.1, 5.2.1).

Half the bytes of `index_logits_paged`. Hopper's tensor core has no FP4: codes become e4m3 through a table
of eight bytes on their way to the registers that it reads. A lane has 16 bytes of a key, one scale's
32 dims, so a lane's table is that of its scale relative to the key's largest, and one factor for the key is
left. Dims are multiplied in another order than they are stored; the queries follow it.

The tokens of a request, up to four, share one read of its keys. Design and measurements: docs/attention.md.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import index_reference
from dsv4_kernels.attention.index_fp4 import (
    DIM,
    SCALES,
    TABLE_FACTOR,
    WORDS,
    key_widening,
    largest_scale,
    query_widening,
    source,
)
from dsv4_kernels.attention.index_logits import CONTRACT, PART_PAGES, require_heads
from dsv4_kernels.contract import ContractError, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.late import released_late
from dsv4_kernels.tile.scale import ue8m0_to_f32

NAME = "index_logits_fp4"
PAGE_ROWS = 64
PAGE_LINES = PAGE_ROWS + PAGE_ROWS // WORDS  # of 16 words: 64 of codes, four of scales
PAGE_BYTES = PAGE_LINES * WORDS * 4
F32_MINUS_INF = 0xFF800000 - (1 << 32)  # as int32
PRODUCER_REGISTERS = 24


@dataclass(frozen=True)
class Config:
    """Pages of a block and schedule.

    Attributes:
        pages: of a block.
        at_once: pages that are widened and multiplied in one round, each by all tokens; 1: one page, by two
            halves of the tokens.
        num_stages: rounds whose pages are on their way.
        threads: that multiply; as many load.
        blocks: a multiprocessor.
        registers: of a thread that multiplies, taken from those that load.
    """

    pages: int = PART_PAGES
    at_once: int = 2
    num_stages: int = 4
    threads: int = 128
    blocks: int = 3
    registers: int = 136


def make_kernel(num_heads: int, next_n: int, num_parts: int, config: Config) -> Any:
    """Return the PrimFunc for requests of `next_n` tokens and tables of so many parts.

    m counts requests. Queries, keys and scales are words: eight codes, four scales.
    """
    m, num_pages = T.dynamic("m"), T.dynamic("num_pages")
    pages, at_once, threads = config.pages, config.at_once, config.threads
    # A round's two products: two pages by all tokens, or a page by two halves of them.
    count = next_n * at_once // 2
    second = next_n - count
    widen_queries, widen_keys = query_widening(next_n, num_heads, threads), key_widening(PAGE_ROWS)

    @T.macro
    def multiply(keys, q_tile, first, acc):
        T.wgmma_gemm(
            keys,
            q_tile[first * num_heads : (first + count) * num_heads, :],
            acc,
            transpose_B=True,
            clear_accum=True,
        )

    @T.macro
    def reduce(acc, w_tile, first, weighted, score):
        # relu without a maximum, of which a multiprocessor issues half as many: x + |x| is twice it.
        for j, n, h in T.Parallel(PAGE_ROWS, count, num_heads):
            weighted[j, n, h] = (acc[j, n * num_heads + h] + T.abs(acc[j, n * num_heads + h])) * w_tile[
                first + n, h
            ]
        T.reduce_sum(weighted, score, dim=2)

    @T.macro
    def store(out, bm, part, page, score0, score1, scales0, scales1, length):
        # One store for both products: of two, that they never meet would have to be proved.
        for j, i, n in T.Parallel(PAGE_ROWS, 2, count):
            out[bm, i * second + n, part, page + i * (at_once - 1), j] = T.if_then_else(
                T.cast((part * pages + page + i * (at_once - 1)) * PAGE_ROWS + j, "float32")
                < length[i * second + n],
                T.if_then_else(i == 0, score0[j, n], score1[j, n])
                * (
                    ue8m0_to_f32(largest_scale(T.if_then_else(i == 0, scales0[j], scales1[j])), 0)
                    * TABLE_FACTOR
                ),
                T.reinterpret(F32_MINUS_INF, "float32"),
            )

    @T.prim_func
    def index_logits_fp4_kernel(
        q: T.Tensor[(m, next_n, num_heads, WORDS), T.uint32],
        q_scale: T.Tensor[(m, next_n, num_heads), T.int32],
        weights: T.Tensor[(m, next_n, num_heads), T.float32],
        cache: T.Tensor[(num_pages, PAGE_LINES, WORDS), T.uint32],
        page_table: T.Tensor[(m, num_parts, pages), T.int32],
        lengths: T.Tensor[(m, next_n), T.int32],
        out: T.Tensor[(m, next_n, num_parts, pages, PAGE_ROWS), T.float32],
    ):
        with T.Kernel(num_parts, m, threads=threads) as (part, bm):
            T.import_source(source())
            T.annotate_min_blocks_per_sm(config.blocks)
            T.annotate_producer_reg_dealloc(PRODUCER_REGISTERS)
            T.annotate_consumer_reg_alloc(config.registers)
            q_tile = T.alloc_shared((next_n * num_heads, DIM), T.float8_e4m3fn)
            w_tile = T.alloc_shared((next_n, num_heads), T.float32)
            key_tile0 = T.alloc_shared((PAGE_ROWS, WORDS), T.uint32)
            key_tile1 = T.alloc_shared((PAGE_ROWS, WORDS), T.uint32)
            scale_tile0 = T.alloc_shared((PAGE_ROWS // WORDS, WORDS), T.uint32)
            scale_tile1 = T.alloc_shared((PAGE_ROWS // WORDS, WORDS), T.uint32)
            length = T.alloc_shared((next_n,), T.float32)  # exact: below 2**20, or beyond any key
            codes = T.alloc_fragment((PAGE_ROWS, SCALES, 4), T.uint32)
            scales0 = T.alloc_fragment((PAGE_ROWS,), T.int32)
            scales1 = T.alloc_fragment((PAGE_ROWS,), T.int32)
            keys0 = T.alloc_fragment((PAGE_ROWS, DIM), T.float8_e4m3fn)
            keys1 = T.alloc_fragment((PAGE_ROWS, DIM), T.float8_e4m3fn)
            set0 = T.alloc_fragment((PAGE_ROWS, count * num_heads), T.float32)
            set1 = T.alloc_fragment((PAGE_ROWS, count * num_heads), T.float32)
            weighted0 = T.alloc_fragment((PAGE_ROWS, count, num_heads), T.float32)
            weighted1 = T.alloc_fragment((PAGE_ROWS, count, num_heads), T.float32)
            score0 = T.alloc_fragment((PAGE_ROWS, count), T.float32)
            score1 = T.alloc_fragment((PAGE_ROWS, count), T.float32)
            widen_queries(q, q_scale, q_tile, bm, 0)
            for n, h in T.Parallel(next_n, num_heads):
                factor = ue8m0_to_f32(largest_scale(q_scale[bm, n, h]), 0) * TABLE_FACTOR
                w_tile[n, h] = weights[bm, n, h] * factor * 0.5
            for n in T.Parallel(next_n):
                length[n] = T.cast(lengths[bm, n], "float32")
            for k in T.Pipelined(pages // at_once, num_stages=config.num_stages):
                page = k * at_once
                T.copy(cache[page_table[bm, part, page], 0, 0], key_tile0)
                T.copy(cache[page_table[bm, part, page], PAGE_ROWS, 0], scale_tile0)
                if at_once == 2:
                    T.copy(cache[page_table[bm, part, page + 1], 0, 0], key_tile1)
                    T.copy(cache[page_table[bm, part, page + 1], PAGE_ROWS, 0], scale_tile1)
                for j in T.Parallel(PAGE_ROWS):
                    scales0[j] = T.cast(scale_tile0[j // WORDS, j % WORDS], "int32")
                widen_keys(key_tile0, scales0, codes, keys0)
                multiply(keys0, q_tile, 0, set0)
                if at_once == 2:
                    # Widened under the first page's product.
                    for j in T.Parallel(PAGE_ROWS):
                        scales1[j] = T.cast(scale_tile1[j // WORDS, j % WORDS], "int32")
                    widen_keys(key_tile1, scales1, codes, keys1)
                    multiply(keys1, q_tile, 0, set1)
                else:
                    multiply(keys0, q_tile, second, set1)
                T.wait_wgmma(1)
                reduce(set0, w_tile, 0, weighted0, score0)
                T.wait_wgmma(0)
                reduce(set1, w_tile, second, weighted1, score1)
                if at_once == 2:
                    store(out, bm, part, page, score0, score1, scales0, scales1, length)
                else:
                    store(out, bm, part, page, score0, score1, scales0, scales0, length)

    return released_late(index_logits_fp4_kernel)


def _empty_output(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    return weights.new_empty((q.shape[0], page_table.shape[1] * PAGE_ROWS))


@operator(NAME, _empty_output)
def index_logits_fp4(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Score queries against their request's FP4 keys: sum over heads of weight * relu(q . k).

    Of a head or key, 32 dims whose scale is below 2**-11 of the largest one count as zeros. A nan scale
    makes all scores of its head or key nan.

    Args:
        q: [m, num_heads, 64] uint8, two e2m1 a byte, see `hadamard_fp4`; num_heads 8, 16, 32 or 64. A
            request's next_n tokens follow each other, next_n 1 to 4; m = 0 is allowed.
        q_scale: [m, num_heads, 4] e8m0.
        weights: [m, num_heads] fp32, of tiny magnitudes rounded as by `index_logits_fp4_dense`.
        cache: [pages, 4352] uint8, see `index_cache_write`.
        page_table: [m / next_n, num_pages] int32, the pages of each request's keys in order; num_pages a
            multiple of 16. A page outside the cache has keys of zeros.
        lengths: [m] int32: keys that a query sees.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        [m, num_pages * 64] fp32, -inf from a query's length on.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_tensor(NAME, "q", q, dtype=torch.uint8, ndim=3)
    require_tensor(NAME, "q_scale", q_scale, dtype=torch.float8_e8m0fnu, ndim=3, device=q.device)
    require_tensor(NAME, "weights", weights, dtype=torch.float32, ndim=2, device=q.device)
    require_tensor(NAME, "cache", cache, dtype=torch.uint8, ndim=2, device=q.device)
    require_tensor(NAME, "page_table", page_table, dtype=torch.int32, ndim=2, device=q.device)
    require_tensor(NAME, "lengths", lengths, dtype=torch.int32, ndim=1, device=q.device)
    (queries, num_heads, _), m, num_pages = q.shape, page_table.shape[0], cache.shape[0]
    parts = page_table.shape[1] // PART_PAGES
    CONTRACT.check(NAME, m=m, num_parts=parts, num_pages=num_pages)
    require_heads(NAME, num_heads)
    next_n = queries // m if m else 1
    if queries != m * next_n or next_n not in NEXT_N:
        clause = f"q.shape[0] / page_table.shape[0] in {NEXT_N}"
        raise ContractError(f"{NAME}: requires {clause}, got q.shape[0]={queries}, page_table.shape[0]={m}")
    require_shape(NAME, "q", q, (queries, num_heads, DIM // 2))
    require_shape(NAME, "q_scale", q_scale, (queries, num_heads, SCALES))
    require_shape(NAME, "weights", weights, (queries, num_heads))
    require_shape(NAME, "cache", cache, (num_pages, PAGE_BYTES))
    require_shape(NAME, "page_table", page_table, (m, parts * PART_PAGES))
    require_shape(NAME, "lengths", lengths, (queries,))
    args = (q, q_scale, weights, cache, page_table, lengths)
    if runtime.uses_reference(q):
        return index_reference.index_logits_fp4(*args)
    out = _empty_output(*args)
    if m:
        by_token = (m, next_n, num_heads)
        inputs = (
            q.view(torch.uint32).view(*by_token, WORDS),
            q_scale.view(torch.int32).view(by_token),
            weights.view(by_token),
            cache.view(torch.uint32).view(num_pages, PAGE_LINES, WORDS),
            page_table.view(m, parts, PART_PAGES),
            lengths.view(m, next_n),
        )
        scores = out.view(m, next_n, parts, PART_PAGES, PAGE_ROWS)
        runtime.launch(make_kernel, _variant(num_heads, next_n, parts).kwargs, (*inputs, scores))
    return out


@functools.cache
def _variant(num_heads: int, next_n: int, num_parts: int) -> Variant:
    config = CONFIGS[next_n]
    kwargs = {"num_heads": num_heads, "next_n": next_n, "num_parts": num_parts, "config": config}
    return Variant(f"h{num_heads}-n{next_n}-p{num_parts}", kwargs)


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Return random queries and pages; of ragged ones lengths vary, and some pages are missing."""
    generator = torch.Generator(device).manual_seed(seed)
    m, next_n, num_heads, num_pages = dims["m"], dims["next_n"], dims["num_heads"], dims["num_pages"]
    queries, table_pages = m * next_n, dims["num_parts"] * PART_PAGES

    def integers(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=dtype)

    def scales(*shape: int) -> torch.Tensor:
        """Return UE8M0 bytes near one, a few of them far smaller."""
        near = integers(120, 130, shape, torch.uint8)
        return torch.where(integers(0, 32, shape, torch.uint8) == 0, near - 100, near)

    codes = integers(0, 256, (num_pages, PAGE_ROWS * DIM // 2), torch.uint8)
    pages = torch.cat((codes, scales(num_pages, PAGE_ROWS * SCALES)), dim=1).contiguous()
    q = integers(0, 256, (queries, num_heads, DIM // 2), torch.uint8)
    q_scale = scales(queries, num_heads, SCALES).view(torch.float8_e8m0fnu)
    weights = torch.randn(queries, num_heads, generator=generator, device=device)
    size = (m, table_pages)
    table = integers(0, num_pages, size, torch.int32)
    lengths = torch.full((queries,), table_pages * PAGE_ROWS, dtype=torch.int32, device=device)
    if dims["ragged"]:
        lengths = integers(0, table_pages * PAGE_ROWS + 1, (queries,), torch.int32)
        kind = torch.rand(size, generator=generator, device=device)
        table = torch.where(kind < 1 / 16, -1, torch.where(kind < 1 / 8, num_pages, table))
    return q, q_scale, weights, pages, table, lengths


def _case(
    case_id: str, m: int, next_n: int, num_heads: int, num_parts: int, num_pages: int, *tags: str
) -> Case:
    dims = {"m": m, "next_n": next_n, "num_heads": num_heads, "num_parts": num_parts, "num_pages": num_pages}
    return Case(case_id, {**dims, "ragged": int("bench" not in tags)}, tags or ("test",))


NEXT_N = (1, 2, 3, 4)
# By tokens: as many blocks a multiprocessor as registers allow.
CONFIGS = {
    1: Config(),
    2: Config(blocks=2, registers=216),
    3: Config(blocks=1, registers=240),
    4: Config(at_once=1, num_stages=8, blocks=2, registers=216),
}
SPEC = KernelSpec(
    name=NAME,
    fn=index_logits_fp4,
    reference=index_reference.index_logits_fp4,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(64, *shape) for shape in ((1, 16), (1, 64), (1, 256), (2, 64), (3, 64), (4, 64))),
    select=lambda d: _variant(d["num_heads"], d["next_n"], d["num_parts"]),
    contract=CONTRACT,
    cases=(
        _case("empty", 0, 1, 64, 1, 1),
        _case("one-row", 1, 1, 64, 1, 3),
        _case("two-tokens", 1, 2, 64, 1, 3),
        _case("ragged", 3, 2, 8, 1, 40, "gpu"),
        _case("ragged-h64", 37, 1, 64, 3, 500, "gpu"),
        _case("ragged-n4", 9, 4, 64, 2, 500, "gpu"),
        _case("b1-256k", 1, 1, 64, 256, 4096, "gpu", "bench"),
        _case("b64-16k", 64, 1, 64, 16, 64 * 256, "gpu", "bench"),
        _case("b128-64k", 128, 1, 64, 64, 128 * 1024, "gpu", "bench"),
        *(_case(f"b64-64k-n{n}", 64, n, 64, 64, 64 * 1024, "gpu", "bench") for n in (2, 3, 4)),
    ),
    tolerance=index_reference.index_logits_fp4_tolerance,
    num_bytes=lambda d: (
        d["m"]
        * (
            d["num_parts"] * PART_PAGES * (PAGE_BYTES + d["next_n"] * PAGE_ROWS * 4 + 4)
            + d["next_n"] * d["num_heads"] * (DIM // 2 + SCALES + 4)
        )
    ),
    num_flops=lambda d: (
        2 * d["m"] * d["next_n"] * d["num_heads"] * DIM * d["num_parts"] * PART_PAGES * PAGE_ROWS
    ),
    peers=("deepgemm",),
    row_invariant=False,  # queries come with their pages: tests/kernels/test_index_logits.py
    source="DeepSeek-V4 report 2.3.1 and 5.2.1; DeepGEMM's pages of 68-byte keys",
    small={"num_heads": 64, "num_parts": 1},
)
