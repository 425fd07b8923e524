"""The indexer's keys in one launch: compressor, RoPE, Hadamard, FP4 or FP8, pages (report 2.3.1, 5.2.1).

What `index_compressor`, `hadamard_fp4` or `hadamard_fp8` and `index_cache_write` do one after the other, with
their steps and bits: a warp pools a block of tokens, norms the means, rotates them by the angles of the
block's first token, transforms and casts them, and writes the key to its place.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import compressor_reference, reference
from dsv4_kernels.attention.compressor_pool import (
    CLAUSES,
    CONSTS,
    MAX_POSITIONS,
    Config,
    channels,
    make_rows,
    pooling,
    require_rows,
    rms_norm,
)
from dsv4_kernels.attention.compressor_state import OVERLAPPING, POSITION, state_rows
from dsv4_kernels.attention.hadamard_quant import DIM, PAIRS, ROPE_DIM, ROPE_PAIRS
from dsv4_kernels.attention.hadamard_row import by_lane_pairs, codes_dtype, page_elements, row_writer
from dsv4_kernels.attention.index_cache import CODE_BYTES, FP4, FP8, PAGE_ROWS, SCALE_BYTES, page_bytes
from dsv4_kernels.contract import Contract, ContractError, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.pairs import even_f32, odd_f32, rotated_pair

NAME = "index_key_write"
RATIO = OVERLAPPING
FIRST_ROPE_PAIR = PAIRS - ROPE_PAIRS
KINDS = {page_bytes(kind): kind for kind in (FP4, FP8)}
CONTRACT = Contract(
    (
        *CLAUSES,
        "0 < num_positions",
        "num_positions <= MAX_POSITIONS",
        "0 < pages",
        "pages <= MAX_PAGES",
        "distinct(slots)",
    ),
    consts={**CONSTS, "MAX_POSITIONS": MAX_POSITIONS, "MAX_PAGES": (2**31 - 1) // PAGE_ROWS},
    tensors=frozenset({"slots"}),
)


def make_kernel(kind: str, config: Config) -> Any:
    """Return the PrimFunc; only the kind of key is fixed. An element of the cache is two codes."""
    m, num_tokens, num_slots = T.dynamic("m"), T.dynamic("num_tokens"), T.dynamic("num_slots")
    num_positions, pages = T.dynamic("num_positions"), T.dynamic("pages")
    rows, width = state_rows(RATIO), channels(RATIO, DIM)
    pool, write_row = pooling(RATIO, DIM, config), row_writer(kind)

    @T.prim_func
    def index_key_write_kernel(
        cache: T.Tensor[(pages, page_elements(kind)), codes_dtype(kind)],
        slots: T.Tensor[(m,), T.int32],
        kv: T.Tensor[(num_tokens, width), T.float32],
        score: T.Tensor[(num_tokens, width), T.float32],
        kv_state: T.Tensor[(num_slots, rows, width), T.float32],
        score_state: T.Tensor[(num_slots, rows, width), T.float32],
        blocks: T.Tensor[(m, 4), T.int32],
        ape: T.Tensor[(RATIO, width), T.float32],
        weight: T.Tensor[(PAIRS,), T.int32],
        cos_sin: T.Tensor[(num_positions, 2, ROPE_PAIRS), T.float32],
    ):
        with T.Kernel(m, threads=config.threads(DIM)) as entry:
            T.annotate_min_blocks_per_sm(config.blocks)
            mean = T.alloc_shared((DIM,), T.float32)
            words = T.alloc_fragment((PAIRS,), T.int32)
            norm_weight = T.alloc_fragment((PAIRS,), T.int32)
            cos = T.alloc_fragment((PAIRS,), T.float32)
            sin = T.alloc_fragment((PAIRS,), T.float32)
            T.annotate_layout({words: by_lane_pairs(), cos: by_lane_pairs(), sin: by_lane_pairs()})
            for p in T.Parallel(PAIRS):
                norm_weight[p] = weight[p]
            for p in T.Parallel(PAIRS):
                is_rotated = p >= FIRST_ROPE_PAIR
                first = blocks[entry, POSITION] // RATIO * RATIO
                cos[p] = T.if_then_else(is_rotated, cos_sin[first, 0, p - FIRST_ROPE_PAIR], 0.0)
                sin[p] = T.if_then_else(is_rotated, cos_sin[first, 1, p - FIRST_ROPE_PAIR], 0.0)
            pool(mean, kv, score, kv_state, score_state, ape, blocks, entry)
            rms_norm(mean, norm_weight, words, DIM)
            for p in T.Parallel(PAIRS):
                rotated = rotated_pair(even_f32(words[p]), odd_f32(words[p]), cos[p], sin[p])
                # The others stay as they are: times one, plus zero, a zero would lose its sign.
                words[p] = T.if_then_else(p >= FIRST_ROPE_PAIR, rotated, words[p])
            write_row(words, cache, slots[entry])

    return index_key_write_kernel


def index_key_write(
    cache: torch.Tensor,
    slots: torch.Tensor,
    kv: torch.Tensor,
    score: torch.Tensor,
    kv_state: torch.Tensor,
    score_state: torch.Tensor,
    blocks: torch.Tensor,
    ape: torch.Tensor,
    weight: torch.Tensor,
    cos_sin: torch.Tensor,
) -> torch.Tensor:
    """Compress blocks of four tokens into the indexer's keys and write them into pages, in place.

    The bytes are those of `index_compressor`, then `hadamard_fp4` (or `hadamard_fp8`) at the position of each
    block's first token, then `index_cache_write`.

    Args:
        cache: [pages, 4352] uint8 of FP4 keys, or [pages, 8448] of FP8 keys: 64 keys a page, see
            `index_cache_write`. Bytes of other places keep their values.
        slots: [m] int32, places (page * 64 + row); a negative one, or one beyond the cache, is skipped.
            The others are distinct (not checked: they stay on the device).
        kv: [num_tokens, 256] fp32, this call's tokens: series b, then a.
        score: as kv, before the bias; finite.
        kv_state: [num_slots, 8, 256] fp32, see `compressor`.
        score_state: as kv_state, before the bias.
        blocks: [m, 4] int32, see `compressor_state.plan`; m = 0 is allowed. Of no block: a key of zeros.
        ape: [4, 256] fp32.
        weight: [128] bf16, of the norm.
        cos_sin: [num_positions, 64] fp32: 32 cosines, then 32 sines. A position outside the table makes the
            rotated dims zero.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        `cache`.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    _write(cache, slots, kv, score, kv_state, score_state, blocks, ape, weight, cos_sin)
    return cache


