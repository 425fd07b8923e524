"""Sparse attention of a portion of queries: each attends to the entries that its indices name (report 2.3).

A block has 64 heads of one query, or all of a shard that has fewer; what it does, and the order of every
sum, is in `prefill_tile`.
Design and measurements: docs/attention.md.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import reference
from dsv4_kernels.attention.prefill_tile import BLOCK_HEADS, HEAD_DIM, THREADS, make_attend
from dsv4_kernels.contract import Contract, require_input, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.own_sync import own_sync

NAME = "sparse_prefill"
HEAD_GROUP = 8  # heads that a shard is a multiple of: 16 bytes of codes
SHARDS = (8, 16, 32, 64, 128)  # heads of tensor-parallel ranks, Flash and Pro


CONTRACT = Contract(
    (
        "0 <= m",
        "m <= MAX_TOKENS",
        "0 <= n",
        "n <= MAX_ENTRIES",
        "0 < topk",
        "topk <= MAX_TOPK",
        "0 < num_heads",
        "num_heads % HEAD_GROUP == 0",
        "num_heads <= MAX_HEADS",
    ),
    consts={
        "MAX_TOKENS": 1 << 20,
        "MAX_ENTRIES": 1 << 21,
        "MAX_TOPK": 1 << 20,
        "HEAD_GROUP": HEAD_GROUP,
        "MAX_HEADS": 1 << 10,
    },
)


def make_kernel(num_heads: int) -> Any:
    """Return the PrimFunc for `num_heads` heads; counts of queries, entries and indices stay symbolic."""
    m, n, topk = T.dynamic("m"), T.dynamic("n"), T.dynamic("topk")
    attend, groups = make_attend(n, topk), -(-num_heads // BLOCK_HEADS)

    @T.prim_func
    def sparse_prefill_kernel(
        q: T.Tensor[(m, num_heads, HEAD_DIM), T.bfloat16],
        idx: T.Tensor[(m, topk), T.int32],
        kv: T.Tensor[(n, HEAD_DIM), T.bfloat16],
        sink: T.Tensor[(num_heads,), T.float32],
        out: T.Tensor[(m, num_heads, HEAD_DIM), T.bfloat16],
        lse: T.Tensor[(m, num_heads), T.float32],
    ):
        # A query's heads are neighbours in the grid: they gather the same rows at the same time.
        with T.Kernel(m * groups, threads=THREADS) as block:
            token, bh = block // groups, block % groups  # pyright: ignore[reportOperatorIssue]
            out_tile = T.alloc_shared((BLOCK_HEADS, HEAD_DIM), T.bfloat16)
            attend(q, idx, kv, sink, lse, token, bh, out_tile)
            T.copy(out_tile, out[token, bh * BLOCK_HEADS, 0])

    return own_sync(sparse_prefill_kernel)


def _empty_outputs(
    q: torch.Tensor, idx: torch.Tensor, kv: torch.Tensor, sink: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


def check(name: str, q: torch.Tensor, idx: torch.Tensor, kv: torch.Tensor) -> None:
    """Check these arguments of `sparse_prefill`.

    Raises:
        ContractError: a clause of CONTRACT, a dtype, a device or a shape does not hold.
    """
    require_tensor(name, "q", q, dtype=torch.bfloat16, ndim=3)
    require_tensor(name, "idx", idx, dtype=torch.int32, ndim=2, device=q.device)
    require_tensor(name, "kv", kv, dtype=torch.bfloat16, ndim=2, device=q.device)
    m, num_heads, _ = q.shape
    n, topk = kv.shape[0], idx.shape[1]
    CONTRACT.check(name, m=m, n=n, topk=topk, num_heads=num_heads)
    require_shape(name, "q", q, (m, num_heads, HEAD_DIM))
    require_shape(name, "idx", idx, (m, topk))
    require_shape(name, "kv", kv, (n, HEAD_DIM))


@operator(NAME, _empty_outputs)
def sparse_prefill(
    q: torch.Tensor, idx: torch.Tensor, kv: torch.Tensor, sink: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend each query to the entries that its indices name; K and V are the same entry.

    Logits are q . k / sqrt(512); weights are exp(logit) over the sum of all exp(logit) and exp(sink).

    Args:
        q: [m, num_heads, 512] bf16, num_heads a multiple of 8; m = 0 is allowed. Of the last 64 heads
            of a token those that there are, are read and written, no more.
        idx: [m, topk] int32, in any order; one outside 0..n-1 (by custom -1) is masked. An entry that is
            named twice counts twice.
        kv: [n, 512] bf16: window and selected entries, as attention sees them; n = 0 is allowed.
        sink: [num_heads] fp32, a logit without a value that joins the denominator; -inf: none.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        out: [m, num_heads, 512] bf16; zeros where nothing is attended.
        lse: [m, num_heads] fp32, natural, without the sink; +inf where nothing is attended.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    check(NAME, q, idx, kv)
    m, num_heads, _ = q.shape
    require_input(NAME, "sink", sink, (num_heads,), dtype=torch.float32, device=q.device)
    if runtime.uses_reference(q):
        return reference.sparse_attention(q, idx, kv, sink)
    out, lse = _empty_outputs(q, idx, kv, sink)
    if m:
        runtime.launch(make_kernel, _variant(num_heads).kwargs, (q, idx, kv, sink, out, lse))
    return out, lse


@cache
def _variant(num_heads: int) -> Variant:
    return Variant(f"h{num_heads}", {"num_heads": num_heads})


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Return random inputs; indices just outside are as likely as others, and one query has no key."""
    generator = torch.Generator(device).manual_seed(seed)
    m, n, topk, num_heads = dims["m"], dims["n"], dims["topk"], dims["num_heads"]
    q = torch.randn((m, num_heads, HEAD_DIM), generator=generator, device=device)
    kv = torch.randn((n, HEAD_DIM), generator=generator, device=device)
    idx = torch.randint(-1, n + 1, (m, topk), generator=generator, device=device, dtype=torch.int32)
    if m > 1:
        idx[m // 2] = -1
    sink = torch.randn(num_heads, generator=generator, device=device)
    return q.to(torch.bfloat16), idx, kv.to(torch.bfloat16), sink


def _case(case_id: str, m: int, num_heads: int, topk: int, n: int, *tags: str) -> Case:
    return Case(case_id, {"m": m, "num_heads": num_heads, "topk": topk, "n": n}, tags or ("test",))


SPEC = KernelSpec(
    name=NAME,
    fn=sparse_prefill,
    reference=reference.sparse_attention,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(h) for h in SHARDS),
    select=lambda dims: _variant(dims["num_heads"]),
    contract=CONTRACT,
    cases=(
        _case("empty", 0, 64, 64, 5),
        _case("one-row", 1, 64, 1, 1),
        _case("no-entries", 2, 64, 70, 0),
        _case("ragged", 3, 64, 200, 300),
        _case("pro", 2, 128, 128, 129, "test", "gpu"),
        _case("shard", 2, 16, 70, 129, "test", "gpu"),
        *(_case(f"flash-4096-k640-n8192-h{h}", 4096, h, 640, 8192, "gpu", "bench") for h in SHARDS[:3]),
        *(
            _case(f"flash-4096-k{topk}-n{n}", 4096, 64, topk, n, "gpu", "bench")
            for n in (8192, 65536)
            for topk in (512, 640)
        ),
        *(
            _case(f"pro-4096-k{topk}-n{n}", 4096, 128, topk, n, "gpu", "bench")
            for n in (8192, 65536)
            for topk in (1024, 1152)
        ),
    ),
    tolerance=reference.sparse_attention_tolerance,
    num_bytes=lambda d: (
        d["m"] * (d["num_heads"] * (HEAD_DIM * 4 + 4) + d["topk"] * 4) + d["n"] * HEAD_DIM * 2
    ),
    num_flops=lambda d: d["m"] * d["num_heads"] * d["topk"] * HEAD_DIM * 4,
    peers=("flashmla",),
    source="DeepSeek-V4 report 2.3; FlashMLA's conventions for masked queries",
    small={"m": 1, "n": 3, "topk": 130, "num_heads": 64},
)
