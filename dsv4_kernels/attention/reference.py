"""PyTorch references of the attention kernels; imports nothing from the kernels.

Sums are float64 and rounded where the layer rounds: a result does not depend on how many rows it is
computed with, but for sums within 2**-53 of a rounding boundary.
"""

import math
from collections.abc import Iterator

import torch

from dsv4_kernels.quant.reference import act_quant, fp4_quant

HEAD_DIM = 512
ROPE_DIM = 64
NOPE_DIM = HEAD_DIM - ROPE_DIM
WINDOW = 128
NORM_EPS = 1e-6
MAX_POSITIONS = 1 << 20


def rope_table(
    num_positions: int, theta: float, yarn: bool, device: torch.device | None = None
) -> torch.Tensor:
    """Return fp32 [num_positions, 64]: 32 cosines, then 32 sines, of every position.

    Layers with compressed entries have theta 160000 and YaRN (factor 16 over 65536 positions, beta 32
    and 1, no magnitude factor); layers of the window alone have theta 10000 without.
    """
    pair = torch.arange(ROPE_DIM // 2, dtype=torch.float64, device=device)
    frequency = theta ** (-2 * pair / ROPE_DIM)
    if yarn:
        factor, original, fast, slow = 16, 65536, 32, 1

        def turning(rotations: int) -> float:
            return ROPE_DIM * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low, high = math.floor(turning(fast)), math.ceil(turning(slow))
        ramp = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
        frequency = frequency / factor * ramp + frequency * (1 - ramp)
    angle = torch.arange(num_positions, dtype=torch.float64, device=device)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


def rope(x: torch.Tensor, cos_sin: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """Rotate pairs (2j, 2j + 1) of the last 64 dims of bf16 x [m, ..., d] by cos_sin [m, 64], in fp32."""
    cos, sin = (part.view(-1, *[1] * (x.dim() - 2), ROPE_DIM // 2) for part in cos_sin.chunk(2, dim=-1))
    sin = -sin if inverse else sin
    even, odd = x[..., -ROPE_DIM::2].float(), x[..., -ROPE_DIM + 1 :: 2].float()
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((x[..., :-ROPE_DIM], rotated.to(x.dtype)), dim=-1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Return bf16 of x / sqrt(mean(x**2) + 1e-6) [* weight] over the last dim, in fp32 steps."""
    mean = x.double().square().sum(-1, keepdim=True).float() / x.shape[-1]
    normed = x.float() * (1 / (mean + NORM_EPS).double().sqrt()).float()
    return (normed if weight is None else normed * weight.float()).to(torch.bfloat16)


def angles(cos_sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the rows of `cos_sin` at int32 `positions`; zeros for a position outside it."""
    is_inside = (positions >= 0) & (positions < cos_sin.shape[0])
    return torch.where(is_inside[:, None], cos_sin[torch.where(is_inside, positions, 0).long()], 0.0)


def q_norm_rope(q: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Return bf16 q [m, heads, 512], each head normed without weight, its last 64 dims rotated."""
    return rope(rms_norm(q), angles(cos_sin, positions))


def kv_entry(
    kv: torch.Tensor, positions: torch.Tensor, weight: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the parts of cache rows of kv [m, 512]: normed with `weight`, rotated, cast."""
    return fp8_entry(rope(rms_norm(kv, weight), angles(cos_sin, positions)))


def scaled_blocks(
    x: torch.Tensor, block: int, floor: float, largest: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float64 blocks over their scale 2**ceil(log2(max(amax, floor) / largest)), and its exponent."""
    blocks = x.double().unflatten(-1, (-1, block))
    mantissa, exponent = torch.frexp(blocks.abs().amax(-1).clamp(min=floor) / largest)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.ldexp(blocks, -exponent[..., None]).clamp(-largest, largest), exponent


def fp8_entry(entry: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what a cache row holds of bf16 entries [m, 512].

    Returns:
        nope: [m, 448] e4m3, blocks of 64.
        scale: [m, 8] uint8: seven UE8M0 bytes, and a zero.
        rope: [m, 64] bf16.
    """
    nope, scale = act_quant(entry[..., :NOPE_DIM], 64)
    rotated = entry[..., NOPE_DIM:].clone(memory_format=torch.contiguous_format)
    return nope, torch.nn.functional.pad(scale.view(torch.uint8), (0, 1)), rotated


def from_fp8_entry(nope: torch.Tensor, scale: torch.Tensor, rope_part: torch.Tensor) -> torch.Tensor:
    """Return the bf16 entries [..., 512] of `fp8_entry`'s parts: exact."""
    wide = torch.ldexp(nope.float().unflatten(-1, (-1, 64)), scale[..., :-1].int()[..., None] - 127)
    return torch.cat((wide.flatten(-2).to(torch.bfloat16), rope_part), dim=-1)


def quantized_entry(entry: torch.Tensor) -> torch.Tensor:
    """Return bf16 entries as attention sees them: dims 0..447 through FP8."""
    return from_fp8_entry(*fp8_entry(entry))


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Return bf16 of x [..., n] times the Sylvester-Hadamard matrix of n (a power of two), over sqrt(n).

    Butterflies of strides 1, 2, ..., n / 2, each rounded to fp32; then a product with fp32(n**-0.5).
    """
    n, values, stride = x.shape[-1], x.float(), 1
    while stride < n:
        low, high = values.unflatten(-1, (-1, 2, stride)).unbind(-2)
        values = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        stride *= 2
    return (values * n**-0.5).to(torch.bfloat16)


def hadamard_fp4(
    x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed e2m1 [m, heads, 64] and e8m0 [m, heads, 4] of rotated, transformed x [m, heads, 128]."""
    packed, scale = fp4_quant(hadamard(rope(x, angles(cos_sin, positions))).flatten(0, 1))
    m, heads, n = x.shape
    return packed.view(m, heads, n // 2), scale.view(m, heads, n // 32)


def hadamard_fp8(
    x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return e4m3 [m, heads, 128] and e8m0 [m, heads, 1] of rotated, transformed x [m, heads, 128]."""
    values, scale = act_quant(hadamard(rope(x, angles(cos_sin, positions))).flatten(0, 1), x.shape[-1])
    return values.view(x.shape), scale.view(*x.shape[:2], 1)


def quantized_fp4(x: torch.Tensor) -> torch.Tensor:
    """Return bf16 [..., n] through E2M1 with UE8M0 scales of 32, to nearest, ties to the even code."""
    scaled, exponent = scaled_blocks(x, 32, 6 * 2.0**-126, 6.0)
    values = torch.tensor((0, 0.5, 1, 1.5, 2, 3, 4, 6), dtype=torch.float64, device=x.device)
    distance = (scaled.abs()[..., None] - values).abs()
    # Even codes win ties: half a code's parity is added after equal distances, below any true difference.
    odd = torch.arange(values.numel(), device=x.device) % 2
    code = (distance + odd * 1e-9).argmin(-1)
    return torch.ldexp(values[code] * scaled.sign(), exponent[..., None]).flatten(-2).to(torch.bfloat16)


def topk(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Return int32 [m, k]: places of each row's k largest scores by value, the lowest place first at a tie.

    Places of scores that are -inf, and those beyond the row, are -1.
    """
    value, place = torch.sort(scores, dim=-1, descending=True, stable=True)
    place = torch.where(value == -math.inf, -1, place)[:, :k].to(torch.int32)
    return torch.nn.functional.pad(place, (0, k - place.shape[-1]), value=-1)


def index_topk(scores: torch.Tensor, lengths: torch.Tensor, k: int) -> torch.Tensor:
    """Return `topk` of scores [m, n] among the first `lengths` [m] places, places ascending, -1 last."""
    n = scores.shape[1]
    is_hidden = torch.arange(n, device=scores.device) >= lengths[:, None]
    chosen = topk(scores.masked_fill(is_hidden, -math.inf), k)
    chosen = torch.where(chosen < 0, n, chosen).sort(dim=-1).values
    return torch.where(chosen == n, -1, chosen)


def _attend(
    q: torch.Tensor, idx: torch.Tensor, kv: torch.Tensor, sink: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return, in float64: out [m, h, d], lse [m, h], weights [m, h, topk], their values [m, topk, d]."""
    is_valid = (idx >= 0) & (idx < kv.shape[0])
    keys = torch.nn.functional.pad(kv, (0, 0, 0, 1))[torch.where(is_valid, idx, kv.shape[0]).long()].double()
    logits = torch.einsum("mhd,mkd->mhk", q.double(), keys) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~is_valid[:, None], -math.inf)
    lse = torch.logsumexp(logits, dim=-1)
    weight = (logits - torch.logaddexp(lse, sink.double())[..., None]).exp()
    weight = weight.masked_fill(~is_valid[:, None], 0)  # nothing to attend and no sink: 0, not nan
    return weight @ keys, lse.masked_fill(lse == -math.inf, math.inf), weight, keys


_QUERIES = 64  # at a time: keys are expanded for each query


def _portions(q: torch.Tensor, *args: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    idx, kv, sink = args
    for i in range(0, max(len(q), 1), _QUERIES):
        yield _attend(q[i : i + _QUERIES], idx[i : i + _QUERIES], kv, sink)


def sparse_attention(
    q: torch.Tensor, idx: torch.Tensor, kv: torch.Tensor, sink: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend each query to the entries that its indices name; K and V are the same entry.

    Args:
        q: [m, num_heads, head_dim] bf16.
        idx: [m, topk] int32; outside 0..n-1: masked.
        kv: [n, head_dim] bf16.
        sink: [num_heads] fp32, a logit without a value; -inf: none.

    Returns:
        out: [m, num_heads, head_dim] bf16; zeros where nothing is attended.
        lse: [m, num_heads] fp32, natural, without the sink; +inf where nothing is attended.
    """
    parts = [(out.to(torch.bfloat16), lse.float()) for out, lse, _, _ in _portions(q, idx, kv, sink)]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def sparse_attention_tolerance(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    idx: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bounds on |got - want| elementwise.

    A logit sums head_dim exact products in fp32: `num_adds` roundings of 2**-23 (the tensor core truncates)
    of at most |q| |k|. exp2 and the running rescale add 2**-20 to a weight's relative error, the
    roundings of weights to bf16 (8 significant bits) 2**-8, the sum over keys one rounding of 2**-23 a
    key. Both results are rounded to bf16 once, 2**-8 each.
    """
    spread = torch.cat([weight @ keys.abs() for _, _, weight, keys in _portions(q, idx, kv, sink)])
    num_adds = q.shape[-1] + idx.shape[-1]
    norm = (
        kv.double().norm(dim=-1).max()
        if kv.shape[0]
        else torch.zeros((), dtype=torch.float64, device=q.device)
    )
    logit = num_adds * 2.0**-23 * q.double().norm(dim=-1) * norm * q.shape[-1] ** -0.5
    relative = 2 * logit + 2.0**-8 + 2.0**-20 + num_adds * 2.0**-23
    magnitude = torch.where(lse.isinf(), 0, lse.abs()).double()
    bound = relative[..., None] * spread + 2 * 2.0**-8 * out.double().abs()
    return bound, logit + 2.0**-20 + num_adds * 2.0**-23 + 2.0**-22 * magnitude


def range_lists(
    window_end: torch.Tensor,
    window_length: torch.Tensor,
    entry_start: torch.Tensor,
    entry_length: torch.Tensor,
) -> torch.Tensor:
    """Return as int32 [m, 128 + most entries] the rows that each query sees; -1 where there is none.

    Args:
        window_end: [m] int32, the row behind the window's last one, which is the last of its 128 places.
        window_length: [m] int32, its rows.
        entry_start: [m] int32, the first row of the entries.
        entry_length: [m] int32, how many they are; as many count as 2**20 tokens have.
    """
    ranges = (window_end, window_length, entry_start, entry_length)
    end, length, start, count = (x.long()[:, None] for x in ranges)
    count = count.clamp(0, MAX_POSITIONS // WINDOW)
    place = torch.arange(WINDOW, device=end.device)
    window = torch.where(place >= WINDOW - length, end - WINDOW + place, -1)
    place = torch.arange(int(count.max()) if len(count) else 0, device=end.device)
    rows = torch.cat((window, torch.where(place < count, start + place, -1)), dim=1)
    return rows.clamp(-1, 2**31 - 1).to(torch.int32)


def range_attention(
    q: torch.Tensor,
    window_end: torch.Tensor,
    window_length: torch.Tensor,
    entry_start: torch.Tensor,
    entry_length: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend each query to the rows that its ranges say: `sparse_attention` over `range_lists`."""
    lists = range_lists(window_end, window_length, entry_start, entry_length)
    return sparse_attention(q, lists, kv, sink)


def range_attention_tolerance(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    window_end: torch.Tensor,
    window_length: torch.Tensor,
    entry_start: torch.Tensor,
    entry_length: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bounds on |got - want| elementwise: those of `sparse_attention_tolerance`."""
    lists = range_lists(window_end, window_length, entry_start, entry_length)
    return sparse_attention_tolerance(out, lse, q, lists, kv, sink)
