"""Rows of paged caches: written from the parts that `kv_entry` returns, and read back as bf16.

Pages and places: `cache_layout`. Both kernels are bound by bytes; a row is moved by 16-byte words.
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
    SCALE_BYTES,
    VALUE_BYTES,
    page_bytes,
)
from dsv4_kernels.attention.cache_rows import expand_rows, load_rows
from dsv4_kernels.contract import Contract, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

WRITE, READ = "cache_write", "cache_read"
WORD_BYTES = 4
ROW_WORDS, NOPE_WORDS, SCALE_WORDS = (b // WORD_BYTES for b in (VALUE_BYTES, NOPE_DIM, SCALE_BYTES))
ROPE_WORDS = ROW_WORDS - NOPE_WORDS
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

    @T.prim_func
    def cache_write_kernel(
        cache: T.Tensor[(pages, page_words), T.int32],
        slots: T.Tensor[(m,), T.int32],
        nope: T.Tensor[(m, NOPE_WORDS), T.int32],
        scale: T.Tensor[(m, SCALE_WORDS), T.int32],
        rope: T.Tensor[(m, ROPE_WORDS), T.int32],
    ):
        with T.Kernel(T.ceildiv(m, block_m), threads=config.threads) as bm:
            for i, w in T.Parallel(block_m, NOPE_WORDS):
                if bm * block_m + i < m:
                    cache[
                        slots[bm * block_m + i] // PAGE_ROWS,
                        slots[bm * block_m + i] % PAGE_ROWS * ROW_WORDS + w,
                    ] = nope[bm * block_m + i, w]
            for i, w in T.Parallel(block_m, ROPE_WORDS):
                if bm * block_m + i < m:
                    cache[
                        slots[bm * block_m + i] // PAGE_ROWS,
                        slots[bm * block_m + i] % PAGE_ROWS * ROW_WORDS + NOPE_WORDS + w,
                    ] = rope[bm * block_m + i, w]
            for i, w in T.Parallel(block_m, SCALE_WORDS):
                if bm * block_m + i < m:
                    cache[
                        slots[bm * block_m + i] // PAGE_ROWS,
                        PAGE_ROWS * ROW_WORDS + slots[bm * block_m + i] % PAGE_ROWS * SCALE_WORDS + w,
                    ] = scale[bm * block_m + i, w]

    return cache_write_kernel


def make_read(config: Config) -> Any:
    """Return the PrimFunc that reads rows; a cache comes as e4m3, as bf16 and as 32-bit words."""
    m, pages = T.dynamic("m"), T.dynamic("pages")
    size, block_m = page_bytes(PAGE_ROWS), cache_rows.ROWS
    values_at, rope_at, scales_at = cache_rows.layouts(config.threads)

    @T.prim_func
    def cache_read_kernel(
        values: T.Tensor[(pages, size), T.float8_e4m3fn],
        halves: T.Tensor[(pages, size // 2), T.bfloat16],
        words: T.Tensor[(pages, size // WORD_BYTES), T.int32],
        places: T.Tensor[(m,), T.int32],
        out: T.Tensor[(m, HEAD_DIM), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, block_m), threads=config.threads) as bm:
            place = T.alloc_shared((block_m,), T.int32)
            rows = T.alloc_shared((block_m, HEAD_DIM), T.bfloat16)
            nope = T.alloc_fragment((block_m, NOPE_DIM), T.float8_e4m3fn)
            wide = T.alloc_fragment((block_m, NOPE_DIM), T.bfloat16)
            rope = T.alloc_fragment((block_m, ROPE_DIM), T.bfloat16)
            scales = T.alloc_fragment((block_m, SCALE_WORDS), T.int32)
            T.annotate_layout({nope: values_at, wide: values_at, rope: rope_at, scales: scales_at})
            for i in T.Parallel(block_m):
                place[i] = places[bm * block_m + i]
            load_rows(values, halves, words, place, 0, nope, rope, scales)
            expand_rows(nope, rope, scales, wide, rows)
            for i, d in T.Parallel(block_m, HEAD_DIM):
                out[bm * block_m + i, d] = rows[i, d]

    return cache_read_kernel


_WRITE = Variant("b8", {"config": Config(8, 8 * NOPE_WORDS // 4)})  # a thread for 16 bytes of e4m3
_READ = Variant("b64", {"config": Config(cache_rows.ROWS, 256)})


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
        runtime.launch(make_read, _READ.kwargs, (*cache_rows.views(cache), places, out))
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
    small={"m": 65, "pages": 1},
)

SPECS = (WRITE_SPEC, READ_SPEC)