@operator(NAME, lambda *_: None, writes=("cache",))
def _write(
    cache: torch.Tensor,
    slots: torch.Tensor,
    kv: torch.Tensor,
    score: torch.Tensor,
    kv_state: torch.Tensor,
    score_state: torch.Tensor,
    blocks: torch.Tensor,
    ape: torch.Tensor,
    weight: torch.Tensor,
    cos_sin: torch.Tensor,
) -> None:
    rows = (kv, score, kv_state, score_state, blocks, ape, weight)
    require_tensor(NAME, "cache", cache, dtype=torch.uint8, ndim=2)
    require_tensor(NAME, "slots", slots, dtype=torch.int32, ndim=1, device=cache.device)
    require_tensor(NAME, "kv", kv, dtype=torch.float32, ndim=2, device=cache.device)
    require_rows(NAME, DIM, (RATIO,), *rows)
    require_tensor(NAME, "cos_sin", cos_sin, dtype=torch.float32, ndim=2, device=cache.device)
    m, num_positions, pages = blocks.shape[0], cos_sin.shape[0], cache.shape[0]
    CONTRACT.check(
        NAME,
        m=m,
        num_tokens=kv.shape[0],
        num_slots=kv_state.shape[0],
        num_positions=num_positions,
        pages=pages,
    )
    if cache.shape[1] not in KINDS:
        clause = f"cache.shape[1] in {tuple(KINDS)}"
        raise ContractError(f"{NAME}: requires {clause}, got cache.shape={tuple(cache.shape)}")
    require_shape(NAME, "slots", slots, (m,))
    require_shape(NAME, "cos_sin", cos_sin, (num_positions, ROPE_DIM))
    if runtime.uses_reference(cache):
        cache.copy_(compressor_reference.index_key_write(cache, slots, *rows, cos_sin))
    elif m:
        kind = KINDS[cache.shape[1]]
        elements = cache if kind == FP4 else cache.view(torch.uint16)
        words = (weight.view(torch.int32), cos_sin.view(num_positions, 2, ROPE_PAIRS))
        runtime.launch(make_kernel, _variant(kind).kwargs, (elements, slots, *rows[:-1], *words))


