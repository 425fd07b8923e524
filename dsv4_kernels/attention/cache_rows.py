"""64 cache rows at a time into a block: gathered by place, held as they are stored, expanded to bf16.

A row's threads are neighbours and take 16 bytes each in turn, so that every thread's values of one turn have
one scale. A place that is not in the cache is -1 and gives zeros.
"""

from dataclasses import dataclass
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels.attention.cache_layout import (
    NOPE_DIM,
    PAGE_ROWS,
    ROPE_DIM,
    SCALE_BLOCK,
    SCALE_BYTES,
    VALUE_BYTES,
)
from dsv4_kernels.tile.scale import ue8m0_to_f32

ROWS = 64
_VECTOR_BYTES = 16
_HALVES = _VECTOR_BYTES // 2  # bf16 values of a vector
_WORD_BYTES = 4
SCALE_WORDS = SCALE_BYTES // _WORD_BYTES
_SCALES_AT = PAGE_ROWS * VALUE_BYTES // _WORD_BYTES  # words before a page's scales
# The copies of a loop become cp.async, and waiting for them is left to the kernel.
_ASYNC = {"parallel_async_without_async_commit_wait": True}


def views(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a cache of uint8 pages as kernels read it: as e4m3, as bf16 and as 32-bit words."""
    return cache.view(torch.float8_e4m3fn), cache.view(torch.bfloat16), cache.view(torch.int32)


def layouts(threads: int) -> tuple[Any, Any, Any]:
    """Return the layouts of a block's registers for e4m3 (and expanded), rotated values, words of scales."""
    lanes = threads // ROWS
    vector = _VECTOR_BYTES if lanes <= SCALE_BLOCK // _VECTOR_BYTES else SCALE_BLOCK // lanes
    nope = T.Fragment(
        (ROWS, NOPE_DIM),
        lambda j, d: (
            j * lanes + d // vector % lanes,
            d // (vector * lanes) * vector + d % vector,
        ),
    )
    rope = T.Fragment(
        (ROWS, ROPE_DIM),
        lambda j, d: (j * lanes + d // _HALVES % lanes, d // (_HALVES * lanes) * _HALVES + d % _HALVES),
    )
    scales = T.Fragment(
        (ROWS, SCALE_WORDS), forward_fn=lambda j, w, rep: (j * lanes + rep, w), replicate=lanes
    )
    return nope, rope, scales


@dataclass(frozen=True)
class Raw:
    """Shared memory of 64 rows as they are stored.

    Attributes:
        nope: e4m3 [64, 448].
        rope: bf16 [64, 64].
        scales: int32 [64, 2 * threads of a row]: the two words of a row, each so many times.
    """

    nope: Any
    rope: Any
    scales: Any


def place_layout(threads: int) -> Any:
    """Return the layout of 64 places in registers: each thread of a row has it."""
    lanes = threads // ROWS
    return T.Fragment((ROWS,), forward_fn=lambda j, rep: (j * lanes + rep, 0), replicate=lanes)


@T.macro
def ask_rows(pages: Any, places: Any, first: Any, place: Any, raw: Any, threads: Any):
    """Ask for the rows at places[first:first + 64] of a cache by cp.async, as one group.

    Each thread copies the values that it will expand. A cache comes as e4m3, as bf16 and as 32-bit words;
    `place` are registers, so that places are read once and no copy waits for shared memory.
    """
    nope_at, rope_at, _ = layouts(threads)
    lanes = threads // ROWS
    words_at = T.Fragment((ROWS, SCALE_WORDS * lanes), lambda j, i: (j * lanes + i % lanes, i // lanes))
    for j in T.Parallel(ROWS):
        place[j] = places[first + j]
    for j, d in T.Parallel(ROWS, NOPE_DIM, loop_layout=nope_at, annotations=_ASYNC):
        raw.nope[j, d] = T.if_then_else(
            place[j] >= 0,
            pages[0][place[j] // PAGE_ROWS, place[j] % PAGE_ROWS * VALUE_BYTES + d],
            T.cast(0, "float8_e4m3fn"),
        )
    for j, d in T.Parallel(ROWS, ROPE_DIM, loop_layout=rope_at, annotations=_ASYNC):
        raw.rope[j, d] = T.if_then_else(
            place[j] >= 0,
            pages[1][place[j] // PAGE_ROWS, place[j] % PAGE_ROWS * (VALUE_BYTES // 2) + NOPE_DIM // 2 + d],
            T.cast(0, "bfloat16"),
        )
    # Each of a row's threads copies both words: a copy with a loop of its own has a line for the proofs.
    for j, i in T.Parallel(ROWS, SCALE_WORDS * lanes, loop_layout=words_at, annotations=_ASYNC):
        raw.scales[j, i] = T.if_then_else(
            place[j] >= 0,
            pages[2][
                place[j] // PAGE_ROWS,
                _SCALES_AT + place[j] % PAGE_ROWS * SCALE_WORDS + i // lanes,
            ],
            0,
        )
    T.ptx_commit_group()


@T.macro
def take_rows(raw: Any, nope: Any, rope: Any, scales: Any, threads: Any):
    """Take the rows that have arrived into registers."""
    for j, d in T.Parallel(ROWS, NOPE_DIM):
        nope[j, d] = raw.nope[j, d]
    for j, d in T.Parallel(ROWS, ROPE_DIM):
        rope[j, d] = raw.rope[j, d]
    for j, w in T.Parallel(ROWS, SCALE_WORDS):
        scales[j, w] = raw.scales[j, w * (threads // ROWS)]


@T.macro
def load_rows(
    values: Any, halves: Any, words: Any, places: Any, first: Any, nope: Any, rope: Any, scales: Any
):
    """Load the rows at places[first:first + 64]; a cache comes as e4m3, as bf16 and as 32-bit words."""
    for j, d in T.Parallel(ROWS, NOPE_DIM):
        nope[j, d] = T.if_then_else(
            places[first + j] >= 0,
            values[places[first + j] // PAGE_ROWS, places[first + j] % PAGE_ROWS * VALUE_BYTES + d],
            T.cast(0, "float8_e4m3fn"),
        )
    for j, d in T.Parallel(ROWS, ROPE_DIM):
        rope[j, d] = T.if_then_else(
            places[first + j] >= 0,
            halves[
                places[first + j] // PAGE_ROWS,
                places[first + j] % PAGE_ROWS * (VALUE_BYTES // 2) + NOPE_DIM // 2 + d,
            ],
            T.cast(0, "bfloat16"),
        )
    for j, w in T.Parallel(ROWS, SCALE_WORDS):
        scales[j, w] = T.if_then_else(
            places[first + j] >= 0,
            words[
                places[first + j] // PAGE_ROWS,
                PAGE_ROWS * VALUE_BYTES // _WORD_BYTES + places[first + j] % PAGE_ROWS * SCALE_WORDS + w,
            ],
            0,
        )


@T.macro
def load_either(first: Any, second: Any, own: Any, other: Any, nope: Any, rope: Any, scales: Any):
    """Load rows of two caches: own[j] is row j's place in the first one, other[j] in the second, else -1."""
    for j, d in T.Parallel(ROWS, NOPE_DIM):
        nope[j, d] = T.if_then_else(
            own[j] >= 0,
            first[0][own[j] // PAGE_ROWS, own[j] % PAGE_ROWS * VALUE_BYTES + d],
            T.if_then_else(
                other[j] >= 0,
                second[0][other[j] // PAGE_ROWS, other[j] % PAGE_ROWS * VALUE_BYTES + d],
                T.cast(0, "float8_e4m3fn"),
            ),
        )
    for j, d in T.Parallel(ROWS, ROPE_DIM):
        rope[j, d] = T.if_then_else(
            own[j] >= 0,
            first[1][own[j] // PAGE_ROWS, own[j] % PAGE_ROWS * (VALUE_BYTES // 2) + NOPE_DIM // 2 + d],
            T.if_then_else(
                other[j] >= 0,
                second[1][
                    other[j] // PAGE_ROWS, other[j] % PAGE_ROWS * (VALUE_BYTES // 2) + NOPE_DIM // 2 + d
                ],
                T.cast(0, "bfloat16"),
            ),
        )
    for j, w in T.Parallel(ROWS, SCALE_WORDS):
        scales[j, w] = T.if_then_else(
            own[j] >= 0,
            first[2][own[j] // PAGE_ROWS, _SCALES_AT + own[j] % PAGE_ROWS * SCALE_WORDS + w],
            T.if_then_else(
                other[j] >= 0,
                second[2][other[j] // PAGE_ROWS, _SCALES_AT + other[j] % PAGE_ROWS * SCALE_WORDS + w],
                0,
            ),
        )


@T.macro
def widen(nope: Any, scales: Any, wide: Any):
    """Multiply loaded e4m3 values by their scales, to bf16 in registers of the same layout."""
    for j, d in T.Parallel(ROWS, NOPE_DIM):
        wide[j, d] = T.cast(
            T.cast(nope[j, d], "float32")
            * ue8m0_to_f32(scales[j, d // (4 * SCALE_BLOCK)], d // SCALE_BLOCK % 4),
            "bfloat16",
        )


@T.macro
def expand_rows(nope: Any, rope: Any, scales: Any, wide: Any, rows: Any):
    """Expand loaded rows into `rows`, bf16 [64, 512]; `wide` has the layout of `nope`."""
    widen(nope, scales, wide)
    for j, d in T.Parallel(ROWS, NOPE_DIM):
        rows[j, d] = wide[j, d]
    for j, d in T.Parallel(ROWS, ROPE_DIM):
        rows[j, NOPE_DIM + d] = rope[j, d]
