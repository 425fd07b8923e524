"""How FlashMLA is called for the attention kernels; the package is imported inside."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

SEED = 0
_HEAD_DIM = 512


def sparse_prefill(dims: Mapping[str, int]) -> Callable[[], Any]:
    """Return FlashMLA's SM90 sparse prefill with a sink, on random entries."""
    import flash_mla  # pyright: ignore[reportMissingImports]

    generator = torch.Generator("cuda").manual_seed(SEED)
    m, n, topk, num_heads = (dims[name] for name in ("m", "n", "topk", "num_heads"))

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    q, kv = randn(m, num_heads, _HEAD_DIM).to(torch.bfloat16), randn(n, 1, _HEAD_DIM).to(torch.bfloat16)
    idx = torch.randint(0, n, (m, 1, topk), generator=generator, device="cuda", dtype=torch.int32)
    args = (q, kv, idx, _HEAD_DIM**-0.5, _HEAD_DIM, randn(num_heads))
    return lambda: flash_mla.flash_mla_sparse_fwd(*args, use_legacy=True)


FLASHMLA: Mapping[str, Callable[[Mapping[str, int]], Callable[[], Any]]] = {"sparse_prefill": sparse_prefill}
