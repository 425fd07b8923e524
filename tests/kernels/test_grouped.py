"""Grouped products: layouts of rows, folded experts, and rows that are the dense product's, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_kernels import backend
from dsv4_kernels.contract import ContractError
from dsv4_kernels.gemm import grouped_fp8_fp4_gemm as folded_gemm
from dsv4_kernels.gemm import grouped_fp8_fp4_gemm_exact as exact_gemm
from dsv4_kernels.gemm import grouped_masked, grouped_reference, grouped_wide, reference
from dsv4_kernels.gemm.fold import RawWeights
from dsv4_kernels.gemm.fp8_fp4_gemm import fp8_fp4_gemm
from dsv4_kernels.gemm.fp8_fp4_gemm_folded import MAX_OFFSET, fp8_fp4_gemm_folded
from dsv4_kernels.gemm.fp8_gemm import fp8_gemm
from dsv4_kernels.gemm.grouped_fold import FoldedExperts, fold_experts, grouped_fp4_linear
from dsv4_kernels.gemm.grouped_fp8_fp4_gemm import grouped_fp8_fp4_gemm
from dsv4_kernels.gemm.grouped_fp8_fp4_gemm_exact import grouped_fp8_fp4_gemm_exact
from dsv4_kernels.gemm.grouped_fp8_gemm import grouped_fp8_gemm
from dsv4_kernels.gemm.grouped_layout import (
    ALIGNMENTS,
    PADDING,
    alignment_for,
    capacity,
    contiguous_layout,
    tile_for,
)
from dsv4_kernels.gemm.grouped_masked import grouped_fp4_linear_masked, grouped_fp8_gemm_masked
from dsv4_kernels.registry import get_kernel
from tests.compare import bits

POOL = 640  # rows that batches are drawn from
# Rows of a batch, any of the pool's and some of them often.
SIZES = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 640, 1000, 1024, 2048, 4096, 8191, 8192)
REPEATS = 20  # of each batch
DENSE = {
    "grouped_fp8_gemm": fp8_gemm,
    "grouped_fp8_fp4_gemm": fp8_fp4_gemm_folded,
    "grouped_fp8_fp4_gemm_exact": fp8_fp4_gemm,
}
GROUPED = {
    "grouped_fp8_gemm": grouped_fp8_gemm,
    "grouped_fp8_fp4_gemm": grouped_fp8_fp4_gemm,
    "grouped_fp8_fp4_gemm_exact": grouped_fp8_fp4_gemm_exact,
}
EXACT = "grouped_fp8_fp4_gemm_exact"
NAN_SCALE = 255
DENSE_BLOCK = 128  # channels a scale of x in the dense products


@settings(max_examples=50)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.sampled_from(ALIGNMENTS))
def test_layout_gives_each_row_a_place(counts, alignment):
    rows = capacity(sum(counts), len(counts), alignment)
    expert, starts = contiguous_layout(torch.tensor(counts), alignment, rows)
    assert expert.dtype == torch.int32
    assert len(expert) == rows
    assert rows % alignment == 0
    for e, count in enumerate(counts):
        first = int(starts[e])
        assert first % alignment == 0 or count == 0
        assert (expert[first : first + count] == e).all()
        assert int((expert == e).sum()) == count
    for block in expert.view(-1, alignment):  # what the kernels ask for
        valid = block[block >= 0]
        assert (valid == block[0]).all()
    assert ((expert == PADDING) | (expert >= 0)).all()


def test_alignment_follows_the_rows_of_an_expert():
    assert [alignment_for(rows) for rows in (1, 16, 17, 64, 65, 1536)] == [16, 16, 64, 64, 128, 128]
    rows = (64, 96, 128, 192, 512, 1024, 1536)
    assert [alignment_for(r, (96, 128, 256)) for r in rows] == [64, 96, 128, 96, 256, 256, 256]
    assert [tile_for(a, (16, 64, 128)) for a in ALIGNMENTS] == [16, 64, 16, 128, 128]


def _experts(span: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    w = torch.randint(0, 256, (2, 128, 128), generator=generator, dtype=torch.uint8)
    scale = torch.randint(120, 121, (2, 128, 8), generator=generator, dtype=torch.uint8)
    scale[1, 5, 2] += span
    return w, scale.view(torch.float8_e8m0fnu)


def test_folded_experts_have_every_value():
    w, scale = _experts(MAX_OFFSET)
    folded = fold_experts(w, scale)
    assert isinstance(folded, FoldedExperts)
    eye = torch.eye(256).to(torch.float8_e4m3fn)
    ones = torch.full((256, 2), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    for e in range(2):
        want = reference.fp8_fp4_gemm(eye, ones, w[e], scale[e])
        blocks = grouped_reference.by_row(folded.words[e]), grouped_reference.by_row(folded.offsets[e])
        got = reference.fp8_fp4_gemm_folded(eye, ones, *blocks, folded.factors[e])
        assert torch.equal(bits(got), bits(want))


def test_one_expert_that_cannot_be_folded_keeps_all_as_they_came():
    w, scale = _experts(MAX_OFFSET + 1)
    kept = fold_experts(w, scale)
    assert isinstance(kept, RawWeights)
    assert kept.w is w
    assert kept.w_scale is scale


@pytest.mark.parametrize(("span", "kind"), [(MAX_OFFSET, FoldedExperts), (MAX_OFFSET + 1, RawWeights)])
def test_linear_takes_either_kind_of_weights(span, kind):
    w, scale = _experts(span)
    weights = fold_experts(w, scale)
    assert isinstance(weights, kind)
    x, x_scale, *_ = get_kernel("grouped_fp8_fp4_gemm").make_inputs(
        _dims(128, 256, 2, 32), torch.device("cpu"), 2
    )
    expert = torch.tensor([0, 1]).repeat_interleave(16).int()
    got = grouped_fp4_linear(x, x_scale, weights, expert, 16)
    for e in range(2):
        own = expert == e
        operands = x.view(torch.uint8)[own].view(x.dtype), x_scale.view(torch.uint8)[own].view(x_scale.dtype)
        assert torch.equal(bits(got[own]), bits(reference.fp8_fp4_gemm(*operands, w[e], scale[e])))
    by_32 = x_scale.view(torch.uint8).repeat_interleave(4, dim=1).view(x_scale.dtype)
    if kind is FoldedExperts:
        with pytest.raises(ContractError, match="1 x 32"):
            grouped_fp4_linear(x, by_32, weights, expert, 16)
    else:
        assert torch.equal(bits(grouped_fp4_linear(x, by_32, weights, expert, 16)), bits(got))


@pytest.mark.parametrize(("alignment", "rows"), [(32, 64), (64, 96)])
@pytest.mark.parametrize("name", GROUPED)
def test_alignment_is_checked(name, alignment, rows):
    inputs = get_kernel(name).make_inputs(_dims(128, 512, 2, rows), torch.device("cpu"), 1)
    with pytest.raises(ContractError, match="alignment"):
        GROUPED[name](*inputs[:-1], alignment)


@pytest.mark.parametrize("name", GROUPED)
def test_scales_of_x_are_powers_of_two(name):
    x, x_scale, *rest = get_kernel(name).make_inputs(_dims(128, 512, 2, 32), torch.device("cpu"), 1)
    with pytest.raises(ContractError, match=r"x_scale\.dtype == torch\.float8_e8m0fnu"):
        GROUPED[name](x, x_scale.float(), *rest)


def test_channels_that_shared_memory_has_no_room_for_are_refused():
    k = folded_gemm.MAX_K + 512
    for name in ("grouped_fp8_fp4_gemm", "grouped_fp8_fp4_gemm_exact"):
        inputs = get_kernel(name).make_inputs(_dims(128, k, 1, 16), torch.device("cpu"), 1)
        with pytest.raises(ContractError, match="k <= MAX_K"):
            GROUPED[name](*inputs)


@pytest.mark.parametrize("x_block", [32, 128])
@pytest.mark.parametrize("k", [128, exact_gemm._MANY_K, exact_gemm._MANY_K + 128, exact_gemm.MAX_K])
def test_shared_memory_decides_the_warpgroups_of_the_exact_form(k, x_block):
    config = exact_gemm._config(64, k)
    assert config.warpgroups == (2 if k <= exact_gemm._MANY_K else 1)
    weight_rows, padding = 64 * config.warpgroups, 1
    stages = config.num_stages * 128 * (config.block_m + weight_rows // 2)
    scales = 4 * (k // x_block * config.block_m + weight_rows * (k // 128 + padding))
    assert stages + scales <= 232448 - 1024  # of a block, less what mbarriers take


@pytest.mark.parametrize("alignment", folded_gemm._CONFIGS)
def test_shared_memory_decides_the_depth_of_the_pipeline(alignment):
    config = folded_gemm._CONFIGS[alignment]
    tile, least = (config.block_m, 128 * config.warpgroups, config.blocks), 2
    assert folded_gemm._stages_that_fit(folded_gemm.MAX_K, *tile) >= least
    assert all(folded_gemm._stages_that_fit(k, *tile) >= config.num_stages for _, k, _ in folded_gemm.SHAPES)


def test_shared_memory_leaves_the_tallest_tile_two_stages():
    least, held = 2, [folded_gemm.MAX_K, *(k for _, k, _ in folded_gemm.SHAPES)]
    assert all(folded_gemm._config(k, grouped_wide.BLOCK_M).num_stages >= least for k in held)


def _dims(n: int, k: int, num_experts: int, rows: int, x_block: int = 128) -> dict[str, int]:
    dims = {"n": n, "k": k, "num_experts": num_experts, "alignment": 16, "spread": 1, "x_block": x_block}
    return {**dims, "rows": rows, "m": -(-rows // 16) * 16}


def _dense(weights: torch.Tensor) -> torch.Tensor:
    """Return what the dense product takes of an expert's weights: row by row, aligned."""
    by_block = 3
    return grouped_reference.by_row(weights) if weights.dim() == by_block else weights.clone()


