"""How each peer is called for a kernel of ours: public entry points, the way their users call them.

An adapter takes (kernel, dims) and returns calls; each call's `setup` makes random inputs, does what a
user does once (weight layout, compilation) and returns the function to time. Packages are imported
inside, in the peer's own process.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench import attention_peers, megamoe_humming, products
from bench.attention_peers import FLASHMLA
from bench.peak import e4m3_matmul
from dsv4_kernels.gemm.grouped_cases import counts_of
from dsv4_kernels.registry import get_kernel

SEED = 0
_DENSE_FP4 = ("fp8_fp4_gemm", "fp8_fp4_gemm_folded", "fp8_fp4_gemm_widened")
_GROUPED_FP4 = ("grouped_fp8_fp4_gemm", "grouped_fp8_fp4_gemm_exact")
_GROUPED = ("grouped_fp8_gemm", *_GROUPED_FP4)
_MEGA_MOE = "mega_moe"
_DECODE, _DECODE_FP8, _DECODE_PARTS = "sparse_decode", "sparse_decode_fp8", "sparse_parts"
_HCA = ("hca_chunks", "hca_groups")
# Kernels that move bytes and compute little.
_MOVERS = (
    *("compressor", "index_compressor", "state_write", "cache_write", "cache_read", "index_cache_write"),
    *("index_cache_read", "index_key_write"),
    *("kv_entry", "q_norm_rope", "hadamard_fp4", "hadamard_fp8", "fp4_widen", "fold_parts"),
)
_MASKED_ROWS = 1536  # of the largest expert, up to which the masked layout is timed too
_SCALE_BLOCK = 128  # channels an FP8 scale, DeepSeek-V3 and -V4
_FP8_WEIGHTS = "FP8 weights: twice our weight bytes"
_BF16_OUTPUT = "its output is bf16, neither rotated back nor cast"
_MX_BLOCK = 32  # channels a UE8M0 scale of FP4 weights
_MX_EXPONENTS = (118, 124)  # biased exponents of random weight scales: 2**-9 to 2**-4


@dataclass(frozen=True)
class PeerCall:
    """One way to call a peer.

    Attributes:
        label: `<peer>` or `<peer>/<way>`; names the column.
        setup: returns the function to time.
        note: how its work differs from ours.
        casts_input: it does the work of our chain (`bench.run`), such as the cast of its input.
        compile_ahead: compiles what the first call would, and calls nothing; None: that call does it.
    """

    label: str
    setup: Callable[[], Callable[[], Any]]
    note: str = ""
    casts_input: bool = False
    compile_ahead: Callable[[], None] | None = None


@dataclass(frozen=True)
class Adapter:
    """One peer.

    Attributes:
        calls: (kernel, dims) -> the ways to call it.
        kernels: ours that it has a counterpart of; empty for all.
    """

    calls: Callable[[str, Mapping[str, int]], list[PeerCall]]
    kernels: tuple[str, ...] = ()

    def supports(self, kernel: str) -> bool:
        """Return whether the peer can be timed beside `kernel`."""
        return not self.kernels or kernel in self.kernels


def _randn(*shape: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(SEED)
    return torch.randn(*shape, generator=generator, device="cuda").to(torch.bfloat16)


def torch_scaled_mm(kernel: str, dims: Mapping[str, int]) -> list[PeerCall]:
    """PyTorch's FP8 matmul: one scale a tensor, and cuBLASLt's 1x128 by 128x128 blocks."""
    m, n, k = dims["m"], dims["n"], dims["k"]

    def operands() -> tuple[torch.Tensor, torch.Tensor]:
        return _randn(m, k).to(torch.float8_e4m3fn), _randn(n, k).to(torch.float8_e4m3fn)

    def tensorwise() -> Callable[[], Any]:
        a, b = operands()
        return lambda: e4m3_matmul(a, b)

    def blockwise() -> Callable[[], Any]:
        from torch.nn.functional import ScalingType, scaled_mm

        a, b = operands()
        scale_a = torch.ones(k // _SCALE_BLOCK, m, device="cuda").T  # column-major, as cuBLASLt wants it
        scale_b = torch.ones(n // _SCALE_BLOCK, k // _SCALE_BLOCK, device="cuda").T
        return lambda: scaled_mm(
            a, b.T, scale_a, ScalingType.BlockWise1x128, scale_b, ScalingType.BlockWise128x128
        )

    weights = "" if kernel == "fp8_gemm" else _FP8_WEIGHTS
    return [
        PeerCall("torch_scaled_mm/tensorwise", tensorwise, f"{weights}; one scale a tensor".lstrip("; ")),
        PeerCall("torch_scaled_mm/blockwise", blockwise, weights),
    ]


def deepgemm(kernel: str, dims: Mapping[str, int]) -> list[PeerCall]:
    """DeepGEMM's `fp8_gemm_nt`, 1x128 by 128x128 scales, or what it has for the other products."""
    if kernel in attention_peers.DEEPGEMM:
        prepare, note = attention_peers.DEEPGEMM[kernel]
        return [PeerCall("deepgemm", lambda: prepare(dims), note)]
    if kernel in products.DEEPGEMM:
        return [
            PeerCall(f"deepgemm{way}", setup, note) for way, setup, note in products.DEEPGEMM[kernel](dims)
        ]
    if kernel in _GROUPED:
        return _deepgemm_grouped(kernel, dims)
    m, n, k = dims["m"], dims["n"], dims["k"]

    def setup() -> Callable[[], Any]:
        import deep_gemm  # pyright: ignore[reportMissingImports]
        from deep_gemm.utils import (  # pyright: ignore[reportMissingImports]
            per_block_cast_to_fp8,
            per_token_cast_to_fp8,
        )

        x, x_scale = per_token_cast_to_fp8(_randn(m, k), use_ue8m0=False)
        # Its users keep scales in the layout that TMA reads, so the transpose is no part of the call.
        a = (x, deep_gemm.get_mn_major_tma_aligned_tensor(x_scale))
        b = per_block_cast_to_fp8(_randn(n, k), use_ue8m0=False)
        out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
        return lambda: deep_gemm.fp8_gemm_nt(a, b, out, disable_ue8m0_cast=True)

    return [PeerCall("deepgemm", setup, "" if kernel == "fp8_gemm" else _FP8_WEIGHTS)]


