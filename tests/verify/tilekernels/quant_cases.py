"""TileKernels' casts and fused casts."""

import itertools

import torch

from tests.verify.tilekernels.cases import case, equal, mapping, tk

_SCALE_LAYOUTS = (
    {"use_tma_aligned_col_major_sf": False, "round_sf": True, "use_packed_ue8m0": False},
    {"use_tma_aligned_col_major_sf": True, "round_sf": True, "use_packed_ue8m0": True},
    {"use_tma_aligned_col_major_sf": False, "round_sf": False, "use_packed_ue8m0": False},
)
TOKENS, HIDDEN = 13, 256
ROWS = 70  # ragged against blocks of 32 and of 128


def _scales(got, want, packed: bool, hidden: int, per_channels: int) -> None:
    if packed:  # bytes past the last block are left as they were
        got, want = (tk.testing.clear_unused_sf(t, hidden, per_channels) for t in (got, want))
    equal(got, want)


@case("per_token_cast_kernel")
def per_token_cast():
    inputs = ((torch.float32, 32), (torch.bfloat16, 128), (torch.bfloat16, HIDDEN))
    for layout, (dtype, per_channels) in zip(_SCALE_LAYOUTS, inputs, strict=True):
        for fmt in ("e4m3", "e2m1"):
            x = torch.randn(TOKENS, HIDDEN).to(dtype)
            got = tk.quant.per_token_cast(x, fmt, per_channels, **layout)
            want = tk.torch.cast(x, fmt, (1, per_channels), **layout)
            equal(got[0], want[0])
            _scales(got[1], want[1], layout["use_packed_ue8m0"], HIDDEN, per_channels)


@case("per_token_cast_kernel")
def per_token_cast_of_scaled():
    for layout, fmt in zip(_SCALE_LAYOUTS[:2], ("e4m3", "e2m1"), strict=True):
        for source, block in (("e4m3", (128, 128)), ("e2m1", (32, 32))):
            x = tk.torch.cast(torch.randn(TOKENS, HIDDEN).bfloat16(), source, block, **layout)
            got = tk.quant.per_token_cast(x, fmt, 32, x_block_size=block, **layout)
            want = tk.torch.cast(x, fmt, (1, 32), x_block_size=block, **layout)
            equal(got[0], want[0])
            _scales(got[1], want[1], layout["use_packed_ue8m0"], HIDDEN, 32)


@case("per_token_cast_kernel")
def per_token_cast_in_two_steps():
    x = torch.randn(TOKENS, HIDDEN)
    scale = tk.quant.per_token_cast_with_sf_only(x, "e4m3", 128)
    equal(scale, tk.torch.cast(x, "e4m3", (1, 128))[1])
    got = tk.quant.per_token_cast_with_precomputed_sf(x, "e4m3", 128, scale)
    equal(got, tk.torch.cast(x, "e4m3", (1, 128), sf=scale))


@case("per_block_cast_kernel")
def per_block_cast():
    inputs = ((torch.bfloat16, (128, 128)), (torch.float32, (32, 32)), (torch.bfloat16, (32, 128)))
    for layout, (dtype, block) in zip(_SCALE_LAYOUTS, inputs, strict=True):
        for fmt in ("e4m3", "e2m1"):
            x = torch.randn(ROWS, HIDDEN).to(dtype)
            got = tk.quant.per_block_cast(x, fmt, block, **layout)
            want = tk.torch.cast(x, fmt, block, **layout)
            equal(got[0], want[0])
            _scales(got[1], want[1], layout["use_packed_ue8m0"], HIDDEN, block[1])
    x = torch.randn(ROWS, HIDDEN)
    scale = tk.quant.per_block_cast_with_sf_only(x, "e4m3", (32, 32))
    equal(scale, tk.torch.cast(x, "e4m3", (32, 32))[1])
    got = tk.quant.per_block_cast_with_precomputed_sf(x, "e4m3", (32, 32), scale)
    equal(got, tk.torch.cast(x, "e4m3", (32, 32), sf=scale))


