"""The lightning indexer's scores of a portion of queries over contiguous FP8 keys (report 2.3.1).

Keys are the instruction's rows, the heads of two queries its columns: the sum over heads is 16 terms of a
thread's own and two exchanges. A block walks all keys for its queries: one warp asks for them by TMA, and
three warpgroups multiply 64 keys of a tile each. They may be apart by a ring of tiles, so that one's sums run
under another's products; nvcc unrolls the ring. A score depends on its query and key alone.
Design and measurements: docs/attention.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import index_reference
from dsv4_kernels.attention.index_logits import require_heads
from dsv4_kernels.contract import Contract, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.unroll import ring_unrolled

NAME = "index_logits"
DIM = 128
VECTOR = 16  # e4m3 of one read
INSTRUCTION_ROWS = 64
WARPGROUP = 128  # threads
F32_MINUS_INF = 0xFF800000 - (1 << 32)  # as int32
_ROWS = T.GemmWarpPolicy.FullRow


@dataclass(frozen=True)
class Config:
    """Tile and schedule.

    Attributes:
        queries: of a block.
        block_k: keys of a tile, 64 for each warpgroup that multiplies; the last tile may have fewer.
        num_stages: tiles on their way.
        registers: of a thread that multiplies; those that load give them up.
        producer_registers: what they keep.
    """

    queries: int = 2
    block_k: int = 192
    num_stages: int = 8
    registers: int = 160
    producer_registers: int = 32


TILE = 256  # keys that their number is a multiple of
CONTRACT = Contract(
    ("0 <= m", "m <= MAX_QUERIES", "0 < num_tiles", "num_tiles <= MAX_TILES"),
    consts={"MAX_QUERIES": 1 << 20, "MAX_TILES": (1 << 20) // TILE},
)


def make_kernel(num_heads: int, num_tiles: int, config: Config) -> Any:
    """Return the PrimFunc for `num_heads` heads and 256 * num_tiles keys; queries stay symbolic."""
    m = T.dynamic("m")
    queries, block_k, num_keys = config.queries, config.block_k, num_tiles * TILE
    threads = block_k // INSTRUCTION_ROWS * WARPGROUP
    columns = queries * num_heads
    vectors = DIM // VECTOR  # of a row
    # With the loading warpgroup the block's threads are no power of two: one warpgroup reads the queries.
    by_vector = T.Fragment(
        (columns, DIM),
        lambda r, d: (
            (r * vectors + d // VECTOR) % WARPGROUP,
            (r * vectors + d // VECTOR) // WARPGROUP * VECTOR + d % VECTOR,
        ),
    )

    @T.prim_func
    def index_logits_kernel(
        q: T.Tensor[(m, num_heads, DIM), T.float8_e4m3fn],
        weights: T.Tensor[(m, num_heads), T.float32],
        keys: T.Tensor[(num_keys, DIM), T.float8_e4m3fn],
        scale: T.Tensor[(num_keys,), T.float32],
        lengths: T.Tensor[(m,), T.int32],
        out: T.Tensor[(m, num_keys), T.float32],
    ):
        with T.Kernel(T.ceildiv(m, queries), threads=threads) as bm:
            T.annotate_producer_reg_dealloc(config.producer_registers)
            T.annotate_consumer_reg_alloc(config.registers)
            q_tile = T.alloc_shared((columns, DIM), T.float8_e4m3fn)
            key_tile = T.alloc_shared((block_k, DIM), T.float8_e4m3fn)
            length = T.alloc_shared((queries,), T.float32)  # exact: below 2**20, or beyond any key
            weight = T.alloc_fragment((queries, num_heads), T.float32)
            key_scale = T.alloc_fragment((block_k,), T.float32)
            products = T.alloc_fragment((block_k, columns), T.float32)
            weighted = T.alloc_fragment((block_k, queries, num_heads), T.float32)
            score = T.alloc_fragment((block_k, queries), T.float32)
            for r, d in T.Parallel(columns, DIM, loop_layout=by_vector):
                q_tile[r, d] = q[bm * queries + r // num_heads, r % num_heads, d]
            for i in T.Parallel(queries):
                length[i] = T.cast(lengths[bm * queries + i], "float32")
            for i, h in T.Parallel(queries, num_heads):
                weight[i, h] = weights[bm * queries + i, h]
            for k in T.Pipelined(T.ceildiv(num_keys, block_k), num_stages=config.num_stages):
                T.copy(keys[k * block_k, 0], key_tile)
                for j in T.Parallel(block_k):
                    key_scale[j] = T.if_then_else(k * block_k + j < num_keys, scale[k * block_k + j], 0.0)
                T.gemm(key_tile, q_tile, products, transpose_B=True, clear_accum=True, policy=_ROWS)
                for j, i, h in T.Parallel(block_k, queries, num_heads):
                    weighted[j, i, h] = T.max(products[j, i * num_heads + h], 0.0) * weight[i, h]
                T.reduce_sum(weighted, score, dim=2)
                for j, i in T.Parallel(block_k, queries):
                    if k * block_k + j < num_keys:
                        out[bm * queries + i, k * block_k + j] = T.if_then_else(
                            T.cast(k * block_k + j, "float32") < length[i],
                            score[j, i] * key_scale[j],
                            T.reinterpret(F32_MINUS_INF, "float32"),
                        )

    return ring_unrolled(index_logits_kernel, config.num_stages)


def _empty_output(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    return weights.new_empty((q.shape[0], keys.shape[0]))


@operator(NAME, _empty_output)
def index_logits(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Score each query against the keys: sum over heads of weight * relu(q . k), times the key's scale.

    Args:
        q: [m, num_heads, 128] e4m3, num_heads 8, 16, 32 or 64; m = 0 is allowed.
        weights: [m, num_heads] fp32, the scales of q's heads in them.
        keys: [n, 128] e4m3, those of one request; n a multiple of 256. A kernel is compiled for each n, so
            that a buffer may well be larger than what is visible so far.
        scale: [n] fp32, none negative.
        lengths: [m] int32: keys that a query sees.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        [m, n] fp32, -inf from a query's length on.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_tensor(NAME, "q", q, dtype=torch.float8_e4m3fn, ndim=3)
    require_tensor(NAME, "weights", weights, dtype=torch.float32, ndim=2, device=q.device)
    require_tensor(NAME, "keys", keys, dtype=torch.float8_e4m3fn, ndim=2, device=q.device)
    require_tensor(NAME, "scale", scale, dtype=torch.float32, ndim=1, device=q.device)
    require_tensor(NAME, "lengths", lengths, dtype=torch.int32, ndim=1, device=q.device)
    (m, num_heads, _), n = q.shape, keys.shape[0]
    num_tiles = n // TILE
    CONTRACT.check(NAME, m=m, num_tiles=num_tiles)
    require_heads(NAME, num_heads)
    require_shape(NAME, "q", q, (m, num_heads, DIM))
    require_shape(NAME, "weights", weights, (m, num_heads))
    require_shape(NAME, "keys", keys, (num_tiles * TILE, DIM))
    require_shape(NAME, "scale", scale, (n,))
    require_shape(NAME, "lengths", lengths, (m,))
    args = (q, weights, keys, scale, lengths)
    if runtime.uses_reference(q):
        return index_reference.index_logits(*args)
    out = _empty_output(*args)
    if m:
        runtime.launch(make_kernel, _variant(num_heads, num_tiles).kwargs, (*args, out))
    return out


@cache
def _variant(num_heads: int, num_tiles: int) -> Variant:
    kwargs = {"num_heads": num_heads, "num_tiles": num_tiles, "config": Config()}
    return Variant(f"h{num_heads}-n{num_tiles * TILE}", kwargs)


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Return random queries and keys; ragged ones see any number of keys."""
    generator = torch.Generator(device).manual_seed(seed)
    m, n, num_heads = dims["m"], dims["num_tiles"] * TILE, dims["num_heads"]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    q, keys = normal(m, num_heads, DIM), normal(n, DIM)
    scale = torch.rand(n, generator=generator, device=device)
    low = 0 if dims["ragged"] else n
    lengths = torch.randint(low, n + 2, (m,), generator=generator, device=device, dtype=torch.int32)
    return q.to(torch.float8_e4m3fn), normal(m, num_heads), keys.to(torch.float8_e4m3fn), scale, lengths


