"""PyTorch references of paged caches and of decode; imports nothing from the kernels.

A cache is uint8 [pages, page bytes]; a page of B rows holds B x (448 e4m3, 64 bf16), then B x (seven UE8M0
and a zero), and is padded to a multiple of 576 bytes. A place is page * B + row.
"""

import torch

from dsv4_kernels.attention import reference

_VALUES, _SCALES, _NOPE = 576, 8, 448  # bytes of a row: values, of which e4m3; scales


def rows_of(cache: torch.Tensor) -> int:
    """Return the rows of a page: its padding is shorter than a row."""
    return cache.shape[1] // (_VALUES + _SCALES)


def _offsets(cache: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64 [..., 576] and [..., 8]: where in the flat cache the bytes of each row lie."""
    rows, page_bytes = rows_of(cache), cache.shape[1]
    page, row = places.long() // rows, places.long() % rows
    values = page * page_bytes + row * _VALUES
    scales = page * page_bytes + rows * _VALUES + row * _SCALES
    step = torch.arange(_VALUES, device=cache.device)
    return values[..., None] + step, scales[..., None] + step[:_SCALES]


def cache_write(
    cache: torch.Tensor, slots: torch.Tensor, nope: torch.Tensor, scale: torch.Tensor, rope: torch.Tensor
) -> torch.Tensor:
    """Return `cache` with row i of the parts at place slots[i]; a slot outside the cache is skipped."""
    is_inside = (slots >= 0) & (slots < cache.shape[0] * rows_of(cache))
    values, scales = _offsets(cache, slots[is_inside])
    result = cache.clone().view(-1)
    row = torch.cat((nope.view(torch.uint8), rope.view(torch.uint8)), dim=-1)
    result[values] = row[is_inside]
    result[scales] = scale[is_inside]
    return result.view(cache.shape)


def cache_read(cache: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return bf16 [..., 512] of the rows at `places`; zeros for a place outside the cache."""
    is_inside = (places >= 0) & (places < cache.shape[0] * rows_of(cache))
    values, scales = _offsets(cache, torch.where(is_inside, places, 0))
    row, scale = cache.view(-1)[values], cache.view(-1)[scales]
    nope = row[..., :_NOPE].contiguous().view(torch.float8_e4m3fn)
    rope = row[..., _NOPE:].contiguous().view(torch.bfloat16)
    return torch.where(is_inside[..., None], reference.from_fp8_entry(nope, scale, rope), 0)


def _valid(cache: torch.Tensor, idx: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Return `idx` with -1 where it is outside the cache or at or beyond its row's length."""
    place = torch.arange(idx.shape[1], device=idx.device)
    is_valid = (idx >= 0) & (idx < cache.shape[0] * rows_of(cache)) & (place < length[:, None])
    return torch.where(is_valid, idx, -1)


def _gathered(
    window_cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    entry_cache: torch.Tensor,
    entry_idx: torch.Tensor,
    entry_length: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each query's own keys [m * keys, 512] bf16 and their indices [m, keys]."""
    window = _valid(window_cache, window_idx, window_length)
    entry = _valid(entry_cache, entry_idx, entry_length)
    keys = torch.cat((cache_read(window_cache, window), cache_read(entry_cache, entry)), dim=1)
    places = torch.cat((window, entry), dim=1)
    own = torch.arange(places.numel(), device=places.device).view(places.shape)
    return keys.flatten(0, 1), torch.where(places >= 0, own, -1).to(torch.int32)


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
    """Attend each query [m, heads, 512] to the rows that both lists name; returns out and lse."""
    lists = (window_cache, window_idx, window_length, entry_cache, entry_idx, entry_length)
    keys, idx = _gathered(*lists)
    return reference.sparse_attention(q, idx, keys, sink)


def sparse_decode_tolerance(
    out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, *inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bounds of `reference.sparse_attention_tolerance`: the arithmetic is the same."""
    *lists, sink = inputs
    keys, idx = _gathered(*lists)
    return reference.sparse_attention_tolerance(out, lse, q, idx, keys, sink)
