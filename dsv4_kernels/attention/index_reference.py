"""PyTorch references of the indexer's pages and scores; imports nothing from the kernels.

A page of 64 FP8 keys is 64 x 128 e4m3, then 64 fp32 scales: 8448 bytes. One of FP4 keys is 64 x 64 bytes of
two e2m1 (the even dim below), then 64 x 4 UE8M0 (one for 32 dims): 4352 bytes.
"""

from collections.abc import Iterator

import torch

FP4_PAGE_BYTES = 4352
_ROWS, _DIM = 64, 128
_CHUNK = 32  # products that the tensor core adds at once


def cache_write(keys: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return uint8 pages [n / 64, 8448] of e4m3 keys [n, 128] with fp32 scales [n]."""
    values = keys.view(torch.uint8).reshape(-1, _ROWS * _DIM)
    return torch.cat((values, scale.view(torch.uint8).reshape(-1, _ROWS * 4)), dim=1).contiguous()


def index_cache_write(
    cache: torch.Tensor, slots: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Return pages with key i at place slots[i]; a place outside is skipped."""
    code_bytes = codes.shape[1]
    tail = scale.view(torch.uint8) if scale.shape[1] > 1 else scale.float().view(torch.uint8)
    result = cache.clone()
    for row, bytes_, end in zip(slots.tolist(), codes.view(torch.uint8), tail, strict=True):
        page, key = divmod(row, _ROWS)
        if 0 <= page < len(cache):
            result[page, key * code_bytes :][:code_bytes] = bytes_
            result[page, _ROWS * code_bytes + key * 4 :][:4] = end
    return result


def index_cache_read(cache: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales of the keys at `places`; zeros for one outside the cache."""
    is_fp4 = cache.shape[1] == FP4_PAGE_BYTES
    code_bytes = _DIM // 2 if is_fp4 else _DIM
    is_inside = (places >= 0) & (places < len(cache) * _ROWS)
    place = torch.where(is_inside, places, 0).long()
    page, key = place // _ROWS, place % _ROWS
    values = cache[:, : _ROWS * code_bytes].view(len(cache), _ROWS, code_bytes)
    scales = cache[:, _ROWS * code_bytes :].view(len(cache), _ROWS, 4)
    codes, scale = (torch.where(is_inside[:, None], x[page, key], x.new_zeros(())) for x in (values, scales))
    if is_fp4:
        return codes, scale.view(torch.float8_e8m0fnu)
    return codes.view(torch.float8_e4m3fn), scale.view(torch.float32).flatten()


def _keys(cache: torch.Tensor, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float64 keys [n, 128] and scales [n] of a query's pages; zeros for one outside the cache."""
    is_inside = (pages >= 0) & (pages < len(cache))
    found = cache[torch.where(is_inside, pages, 0).long()]
    values = found[:, : _ROWS * _DIM].contiguous().view(torch.float8_e4m3fn).view(-1, _ROWS, _DIM)
    scale = found[:, _ROWS * _DIM :].contiguous().view(torch.float32)
    keys = torch.where(is_inside[:, None, None], values.double(), 0.0)
    return keys.flatten(0, 1), torch.where(is_inside[:, None], scale.double(), 0.0).flatten()


def _queries(
    q: torch.Tensor, weights: torch.Tensor, cache: torch.Tensor, page_table: torch.Tensor
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield each query's heads, weights, keys and scales in float64."""
    for row, weight, pages in zip(q, weights, page_table, strict=True):
        yield row.double(), weight.double(), *_keys(cache, pages)


def index_logits_paged(
    q: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Return fp32 [m, keys]: sum over heads of weight * relu(q . k), times the key's scale; -inf beyond."""
    scores = q.new_empty((len(q), page_table.shape[1] * _ROWS), dtype=torch.float32)
    for i, (heads, weight, keys, scale) in enumerate(_queries(q, weights, cache, page_table)):
        scores[i] = (weight @ (heads @ keys.T).relu() * scale).float()
    place = torch.arange(scores.shape[1], device=q.device)
    return scores.masked_fill(place >= lengths[:, None], -torch.inf)


def index_logits_paged_tolerance(
    out: torch.Tensor,
    q: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor]:
    """Return a bound on |got - out| elementwise.

    An instruction aligns 32 products and the sum so far to the largest of them and keeps 13 bits below it: at
    most 33 * 2**-13 of the sum of all magnitudes, for each of 128 / 32 instructions. The sum over heads adds
    one rounding of 2**-23 a head and two for the products.
    """
    bound = torch.zeros_like(out, dtype=torch.float64)
    for i, (heads, weight, keys, scale) in enumerate(_queries(q, weights, cache, page_table)):
        products = weight.abs() @ (heads.abs() @ keys.abs().T) * scale.abs()
        relative = (_DIM // _CHUNK) * (_CHUNK + 1) * 2.0**-13 + (len(heads) + 2) * 2.0**-23
        bound[i] = relative * products
    return (bound,)


def index_logits(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Return fp32 [m, n]: sum over heads of weight * relu(q . k), times the key's scale; -inf beyond."""
    scores, wide = weights.new_empty((len(q), len(keys))), keys.double().T
    for i, (heads, weight) in enumerate(zip(q, weights, strict=True)):
        scores[i] = (weight.double() @ (heads.double() @ wide).relu() * scale.double()).float()
    return scores.masked_fill(torch.arange(len(keys), device=q.device) >= lengths[:, None], -torch.inf)


def index_logits_tolerance(
    out: torch.Tensor,
    q: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    scale: torch.Tensor,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor]:
    """Return a bound on |got - out|, as `index_logits_paged_tolerance` derives it."""
    bound, wide = torch.zeros_like(out, dtype=torch.float64), keys.double().abs().T
    relative = (_DIM // _CHUNK) * (_CHUNK + 1) * 2.0**-13 + (q.shape[1] + 2) * 2.0**-23
    for i, (heads, weight) in enumerate(zip(q, weights, strict=True)):
        bound[i] = relative * (weight.double().abs() @ (heads.double().abs() @ wide)) * scale.double().abs()
    return (bound,)


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SCALE_DIMS = 32
_MAX_SHIFT = 11  # binades below a row's largest scale that still count


def _fp4_rows(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return float64 [..., 128] of codes uint8 [..., 64] and UE8M0 bytes [..., 4].

    32 dims whose scale is below 2**-11 of the row's largest are zeros.
    """
    table = torch.tensor((*_E2M1, *(-v for v in _E2M1)), dtype=torch.float64, device=codes.device)
    values = torch.stack((table[(codes & 15).long()], table[(codes >> 4).long()]), dim=-1).flatten(-2)
    byte = scale.long()
    factor = torch.where(byte == 255, torch.nan, torch.exp2(byte.double() - 127))
    factor = torch.where(byte < byte.amax(-1, keepdim=True) - _MAX_SHIFT, 0.0, factor)
    factor = torch.where((byte == 255).any(-1, keepdim=True), torch.nan, factor)
    return (values.unflatten(-1, (-1, _SCALE_DIMS)) * factor[..., None]).flatten(-2)


def _fp4_queries(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield each query's number, heads, weights and keys in float64; a request's tokens have one table."""
    next_n = len(q) // max(len(page_table), 1)
    for request, pages in enumerate(page_table):
        is_inside = (pages >= 0) & (pages < len(cache))
        found = cache[torch.where(is_inside, pages, 0).long()]
        codes = found[:, : _ROWS * _DIM // 2].view(-1, _ROWS, _DIM // 2)
        rows = _fp4_rows(codes, found[:, _ROWS * _DIM // 2 :].reshape(-1, _ROWS, 4))
        keys = torch.where(is_inside[:, None, None], rows, 0.0).flatten(0, 1)
        for i in range(request * next_n, (request + 1) * next_n):
            yield i, _fp4_rows(q[i], q_scale[i].view(torch.uint8)), weights[i].double(), keys


def index_logits_fp4(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Return fp32 [m, keys]: sum over heads of weight * relu(q . k); -inf beyond."""
    scores = weights.new_empty((len(q), page_table.shape[1] * _ROWS))
    for i, heads, weight, keys in _fp4_queries(q, q_scale, weights, cache, page_table):
        scores[i] = (weight @ (heads @ keys.T).relu()).float()
    place = torch.arange(scores.shape[1], device=q.device)
    return scores.masked_fill(place >= lengths[:, None], -torch.inf)


def index_logits_fp4_tolerance(
    out: torch.Tensor,
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor]:
    """Return a bound on |got - out|: that of `index_logits_paged_tolerance`, as widening is exact."""
    bound = torch.zeros_like(out, dtype=torch.float64)
    for i, heads, weight, keys in _fp4_queries(q, q_scale, weights, cache, page_table):
        relative = (_DIM // _CHUNK) * (_CHUNK + 1) * 2.0**-13 + (len(heads) + 2) * 2.0**-23
        bound[i] = relative * (weight.abs() @ (heads.abs() @ keys.abs().T))
    return (bound,)


def index_logits_fp4_dense(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    scale: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Return fp32 [m, n]: sum over heads of weight * relu(q . k); -inf beyond."""
    scores = weights.new_empty((len(q), len(keys)))
    wide = _fp4_rows(keys, scale.view(torch.uint8)).T
    for i, (codes, factors, weight) in enumerate(zip(q, q_scale.view(torch.uint8), weights, strict=True)):
        scores[i] = (weight.double() @ (_fp4_rows(codes, factors) @ wide).relu()).float()
    return scores.masked_fill(torch.arange(len(keys), device=q.device) >= lengths[:, None], -torch.inf)


def index_logits_fp4_dense_tolerance(
    out: torch.Tensor,
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    scale: torch.Tensor,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor]:
    """Return a bound on |got - out|: that of `index_logits_paged_tolerance`, as widening is exact."""
    bound = torch.zeros_like(out, dtype=torch.float64)
    wide = _fp4_rows(keys, scale.view(torch.uint8)).abs().T
    relative = (_DIM // _CHUNK) * (_CHUNK + 1) * 2.0**-13 + (q.shape[1] + 2) * 2.0**-23
    for i, (codes, factors, weight) in enumerate(zip(q, q_scale.view(torch.uint8), weights, strict=True)):
        bound[i] = relative * (weight.double().abs() @ (_fp4_rows(codes, factors).abs() @ wide))
    return (bound,)