@pytest.mark.parametrize("expected_rows", [1, 64, 1000])
def test_masked_rows_are_those_of_the_contiguous_layout(expected_rows):
    max_m, counts = 64, [3, 0, 64]
    inputs = get_kernel("grouped_fp8_gemm").make_inputs(_dims(128, 512, 3, 3 * max_m), torch.device("cpu"), 4)
    x, x_scale, w, w_scale, _, _ = inputs
    rows = x.unflatten(0, (3, max_m)), x_scale.unflatten(0, (3, max_m))
    device_counts = torch.tensor(counts, dtype=torch.int32)
    got = grouped_fp8_gemm_masked(*rows, w, w_scale, device_counts, expected_rows)
    for e, count in enumerate(counts):
        want = reference.fp8_gemm(rows[0][e], rows[1][e], w[e], w_scale[e])
        assert torch.equal(bits(got[e, :count]), bits(want[:count]))


@pytest.mark.parametrize(
    ("max_m", "expected_rows", "alignment"),
    [(64, 1, 16), (128, 1, 64), (256, 12, 64), (1024, 1, 128), (64, 1000, 64), (48, 40, 16), (4096, 96, 128)],
)
def test_masked_tiles_suit_the_rows_and_the_room(max_m, expected_rows, alignment):
    assert grouped_masked._alignment(max_m, expected_rows) == alignment


