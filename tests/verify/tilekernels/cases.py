"""TileKernels' kernels against the PyTorch references that it ships.

A case runs some kernels and compares. Comparison is bit for bit where the library itself asks for that,
else by the bound that the library states for its own kernels.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.verify.tilekernels.harness import import_tile_kernels

tk: Any = import_tile_kernels()
engram_refs: Any = importlib.import_module("tile_kernels.torch.engram")
ops: Any = tk.modeling.mhc.ops
equal = tk.testing.numeric.assert_equal
close = torch.testing.assert_close

MHC = 4
_CASES: list["Case"] = []


@dataclass(frozen=True)
class Case:
    """`run` raises unless the kernels named by `kernels` agree with their references."""

    name: str
    kernels: tuple[str, ...]
    run: Callable[[], None]


def case(*kernels: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(run: Callable[[], None]) -> Callable[[], None]:
        _CASES.append(Case(run.__name__, kernels, run))
        return run

    return register


def all_cases() -> tuple[Case, ...]:
    from tests.verify.tilekernels import mhc_cases, quant_cases  # noqa: F401  (they register)

    return tuple(_CASES)


def similar(got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
    """The library's measure: 1 - 2xy / (xx + yy) over all elements."""
    diff = float(tk.testing.numeric.calc_diff(got, want))
    assert diff < bound, f"differ by {diff:.3e}, allowed {bound:.1e}"


def topk_indices(num_tokens: int, num_topk: int, num_experts: int) -> torch.Tensor:
    scores = torch.rand(num_tokens, num_experts)
    idx = scores.topk(num_topk, sorted=False).indices
    return torch.where(torch.rand(idx.shape) < 0.25, -1, idx)


def mapping(num_topk: int = 3, num_experts: int = 9, alignment: int = 16, num_tokens: int = 41):
    idx = topk_indices(num_tokens, num_topk, num_experts)
    return idx, tk.moe.get_fused_mapping(idx, num_experts, 0, alignment)


# --------------------------------------------------------------------------- routing
@case("aux_fi_kernel")
def aux_fi():
    idx = topk_indices(77, 6, 24)
    equal(tk.moe.aux_fi(idx, 24, 5), tk.torch.aux_fi(idx, 24, 5))


@case("group_count_kernel")
def group_count():
    idx = topk_indices(1500, 3, 40)
    equal(tk.moe.group_count(idx, 40), tk.torch.group_count(idx, 40))


@case("inplace_unique_group_indices_kernel")
def inplace_unique_group_indices():
    for groups in (8, 72):
        got = torch.randint(-1, groups, (200, 8))
        want = got.clone()
        tk.moe.inplace_unique_group_indices(got, groups)
        tk.torch.inplace_unique_group_indices(want, groups)
        equal(got, want)


@case("mask_indices_by_tp_kernel")
def mask_indices_by_tp():
    for rank in (0, 1):
        idx = torch.randint(-1, 64, (123, 6))
        args = (64, 4, rank, 2)
        equal(tk.moe.mask_indices_by_tp(idx, *args), tk.torch.mask_indices_by_tp(idx, *args))


@case("normalize_weight_kernel")
def normalize_weight():
    weights = torch.rand(200, 6)
    for got, want in zip(tk.moe.normalize_weight(weights), tk.torch.normalize_weight(weights), strict=True):
        equal(got, want)


@case("topk_gate_kernel")
def topk_gate():
    scores = torch.randn(37, 72)
    scores[::3] = scores[::3].round()  # ties
    equal(tk.moe.topk_gate(scores, 6), tk.torch.stable_topk(scores, 6))


@case("topk_sum_and_topk_group_idx_kernel")
def topk_sum_and_topk_group_idx():
    for num_sum in (1, 2):
        scores = torch.randn(19, 8, 12)
        got = tk.moe.topk_sum_and_topk_group_idx(scores, num_sum, 4)
        equal(got, tk.torch.topk_sum_and_topk_group_idx(scores, num_sum, 4))


