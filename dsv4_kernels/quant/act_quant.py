"""FP8 cast of activations, one UE8M0 scale per 1 x block_k block (report 6.1; reference kernels' rule)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.contract import Contract, ContractError, require_tensor
from dsv4_kernels.quant import reference
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.scale import BF16_MAGNITUDE, F32_NAN, UE8M0_NAN, ue8m0_reciprocal, ue8m0_scale

NAME = "act_quant"
BLOCK_SIZES = (128, 64, 32)  # channels a scale: activations, KV nope dims, expert activations
E4M3_MAX = 448.0
AMAX_MIN = 1e-4  # keeps an all-zero block finite


@dataclass(frozen=True)
class Config:
    """Tile height in scale blocks and launch width."""

    block_m: int = 64
    threads: int = 128


# Rows of any tensor are cut into scale blocks, so the kernel knows one dim alone. Launch extents are
# int32: num_blocks + block_m - 1 must not wrap.
CONTRACT = Contract(("0 <= num_blocks", "num_blocks <= MAX_BLOCKS"), consts={"MAX_BLOCKS": 2**31 - 256})
CALL_CONTRACT = Contract(("0 <= m", "0 < k"))


def make_kernel(block_k: int, config: Config) -> Any:
    """Return the PrimFunc for blocks of `block_k` channels; the number of blocks stays symbolic."""
    num_blocks = T.dynamic("num_blocks")
    block_m = config.block_m

    @T.prim_func
    def act_quant_kernel(
        x: T.Tensor[(num_blocks, block_k), T.bfloat16],
        out: T.Tensor[(num_blocks, block_k), T.float8_e4m3fn],
        scale: T.Tensor[(num_blocks,), T.uint8],
    ):
        with T.Kernel(T.ceildiv(num_blocks, block_m), threads=config.threads) as bm:
            x_frag = T.alloc_fragment((block_m, block_k), T.bfloat16)
            magnitude = T.alloc_fragment((block_m, block_k), T.int32)
            amax = T.alloc_fragment((block_m,), T.int32)
            exponent = T.alloc_fragment((block_m,), T.int32)
            out_frag = T.alloc_fragment((block_m, block_k), T.float8_e4m3fn)

            T.copy(x[bm * block_m, 0], x_frag)
            for i, j in T.Parallel(block_m, block_k):
                magnitude[i, j] = T.cast(T.reinterpret(x_frag[i, j], "uint16"), "int32") & BF16_MAGNITUDE
            T.reduce_max(magnitude, amax, dim=1)
            for i in T.Parallel(block_m):
                exponent[i] = ue8m0_scale(amax[i], AMAX_MIN, 1.0 / E4M3_MAX)
            for i in T.Parallel(block_m):
                scale[bm * block_m + i] = T.cast(exponent[i], "uint8")
            for i, j in T.Parallel(block_m, block_k):
                scaled = T.cast(x_frag[i, j], "float32") * ue8m0_reciprocal(exponent[i])
                # A clamp would turn nan into 448, so a block that is not finite is nan by its scale.
                value = T.if_then_else(
                    exponent[i] == UE8M0_NAN,
                    T.reinterpret(F32_NAN, "float32"),
                    T.clamp(scaled, -E4M3_MAX, E4M3_MAX),
                )
                out_frag[i, j] = T.cast(value, "float8_e4m3fn")
            T.copy(out_frag, out[bm * block_m, 0])

    return act_quant_kernel


def _empty_outputs(x: torch.Tensor, block_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, k = x.shape
    out = x.new_empty((m, k), dtype=torch.float8_e4m3fn)
    return out, x.new_empty((m, k // block_k), dtype=torch.float8_e8m0fnu)


@operator(NAME, _empty_outputs)
def act_quant(x: torch.Tensor, block_k: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast activations to FP8 with one power-of-two scale per `block_k` channels.

    The scale is 2**ceil(log2(max(amax, 1e-4) / 448)); values are divided by it exactly, clamped to
    +-448 and rounded to nearest even. A block that holds an inf or nan gets a nan scale (byte 255)
    and nan values, so that it cannot pass unnoticed.

    Args:
        x: [m, k] bf16, contiguous, 16-byte aligned, k a multiple of `block_k`; m = 0 is allowed.
        block_k: channels a scale: 128, 64 or 32.

    Returns:
        out: [m, k] e4m3.
        scale: [m, k / block_k] e8m0; x ~= out * scale.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_tensor(NAME, "x", x, dtype=torch.bfloat16, ndim=2)
    m, k = x.shape
    CALL_CONTRACT.check(NAME, m=m, k=k)
    if block_k not in BLOCK_SIZES:
        raise ContractError(f"{NAME}: requires block_k in {BLOCK_SIZES}, got block_k={block_k}")
    if k % block_k:
        raise ContractError(f"{NAME}: requires k % block_k == 0, got k={k}, block_k={block_k}")
    num_blocks = m * (k // block_k)
    CONTRACT.check(NAME, num_blocks=num_blocks)
    if runtime.uses_reference(x):
        return reference.act_quant(x, block_k)
    out, scale = _empty_outputs(x, block_k)
    if num_blocks:
        args = (x.view(num_blocks, block_k), out.view(num_blocks, block_k), scale.view(torch.uint8).view(-1))
        runtime.launch(make_kernel, _variant(block_k).kwargs, args)
    return out, scale


@cache
def _variant(block_k: int) -> Variant:
    return Variant(f"b{block_k}", {"block_k": block_k, "config": Config()})


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[Any, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(dims["m"], dims["k"], generator=generator, device=device) * 3
    return x.to(torch.bfloat16), dims["block_k"]


def _case(case_id: str, m: int, k: int, block_k: int, *tags: str) -> Case:
    return Case(case_id, {"m": m, "k": k, "block_k": block_k}, tags or ("test",))


SPEC = KernelSpec(
    name=NAME,
    fn=act_quant,
    reference=reference.act_quant,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(b) for b in BLOCK_SIZES),
    select=lambda dims: _variant(dims["block_k"]),
    contract=CONTRACT,
    batch_dims=("num_blocks",),
    cases=(
        *(_case(f"empty-b{b}", 0, 128, b) for b in BLOCK_SIZES),
        *(_case(f"one-row-b{b}", 1, 128, b) for b in BLOCK_SIZES),
        *(_case(f"ragged-b{b}", 67, 384, b) for b in BLOCK_SIZES),
        _case("flash-64", 64, 4096, 128, "test", "bench"),
        _case("flash-4096", 4096, 4096, 128, "gpu", "bench"),
        _case("pro-4096", 4096, 7168, 128, "gpu", "bench"),
        _case("pro-4096-b32", 4096, 7168, 32, "gpu", "bench"),
        _case("kv-nope-4096", 4096, 448, 64, "gpu", "bench"),
        _case("pro-65536", 65536, 7168, 128, "gpu"),
    ),
    num_bytes=lambda d: d["m"] * d["k"] * 3 + d["m"] * d["k"] // d["block_k"],
    peers=("torch_compile", "triton_quant"),
    source="DeepSeek-V4 report 5.2.1; reference kernel act_quant (UE8M0)",
)
