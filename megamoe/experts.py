"""One rank's experts: weights laid out once, and both linears of the rows that the rank has received."""

from collections.abc import Sequence

import torch
from torch import nn

from dsv4_kernels.gemm.fold import FoldedWeights, RawWeights, fold_weights, fp4_linear
from dsv4_kernels.gemm.fp8_gemm import fp8_gemm
from dsv4_kernels.quant.act_quant import act_quant
from megamoe.reference import ACTIVATION_BLOCK, Fp8Experts, RawExperts, swiglu

_ALIGNMENT_BYTES = 16  # of what a product reads


def linear(
    x: torch.Tensor, x_scale: torch.Tensor, weights: FoldedWeights | RawWeights | Fp8Experts
) -> torch.Tensor:
    """Multiply FP8 activations by one expert's weights, as `fp4_linear` or `fp8_gemm`."""
    if isinstance(weights, Fp8Experts):
        return fp8_gemm(x, x_scale, *weights)
    return fp4_linear(x, x_scale, weights)


class ExpertLinear(nn.Module):
    """One linear of some experts, FP8 or FP4 weights; FP4's scales are folded if that is exact for all.

    Buffers hold integers only, so that casting a model leaves them as they are.
    """

    def __init__(self, raw: RawExperts | Fp8Experts) -> None:
        """Lay the weights out; `raw` is not kept where they could be folded."""
        super().__init__()
        self.is_fp8 = isinstance(raw, Fp8Experts)
        if isinstance(raw, Fp8Experts):
            self.num_experts = raw.w.shape[0]
            self.register_buffer("codes", raw.w.view(torch.uint8))
            self.register_buffer("scale_bytes", raw.w_scale.view(torch.uint8))
            return
        folded = [fold_weights(w, s) for w, s in zip(*raw, strict=True)]
        self.num_experts = len(folded)
        if all(isinstance(w, FoldedWeights) for w in folded):
            parts = [w for w in folded if isinstance(w, FoldedWeights)]
            self.register_buffer("words", torch.stack([w.words for w in parts]))
            self.register_buffer("offsets", torch.stack([w.offsets for w in parts]))
            self.register_buffer("factor_bits", torch.stack([w.factors for w in parts]).view(torch.int32))
        else:
            self.register_buffer("w", raw.w)
            self.register_buffer("scale_bytes", raw.w_scale.view(torch.uint8))

    @property
    def is_folded(self) -> bool:
        """Whether the scales are folded."""
        return hasattr(self, "words")

    def stacked(self) -> FoldedWeights | Fp8Experts:
        """Return the weights of all experts, [experts, ...], as `weights.pack` takes them.

        Raises:
            ValueError: the scales of a row of FP4 weights span too much to be folded.
        """
        if self.is_fp8:
            return Fp8Experts(
                self.get_buffer("codes").view(torch.float8_e4m3fn),
                self.get_buffer("scale_bytes").view(torch.float8_e8m0fnu),
            )
        if not self.is_folded:
            raise ValueError("mega_moe: requires weights that fold_weights can fold, got RawWeights")
        words, offsets = self.get_buffer("words"), self.get_buffer("offsets")
        return FoldedWeights(words, offsets, self.get_buffer("factor_bits").view(torch.float32))

    def __getitem__(self, number: int) -> FoldedWeights | RawWeights | Fp8Experts:
        """Return one expert's weights, for `linear`."""
        if self.is_fp8:
            scale = self.get_buffer("scale_bytes")[number]
            if scale.data_ptr() % _ALIGNMENT_BYTES:
                scale = scale.clone()
            codes = self.get_buffer("codes")[number].view(torch.float8_e4m3fn)
            return Fp8Experts(codes, scale.view(torch.float8_e8m0fnu))
        if not self.is_folded:
            scale = self.get_buffer("scale_bytes")[number].view(torch.float8_e8m0fnu)
            return RawWeights(self.get_buffer("w")[number], scale)
        all_experts = self.stacked()
        assert isinstance(all_experts, FoldedWeights), "FP4 weights"
        return FoldedWeights(
            all_experts.words[number], all_experts.offsets[number], all_experts.factors[number]
        )


class Experts(nn.Module):
    """Both linears of one rank's experts."""

    def __init__(self, l1: RawExperts | Fp8Experts, l2: RawExperts | Fp8Experts, clamp: float = 10.0) -> None:
        """Lay the weights out.

        Args:
            l1: gate and up, n = 2 * inter (gate rows first), k = hidden.
            l2: down, n = hidden, k = inter.
            clamp: of the SwiGLU's inputs.

        Raises:
            ValueError: the shapes of the two do not fit each other.
        """
        super().__init__()
        packed = 1 if isinstance(l1, Fp8Experts) else 2  # weights a byte
        if type(l1) is not type(l2):
            got = f"{type(l1).__name__} and {type(l2).__name__}"
            raise ValueError(f"mega_moe: requires both linears of one format, got {got}")
        hidden, inter = packed * l1.w.shape[2], packed * l2.w.shape[2]
        if l1.w.shape[:2] != (l2.w.shape[0], 2 * inter) or l2.w.shape[1] != hidden:
            raise ValueError(
                f"mega_moe: requires l1 [e, 2 * inter, hidden / {packed}] and "
                f"l2 [e, hidden, inter / {packed}], got {tuple(l1.w.shape)} and {tuple(l2.w.shape)}"
            )
        self.hidden, self.inter, self.clamp = hidden, inter, clamp
        self.l1, self.l2 = ExpertLinear(l1), ExpertLinear(l2)

    @property
    def num_experts(self) -> int:
        """Experts of this rank."""
        return self.l1.num_experts

    def forward(
        self, x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, counts: Sequence[int]
    ) -> torch.Tensor:
        """Run both linears on rows that stand expert by expert.

        Args:
            x: [m, hidden] e4m3.
            x_scale: [m, hidden / 128] e8m0.
            weight: [m] float32 routing weights.
            counts: rows of each expert; their sum is m.

        Returns:
            [m, hidden] bf16; a row's bits depend on its own data alone.
        """
        outputs, start = [], 0
        for number, count in enumerate(counts):
            if not count:
                continue
            rows = slice(start, start + count)
            scale = x_scale[rows].clone()  # a slice may start at an address that is not aligned
            gate_up = linear(x[rows], scale, self.l1[number])
            hidden_state = swiglu(gate_up, weight[rows], self.clamp)
            outputs.append(linear(*act_quant(hidden_state, ACTIVATION_BLOCK), self.l2[number]))
            start += count
        return torch.cat(outputs) if outputs else x.new_zeros(x.shape, dtype=torch.bfloat16)


def add_shared(
    rows: torch.Tensor, topk_idx: torch.Tensor, x: torch.Tensor, x_scale: torch.Tensor, shared: Experts | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts' outputs with the shared one's in a slot behind the others, for `reference.combine`.

    Args:
        rows: [tokens, topk, hidden] bf16.
        topk_idx: [tokens, topk] integer.
        x: [tokens, hidden] e4m3.
        x_scale: [tokens, hidden / 128] e8m0.
        shared: one expert, or None: nothing is added.
    """
    if shared is None:
        return rows, topk_idx
    count = x.shape[0]
    out = shared(x, x_scale, torch.ones(count, device=x.device), [count])
    return torch.cat((rows, out[:, None]), 1), torch.cat((topk_idx, torch.zeros_like(topk_idx[:, :1])), 1)
