"""The lightning indexer's scores of a portion of queries over contiguous FP4 keys (report 2.3.1, 5.2.1).

68 bytes a key where `index_logits` reads 132. Each warpgroup widens the 64 keys of a tile that it multiplies
in its own registers, once for a group of eight queries; e4m3 keys are nowhere in memory. Queries and keys are
widened, multiplied and summed in the order of `index_logits_fp4`, so a score has the same bits whether its
key is in a page or not; relu is (x + |x|) * (w / 2), as in `index_logits`.

A block walks its part of the keys, every so many tiles, for its group; few groups have many parts. Pairs of
queries are multiplied one after the other, with two sets of sums in turn: the sums of one pair are taken
while the products of the next one are under way. Each of the four lanes that have a row keeps one pair's
scores, and one store writes those of all queries. One warp asks for keys by TMA, two warpgroups multiply.
Design and measurements: docs/attention.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tilelang import language as T
from tilelang.layout import make_half_bank_swizzled_layout

from dsv4_kernels import runtime
from dsv4_kernels.attention import index_reference
from dsv4_kernels.attention.index_fp4 import (
    DIM,
    SCALES,
    TABLE_FACTOR,
    WORDS,
    key_widening,
    largest_scale,
    query_widening,
    source,
)
from dsv4_kernels.attention.index_logits import F32_MINUS_INF, require_heads
from dsv4_kernels.attention.index_logits_dense import (
    CASES,
    INSTRUCTION_ROWS,
    PAIR,
    TILE,
    WARPGROUP,
    grouped,
    most_parts,
    selector,
    shipped,
)
from dsv4_kernels.contract import Contract, require_shape, require_tensor
from dsv4_kernels.registry import KernelSpec, operator
from dsv4_kernels.tile.late import released_late
from dsv4_kernels.tile.scale import ue8m0_to_f32

NAME = "index_logits_fp4_dense"
WARP = 32  # threads
ROW_GROUP, LANES = 8, 4  # rows of sums that lanes of a warp have side by side, and lanes of a row
_ROWS = T.GemmWarpPolicy.FullRow
QUERIES = 8  # of a group: four pairs
WARPGROUPS = 2  # that multiply, 64 keys of a tile each
CONTRACT = Contract(
    ("0 <= groups", "groups <= MAX_GROUPS", "0 < num_tiles", "num_tiles <= MAX_TILES"),
    consts={"MAX_GROUPS": (1 << 20) // QUERIES, "MAX_TILES": (1 << 20) // TILE},
)


@dataclass(frozen=True)
class Config:
    """Tile and schedule.

    Attributes:
        num_stages: tiles on their way.
        registers: of a thread that multiplies; those that load give them up.
        producer_registers: what they keep.
        parts: of the keys, at most; each has two tiles or more. Tiles go to parts in turn.
    """

    num_stages: int = 4
    registers: int = 240
    producer_registers: int = 24
    parts: int = 1


def make_kernel(num_heads: int, num_tiles: int, config: Config) -> Any:
    """Return the PrimFunc for `num_heads` heads and 256 * num_tiles keys; groups stay symbolic.

    Queries, keys and scales are words: eight codes, four scales.
    """
    groups = T.dynamic("groups")
    num_keys = num_tiles * TILE
    rows = INSTRUCTION_ROWS * WARPGROUPS
    pair, queries = PAIR, QUERIES
    pairs = queries // pair
    columns = pair * num_heads
    threads = WARPGROUP * WARPGROUPS
    tiles = num_keys // rows
    parts = most_parts(tiles, config.parts)
    widen_queries, widen_keys = query_widening(pair, num_heads, threads), key_widening(rows)
    # A row's sums are in all four lanes that have products of it: each lane stores one pair's.
    by_lane = T.Fragment(
        (rows, pairs, pair),
        lambda j, s, i: (
            j // ROW_GROUP // 2 * WARP + j % ROW_GROUP * LANES + s,
            j // ROW_GROUP % 2 * pair + i,
        ),
    )

    @T.macro
    def multiply(keys, q_tile, number, acc):
        T.wgmma_gemm(
            keys,
            q_tile[number * columns : (number + 1) * columns, :],
            acc,
            transpose_B=True,
            clear_accum=True,
            policy=_ROWS,
        )

    @T.macro
    def reduce(acc, weight, number, weighted, score, kept):
        for j, i, h in T.Parallel(rows, pair, num_heads):
            weighted[j, i, h] = (acc[j, i * num_heads + h] + T.abs(acc[j, i * num_heads + h])) * weight[
                number * pair + i, h
            ]
        T.reduce_sum(weighted, score, dim=2)
        for j, s, i in T.Parallel(rows, pairs, pair, loop_layout=by_lane):
            kept[j, s, i] = T.if_then_else(s < number, kept[j, s, i], score[j, i])

    @T.macro
    def store(out, bm, tile, kept, length, scales):
        for j, s, i in T.Parallel(rows, pairs, pair, loop_layout=by_lane):
            if tile < tiles:
                out[bm, s * pair + i, tile * rows + j] = T.if_then_else(
                    T.cast(tile * rows + j, "float32") < length[s * pair + i],
                    kept[j, s, i] * (ue8m0_to_f32(largest_scale(scales[j]), 0) * TABLE_FACTOR),
                    T.reinterpret(F32_MINUS_INF, "float32"),
                )

    @T.prim_func
    def index_logits_fp4_dense_kernel(
        q: T.Tensor[(groups, queries, num_heads, WORDS), T.uint32],
        q_scale: T.Tensor[(groups, queries, num_heads), T.int32],
        weights: T.Tensor[(groups, queries, num_heads), T.float32],
        codes: T.Tensor[(num_keys, WORDS), T.uint32],
        scale: T.Tensor[(num_keys // WORDS, WORDS), T.uint32],
        lengths: T.Tensor[(groups, queries), T.int32],
        out: T.Tensor[(groups, queries, num_keys), T.float32],
    ):
        with T.Kernel(groups, parts, threads=threads) as (bm, part):
            T.import_source(source())
            T.annotate_producer_reg_dealloc(config.producer_registers)
            T.annotate_consumer_reg_alloc(config.registers)
            q_tile = T.alloc_shared((queries * num_heads, DIM), T.float8_e4m3fn)
            w_tile = T.alloc_shared((queries, num_heads), T.float32)
            key_tile = T.alloc_shared((rows, WORDS), T.uint32)
            scale_tile = T.alloc_shared((rows // WORDS, WORDS), T.uint32)
            # Swizzled: a copy of a contiguous run into another one comes without a descriptor, of which
            # nothing is proved.
            T.annotate_layout({t: make_half_bank_swizzled_layout(t) for t in (key_tile, scale_tile)})
            length = T.alloc_shared((queries,), T.float32)
            words = T.alloc_fragment((rows, SCALES, 4), T.uint32)
            scales = T.alloc_fragment((rows,), T.int32)
            keys = T.alloc_fragment((rows, DIM), T.float8_e4m3fn)
            set0 = T.alloc_fragment((rows, columns), T.float32)
            set1 = T.alloc_fragment((rows, columns), T.float32)
            weighted0 = T.alloc_fragment((rows, pair, num_heads), T.float32)
            weighted1 = T.alloc_fragment((rows, pair, num_heads), T.float32)
            score = T.alloc_fragment((rows, pair), T.float32)
            kept = T.alloc_fragment((rows, pairs, pair), T.float32)
            for s in T.serial(pairs):  # a pair at a time: its codes are in registers
                widen_queries(q, q_scale, q_tile, bm, s * pair)
            for n, h in T.Parallel(queries, num_heads):
                head = ue8m0_to_f32(largest_scale(q_scale[bm, n, h]), 0) * TABLE_FACTOR
                w_tile[n, h] = weights[bm, n, h] * head * 0.5
            for n in T.Parallel(queries):
                length[n] = T.cast(lengths[bm, n], "float32")
            for k in T.Pipelined(-(-tiles // parts), num_stages=config.num_stages):
                tile = k * parts + part
                T.copy(codes[tile * rows, 0], key_tile)
                T.copy(scale[tile * (rows // WORDS), 0], scale_tile)
                for j in T.Parallel(rows):
                    scales[j] = T.cast(scale_tile[j // WORDS, j % WORDS], "int32")
                widen_keys(key_tile, scales, words, keys)
                multiply(keys, q_tile, 0, set0)
                multiply(keys, q_tile, 1, set1)
                T.wait_wgmma(1)
                reduce(set0, w_tile, 0, weighted0, score, kept)
                multiply(keys, q_tile, 2, set0)
                T.wait_wgmma(1)
                reduce(set1, w_tile, 1, weighted1, score, kept)
                multiply(keys, q_tile, 3, set1)
                T.wait_wgmma(1)
                reduce(set0, w_tile, 2, weighted0, score, kept)
                T.wait_wgmma(0)
                reduce(set1, w_tile, 3, weighted1, score, kept)
                store(out, bm, tile, kept, length, scales)

    return released_late(index_logits_fp4_dense_kernel)


def _empty_output(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    scale: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    return weights.new_empty((q.shape[0], keys.shape[0]))


@operator(NAME, _empty_output)
def index_logits_fp4_dense(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    scale: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Score each query against the FP4 keys: sum over heads of weight * relu(q . k).

    Of a head or key, 32 dims whose scale is below 2**-11 of the largest one count as zeros. A nan scale
    makes all scores of its head or key nan. Queries go in groups of eight; of a number that is no multiple
    of eight, the queries are copied first.

    Args:
        q: [m, num_heads, 64] uint8, two e2m1 a byte, see `hadamard_fp4`; num_heads 8, 16, 32 or 64. m = 0
            is allowed.
        q_scale: [m, num_heads, 4] e8m0.
        weights: [m, num_heads] fp32. A product with the head's largest scale of a magnitude below 2**-119
            is rounded to a multiple of 2**-142. Scores have the bits of `index_logits_fp4`.
        keys: [n, 64] uint8, those of one request, as `hadamard_fp4` returns them; n a multiple of 256. A
            kernel is compiled for each n, and for ten numbers of parts at most, so that a buffer may well be
            larger than what is visible so far.
        scale: [n, 4] e8m0.
        lengths: [m] int32: keys that a query sees.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        [m, n] fp32, -inf from a query's length on.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_tensor(NAME, "q", q, dtype=torch.uint8, ndim=3)
    require_tensor(NAME, "q_scale", q_scale, dtype=torch.float8_e8m0fnu, ndim=3, device=q.device)
    require_tensor(NAME, "weights", weights, dtype=torch.float32, ndim=2, device=q.device)
    require_tensor(NAME, "keys", keys, dtype=torch.uint8, ndim=2, device=q.device)
    require_tensor(NAME, "scale", scale, dtype=torch.float8_e8m0fnu, ndim=2, device=q.device)
    require_tensor(NAME, "lengths", lengths, dtype=torch.int32, ndim=1, device=q.device)
    (m, num_heads, _), n = q.shape, keys.shape[0]
    groups, num_tiles = -(-m // QUERIES), n // TILE
    CONTRACT.check(NAME, groups=groups, num_tiles=num_tiles)
    require_heads(NAME, num_heads)
    require_shape(NAME, "q", q, (m, num_heads, DIM // 2))
    require_shape(NAME, "q_scale", q_scale, (m, num_heads, SCALES))
    require_shape(NAME, "weights", weights, (m, num_heads))
    require_shape(NAME, "keys", keys, (num_tiles * TILE, DIM // 2))
    require_shape(NAME, "scale", scale, (n, SCALES))
    require_shape(NAME, "lengths", lengths, (m,))
    if runtime.uses_reference(q):
        return index_reference.index_logits_fp4_dense(q, q_scale, weights, keys, scale, lengths)
    out = weights.new_empty((groups * QUERIES, n))
    if m:
        inputs = (
            grouped(q.view(torch.int32), groups, QUERIES).view(torch.uint32),
            grouped(q_scale.view(torch.int32).view(m, num_heads), groups, QUERIES),
            grouped(weights, groups, QUERIES),
            keys.view(torch.uint32),
            scale.view(torch.uint32).view(n // WORDS, WORDS),
            grouped(lengths, groups, QUERIES),
        )
        kwargs = _select({"num_heads": num_heads, "num_tiles": num_tiles, "groups": groups}).kwargs
        runtime.launch(make_kernel, kwargs, (*inputs, out.view(groups, QUERIES, n)))
    return out if len(out) == m else out[:m]


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Return random queries and keys; ragged ones see any number of keys."""
    generator = torch.Generator(device).manual_seed(seed)
    m, n, num_heads = dims["m"], dims["num_tiles"] * TILE, dims["num_heads"]

    def integers(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=dtype)

    def scales(*shape: int) -> torch.Tensor:
        """Return UE8M0 near one, a few of them far smaller."""
        near = integers(120, 130, shape, torch.uint8)
        small = integers(0, 32, shape, torch.uint8) == 0
        return torch.where(small, near - 100, near).view(torch.float8_e8m0fnu)

    q, q_scale = integers(0, 256, (m, num_heads, DIM // 2), torch.uint8), scales(m, num_heads, SCALES)
    weights = torch.randn(m, num_heads, generator=generator, device=device)
    keys, scale = integers(0, 256, (n, DIM // 2), torch.uint8), scales(n, SCALES)
    low = 0 if dims["ragged"] else n
    return q, q_scale, weights, keys, scale, integers(low, n + 2, (m,), torch.int32)


_select = selector(Config, QUERIES)
SPEC = KernelSpec(
    name=NAME,
    fn=index_logits_fp4_dense,
    reference=index_reference.index_logits_fp4_dense,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=shipped(Config),
    select=_select,
    contract=CONTRACT,
    batch_dims=("groups",),
    cases=CASES,
    tolerance=index_reference.index_logits_fp4_dense_tolerance,
    num_bytes=lambda d: (
        d["m"] * (d["num_heads"] * (DIM // 2 + SCALES + 4) + 4)
        + TILE * d["num_tiles"] * (4 * d["m"] + DIM // 2 + SCALES)
    ),
    num_flops=lambda d: 2 * d["m"] * d["num_heads"] * DIM * TILE * d["num_tiles"],
    peers=("deepgemm",),
    row_invariant=False,  # lengths come with the queries: tests/kernels/test_index_logits_fp4_dense.py
    source="DeepSeek-V4 report 2.3.1 and 5.2.1; DeepGEMM's logits of contiguous keys",
    small={"m": 8, "num_heads": 64, "num_tiles": 3},
)
