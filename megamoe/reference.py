"""The expert layer in plain PyTorch: what every path of MegaMoE has to equal. Imports no kernel.

Choices where the sources differ: activations have one UE8M0 scale for 128 channels and the hidden state is
rounded to bf16 before it is cast, as in the model published with the weights; products are rounded to
bf16 before the clamp; the routing weight is applied before linear 2; expert outputs are bf16 and added in
fp32 in ascending order of the slot.
"""

from typing import NamedTuple

import torch

from dsv4_kernels.gemm import reference as gemm
from dsv4_kernels.quant import reference as quant

ACTIVATION_BLOCK = 128  # channels an activation scale


class RawExperts(NamedTuple):
    """Packed e2m1 weights of some experts, as in the checkpoint.

    Attributes:
        w: [experts, n, k / 2] uint8, the even channel in the low nibble.
        w_scale: [experts, n, k / 32] e8m0.
    """

    w: torch.Tensor
    w_scale: torch.Tensor


class Fp8Experts(NamedTuple):
    """e4m3 weights of some experts.

    Attributes:
        w: [experts, n, k] e4m3.
        w_scale: [experts, n / 128, k / 128] e8m0.
    """

    w: torch.Tensor
    w_scale: torch.Tensor


def linear(x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """Return bf16 [m, n], the product with one expert's e4m3 or packed e2m1 weights."""
    product = gemm.fp8_gemm if w.dtype == torch.float8_e4m3fn else gemm.fp8_fp4_gemm
    return product(x, x_scale, w, w_scale)


def swiglu(gate_up: torch.Tensor, weight: torch.Tensor, clamp: float) -> torch.Tensor:
    """Return bf16 [m, inter] silu(min(gate, clamp)) * clamp(up, -clamp, clamp) * weight, computed in fp32.

    Args:
        gate_up: [m, 2 * inter] bf16, gate channels first.
        weight: [m] float32 routing weights.
        clamp: bound; no lower bound for the gate.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    return (gate / (1 + torch.exp(-gate)) * up * weight[:, None]).to(torch.bfloat16)


def expert(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    l1: tuple[torch.Tensor, torch.Tensor],
    l2: tuple[torch.Tensor, torch.Tensor],
    clamp: float,
) -> torch.Tensor:
    """Return bf16 [m, hidden], one expert's output for the rows x [m, hidden] e4m3 with scales a 1 x 128.

    Args:
        x: [m, hidden] e4m3.
        x_scale: [m, hidden / 128] e8m0.
        weight: [m] float32 routing weights.
        l1: packed weights [2 * inter, hidden / 2] and scales [2 * inter, hidden / 32], gate rows first; or
            e4m3 weights [2 * inter, hidden] and scales [2 * inter / 128, hidden / 128].
        l2: packed weights [hidden, inter / 2] and scales [hidden, inter / 32]; or likewise.
        clamp: of the SwiGLU's inputs.
    """
    hidden_state = swiglu(linear(x, x_scale, *l1), weight, clamp)
    return linear(*quant.act_quant(hidden_state, ACTIVATION_BLOCK), *l2)


def combine(rows: torch.Tensor, topk_idx: torch.Tensor) -> torch.Tensor:
    """Add the experts' outputs of each token in fp32, slot by slot, and round once.

    Args:
        rows: [tokens, topk, hidden] bf16; where topk_idx is negative it is not read.
        topk_idx: [tokens, topk] integer.

    Returns:
        [tokens, hidden] bf16; zeros for a token without experts.
    """
    total = torch.zeros(rows.shape[0], rows.shape[2], dtype=torch.float32, device=rows.device)
    for slot in range(rows.shape[1]):
        chosen = (topk_idx[:, slot] >= 0)[:, None]
        total = torch.where(chosen, total + rows[:, slot].float(), total)
    return total.to(torch.bfloat16)


def mega_moe(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    l1: RawExperts | Fp8Experts,
    l2: RawExperts | Fp8Experts,
    clamp: float = 10.0,
    shared: tuple[Fp8Experts, Fp8Experts] | None = None,
) -> torch.Tensor:
    """Return bf16 [tokens, hidden]: the routed experts' layer, all experts on one device.

    Args:
        x: [tokens, hidden] e4m3.
        x_scale: [tokens, hidden / 128] e8m0.
        topk_idx: [tokens, topk] integer expert numbers; negative: none.
        topk_weights: [tokens, topk] float32.
        l1: gate and up weights, n = 2 * inter, k = hidden.
        l2: down weights, n = hidden, k = inter.
        clamp: of the SwiGLU's inputs.
        shared: both linears of the shared expert, whose output is added behind the others'; None: none.
    """
    rows = torch.zeros(*topk_idx.shape, x.shape[1], dtype=torch.bfloat16, device=x.device)
    for number in range(l1.w.shape[0]):
        token, slot = torch.nonzero(topk_idx == number, as_tuple=True)
        if token.numel():
            first = (l1.w[number], l1.w_scale[number])
            second = (l2.w[number], l2.w_scale[number])
            rows[token, slot] = expert(
                x.view(torch.uint8)[token].view(x.dtype),
                x_scale.view(torch.uint8)[token].view(x_scale.dtype),
                topk_weights[token, slot],
                first,
                second,
                clamp,
            )
    if shared is not None:
        ones = torch.ones(x.shape[0], device=x.device)
        first, second = ((linear.w[0], linear.w_scale[0]) for linear in shared)
        rows = torch.cat((rows, expert(x, x_scale, ones, first, second, clamp)[:, None]), dim=1)
        topk_idx = torch.cat((topk_idx, torch.zeros_like(topk_idx[:, :1])), dim=1)
    return combine(rows, topk_idx)
