"""`MegaMoE`: the experts' layer as a module."""

import torch
import torch.distributed as dist
from torch import nn

from megamoe import distributed
from megamoe.experts import Experts
from megamoe.functional import check_shared, checked, local
from megamoe.layer import FusedLayer
from megamoe.reference import Fp8Experts, RawExperts
from megamoe.routing import BAD_ROUTING

BACKENDS = ("auto", "local", "fused", "distributed")


class MegaMoE(nn.Module):
    """Experts with FP4 or FP8 weights over one or more ranks: dispatch, two linears, SwiGLU, combine.

    Backends give equal bits: `local` (all experts on this rank), `fused` (one kernel; on a Hopper GPU, or
    several of one NVLink domain with a process each), `distributed` (any process group of
    torch.distributed). `auto` is `local` without a group of several ranks, else `distributed`.

    Attributes:
        received: [experts of this rank] int32, rows received in all calls so far, where asked for.
        num_masked: [] int64, bad entries masked in the last call.
    """

    received: torch.Tensor | None

    def __init__(
        self,
        l1: RawExperts | Fp8Experts,
        l2: RawExperts | Fp8Experts,
        *,
        num_experts: int,
        topk: int,
        max_tokens: int,
        clamp: float = 10.0,
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
        bad_routing: str = "raise",
        count_received: bool = False,
        timeout_s: float = 60.0,
        shared: tuple[Fp8Experts, Fp8Experts] | None = None,
    ) -> None:
        """Lay the weights out.

        Args:
            l1: gate and up weights of this rank's experts, n = 2 * inter (gate rows first), k = hidden.
            l2: down weights in the same format, n = hidden, k = inter.
            num_experts: of all ranks; rank r has the consecutive experts from its share's first on.
            topk: experts a token.
            max_tokens: most tokens a call of one rank.
            clamp: of the SwiGLU's inputs; 10 for V4.
            group: process group of the ranks; None: all, if torch.distributed is initialised.
            backend: one of BACKENDS.
            bad_routing: `raise` (waits for the device) or `mask`; see `routing.check_routing`.
            count_received: keep `received`.
            timeout_s: `fused`: after about so long a rank gives up waiting for another; see `check`.
            shared: both linears of the shared expert, of the routed ones' channels and the same on all ranks:
                each rank runs it on its own tokens and adds its output behind the routed ones'. Not part of
                num_experts, topk and `received`.

        Raises:
            ValueError: an argument is not one of those above, or experts do not divide among the ranks.
        """
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"mega_moe: requires backend in {BACKENDS}, got backend={backend!r}")
        if bad_routing not in BAD_ROUTING:
            got = f"got bad_routing={bad_routing!r}"
            raise ValueError(f"mega_moe: requires bad_routing in {BAD_ROUTING}, {got}")
        ranks = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
        self.backend = ("distributed" if ranks > 1 else "local") if backend == "auto" else backend
        shares = 1 if self.backend == "local" else ranks
        if l1.w.shape[0] * shares != num_experts:
            raise ValueError(
                f"mega_moe: requires {num_experts} experts over {shares} ranks, "
                f"got {l1.w.shape[0]} of this rank"
            )
        experts = Experts(l1, l2, clamp)
        self.hidden = experts.hidden
        shared_expert = None if shared is None else Experts(*shared, clamp)
        check_shared(shared_expert, experts)
        if self.backend == "fused":
            self.fused = FusedLayer(
                experts,
                topk=topk,
                max_tokens=max_tokens,
                group=group,
                timeout_s=timeout_s,
                shared=shared_expert,
            )
        else:
            self.experts, self.shared = experts, shared_expert
        self.num_experts, self.topk, self.max_tokens = num_experts, topk, max_tokens
        self.group, self.bad_routing = group, bad_routing
        self.num_masked = torch.zeros((), dtype=torch.int64)
        counters = (
            torch.zeros(l1.w.shape[0], dtype=torch.int32, device=l1.w.device) if count_received else None
        )
        self.register_buffer("received", counters, persistent=False)

    def forward(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        x_scale: torch.Tensor | None = None,
        most_tokens: int | None = None,
    ) -> torch.Tensor:
        """Return the weighted sum of each token's experts.

        Args:
            x: [tokens, hidden] bf16, or e4m3 with `x_scale`; 0 tokens are allowed.
            topk_idx: [tokens, topk] integer expert numbers; -1: no expert in this slot.
            topk_weights: [tokens, topk] float32.
            x_scale: [tokens, hidden / 128] e8m0, where x is e4m3.
            most_tokens: `fused` over several ranks: at least what any rank has in this call, the same on all
                of them; None: max_tokens. Other backends need none.

        Returns:
            [tokens, hidden] bf16; zeros for a token without experts, and past max_tokens.

        Raises:
            RoutingError: a bad routing, unless it is to be masked.
            ValueError: shapes or dtypes that do not fit.
        """
        inputs = checked(
            x,
            topk_idx,
            topk_weights,
            x_scale,
            hidden=self.hidden,
            topk=self.topk,
            num_experts=self.num_experts,
            max_tokens=self.max_tokens,
            bad_routing=self.bad_routing,
        )
        self.num_masked = inputs.num_masked
        # Tokens past the buffers' room are masked, for a shared expert too.
        codes, scale, idx, weights = (tensor[: self.max_tokens] for tensor in inputs[:4])
        if self.backend == "fused":
            y, counts = self.fused(codes, scale, idx, weights, most_tokens)
            if self.received is not None:
                self.received += counts
        elif self.backend == "distributed":
            y = distributed.mega_moe(
                codes, scale, idx, weights, self.experts, self.group, self.received, self.shared
            )
        else:
            y = local(codes, scale, idx, weights, self.experts, self.received, self.shared)
        return y if len(y) == len(x) else torch.cat((y, y.new_zeros(len(x) - len(y), self.hidden)))

    def check(self) -> None:
        """Wait for the calls so far.

        Raises:
            WatchdogError: `fused`: a rank was waited for in vain; the layer has to be made anew.
        """
        if self.backend == "fused":
            self.fused.check()
