"""PyTorch references of the indexer's pages and scores; imports nothing from the kernels.

A page of 64 FP8 keys is 64 x 128 e4m3, then 64 fp32 scales: 8448 bytes. One of FP4 keys is 64 x 64 bytes of
two e2m1 (the even dim below), then 64 x 4 UE8M0 (one for 32 dims): 4352 bytes.
"""

from collections.abc import Iterator

import torch

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
