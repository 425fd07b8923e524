"""Router logits: fp32 sums of exact products of bf16 activations and bf16 weights of the gate.

V4 computes fp32(x) . fp32(W)^T of bf16 values (report 2.1). Products are exact in fp32 and added in a
fixed order (`narrow_gemm`), so no operand is rounded and no batch changes a bit. Measurements: docs/gemm.md.
"""

from collections.abc import Mapping

import torch

from dsv4_kernels import runtime
from dsv4_kernels.gemm import bf16_gemm, narrow_gemm, narrow_reference, reference
from dsv4_kernels.registry import Case, KernelSpec, operator

NAME = "router_gemm"
CONTRACT = narrow_gemm.CONTRACT
SHAPES = ((256, 4096), (384, 7168))  # experts and channels of Flash and of Pro


def _empty_output(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], w.shape[0]), dtype=torch.float32)


@operator(NAME, _empty_output)
def router_gemm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Multiply activations by the gate's weights: logits = x @ w.T in fp32.

    A row of logits depends, bit for bit, on its row of `x` alone, whatever m is.

    Args:
        x: [m, k] bf16, contiguous; m = 0 is allowed.
        w: [n, k] bf16, contiguous; one row an expert.
        Both 16-byte aligned, on one device; n a multiple of 64 up to 4096, k of 1024 up to 65536.

    Returns:
        [m, n] float32. A call allocates 16 bytes an output beside it, unless one block has all parts of k.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    m, _, _ = bf16_gemm.require_operands(NAME, CONTRACT, x, w)
    if runtime.uses_reference(x):
        return reference.bf16_gemm(x, w, torch.float32)
    out = _empty_output(x, w)
    if m:
        narrow_gemm.multiply(x, w, out)
    return out


def _reference(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return reference.bf16_gemm(x, w, torch.float32)


def _tolerance(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
    return narrow_reference.narrow_gemm_tolerance(out, x, w, torch.float32, narrow_gemm.PARTS)


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    return bf16_gemm.make_inputs({**dims, "f32_out": 1}, device, seed)[:2]


def _case(m: int, n: int, k: int, *tags: str) -> Case:
    return Case(f"m{m}-n{n}-k{k}", {"m": m, "n": n, "k": k}, tags)


SPEC = KernelSpec(
    name=NAME,
    fn=router_gemm,
    reference=_reference,
    make_inputs=_make_inputs,
    make_kernel=narrow_gemm.make_kernel,
    variants=tuple(variant for shape in SHAPES for variant in narrow_gemm.distinct(*shape, 32)),
    select=lambda d: narrow_gemm.select_for(d, 32),
    contract=CONTRACT,
    cases=(
        _case(0, 64, 1024, "test"),
        _case(1, 64, 1024, "test"),
        _case(70, 192, 1024, "test"),
        _case(131, 128, 2048, "test"),
        *(_case(m, *shape, "gpu", "bench") for shape in SHAPES for m in (1, 16, 64, 128, 1024, 4096)),
    ),
    num_bytes=lambda d: 2 * (d["m"] + d["n"]) * d["k"] + 4 * d["m"] * d["n"],
    num_flops=lambda d: 2 * d["m"] * d["n"] * d["k"],
    tolerance=_tolerance,
    peers=("torch_matmul",),
    source="DeepSeek-V4 report 2.1; V4 inference Gate",
    small={"n": 384, "k": 4096},  # whole tiles of every variant
    workspace_bytes=narrow_gemm.workspace_bytes,
)
