"""bf16 product: any shape, every tile, exact sums, bad calls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv4_kernels
from dsv4_kernels.contract import ContractError
from dsv4_kernels.gemm import bf16_gemm as module
from dsv4_kernels.gemm.bf16_gemm import SPEC, bf16_gemm
from dsv4_kernels.gemm.rounds import rounds
from tests.compare import bits, mismatch
from verify import interp

CPU = torch.device("cpu")


def _inputs(m, n=64, k=256, f32_out=1, seed=0):
    return list(SPEC.make_inputs({"m": m, "n": n, "k": k, "f32_out": f32_out}, CPU, seed))


def _interpreted(call, *inputs):
    with dsv4_kernels.backend("interpret"):
        return call(*inputs)


@settings(max_examples=8)
@given(
    m=st.integers(0, 140),
    n=st.sampled_from([64, 192, 256]),
    k=st.sampled_from([256, 768]),
    f32_out=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_any_shape(m, n, k, f32_out, seed):
    inputs = _inputs(m, n, k, f32_out, seed)
    assert mismatch(SPEC, inputs, _interpreted(bf16_gemm, *inputs)) is None


TILES = {
    config
    for n in (64, 512, 2048, module._HEAD)
    for out in (module.F32, module.BF16)
    for _, config in module.configs(n, out)
}


@pytest.mark.parametrize("out", [module.F32, module.BF16])
@pytest.mark.parametrize("config", sorted(TILES, key=str), ids=str)
def test_every_tile_gives_the_same_bits(config, out):
    """Small integers: every sum is exact, so the result has one right value whatever the tile."""
    m, n, k = 131, 256, 512
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-8, 9, (m, k), generator=generator).to(torch.bfloat16)
    w = torch.randint(-8, 9, (n, k), generator=generator).to(torch.bfloat16)
    want = (x.double() @ w.double().T).to(torch.float32 if out == module.F32 else torch.bfloat16)
    got = torch.full_like(want, torch.nan)
    interp.run(module.make_kernel(n, k, out, config), x, w, got)
    assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("m", [1, 127, 128, 129, 256, 300])
def test_two_token_tiles_a_block_have_the_bits_of_one(m):
    x, w, _ = _inputs(m, 512, 512)
    one, two = (torch.full((m, 512), torch.nan) for _ in range(2))
    for out, config in ((one, module._LARGEST), (two, module._PAIR)):
        interp.run(module.make_kernel(512, 512, module.F32, config), x, w, out)
    assert torch.equal(bits(two), bits(one))


def test_several_tiles_a_block_are_of_one_group():
    with pytest.raises(ValueError, match=r"^bf16_gemm: requires groups == 1 of .*, got groups=2"):
        module.make_kernel(512, 512, module.F32, module._PAIR, groups=2)


def test_two_token_tiles_a_block_are_taken_where_their_rounds_cost_less():
    """505 columns: 16 token tiles are 62 rounds of 132 either way, 8 are 31 or 32, 17 are 66 or 70."""

    def tiles(m, n=129280, out=module.F32):
        return module._select(m, n, 4096, out).kwargs["config"].tiles

    assert [tiles(m) for m in (512, 1024, 2047, 2048, 2176, 3072, 4096, 4097, 4225, 2**20)] == [
        *(1, 1, 2, 2, 1, 2, 2, 1, 2, 2)
    ]
    for m in range(1152, 4097, 128):
        one, two = rounds(m // 128 * 505), 2 * rounds(-(-m // 256) * 505)
        assert tiles(m) == (2 if two * 98 <= one * 100 else 1)
    assert tiles(4096, out=module.BF16) == tiles(4096, n=2048) == tiles(2**20, n=2048) == 1


def test_rows_do_not_depend_on_the_batch():
    """Tiles of 256 channels a stage, which is where the interpreter rounds."""
    x, w, out_dtype = _inputs(128, 128, 512)
    full = _interpreted(bf16_gemm, x, w, out_dtype)
    for first, count in ((0, 1), (9, 16), (100, 17), (3, 64), (1, 127)):
        part = _interpreted(bf16_gemm, x[first : first + count].clone(), w, out_dtype)
        assert torch.equal(bits(part), bits(full[first : first + count]))


def test_nan_touches_its_row_alone():
    x, w, out_dtype = _inputs(4)
    x[2, 5] = torch.nan
    got = _interpreted(bf16_gemm, x, w, out_dtype)
    assert got[2].isnan().all()
    assert not got[[0, 1, 3]].isnan().any()


def test_the_dispatcher_has_a_tile_for_every_batch():
    for n in (64, 128, 256, 2048, 129280):
        for m in (1, 16, 17, 128, 129, 512, 513, 2049, module.MAX_TOKENS):
            config = module._select(m, n, 4096, module.F32).kwargs["config"]
            assert n % config.block_n == 0


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        (lambda x, w: (x.float(), w), r"x\.dtype == torch.bfloat16, got x\.dtype=torch.float32"),
        (lambda x, w: (x, w.half()), r"w\.dtype == torch.bfloat16"),
        (lambda x, w: (x[:, ::2], w), r"x contiguous"),
        (lambda x, w: (x[:, :128].contiguous(), w), r"k % \w+ == 0, got k=128"),
        (lambda x, w: (x, w[:32].contiguous()), r"n % \w+ == 0, got n=32"),
        (lambda x, w: (x, w[:, :128].contiguous()), r"w\.shape == \(64, 256\), got w\.shape=\(64, 128\)"),
        (lambda x, w: (x, w.to("meta")), r"w\.device == cpu, got w\.device=meta"),
    ],
)
def test_bad_calls_name_the_clause_and_the_value(change, clause):
    with pytest.raises(ContractError, match=clause):
        bf16_gemm(*change(*_inputs(4)[:2]))


def test_output_type_is_one_of_two():
    x, w, _ = _inputs(4)
    with pytest.raises(ContractError, match=r"requires out_dtype in .*got out_dtype=torch\.float16"):
        bf16_gemm(x, w, torch.float16)
