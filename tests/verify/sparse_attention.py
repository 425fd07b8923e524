"""A sparse-attention kernel to interpret: gather, online softmax, attention sink."""

from typing import Any

import torch
from tilelang import language as T

LOG2_E = 1.4426950408889634
_EMPTY = -(2.0**30)  # below any logit, and finite so that a difference of two is no nan


def make_kernel(num_heads: int, head_dim: int, num_keys: int, block_keys: int = 64) -> Any:
    """Return a PrimFunc: each query attends to `num_keys` gathered rows of one shared key-value head."""
    m, kv_len = T.dynamic("m"), T.dynamic("kv_len")
    scale = LOG2_E / head_dim**0.5

    @T.prim_func
    def sparse_attention(
        q: T.Tensor[(m, num_heads, head_dim), T.bfloat16],
        kv: T.Tensor[(kv_len, head_dim), T.bfloat16],
        idx: T.Tensor[(m, num_keys), T.int32],
        sink: T.Tensor[(num_heads,), T.float32],
        out: T.Tensor[(m, num_heads, head_dim), T.bfloat16],
    ):
        with T.Kernel(m, threads=256) as bm:
            q_shared = T.alloc_shared((num_heads, head_dim), T.bfloat16)
            kv_shared = T.alloc_shared((block_keys, head_dim), T.bfloat16)
            is_key = T.alloc_fragment((block_keys,), T.bool)
            logits = T.alloc_fragment((num_heads, block_keys), T.float32)
            weights = T.alloc_shared((num_heads, block_keys), T.bfloat16)
            acc = T.alloc_fragment((num_heads, head_dim), T.float32)
            top = T.alloc_fragment((num_heads,), T.float32)
            top_before = T.alloc_fragment((num_heads,), T.float32)
            total = T.alloc_fragment((num_heads,), T.float32)
            block_total = T.alloc_fragment((num_heads,), T.float32)

            T.copy(q[bm, 0, 0], q_shared)
            T.fill(acc, 0)
            T.fill(total, 0)
            T.fill(top, _EMPTY)
            for block in T.Pipelined(num_keys // block_keys, num_stages=2):
                for j in T.Parallel(block_keys):
                    is_key[j] = idx[bm, block * block_keys + j] >= 0
                for j, d in T.Parallel(block_keys, head_dim):
                    kv_shared[j, d] = T.if_then_else(
                        is_key[j], kv[idx[bm, block * block_keys + j], d], T.cast(0.0, T.bfloat16)
                    )
                T.gemm(q_shared, kv_shared, logits, transpose_B=True, clear_accum=True)
                for h, j in T.Parallel(num_heads, block_keys):
                    logits[h, j] = T.if_then_else(is_key[j], logits[h, j] * scale, -T.infinity(T.float32))
                T.copy(top, top_before)
                T.reduce_max(logits, top, dim=1, clear=False)
                for h, j in T.Parallel(num_heads, block_keys):
                    logits[h, j] = T.exp2(logits[h, j] - top[h])
                T.reduce_sum(logits, block_total, dim=1)
                for h in T.Parallel(num_heads):
                    total[h] = total[h] * T.exp2(top_before[h] - top[h]) + block_total[h]
                for h, d in T.Parallel(num_heads, head_dim):
                    acc[h, d] *= T.exp2(top_before[h] - top[h])
                T.copy(logits, weights)
                T.gemm(weights, kv_shared, acc)
            for h in T.Parallel(num_heads):
                total[h] += T.exp2(sink[h] * LOG2_E - top[h])
            for h, d in T.Parallel(num_heads, head_dim):
                out[bm, h, d] = acc[h, d] / total[h]

    return sparse_attention


def reference(
    q: torch.Tensor, kv: torch.Tensor, idx: torch.Tensor, sink: torch.Tensor, magnitude: bool = False
) -> torch.Tensor:
    """Return float64 [m, heads, head_dim]: softmax over the keys and the sink, which has no value.

    With `magnitude`, the weighted sum is of absolute values.
    """
    keys = kv.double()[idx.clamp(min=0).long()]
    logits = torch.einsum("mhd,mkd->mhk", q.double(), keys) / q.shape[-1] ** 0.5
    logits = logits.masked_fill((idx < 0).unsqueeze(1), -torch.inf)
    sinks = sink.double().view(1, -1, 1).expand(*logits.shape[:2], 1)
    weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
    return torch.einsum("mhk,mkd->mhd", weights, keys.abs() if magnitude else keys)


def make_inputs(m: int, num_heads: int, head_dim: int, num_keys: int, kv_len: int) -> tuple[Any, ...]:
    """Return seeded inputs; a fifth of the places of `idx` hold no key."""
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(m, num_heads, head_dim, generator=generator).bfloat16()
    kv = torch.randn(kv_len, head_dim, generator=generator).bfloat16()
    idx = torch.randint(0, kv_len, (m, num_keys), generator=generator, dtype=torch.int32)
    idx = torch.where(torch.rand(idx.shape, generator=generator) < 0.2, -1, idx)
    return q, kv, idx, torch.randn(num_heads, generator=generator)