def torch_matmul(kernel: str, dims: Mapping[str, int]) -> list[PeerCall]:
    """PyTorch's bf16 products: cuBLAS."""
    return [
        PeerCall(f"torch_matmul{way}", setup, note)
        for way, setup, note in products.TORCH_MATMUL[kernel](dims)
    ]


def humming(kernel: str, dims: Mapping[str, int]) -> list[PeerCall]:
    """Humming's MXFP4 weights by e4m3 activations, by default and batch-invariant.

    Its layer takes bf16 and casts to e4m3 with one scale a token inside the call; handed a cast input
    and its scale, it runs the product alone (`/gemm`).
    """
    if kernel == _MEGA_MOE:
        return _humming_chain(dims)
    if kernel in _GROUPED:
        return _humming_grouped(dims)
    m, n, k = dims["m"], dims["n"], dims["k"]

    def setup(batch_invariant: bool, cast_inside: bool) -> Callable[[], Any]:
        layer = _humming_layer(n, k)
        x = _randn(m, k)
        configs = _humming_configs(n, k, m, batch_invariant)
        if cast_inside:
            return lambda: layer(x, **configs)
        from humming.forward import may_quant_input  # pyright: ignore[reportMissingImports]

        cast, scale = may_quant_input(layer.humming_config, x)
        return lambda: layer(cast, input_scale=scale, **configs)

    cast, alone = "includes its cast of x from bf16; one scale a token of x", "one scale a token of x"
    default, invariant = _humming_ahead(n, k, m, False), _humming_ahead(n, k, m, True)
    return [
        PeerCall("humming", lambda: setup(False, True), cast, True, default),
        PeerCall("humming/batch-invariant", lambda: setup(True, True), cast, True, invariant),
        PeerCall("humming/gemm", lambda: setup(False, False), alone, False, default),
        PeerCall("humming/gemm-batch-invariant", lambda: setup(True, False), alone, False, invariant),
    ]


