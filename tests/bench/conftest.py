"""Made-up rows: no GPU, no kernels."""

from collections.abc import Callable
from typing import Any

import pytest

from bench.rows import PeerResult, Row


@pytest.fixture
def make_row() -> Callable[..., Row]:
    def make(**changes: Any) -> Row:
        base: dict[str, Any] = {
            "kernel": "fp8_fp4_gemm",
            "variant": "n4096-k4096",
            "case": "flash-16",
            "dims": {"m": 16, "n": 4096, "k": 4096},
            "us": 20.0,
            "p20_us": 19.0,
            "p80_us": 22.0,
            "replays": 50,
            "method": "graph",
            "checked": "tolerance",
            "worst_error": 0.25,
            "num_bytes": 9_000_000,
            "num_flops": 2 * 16 * 4096 * 4096,
            "limit_us": 3.0,
            "limited_by": "bytes",
            "cuda_sha256": "ab" * 32,
            "ceilings": {"copy_gbps": 3000.0, "bf16_tflops": 700.0, "e4m3_tflops": 1300.0},
            "machine": {"gpu": "NVIDIA H200", "driver": "580.1", "torch": "2.11", "tilelang": "0.1.15"},
            "commit": "0" * 40,
            "date": "2026-01-02T03:04:05+00:00",
            "chain_us": 25.0,
            "peers": {
                "deepgemm": PeerResult(us=16.0, p20_us=15.0, p80_us=17.0, method="graph", note="FP8 weights"),
                "humming": PeerResult(us=50.0, p20_us=49.0, p80_us=51.0, method="graph", casts_input=True),
                "scaled_mm": PeerResult(error="RuntimeError: not supported"),
            },
        }
        return Row(**{**base, **changes})

    return make


@pytest.fixture
def make_quant_row(make_row: Callable[..., Row]) -> Callable[..., Row]:
    def make(**changes: Any) -> Row:
        base: dict[str, Any] = {
            "kernel": "act_quant",
            "variant": "b128",
            "case": "pro-4096",
            "dims": {"m": 4096, "k": 7168},
            "num_bytes": 88_000_000,
            "num_flops": 0,
            "us": 40.0,
            "limit_us": 30.0,
            "chain_us": None,
            "checked": "bitwise",
            "worst_error": 0.0,
            "peers": {"triton_quant": PeerResult(us=60.0, method="graph")},
        }
        return make_row(**{**base, **changes})

    return make
