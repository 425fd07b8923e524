"""FP4 (E2M1) casts with one UE8M0 scale per 1 x 32 block, and the inverse (report 5.2.1)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.contract import Contract, require_input, require_tensor
from dsv4_kernels.quant import reference
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.scale import (
    BF16_MAGNITUDE,
    UE8M0_NAN,
    bf16_bits_to_f32,
    e2m1_code,
    ue8m0_reciprocal,
    ue8m0_scale,
)

BLOCK_K = 32  # elements a scale
PACKED = BLOCK_K // 2  # bytes of a block's packed elements
E2M1_MAX = 6.0
AMAX_MIN = 6 * 2.0**-126  # least scale is 2**-126, whose reciprocal is a normal float
SIGN_TO_NIBBLE = 12  # bf16's sign bit 15 to the nibble's bit 3


@dataclass(frozen=True)
class Config:
    """Tile height in scale blocks and launch width."""

    block_m: int = 128
    threads: int = 128


# Launch extents are int32: num_blocks + block_m - 1 must not wrap.
CONTRACT = Contract(("0 <= num_blocks", "num_blocks <= MAX_BLOCKS"), consts={"MAX_BLOCKS": 2**31 - 256})
CALL_CONTRACT = Contract(("0 <= m", "0 < k", "k % BLOCK_K == 0"), consts={"BLOCK_K": BLOCK_K})


def make_quant_kernel(config: Config) -> Any:
    """Return the PrimFunc of fp4_quant; the number of blocks stays symbolic.

    `x` holds two bf16 a word, so that both nibbles of a byte come from one element of a fragment.
    """
    num_blocks = T.dynamic("num_blocks")
    block_m = config.block_m

    def nibble(bits: Any, exponent: Any) -> Any:
        scaled = bf16_bits_to_f32(bits & BF16_MAGNITUDE) * ue8m0_reciprocal(exponent)
        return e2m1_code(T.min(scaled, E2M1_MAX)) | ((bits >> SIGN_TO_NIBBLE) & 8)

    @T.prim_func
    def fp4_quant_kernel(
        x: T.Tensor[(num_blocks, PACKED), T.int32],
        out: T.Tensor[(num_blocks, PACKED), T.uint8],
        scale: T.Tensor[(num_blocks,), T.uint8],
    ):
        with T.Kernel(T.ceildiv(num_blocks, block_m), threads=config.threads) as bm:
            words = T.alloc_fragment((block_m, PACKED), T.int32)
            magnitude = T.alloc_fragment((block_m, PACKED), T.int32)
            amax = T.alloc_fragment((block_m,), T.int32)
            exponent = T.alloc_fragment((block_m,), T.int32)
            out_frag = T.alloc_fragment((block_m, PACKED), T.uint8)

            T.copy(x[bm * block_m, 0], words)
            for i, j in T.Parallel(block_m, PACKED):
                magnitude[i, j] = T.max(words[i, j] & BF16_MAGNITUDE, (words[i, j] >> 16) & BF16_MAGNITUDE)
            T.reduce_max(magnitude, amax, dim=1)
            for i in T.Parallel(block_m):
                exponent[i] = ue8m0_scale(amax[i], AMAX_MIN, 1.0 / E2M1_MAX)
            for i in T.Parallel(block_m):
                scale[bm * block_m + i] = T.cast(exponent[i], "uint8")
            for i, j in T.Parallel(block_m, PACKED):
                low = nibble(words[i, j] & 0xFFFF, exponent[i])
                high = nibble((words[i, j] >> 16) & 0xFFFF, exponent[i])
                # E2M1 has no nan: a block that is not finite is nan by its scale, its codes are zero.
                out_frag[i, j] = T.cast(
                    T.if_then_else(exponent[i] == UE8M0_NAN, 0, low | (high << 4)), "uint8"
                )
            T.copy(out_frag, out[bm * block_m, 0])

    return fp4_quant_kernel


def make_dequant_kernel(config: Config) -> Any:
    """Return the PrimFunc of fp4_dequant; the number of blocks stays symbolic."""
    num_blocks = T.dynamic("num_blocks")
    block_m = config.block_m

    @T.prim_func
    def fp4_dequant_kernel(
        packed: T.Tensor[(num_blocks, BLOCK_K), T.float4_e2m1fn],
        scale: T.Tensor[(num_blocks,), T.float8_e8m0fnu],
        out: T.Tensor[(num_blocks, BLOCK_K), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(num_blocks, block_m), threads=config.threads) as bm:
            codes = T.alloc_fragment((block_m, BLOCK_K), T.float4_e2m1fn)
            out_frag = T.alloc_fragment((block_m, BLOCK_K), T.bfloat16)

            T.copy(packed[bm * block_m, 0], codes)
            for i, j in T.Parallel(block_m, BLOCK_K):
                value = T.cast(codes[i, j], "float32") * T.cast(scale[bm * block_m + i], "float32")
                out_frag[i, j] = T.cast(value, "bfloat16")
            T.copy(out_frag, out[bm * block_m, 0])

    return fp4_dequant_kernel


def _empty_quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    m, k = x.shape
    packed = x.new_empty((m, k // 2), dtype=torch.uint8)
    return packed, x.new_empty((m, k // BLOCK_K), dtype=torch.float8_e8m0fnu)


@operator("fp4_quant", _empty_quant)
def fp4_quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast to packed FP4 with one power-of-two scale per 32 channels.

    The scale is 2**ceil(log2(max(amax, 6 * 2**-126) / 6)); values are divided by it exactly and
    rounded to nearest, ties to even, saturating at 6. The sign of zero is kept. A block that holds an
    inf or nan gets a nan scale (byte 255) and zero codes.

    Args:
        x: [m, k] bf16, contiguous, 16-byte aligned, k a multiple of 32; m = 0 is allowed.

    Returns:
        packed: [m, k / 2] uint8, two e2m1 a byte, the even channel in the low nibble.
        scale: [m, k / 32] e8m0; x ~= e2m1 * scale.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    name = "fp4_quant"
    require_tensor(name, "x", x, dtype=torch.bfloat16, ndim=2)
    m, k = x.shape
    CALL_CONTRACT.check(name, m=m, k=k)
    num_blocks = m * (k // BLOCK_K)
    CONTRACT.check(name, num_blocks=num_blocks)
    if runtime.uses_reference(x):
        return reference.fp4_quant(x)
    packed, scale = _empty_quant(x)
    if num_blocks:
        words = x.view(num_blocks, BLOCK_K).view(torch.int32)
        args = (words, packed.view(num_blocks, PACKED), scale.view(torch.uint8).view(-1))
        runtime.launch(make_quant_kernel, _VARIANT.kwargs, args)
    return packed, scale


def _empty_dequant(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return packed.new_empty((packed.shape[0], packed.shape[1] * 2), dtype=torch.bfloat16)


@operator("fp4_dequant", _empty_dequant)
def fp4_dequant(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Expand packed FP4 to bf16: the inverse of fp4_quant, exact but for overflow to inf.

    Args:
        packed: [m, k / 2] uint8, contiguous, 16-byte aligned, the even channel in the low nibble.
        scale: [m, k / 32] e8m0, contiguous; byte 255 makes the block nan.

    Returns:
        [m, k] bf16.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    name = "fp4_dequant"
    require_tensor(name, "packed", packed, dtype=torch.uint8, ndim=2)
    m, k = packed.shape[0], packed.shape[1] * 2
    CALL_CONTRACT.check(name, m=m, k=k)
    require_input(name, "scale", scale, (m, k // BLOCK_K), dtype=torch.float8_e8m0fnu, device=packed.device)
    num_blocks = m * (k // BLOCK_K)
    CONTRACT.check(name, num_blocks=num_blocks)
    if runtime.uses_reference(packed):
        return reference.fp4_dequant(packed, scale)
    out = _empty_dequant(packed, scale)
    if num_blocks:
        args = (packed.view(num_blocks, PACKED), scale.view(-1), out.view(num_blocks, BLOCK_K))
        runtime.launch(make_dequant_kernel, _VARIANT.kwargs, args)
    return out


_VARIANT = Variant("b32", {"config": Config()})


def _quant_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    return ((torch.randn(dims["m"], dims["k"], generator=generator, device=device) * 3).to(torch.bfloat16),)


def _dequant_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    m, k = dims["m"], dims["k"]
    packed = torch.randint(0, 256, (m, k // 2), generator=generator, device=device, dtype=torch.uint8)
    scale = torch.randint(110, 140, (m, k // BLOCK_K), generator=generator, device=device, dtype=torch.uint8)
    return packed, scale.view(torch.float8_e8m0fnu)


_CASES = (
    Case("empty", {"m": 0, "k": 32}),
    Case("one-row", {"m": 1, "k": 32}),
    Case("ragged", {"m": 67, "k": 288}),
    Case("flash-64", {"m": 64, "k": 4096}, ("test", "bench")),
    Case("flash-4096", {"m": 4096, "k": 4096}, ("gpu", "bench")),
    Case("pro-4096", {"m": 4096, "k": 7168}, ("gpu", "bench")),
    Case("pro-65536", {"m": 65536, "k": 7168}, ("gpu",)),
)


def _num_bytes(dims: Mapping[str, int]) -> int:
    elements = dims["m"] * dims["k"]
    return elements * 2 + elements // 2 + elements // BLOCK_K


SPECS = (
    KernelSpec(
        name="fp4_quant",
        fn=fp4_quant,
        reference=reference.fp4_quant,
        make_inputs=_quant_inputs,
        make_kernel=make_quant_kernel,
        variants=(_VARIANT,),
        select=lambda dims: _VARIANT,
        contract=CONTRACT,
        batch_dims=("num_blocks",),
        cases=_CASES,
        num_bytes=_num_bytes,
        peers=("torch_compile", "triton_quant"),
        source="DeepSeek-V4 report 5.2.1; reference kernel fp4_act_quant",
    ),
    KernelSpec(
        name="fp4_dequant",
        fn=fp4_dequant,
        reference=reference.fp4_dequant,
        make_inputs=_dequant_inputs,
        make_kernel=make_dequant_kernel,
        variants=(_VARIANT,),
        select=lambda dims: _VARIANT,
        contract=CONTRACT,
        batch_dims=("num_blocks",),
        cases=_CASES,
        num_bytes=_num_bytes,
        peers=("torch_compile",),
        source="DeepSeek-V4 report 5.2.1 (inverse of fp4_quant)",
    ),
)