@cache
def _humming_ahead(
    n: int, k: int, rows: int, batch_invariant: bool, experts: int | None = None
) -> Callable[[], None]:
    """Return what compiles the kernel that Humming would choose for so many rows, and its cast."""

    @cache  # calls with and without the cast share them
    def compile_ahead() -> None:
        from humming.forward import may_quant_input  # pyright: ignore[reportMissingImports]
        from humming.kernel.humming import HummingKernel  # pyright: ignore[reportMissingImports]

        layer = _humming_layer(n, k, experts)
        configs = _humming_configs(n, k, rows, batch_invariant, experts)
        HummingKernel.prepare_kernels(layer.humming_config.to_str(), *map(json.dumps, configs.values()))
        may_quant_input(layer.humming_config, _randn(1, k))  # compiles the cast

    return compile_ahead


@cache
def _humming_configs(
    n: int, k: int, rows: int, batch_invariant: bool, experts: int | None = None
) -> Mapping[str, Any]:
    """Return how to call Humming's product of so many rows.

    Left alone it compiles a kernel for each of the ranges of rows that its table has, up to 160 of them;
    handed the entry that it would choose it compiles that one.
    """
    from humming.tune import get_heuristics_config  # pyright: ignore[reportMissingImports]

    kind = "dense" if experts is None else "grouped_contiguous"
    compute = {"use_batch_invariant": batch_invariant, "gemm_type": kind}
    table = get_heuristics_config(_humming_layer(n, k, experts).humming_config, **compute)
    chosen = next(entry for above, up_to, entry in table if above < rows <= up_to)
    return {"compute_config": compute, "tuning_config": chosen}


@cache
def _humming_layer(n: int, k: int, experts: int | None = None) -> Any:
    """Return a layer with random packed weights (of each expert, if there are any), in its own layout."""
    from humming.layer import HummingLayer  # pyright: ignore[reportMissingImports]

    layer = HummingLayer(
        shape_n=n,
        shape_k=k,
        weight_config={"quant_method": "mxfp4"},
        input_config={"dtype": "float8e4m3"},
        torch_dtype=torch.bfloat16,
        **({} if experts is None else {"num_experts": experts}),
    ).cuda()
    weight, scale = _mx_weights(n, k, experts)
    layer.load_state_dict({"weight": weight, "weight_scale": scale}, strict=False)
    layer.transform()
    return layer


