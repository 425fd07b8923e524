"""How peers are called for the attention kernels; packages are imported inside."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dsv4_kernels.attention.reference import range_lists
from dsv4_kernels.registry import get_kernel

SEED = 0
_HEAD_DIM = 512
_INDEX_DIM = 128
_PAGE_ROWS = 64
_TILE_KEYS = 256  # of our contiguous keys, whose number counts tiles
_PART_PAGES = 16  # of our tables, whose width counts parts
_LIST_KEYS = 128  # of which FlashMLA's lists have a multiple


def sparse_prefill(dims: Mapping[str, int]) -> Callable[[], Any]:
    """Return FlashMLA's SM90 sparse prefill with a sink, on random entries."""
    import flash_mla  # pyright: ignore[reportMissingImports]

    generator = torch.Generator("cuda").manual_seed(SEED)
    m, n, topk, num_heads = (dims[name] for name in ("m", "n", "topk", "num_heads"))

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    q, kv = randn(m, num_heads, _HEAD_DIM).to(torch.bfloat16), randn(n, 1, _HEAD_DIM).to(torch.bfloat16)
    idx = torch.randint(0, n, (m, 1, topk), generator=generator, device="cuda", dtype=torch.int32)
    args = (q, kv, idx, _HEAD_DIM**-0.5, _HEAD_DIM, randn(num_heads))
    return lambda: flash_mla.flash_mla_sparse_fwd(*args, use_legacy=True)


def hca_prefill(dims: Mapping[str, int]) -> Callable[[], Any]:
    """Return FlashMLA's SM90 sparse prefill with lists of what each query sees, there already."""
    import flash_mla  # pyright: ignore[reportMissingImports]

    q, *ranges, kv, sink = get_kernel("hca_prefill").make_inputs(dims, torch.device("cuda"), SEED)
    idx = range_lists(*ranges)
    idx = torch.nn.functional.pad(idx, (0, -idx.shape[1] % _LIST_KEYS), value=-1)
    args = (q, kv[:, None], idx[:, None], _HEAD_DIM**-0.5, _HEAD_DIM, sink)
    return lambda: flash_mla.flash_mla_sparse_fwd(*args, use_legacy=True)


def hca_prefill_listed(dims: Mapping[str, int]) -> Callable[[], Any]:
    """Return our `sparse_prefill` with that list."""
    q, *ranges, kv, sink = get_kernel("hca_prefill").make_inputs(dims, torch.device("cuda"), SEED)
    args = (q, range_lists(*ranges), kv, sink)
    return lambda: get_kernel("sparse_prefill").fn(*args)


def index_logits_paged(dims: Mapping[str, int]) -> Callable[[], Any]:
    """Return DeepGEMM's paged logits of FP8 keys for as many queries and keys; `next_n` tokens a request."""
    import deep_gemm  # pyright: ignore[reportMissingImports]

    generator = torch.Generator("cuda").manual_seed(SEED)
    m, num_heads, next_n = dims["m"], dims["num_heads"], dims.get("next_n", 1)
    pages = dims["num_parts"] * _PART_PAGES
    keys = torch.randn(m * pages * _PAGE_ROWS, _INDEX_DIM, generator=generator, device="cuda")
    values = keys.to(torch.float8_e4m3fn).view(torch.uint8).view(m * pages, -1)
    scales = torch.rand(m * pages, _PAGE_ROWS, generator=generator, device="cuda").view(torch.uint8)
    cache = torch.cat((values, scales), dim=1).view(m * pages, _PAGE_ROWS, 1, _INDEX_DIM + 4)
    del keys, values
    table = torch.arange(m * pages, dtype=torch.int32, device="cuda").view(m, pages)
    lengths = torch.full((m, 1), pages * _PAGE_ROWS, dtype=torch.int32, device="cuda")
    if next_n > 1:
        lengths = lengths.expand(m, next_n).contiguous()
    q = torch.randn(m, next_n, num_heads, _INDEX_DIM, generator=generator, device="cuda")
    weights = torch.randn(m * next_n, num_heads, generator=generator, device="cuda")
    plan = deep_gemm.get_paged_mqa_logits_metadata(lengths, _PAGE_ROWS, deep_gemm.get_num_sms())
    args = (q.to(torch.float8_e4m3fn), cache, weights, lengths, table, plan, pages * _PAGE_ROWS)
    return lambda: deep_gemm.fp8_paged_mqa_logits(*args, clean_logits=False)


def index_logits(dims: Mapping[str, int]) -> Callable[[], Any]:
    """Return DeepGEMM's logits of contiguous FP8 keys, all of them visible."""
    import deep_gemm  # pyright: ignore[reportMissingImports]

    generator = torch.Generator("cuda").manual_seed(SEED)
    m, n, num_heads = dims["m"], dims["num_tiles"] * _TILE_KEYS, dims["num_heads"]
    q = torch.randn(m, num_heads, _INDEX_DIM, generator=generator, device="cuda").to(torch.float8_e4m3fn)
    keys = torch.randn(n, _INDEX_DIM, generator=generator, device="cuda").to(torch.float8_e4m3fn)
    weights = torch.randn(m, num_heads, generator=generator, device="cuda")
    scale = torch.rand(n, generator=generator, device="cuda")
    first = torch.zeros(m, dtype=torch.int32, device="cuda")
    args = (q, (keys, scale), weights, first, torch.full_like(first, n))
    return lambda: deep_gemm.fp8_mqa_logits(*args, clean_logits=False)


FLASHMLA: Mapping[str, Callable[[Mapping[str, int]], Callable[[], Any]]] = {
    "sparse_prefill": sparse_prefill,
    "hca_prefill": hca_prefill,
}
# (set-up, how its work differs from ours)
DEEPGEMM: Mapping[str, tuple[Callable[[Mapping[str, int]], Callable[[], Any]], str]] = {
    "index_logits": (index_logits, "all keys visible"),
    "index_logits_paged": (index_logits_paged, "full length"),
    "index_logits_fp4": (index_logits_paged, "full length; FP8 keys: twice our bytes"),
    "index_logits_fp4_dense": (index_logits, "all keys visible; FP8 keys: twice our bytes"),
}
