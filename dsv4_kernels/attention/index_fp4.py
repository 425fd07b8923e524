"""The indexer's rows of FP4 widened to e4m3, as the register operand of the tensor core takes them.

A row has four scales of 32 dims. A lane has the 32 dims of one scale, so its table of eight bytes is that of
its scale relative to the row's largest, and one factor for the row is left. Dims are multiplied in another
order than they are stored: a lane's words go to an instruction of 32 dims each. Queries, which come from
shared memory, are put in that order.
"""

from typing import Any

from tilelang import language as T

from verify import externs

DIM = 128
SCALES = 4  # of a row, one for 32 dims
SCALE_DIMS = DIM // SCALES
CODES = 8  # a word
WORDS = DIM // CODES  # of a row
# e4m3 of 0 .5 1 1.5 and of 2 3 4 6, times 2**-5: no subnormals. An offset adds one to each exponent but
# zero's; the largest one gives 6 * 2**6 = 384, below 448.
LOW, LOW_STEP = 0x14100800, 0x08080800
HIGH, HIGH_STEP = 0x24201C18, 0x08080808
MAX_OFFSET = 11
SIGN_SHIFT = 31
TABLE_FACTOR = 2.0**-6  # undoes MAX_OFFSET, which the largest scale of a row has


def source() -> str:
    """Return the device functions that widening calls, for `T.import_source`."""
    return externs.source("dsv4_expand_e2m1x4", "dsv4_store_b32")


def largest_scale(word: Any) -> Any:
    """Return the largest of the four UE8M0 bytes of the int32 `word`."""
    return T.max(T.max(word & 0xFF, word >> 8 & 0xFF), T.max(word >> 16 & 0xFF, word >> 24 & 0xFF))


def above_least(word: Any, number: Any) -> Any:
    """Return the offset of scale `number` of a row; negative where it is too small to count."""
    return (word >> (8 * number) & 0xFF) - largest_scale(word) + MAX_OFFSET


def kept(offset: Any) -> Any:
    """Return a mask of all bits, or of none where the offset is negative."""
    return T.cast(-1 - (offset >> SIGN_SHIFT), "uint32")


def widened(codes: Any, half: Any, offset: Any) -> Any:
    """Return the word of four e4m3: codes 4 half to 4 half + 3."""
    low = T.cast(LOW + offset * LOW_STEP, "uint32")
    high = T.cast(HIGH + offset * HIGH_STEP, "uint32")
    return T.call_extern("uint32", "dsv4_expand_e2m1x4", codes >> T.cast(16 * half, "uint32"), low, high)  # pyright: ignore[reportAttributeAccessIssue]


def query_widening(queries: int, num_heads: int, threads: int) -> Any:
    """Return the macro (q, q_scale, q_tile, block, first) that widens queries into shared memory.

    Args:
        queries: that it widens, from number `first` of the block's; q is [blocks, queries of a block,
            num_heads, WORDS] uint32, q_scale without the last dim.
        num_heads: of a query.
        threads: that widen, a word of codes of each threads / 16 heads.
    """

    def word(n: Any, h: Any, t: Any, g: Any) -> Any:
        return (n * num_heads + h) * WORDS + t * 4 + g

    by_word = T.Fragment(
        (queries, num_heads, SCALES, 4),
        lambda n, h, t, g: (word(n, h, t, g) % threads, word(n, h, t, g) // threads),
    )
    by_code = T.Fragment(
        (queries, num_heads, SCALES, 4, 2, 4),
        lambda n, h, t, g, half, b: (
            word(n, h, t, g) % threads,
            word(n, h, t, g) // threads * CODES + half * 4 + b,
        ),
    )

    @T.macro
    def widen_queries(q: Any, q_scale: Any, q_tile: Any, bm: Any, first: Any):
        q_codes = T.alloc_fragment((queries, num_heads, SCALES, 4), T.uint32)
        q_offset = T.alloc_fragment((queries, num_heads, SCALES, 4), T.int32)
        q_wide = T.alloc_fragment((queries, num_heads, SCALES, 4, 2, 4), T.float8_e4m3fn)
        T.annotate_layout({q_codes: by_word, q_offset: by_word, q_wide: by_code})
        for n, h, t, g in T.Parallel(queries, num_heads, SCALES, 4):
            q_offset[n, h, t, g] = above_least(q_scale[bm, first + n, h], t)
        for n, h, t, g in T.Parallel(queries, num_heads, SCALES, 4):
            q_codes[n, h, t, g] = q[bm, first + n, h, t * 4 + g] & kept(q_offset[n, h, t, g])
        for n, h, t, g in T.Parallel(queries, num_heads, SCALES, 4):
            q_offset[n, h, t, g] = T.max(q_offset[n, h, t, g], 0)
        for n, h, t, g, half in T.Parallel(queries, num_heads, SCALES, 4, 2):
            T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
                "handle",
                "dsv4_store_b32",
                T.address_of(q_wide[n, h, t, g, half, 0]),
                widened(q_codes[n, h, t, g], half, q_offset[n, h, t, g]),
            )
        # A key's lane t has the codes of scale t, a word for each instruction of 32 dims.
        for n, h, t, g, half, b in T.Parallel(queries, num_heads, SCALES, 4, 2, 4):
            q_tile[(first + n) * num_heads + h, g * SCALE_DIMS + half * 16 + t * 4 + b] = q_wide[
                n, h, t, g, half, b
            ]

    return widen_queries


def key_widening(rows: int) -> Any:
    """Return the macro (key_tile, scales, codes, keys) that widens a tile's keys into registers.

    Args:
        rows: keys of a tile; key_tile is [rows, WORDS] uint32, scales [rows] int32, codes their registers
            [rows, SCALES, 4] and keys what is multiplied, [rows, DIM] e4m3.
    """

    @T.macro
    def widen_keys(key_tile: Any, scales: Any, codes: Any, keys: Any):
        for j, t, g in T.Parallel(rows, SCALES, 4):
            codes[j, t, g] = key_tile[j, t * 4 + g]
        for j, t, g in T.Parallel(rows, SCALES, 4):
            codes[j, t, g] = codes[j, t, g] & kept(above_least(scales[j], t))
        for j, g, half, t in T.Parallel(rows, 4, 2, SCALES):
            T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
                "handle",
                "dsv4_store_b32",
                T.address_of(keys[j, g * SCALE_DIMS + half * 16 + t * 4]),
                widened(codes[j, t, g], half, T.max(above_least(scales[j], t), 0)),
            )

    return widen_keys
