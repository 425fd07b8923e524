"""Pages of cache rows: where a row's values and scales lie. Pure integers, shared by host and kernels.

A row is 584 bytes: 448 e4m3 values, 64 rotated bf16 values, seven UE8M0 bytes (one for 64 e4m3 values) and
one of padding. A page of B rows holds B x 576 bytes of values, then B x 8 of scales, and is padded to a
multiple of 576 bytes. Places are numbered over all pages: place = page * B + row.
"""

HEAD_DIM = 512
ROPE_DIM = 64
NOPE_DIM = HEAD_DIM - ROPE_DIM
SCALE_BLOCK = 64  # values a scale
VALUE_BYTES = NOPE_DIM + 2 * ROPE_DIM  # of a row
SCALE_BYTES = NOPE_DIM // SCALE_BLOCK + 1  # of a row, one of padding
PAGE_ROWS = 64  # of the window and of entries of 4 tokens
MAX_PLACES = 2**31 - 1  # a place is an int32
MAX_PAGES = MAX_PLACES // PAGE_ROWS
MAX_QUERIES = 65535  # a launch extent other than the first
WINDOW = 128  # keys of the window


def page_bytes(page_rows: int) -> int:
    """Return the bytes of a page of so many rows."""
    used = page_rows * (VALUE_BYTES + SCALE_BYTES)
    return -(-used // VALUE_BYTES) * VALUE_BYTES