@functools.cache
def _variant(kind: str) -> Variant:
    return Variant(kind, {"kind": kind, "config": Config(groups=1, step=8, blocks=20)})


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Return a cache of random bytes, distinct places, some of them outside it, `make_rows` and angles."""
    generator = torch.Generator(device).manual_seed(seed)
    m, pages = dims["m"], dims["pages"]
    shape = (pages, page_bytes(_kind(dims)))
    cache = torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)
    chosen = torch.randperm(max(pages * PAGE_ROWS, m), generator=generator, device=device)[:m]
    is_skipped = torch.randint(0, 8, (m,), generator=generator, device=device) == 0
    slots = torch.where(is_skipped, -1 - chosen, chosen).to(torch.int32)
    rows = make_rows({**dims, "ratio": RATIO}, DIM, device, seed)
    return cache, slots, *rows, reference.rope_table(dims["num_positions"], 160000.0, True, device)


def _kind(dims: Mapping[str, int]) -> str:
    return FP4 if dims["is_fp4"] else FP8


def _case(case_id: str, m: int, num_slots: int, decode: int, is_fp4: int, *tags: str) -> Case:
    num_tokens = max(m, 1) if decode else m * RATIO
    dims = {"m": m, "num_tokens": num_tokens, "num_slots": num_slots, "num_positions": 8192}
    pages = 1024 if "bench" in tags else 2
    dims = {**dims, "decode": decode, "pages": pages, "is_fp4": is_fp4}
    return Case(case_id, dims, tags or ("test",))


def _num_bytes(dims: Mapping[str, int]) -> int:
    """Return the bytes of blocks' rows (of prefill each row once), of keys and places."""
    rows = (2 if dims["decode"] else 1) * RATIO * channels(RATIO, DIM) * 8
    return dims["m"] * (rows + CODE_BYTES[_kind(dims)] + SCALE_BYTES + 4)


SPEC = KernelSpec(
    name=NAME,
    fn=index_key_write,
    reference=compressor_reference.index_key_write,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(kind) for kind in (FP4, FP8)),
    select=lambda dims: _variant(_kind(dims)),
    contract=CONTRACT,
    cases=(
        _case("empty", 0, 1, 1, 1),
        _case("one-row", 1, 1, 1, 1),
        _case("m3-decode-fp4", 3, 4, 1, 1),
        _case("m3-decode-fp8", 3, 4, 1, 0),
        *(
            _case(f"m{tokens}-{kind}", tokens // RATIO, 1, 0, int(kind == FP4), "gpu", "bench")
            for tokens in (4096, 65536)
            for kind in (FP4, FP8)
        ),
        *(_case(f"decode64-{kind}", 64, 64, 1, int(kind == FP4), "gpu", "bench") for kind in (FP4, FP8)),
    ),
    num_bytes=_num_bytes,
    source="DeepSeek-V4 report 2.3.1 and 5.2.1; reference model's indexer; DeepGEMM's pages of its keys",
    row_invariant=False,
    batch_dims=(),  # its output is the cache, which has no row for each block
    in_place=("cache",),
    small={"m": 2, "num_tokens": 4, "num_slots": 1, "num_positions": 2, "pages": 1},
)
