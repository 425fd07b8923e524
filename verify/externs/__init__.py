"""Device functions that a kernel may bring in by `T.import_source` and `T.call_extern`.

    from verify import externs

    T.import_source(externs.source("dsv4_expand_e2m1x4"))        # once, inside T.Kernel
    word = T.call_extern("int32", "dsv4_expand_e2m1x4", codes, low, high)
    T.call_extern("handle", "dsv4_store_b32", T.address_of(fragment[i, 4 * j]), word)

Each function is registered once: its C++ text, and its meaning as a function of 32-bit words. The text
is parsed and its PTX instructions interpreted as bit-vectors; that it computes the meaning is proved for
all inputs. A kernel that imports any other text, or calls anything not registered, is UNSUPPORTED.
Words are `unsigned` in C++; int32 and uint32 expressions are passed as their bit patterns.

    dsv4_prmt(a, b, selector)                       prmt.b32
    dsv4_and_or(a, b, c)                            (a & b) | c, one lop3
    dsv4_select_bits(mask, a, b)                    a where mask is set, else b, one lop3
    dsv4_store_b32(out*, word)                      one 32-bit store
    dsv4_expand_e2m1x4(codes, low, high)            the lower four codes -> a word of four table bytes
    dsv4_expand_e2m1x8(out*, codes, low, high)      all eight -> out[0] and out[1], 9 instructions
    dsv4_expand_e2m1x8_apart(out*, upper*, ...)     the same, the second word through another pointer
    dsv4_expand_crossed_e2m1x8[_apart](...)         7 instructions, of codes whose signs are crossed

Code number n of a word is its nibble n, the lowest first. `low` and `high` are the table: byte c of
high:low is what magnitude code c becomes; its sign is put into bit 7. `formats.e4m3_table(offset)`
gives the table of e2m1 times 2**offset as e4m3, exact for each offset in `formats.lossless_offsets()`.
Crossed codes come from `cross_signs` at weight preparation.

Each word that is written through a pointer needs an address that is a multiple of 4; each pointer is to
elements of one buffer that are consecutive both where the author indexes them (in the last dimension)
and in the registers or memory behind: bounds, alignment and refinement prove it of each call.
"""

import numpy as np

from verify.externs import fp4
from verify.externs.registry import Extern, called, check_calls, everything, find, imported, register, source
from verify.externs.words import MASK, Arrays

__all__ = [
    "Extern",
    "apply",
    "called",
    "check_calls",
    "cross_signs",
    "everything",
    "find",
    "imported",
    "register",
    "source",
]


def cross_signs(codes: np.ndarray) -> np.ndarray:
    """Return words of eight e2m1 codes (any integer type) as the crossed functions take them, as uint32."""
    words = np.asarray(codes).astype(np.int64) & MASK
    return np.asarray(fp4.cross_signs(Arrays(), words)).astype(np.uint32)


def apply(name: str, *values: np.ndarray | int) -> list[np.ndarray]:
    """Return what the registered meaning of `name` gives for words (as int64, any sign).

    Args:
        name: a function that reads no memory.
        values: its word parameters in order.

    Returns:
        The result, or for a function that writes, the words in the order of its pointers.
    """
    extern = find(name)
    if extern is None or extern.function.reads:
        raise KeyError(f"{name} is not a registered function of words")
    given = {
        n: np.asarray(v).astype(np.int64) & MASK for n, v in zip(extern.word_parameters, values, strict=True)
    }
    meant = extern.meaning(Arrays(), given, {})
    if extern.function.returns:
        return [np.asarray(meant)]
    order = [p.name for p in extern.function.parameters if p.is_pointer]
    places = sorted(meant, key=lambda place: (order.index(place[0]), place[1]))
    return [np.asarray(meant[place]) for place in places]