def test_masked_rows_by_fp4_weights():
    w, scale = _experts(0)
    x, x_scale, *_ = get_kernel("grouped_fp8_fp4_gemm").make_inputs(
        _dims(128, 256, 2, 32), torch.device("cpu"), 2
    )
    rows = x.unflatten(0, (2, 16)), x_scale.unflatten(0, (2, 16))
    got = grouped_fp4_linear_masked(*rows, fold_experts(w, scale), torch.tensor([16, 5]).int(), 8)
    for e, count in enumerate((16, 5)):
        want = reference.fp8_fp4_gemm(rows[0][e], rows[1][e], w[e], scale[e])
        assert torch.equal(bits(got[e, :count]), bits(want[:count]))
    with pytest.raises(ContractError, match="max_m"):
        grouped_fp4_linear_masked(
            rows[0][:, :8].contiguous(), rows[1][:, :8], fold_experts(w, scale), torch.tensor([1, 1]).int(), 1
        )


class _Pool:
    """Rows with their experts, and what the dense product makes of each; by 1 x 32, what one batch makes."""

    def __init__(self, name: str, shape: tuple[int, int, int], rows: int, device: str, x_block=128) -> None:
        n, k, num_experts = shape
        self.name, self.num_experts, self.device, self.k = name, num_experts, device, k
        x, scale, *weights, _, _ = get_kernel(name).make_inputs(
            _dims(n, k, num_experts, rows, x_block), torch.device(device), 5
        )
        self.weights = weights
        self.x, self.scale = x.view(torch.uint8)[:rows], scale.view(torch.uint8)[:rows]
        self.owner = torch.arange(rows, device=device) % num_experts
        self.want = torch.empty(rows, n, dtype=torch.bfloat16, device=device)
        if x_block != DENSE_BLOCK:
            self._want_of_a_batch()
            return
        for e in range(num_experts):
            own = self.owner == e
            operands = self.x[own].view(torch.float8_e4m3fn), self.scale[own].view(torch.float8_e8m0fnu)
            self.want[own] = DENSE[name](*operands, *(_dense(w[e]) for w in weights))

    def _want_of_a_batch(self) -> None:
        """Take each row's result from the batch of all rows: no dense product has such scales."""
        ids = torch.arange(len(self.x), device=self.device)
        args, places, _ = self.batch(ids, ALIGNMENTS[0], 0)
        self.want[torch.argsort(self.owner, stable=True)] = GROUPED[self.name](*args)[places]

    def batch(self, ids: torch.Tensor, alignment: int, seed: int) -> tuple[tuple, torch.Tensor, torch.Tensor]:
        """Return arguments for rows `ids` among padding of random values, their places, and their results."""
        order = ids[torch.argsort(self.owner[ids], stable=True)]
        counts = torch.bincount(self.owner[order], minlength=self.num_experts)
        m = capacity(len(order), self.num_experts, alignment)
        expert, starts = contiguous_layout(counts, alignment, m)
        places = torch.cat(
            [starts[e] + torch.arange(int(c), device=self.device) for e, c in enumerate(counts)]
        )
        generator = torch.Generator(self.device).manual_seed(seed)
        x = torch.randint(0, 127, (m, self.k), generator=generator, device=self.device, dtype=torch.uint8)
        scale = torch.full((m, self.scale.shape[1]), NAN_SCALE, device=self.device, dtype=torch.uint8)
        x[places], scale[places] = self.x[order], self.scale[order]
        operands = x.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)
        return (*operands, *self.weights, expert, alignment), places, self.want[order]