@case("top2_sum_gate_kernel")
def top2_sum_gate():
    settings = [(0, 0, 72, "sigmoid"), (8, 4, 96, "sqrtsoftplus"), (0, 0, 36, "softmax")]
    for num_groups, num_topk_groups, experts, scoring in settings:
        shared, topk, tokens, extra = 2, 6, 11, 4
        logits, bias = torch.randn(tokens, experts), torch.randn(experts)
        mask = torch.rand(tokens) < 0.8
        fix = torch.rand(tokens) < 0.3
        unmapped = torch.stack([torch.randperm(experts)[:topk] for _ in range(tokens)])
        count = torch.randint(1, extra + 2, (experts + shared,), dtype=torch.int32)
        table = torch.randint(0, experts + extra, (experts + shared, extra + 1), dtype=torch.int32)
        args = (logits, bias, topk, num_topk_groups, num_groups, True, shared, 1.5, 1, 4, 1, 2, scoring)
        for kwargs in (
            {},
            {"mask": mask},
            {"mask": mask, "fix_routing_mask": fix, "to_physical_map": table, "logical_count": count},
        ):
            if "to_physical_map" not in kwargs:
                plain = (*args[:5], False, 0, *args[7:])
                outs = [f(*plain, **kwargs) for f in (tk.moe.top2_sum_gate, tk.torch.top2_sum_gate)]
            else:
                pair = [unmapped.clone(), unmapped.clone()]
                functions = (tk.moe.top2_sum_gate, tk.torch.top2_sum_gate)
                outs = [f(*args, unmapped_topk_idx=u, **kwargs) for f, u in zip(functions, pair, strict=True)]
                equal(*pair)
            equal(outs[0][0], outs[1][0])
            close(outs[0][1], outs[1][1])


