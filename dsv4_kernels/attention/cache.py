"""Rows of paged caches: written from the parts that `kv_entry` returns, and read back as bf16.

Pages and places: `cache_layout`. Both kernels are bound by bytes and latency: a thread moves 16 bytes of a
row as attention sees it, or as it is stored, and asks for all of its input before it uses any.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import cache_rows, decode_reference, reference
from dsv4_kernels.attention.cache_layout import (
    HEAD_DIM,
    MAX_PLACES,
    NOPE_DIM,
    PAGE_ROWS,
    ROPE_DIM,
    SCALE_BLOCK,
    SCALE_BYTES,
    VALUE_BYTES,
    page_bytes,
)
from dsv4_kernels.contract import Contract, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.scale import ue8m0_to_f32

WRITE, READ = "cache_write", "cache_read"
WORD_BYTES = 4
ROW_WORDS, NOPE_WORDS, SCALE_WORDS = (b // WORD_BYTES for b in (VALUE_BYTES, NOPE_DIM, SCALE_BYTES))
ROPE_WORDS = ROW_WORDS - NOPE_WORDS
VECTOR_WORDS = 4
ROW_VECTORS, NOPE_VECTORS = ROW_WORDS // VECTOR_WORDS, NOPE_WORDS // VECTOR_WORDS  # threads that write a row
LANE_DIMS = 8  # 16 bytes of bf16
LANES = HEAD_DIM // LANE_DIMS  # threads that read a row
NOPE_LANES = NOPE_DIM // LANE_DIMS
SCALES_AT = PAGE_ROWS * VALUE_BYTES // WORD_BYTES  # words before a page's scales
MAX_TOKENS = 2**31 - 256  # launch extents are int32
MAX_PAGES = MAX_PLACES // PAGE_ROWS


@dataclass(frozen=True)
class Config:
    """Rows a block, and its width."""

    block_m: int
    threads: int


_CLAUSES = ("0 <= m", "m <= MAX_TOKENS", "0 < pages", "pages <= MAX_PAGES")
_CONSTS = {"MAX_TOKENS": MAX_TOKENS, "MAX_PAGES": MAX_PAGES}
WRITE_CONTRACT = Contract((*_CLAUSES, "distinct(slots)"), consts=_CONSTS, tensors=frozenset({"slots"}))
READ_CONTRACT = Contract(_CLAUSES, consts=_CONSTS)


def make_write(config: Config) -> Any:
    """Return the PrimFunc that writes rows; tokens and pages stay symbolic. All tensors are 32-bit words."""
    m, pages = T.dynamic("m"), T.dynamic("pages")
    block_m, page_words = config.block_m, page_bytes(PAGE_ROWS) // WORD_BYTES
    shape = (block_m, ROW_VECTORS, VECTOR_WORDS)
    by_vector = T.Fragment(shape, lambda i, q, w: (i * ROW_VECTORS + q, w))
    by_thread = T.Fragment(shape[:-1], lambda i, q: (i * ROW_VECTORS + q, 0))

    @T.prim_func
    def cache_write_kernel(
        cache: T.Tensor[(pages, page_words), T.int32],
        slots: T.Tensor[(m,), T.int32],
        nope: T.Tensor[(m, NOPE_WORDS), T.int32],
        scale: T.Tensor[(m, SCALE_WORDS), T.int32],
        rope: T.Tensor[(m, ROPE_WORDS), T.int32],
    ):
        with T.Kernel(T.ceildiv(m, block_m), threads=config.threads) as bm:
            row = T.alloc_fragment(shape, T.int32)
            rotated = T.alloc_fragment(shape, T.int32)
            scales = T.alloc_fragment(shape[:-1], T.int32)
            T.annotate_layout({row: by_vector, rotated: by_vector, scales: by_thread})
            for i, q, w in T.Parallel(*shape):
                row[i, q, w] = T.if_then_else(
                    q < NOPE_VECTORS, nope[bm * block_m + i, q * VECTOR_WORDS + w], 0
                )
            for i, q, w in T.Parallel(*shape):
                rotated[i, q, w] = T.if_then_else(
                    q >= NOPE_VECTORS, rope[bm * block_m + i, (q - NOPE_VECTORS) * VECTOR_WORDS + w], 0
                )
            for i, q in T.Parallel(block_m, ROW_VECTORS):
                scales[i, q] = T.if_then_else(q < SCALE_WORDS, scale[bm * block_m + i, q], 0)
            for i, q, w in T.Parallel(*shape):
                if bm * block_m + i < m:
                    cache[
                        slots[bm * block_m + i] // PAGE_ROWS,
                        slots[bm * block_m + i] % PAGE_ROWS * ROW_WORDS + q * VECTOR_WORDS + w,
                    ] = T.if_then_else(q < NOPE_VECTORS, row[i, q, w], rotated[i, q, w])
            for i, q in T.Parallel(block_m, ROW_VECTORS):
                if bm * block_m + i < m and q < SCALE_WORDS:
                    cache[
                        slots[bm * block_m + i] // PAGE_ROWS,
                        SCALES_AT + slots[bm * block_m + i] % PAGE_ROWS * SCALE_WORDS + q,
                    ] = scales[i, q]

    return cache_write_kernel


def make_read(config: Config) -> Any:
    """Return the PrimFunc that reads rows; a cache comes as e4m3, as bf16 and as 32-bit words."""
    m, pages = T.dynamic("m"), T.dynamic("pages")
    size, block_m = page_bytes(PAGE_ROWS), config.block_m
    by_thread = T.Fragment((block_m, LANES), lambda i, q: (i * LANES + q, 0))
    by_lane = T.Fragment((block_m, LANES, LANE_DIMS), lambda i, q, d: (i * LANES + q, d))

    @T.prim_func
    def cache_read_kernel(
        values: T.Tensor[(pages, size), T.float8_e4m3fn],
        halves: T.Tensor[(pages, size // 2), T.bfloat16],
        words: T.Tensor[(pages, size // WORD_BYTES), T.int32],
        places: T.Tensor[(m,), T.int32],
        out: T.Tensor[(m, LANES, LANE_DIMS), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, block_m), threads=config.threads) as bm:
            place = T.alloc_fragment((block_m, LANES), T.int32)
            scale = T.alloc_fragment((block_m, LANES), T.int32)
            nope = T.alloc_fragment((block_m, LANES, LANE_DIMS), T.float8_e4m3fn)
            row = T.alloc_fragment((block_m, LANES, LANE_DIMS), T.bfloat16)
            T.annotate_layout({place: by_thread, scale: by_thread, nope: by_lane, row: by_lane})
            for i, q in T.Parallel(block_m, LANES):
                place[i, q] = places[bm * block_m + i]
            for i, q in T.Parallel(block_m, LANES):
                scale[i, q] = T.if_then_else(
                    place[i, q] >= 0,
                    words[
                        place[i, q] // PAGE_ROWS,
                        SCALES_AT
                        + place[i, q] % PAGE_ROWS * SCALE_WORDS
                        + q * LANE_DIMS // (WORD_BYTES * SCALE_BLOCK),
                    ],
                    0,
                )
            for i, q, d in T.Parallel(block_m, LANES, LANE_DIMS):
                nope[i, q, d] = T.if_then_else(
                    place[i, q] >= 0 and q < NOPE_LANES,
                    values[
                        place[i, q] // PAGE_ROWS,
                        place[i, q] % PAGE_ROWS * VALUE_BYTES + q * LANE_DIMS + d,
                    ],
                    T.cast(0, "float8_e4m3fn"),
                )
            for i, q, d in T.Parallel(block_m, LANES, LANE_DIMS):
                row[i, q, d] = T.if_then_else(
                    place[i, q] >= 0 and q >= NOPE_LANES,
                    halves[
                        place[i, q] // PAGE_ROWS,
                        place[i, q] % PAGE_ROWS * (VALUE_BYTES // 2)
                        + NOPE_DIM // 2
                        + (q - NOPE_LANES) * LANE_DIMS
                        + d,
                    ],
                    T.cast(0, "bfloat16"),
                )
            for i, q, d in T.Parallel(block_m, LANES, LANE_DIMS):
                factor = ue8m0_to_f32(scale[i, q], q * LANE_DIMS // SCALE_BLOCK % WORD_BYTES)
                row[i, q, d] = T.if_then_else(
                    q < NOPE_LANES,
                    T.cast(T.cast(nope[i, q, d], "float32") * factor, "bfloat16"),
                    row[i, q, d],
                )
            for i, q, d in T.Parallel(block_m, LANES, LANE_DIMS):
                out[bm * block_m + i, q, d] = row[i, q, d]

    return cache_read_kernel


_WRITE = Variant("b8", {"config": Config(8, 8 * ROW_VECTORS)})
_READ = Variant("b4", {"config": Config(4, 4 * LANES)})


def cache_write(
    cache: torch.Tensor, slots: torch.Tensor, nope: torch.Tensor, scale: torch.Tensor, rope: torch.Tensor
) -> torch.Tensor:
    """Write row i of what `kv_entry` returned to place slots[i] of a paged cache, in place.

    Args:
        cache: [pages, 37440] uint8, pages of 64 rows: see `cache_layout`. Bytes of other places, and
            padding, keep their values.
        slots: [m] int32, places (page * 64 + row); a negative one, or one beyond the cache, is skipped.
            The others are distinct (not checked: they stay on the device).
        nope: [m, 448] e4m3; m = 0 is allowed.
        scale: [m, 8] uint8.
        rope: [m, 64] bf16.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        `cache`.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    _write(cache, slots, nope, scale, rope)
    return cache


