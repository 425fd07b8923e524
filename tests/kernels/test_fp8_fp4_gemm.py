"""FP8 x FP4 product: every code, scales at the ends of their range, shapes, bad calls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv4_kernels
from dsv4_kernels.contract import ContractError
from dsv4_kernels.gemm import fp8_fp4_gemm as module
from dsv4_kernels.gemm.fp8_fp4_gemm import SPEC, fp8_fp4_gemm
from tests.compare import bits, mismatch
from verify import extract, host, ir
from verify.properties import alignment

CPU = torch.device("cpu")


def _inputs(m, n, k, seed=0):
    return list(SPEC.make_inputs({"m": m, "n": n, "k": k}, CPU, seed))


def _interpreted(inputs):
    with dsv4_kernels.backend("interpret"):
        return fp8_fp4_gemm(*inputs)


@settings(max_examples=12)
@given(
    m=st.integers(0, 140),
    n=st.sampled_from([128, 256]),
    k=st.sampled_from([128, 384]),
    seed=st.integers(0, 99),
)
def test_any_shape(m, n, k, seed):
    inputs = _inputs(m, n, k, seed)
    assert mismatch(SPEC, inputs, _interpreted(inputs)) is None


def test_every_code_of_both_operands():
    x, x_scale, w, w_scale = _inputs(256, 128, 256)
    x = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 256).contiguous()  # row r holds code r
    w = torch.arange(256, dtype=torch.uint8)[None].expand(128, 256)[:, :128].contiguous()
    w[64:] += 128
    inputs = [x.view(torch.float8_e4m3fn), x_scale, w, w_scale]
    assert mismatch(SPEC, inputs, _interpreted(inputs)) is None


@pytest.mark.parametrize("byte", [0, 1, 230, 255])
def test_weight_scales_at_the_ends_of_their_range(byte):
    x, x_scale, w, w_scale = _inputs(5, 128, 128)
    raw = w_scale.view(torch.uint8)
    raw[3] = byte
    raw[9, 2] = byte
    x_scale.view(torch.uint8)[:] = 127 if byte < 128 else 100
    got = _interpreted([x, x_scale, w, w_scale])
    if byte == 255:
        assert got[:, 3].isnan().all()
        assert got[:, 9].isnan().all()
        assert not got[:, 10].isnan().any()
    else:
        assert mismatch(SPEC, [x, x_scale, w, w_scale], got) is None


def test_nan_activation_touches_its_row_alone():
    x, x_scale, w, w_scale = _inputs(4, 128, 128)
    x.view(torch.uint8)[2, 5] = 0x7F
    got = _interpreted([x, x_scale, w, w_scale])
    assert got[2].isnan().all()
    assert not got[[0, 1, 3]].isnan().any()


def test_rows_do_not_depend_on_the_batch():
    """Every variant adds in one order: interpreted, the rows are equal bit for bit."""
    x, x_scale, w, w_scale = _inputs(140, 128, 256)
    full = _interpreted([x, x_scale, w, w_scale])
    for m in (1, 16, 17, 32, 33, 128, 129):
        assert torch.equal(_interpreted([x[:m].clone(), x_scale[:m].clone(), w, w_scale]), full[:m])


@pytest.mark.parametrize(
    ("k", "tiles"),
    [
        (16384, [16, 32, 64, 128]),
        (24832, [16, 32, 64, 128]),
        (24960, [16, 32, 64]),
        (45568, [16, 32, 64]),
        (45696, [16, 32]),
        (60672, [16, 32]),
        (60800, [16]),
        (65536, [16]),
    ],
)
def test_long_rows_have_the_tiles_whose_scales_fit(k, tiles):
    configs = module._configs(4096, k)
    assert [config.block_m for _, config in configs] == tiles
    assert configs[-1][0] == module.MAX_TOKENS
    extracted = extract.extract(module.make_kernel(128, k, configs[-1][1]))
    shared = host.read_host(extracted.host, extracted.device, extracted.tile).extents["dynamic_shared"]
    assert isinstance(shared, ir.Const)
    assert 0 < shared.value <= alignment.MAX_SHARED_BYTES


def test_long_rows_do_not_depend_on_the_batch():
    """Two tiles are left for so many channels."""
    x, x_scale, w, w_scale = _inputs(18, 128, 45696)
    full = _interpreted([x, x_scale, w, w_scale])
    part = _interpreted([x[:3].clone(), x_scale[:3].clone(), w, w_scale])
    assert torch.equal(bits(part), bits(full[:3]))


def _replace(place, value):
    inputs = _inputs(4, 128, 256)
    inputs[place] = value(inputs[place])
    return lambda: fp8_fp4_gemm(*inputs)


@pytest.mark.parametrize(
    ("call", "clause"),
    [
        (
            _replace(0, lambda x: x.to(torch.bfloat16)),
            r"x\.dtype == torch.float8_e4m3fn, got x\.dtype=torch.bfloat16",
        ),
        (_replace(0, lambda x: x[:, :128]), r"x contiguous"),
        (_replace(0, lambda x: x[:, :96].contiguous()), r"k % BLOCK_K == 0, got k=96"),
        (_replace(0, lambda x: x[0]), r"x\.ndim == 2"),
        (_replace(1, lambda s: s[:2].clone()), r"x_scale\.shape == \(4, 2\), got x_scale\.shape=\(2, 2\)"),
        (_replace(1, lambda s: s.float()), r"x_scale\.dtype == torch.float8_e8m0fnu"),
        (_replace(2, lambda w: w[:64].clone()), r"n % BLOCK_N == 0, got n=64"),
        (
            _replace(2, lambda w: w[:, :64].contiguous()),
            r"w\.shape == \(128, 128\), got w\.shape=\(128, 64\)",
        ),
        (_replace(2, lambda w: w.to("meta")), r"w\.device == cpu, got w\.device=meta"),
        (_replace(3, lambda s: s[:, :4].contiguous()), r"w_scale\.shape == \(128, 8\)"),
    ],
)
def test_bad_calls_name_the_clause_and_the_value(call, clause):
    with pytest.raises(ContractError, match=clause):
        call()
