"""Few tokens by few FP4 weight rows: any shape, the same bits as every other form, blocks added in order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv4_kernels
from dsv4_kernels.gemm import folded_few, fp8_fp4_gemm_folded
from dsv4_kernels.gemm.fp8_fp4_gemm_folded import SPEC, Config, make_kernel
from tests.compare import bits, mismatch
from verify import extract, host, interp, ir
from verify.properties import alignment

CPU = torch.device("cpu")
FEW = SPEC.select({"m": 1, "n": 4096, "k": 2048}).kwargs["config"]
ROUND_K = 2 * FEW.warpgroups * 128  # channels that all warpgroups multiply at a time
FLIGHT = Config(16, num_stages=3, warpgroups=1, form="flight")
PAIR = Config(16, num_stages=2, warpgroups=1)


def _inputs(m, n=128, k=2 * ROUND_K, seed=0):
    return list(SPEC.make_inputs({"m": m, "n": n, "k": k}, CPU, seed))


def _interpreted(*inputs):
    with dsv4_kernels.backend("interpret"):
        return fp8_fp4_gemm_folded.fp8_fp4_gemm_folded(*inputs)


def _run(config, x, x_scale, words, offsets, factors):
    n, k = words.shape[0], x.shape[1]
    out = torch.full((len(x), n), torch.nan, dtype=torch.bfloat16)
    args = x, x_scale.view(torch.uint8), words.view(torch.uint32), offsets.view(torch.int32), factors, out
    interp.run(make_kernel(n, k, config), *args)
    return out


@settings(max_examples=8)
@given(
    m=st.integers(1, 40),
    n=st.sampled_from([32, 128]),
    rounds=st.integers(2, 4),
    seed=st.integers(0, 99),
)
def test_any_shape(m, n, rounds, seed):
    inputs = _inputs(m, n, rounds * ROUND_K, seed)
    assert mismatch(SPEC, inputs, _run(FEW, *inputs)) is None


@pytest.mark.parametrize("m", [1, 16, 21])
@pytest.mark.parametrize("rounds", [2, 3, 4])
def test_every_form_has_the_same_bits(m, rounds):
    inputs = _inputs(m, k=rounds * ROUND_K, seed=m)
    want = bits(_run(FEW, *inputs))
    assert torch.equal(bits(_run(FLIGHT, *inputs)), want)
    assert torch.equal(bits(_run(PAIR, *inputs)), want)


def test_blocks_are_added_in_the_order_of_k():
    """Ones vanish beside a large sum, and are there where its negative has come before them."""
    blocks, large = 3 * ROUND_K // 128, 25
    x, _, words, offsets, factors = _inputs(2, k=3 * ROUND_K)
    words.fill_(0x2)  # the first of eight channels is one
    offsets.fill_(5)  # weights as they are
    factors.fill_(1.0)
    x = torch.zeros_like(x, dtype=torch.float32)
    x[:, ::128] = 1.0
    scale = torch.full((2, blocks), 127, dtype=torch.uint8)
    scale[:, 0] += large
    for row, negative in ((0, blocks - 1), (1, 1)):
        x[row, 128 * negative] = -1.0
        scale[row, negative] += large
    got = _run(FEW, x.to(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu), words, offsets, factors)
    assert (got[0] == 0).all()
    assert (got[1] == blocks - 2).all()


def test_rows_do_not_depend_on_the_batch(monkeypatch):
    """The bound of what was measured is lowered, so that the interpreter has little to do."""
    monkeypatch.setattr(fp8_fp4_gemm_folded, "_FEW_N", 128)
    monkeypatch.setattr(fp8_fp4_gemm_folded, "_configs", fp8_fp4_gemm_folded._configs.__wrapped__)
    x, x_scale, *weights = _inputs(21, k=2048)
    full = _interpreted(x, x_scale, *weights)  # by another form
    assert SPEC.select({"m": 16, "n": 128, "k": 2048}).kwargs["config"] == FEW
    for first, count in ((0, 1), (3, 16), (20, 1), (9, 0)):
        rows = slice(first, first + count)
        part = _interpreted(x[rows].clone(), x_scale[rows].clone(), *weights)
        assert torch.equal(bits(part), bits(full[rows]))


@pytest.mark.parametrize(
    ("m", "n", "k", "form"),
    [
        (16, 4096, 4096, "few"),
        (0, 4096, 2048, "few"),
        (17, 4096, 4096, "flight"),
        (16, 33 * 128, 4096, "few"),
        (16, 4352, 4096, "flight"),  # more than one round of tiles
        (16, 4096, 7168, "flight"),  # no room for all of a tile
        (16, 4096, 4608, "flight"),  # not measured, as the next two
        (16, 4096, 1536, "flight"),
        (16, 2048, 4096, "flight"),
        (16, 128, 256, "pair"),
    ],
)
def test_few_tokens_take_it_where_it_was_measured(m, n, k, form):
    assert SPEC.select({"m": m, "n": n, "k": k}).kwargs["config"].form == form


@pytest.mark.parametrize("k", [ROUND_K, 2 * ROUND_K + 128, 16 * ROUND_K])
def test_rows_that_it_does_not_serve_are_refused(k):
    """One round, a part of a round, no room."""
    assert not folded_few.serves(k, FEW.block_m, FEW.warpgroups)
    with pytest.raises(ValueError, match=f"do not serve k = {k} by tiles of 16 tokens"):
        make_kernel(128, k, FEW)


def test_the_longest_rows_that_it_serves_fit():
    served = [k for k in range(ROUND_K, 8192, ROUND_K) if folded_few.serves(k, FEW.block_m, FEW.warpgroups)]
    longest = max(served)
    assert served == list(range(2 * ROUND_K, longest + 1, ROUND_K))
    assert longest >= 4096
    extracted = extract.extract(make_kernel(128, longest, FEW))
    shared = host.read_host(extracted.host, extracted.device, extracted.tile).extents["dynamic_shared"]
    assert isinstance(shared, ir.Const)
    assert 0 < shared.value <= alignment.MAX_SHARED_BYTES
