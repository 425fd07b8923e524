"""What the kernels of sparse decode take: a query's two lists of rows in two paged caches."""

from collections.abc import Mapping
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels.attention import cache_rows, decode_reference, reference
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
from dsv4_kernels.attention.decode_chunk import CHUNK
from dsv4_kernels.contract import Contract, require_shape, require_tensor

SHAPES = ((64, 512), (128, 1024))  # (heads, top-k): Flash, Pro
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


def check(
    name: str,
    q: torch.Tensor,
    window_cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    entry_cache: torch.Tensor,
    entry_idx: torch.Tensor,
    entry_length: torch.Tensor,
) -> None:
    """Check the arguments that `sparse_decode` describes.

    Raises:
        ContractError: a clause of CONTRACT, a dtype, a device or a shape does not hold.
    """
    require_tensor(name, "q", q, dtype=torch.bfloat16, ndim=3)
    lists = (
        ("window", window_cache, window_idx, window_length),
        ("entry", entry_cache, entry_idx, entry_length),
    )
    for which, cache_pages, idx, length in lists:
        require_tensor(name, f"{which}_cache", cache_pages, dtype=torch.uint8, ndim=2, device=q.device)
        require_tensor(name, f"{which}_idx", idx, dtype=torch.int32, ndim=2, device=q.device)
        require_tensor(name, f"{which}_length", length, dtype=torch.int32, ndim=1, device=q.device)
    (m, num_heads, _), topk = q.shape, entry_idx.shape[1]
    pages = {"window_pages": window_cache.shape[0], "entry_pages": entry_cache.shape[0]}
    CONTRACT.check(name, m=m, num_heads=num_heads, topk=topk, **pages)
    require_shape(name, "q", q, (m, num_heads, HEAD_DIM))
    for (which, cache_pages, idx, length), width in zip(lists, (WINDOW, topk), strict=True):
        require_shape(name, f"{which}_cache", cache_pages, (pages[f"{which}_pages"], page_bytes(PAGE_ROWS)))
        require_shape(name, f"{which}_idx", idx, (m, width))
        require_shape(name, f"{which}_length", length, (m,))


def place_at(idx: Any, length: Any, query: Any, j: Any, pages: Any, is_listed: Any = None) -> Any:
    """Return the place of key j of a query's list; -1 where it is masked, or not `is_listed`."""
    is_within = j < length[query]
    is_within = is_within if is_listed is None else is_listed & is_within
    return T.if_then_else(is_within & (idx[query, j] < pages * PAGE_ROWS), idx[query, j], -1)


def views(
    q: torch.Tensor,
    window_cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    entry_cache: torch.Tensor,
    entry_idx: torch.Tensor,
    entry_length: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Return the same as a kernel takes them: a cache comes as e4m3, as bf16 and as 32-bit words."""
    window, entry = cache_rows.views(window_cache), cache_rows.views(entry_cache)
    return (q, *window, window_idx, window_length, *entry, entry_idx, entry_length)


def list_bytes(dims: Mapping[str, int]) -> int:
    """Return the bytes of the rows that the lists of `m` queries name, and of the lists."""
    return dims["m"] * (WINDOW + dims["topk"]) * (VALUE_BYTES + SCALE_BYTES + 4)


def make_cache(pages: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """Return pages of random rows as the cache writer leaves them."""
    nope = torch.randn(pages * PAGE_ROWS, NOPE_DIM, generator=generator, device=device)
    rope = torch.randn(pages * PAGE_ROWS, ROPE_DIM, generator=generator, device=device)
    entry = torch.cat((nope, rope), dim=-1).to(torch.bfloat16)
    empty = torch.zeros(pages, page_bytes(PAGE_ROWS), dtype=torch.uint8, device=device)
    slots = torch.arange(pages * PAGE_ROWS, device=device)
    return decode_reference.cache_write(empty, slots, *reference.fp8_entry(entry))


def make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Return the arguments of `sparse_decode`; ragged lists have any length, and places outside the cache."""
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
