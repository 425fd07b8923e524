"""Whole runs: sparse attention, speed, progress, absent tensors, addresses, interpreted jit factories."""

import io
import sys
import time
from pathlib import Path

import pytest
import tilelang
import torch
from tilelang import language as T

from dsv4_kernels import backend
from dsv4_kernels.gemm.fp8_fp4_gemm import SPEC as GEMM
from tests.verify import sparse_attention
from verify import interp
from verify.interp import progress

CPU = torch.device("cpu")


def attend(m, num_heads, head_dim, num_keys, kv_len):
    inputs = sparse_attention.make_inputs(m, num_heads, head_dim, num_keys, kv_len)
    out = torch.empty(m, num_heads, head_dim, dtype=torch.bfloat16)
    interp.run(sparse_attention.make_kernel(num_heads, head_dim, num_keys), *inputs, out)
    return inputs, out


def test_sparse_attention():
    """Weights and outputs are rounded to bf16, half a unit of 2**-8 each; the rest is float32."""
    (q, kv, idx, sink), out = attend(3, 16, 128, 192, 300)
    want = sparse_attention.reference(q, kv, idx, sink)
    weighted = sparse_attention.reference(q, kv, idx, sink, magnitude=True)
    bound = (1 + 2**-6) * 2.0**-9 * (weighted + want.abs()) + 2.0**-18
    assert bool(((out.double() - want).abs() <= bound).all())


@pytest.mark.slow
def test_speed():
    """CPU seconds, of two cores: 20 for the attention of 32 queries, 10 for a product of 64 rows."""
    began = time.process_time()
    attend(32, 64, 512, 640, 4096)
    assert time.process_time() - began < 2 * 20
    inputs = GEMM.make_inputs({"m": 64, "n": 4096, "k": 512}, CPU, 1)
    began = time.process_time()
    with backend("interpret"):
        GEMM.fn(*inputs)
    assert time.process_time() - began < 2 * 10


@T.prim_func
def _doubled(x: T.Tensor[(8,), T.float32], y: T.Tensor[(8,), T.float32]):
    with T.Kernel(2, threads=4) as bx:
        for i in T.Parallel(4):
            y[bx * 4 + i] = x[bx * 4 + i] * 2.0


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "quiet_s", "shows"),
    [
        (_Terminal, 0.0, True),
        (_Terminal, 60.0, False),
        (io.StringIO, 0.0, False),
    ],
)
def test_progress_is_for_long_runs_on_a_terminal(monkeypatch, stream, quiet_s, shows):
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(progress, "_QUIET_S", quiet_s)
    x, y = torch.arange(8.0), torch.empty(8)
    interp.run(_doubled, x, y)
    assert torch.equal(y, 2 * x)
    assert ("interpreting" in shown.getvalue()) == shows
    assert (f"{Path(__file__).name}:" in shown.getvalue()) == shows  # beside the count, in 80 columns
    assert ("0/2" in shown.getvalue()) == shows


# --------------------------------------------------------------------------- arguments
@T.prim_func
def _chosen(
    x: T.Tensor[(8,), T.float32], y: T.Tensor[(8,), T.float32], out: T.Tensor[(8,), T.float32], which: T.int32
):
    with T.Kernel(1, threads=8):
        for i in T.Parallel(8):
            if which == 0:
                out[i] = x[i]
            else:
                out[i] = y[i]


def test_none_stands_for_a_tensor_that_is_not_touched():
    x, out = torch.arange(8.0), torch.empty(8)
    interp.run(_chosen, x, None, out, 0)
    assert torch.equal(out, x)
    with pytest.raises(interp.InterpreterError, match=r"test_interp_run\.py:\d+: y is None"):
        interp.run(_chosen, x, None, out, 1)


@T.prim_func
def _through_addresses(addresses: T.Tensor[(2,), T.ptr], out: T.Tensor[(2, 8), T.float32]):
    with T.Kernel(2, threads=8) as bx:
        for k in T.serial(2):
            if bx == k:
                rows = T.make_tensor(addresses[k], (8,), T.float32)
                for i in T.Parallel(8):
                    out[k, i] = rows[i]
                    rows[i] = 0.0


def test_addresses_reach_registered_tensors_alone():
    tensors = [torch.arange(8.0) + i for i in (1, 11)]
    want = torch.stack([t.clone() for t in tensors])
    addresses = torch.tensor([t.data_ptr() for t in tensors])
    out = torch.empty(2, 8)
    with pytest.raises(interp.InterpreterError, match="in no tensor that was made addressable"):
        interp.run(_through_addresses, addresses, out)
    with interp.addressable(*tensors):
        interp.run(_through_addresses, addresses, out)
    assert torch.equal(out, want)
    assert all(not t.any() for t in tensors)


@tilelang.jit(out_idx=[-1])
def _scaled(factor: float):
    n = T.dynamic("n")

    @T.prim_func
    def scaled(x: T.Tensor[(n, 4), T.float32], y: T.Tensor[(n, 4), T.float32]):
        with T.Kernel(n, threads=32) as bx:
            for i in T.Parallel(4):
                y[bx, i] = x[bx, i] * factor

    return scaled


def test_jit_factories_give_interpreted_kernels_inside_the_block():
    seen = []
    x = torch.arange(12.0).view(3, 4)
    with interp.interpreted_jit(seen.append):
        kernel = _scaled(3.0)
        assert torch.equal(kernel(x), 3 * x)
        assert _scaled(3.0) is kernel
    assert len(seen) == 1
    assert not _scaled._kernel_cache  # outside, the factory compiles
