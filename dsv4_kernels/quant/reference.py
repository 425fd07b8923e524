"""PyTorch references of the casts; imports nothing from the kernels."""

import torch

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _ceil_exponent(scale: torch.Tensor) -> torch.Tensor:
    """Return the least integer e with 2**e >= scale, for positive finite float32."""
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2**exponent, mantissa in [0.5, 1)
    return torch.where(mantissa == 0.5, exponent - 1, exponent)


def _block_scale(
    x: torch.Tensor, block: int, floor: float, largest: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x in blocks [m, k/block, block] fp32 and UE8M0 bytes [m, k/block] int32 (255: not finite)."""
    blocks = x.float().unflatten(-1, (x.shape[-1] // block, block))
    amax = blocks.abs().amax(-1)
    finite = torch.isfinite(amax)
    scale = torch.where(finite, amax, 1.0).clamp(min=floor) / largest
    return blocks, torch.where(finite, _ceil_exponent(scale) + 127, 255).to(torch.int32)


def act_quant(x: torch.Tensor, block_k: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast each 1 x block_k block of bf16 `x` [m, k] to e4m3 with scale 2**ceil(log2(amax / 448))."""
    blocks, byte = _block_scale(x, block_k, 1e-4, 448.0)
    scaled = torch.ldexp(blocks, (127 - byte)[..., None]).clamp(-448, 448)
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    codes = torch.where((byte == 255)[..., None], 0x7F, codes).to(torch.uint8)
    return codes.view_as(x).view(torch.float8_e4m3fn), byte.to(torch.uint8).view(torch.float8_e8m0fnu)


def fp4_quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast each 1 x 32 block of bf16 `x` [m, k] to packed e2m1 with scale 2**ceil(log2(amax / 6))."""
    blocks, byte = _block_scale(x, 32, 6 * 2.0**-126, 6.0)
    # float64: 2**-126 and float32 denormals stay exact whatever the CPU flushes.
    scaled = torch.ldexp(blocks.double(), (127 - byte)[..., None])
    magnitude = scaled.abs().clamp(max=6)
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64, device=x.device)
    code = (magnitude[..., None] - values).abs().argmin(-1)  # the lower code at a tie
    tie = (magnitude * 2 == values[code] + values[(code + 1).clamp(max=7)]) & (code < 7)
    code = torch.where(tie & (code % 2 == 1), code + 1, code)  # ties to even
    code = code | (torch.signbit(blocks).long() << 3)
    code = torch.where((byte == 255)[..., None], 0, code).flatten(-2)
    packed = (code[..., 0::2] | (code[..., 1::2] << 4)).to(torch.uint8)
    return packed, byte.to(torch.uint8).view(torch.float8_e8m0fnu)


def fp4_dequant(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return bf16 [m, k] of packed e2m1 [m, k/2] (low nibble first) and scales [m, k/32]."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    magnitude = torch.tensor(E2M1_VALUES, dtype=torch.float64, device=packed.device)[codes & 7]
    value = torch.where(codes >= 8, -magnitude, magnitude)
    byte = scale.view(torch.uint8).int().repeat_interleave(32, dim=-1)
    value = torch.ldexp(value, byte - 127)
    return torch.where(byte == 255, torch.nan, value).to(torch.bfloat16)
