"""The lightning indexer's scores of a portion of queries over contiguous FP8 keys (report 2.3.1).

Keys are the instruction's rows, the heads of two queries its columns: the sum over heads is 16 terms of a
thread's own and two exchanges. A block walks its part of the keys, every so many tiles, for a group of four
queries; few groups have many parts, so that each multiprocessor has a block. Two sets of sums go in turn:
while the products of one pair of queries are under way the sums of the other are taken, those of the second
and the stores of both in the round after their products. One warp asks for keys by TMA, two warpgroups
multiply 64 keys of a tile each; nvcc unrolls the ring of tiles. relu is (x + |x|) * (w / 2), which has the
bits of max(x, 0) * w and adds where that compares. A score depends on its query and key alone.

Groups are an axis of their own: their queries have one reduction signature, and no store needs a guard.
Design and measurements: docs/attention.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import index_reference
from dsv4_kernels.attention.index_logits import require_heads
from dsv4_kernels.contract import Contract, require_shape, require_tensor
from dsv4_kernels.gemm.rounds import MULTIPROCESSORS
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.unroll import ring_unrolled

NAME = "index_logits"
DIM = 128
VECTOR = 16  # e4m3 of one read
INSTRUCTION_ROWS = 64
WARPGROUP = 128  # threads
F32_MINUS_INF = 0xFF800000 - (1 << 32)  # as int32
_ROWS = T.GemmWarpPolicy.FullRow
TILE = 256  # keys that their number is a multiple of
PAIR, QUERIES = 2, 4  # queries of one set, and of a group
PARTS = (128, 64, 32, 16, 8, 6, 4, 3, 2, 1)  # of the keys; a block takes a multiprocessor to itself
# (rounds of blocks, parts), from few groups to many: two rounds of thirds, say, before one of whole keys.
_ROUNDS = (*((1, parts) for parts in PARTS[:-1]), (2, 3), (1, 1), (4, 3), (3, 2), (2, 1), (5, 2))
# (most groups, parts); of more, all keys are one part.
LADDER = tuple((rounds * MULTIPROCESSORS // parts, parts) for rounds, parts in _ROUNDS)
CONTRACT = Contract(
    ("0 <= groups", "groups <= MAX_GROUPS", "0 < num_tiles", "num_tiles <= MAX_TILES"),
    consts={"MAX_GROUPS": (1 << 20) // QUERIES, "MAX_TILES": (1 << 20) // TILE},
)


@dataclass(frozen=True)
class Config:
    """Tile and schedule.

    Attributes:
        warpgroups: that multiply, 64 keys of a tile each.
        num_stages: tiles on their way.
        registers: of a thread that multiplies; those that load give them up.
        producer_registers: what they keep.
        parts: of the keys, at most; each has two tiles or more. Tiles go to parts in turn: one has tiles
            part, part + parts, and so on. So the round is the first digit of a key's place, and the round
            more that a part takes meets no other part.
    """

    warpgroups: int = 2
    num_stages: int = 4
    registers: int = 240
    producer_registers: int = 24
    parts: int = 1


def most_parts(tiles: int, parts: int) -> int:
    """Return into how many parts so many tiles go, `parts` at most."""
    return max(min(parts, tiles // 2), 1)


def make_kernel(num_heads: int, num_tiles: int, config: Config) -> Any:
    """Return the PrimFunc for `num_heads` heads and 256 * num_tiles keys; groups stay symbolic."""
    groups = T.dynamic("groups")
    num_keys = num_tiles * TILE
    rows = INSTRUCTION_ROWS * config.warpgroups
    pair, queries = PAIR, QUERIES
    columns = pair * num_heads
    threads = WARPGROUP * config.warpgroups
    tiles = num_keys // rows
    parts = most_parts(tiles, config.parts)
    vectors = DIM // VECTOR
    by_vector = T.Fragment(
        (2 * columns, DIM),
        lambda r, d: (
            (r * vectors + d // VECTOR) % WARPGROUP,
            (r * vectors + d // VECTOR) // WARPGROUP * VECTOR + d % VECTOR,
        ),
    )

    @T.macro
    def multiply(key_tile, q_tile, number, acc):
        T.wgmma_gemm(
            key_tile,
            q_tile[number * columns : (number + 1) * columns, :],
            acc,
            transpose_B=True,
            clear_accum=True,
            policy=_ROWS,
        )

    @T.macro
    def reduce(acc, weight, weighted, score):
        for j, i, h in T.Parallel(rows, pair, num_heads):
            weighted[j, i, h] = (acc[j, i * num_heads + h] + T.abs(acc[j, i * num_heads + h])) * weight[i, h]
        T.reduce_sum(weighted, score, dim=2)

    @T.macro
    def store(out, bm, tile, score0, score1, length, key_scale):
        for j, s, i in T.Parallel(rows, 2, pair):
            if tile >= 0:  # noqa: SIM102 (a guard of the round alone is what its inverse is found by)
                if tile < tiles:
                    out[bm, s * pair + i, tile * rows + j] = T.if_then_else(
                        T.cast(tile * rows + j, "float32") < length[s * pair + i],
                        T.if_then_else(s == 0, score0[j, i], score1[j, i]) * key_scale[j],
                        T.reinterpret(F32_MINUS_INF, "float32"),
                    )

    @T.prim_func
    def index_logits_kernel(
        q: T.Tensor[(groups, queries, num_heads, DIM), T.float8_e4m3fn],
        weights: T.Tensor[(groups, queries, num_heads), T.float32],
        keys: T.Tensor[(num_keys, DIM), T.float8_e4m3fn],
        scale: T.Tensor[(num_keys,), T.float32],
        lengths: T.Tensor[(groups, queries), T.int32],
        out: T.Tensor[(groups, queries, num_keys), T.float32],
    ):
        with T.Kernel(groups, parts, threads=threads) as (bm, part):
            T.annotate_producer_reg_dealloc(config.producer_registers)
            T.annotate_consumer_reg_alloc(config.registers)
            q_tile = T.alloc_shared((2 * columns, DIM), T.float8_e4m3fn)
            key_tile = T.alloc_shared((rows, DIM), T.float8_e4m3fn)
            weight0 = T.alloc_fragment((pair, num_heads), T.float32)
            weight1 = T.alloc_fragment((pair, num_heads), T.float32)
            length = T.alloc_shared((queries,), T.float32)
            set0 = T.alloc_fragment((rows, columns), T.float32)
            set1 = T.alloc_fragment((rows, columns), T.float32)
            weighted0 = T.alloc_fragment((rows, pair, num_heads), T.float32)
            weighted1 = T.alloc_fragment((rows, pair, num_heads), T.float32)
            score0 = T.alloc_fragment((rows, pair), T.float32)
            score1 = T.alloc_fragment((rows, pair), T.float32)
            key_scale = T.alloc_fragment((rows,), T.float32)
            next_scale = T.alloc_fragment((rows,), T.float32)
            for r, d in T.Parallel(2 * columns, DIM, loop_layout=by_vector):
                q_tile[r, d] = q[bm, r // num_heads, r % num_heads, d]
            for i in T.Parallel(queries):
                length[i] = T.cast(lengths[bm, i], "float32")
            for i, h in T.Parallel(pair, num_heads):
                weight0[i, h] = weights[bm, i, h] * 0.5
            for i, h in T.Parallel(pair, num_heads):
                weight1[i, h] = weights[bm, pair + i, h] * 0.5
            probe = T.alloc_local((1,), T.float8_e4m3fn)
            T.clear(set1)
            T.clear(score0)
            T.clear(key_scale)
            for k in T.Pipelined(-(-tiles // parts) + 1, num_stages=config.num_stages):
                tile = k * parts + part
                T.copy(keys[tile * rows, 0], key_tile)
                for j in T.Parallel(rows):
                    next_scale[j] = T.if_then_else(tile * rows + j < num_keys, scale[tile * rows + j], 0.0)
                multiply(key_tile, q_tile, 0, set0)
                reduce(set1, weight1, weighted1, score1)
                store(out, bm, tile - parts, score0, score1, length, key_scale)
                T.wait_wgmma(0)
                multiply(key_tile, q_tile, 1, set1)
                reduce(set0, weight0, weighted0, score0)
                T.wait_wgmma(0)
                for j in T.Parallel(rows):
                    key_scale[j] = next_scale[j]
                # The stage is handed back after what reads it last.
                probe[0] = key_tile[0, 0]

    return ring_unrolled(index_logits_kernel, config.num_stages)


def _empty_output(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    return weights.new_empty((q.shape[0], keys.shape[0]))


def grouped(tensor: torch.Tensor, groups: int, queries: int = QUERIES) -> torch.Tensor:
    """Return [groups, queries, ...] of a tensor of queries; those that the last group lacks are zeros."""
    if missing := groups * queries - len(tensor):
        tensor = torch.cat((tensor, tensor.new_zeros((missing, *tensor.shape[1:]))))
    return tensor.view(groups, queries, *tensor.shape[1:])


@operator(NAME, _empty_output)
def index_logits(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Score each query against the keys: sum over heads of weight * relu(q . k), times the key's scale.

    Queries go in groups of four. Of a number that is no multiple of four, the queries are copied first.

    Args:
        q: [m, num_heads, 128] e4m3, num_heads 8, 16, 32 or 64; m = 0 is allowed.
        weights: [m, num_heads] fp32, the scales of q's heads in them. One of a magnitude below 2**-125 is
            rounded to a multiple of 2**-148.
        keys: [n, 128] e4m3, those of one request; n a multiple of 256. A kernel is compiled for each n, and
            for ten numbers of parts at most, so that a buffer may well be larger than what is visible so far.
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
    groups, num_tiles = -(-m // QUERIES), n // TILE
    CONTRACT.check(NAME, groups=groups, num_tiles=num_tiles)
    require_heads(NAME, num_heads)
    require_shape(NAME, "q", q, (m, num_heads, DIM))
    require_shape(NAME, "weights", weights, (m, num_heads))
    require_shape(NAME, "keys", keys, (num_tiles * TILE, DIM))
    require_shape(NAME, "scale", scale, (n,))
    require_shape(NAME, "lengths", lengths, (m,))
    if runtime.uses_reference(q):
        return index_reference.index_logits(q, weights, keys, scale, lengths)
    out = weights.new_empty((groups * QUERIES, n))
    if m:
        by_group = (grouped(q, groups), grouped(weights, groups), keys, scale, grouped(lengths, groups))
        args = (*by_group, out.view(groups, QUERIES, n))
        runtime.launch(make_kernel, selected(Config, num_heads, num_tiles, groups).kwargs, args)
    return out if len(out) == m else out[:m]


@cache
def _variant(config: type, num_heads: int, num_tiles: int, parts: int) -> Variant:
    parts = most_parts(num_tiles * TILE // (INSTRUCTION_ROWS * Config.warpgroups), parts)
    kwargs = {"num_heads": num_heads, "num_tiles": num_tiles, "config": config(parts=parts)}
    return Variant(f"h{num_heads}-n{num_tiles * TILE}{f'-p{parts}' if parts > 1 else ''}", kwargs)


def selected(config: type, num_heads: int, num_tiles: int, groups: int) -> Variant:
    """Return what so many groups take of a kernel that has `config(parts=...)` and tiles as here."""
    parts = next((parts for most, parts in LADDER if groups <= most), 1)
    return _variant(config, num_heads, num_tiles, parts)


def selector(config: type, queries: int) -> Callable[[Mapping[str, int]], Variant]:
    """Return `selected` as a function of a case's dims, whose queries come in groups of so many."""

    def select(dims: Mapping[str, int]) -> Variant:
        groups = dims["groups"] if "groups" in dims else -(-dims["m"] // queries)
        return selected(config, dims["num_heads"], dims["num_tiles"], groups)

    return select


def shipped(config: type) -> tuple[Variant, ...]:
    """Return every variant of such a kernel that ships."""
    found = (_variant(config, 64, n // TILE, parts) for n in SHIPPED for parts in PARTS)
    return tuple({v.id: v for v in found}.values())


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
FEW = ((1, 4096), (64, 65536), (256, 16384))  # queries and keys, of the benchmark
CASES = (
    _case("empty", 0, 64, 1),
    _case("one-row", 1, 64, 1),
    _case("ragged", 3, 8, 2, "test", "gpu"),
    _case("ragged-h64", 37, 64, 6, "gpu"),
    *(_case(f"m4096-n{n}", 4096, 64, n // TILE, "gpu", "bench") for n in SHIPPED),
    *(_case(f"m{m}-n{n}", m, 64, n // TILE, "gpu", "bench") for m, n in FEW),
)
SPEC = KernelSpec(
    name=NAME,
    fn=index_logits,
    reference=index_reference.index_logits,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=shipped(Config),
    select=selector(Config, QUERIES),
    contract=CONTRACT,
    batch_dims=("groups",),
    cases=CASES,
    tolerance=index_reference.index_logits_tolerance,
    num_bytes=lambda d: (
        d["m"] * (d["num_heads"] * (DIM + 4) + 4) + TILE * d["num_tiles"] * (4 * d["m"] + DIM + 4)
    ),
    num_flops=lambda d: 2 * d["m"] * d["num_heads"] * DIM * TILE * d["num_tiles"],
    peers=("deepgemm",),
    row_invariant=False,  # lengths come with the queries: tests/kernels/test_index_logits.py
    source="DeepSeek-V4 report 2.3.1; DeepGEMM's logits of contiguous keys",
    small={"m": 4, "num_heads": 64, "num_tiles": 3},
)
