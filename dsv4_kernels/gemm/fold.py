"""FP4 weights laid out once for products with folded weights: the same bytes, their scales split in two.

A row's UE8M0 scales become one fp32 factor (a power of two) and an offset for each 32 channels, which
a kernel adds to the exponents of the codes as it widens them to e4m3. That is exact while a row's
scales span at most `MAX_OFFSET`; weights with a wider row, or with more than
`MAX_K` channels, are kept as they came.

Few tokens take `fp8_fp4_gemm_folded`, which widens weights in every tile, many `fp8_fp4_gemm_widened`, which
widens them once; a row's bits are the same.
"""

from dataclasses import dataclass

import torch

from dsv4_kernels.contract import require_input, require_tensor
from dsv4_kernels.gemm.fp4_widen import STEP_K
from dsv4_kernels.gemm.fp8_fp4_gemm import BLOCK_K, SCALE_K, fp8_fp4_gemm
from dsv4_kernels.gemm.fp8_fp4_gemm_folded import MAX_K, MAX_OFFSET, OFFSET_BIAS, WORD, fp8_fp4_gemm_folded
from dsv4_kernels.gemm.fp8_fp4_gemm_widened import fp8_fp4_gemm_widened
from dsv4_kernels.gemm.wide_tile import BLOCK_N

NAME = "fold_weights"
UE8M0_BIAS = 127
MAX_SCALE = 249  # beyond, a factor of 2**(scale - UE8M0_BIAS + OFFSET_BIAS) may exceed float32
# Widening once was faster from these tokens on at 4096 x 2048, 4096 x 4096, 6144 x 7168 and 7168 x 3072, and
# slower with 512. Smaller weights were not measured: fewer rows leave multiprocessors idle, fewer channels
# make more of the second launch.
WIDENED_TOKENS = 1024
_WIDENED_N, _WIDENED_K = 4096, 2048  # the least that were measured


@dataclass(frozen=True)
class FoldedWeights:
    """n x k FP4 weights as `fp8_fp4_gemm_folded` and `fp8_fp4_gemm_widened` take them.

    Attributes:
        words: [n, k / 8] int32. Word 4 t + g of 128 channels holds channels 32 g + 4 t + (0..3) and
            32 g + 16 + 4 t + (0..3): what one thread hands to the tensor core. Magnitudes stand in
            their order, three bits a nibble; the top bits of nibbles 1 3 5 7 are the signs of the first
            four, those of nibbles 0 2 4 6 of the last four.
        offsets: [n, k / 32] uint8, at most MAX_OFFSET.
        factors: [n] float32, powers of two.
    """

    words: torch.Tensor
    offsets: torch.Tensor
    factors: torch.Tensor


@dataclass(frozen=True)
class RawWeights:
    """FP4 weights with a row whose scales span too much: as in the checkpoint."""

    w: torch.Tensor
    w_scale: torch.Tensor


def fold_weights(w: torch.Tensor, w_scale: torch.Tensor) -> FoldedWeights | RawWeights:
    """Lay weights out for the fast product where that is exact, else keep them.

    Args:
        w: [n, k / 2] uint8, two e2m1 a byte, the even channel in the low nibble, contiguous.
        w_scale: [n, k / 32] e8m0, contiguous; n and k multiples of 128.

    Returns:
        Weights for `fp4_linear`.
    """
    require_tensor(NAME, "w", w, dtype=torch.uint8, ndim=2)
    n, k = w.shape[0], 2 * w.shape[1]
    require_input(NAME, "w_scale", w_scale, (n, k // SCALE_K), dtype=torch.float8_e8m0fnu, device=w.device)
    scale = w_scale.view(torch.uint8)
    least, most = scale.amin(1, keepdim=True), scale.amax(1, keepdim=True)
    if k > MAX_K or bool((most - least > MAX_OFFSET).any() | (most > MAX_SCALE).any()):
        return RawWeights(w, w_scale)
    exponent = least[:, 0].int() - UE8M0_BIAS + OFFSET_BIAS
    factors = torch.ldexp(torch.ones(n, device=w.device), exponent)
    return FoldedWeights(_words(w), (scale - least).contiguous(), factors)


def _words(w: torch.Tensor) -> torch.Tensor:
    n, k = w.shape[0], 2 * w.shape[1]
    codes = torch.stack((w & 15, w >> 4), dim=-1).view(n, k // BLOCK_K, 4, 2, 4, 4)  # block g half t e
    codes = codes.permute(0, 1, 4, 2, 3, 5).reshape(n, k // 8, 8).to(torch.int64)  # block t g, half e
    place = torch.arange(8, device=w.device)
    holder = torch.where(place < 4, 2 * place + 1, 2 * (place - 4))  # nibble that takes the sign
    word = ((codes & 7) << (4 * place)).sum(-1) + ((codes >> 3) << (4 * holder + 3)).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def is_widened(m: int, n: int, k: int) -> bool:
    """Return whether `fp4_linear` takes `fp8_fp4_gemm_widened` for m tokens by n x k folded weights."""
    is_measured = m >= WIDENED_TOKENS and n >= _WIDENED_N and k >= _WIDENED_K
    return is_measured and n % BLOCK_N == 0 and k % STEP_K == 0


def fp4_linear(x: torch.Tensor, x_scale: torch.Tensor, weights: FoldedWeights | RawWeights) -> torch.Tensor:
    """Multiply FP8 activations by weights from `fold_weights`; exact scaling either way.

    Folded weights are widened once a call (`fp8_fp4_gemm_widened`) from 1024 tokens on where n is a multiple
    of 256 from 4096 on and k one of 512 from 2048 on, else in every tile (`fp8_fp4_gemm_folded`). A row of
    the result depends, bit for bit, on its row of `x` alone, whatever m is.

    Args:
        x: [m, k] e4m3, contiguous; m = 0 is allowed.
        x_scale: [m, k / 128] e8m0, contiguous.
        weights: of n x k.
        All on one device.

    Returns:
        [m, n] bf16. Where weights are widened once, a call allocates n x k bytes beside it.

    Raises:
        ContractError: a clause above, or of the product that is taken, does not hold; nothing was launched.
    """
    if isinstance(weights, RawWeights):
        return fp8_fp4_gemm(x, x_scale, weights.w, weights.w_scale)
    folded = weights.words, weights.offsets, weights.factors
    if is_widened(x.shape[0], weights.words.shape[0], weights.words.shape[1] * WORD):
        return fp8_fp4_gemm_widened(x, x_scale, *folded)
    return fp8_fp4_gemm_folded(x, x_scale, *folded)
