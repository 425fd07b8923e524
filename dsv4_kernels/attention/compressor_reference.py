"""PyTorch reference of the compressor: softmax over a block's rows in fp32 steps; imports nothing of kernels.

The order that defines an entry's bits: rows in ascending order, in one group of eight rows (m = 4) or two of
64; before every eight (m = 4) or four rows, sums are rescaled to the maximum with those; groups are rescaled
to the block's maximum and added in order; then one division.
"""

import math

import torch

from dsv4_kernels.attention import index_reference, reference

_FEW, _GROUP = 8, 64  # rows of a block with overlap; of a group without
_FLOOR = -1e30
_LEAST = -86.0
_LOG2_E = 1.4426950408889634
_TO_INTEGER = 1.5 * 2.0**23
_EXP2_FACTORS = (
    1.0,
    0.6931470036506653,
    0.24022242426872253,
    0.05550733581185341,
    0.009671512991189957,
    0.0013264723820611835,
)


def fma(a: torch.Tensor, b: torch.Tensor | float, c: torch.Tensor | float) -> torch.Tensor:
    """Return a * b + c of float32 numbers, rounded once."""
    b, c = (torch.as_tensor(x, dtype=torch.float32, device=a.device).double() for x in (b, c))
    product = a.double() * b  # exact
    total = product + c
    virtual = total - product
    error = (product - (total - virtual)) + (c - virtual)
    # Rounded to odd first, so that the second rounding sees on which side of a tie the exact sum is.
    toward = torch.where(error > 0, math.inf, -math.inf)
    is_even = total.view(torch.int64) & 1 == 0
    return torch.where((error != 0) & is_even, torch.nextafter(total, toward), total).float()


def exp_weight(x: torch.Tensor) -> torch.Tensor:
    """Return exp(max(x, -86)) of float32 x <= 0, by a polynomial of degree 5 for 2**f, |f| <= 1/2."""
    bounded = x.clamp(min=_LEAST)
    shifted = fma(bounded, _LOG2_E, _TO_INTEGER)
    rest = fma(bounded, _LOG2_E, _TO_INTEGER - shifted)
    value = torch.full_like(rest, _EXP2_FACTORS[-1])
    for factor in reversed(_EXP2_FACTORS[:-1]):
        value = fma(value, rest, factor)
    return torch.ldexp(value, (shifted - _TO_INTEGER).int())


def pool(kv: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """Return bf16 [m, c]: rows of kv [m, rows, c] weighted by each channel's softmax over rows."""
    m, rows, c = kv.shape
    groups = max(rows // _GROUP, 1)
    size = rows if rows == _FEW else _FEW // 2
    shape = (m, groups, rows // groups // size, size, c)
    kv, score = kv.view(shape), score.view(shape)
    top = torch.full_like(kv[:, :, 0, 0], _FLOOR)
    total, acc = torch.zeros_like(top), torch.zeros_like(top)
    for step in range(kv.shape[2]):
        before, top = top, torch.maximum(top, score[:, :, step].amax(2))
        factor, weight = exp_weight(before - top), exp_weight(score[:, :, step] - top[:, :, None])
        total, acc = total * factor, acc * factor
        for j in range(size):
            total = total + weight[:, :, j]
            acc = fma(weight[:, :, j], kv[:, :, step, j], acc)
    if groups > 1:
        factor = exp_weight(top - top.amax(1, keepdim=True))
        total, acc = (total * factor).unbind(1), (acc * factor).unbind(1)
        total, acc = sum(total[1:], total[0]), sum(acc[1:], acc[0])
    else:
        total, acc = total[:, 0], acc[:, 0]
    return (acc / total).to(torch.bfloat16)


def gather(tokens: torch.Tensor, state: torch.Tensor, blocks: torch.Tensor, empty: float) -> torch.Tensor:
    """Return [m, rows, width]: each block's rows, of this call's tokens or of the request's state."""
    rows = state.shape[1]
    last, fresh, position, slot = blocks.long()[..., None].unbind(1)
    behind = rows - 1 - torch.arange(rows, device=tokens.device)
    token, place = last.clamp(min=-1) - behind, position.clamp(min=-1) - behind
    is_token = (token >= 0) & (token < len(tokens))
    new = torch.where(is_token[..., None], tokens[torch.where(is_token, token, 0)], 0.0)
    is_slot = (slot >= 0) & (slot < len(state))
    kept = torch.where(is_slot[..., None], state[torch.where(is_slot, slot, 0), place % rows], 0.0)
    old = torch.where((place >= 0)[..., None], kept, empty)
    return torch.where((behind < fresh)[..., None], new, old)


def index_compressor(
    kv: torch.Tensor,
    score: torch.Tensor,
    kv_state: torch.Tensor,
    score_state: torch.Tensor,
    blocks: torch.Tensor,
    ape: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Return bf16 [m, dim]: each block's rows pooled and normed."""
    (ratio, width), dim = ape.shape, weight.shape[0]
    rows = kv_state.shape[1]
    values = gather(kv, kv_state, blocks, 0.0)
    scores = gather(score, score_state, blocks, -math.inf) + ape[torch.arange(rows, device=kv.device) % ratio]
    if width > dim:  # the block before has series b, the first channels
        values, scores = (
            torch.cat((x[:, :ratio, :dim], x[:, ratio:, dim:]), dim=1) for x in (values, scores)
        )
    return reference.rms_norm(pool(values.contiguous(), scores.contiguous()), weight)


def compressor(
    kv: torch.Tensor,
    score: torch.Tensor,
    kv_state: torch.Tensor,
    score_state: torch.Tensor,
    blocks: torch.Tensor,
    ape: torch.Tensor,
    weight: torch.Tensor,
    cos_sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the parts of each block's cache row: pooled, normed, rotated as its first token, cast."""
    entry = index_compressor(kv, score, kv_state, score_state, blocks, ape, weight)
    first = blocks[:, 2] // ape.shape[0] * ape.shape[0]
    return reference.fp8_entry(reference.rope(entry, reference.angles(cos_sin, first)))


def index_key_write(
    cache: torch.Tensor,
    slots: torch.Tensor,
    kv: torch.Tensor,
    score: torch.Tensor,
    kv_state: torch.Tensor,
    score_state: torch.Tensor,
    blocks: torch.Tensor,
    ape: torch.Tensor,
    weight: torch.Tensor,
    cos_sin: torch.Tensor,
) -> torch.Tensor:
    """Return the indexer's pages with each block's key at its place; FP4 or FP8 as a page's bytes say."""
    keys = index_compressor(kv, score, kv_state, score_state, blocks, ape, weight)[:, None]
    first = blocks[:, 2] // ape.shape[0] * ape.shape[0]
    is_fp4 = cache.shape[1] == index_reference.FP4_PAGE_BYTES
    cast = reference.hadamard_fp4 if is_fp4 else reference.hadamard_fp8
    codes, scale = (part[:, 0].contiguous() for part in cast(keys, first, cos_sin))
    return index_reference.index_cache_write(cache, slots, codes, scale)


def state_write(
    kv_state: torch.Tensor,
    score_state: torch.Tensor,
    places: torch.Tensor,
    kv: torch.Tensor,
    score: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both states with row i of kv and score at places[i]; a place outside is skipped."""
    is_inside = (places >= 0) & (places < kv_state.shape[0] * kv_state.shape[1])
    results = []
    for state, rows in ((kv_state, kv), (score_state, score)):
        result = state.clone()
        result.flatten(0, 1)[places[is_inside].long()] = rows[is_inside]
        results.append(result)
    return results[0], results[1]
