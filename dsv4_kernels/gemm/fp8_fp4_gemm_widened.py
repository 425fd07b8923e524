"""out = x @ w.T of many tokens with FP8 activations and folded FP4 weights, in two launches.

Where tokens are many, widening weights in every tile costs more than doing it once: `fp4_widen` writes them
as e4m3 to a workspace, and a product whose operands both come by TMA reads them there (`widened_tile`). The
bits are those of `fp8_fp4_gemm_folded`, which few tokens take. Design and measurements: docs/gemm.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from dsv4_kernels import runtime
from dsv4_kernels.contract import Contract, require_input, require_shape, require_tensor
from dsv4_kernels.gemm import fp4_widen, fp8_fp4_gemm_folded, reference, widened_tile
from dsv4_kernels.gemm.folded_tile import BLOCK_K, SCALE_K, WORD
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

NAME = "fp8_fp4_gemm_widened"
MAX_TOKENS = 2**31 - 256  # launch extents are int32
CONTRACT = Contract(
    ("0 <= m", "m <= MAX_TOKENS", "0 < n", "n % BLOCK_N == 0", "0 < k", "k % STEP_K == 0", "k <= MAX_K"),
    consts={
        "MAX_TOKENS": MAX_TOKENS,
        "BLOCK_N": widened_tile.BLOCK_N,
        "STEP_K": fp4_widen.STEP_K,
        "MAX_K": fp8_fp4_gemm_folded.MAX_K,
    },
)


@dataclass(frozen=True)
class Config:
    """Schedule of the product.

    Attributes:
        num_stages: depth of the ring.
        tiles: that a block multiplies in turn.
    """

    num_stages: int
    tiles: int = 1


def make_kernel(n: int, k: int, config: Config) -> Any:
    """Return the PrimFunc of the product with widened weights; the number of tokens m stays symbolic."""
    if config.tiles > 1:
        return widened_tile.make_tiles(n, k, config.tiles, config.num_stages)
    return widened_tile.make_one(n, k, config.num_stages)


def _depth(k: int, tiles: int) -> int:
    stages = widened_tile.num_stages(k, tiles)
    assert stages is not None, "scales of MAX_K channels leave room for a ring"
    return stages


def workspace_bytes(dims: Mapping[str, int]) -> int:
    """Return the bytes of the widened weights, which a call allocates beside its output."""
    return dims["n"] * dims["k"] if dims["m"] else 0


def _empty_output(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    words: torch.Tensor,
    offsets: torch.Tensor,
    factors: torch.Tensor,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], words.shape[0]), dtype=torch.bfloat16)


@operator(NAME, _empty_output)
def fp8_fp4_gemm_widened(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    words: torch.Tensor,
    offsets: torch.Tensor,
    factors: torch.Tensor,
) -> torch.Tensor:
    """Multiply many FP8 activations by folded FP4 weights (see `fold.FoldedWeights`), widened first.

    A row of `out` has, bit for bit, what `fp8_fp4_gemm_folded` gives it: products of 128 channels are summed
    by the tensor core, scaled by x_scale in fp32 and added in the order of k; the row's factor comes last.

    Args:
        x: [m, k] e4m3, contiguous; m = 0 is allowed.
        x_scale: [m, k / 128] e8m0, contiguous.
        words: [n, k / 8] int32, contiguous.
        offsets: [n, k / 32] uint8, at most MAX_OFFSET (not checked here), contiguous.
        factors: [n] float32, contiguous.
        All 16-byte aligned, on one device; n a multiple of 256, k of 512 and at most 16384.

    Returns:
        [m, n] bf16. A call allocates n x k bytes beside it.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_tensor(NAME, "x", x, dtype=torch.float8_e4m3fn, ndim=2)
    require_tensor(NAME, "words", words, dtype=torch.int32, ndim=2, device=x.device)
    (m, k), n = x.shape, words.shape[0]
    CONTRACT.check(NAME, m=m, n=n, k=k)
    require_shape(NAME, "words", words, (n, k // WORD))
    require_input(NAME, "x_scale", x_scale, (m, k // BLOCK_K), dtype=torch.float8_e8m0fnu, device=x.device)
    require_input(NAME, "offsets", offsets, (n, k // SCALE_K), dtype=torch.uint8, device=x.device)
    require_input(NAME, "factors", factors, (n,), dtype=torch.float32, device=x.device)
    if runtime.uses_reference(x):
        return reference.fp8_fp4_gemm_folded(x, x_scale, words, offsets, factors)
    out = _empty_output(x, x_scale, words, offsets, factors)
    if m:
        widened = x.new_empty((n, k))
        fp4_widen.launch(words, offsets, widened)
        args = (x, x_scale.view(torch.uint8), widened, factors, out)
        runtime.launch(make_kernel, _select(m, n, k).kwargs, args)
    return out


@cache
def _variant(n: int, k: int, tiles: int) -> Variant:
    name = f"n{n}-k{k}" + (f"-x{tiles}" if tiles > 1 else "")
    return Variant(name, {"n": n, "k": k, "config": Config(_depth(k, tiles), tiles)})


def _select(m: int, n: int, k: int) -> Variant:
    return _variant(n, k, 1)


# n x k of V4's experts (Flash, Pro): gate and up together, down.
SHAPES = fp4_widen.SHAPES


def _case(m: int, n: int, k: int, *tags: str) -> Case:
    return Case(f"m{m}-n{n}-k{k}", {"m": m, "n": n, "k": k}, tags)


SPEC = KernelSpec(
    name=NAME,
    fn=fp8_fp4_gemm_widened,
    reference=reference.fp8_fp4_gemm_folded,
    make_inputs=fp8_fp4_gemm_folded.SPEC.make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(n, k, 1) for n, k in SHAPES),
    select=lambda d: _select(d["m"], d["n"], d["k"]),
    contract=CONTRACT,
    cases=(
        _case(0, 256, 512, "test"),
        _case(1, 256, 512, "test"),
        _case(131, 512, 1024, "test"),
        *(_case(m, n, k, "gpu", "bench") for n, k in SHAPES for m in (1024, 4096)),
    ),
    num_bytes=fp8_fp4_gemm_folded.SPEC.num_bytes,
    num_flops=fp8_fp4_gemm_folded.SPEC.num_flops,
    tolerance=reference.fp8_fp4_gemm_folded_tolerance,
    peers=("deepgemm", "humming"),
    source="DeepSeek-V4 report 5.2.1; reference kernel fp4_gemm",
    small={"n": 256, "k": 1024},
    workspace_bytes=workspace_bytes,
)
