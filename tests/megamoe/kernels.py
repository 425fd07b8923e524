"""What the small fused kernel of `megamoe.proofs` is launched on, with what it has to compute."""

from dataclasses import dataclass

import torch

from megamoe import launches
from megamoe.config import Config
from megamoe.instances import CONFIG
from megamoe.reference import mega_moe


@dataclass
class Launch:
    """Arguments of the kernel, its output among them, and what the output should be."""

    arguments: list[torch.Tensor]
    y: torch.Tensor
    status: torch.Tensor
    wanted: torch.Tensor


def launch(seed: int, c: Config = CONFIG, routed: torch.Tensor | None = None) -> Launch:
    """Return `launches.random` with what the layer is in plain PyTorch; arguments as there."""
    found = launches.random(seed, c, routed)
    weights = found.l1, found.l2, c.clamp, found.shared
    wanted = mega_moe(found.x, found.x_scale, found.idx, found.weights, *weights)
    *_, status, y = found.arguments
    return Launch(found.arguments, y, status, wanted.view(c.num_ranks, c.tokens, -1))
