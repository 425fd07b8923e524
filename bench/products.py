"""How peers are called for the products beside the dense ones; packages are imported inside."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

# (what follows the peer's name in the label, set-up that returns the function to time, note)
Way = tuple[str, Callable[[], Callable[[], Any]], str]
SEED = 0
_MHC_OUTPUTS = 24
_MHC_SPLITS = 16  # DeepGEMM's own test of its split form


def randn(*shape: int) -> torch.Tensor:
    """Return random bf16 values on the GPU."""
    generator = torch.Generator("cuda").manual_seed(SEED)
    return torch.randn(*shape, generator=generator, device="cuda").to(torch.bfloat16)


def _mhc_gemm(dims: Mapping[str, int]) -> Iterator[Way]:
    m, k = dims["m"], dims["k"]

    def setup(splits: int | None) -> Callable[[], Any]:
        import deep_gemm  # pyright: ignore[reportMissingImports]

        x, fn = randn(m, k), randn(_MHC_OUTPUTS, k).float()
        lead = () if splits is None else (splits,)
        out = torch.empty(*lead, m, _MHC_OUTPUTS, device="cuda")
        squares = torch.empty(*lead, m, device="cuda")
        return lambda: deep_gemm.tf32_hc_prenorm_gemm(x, fn, out, squares, num_splits=splits)

    yield "/whole", lambda: setup(None), "TF32 weights"
    yield "/split", lambda: setup(_MHC_SPLITS), "TF32 weights; 16 parts, added by the reader, as ours"


DEEPGEMM: Mapping[str, Callable[[Mapping[str, int]], Iterator[Way]]] = {"mhc_gemm": _mhc_gemm}
