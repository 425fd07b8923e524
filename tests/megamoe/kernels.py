"""A routing of the small fused kernel of `megamoe.proofs`, with what the kernel is launched on."""

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
    """Return `launches.random`, with what plain PyTorch makes of it."""
    g = launches.random(seed, c, routed)
    wanted = mega_moe(g.x, g.x_scale, g.idx, g.weights, g.l1, g.l2, c.clamp, g.shared)
    *_, status, y = g.arguments
    return Launch(g.arguments, y, status, wanted.view(c.num_ranks, c.tokens, -1))
