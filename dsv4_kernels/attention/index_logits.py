"""The lightning indexer's scores in decode, straight from pages of FP8 keys (report 2.3.1).

Keys are the instruction's rows and the heads of one query its columns: the sum over heads is a thread's own
and two exchanges. A block takes 1024 keys of one query; a score depends on its query and key alone.
Design and measurements: docs/attention.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import index_reference
from dsv4_kernels.contract import Contract, ContractError, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

NAME = "index_logits_paged"
DIM = 128
PAGE_ROWS = 64
ROW_BYTES = DIM + 4  # e4m3 and an fp32 scale
PAGE_BYTES = PAGE_ROWS * ROW_BYTES
PAGE_LINES = PAGE_BYTES // DIM  # of 128 bytes: 64 of values, two of scales
LINE_FLOATS = DIM // 4
F32_MINUS_INF = 0xFF800000 - (1 << 32)  # as int32
HEADS = (8, 16, 32, 64)  # of the indexer: all of them, and shards
MAX_QUERIES = 65535  # the second launch extent


@dataclass(frozen=True)
class Config:
    """Pages of a block, how many of them are on their way, and blocks a multiprocessor."""

    pages: int = 16
    num_stages: int = 4
    threads: int = 128
    blocks: int = 4


PART_PAGES = Config.pages
CONTRACT = Contract(
    (
        "0 <= m",
        "m <= MAX_QUERIES",
        "0 < num_parts",
        "num_parts <= MAX_PARTS",
        "0 < num_pages",
        "num_pages <= MAX_PAGES",
    ),
    consts={
        "MAX_QUERIES": MAX_QUERIES,
        "MAX_PARTS": (1 << 20) // (PAGE_ROWS * PART_PAGES),
        "MAX_PAGES": 1 << 24,
    },
)


def make_kernel(num_heads: int, num_parts: int, config: Config) -> Any:
    """Return the PrimFunc for `num_heads` heads and tables of so many parts; queries and pages stay symbolic.

    The cache comes twice, in lines of 128 bytes: as e4m3, and as fp32.
    """
    m, num_pages = T.dynamic("m"), T.dynamic("num_pages")
    pages = config.pages

    @T.prim_func
    def index_logits_paged_kernel(
        q: T.Tensor[(m, num_heads, DIM), T.float8_e4m3fn],
        weights: T.Tensor[(m, num_heads), T.float32],
        values: T.Tensor[(num_pages, PAGE_LINES, DIM), T.float8_e4m3fn],
        floats: T.Tensor[(num_pages, PAGE_LINES, LINE_FLOATS), T.float32],
        page_table: T.Tensor[(m, num_parts, pages), T.int32],
        lengths: T.Tensor[(m,), T.int32],
        out: T.Tensor[(m, num_parts, pages, PAGE_ROWS), T.float32],
    ):
        with T.Kernel(num_parts, m, threads=config.threads) as (part, bm):
            T.annotate_min_blocks_per_sm(config.blocks)
            T.disable_warp_group_reg_alloc()
            q_tile = T.alloc_shared((num_heads, DIM), T.float8_e4m3fn)
            w_tile = T.alloc_shared((num_heads,), T.float32)
            key_tile = T.alloc_shared((PAGE_ROWS, DIM), T.float8_e4m3fn)
            scale_tile = T.alloc_shared((PAGE_ROWS // LINE_FLOATS, LINE_FLOATS), T.float32)
            length = T.alloc_shared((1,), T.float32)  # exact: below 2**20, or beyond any key
            products = T.alloc_fragment((PAGE_ROWS, num_heads), T.float32)
            score = T.alloc_fragment((PAGE_ROWS,), T.float32)
            for h in T.Parallel(num_heads):
                w_tile[h] = weights[bm, h]
            T.copy(q[bm, 0, 0], q_tile, disable_tma=True)
            for i in T.Parallel(1):
                length[i] = T.cast(lengths[bm], "float32")
            for k in T.Pipelined(pages, num_stages=config.num_stages):
                T.copy(values[page_table[bm, part, k], 0, 0], key_tile)
                T.copy(floats[page_table[bm, part, k], PAGE_ROWS, 0], scale_tile)
                T.gemm(key_tile, q_tile, products, transpose_B=True, clear_accum=True)
                for j, h in T.Parallel(PAGE_ROWS, num_heads):
                    products[j, h] = T.max(products[j, h], 0.0) * w_tile[h]
                T.reduce_sum(products, score, dim=1)
                for j in T.Parallel(PAGE_ROWS):
                    out[bm, part, k, j] = T.if_then_else(
                        T.cast((part * pages + k) * PAGE_ROWS + j, "float32") < length[0],
                        score[j] * scale_tile[j // LINE_FLOATS, j % LINE_FLOATS],
                        T.reinterpret(F32_MINUS_INF, "float32"),
                    )

    return index_logits_paged_kernel


def require_heads(kernel: str, num_heads: int) -> None:
    """Raise ContractError unless the indexer's kernels are compiled for so many heads."""
    if num_heads not in HEADS:
        raise ContractError(f"{kernel}: requires num_heads in {HEADS}, got num_heads={num_heads}")


