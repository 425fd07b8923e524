"""Byte permutes, and the expansion of packed e2m1 codes through a table of eight bytes."""

from collections.abc import Mapping
from typing import Any

from verify.externs import ptx
from verify.externs.registry import Extern, register
from verify.externs.words import MASK, Words, byte, pack

_CODES = 8  # e2m1 codes in a word
_HALF = 4
_NIBBLE_BITS = 4

register(
    Extern(
        "dsv4_prmt",
        """\
__device__ __forceinline__ unsigned dsv4_prmt(unsigned a, unsigned b, unsigned selector) {
  unsigned d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}
""",
        lambda words, v, _: ptx.prmt(words, v["a"], v["b"], v["selector"]),
    )
)
register(
    Extern(
        "dsv4_and_or",
        """\
__device__ __forceinline__ unsigned dsv4_and_or(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(0xEAu));
  return d;
}
""",
        lambda words, v, _: words.bitor(words.bitand(v["a"], v["b"]), v["c"]),
    )
)
register(
    Extern(
        "dsv4_select_bits",
        """\
__device__ __forceinline__ unsigned dsv4_select_bits(unsigned mask, unsigned a, unsigned b) {
  unsigned d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(mask), "r"(a), "r"(b), "n"(0xCAu));
  return d;
}
""",
        lambda words, v, _: words.bitor(
            words.bitand(v["mask"], v["a"]),
            words.bitand(words.sub(words.const(MASK), v["mask"]), v["b"]),
        ),
    )
)
register(
    Extern(
        "dsv4_store_b32",
        """\
__device__ __forceinline__ void dsv4_store_b32(void* out, unsigned word) {
  reinterpret_cast<unsigned*>(out)[0] = word;
}
""",
        lambda words, v, _: {("out", 0): v["word"]},
    )
)


# --------------------------------------------------------------------------- e2m1 through a table
def table_byte(words: Words, low: Any, high: Any, code: Any) -> Any:
    """Return byte `code` (0 to 7) of the table whose bytes 0 to 3 are `low` and 4 to 7 `high`."""
    found = words.const(0)
    for number in range(_CODES):
        entry = byte(words, low if number < _HALF else high, number % _HALF)
        found = words.choose(words.equal(code, words.const(number)), entry, found)
    return found


def expanded(words: Words, low: Any, high: Any, codes: Any, first: int) -> Any:
    """Return the word of the four codes from number `first` on: table byte by magnitude, sign into bit 7."""
    parts = []
    for number in range(first, first + _HALF):
        nibble = words.bitand(words.shr(codes, words.const(_NIBBLE_BITS * number)), words.const(0xF))
        entry = table_byte(words, low, high, words.bitand(nibble, words.const(7)))
        sign = words.shl(words.shr(nibble, words.const(3)), words.const(7))
        parts.append(words.bitor(entry, sign))
    return pack(words, parts)


def cross_signs(words: Words, codes: Any) -> Any:
    """Return `codes` with signs moved: nibbles 1 3 5 7 hold those of codes 0 to 3, nibbles 0 2 4 6 of 4 to 7.

    All eight signs are then one or two shifts away from bit 7 of their bytes.
    """
    total = words.bitand(codes, words.const(0x77777777))
    for number in range(_CODES):
        sign = words.bitand(words.shr(codes, words.const(_NIBBLE_BITS * number + 3)), words.const(1))
        nibble = 2 * number + 1 if number < _HALF else 2 * (number - _HALF)
        total = words.bitor(total, words.shl(sign, words.const(_NIBBLE_BITS * nibble + 3)))
    return total


def uncrossed(words: Words, low: Any, high: Any, crossed: Any, half: int) -> Any:
    """Return what `expanded` gives for the codes whose crossed form is `crossed`."""
    parts = []
    for number in range(_HALF):
        place = _NIBBLE_BITS * (number + _HALF * half)
        code = words.bitand(words.shr(crossed, words.const(place)), words.const(7))
        holder = 2 * number + 1 - half
        sign = words.bitand(words.shr(crossed, words.const(_NIBBLE_BITS * holder + 3)), words.const(1))
        parts.append(words.bitor(table_byte(words, low, high, code), words.shl(sign, words.const(7))))
    return pack(words, parts)


def _pair(
    words: Words, v: Mapping[str, Any], first: tuple[str, int], second: tuple[str, int]
) -> dict[tuple[str, int], Any]:
    halves = [expanded(words, v["low"], v["high"], v["codes"], n) for n in (0, _HALF)]
    return {first: halves[0], second: halves[1]}


