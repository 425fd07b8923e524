"""TileKernels' manifold hyper-connection kernels, forward and backward through autograd."""

import importlib

import torch

from tests.verify.tilekernels.cases import MHC, case, close, equal, ops
from verify.interp import addressable

refs = importlib.import_module("tile_kernels.torch.mhc")
HIDDEN = 512
MIXES = MHC * (2 + MHC)


def _both(kernel, reference, leaves, *args):
    """Return the outputs and gradients of both, with the same gradient of the output."""
    results = []
    torch.manual_seed(3)
    grads = None
    for function in (kernel, reference):
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        outs = function(*own, *args)
        outs = outs if isinstance(outs, tuple) else (outs,)
        grads = grads or [torch.randn_like(o) for o in outs]
        torch.autograd.backward(outs, grads)
        results.append((*(o.detach() for o in outs), *(leaf.grad for leaf in own)))
    return list(zip(*results, strict=True))


@case("expand_to_mhc_fwd_kernel", "expand_to_mhc_bwd_kernel")
def expand_to_mhc():
    x = torch.randn(2, 37, 320).bfloat16()
    for got, want in _both(ops.expand_to_mhc, refs.expand_to_mhc_ref, [x], MHC):
        close(got, want)


@case("mhc_sinkhorn_kernel", "mhc_sinkhorn_backward_kernel")
def sinkhorn():
    x = torch.randn(2, 33, MHC, MHC)
    for got, want in _both(ops.sinkhorn_normalize, refs.sinkhorn_normalize_ref, [x], 10, 1e-6):
        close(got, want)


@case("mhc_head_compute_mix_fwd_kernel", "mhc_head_compute_mix_bwd_kernel")
def head_compute_mix():
    leaves = [torch.randn(2, 101, MHC), torch.randn(1), torch.randn(MHC)]
    for got, want in _both(ops.mhc_head_compute_mix, refs.mhc_head_compute_mix_ref, leaves, 1e-2):
        close(got, want, rtol=1e-5, atol=2e-5)


@case("mhc_pre_split_mixes_fwd_kernel", "mhc_pre_split_mixes_bwd_kernel")
def pre_split_mixes():
    leaves = [torch.randn(2, 101, MIXES), torch.randn(3), torch.randn(MIXES)]
    for got, want in _both(ops.mhc_pre_split_mixes, refs.mhc_pre_split_mixes_ref, leaves, MHC, 2.0, 1e-2):
        close(got, want, rtol=1e-5, atol=2e-5)


@case("_mhc_pre_apply_mix_fwd_kernel", "_mhc_pre_apply_mix_bwd_kernel")
def pre_apply_mix():
    x = torch.randn(1, 13, MHC, HIDDEN).bfloat16().sigmoid()
    mix = torch.randn(1, 13, MHC, 1).softmax(-2)
    for got, want in _both(ops.mhc_pre_apply_mix, refs.mhc_pre_apply_mix_ref, [x, mix]):
        close(got, want, atol=1e-2, rtol=1e-3)


@case("_mhc_post_fwd_kernel", "_mhc_post_bwd_kernel")
def post():
    leaves = [
        torch.randn(1, 7, HIDDEN).bfloat16(),
        torch.randn(1, 7, MHC, HIDDEN).bfloat16(),
        torch.randn(1, 7, MHC, 1),
        torch.randn(1, 7, MHC, MHC),
    ]
    pairs = _both(ops.mhc_post, refs.mhc_post_ref, leaves)
    for got, want in pairs[:3]:
        close(got, want)
    for got, want in pairs[3:]:
        close(got, want, atol=1e-4, rtol=1e-4)


@case(
    "_mhc_fn_normw_merge_fwd_",
    "_mhc_fn_normw_merge_bwd_",
    "_mhc_pre_norm_fn_fwd_mul_kernel",
    "_mhc_pre_norm_fn_fwd_norm_kernel",
    "_mhc_pre_norm_fn_bwd_norm_kernel",
    "_mhc_pre_norm_fn_bwd_mul_kernel",
)
def pre_norm_fn():
    residual = torch.randn(1, 45, MHC, HIDDEN).bfloat16()
    fn = torch.randn(MIXES, MHC * HIDDEN) * 1e-4
    weight = torch.randn(MHC * HIDDEN) * 0.1 + 1

    def kernel(residual, fn, weight):
        return ops.mhc_pre_norm_fn(residual, fn, weight, 1e-6, fuse_grad_acc=False)

    def reference(residual, fn, weight):
        return refs.mhc_pre_norm_fn_ref(residual, fn, weight, 1e-6)

    pairs = _both(kernel, reference, [residual, fn, weight])
    close(*pairs[0], atol=1e-3, rtol=1e-3)
    close(*pairs[1])
    close(*pairs[2], atol=3e-2, rtol=1e-3)
    close(*pairs[3], atol=3e-2, rtol=1e-3)


@case("mhc_pre_big_fuse")
def pre_big_fuse():
    residual = torch.randn(1, 21, MHC, HIDDEN).bfloat16()
    fn = torch.randn(MIXES, MHC * HIDDEN) * 1e-4
    scale, base = torch.randn(3) * 0.1, torch.randn(MIXES) * 0.1
    got = ops.mhc_pre_big_fuse(residual, fn, scale, base, 1e-6, 1e-6, 1e-6, 1.0, 10, n_splits=16)
    mixes = refs.mhc_pre_norm_fn_ref(residual, fn, None, 1e-6)
    pre, post_mix, comb = refs.mhc_pre_split_mixes_ref(mixes, scale, base, MHC, 1.0, 1e-6)
    close(got[0], post_mix, atol=1e-3, rtol=1e-3)  # the product before is in tf32
    close(got[1], refs.sinkhorn_normalize_ref(comb, 10, 1e-6), atol=1e-3, rtol=1e-3)
    close(got[2], refs.mhc_pre_apply_mix_ref(residual, pre), atol=1e-2, rtol=1e-2)


@case("multilayer_recompute")
def multilayer_recompute():
    for layers, posts in ((1, 1), (3, 2), (3, 3)):
        shape = (1, 9)
        start = torch.randn(*shape, MHC, HIDDEN).bfloat16()
        pre = [torch.randn(*shape, MHC, 1) for _ in range(layers)]
        out = [torch.randn(*shape, HIDDEN).bfloat16() for _ in range(posts)]
        post_mix = [torch.randn(*shape, MHC, 1) for _ in range(posts)]
        comb = [torch.randn(*shape, MHC, MHC) for _ in range(posts)]
        layer_input = [torch.empty(*shape, HIDDEN).bfloat16() for _ in range(layers)]
        residuals = [torch.empty(*shape, MHC, HIDDEN).bfloat16() for _ in range(posts)]
        with addressable(*pre, *out, *post_mix, *comb, *layer_input, *residuals):
            ops.mhc_multilayer_recompute(start, pre, out, post_mix, comb, layer_input, residuals)
        residual = start
        for i in range(layers):
            equal(layer_input[i], ops.mhc_pre_apply_mix(residual, pre[i]))
            if i < posts:
                residual = ops.mhc_post(out[i], residual, post_mix[i], comb[i])
                equal(residuals[i], residual)
