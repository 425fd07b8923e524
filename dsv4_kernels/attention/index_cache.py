"""Write the indexer's keys into pages and read them: 68 bytes a key in FP4, 132 in FP8 (report 2.3.1, 5.2.1).

A page of 64 keys holds their codes one after the other, then their scales: of FP4 four UE8M0 bytes a key (one
for 32 dims), of FP8 one fp32.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import index_reference
from dsv4_kernels.contract import Contract, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.scale import ue8m0_f32_bits

NAME, READ = "index_cache_write", "index_cache_read"
DIM = 128
PAGE_ROWS = 64
WORD_BYTES = 4
FP4, FP8 = "fp4", "fp8"
CODE_BYTES = {FP4: DIM // 2, FP8: DIM}  # of a key
SCALES = {FP4: 4, FP8: 1}  # UE8M0 bytes of a key, as they come
CODES_DTYPE = {FP4: torch.uint8, FP8: torch.float8_e4m3fn}
SCALE_BYTES = 4  # of a key in a page


def page_bytes(kind: str) -> int:
    """Return the bytes of a page: 4352 or 8448."""
    return PAGE_ROWS * (CODE_BYTES[kind] + SCALE_BYTES)


@dataclass(frozen=True)
class Config:
    """Keys a block, and its width."""

    block_m: int = 8
    threads: int = 128


_CLAUSES = ("0 <= m", "m <= MAX_TOKENS", "0 < pages", "pages <= MAX_PAGES")
_CONSTS = {"MAX_TOKENS": 2**31 - 256, "MAX_PAGES": (2**31 - 1) // PAGE_ROWS}
CONTRACT = Contract((*_CLAUSES, "distinct(slots)"), consts=_CONSTS, tensors=frozenset({"slots"}))
READ_CONTRACT = Contract(_CLAUSES, consts=_CONSTS)


def make_kernel(kind: str, config: Config) -> Any:
    """Return the PrimFunc; keys and pages stay symbolic. Codes and the cache are 32-bit words."""
    m, pages = T.dynamic("m"), T.dynamic("pages")
    block_m, row_words = config.block_m, CODE_BYTES[kind] // WORD_BYTES
    page_words = page_bytes(kind) // WORD_BYTES
    is_fp4 = kind == FP4
    scale_dtype = "int32" if is_fp4 else "uint8"

    def scale_word(scale: Any) -> Any:
        return scale if is_fp4 else ue8m0_f32_bits(T.cast(scale, "int32"), 0)

    @T.prim_func
    def index_cache_write_kernel(
        cache: T.Tensor[(pages, page_words), T.int32],
        slots: T.Tensor[(m,), T.int32],
        codes: T.Tensor[(m, row_words), T.int32],
        scale: T.Tensor[(m,), scale_dtype],
    ):
        with T.Kernel(T.ceildiv(m, block_m), threads=config.threads) as bm:
            for i, w in T.Parallel(block_m, row_words):
                if bm * block_m + i < m:
                    cache[
                        slots[bm * block_m + i] // PAGE_ROWS,
                        slots[bm * block_m + i] % PAGE_ROWS * row_words + w,
                    ] = codes[bm * block_m + i, w]
            for i in T.Parallel(block_m):
                if bm * block_m + i < m:
                    cache[
                        slots[bm * block_m + i] // PAGE_ROWS,
                        PAGE_ROWS * row_words + slots[bm * block_m + i] % PAGE_ROWS,
                    ] = scale_word(scale[bm * block_m + i])

    return index_cache_write_kernel


def make_read(kind: str, config: Config) -> Any:
    """Return the PrimFunc that reads keys; keys and pages stay symbolic. All tensors are 32-bit words."""
    m, pages = T.dynamic("m"), T.dynamic("pages")
    block_m, row_words = config.block_m, CODE_BYTES[kind] // WORD_BYTES
    page_words = page_bytes(kind) // WORD_BYTES

    @T.prim_func
    def index_cache_read_kernel(
        cache: T.Tensor[(pages, page_words), T.int32],
        places: T.Tensor[(m,), T.int32],
        codes: T.Tensor[(m, row_words), T.int32],
        scale: T.Tensor[(m,), T.int32],
    ):
        with T.Kernel(T.ceildiv(m, block_m), threads=config.threads) as bm:
            place = T.alloc_shared((block_m,), T.int32)
            for i in T.Parallel(block_m):
                place[i] = places[bm * block_m + i]
            for i, w in T.Parallel(block_m, row_words):
                codes[bm * block_m + i, w] = T.if_then_else(
                    place[i] >= 0, cache[place[i] // PAGE_ROWS, place[i] % PAGE_ROWS * row_words + w], 0
                )
            for i in T.Parallel(block_m):
                scale[bm * block_m + i] = T.if_then_else(
                    place[i] >= 0,
                    cache[place[i] // PAGE_ROWS, PAGE_ROWS * row_words + place[i] % PAGE_ROWS],
                    0,
                )

    return index_cache_read_kernel


def index_cache_write(
    cache: torch.Tensor, slots: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Write key i of what `hadamard_fp4` or `hadamard_fp8` returned to place slots[i], in place.

    Args:
        cache: [pages, 4352] uint8 of FP4 keys, or [pages, 8448] of FP8 keys: 64 keys a page. Bytes of other
            places keep their values.
        slots: [m] int32, places (page * 64 + row); a negative one, or one beyond the cache, is skipped.
            The others are distinct (not checked: they stay on the device).
        codes: [m, 64] uint8, or [m, 128] e4m3; m = 0 is allowed.
        scale: [m, 4] e8m0 or its bytes, one for 32 dims; or [m, 1], which a page holds as fp32.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        `cache`.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    # Inductor does not lower an operator that writes in place and takes e8m0: bytes instead.
    raw = scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale
    _write(cache, slots, codes, raw)
    return cache


@operator(NAME, lambda cache, slots, codes, scale: None, writes=("cache",))
def _write(cache: torch.Tensor, slots: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    kind = FP4 if codes.dtype == torch.uint8 else FP8
    require_tensor(NAME, "cache", cache, dtype=torch.uint8, ndim=2)
    require_tensor(NAME, "slots", slots, dtype=torch.int32, ndim=1, device=cache.device)
    require_tensor(NAME, "codes", codes, dtype=CODES_DTYPE[kind], ndim=2, device=cache.device)
    require_tensor(NAME, "scale", scale, dtype=torch.uint8, ndim=2, device=cache.device)
    m, pages = slots.shape[0], cache.shape[0]
    CONTRACT.check(NAME, m=m, pages=pages)
    require_shape(NAME, "cache", cache, (pages, page_bytes(kind)))
    require_shape(NAME, "codes", codes, (m, CODE_BYTES[kind]))
    require_shape(NAME, "scale", scale, (m, SCALES[kind]))
    if runtime.uses_reference(cache):
        e8m0 = scale.view(torch.float8_e8m0fnu)
        cache.copy_(index_reference.index_cache_write(cache, slots, codes, e8m0))
    elif m:
        scales = (scale.view(torch.int32) if kind == FP4 else scale).flatten()
        words = (cache.view(torch.int32), slots, codes.view(torch.int32), scales)
        runtime.launch(make_kernel, _variant(kind).kwargs, words)


def _empty_keys(cache: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    m, kind = places.shape[0], FP8 if cache.shape[1] == page_bytes(FP8) else FP4
    codes = cache.new_empty((m, CODE_BYTES[kind]), dtype=CODES_DTYPE[kind])
    shape, dtype = ((m, SCALES[FP4]), torch.float8_e8m0fnu) if kind == FP4 else ((m,), torch.float32)
    return codes, cache.new_empty(shape, dtype=dtype)


@operator(READ, _empty_keys)
def index_cache_read(cache: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys at `places` as they are stored: what scores over contiguous keys take.

    FP4 keys are those of `index_logits_fp4_dense`, and of `fp4_dequant`, which returns them as bf16; FP8 keys
    those of `index_logits`.

    Args:
        cache: [pages, 4352] uint8 of FP4 keys, or [pages, 8448] of FP8 keys: see `index_cache_write`.
        places: [m] int32 (page * 64 + row); of one outside the cache all bytes are zero: a key of zeros.
            m = 0 is allowed.
        Both contiguous and 16-byte aligned, on one device.

    Returns:
        codes: [m, 64] uint8, two e2m1 a byte, or [m, 128] e4m3.
        scale: [m, 4] e8m0, one for 32 dims; or [m] fp32.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_tensor(READ, "cache", cache, dtype=torch.uint8, ndim=2)
    require_tensor(READ, "places", places, dtype=torch.int32, ndim=1, device=cache.device)
    m, pages = places.shape[0], cache.shape[0]
    READ_CONTRACT.check(READ, m=m, pages=pages)
    kind = FP8 if cache.shape[1] == page_bytes(FP8) else FP4
    require_shape(READ, "cache", cache, (pages, page_bytes(kind)))
    if runtime.uses_reference(cache):
        return index_reference.index_cache_read(cache, places)
    codes, scale = _empty_keys(cache, places)
    if m:
        words = (cache.view(torch.int32), places, codes.view(torch.int32), scale.view(torch.int32).flatten())
        runtime.launch(make_read, _read_variant(kind).kwargs, words)
    return codes, scale


@functools.cache
def _read_variant(kind: str) -> Variant:
    threads = 128
    keys = threads * 4 * WORD_BYTES // CODE_BYTES[kind]  # 16 bytes a thread
    return Variant(kind, {"kind": kind, "config": Config(keys, threads)})


@functools.cache
def _variant(kind: str) -> Variant:
    return Variant(kind, {"kind": kind, "config": Config()})


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Return a cache of random bytes, distinct places, some of them outside it, and keys of random codes."""
    generator = torch.Generator(device).manual_seed(seed)
    m, pages, kind = dims["m"], dims["pages"], FP4 if dims["is_fp4"] else FP8

    def random_bytes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 255, shape, generator=generator, device=device, dtype=torch.uint8)

    chosen = torch.randperm(max(pages * PAGE_ROWS, m), generator=generator, device=device)[:m]
    is_skipped = torch.randint(0, 8, (m,), generator=generator, device=device) == 0
    slots = torch.where(is_skipped, -1 - chosen, chosen).to(torch.int32)
    codes = random_bytes(m, CODE_BYTES[kind]).view(CODES_DTYPE[kind])
    scale = random_bytes(m, SCALES[kind]).view(torch.float8_e8m0fnu)
    return random_bytes(pages, page_bytes(kind)), slots, codes, scale


