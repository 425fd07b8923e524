"""64 cache rows at a time into a block: gathered by place, held as they are stored, expanded to bf16.

A row's threads are neighbours and take 16 bytes each in turn, so that every thread's values of one turn have
one scale. A place that is not in the cache is -1 and gives zeros.
"""

from typing import Any

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