register(
    Extern(
        "dsv4_expand_e2m1x4",
        """\
__device__ __forceinline__ unsigned dsv4_expand_e2m1x4(unsigned codes, unsigned low, unsigned high) {
  unsigned magnitudes = dsv4_prmt(low, high, codes & 0x7777u);
  unsigned signs = dsv4_prmt(codes, codes << 4u, 0x9D8Cu);
  return dsv4_and_or(signs, 0x80808080u, magnitudes);
}
""",
        lambda words, v, _: expanded(words, v["low"], v["high"], v["codes"], 0),
        needs=("dsv4_prmt", "dsv4_and_or"),
    )
)
_EXPAND = """\
  unsigned selector = codes & 0x77777777u;
  unsigned even = codes << 4u;
  unsigned first = dsv4_prmt(low, high, selector);
  unsigned second = dsv4_prmt(low, high, selector >> 16u);
  unsigned first_signs = dsv4_prmt(codes, even, 0x9D8Cu);
  unsigned second_signs = dsv4_prmt(codes, even, 0xBFAEu);
"""
register(
    Extern(
        "dsv4_expand_e2m1x8",
        f"""\
__device__ __forceinline__ void dsv4_expand_e2m1x8(void* out, unsigned codes, unsigned low, unsigned high) {{
{_EXPAND}\
  reinterpret_cast<unsigned*>(out)[0] = dsv4_and_or(first_signs, 0x80808080u, first);
  reinterpret_cast<unsigned*>(out)[1] = dsv4_and_or(second_signs, 0x80808080u, second);
}}
""",
        lambda words, v, _: _pair(words, v, ("out", 0), ("out", 1)),
        needs=("dsv4_prmt", "dsv4_and_or"),
    )
)
register(
    Extern(
        "dsv4_expand_e2m1x8_apart",
        f"""\
__device__ __forceinline__ void dsv4_expand_e2m1x8_apart(void* out, void* upper, unsigned codes, unsigned low,
                                                         unsigned high) {{
{_EXPAND}\
  reinterpret_cast<unsigned*>(out)[0] = dsv4_and_or(first_signs, 0x80808080u, first);
  reinterpret_cast<unsigned*>(upper)[0] = dsv4_and_or(second_signs, 0x80808080u, second);
}}
""",
        lambda words, v, _: _pair(words, v, ("out", 0), ("upper", 0)),
        needs=("dsv4_prmt", "dsv4_and_or"),
    )
)
_EXPAND_CROSSED = """\
  unsigned selector = codes & 0x77777777u;
  unsigned first = dsv4_prmt(low, high, selector);
  unsigned second = dsv4_prmt(low, high, selector >> 16u);
"""
register(
    Extern(
        "dsv4_expand_crossed_e2m1x8",
        f"""\
__device__ __forceinline__ void dsv4_expand_crossed_e2m1x8(void* out, unsigned codes, unsigned low,
                                                           unsigned high) {{
{_EXPAND_CROSSED}\
  reinterpret_cast<unsigned*>(out)[0] = dsv4_and_or(codes, 0x80808080u, first);
  reinterpret_cast<unsigned*>(out)[1] = dsv4_and_or(codes << 4u, 0x80808080u, second);
}}
""",
        lambda words, v, _: {
            ("out", half): uncrossed(words, v["low"], v["high"], v["codes"], half) for half in (0, 1)
        },
        needs=("dsv4_prmt", "dsv4_and_or"),
    )
)
register(
    Extern(
        "dsv4_expand_crossed_e2m1x8_apart",
        f"""\
__device__ __forceinline__ void dsv4_expand_crossed_e2m1x8_apart(void* out, void* upper, unsigned codes,
                                                                 unsigned low, unsigned high) {{
{_EXPAND_CROSSED}\
  reinterpret_cast<unsigned*>(out)[0] = dsv4_and_or(codes, 0x80808080u, first);
  reinterpret_cast<unsigned*>(upper)[0] = dsv4_and_or(codes << 4u, 0x80808080u, second);
}}
""",
        lambda words, v, _: {
            (name, 0): uncrossed(words, v["low"], v["high"], v["codes"], half)
            for half, name in enumerate(("out", "upper"))
        },
        needs=("dsv4_prmt", "dsv4_and_or"),
    )
)