@case("per_block_cast_lossless_kernel")
def per_block_cast_lossless():
    blocks = ((1, 128), (32, 32), (128, 128))
    for into, out in itertools.product(_SCALE_LAYOUTS[:2], repeat=2):
        for block in blocks if into is out else blocks[:1]:
            x = torch.randn(ROWS, HIDDEN) * 2.0**9
            x = torch.sign(x) * torch.maximum(x.abs(), x.abs().max() / 2**9)
            x = tk.torch.cast(x, "e2m1", (1, 32), **into)
            got = tk.quant.per_block_cast_lossless(
                x, "e4m3", x_block_size=(1, 32), out_block_size=block, **out
            )
            equal(tk.torch.cast_back(got, "fp32", block), tk.torch.cast_back(x, "fp32", (1, 32)))


@case("cast_back_kernel")
def cast_back():
    for fmt, layout in itertools.product(("e4m3", "e2m1"), _SCALE_LAYOUTS):
        out = "bf16" if layout["round_sf"] else "fp32"
        x = tk.torch.cast(torch.randn(TOKENS, HIDDEN), fmt, (1, 128), **layout)
        equal(tk.quant.per_token_cast_back(x, out, 128), tk.torch.cast_back(x, out, (1, 128)))
    for block in ((128, 1), (128, 128)):
        x = tk.torch.cast(torch.randn(ROWS, HIDDEN), "e4m3", block)
        equal(tk.quant.cast_back(x, "fp32", block), tk.torch.cast_back(x, "fp32", block))


@case("per_token_cast_to_e5m6_kernel")
def per_token_cast_to_e5m6():
    for layout, dtype in zip(_SCALE_LAYOUTS[:2], (torch.bfloat16, torch.float32), strict=True):
        for value in (None, 2.0**-20, 2.0**-14 * 63 / 64, 2.0**-14):
            x = torch.randn(TOKENS, HIDDEN).to(dtype)
            if value is not None:
                x = torch.full_like(x, value)
                x[:, -1] = 65024.0
            got = tk.quant.per_token_cast(x, "e5m6", HIDDEN, **layout)
            want = tk.torch.cast_to_e5m6(x, HIDDEN, **layout)
            equal(got[0], want[0])
            _scales(got[1], want[1], layout["use_packed_ue8m0"], HIDDEN, HIDDEN)


@case("cast_back_e5m6_kernel")
def cast_back_e5m6():
    for layout, out in zip(_SCALE_LAYOUTS[:2], ("bf16", "fp32"), strict=True):
        x = tk.torch.cast_to_e5m6(torch.randn(TOKENS, HIDDEN), HIDDEN, **layout)
        got = tk.quant.cast_back(x, out, (1, HIDDEN), x_special_fmt="e5m6")
        equal(got, tk.torch.cast_back_from_e5m6(x, out, (1, HIDDEN)))


@case("per_channel_cast_fused_kernel")
def per_channel_cast():
    for round_sf in (False, True):
        x = torch.randn(128, HIDDEN).bfloat16()
        got = tk.quant.per_channel_cast(x, "e4m3", 128, round_sf)
        want = tk.torch.cast(x, "e4m3", (128, 1), round_sf=round_sf)
        equal(got[0], want[0])
        equal(got[1], want[1])


@case("per_channel_cast_fused_kernel")
def per_channel_cast_fused():
    idx, (_, token, *_) = mapping(alignment=128, num_experts=3)
    plain = torch.randn(idx.shape[0], 256).bfloat16()
    for x, per_channels in ((plain, None), (tk.torch.cast(plain, "e4m3", (1, 128)), 128)):
        got = tk.quant.per_channel_cast_fused(
            x, "e4m3", 128, True, num_per_channels=per_channels, pos_to_token=token
        )
        want = tk.torch.per_channel_cast_fused(x, 128, per_channels, True, token)
        equal(got[0], want[0])
        equal(got[1], want[1])


@case("per_channel_cast_and_transpose_kernel")
def per_channel_cast_and_transpose():
    for per_tokens, round_sf in itertools.product((32, 128), (False, True)):
        x = torch.randn(128, 192).bfloat16()
        got = tk.quant.per_channel_cast_and_transpose(x, "e4m3", per_tokens, round_sf)
        want = tk.torch.cast(x, "e4m3", (per_tokens, 1), round_sf=round_sf)
        equal(got[0], want[0].T.contiguous())
        equal(got[1], want[1])


