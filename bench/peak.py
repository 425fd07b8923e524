"""What this GPU reaches, measured in the same run as the kernels: the limits that rows are held against."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from bench.timer import Device, time_call

COPY_BYTES = 1 << 30  # far past the L2; read once, written once
MATMUL_SIZE = 8192  # m = n = k; large enough that tiles and tails do not matter


@dataclass(frozen=True)
class Ceilings:
    """Measured rates.

    Attributes:
        copy_gbps: device copy, bytes read plus bytes written, 1e9 a second.
        bf16_tflops: cuBLAS bf16 matmul of MATMUL_SIZE cubed.
        e4m3_tflops: `torch._scaled_mm` of e4m3 operands of the same size, one scale a tensor.
    """

    copy_gbps: float
    bf16_tflops: float
    e4m3_tflops: float

    def matmul_tflops(self, inputs: Iterable[Any]) -> float:
        """Return the rate of the tensor-core format of `inputs`; FP4 is multiplied as e4m3."""
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        # Bytes that come first are packed FP4; caches of bytes come after bf16 queries.
        fp8 = any(t.dtype == torch.float8_e4m3fn for t in tensors)
        fp4 = bool(tensors) and tensors[0].dtype == torch.uint8
        return self.e4m3_tflops if fp8 or fp4 else self.bf16_tflops

    def limit_us(self, num_bytes: int, num_flops: int, matmul_tflops: float) -> tuple[float, str]:
        """Return the least time for so many bytes and operations, and which of them decides."""
        bytes_us = num_bytes / self.copy_gbps / 1e3
        flops_us = num_flops / matmul_tflops / 1e6
        return (bytes_us, "bytes") if bytes_us >= flops_us else (flops_us, "flops")


def measure(device: Device) -> Ceilings:
    """Measure the three ceilings on the current CUDA device; takes about a second."""
    size = MATMUL_SIZE
    flops = 2 * size**3
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    a8, b8 = (x.to(torch.float8_e4m3fn) for x in (a, b))
    return Ceilings(
        copy_gbps=2 * COPY_BYTES / _copy_us(device) / 1e3,
        bf16_tflops=flops / time_call(lambda: a @ b.T, device).us / 1e6,
        e4m3_tflops=flops / time_call(lambda: e4m3_matmul(a8, b8), device).us / 1e6,
    )


def e4m3_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return bf16 a @ b.T of e4m3 [m, k] and [n, k] by the vendor's library, one scale (1) a tensor."""
    one = _one(a.device)
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


@cache
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones((), device=device)


def _copy_us(device: Device) -> float:
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    copied = torch.empty_like(source)
    return time_call(lambda: copied.copy_(source), device).us