@operator(WRITE, lambda cache, slots, nope, scale, rope: None, writes=("cache",))
def _write(
    cache: torch.Tensor, slots: torch.Tensor, nope: torch.Tensor, scale: torch.Tensor, rope: torch.Tensor
) -> None:
    require_tensor(WRITE, "cache", cache, dtype=torch.uint8, ndim=2)
    require_tensor(WRITE, "slots", slots, dtype=torch.int32, ndim=1, device=cache.device)
    require_tensor(WRITE, "nope", nope, dtype=torch.float8_e4m3fn, ndim=2, device=cache.device)
    require_tensor(WRITE, "scale", scale, dtype=torch.uint8, ndim=2, device=cache.device)
    require_tensor(WRITE, "rope", rope, dtype=torch.bfloat16, ndim=2, device=cache.device)
    m, pages = slots.shape[0], cache.shape[0]
    WRITE_CONTRACT.check(WRITE, m=m, pages=pages)
    require_shape(WRITE, "cache", cache, (pages, page_bytes(PAGE_ROWS)))
    require_shape(WRITE, "nope", nope, (m, NOPE_DIM))
    require_shape(WRITE, "scale", scale, (m, SCALE_BYTES))
    require_shape(WRITE, "rope", rope, (m, ROPE_DIM))
    if runtime.uses_reference(cache):
        cache.copy_(decode_reference.cache_write(cache, slots, nope, scale, rope))
    elif m:
        words = (t.view(torch.int32) for t in (cache, slots, nope, scale, rope))
        runtime.launch(make_write, _WRITE.kwargs, tuple(words))