@case("swiglu_forward_and_per_channel_cast_and_transpose_kernel")
def swiglu_forward_and_per_channel_cast_and_transpose():
    for per_tokens, plain, clamp in (
        (32, True, None),
        (128, True, 0.5),
        (32, False, 0.5),
        (128, False, None),
    ):
        x = torch.randn(128, 384).bfloat16()
        act = tk.torch.swiglu_forward(x, swiglu_clamp_value=clamp).bfloat16()
        want = tk.torch.cast(act, "e4m3", (per_tokens, 1), round_sf=True)
        got = tk.quant.swiglu_forward_and_per_channel_cast_and_transpose(
            x, "e4m3", per_tokens, round_sf=True, without_transpose=plain, swiglu_clamp_value=clamp
        )
        equal(got[0], want[0] if plain else want[0].T.contiguous())
        equal(got[1], want[1])


@case("swiglu_forward_and_per_token_cast_kernel")
def swiglu_forward_and_per_token_cast():
    idx, (expert, token, slot, pos, *_) = mapping()
    hidden = 256
    weights = torch.randn(idx.shape)
    x = torch.randn(idx.shape[0], hidden * 2).bfloat16()
    x = tk.torch.expand_to_fused(x, pos, token)
    # Only variants that count clamps compile under TileLang 0.1.15: the others leave reducers open.
    choices = ((True, True, 0, 0.5), (False, True, 0, 10.0), (True, False, 1, 0.5), (False, False, 1, 0.5))
    per_channels = 128
    for with_expert, with_weights, chosen, clamp in choices:
        layout = _SCALE_LAYOUTS[chosen]
        packed = layout["use_packed_ue8m0"]
        counts = [torch.zeros(3, dtype=torch.int64) for _ in range(2)]
        weighted = (slot, weights) if with_weights else (None, None)
        out = tk.torch.swiglu_forward(x, *weighted, clamp, counts[1])
        if with_expert:
            out = out.masked_fill((expert == -1).unsqueeze(-1), 0)
        want = tk.torch.cast(out, "e4m3", (1, per_channels), **layout)
        got = tk.quant.swiglu_forward_and_per_token_cast(
            x,
            "e4m3",
            per_channels,
            *weighted,
            pos_to_expert=expert if with_expert else None,
            swiglu_clamp_value=clamp,
            clamped_count=counts[0],
            **layout,
        )
        skipped = (expert == -1).unsqueeze(-1)  # rows that no expert reads
        equal(*(t[0].float().masked_fill(skipped, 0) for t in (got, want)))
        scales = [t[1].masked_fill(skipped, 0) for t in (got, want)]
        _scales(scales[0], scales[1], packed, hidden, per_channels)
        equal(*counts)


@case("swiglu_backward_and_per_token_cast_kernel")
def swiglu_backward_and_per_token_cast():
    idx, (_, token, slot, pos, *_) = mapping(alignment=32, num_experts=4)
    hidden = 256
    x = tk.torch.expand_to_fused(torch.randn(idx.shape[0], hidden * 2).bfloat16(), pos, token)
    weights = torch.rand(idx.shape)
    for per_channels, round_sf, clamp in ((32, False, 0.5), (128, True, None), (32, True, None)):
        scaled = tk.torch.cast(x, "e4m3", (1, per_channels))
        grad = torch.randn(x.shape[0], hidden).bfloat16()
        args = (scaled, grad, weights, slot, pos, per_channels)
        got = tk.quant.swiglu_backward_and_per_token_cast(*args, round_sf=round_sf, swiglu_clamp_value=clamp)
        out, x_grad, weight_grad = tk.torch.swiglu_backward(*args, swiglu_clamp_value=clamp)
        equal(got[0], out.bfloat16())
        want = tk.torch.cast(x_grad, "e4m3", (1, per_channels), round_sf=round_sf)
        equal(got[1][0], want[0])
        equal(got[1][1], want[1])
        equal(got[2], x_grad.bfloat16())
        torch.testing.assert_close(got[3], weight_grad, atol=1e-4, rtol=1e-4)
