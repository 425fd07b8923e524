"""Products of few weight rows and router logits: any shape, every tile, parts added in order, bad calls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv4_kernels
from dsv4_kernels.contract import ContractError
from dsv4_kernels.gemm import narrow_gemm as module
from dsv4_kernels.gemm.fold_parts import fold_parts
from dsv4_kernels.gemm.narrow_gemm import SPEC, narrow_gemm
from dsv4_kernels.gemm.router_gemm import SPEC as ROUTER
from dsv4_kernels.gemm.router_gemm import router_gemm
from tests.compare import bits, mismatch
from verify import interp

CPU = torch.device("cpu")
SHORT = 1024  # channels: one stage a part


def _inputs(m, n=64, k=SHORT, f32_out=1, seed=0):
    return list(SPEC.make_inputs({"m": m, "n": n, "k": k, "f32_out": f32_out}, CPU, seed))


def _interpreted(call, *inputs):
    with dsv4_kernels.backend("interpret"):
        return call(*inputs)


@settings(max_examples=6)
@given(
    m=st.integers(0, 140),
    n=st.sampled_from([64, 192, 384]),
    k=st.sampled_from([SHORT, 2 * SHORT]),
    f32_out=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_any_shape(m, n, k, f32_out, seed):
    inputs = _inputs(m, n, k, f32_out, seed)
    assert mismatch(SPEC, inputs, _interpreted(narrow_gemm, *inputs)) is None


TILES = {(config, n) for n in (64, 256, 384) for _, config in module._configs(n)}


@pytest.mark.parametrize(("config", "n"), sorted(TILES, key=str), ids=str)
def test_every_tile_gives_the_same_parts(config, n):
    """Small integers: every sum is exact, so each part has one right value whatever the tile."""
    m, k = 131, 2 * SHORT
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-8, 9, (m, k), generator=generator).to(torch.bfloat16)
    w = torch.randint(-8, 9, (n, k), generator=generator).to(torch.bfloat16)
    pairs = zip(x.double().chunk(module.PARTS, 1), w.double().chunk(module.PARTS, 1), strict=True)
    want = torch.stack([a @ b.T for a, b in pairs], dim=1).float()
    got = torch.full_like(want, torch.nan)
    interp.run(module.make_kernel(n, k, config), x, w, got)
    assert torch.equal(bits(got), bits(want))


def test_parts_are_added_first_to_last():
    """Sums that another order would round otherwise."""
    one, tiny = 1.0, 2.0**-24
    x = torch.zeros(2, SHORT, dtype=torch.bfloat16)
    step = SHORT // module.PARTS
    x[0, ::step] = torch.tensor([one, tiny, tiny, tiny], dtype=torch.bfloat16)
    x[1, ::step] = torch.tensor([tiny, tiny, tiny, one], dtype=torch.bfloat16)
    w = torch.ones(64, SHORT, dtype=torch.bfloat16)
    got = _interpreted(narrow_gemm, x, w)
    assert (got[0] == one).all()
    assert (got[1] == one + 4 * tiny).all()  # 3 * tiny and one, to even


def test_rows_do_not_depend_on_the_batch():
    x, w, out_dtype = _inputs(140, 128)
    full = _interpreted(narrow_gemm, x, w, out_dtype)
    for first, count in ((0, 1), (9, 16), (100, 17), (3, 64), (1, 127)):
        part = _interpreted(narrow_gemm, x[first : first + count].clone(), w, out_dtype)
        assert torch.equal(bits(part), bits(full[first : first + count]))


def test_nan_touches_its_row_alone():
    x, w, out_dtype = _inputs(4)
    x[2, 5] = torch.nan
    got = _interpreted(narrow_gemm, x, w, out_dtype)
    assert got[2].isnan().all()
    assert not got[[0, 1, 3]].isnan().any()


def test_router_logits_are_the_product_in_fp32():
    x, w, _ = _inputs(70, 192)
    got = _interpreted(router_gemm, x, w)
    assert got.dtype == torch.float32
    assert mismatch(ROUTER, (x, w), got) is None
    assert torch.equal(bits(got), bits(_interpreted(narrow_gemm, x, w)))


def test_the_dispatcher_has_a_tile_for_every_batch():
    for n in (64, 128, 256, 384, 4096):
        for m in (1, 16, 17, 128, 129, 512, 513, 2049, module.MAX_TOKENS):
            for out_bits in (module.PARTED, 16, 32):
                config = module.select(m, n, 4096, out_bits).kwargs["config"]
                assert n % config.block_n == 0


@pytest.mark.parametrize(
    ("n", "tokens", "other"),
    [(256, (2049, 4096, 4224, 8448, module.MAX_TOKENS), (1024, 2048, 4225)),
     (384, (2817, 4096, 4224, 8448, module.MAX_TOKENS), (1024, 2048, 2816, 4225))],
)  # fmt: skip
def test_routers_are_one_tile_where_it_saves_rounds(n, tokens, other):
    """Blocks of 4096 tokens are one round of whole tiles; those of 4225 begin a second."""
    k = 8192  # no shape whose parts one block has
    assert {module.select(m, n, k, 32).kwargs["config"].block_n for m in tokens} == {n}
    assert {module.select(m, n, k, 32).kwargs["config"].block_n for m in other} == {128}


@pytest.mark.parametrize("call", [narrow_gemm, router_gemm])
@pytest.mark.parametrize(
    ("change", "clause"),
    [
        (lambda x, w: (x.float(), w), r"x\.dtype == torch.bfloat16, got x\.dtype=torch.float32"),
        (lambda x, w: (x, w.half()), r"w\.dtype == torch.bfloat16"),
        (lambda x, w: (x[:, ::2], w), r"x contiguous"),
        (lambda x, w: (x[:, :512].contiguous(), w), r"k % \w+ == 0, got k=512"),
        (lambda x, w: (x, w[:32].contiguous()), r"n % \w+ == 0, got n=32"),
        (lambda x, w: (x, w.repeat(1, 2)), r"w\.shape == \(64, 1024\), got w\.shape=\(64, 2048\)"),
        (lambda x, w: (x, w.to("meta")), r"w\.device == cpu, got w\.device=meta"),
    ],
)
def test_bad_calls_name_the_clause_and_the_value(call, change, clause):
    with pytest.raises(ContractError, match=clause):
        call(*change(*_inputs(4)[:2]))


def test_output_type_is_one_of_two():
    x, w, _ = _inputs(4)
    for call in (
        lambda: narrow_gemm(x, w, torch.float16),
        lambda: fold_parts(x[:, None].float(), torch.int8),
    ):
        with pytest.raises(ContractError, match=r"requires out_dtype in .*got out_dtype=torch\."):
            call()


def test_parts_are_checked():
    with pytest.raises(ContractError, match=r"n % COLUMNS == 0, got n=65"):
        fold_parts(torch.zeros(2, 4, 65))