def _empty_rows(cache: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return cache.new_empty((places.shape[0], HEAD_DIM), dtype=torch.bfloat16)


@operator(READ, _empty_rows)
def cache_read(cache: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the rows at `places` as attention sees them: exact.

    Args:
        cache: [pages, 37440] uint8, pages of 64 rows: see `cache_layout`.
        places: [m] int32; zeros for one outside the cache. m = 0 is allowed.
        Both contiguous and 16-byte aligned, on one device.

    Returns:
        [m, 512] bf16.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_tensor(READ, "cache", cache, dtype=torch.uint8, ndim=2)
    require_tensor(READ, "places", places, dtype=torch.int32, ndim=1, device=cache.device)
    m, pages = places.shape[0], cache.shape[0]
    READ_CONTRACT.check(READ, m=m, pages=pages)
    require_shape(READ, "cache", cache, (pages, page_bytes(PAGE_ROWS)))
    if runtime.uses_reference(cache):
        return decode_reference.cache_read(cache, places)
    out = _empty_rows(cache, places)
    if m:
        runtime.launch(
            make_read, _READ.kwargs, (*cache_rows.views(cache), places, out.view(m, LANES, LANE_DIMS))
        )
    return out


def _inputs(
    dims: Mapping[str, int], device: torch.device, seed: int
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return a cache of random bytes, distinct places, some of them outside it, and parts of rows."""
    generator = torch.Generator(device).manual_seed(seed)
    m, pages = dims["m"], dims["pages"]
    shape = (pages, page_bytes(PAGE_ROWS))
    cache = torch.randint(0, 255, shape, generator=generator, device=device, dtype=torch.uint8)
    chosen = torch.randperm(max(pages * PAGE_ROWS, m), generator=generator, device=device)[:m]
    kind = torch.randint(0, 8, (m,), generator=generator, device=device)
    places = torch.where(kind == 0, -1 - chosen, chosen).to(torch.int32)
    entry = torch.randn(m, HEAD_DIM, generator=generator, device=device).to(torch.bfloat16)
    return cache, places, reference.fp8_entry(entry)


def _write_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    cache, slots, parts = _inputs(dims, device, seed)
    return cache, slots, *parts


def _read_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    _, places, _ = _inputs(dims, device, seed)
    pages = torch.arange(dims["pages"] * PAGE_ROWS, device=device, dtype=torch.int32)
    dims = {**dims, "m": len(pages)}
    cache, _, parts = _inputs(dims, device, seed)
    return decode_reference.cache_write(cache, pages, *parts), places


def _cases(big: int) -> tuple[Case, ...]:
    small = (("empty", 0, 1), ("one-row", 1, 1), ("ragged", 67, 2), ("beyond", 130, 1))
    bench = (("m64", 64, big), ("m4096", 4096, big))
    return (
        *(Case(name, {"m": m, "pages": pages}) for name, m, pages in small),
        *(Case(name, {"m": m, "pages": pages}, ("gpu", "bench")) for name, m, pages in bench),
    )


WRITE_SPEC = KernelSpec(
    name=WRITE,
    fn=cache_write,
    reference=decode_reference.cache_write,
    make_inputs=_write_inputs,
    make_kernel=make_write,
    variants=(_WRITE,),
    select=lambda dims: _WRITE,
    contract=WRITE_CONTRACT,
    cases=_cases(1024),
    num_bytes=lambda d: d["m"] * (2 * (VALUE_BYTES + SCALE_BYTES) + 4),
    source="DeepSeek-V4 report 3.5.1; FlashMLA's page of 584-byte rows",
    row_invariant=False,
    batch_dims=(),  # its output is the cache, which has no row for each token
    in_place=("cache",),
    small={"m": 9, "pages": 1},
)

READ_SPEC = KernelSpec(
    name=READ,
    fn=cache_read,
    reference=decode_reference.cache_read,
    make_inputs=_read_inputs,
    make_kernel=make_read,
    variants=(_READ,),
    select=lambda dims: _READ,
    contract=READ_CONTRACT,
    cases=_cases(1024),
    num_bytes=lambda d: d["m"] * (VALUE_BYTES + SCALE_BYTES + 2 * HEAD_DIM + 4),
    source="DeepSeek-V4 report 3.5.1; FlashMLA's page of 584-byte rows",
    row_invariant=False,  # the batch dim is of the second argument
    small={"m": 5, "pages": 1},
)

SPECS = (WRITE_SPEC, READ_SPEC)