def _empty_output(
    q: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    return q.new_empty((q.shape[0], page_table.shape[1] * PAGE_ROWS), dtype=torch.float32)


@operator(NAME, _empty_output)
def index_logits_paged(
    q: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Score each query against its keys: sum over heads of weight * relu(q . k), times the key's scale.

    Args:
        q: [m, num_heads, 128] e4m3, num_heads 8, 16, 32 or 64; the tokens of a request are queries. m = 0 is
            allowed.
        weights: [m, num_heads] fp32, the scales of q's heads in them.
        cache: [pages, 8448] uint8: 64 x 128 e4m3, then 64 fp32 scales, none negative.
        page_table: [m, num_pages] int32, the pages of each query's keys in order; num_pages a multiple of 16.
            A page outside the cache has keys of zeros.
        lengths: [m] int32: keys that a query sees.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        [m, num_pages * 64] fp32, -inf from a query's length on.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_tensor(NAME, "q", q, dtype=torch.float8_e4m3fn, ndim=3)
    require_tensor(NAME, "weights", weights, dtype=torch.float32, ndim=2, device=q.device)
    require_tensor(NAME, "cache", cache, dtype=torch.uint8, ndim=2, device=q.device)
    require_tensor(NAME, "page_table", page_table, dtype=torch.int32, ndim=2, device=q.device)
    require_tensor(NAME, "lengths", lengths, dtype=torch.int32, ndim=1, device=q.device)
    (m, num_heads, _), num_pages, parts = q.shape, cache.shape[0], page_table.shape[1] // PART_PAGES
    CONTRACT.check(NAME, m=m, num_parts=parts, num_pages=num_pages)
    require_heads(NAME, num_heads)
    require_shape(NAME, "q", q, (m, num_heads, DIM))
    require_shape(NAME, "weights", weights, (m, num_heads))
    require_shape(NAME, "cache", cache, (num_pages, PAGE_BYTES))
    require_shape(NAME, "page_table", page_table, (m, parts * PART_PAGES))
    require_shape(NAME, "lengths", lengths, (m,))
    if runtime.uses_reference(q):
        return index_reference.index_logits_paged(q, weights, cache, page_table, lengths)
    out = _empty_output(q, weights, cache, page_table, lengths)
    if m:
        values = cache.view(torch.float8_e4m3fn).view(num_pages, PAGE_LINES, DIM)
        table = page_table.view(m, parts, PART_PAGES)
        floats = cache.view(torch.float32).view(num_pages, PAGE_LINES, LINE_FLOATS)
        args = (q, weights, values, floats, table, lengths)
        scores = out.view(m, parts, PART_PAGES, PAGE_ROWS)
        runtime.launch(make_kernel, _variant(num_heads, parts).kwargs, (*args, scores))
    return out


@cache
def _variant(num_heads: int, num_parts: int) -> Variant:
    kwargs = {"num_heads": num_heads, "num_parts": num_parts, "config": Config()}
    return Variant(f"h{num_heads}-p{num_parts}", kwargs)


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Return random queries and pages; of ragged ones lengths vary, and some pages are missing."""
    generator = torch.Generator(device).manual_seed(seed)
    m, num_heads, num_pages = dims["m"], dims["num_heads"], dims["num_pages"]
    table_pages = dims["num_parts"] * PART_PAGES

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    q = normal(m, num_heads, DIM).to(torch.float8_e4m3fn)
    keys = normal(num_pages * PAGE_ROWS, DIM).to(torch.float8_e4m3fn)
    scale = torch.rand(len(keys), generator=generator, device=device)
    size = (m, table_pages)
    table = torch.randint(0, num_pages, size, generator=generator, device=device, dtype=torch.int32)
    lengths = torch.full((m,), table_pages * PAGE_ROWS, dtype=torch.int32, device=device)
    if dims["ragged"]:
        high = table_pages * PAGE_ROWS + 1
        lengths = torch.randint(0, high, (m,), generator=generator, device=device, dtype=torch.int32)
        kind = torch.rand(size, generator=generator, device=device)
        table = torch.where(kind < 1 / 16, -1, torch.where(kind < 1 / 8, num_pages, table))
    return q, normal(m, num_heads), index_reference.cache_write(keys, scale), table, lengths


def _case(case_id: str, m: int, num_heads: int, num_parts: int, num_pages: int, *tags: str) -> Case:
    dims = {"m": m, "num_heads": num_heads, "num_parts": num_parts, "num_pages": num_pages}
    return Case(case_id, {**dims, "ragged": int("bench" not in tags)}, tags or ("test",))


SPEC = KernelSpec(
    name=NAME,
    fn=index_logits_paged,
    reference=index_reference.index_logits_paged,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(64, parts) for parts in (16, 64, 256)),
    select=lambda d: _variant(d["num_heads"], d["num_parts"]),
    contract=CONTRACT,
    cases=(
        _case("empty", 0, 64, 1, 1),
        _case("one-row", 1, 64, 1, 3),
        _case("ragged", 5, 8, 1, 40, "gpu"),
        _case("ragged-h64", 37, 64, 3, 500, "gpu"),
        _case("b1-256k", 1, 64, 256, 4096, "gpu", "bench"),
        _case("b64-16k", 64, 64, 16, 64 * 256, "gpu", "bench"),
        _case("b128-64k", 128, 64, 64, 128 * 1024, "gpu", "bench"),
    ),
    tolerance=index_reference.index_logits_paged_tolerance,
    num_bytes=lambda d: (
        d["m"] * (d["num_parts"] * PART_PAGES * (PAGE_BYTES + PAGE_ROWS * 4 + 4) + d["num_heads"] * (DIM + 4))
    ),
    num_flops=lambda d: 2 * d["m"] * d["num_heads"] * DIM * d["num_parts"] * PART_PAGES * PAGE_ROWS,
    peers=("deepgemm",),
    row_invariant=False,  # queries come with their pages: tests/kernels/test_index_logits.py
    source="DeepSeek-V4 report 2.3.1; DeepGEMM's page of 132-byte keys",
    small={"num_heads": 64, "num_parts": 1},
)