@pytest.mark.parametrize(("name", "x_block"), [*((name, DENSE_BLOCK) for name in GROUPED), (EXACT, 32)])
def test_rows_are_those_of_the_dense_product(name, x_block):
    with backend("interpret"):
        pool = _Pool(name, (128, 512, 3), 24, "cpu", x_block)
        args, places, want = pool.batch(torch.tensor([1, 4, 0, 16, 22]), 16, 1)  # the last expert is empty
        got = GROUPED[name](*args)
    assert torch.equal(bits(got[places]), bits(want))


def check_rows_of_experts(name, shape, x_block, alignment, gpu_record):
    """Batches of any size, experts without rows or with all, any place, neighbours of any value; repeated."""
    pool = _Pool(name, shape, POOL, "cuda", x_block)
    generator, same = torch.Generator().manual_seed(alignment), True
    for seed, size in enumerate(SIZES):
        rows = (pool.owner % (1 + seed % shape[2]) == 0).nonzero()[:, 0]  # of all experts, some, or one
        ids = rows[torch.randint(0, len(rows), (size,), generator=generator).cuda()]
        args, places, want = pool.batch(ids, alignment, seed)
        for _ in range(REPEATS):
            same = same and torch.equal(bits(GROUPED[name](*args)[places]), bits(want))
    spec, dims = get_kernel(name), {**_dims(*shape, POOL, x_block), "alignment": alignment}
    n, k, _ = shape
    fine = "" if x_block == DENSE_BLOCK else f" x{x_block}"
    gpu_record(spec, spec.select(dims), f"rows of experts n{n}-k{k}{fine} alignment={alignment}", same)
    assert same


@pytest.mark.gpu
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize(("name", "x_block"), [*((name, DENSE_BLOCK) for name in GROUPED), (EXACT, 32)])
def test_gpu_rows_do_not_depend_on_the_batch(name, x_block, alignment, gpu_record):
    """One shape tells; all shapes were asked once with the same function."""
    check_rows_of_experts(name, (4096, 2048, 32), x_block, alignment, gpu_record)
