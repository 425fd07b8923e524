"""Grouped output projection: any shape, groups kept apart, bad calls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv4_kernels
from dsv4_kernels.contract import ContractError
from dsv4_kernels.gemm import wo_a as module
from dsv4_kernels.gemm.rounds import MULTIPROCESSORS
from dsv4_kernels.gemm.wo_a import SPECS, wo_a_bf16, wo_a_fp8
from tests.compare import bits, mismatch
from verify import interp

CPU = torch.device("cpu")
FP8, BF16 = SPECS


def _inputs(spec, m, groups=2, n=256, k=256, f32_scales=0, seed=0):
    dims = {"m": m, "groups": groups, "n": n, "k": k, "f32_scales": f32_scales}
    return list(spec.make_inputs(dims, CPU, seed))


def _interpreted(spec, inputs):
    with dsv4_kernels.backend("interpret"):
        return spec.fn(*inputs)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@settings(max_examples=5)
@given(
    m=st.integers(0, 140),
    groups=st.integers(1, 3),
    n=st.sampled_from([256, 512]),
    f32_scales=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_any_shape(spec, m, groups, n, f32_scales, seed):
    inputs = _inputs(spec, m, groups, n, 256, f32_scales, seed)
    assert mismatch(spec, inputs, _interpreted(spec, inputs)) is None


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("m", [3, 70])
def test_groups_are_kept_apart(spec, m):
    """Zeros in one group of x leave zeros in that group of the output alone."""
    inputs = _inputs(spec, m, groups=3)
    x = inputs[0]
    x.view(torch.uint8)[:, 1] = 0
    got = _interpreted(spec, inputs)
    assert not got[:, 1].any()
    assert got[:, 0].any()
    assert got[:, 2].any()


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_rows_do_not_depend_on_the_batch(spec):
    inputs = _inputs(spec, 140)
    rows = 1 if spec is BF16 else 2  # x, and its scales
    full = _interpreted(spec, inputs)
    for first, count in ((0, 1), (5, 64), (9, 65), (1, 129)):
        part = [t[first : first + count].clone() if i < rows else t for i, t in enumerate(inputs)]
        assert torch.equal(bits(_interpreted(spec, part)), bits(full[first : first + count]))


TILES = sorted({config for ladder in (module._SLIM_BF16, module._WIDE_BF16) for _, config in ladder}, key=str)


@pytest.mark.parametrize("config", TILES, ids=str)
@pytest.mark.parametrize("rows", [-1, 0, 1])
def test_every_bf16_tile_has_the_same_sums(config, rows):
    """Small integers: every sum is exact, so each output has one right value, at the edges of tiles too."""
    m, groups, n, k = config.block_m + rows, 2, 256, 512
    generator = torch.Generator().manual_seed(4)
    x, w = (
        torch.randint(-8, 9, (r, k), generator=generator).to(torch.bfloat16) for r in (m * groups, groups * n)
    )
    want = torch.einsum("mgk,gnk->mgn", x.view(m, groups, k).double(), w.view(groups, n, k).double())
    got = torch.full((m, groups * n), torch.nan, dtype=torch.bfloat16)
    interp.run(module.make_bf16_kernel(groups, n, k, config), x.view(m, -1), w, got)
    assert torch.equal(bits(got), bits(want.reshape(m, -1).to(torch.bfloat16)))


@pytest.mark.parametrize(
    ("groups", "tiles"),
    [(8, {1: (16, 64), 17: (64, 64), 65: (128, 64), 129: (128, 128), 257: (128, 256)}),
     (16, {1: (16, 64), 17: (64, 128), 65: (128, 128), 129: (128, 256), 257: (128, 256)})],
)  # fmt: skip
def test_bf16_tiles_are_used_while_their_blocks_run_side_by_side(groups, tiles):
    for first, tile in tiles.items():
        config = module._select_bf16(first, groups, module.N, module.K).kwargs["config"]
        assert (config.block_m, config.block_n) == tile
    last = [limit for limit, _ in module._variants_bf16(groups, module.N, module.K)]
    for limit in last[:-1]:
        config = module._select_bf16(limit, groups, module.N, module.K).kwargs["config"]
        assert -(-limit // config.block_m) * groups * module.N // config.block_n <= 2 * MULTIPROCESSORS
    assert last[-1] == module.MAX_TOKENS


def test_nan_scale_touches_its_outputs_alone():
    x, x_scale, w, w_scale = _inputs(FP8, 5)
    w_scale.view(torch.uint8)[1, 1, 0] = 255
    got = _interpreted(FP8, [x, x_scale, w, w_scale])
    assert got[:, 1, 128:].isnan().all()
    assert not got[:, 0].isnan().any()
    assert not got[:, 1, :128].isnan().any()


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        (lambda x, s, w, t: (x.float(), s, w, t), r"x\.dtype == torch.float8_e4m3fn"),
        (lambda x, s, w, t: (x[0], s, w, t), r"x\.ndim == 3"),
        (lambda x, s, w, t: (x[:, :1].contiguous(), s, w, t), r"w\.shape == \(1, 256, 256\)"),
        (lambda x, s, w, t: (x, s, w[:, :128].contiguous(), t), r"n % 256 == 0, got n=128"),
        (lambda x, s, w, t: (x, s[:, :1].contiguous(), w, t), r"x_scale\.shape == \(4, 2, 2\)"),
        (lambda x, s, w, t: (x, s, w, t.float()), r"w_scale\.dtype == torch.float8_e8m0fnu"),
        (lambda x, s, w, t: (x, s, w, t[:1].contiguous()), r"w_scale\.shape == \(2, 2, 2\)"),
    ],
)
def test_bad_fp8_calls_name_the_clause_and_the_value(change, clause):
    with pytest.raises(ContractError, match=clause):
        wo_a_fp8(*change(*_inputs(FP8, 4)))


def test_bad_bf16_calls_name_the_clause_and_the_value():
    x, w = _inputs(BF16, 4)
    with pytest.raises(ContractError, match=r"w\.device == cpu, got w\.device=meta"):
        wo_a_bf16(x, w.to("meta"))
    with pytest.raises(ContractError, match=r"k % 256 == 0, got k=128"):
        wo_a_bf16(x[..., :128].contiguous(), w[..., :128].contiguous())