def _mx_weights(n: int, k: int, experts: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random packed e2m1 [n, k / 2] and UE8M0 scales [n, k / 32], of each expert if there are any."""
    generator = torch.Generator("cuda").manual_seed(SEED)
    rows = (n,) if experts is None else (experts, n)

    def octets(low: int, high: int, columns: int) -> torch.Tensor:
        return torch.randint(
            low, high, (*rows, columns), generator=generator, device="cuda", dtype=torch.uint8
        )

    return octets(0, 256, k // 2), octets(*_MX_EXPONENTS, k // _MX_BLOCK)


def _grouped_fp8(dims: Mapping[str, int]) -> tuple[Any, list[int], Any, Callable[..., Any]]:
    """Return DeepGEMM, the rows of each expert, its weights, and a maker of so many rows of x."""
    import deep_gemm  # pyright: ignore[reportMissingImports]
    from deep_gemm.utils import (  # pyright: ignore[reportMissingImports]
        per_block_cast_to_fp8,
        per_token_cast_to_fp8,
    )

    n, k, experts = dims["n"], dims["k"], dims["num_experts"]
    values, scales = per_block_cast_to_fp8(_randn(n, k), use_ue8m0=False)
    weights = values.expand(experts, n, k).contiguous(), scales.expand(experts, *scales.shape).contiguous()

    def rows(*shape: int) -> Any:
        x, scale = per_token_cast_to_fp8(_randn(_product(shape), k), use_ue8m0=False)
        scale = scale.view(*shape, -1)
        return x.view(*shape, k), deep_gemm.get_mn_major_tma_aligned_tensor(scale)

    return deep_gemm, counts_of(dims), weights, rows


def _deepgemm_grouped(kernel: str, dims: Mapping[str, int]) -> list[PeerCall]:
    """DeepGEMM's grouped FP8 products; its contiguous layout aligns experts to 128 rows."""
    n, experts = dims["n"], dims["num_experts"]

    def contiguous() -> Callable[[], Any]:
        deep_gemm, counts, weights, rows = _grouped_fp8(dims)
        align = deep_gemm.get_mk_alignment_for_contiguous_layout()
        padded = [-(-count // align) * align for count in counts]
        layout = torch.full((sum(padded),), -1, dtype=torch.int32)
        for e, count in enumerate(counts):
            layout[sum(padded[:e]) : sum(padded[:e]) + count] = e
        x, layout = rows(len(layout)), layout.cuda()
        out = torch.empty(len(layout), n, dtype=torch.bfloat16, device="cuda")
        call = deep_gemm.m_grouped_fp8_gemm_nt_contiguous
        return lambda: call(x, weights, out, layout, disable_ue8m0_cast=True)

    def masked() -> Callable[[], Any]:
        deep_gemm, counts, weights, rows = _grouped_fp8(dims)
        max_m = -(-max(counts) // _SCALE_BLOCK) * _SCALE_BLOCK
        x, mask = rows(experts, max_m), torch.tensor(counts, dtype=torch.int32, device="cuda")
        out = torch.empty(experts, max_m, n, dtype=torch.bfloat16, device="cuda")
        expected = max(1, sum(counts) // experts)
        call = deep_gemm.m_grouped_fp8_gemm_nt_masked
        return lambda: call(x, weights, out, mask, expected, disable_ue8m0_cast=True)

    note = _FP8_WEIGHTS if "fp4" in kernel else ""
    calls = [PeerCall("deepgemm/contiguous", contiguous, note)]
    if max(counts_of(dims)) <= _MASKED_ROWS:
        calls.append(PeerCall("deepgemm/masked", masked, note))
    return calls


def _humming_grouped(dims: Mapping[str, int]) -> list[PeerCall]:
    """Humming's MXFP4 experts by e4m3 activations, by default and batch-invariant; casts x inside or not."""
    n, k, experts, counts = dims["n"], dims["k"], dims["num_experts"], counts_of(dims)
    rows = sum(counts)

    def setup(batch_invariant: bool, cast_inside: bool) -> Callable[[], Any]:
        layer = _humming_layer(n, k, experts)
        ends = torch.tensor([0, *counts], device="cuda").cumsum(0)
        x = _randn(rows, k)
        configs = _humming_configs(n, k, rows, batch_invariant, experts)
        if cast_inside:
            return lambda: layer(x, expert_layout=ends, **configs)
        from humming.forward import may_quant_input  # pyright: ignore[reportMissingImports]

        cast, scale = may_quant_input(layer.humming_config, x)
        return lambda: layer(cast, input_scale=scale, expert_layout=ends, **configs)

    cast, alone = "includes its cast of x from bf16; one scale a token of x", "one scale a token of x"
    default, invariant = (_humming_ahead(n, k, rows, chosen, experts) for chosen in (False, True))
    return [
        PeerCall("humming", lambda: setup(False, True), cast, True, default),
        PeerCall("humming/gemm", lambda: setup(False, False), alone, False, default),
        PeerCall("humming/gemm-batch-invariant", lambda: setup(True, False), alone, False, invariant),
    ]


def _humming_chain(dims: Mapping[str, int]) -> list[PeerCall]:
    """The expert layer from Humming's products, by default and batch-invariant, see `megamoe_humming`."""
    hidden, inter, experts = (dims[name] for name in ("hidden", "inter", "experts"))
    rows = dims["tokens"] * megamoe_humming.TOPK

    def call(label: str, batch_invariant: bool) -> PeerCall:
        def configs_of(n: int, k: int) -> Mapping[str, Any]:
            return _humming_configs(n, k, rows, batch_invariant, experts)

        def ahead() -> None:
            for n, k in ((2 * inter, hidden), (hidden, inter)):
                _humming_ahead(n, k, rows, batch_invariant, experts)()

        def setup() -> Callable[[], Any]:
            return megamoe_humming.setup(dims, _humming_layer, _mx_weights, configs_of)

        return PeerCall(label, setup, megamoe_humming.NOTE, False, ahead)

    return [call("humming/chain", False), call("humming/chain-batch-invariant", True)]


def _product(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def flashmla(kernel: str, dims: Mapping[str, int]) -> list[PeerCall]:
    """FlashMLA's sparse prefill, or decode of two paged caches of 584-byte rows (our inputs, as they are).

    Decode of few queries is `sparse_parts` and a fold, which its call is held against; HCA decode is one of
    two kernels and a fold, and to FlashMLA a list of all entries.
    """
    if kernel in FLASHMLA:
        return [PeerCall("flashmla", lambda: FLASHMLA[kernel](dims))]

    def setup() -> Callable[[], Any]:
        import flash_mla  # pyright: ignore[reportMissingImports]

        page_rows, row_bytes = 64, 584
        name = kernel if kernel in _HCA else _DECODE
        inputs = get_kernel(name).make_inputs(dims, torch.device("cuda"), SEED)
        if kernel in _HCA:
            q, window, window_idx, _, table, _ = inputs
            rows_of_page = torch.arange(page_rows, dtype=torch.int32, device="cuda")
            entry, entry_idx = window, (table[..., None] * page_rows + rows_of_page).flatten(1)
            sink = torch.zeros(q.shape[1], device="cuda")
        else:
            q, window, window_idx, _, entry, entry_idx, _, sink = inputs

        def pages(cache: torch.Tensor) -> torch.Tensor:
            sizes = (cache.shape[0], page_rows, 1, row_bytes)
            return cache.as_strided(sizes, (cache.shape[1], row_bytes, row_bytes, 1)).view(
                torch.float8_e4m3fn
            )

        metadata, _ = flash_mla.get_mla_metadata()
        dim = q.shape[-1]
        options = (dim, metadata, None, dim**-0.5, False, True, window_idx[:, None], sink)
        rows = q[:, None], pages(window), None, None
        extra = pages(entry), entry_idx[:, None]
        return lambda: flash_mla.flash_mla_with_kvcache(*rows, *options, *extra, use_legacy=True)

    note = "lists of full length" + (f"; {_BF16_OUTPUT}" if kernel == _DECODE_FP8 else "")
    return [PeerCall("flashmla", setup, note, kernel in (_DECODE_PARTS, *_HCA))]


def listed(kernel: str, dims: Mapping[str, int]) -> list[PeerCall]:
    """Our `sparse_prefill` with a list of what each query sees."""
    del kernel
    return [PeerCall("listed", lambda: attention_peers.hca_prefill_listed(dims), "its list is there already")]


def torch_topk(kernel: str, dims: Mapping[str, int]) -> list[PeerCall]:
    """`torch.topk` of the same scores."""

    def setup() -> Callable[[], Any]:
        scores, *_ = get_kernel(kernel).make_inputs(dims, torch.device("cuda"), SEED)
        return lambda: torch.topk(scores, dims["k"], dim=1)

    return [PeerCall("torch_topk", setup, "in descending order; no lengths; ties as they come")]


def torch_copy(kernel: str, dims: Mapping[str, int]) -> list[PeerCall]:
    """A copy that moves as many bytes, half of them read: what is to be had at this size."""

    def setup() -> Callable[[], Any]:
        source = torch.ones(max(get_kernel(kernel).num_bytes(dims) // 2, 1), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return [PeerCall("torch_copy", setup, "as many bytes, half read and half written")]


def torch_eager(kernel: str, dims: Mapping[str, int]) -> list[PeerCall]:
    """Our PyTorch reference as it stands."""
    spec = get_kernel(kernel)
    inputs = spec.make_inputs(dims, torch.device("cuda"), SEED)
    return [PeerCall("torch_eager", lambda: lambda: spec.reference(*inputs), "the reference, not tuned")]


def torch_compile(kernel: str, dims: Mapping[str, int]) -> list[PeerCall]:
    """Our PyTorch reference through `torch.compile`."""
    spec = get_kernel(kernel)

    def setup() -> Callable[[], Any]:
        inputs = spec.make_inputs(dims, torch.device("cuda"), SEED)
        compiled = torch.compile(spec.reference, dynamic=False)
        return lambda: compiled(*inputs)

    return [PeerCall("torch_compile", setup, "the reference, compiled, not tuned")]


def triton_quant(kernel: str, dims: Mapping[str, int]) -> list[PeerCall]:
    """A plain Triton cast, checked bit for bit before it is timed."""

    def setup() -> Callable[[], Any]:
        from bench import triton_quant as kernels

        spec = get_kernel(kernel)
        inputs = spec.make_inputs(dims, torch.device("cuda"), SEED)
        cast = getattr(kernels, kernel)
        for got, want in zip(cast(*inputs), spec.reference(*inputs), strict=True):
            if not torch.equal(got.view(torch.uint8), want.view(torch.uint8)):
                raise ValueError(f"triton {kernel} differs from the reference")
        return lambda: cast(*inputs)

    return [PeerCall("triton_quant", setup)]


def sglmega(kernel: str, dims: Mapping[str, int]) -> list[PeerCall]:
    """SGLang's FP8 MegaMoE for Hopper at world size 1 (`sgl-deep-gemm`, with its tvm-ffi in `$PEERS/ffi`)."""

    def fused() -> Callable[[], Any]:
        sys.path.insert(1, str(Path(os.environ.get("PEERS", "")) / "ffi"))
        import deep_gemm  # pyright: ignore[reportMissingImports]
        import torch.distributed as dist
        from deep_gemm.utils import (  # pyright: ignore[reportMissingImports]
            per_block_cast_to_fp8,
            per_token_cast_to_fp8,
        )

        if not dist.is_initialized():
            address = "tcp://127.0.0.1:29511"
            dist.init_process_group(
                "nccl", init_method=address, rank=0, world_size=1, device_id=torch.device("cuda:0")
            )
        tokens, hidden, inter, experts = (dims[name] for name in ("tokens", "hidden", "inter", "experts"))
        topk = 6

        def weights(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
            made = (torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(experts))
            casts = [per_block_cast_to_fp8(w, use_ue8m0=False) for w in made]
            return torch.stack([c[0] for c in casts]), torch.stack([c[1] for c in casts])

        l1, l2 = deep_gemm.transform_weights_for_mega_moe_sm90(
            weights(2 * inter, hidden), weights(hidden, inter)
        )
        buffer = deep_gemm.get_symm_buffer_for_sm90_mega_moe(
            dist.group.WORLD, experts, tokens, topk, hidden, inter
        )
        x, scale = per_token_cast_to_fp8(
            torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16), use_ue8m0=False
        )
        buffer.x[:tokens].copy_(x)
        buffer.x_sf[:tokens].copy_(scale)
        buffer.topk_idx[:tokens].copy_(torch.rand(tokens, experts, device="cuda").topk(topk).indices)
        buffer.topk_weights[:tokens].copy_(torch.rand(tokens, topk, device="cuda"))
        y = torch.empty(tokens, hidden, device="cuda", dtype=torch.bfloat16)
        return lambda: deep_gemm.fp8_mega_moe(y, l1, l2, buffer, activation_clamp=10.0)

    return [PeerCall("sglmega", fused, _FP8_WEIGHTS)]


ADAPTERS: Mapping[str, Adapter] = {
    "sglmega": Adapter(sglmega, (_MEGA_MOE,)),
    "torch_scaled_mm": Adapter(torch_scaled_mm, ("fp8_gemm", "fp8_fp4_gemm")),
    "deepgemm": Adapter(
        deepgemm,
        (
            *("fp8_gemm", *_DENSE_FP4, *products.DEEPGEMM, *_GROUPED),
            *attention_peers.DEEPGEMM,
        ),
    ),
    "humming": Adapter(humming, (*_DENSE_FP4, *_GROUPED_FP4, _MEGA_MOE)),
    "torch_matmul": Adapter(torch_matmul, tuple(products.TORCH_MATMUL)),
    "flashmla": Adapter(flashmla, (_DECODE, _DECODE_FP8, _DECODE_PARTS, *_HCA, *FLASHMLA)),
    "listed": Adapter(listed, ("hca_prefill",)),
    "torch_copy": Adapter(torch_copy, _MOVERS),
    "torch_topk": Adapter(torch_topk, ("topk",)),
    "torch_eager": Adapter(torch_eager),
    "torch_compile": Adapter(torch_compile),
    "triton_quant": Adapter(triton_quant, ("act_quant", "fp4_quant")),
}
