"""What the kernels of HCA decode take: a query's window and the pages of all its entries, in one pool.

A chunk is 64 keys: half of the window, or a page of entries; a group is 13 of them, the window's being the
first two. Chunks of a group are folded in ascending order, then the groups, whoever takes them: places alone
decide the cut.
"""

from collections.abc import Mapping
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels.attention.cache_layout import (
    HEAD_DIM,
    MAX_PAGES,
    MAX_QUERIES,
    PAGE_ROWS,
    SCALE_BYTES,
    VALUE_BYTES,
    WINDOW,
    page_bytes,
)
from dsv4_kernels.attention.decode_chunk import CHUNK
from dsv4_kernels.attention.decode_lists import make_cache
from dsv4_kernels.contract import Contract, require_shape, require_tensor
from dsv4_kernels.registry import Case

WINDOW_CHUNKS = WINDOW // CHUNK
GROUP = 13  # chunks: 2**20 tokens and the window are ten groups without a masked chunk
HEADS = (64, 128)  # Flash, Pro
MILLION = 128  # pages of 2**20 tokens: 8192 entries
MAX_TABLE = 1 << 15  # pages of a query

CONTRACT = Contract(
    (
        "0 <= m",
        "m <= MAX_QUERIES",
        "0 < num_heads",
        "num_heads % HEADS == 0",
        "0 < num_pages",
        "num_pages <= MAX_TABLE",
        "0 < pages",
        "pages <= MAX_PAGES",
    ),
    consts={"MAX_QUERIES": MAX_QUERIES, "MAX_PAGES": MAX_PAGES, "MAX_TABLE": MAX_TABLE, "HEADS": 8},
)


def groups_of(num_pages: int) -> int:
    """Return the groups of the window and so many pages; the last may end early."""
    return -(-(WINDOW_CHUNKS + num_pages) // GROUP)


def check(
    name: str,
    q: torch.Tensor,
    cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    page_table: torch.Tensor,
    entry_length: torch.Tensor,
) -> None:
    """Check the arguments that `hca_decode` describes.

    Raises:
        ContractError: a clause of CONTRACT, a dtype, a device or a shape does not hold.
    """
    require_tensor(name, "q", q, dtype=torch.bfloat16, ndim=3)
    require_tensor(name, "cache", cache, dtype=torch.uint8, ndim=2, device=q.device)
    for which, tensor, ndim in (
        ("window_idx", window_idx, 2),
        ("window_length", window_length, 1),
        ("page_table", page_table, 2),
        ("entry_length", entry_length, 1),
    ):
        require_tensor(name, which, tensor, dtype=torch.int32, ndim=ndim, device=q.device)
    (m, num_heads, _), num_pages, pages = q.shape, page_table.shape[1], cache.shape[0]
    CONTRACT.check(name, m=m, num_heads=num_heads, num_pages=num_pages, pages=pages)
    require_shape(name, "q", q, (m, num_heads, HEAD_DIM))
    require_shape(name, "cache", cache, (pages, page_bytes(PAGE_ROWS)))
    require_shape(name, "page_table", page_table, (m, num_pages))
    require_shape(name, "window_idx", window_idx, (m, WINDOW))
    require_shape(name, "window_length", window_length, (m,))
    require_shape(name, "entry_length", entry_length, (m,))


def entry_at(
    table: Any,
    length: Any,
    query: Any,
    number: Any,
    row: Any,
    pages: Any,
    num_pages: int | None = None,
    is_listed: Any = True,
) -> Any:
    """Return the place of a row of a query's page; -1 where it is masked, or not `is_listed`.

    Args:
        table: [m, num_pages] int32.
        length: [m] int32, entries.
        query: of m.
        number: of the page among the query's.
        row: of the page.
        pages: of the cache.
        num_pages: of a query, where `number` may be as large or larger: such a page is not listed.
        is_listed: condition.
    """
    within = number
    if num_pages is not None:
        within, is_listed = T.min(number, num_pages - 1), is_listed & (number < num_pages)
    page = table[query, within]
    is_within = is_listed & (number * PAGE_ROWS + row < length[query]) & (page >= 0) & (page < pages)
    return T.if_then_else(is_within, page * PAGE_ROWS + row, -1)


def empty_sums(q: torch.Tensor, parts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Allocate what blocks leave of so many parts of each query's keys.

    Returns:
        acc: [m, parts, num_heads, 512] fp32.
        top: [m, parts, num_heads] fp32.
        total: [m, parts, num_heads] fp32.
    """
    m, num_heads, dim = q.shape
    acc = q.new_empty((m, parts, num_heads, dim), dtype=torch.float32)
    return acc, acc.new_empty((m, parts, num_heads)), acc.new_empty((m, parts, num_heads))


def make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Return queries of full lists; of ragged ones lengths are random and some pages are missing."""
    generator = torch.Generator(device).manual_seed(seed)
    m, num_heads, num_pages, pages = dims["m"], dims["num_heads"], dims["num_pages"], dims["pages"]

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


def case(case_id: str, m: int, num_heads: int, num_pages: int, pages: int, *tags: str) -> Case:
    """Return a case of either kernel; tests have ragged lists."""
    dims = {"m": m, "num_heads": num_heads, "num_pages": num_pages, "pages": pages}
    dims["ragged"] = int("bench" not in tags)
    # A block is long in the interpreter: two rows do there.
    return Case(case_id, dims if tags else {**dims, "max_m": 2}, tags or ("test",))


def cases(*queries: int) -> tuple[Case, ...]:
    """Return the cases of a kernel whose benchmark takes so many queries of 2**20 tokens each."""
    return (
        case("empty", 0, 8, 1, 1),
        case("one-row", 1, 8, 1, 1),
        case("three-rows", 3, 16, 3, 20, "gpu"),
        *(case(f"m{m}-h{h}-1m", m, h, MILLION, m * 128, "gpu", "bench") for h in HEADS for m in queries),
    )


def num_bytes(dims: Mapping[str, int], parts: int) -> int:
    """Return the bytes of the rows that `m` queries attend to, of the queries and of the sums of `parts`."""
    rows = (WINDOW + dims["num_pages"] * PAGE_ROWS) * (VALUE_BYTES + SCALE_BYTES)
    return dims["m"] * (rows + dims["num_heads"] * (HEAD_DIM * 2 + parts * (HEAD_DIM + 2) * 4))


def num_flops(dims: Mapping[str, int]) -> int:
    """Return the operations of both products."""
    return 4 * dims["m"] * dims["num_heads"] * (WINDOW + dims["num_pages"] * PAGE_ROWS) * HEAD_DIM