def _read_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    cache, places, *_ = _make_inputs(dims, device, seed)
    return cache, places


def _case(case_id: str, m: int, pages: int, is_fp4: int, *tags: str) -> Case:
    return Case(case_id, {"m": m, "pages": pages, "is_fp4": is_fp4}, tags or ("test",))


def _kind(dims: Mapping[str, int]) -> str:
    return FP4 if dims["is_fp4"] else FP8


def _num_bytes(dims: Mapping[str, int]) -> int:
    """Return the bytes of codes and scales, as they come and as they are stored, and of the places."""
    kind = _kind(dims)
    return dims["m"] * (2 * CODE_BYTES[kind] + SCALES[kind] + 4 + 4)


CASES = (
    _case("empty", 0, 1, 1),
    _case("one-row", 1, 1, 1),
    _case("ragged-fp4", 67, 2, 1),
    _case("ragged-fp8", 67, 1, 0),
    *(
        _case(f"m{m}-{kind}", m, 1024, int(kind == FP4), "gpu", "bench")
        for m in (64, 4096)
        for kind in (FP4, FP8)
    ),
)

WRITE_SPEC = KernelSpec(
    name=NAME,
    fn=index_cache_write,
    reference=index_reference.index_cache_write,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(kind) for kind in (FP4, FP8)),
    select=lambda d: _variant(_kind(d)),
    contract=CONTRACT,
    cases=CASES,
    num_bytes=_num_bytes,
    source="DeepSeek-V4 report 2.3.1; DeepGEMM's pages of the indexer's keys",
    row_invariant=False,
    batch_dims=(),  # its output is the cache, which has no row for each token
    in_place=("cache",),
    small={"m": 9, "pages": 1},
)

READ_SPEC = KernelSpec(
    name=READ,
    fn=index_cache_read,
    reference=index_reference.index_cache_read,
    make_inputs=_read_inputs,
    make_kernel=make_read,
    variants=tuple(_read_variant(kind) for kind in (FP4, FP8)),
    select=lambda d: _read_variant(_kind(d)),
    contract=READ_CONTRACT,
    cases=CASES,
    num_bytes=lambda d: d["m"] * (2 * (CODE_BYTES[_kind(d)] + SCALE_BYTES) + 4),
    source="DeepSeek-V4 report 2.3.1; DeepGEMM's pages of the indexer's keys",
    row_invariant=False,  # the batch dim is of the second argument
    small={"m": 33, "pages": 1},
)

SPECS = (WRITE_SPEC, READ_SPEC)