@case("get_fused_mapping_kernel")
def get_fused_mapping():
    idx, (expert, token, slot, pos, start, end, counts, listed) = mapping(alignment=16)
    assert counts.tolist() == listed
    at = 0
    for e in range(9):
        segment = expert[at : at + listed[e]]
        assert int(start[e]) == at
        assert int((segment == e).sum()) == int((idx == e).sum())
        assert bool(((segment == e) | (segment == -1)).all())
        at += listed[e]
        assert int(end[e]) == at
        assert listed[e] % 16 == 0
    used = expert >= 0
    flat = slot[used].long()
    equal(pos.view(-1)[flat], torch.arange(expert.numel(), dtype=torch.int32)[used])
    equal(token[used], slot[used] // idx.shape[1])
    equal(idx.view(-1)[flat].int(), expert[used])
    assert bool(((pos >= 0) == (idx >= 0)).all())


@case("expand_to_fused_kernel")
def expand_to_fused():
    idx, (expert, _, _, pos, *_) = mapping()
    x = torch.randn(idx.shape[0], 256, dtype=torch.bfloat16)
    equal(tk.moe.expand_to_fused(x, pos, expert), tk.torch.expand_to_fused(x, pos, expert))
    scale = torch.rand(idx.shape[0], 2)
    for column_major in (False, True):
        args = ((x, scale), 128, pos, expert, column_major)
        got, want = tk.moe.expand_to_fused_with_sf(*args), tk.torch.expand_to_fused_with_sf(*args)
        equal(got[0], want[0])
        equal(got[1], want[1])


@case("reduce_fused_kernel")
def reduce_fused():
    idx, (_, _, _, pos, *_) = mapping(alignment=1)
    count = idx.numel()
    weights, scale, x_scale = torch.rand(idx.shape), torch.rand(1), torch.rand(count)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(count, 256).to(dtype)
        for args in (
            (x, weights, pos),
            (x, None, pos),
            ((x, x_scale), weights, pos, "e4m3", scale),
        ):
            equal(tk.moe.reduce_fused(*args), tk.torch.reduce_fused(*args))


# --------------------------------------------------------------------------- transpose, engram
@case("batched_transpose_kernel")
def batched_transpose():
    for dtype, shape in (
        (torch.bfloat16, (2, 128, 192)),
        (torch.float8_e4m3fn, (1, 64, 128)),
        (torch.float32, (1, 192, 64)),
    ):
        x = torch.randn(shape).to(dtype)
        equal(tk.transpose.batched_transpose(x), x.transpose(1, 2).contiguous())
    padded = torch.randn(128, 136)[:, :128]
    equal(tk.transpose.transpose(padded), padded.T.contiguous())


@case("engram_hash_kernel")
def engram_hash():
    ids = torch.randint(0, 100000, (45, 3), dtype=torch.int32)
    multipliers = torch.randint(0, 100000, (2, 3))
    sizes = torch.randint(100000, 1000000, (2, 2, 8), dtype=torch.int32)
    offsets = engram_refs.make_offsets(sizes)
    args = (ids, multipliers, sizes, offsets)
    equal(tk.engram.engram_hash(*args), engram_refs.engram_hash_ref(*args))


@case("engram_fused_weight_kernel")
def engram_fused_weight():
    a, b = (torch.randn(MHC, 512).bfloat16() for _ in range(2))
    equal(tk.engram.fused_weight(a, b), a.float() * b.float())


@case("engram_grad_w_reduce_kernel")
def engram_grad_w_reduce():
    partial = torch.randn(8, MHC, 512)
    wh, we = (torch.randn(MHC, 512).bfloat16() for _ in range(2))
    grads = [torch.randn(MHC, 512) for _ in range(2)]
    want_h, want_e = grads[0] + partial.sum(0) * we.float(), grads[1] + partial.sum(0) * wh.float()
    tk.engram.grad_w_reduce(partial, wh, we, *grads)
    similar(grads[0], want_h, 1e-10)
    similar(grads[1], want_e, 1e-10)


def _engram_inputs(tokens: int = 5, hidden: int = 1024):
    x, k = (torch.randn(tokens, MHC, hidden).bfloat16() for _ in range(2))
    v = torch.randn(tokens, hidden).bfloat16()
    wh, we = (torch.randn(MHC, hidden).bfloat16() for _ in range(2))
    return x, k, v, wh, we


@case("engram_gate_fwd_kernel")
def engram_gate_fwd():
    x, k, v, wh, we = _engram_inputs()
    want = engram_refs.engram_gate_ref(x, k, v, wh, we, 1e-6, 1e-20, save_for_backward=True)
    args = (x, k, v, wh.float() * we.float(), 1e-20, 1e-6)
    got = tk.engram.engram_gate_fwd(*args, save_for_backward=True)
    for g, w in zip(got[1:], want[1:], strict=True):
        similar(g, w, 2e-10)
    # A gate is off by its last bits (more where its square root is of a small sum), the output then by at
    # most a bf16 step: over as few elements as these, the library's mean measure is that of single steps.
    close(got[0], want[0], rtol=2**-7, atol=1e-4)
    equal(tk.engram.engram_gate_fwd(*args, save_for_backward=False)[0], got[0])


@case("engram_gate_bwd_kernel")
def engram_gate_bwd():
    x, k, v, wh, we = _engram_inputs()
    leaves = [t.clone().requires_grad_() for t in (x, k, v, wh.float(), we.float())]
    out, *saved = engram_refs.engram_gate_ref(*leaves, 1e-6, 1e-20, save_for_backward=True)
    grad_out = torch.randn_like(x)
    out.backward(grad_out)
    fused = wh.float() * we.float()
    saved = [s.detach() for s in saved]
    gx, gk, gv, partial = tk.engram.engram_gate_bwd(grad_out, x, k, v, fused, *saved, 1e-6)
    gw = partial.sum(0)
    got = (gx, gk, gv, gw * we.float(), gw * wh.float())
    for g, leaf in zip(got, leaves, strict=True):
        assert leaf.grad is not None
        similar(g, leaf.grad, 1e-8)
