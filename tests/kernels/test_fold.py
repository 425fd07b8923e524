"""Weights laid out for the folded product: nothing is lost, and what cannot be folded is kept."""

import pytest
import torch

from dsv4_kernels.gemm import fold, fp8_fp4_gemm_folded, fp8_fp4_gemm_widened, reference
from dsv4_kernels.gemm.fold import FoldedWeights, RawWeights, fold_weights, fp4_linear, is_widened
from dsv4_kernels.gemm.fp8_fp4_gemm_folded import MAX_K, MAX_OFFSET, SPEC
from verify import extract, host, ir
from verify.properties import alignment

N, K, M = 128, 256, 3


def weights(low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    w = torch.randint(0, 256, (N, K // 2), generator=generator, dtype=torch.uint8)
    scale = torch.randint(low, high + 1, (N, K // 32), generator=generator, dtype=torch.uint8)
    scale[0, 0], scale[0, 1] = low, high  # the whole span, in one row
    return w, scale.view(torch.float8_e8m0fnu)


def identity() -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.full((K, K // 128), 127, dtype=torch.uint8)
    return torch.eye(K).to(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)


@pytest.mark.parametrize(("low", "high"), [(115, 115 + MAX_OFFSET), (0, MAX_OFFSET), (249 - MAX_OFFSET, 249)])
def test_folded_weights_have_every_value(low, high):
    w, scale = weights(low, high)
    folded = fold_weights(w, scale)
    assert isinstance(folded, FoldedWeights)
    assert folded.words.numel() * 4 == w.numel()
    got = reference._folded_weights(folded.words, folded.offsets, folded.factors)
    assert torch.equal(got, reference._scaled(reference._expand_e2m1(w), scale, 32))


@pytest.mark.parametrize(("low", "high"), [(115, 116 + MAX_OFFSET), (240, 250), (250, 255)])
def test_weights_that_span_too_much_are_kept(low, high):
    w, scale = weights(low, high)
    kept = fold_weights(w, scale)
    assert isinstance(kept, RawWeights)
    assert kept.w is w
    assert kept.w_scale is scale


def test_linear_gives_the_weights_of_an_identity():
    for high in (126, 130):
        w, scale = weights(115, high)
        x, x_scale = identity()
        want = reference._scaled(reference._expand_e2m1(w), scale, 32).T.to(torch.bfloat16)
        assert torch.equal(fp4_linear(x, x_scale, fold_weights(w, scale)), want)


@pytest.mark.parametrize(
    ("m", "n", "k", "expected"),
    [
        *((m, n, k, m >= 1024) for n, k in fp8_fp4_gemm_widened.SHAPES for m in (0, 1, 1023, 1024, 8192)),
        (4096, 4096, MAX_K, True),
        *((4096, n, k, False) for n, k in ((4224, 4096), (4096, 4352), (2048, 4096), (4096, 1536))),
    ],
)
def test_many_tokens_are_multiplied_by_weights_widened_once(m, n, k, expected):
    assert is_widened(m, n, k) is expected


@pytest.mark.parametrize("m", [0, 3, 1024])
@pytest.mark.parametrize("compiles", [False, True])
def test_linear_takes_the_product_for_its_tokens(m, compiles, monkeypatch):
    """The bounds of what was measured are lowered, so that the reference has little to do."""
    monkeypatch.setattr(fold, "_WIDENED_N", 256)
    monkeypatch.setattr(fold, "_WIDENED_K", 512)
    taken = []
    for module in (fp8_fp4_gemm_folded, fp8_fp4_gemm_widened):
        name = module.NAME
        function = getattr(fold, name)
        monkeypatch.setattr(fold, name, lambda *a, f=function, n=name: taken.append(n) or f(*a))
    x, x_scale, *parts = SPEC.make_inputs({"m": m, "n": 256, "k": 512}, torch.device("cpu"), 3)
    linear = torch.compile(fp4_linear, fullgraph=True, backend="eager") if compiles else fp4_linear
    got = linear(x, x_scale, FoldedWeights(*parts))
    assert taken == ["fp8_fp4_gemm_widened" if m >= 1024 else "fp8_fp4_gemm_folded"]
    assert torch.equal(got, reference.fp8_fp4_gemm_folded(x, x_scale, *parts))


@pytest.mark.parametrize(("m", "k"), [(64, MAX_K), (1024, MAX_K), (1024, 12288)])
def test_scales_of_the_longest_rows_leave_room(m, k):
    variant = SPEC.select({"m": m, "n": N, "k": k})
    extracted = extract.extract(SPEC.make_kernel(**variant.kwargs))
    facts = host.read_host(extracted.host, extracted.device, extracted.tile)
    shared = facts.extents["dynamic_shared"]
    assert isinstance(shared, ir.Const)
    assert 0 < shared.value <= alignment.MAX_SHARED_BYTES
