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


_GROUP, _CHUNK, _FLOOR, _LOG2_E = 832, 64, -1e30, 1.4426950408889634


def _hca_logits(
    part: int,
    q: torch.Tensor,
    cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    page_table: torch.Tensor,
    entry_length: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float64 logits [m, parts, heads, part] times log2(e), -inf where masked, and the parts' keys.

    A part is `part` keys of the window and the entries behind it; the last is filled up with masked ones.
    """
    rows = rows_of(cache)
    place = torch.arange(page_table.shape[1] * rows, device=q.device)
    page = page_table[:, place // rows].long()
    is_page = (page >= 0) & (page < cache.shape[0])
    entry = _valid(cache, torch.where(is_page, page * rows + place % rows, -1), entry_length)
    places = torch.cat((_valid(cache, window_idx, window_length), entry), dim=1)
    places = torch.nn.functional.pad(places, (0, -places.shape[1] % part), value=-1)
    keys = cache_read(cache, places).unflatten(1, (-1, part)).double()
    is_valid = places.unflatten(1, (-1, part)) >= 0
    logits = torch.einsum("mhd,mpkd->mphk", q.double(), keys) * (_LOG2_E * q.shape[-1] ** -0.5)
    return logits.masked_fill(~is_valid[:, :, None], -torch.inf), keys


def _chunk_logits(q: torch.Tensor, *lists: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `_hca_logits` does, of the chunks of 64 of both lists of `sparse_decode`."""
    keys, idx = _gathered(*lists)
    chunks = idx.shape[1] // _CHUNK
    keys = keys.view(q.shape[0], chunks, _CHUNK, q.shape[-1]).double()
    is_valid = idx.view(q.shape[0], chunks, 1, _CHUNK) >= 0
    logits = torch.einsum("mhd,mpkd->mphk", q.double(), keys) * (_LOG2_E * q.shape[-1] ** -0.5)
    return logits.masked_fill(~is_valid, -torch.inf), keys


def _hca_weights(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each part's largest logit, at least the floor, and exp2 of the logits less it."""
    top = logits.amax(-1).clamp(min=_FLOOR)
    return top, torch.exp2(logits - top[..., None])


def hca_groups(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each part's keys times exp2(logit - top) [m, parts, heads, 512], top and the sums of exp2.

    Parts are each 832 keys, of the window first.
    """
    return _parts(*_hca_logits(_GROUP, *inputs))


def hca_chunks(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `hca_groups` does, of each 64 keys."""
    return _parts(*_hca_logits(_CHUNK, *inputs))


def _parts(logits: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    top, weight = _hca_weights(logits)
    acc = torch.einsum("mphk,mpkd->mphd", weight, keys)
    return acc.float(), top.float(), weight.sum(-1).float()


def sparse_parts(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `hca_groups` does, of each 64 keys of the lists of `sparse_decode`."""
    return _parts(*_chunk_logits(*inputs))


def sparse_parts_tolerance(
    acc: torch.Tensor, top: torch.Tensor, total: torch.Tensor, q: torch.Tensor, *lists: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return bounds as of `hca_groups_tolerance`."""
    return _parts_tolerance(acc, top, total, q, *_chunk_logits(q, *lists))


def hca_groups_tolerance(
    acc: torch.Tensor, top: torch.Tensor, total: torch.Tensor, q: torch.Tensor, *inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return bounds as `reference.sparse_attention_tolerance` derives them, here of a part's own sums."""
    return _parts_tolerance(acc, top, total, q, *_hca_logits(_GROUP, q, *inputs))


def hca_chunks_tolerance(
    acc: torch.Tensor, top: torch.Tensor, total: torch.Tensor, q: torch.Tensor, *inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return bounds as of `hca_groups_tolerance`."""
    return _parts_tolerance(acc, top, total, q, *_hca_logits(_CHUNK, q, *inputs))


def _parts_tolerance(
    acc: torch.Tensor,
    top: torch.Tensor,
    total: torch.Tensor,
    q: torch.Tensor,
    logits: torch.Tensor,
    keys: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _, weight = _hca_weights(logits)
    num_adds = q.shape[-1] + keys.shape[2]
    norm = keys.norm(dim=-1).amax(-1)[:, :, None] if keys.numel() else keys.new_zeros((*acc.shape[:2], 1))
    logit = num_adds * 2.0**-23 * q.double().norm(dim=-1)[:, None] * norm * q.shape[-1] ** -0.5
    relative = 2 * logit + 2.0**-20 + num_adds * 2.0**-23
    spread = torch.einsum("mphk,mpkd->mphd", weight, keys.abs())
    bound = (relative + 2.0**-8)[..., None] * spread
    is_empty = total == 0
    top_bound = (logit * _LOG2_E + 2.0**-22 * top.abs()).masked_fill(is_empty, 0)
    return bound, top_bound, relative * total


def _fold(
    acc: torch.Tensor, top: torch.Tensor, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return, in float64, the sums over parts [m, heads, 512] and [m, heads], and their largest logit."""
    largest = top.double().amax(1)
    factor = torch.exp2(top.double() - largest[:, None])
    return torch.einsum("mph,mphd->mhd", factor, acc.double()), (factor * total).sum(1), largest


def hca_fold(
    acc: torch.Tensor, top: torch.Tensor, total: torch.Tensor, sink: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [m, heads, 512] bf16 and lse [m, heads] of the parts' sums."""
    values, weight, largest = _fold(acc, top, total)
    lse = (largest + weight.log2()) / _LOG2_E
    out = values / (weight + torch.exp2(sink.double() * _LOG2_E - largest))[..., None]
    out = out.masked_fill((weight == 0)[..., None], 0)
    return out.to(torch.bfloat16), lse.masked_fill(weight == 0, torch.inf).float()


def hca_fold_tolerance(
    out: torch.Tensor,
    lse: torch.Tensor,
    acc: torch.Tensor,
    top: torch.Tensor,
    total: torch.Tensor,
    sink: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bounds: exp2 and its argument add 2**-20 a part, a step 2**-23, the rounding to bf16 2**-8."""
    spread, weight, largest = _fold(acc.abs(), top, total)
    parts = acc.shape[1]
    relative = parts * (2 * 2.0**-20 + 3 * 2.0**-23) + 2 * 2.0**-20
    denominator = (weight + torch.exp2(sink.double() * _LOG2_E - largest)).clamp(min=2.0**-100)
    bound = 2 * relative * spread / denominator[..., None] + 2 * 2.0**-8 * out.double().abs()
    magnitude = torch.where(lse.isinf(), 0, lse.abs()).double()
    return bound, relative + 2.0**-20 + 2.0**-21 * magnitude
