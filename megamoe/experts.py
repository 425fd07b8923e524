"""One rank's experts: weights laid out once, and both linears of the rows that the rank has received."""

from collections.abc import Sequence

import torch
from torch import nn

from dsv4_kernels.gemm.fold import FoldedWeights, RawWeights, fold_weights, fp4_linear
from dsv4_kernels.quant.act_quant import act_quant
from megamoe.reference import ACTIVATION_BLOCK, RawExperts, swiglu


class ExpertLinear(nn.Module):
    """One linear of some experts, FP4 weights; the scales are folded if that is exact for every expert.

    Buffers hold integers only, so that casting a model leaves them as they are.
    """

    def __init__(self, raw: RawExperts) -> None:
        """Lay the weights out; `raw` is not kept where they could be folded."""
        super().__init__()
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

    def stacked(self) -> FoldedWeights:
        """Return the folded weights of all experts, [experts, ...].

        Raises:
            ValueError: the scales of a row span too much to be folded.
        """
        if not self.is_folded:
            raise ValueError("mega_moe: requires weights that fold_weights can fold, got RawWeights")
        words, offsets = self.get_buffer("words"), self.get_buffer("offsets")
        return FoldedWeights(words, offsets, self.get_buffer("factor_bits").view(torch.float32))

    def __getitem__(self, number: int) -> FoldedWeights | RawWeights:
        """Return one expert's weights, for `fp4_linear`."""
        if not self.is_folded:
            scale = self.get_buffer("scale_bytes")[number].view(torch.float8_e8m0fnu)
            return RawWeights(self.get_buffer("w")[number], scale)
        all_experts = self.stacked()
        return FoldedWeights(
            all_experts.words[number], all_experts.offsets[number], all_experts.factors[number]
        )


class Experts(nn.Module):
    """Both linears of one rank's experts."""

    def __init__(self, l1: RawExperts, l2: RawExperts, clamp: float = 10.0) -> None:
        """Lay the weights out.

        Args:
            l1: gate and up, n = 2 * inter (gate rows first), k = hidden.
            l2: down, n = hidden, k = inter.
            clamp: of the SwiGLU's inputs.

        Raises:
            ValueError: the shapes of the two do not fit each other.
        """
        super().__init__()
        hidden, inter = 2 * l1.w.shape[2], 2 * l2.w.shape[2]
        if l1.w.shape[:2] != (l2.w.shape[0], 2 * inter) or l2.w.shape[1] != hidden:
            raise ValueError(
                f"mega_moe: requires l1 [e, 2 * inter, hidden / 2] and l2 [e, hidden, inter / 2], got "
                f"{tuple(l1.w.shape)} and {tuple(l2.w.shape)}"
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
            gate_up = fp4_linear(x[rows], scale, self.l1[number])
            hidden_state = swiglu(gate_up, weight[rows], self.clamp)
            outputs.append(fp4_linear(*act_quant(hidden_state, ACTIVATION_BLOCK), self.l2[number]))
            start += count
        return torch.cat(outputs) if outputs else x.new_zeros(x.shape, dtype=torch.bfloat16)
