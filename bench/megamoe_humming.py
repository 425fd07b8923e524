"""The expert layer as the best unfused chain of a peer: Humming's grouped products and its activation.

permute, first product, SwiGLU with cast, second product, combine: five launches and one for the routing
weights under one CUDA graph. Counts and permutations are known beforehand, and tokens are cast outside, as
ours are. Humming has one scale a token: the hidden state's is of the whole row, and the routing weight goes
into it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

TOPK = 6
CLAMP = 10.0
# silu(min(a, clamp)) * clamp(b, -clamp, clamp), as text that Humming compiles into its cast
ACTIVATION = (
    f"fminf(a, {CLAMP}f) / (1.0f + __expf(-fminf(a, {CLAMP}f))) * fminf(fmaxf(b, -{CLAMP}f), {CLAMP}f)"
)
NOTE = "unfused; cast of x outside; one scale a token of x and of the hidden state; routing known beforehand"
_CHECKED = 4  # tokens of each case whose outputs are compared
_TOLERANCE = 0.08  # of an output's norm: the casts of x and of the hidden state are 3 % each
_BIAS = 127  # of UE8M0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (rows, their scales) to bf16 rows


class Routed(NamedTuple):
    """Where rows go that stand expert by expert.

    Attributes:
        token: [tokens * topk] the token of each row.
        place: [tokens, topk] the row of each slot.
        ends: [experts + 1] where each expert's rows begin, and the end.
    """

    token: torch.Tensor
    place: torch.Tensor
    ends: torch.Tensor


def routed(idx: torch.Tensor, experts: int) -> Routed:
    """Sort the slots of `idx` [tokens, topk], all of them experts, by expert."""
    chosen = idx.reshape(-1).long()
    order = torch.argsort(chosen, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=idx.device)
    counts = torch.bincount(chosen, minlength=experts)
    ends = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return Routed(order // idx.shape[1], place.view(idx.shape), ends)


def permute(codes: torch.Tensor, scale: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the rows [m, hidden] and their scales, expert by expert."""
    return codes.view(torch.uint8)[token].view(codes.dtype), scale[token]


def combine(rows: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Add the rows of each token's slots in fp32, slot by slot."""
    total = rows[place[:, 0]].float()
    for slot in range(1, place.shape[1]):
        total = total + rows[place[:, slot]].float()
    return total.to(torch.bfloat16)


def chain(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weights: torch.Tensor,
    where: Routed,
    first: Product,
    activate: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    second: Product,
    *,
    compiles: bool = True,
) -> Callable[[], torch.Tensor]:
    """Return the call.

    Args:
        codes: [tokens, hidden] e4m3.
        scale: [tokens, 1] float32.
        weights: [tokens, topk] float32.
        where: of the routing.
        first: the first product, gate channels first.
        activate: casts silu(gate) * up to e4m3 with a scale a row.
        second: the second product.
        compiles: permute and combine by `torch.compile`.
    """
    gather = torch.compile(permute, dynamic=True) if compiles else permute
    add = torch.compile(combine, dynamic=True) if compiles else combine
    row_weight = torch.empty_like(weights.reshape(-1, 1))
    row_weight[where.place.reshape(-1)] = weights.reshape(-1, 1)

    def call() -> torch.Tensor:
        rows = gather(codes, scale, where.token)
        hidden, hidden_scale = activate(first(rows[0], rows[1]))
        return add(second(hidden, hidden_scale * row_weight), where.place)

    return call


def expected(
    x: torch.Tensor,
    idx: torch.Tensor,
    weights: torch.Tensor,
    l1: tuple[torch.Tensor, torch.Tensor],
    l2: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Return float32 [tokens, hidden] without casts; weights packed, scales UE8M0 [experts, n, ...]."""
    out = torch.zeros_like(x, dtype=torch.float32)
    for token, slot in torch.cartesian_prod(*(torch.arange(n) for n in idx.shape)).tolist():
        expert = int(idx[token, slot])
        gate, up = (dequantised(l1[0][expert], l1[1][expert]) @ x[token].float()).chunk(2)
        gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
        hidden = gate * torch.sigmoid(gate) * up * weights[token, slot]
        out[token] += dequantised(l2[0][expert], l2[1][expert]) @ hidden
    return out


def dequantised(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return float32 [n, k] of packed e2m1 [n, k / 2], the even channel in the low nibble; UE8M0 scales."""
    values = torch.tensor([*_E2M1, *(-v for v in _E2M1)], device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).int()
    factor = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - _BIAS)
    return values[codes] * factor.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)


def check(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Refuse to time a chain that computes something else.

    Raises:
        ValueError: an output is further off than its casts are.
    """
    off = (found.float() - wanted).norm(dim=1) / wanted.norm(dim=1)
    if not bool((off < _TOLERANCE).all()):
        raise ValueError(f"the chain's outputs are off by {float(off.max()):.3f} of their norm")


def setup(
    dims: Mapping[str, int],
    layer_of: Callable[[int, int, int], Any],
    raw_of: Callable[[int, int, int], tuple[torch.Tensor, torch.Tensor]],
    configs_of: Callable[[int, int], Mapping[str, Any]],
) -> Callable[[], Any]:
    """Return the chain of one rank's share of the experts, its outputs checked.

    Args:
        dims: tokens, hidden, inter, experts.
        layer_of: (n, k, experts) -> Humming's layer.
        raw_of: (n, k, experts) -> the packed weights and scales that the layer was made of.
        configs_of: (n, k) -> how Humming's product of this call's rows is called: the kernel that it would
            choose, and its switch for batch invariance.
    """
    from humming.forward import (  # pyright: ignore[reportMissingImports]
        may_process_input,
        may_quant_input,
    )

    tokens, hidden, inter, experts = (dims[name] for name in ("tokens", "hidden", "inter", "experts"))
    shapes = ((2 * inter, hidden, experts), (hidden, inter, experts))
    l1, l2 = (layer_of(*shape) for shape in shapes)
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(tokens, hidden, generator=generator, device="cuda").bfloat16()
    idx = torch.rand(tokens, experts, generator=generator, device="cuda").topk(TOPK, -1).indices.int()
    weights = torch.rand(tokens, TOPK, generator=generator, device="cuda")
    codes, scale = may_quant_input(l1.humming_config, x)
    assert scale is not None, "an e4m3 input has scales"
    where = routed(idx, experts)
    configs = [configs_of(n, k) for n, k, _ in shapes]

    def product(layer: Any, config: Mapping[str, Any]) -> Product:
        return lambda rows, row_scale: layer(rows, input_scale=row_scale, expert_layout=where.ends, **config)

    def activate(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, _, row_scale = may_process_input(
            l2.humming_config, gate_up, activation_type="binary_split", activation_impl=ACTIVATION
        )
        assert row_scale is not None, "one scale a token"
        return out, row_scale

    call = chain(codes, scale, weights, where, product(l1, configs[0]), activate, product(l2, configs[1]))
    wanted = expected(x[:_CHECKED], idx[:_CHECKED], weights[:_CHECKED], *(raw_of(*s) for s in shapes))
    check(call()[:_CHECKED], wanted)
    return call