def _case(case_id: str, m: int, num_heads: int, num_tiles: int, *tags: str) -> Case:
    dims = {"m": m, "num_heads": num_heads, "num_tiles": num_tiles, "ragged": int("bench" not in tags)}
    return Case(case_id, dims, tags or ("test",))


SHIPPED = (4096, 16384, 65536)  # keys
SPEC = KernelSpec(
    name=NAME,
    fn=index_logits,
    reference=index_reference.index_logits,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(64, n // TILE) for n in SHIPPED),
    select=lambda d: _variant(d["num_heads"], d["num_tiles"]),
    contract=CONTRACT,
    cases=(
        _case("empty", 0, 64, 1),
        _case("one-row", 1, 64, 1),
        _case("ragged", 3, 8, 2, "test", "gpu"),
        _case("ragged-h64", 37, 64, 6, "gpu"),
        *(_case(f"m4096-n{n}", 4096, 64, n // TILE, "gpu", "bench") for n in SHIPPED),
    ),
    tolerance=index_reference.index_logits_tolerance,
    num_bytes=lambda d: (
        d["m"] * (d["num_heads"] * (DIM + 4) + 4) + TILE * d["num_tiles"] * (4 * d["m"] + DIM + 4)
    ),
    num_flops=lambda d: 2 * d["m"] * d["num_heads"] * DIM * TILE * d["num_tiles"],
    peers=("deepgemm",),
    row_invariant=False,  # lengths come with the queries: tests/kernels/test_index_logits.py
    source="DeepSeek-V4 report 2.3.1; DeepGEMM's logits of contiguous keys",
    small={"m": 2, "num_heads": 64, "num_tiles": 7},
)
