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
    yield "/split", lambda: setup(_MHC_SPLITS), "TF32 weights; 16 parts, added by the reader; ours has 32"


def _wo_a_fp8(dims: Mapping[str, int]) -> Iterator[Way]:
    m, groups, n, k = (dims[name] for name in ("m", "groups", "n", "k"))

    def setup() -> Callable[[], Any]:
        import deep_gemm  # pyright: ignore[reportMissingImports]
        from deep_gemm.utils import (  # pyright: ignore[reportMissingImports]
            per_block_cast_to_fp8,
            per_token_cast_to_fp8,
        )

        x, x_scale = per_token_cast_to_fp8(randn(m * groups, k), use_ue8m0=False)
        weights = [per_block_cast_to_fp8(randn(n, k), use_ue8m0=False) for _ in range(groups)]
        a = (x.view(m, groups, k), x_scale.view(m, groups, -1))
        b = (torch.stack([w for w, _ in weights]), torch.stack([s for _, s in weights]))
        out = torch.empty(m, groups, n, dtype=torch.bfloat16, device="cuda")
        return lambda: deep_gemm.fp8_einsum("bhr,hdr->bhd", a, b, out)

    yield "", setup, "fp32 scales"


def _matmul(dims: Mapping[str, int]) -> Iterator[Way]:
    m, n, k = dims["m"], dims["n"], dims["k"]
    out_dtype = torch.float32 if dims.get("f32_out", 1) else torch.bfloat16

    def setup() -> Callable[[], Any]:
        x, w = randn(m, k), randn(n, k).T
        return lambda: torch.mm(x, w, out_dtype=out_dtype)

    yield "", setup, "cuBLAS"


def _wo_a_bf16(dims: Mapping[str, int]) -> Iterator[Way]:
    m, groups, n, k = (dims[name] for name in ("m", "groups", "n", "k"))

    def setup() -> Callable[[], Any]:
        x, w = randn(m, groups, k).transpose(0, 1), randn(groups, n, k).transpose(1, 2)
        return lambda: torch.bmm(x, w)

    yield "", setup, "cuBLAS, batched; output [groups, m, n]"


DEEPGEMM: Mapping[str, Callable[[Mapping[str, int]], Iterator[Way]]] = {
    "mhc_gemm": _mhc_gemm,
    "wo_a_fp8": _wo_a_fp8,
}
TORCH_MATMUL: Mapping[str, Callable[[Mapping[str, int]], Iterator[Way]]] = {
    "bf16_gemm": _matmul,
    "narrow_gemm": _matmul,
    "router_gemm": _matmul,
    "wo_a_bf16": _wo_a_bf16,
}
