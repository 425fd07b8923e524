"""The integer instructions of PTX that registered functions may use, after the PTX ISA's definitions."""

from collections.abc import Callable
from typing import Any

from verify.externs.words import BITS, Words, byte, pack

_SIGN_MODE = 8  # bit of a prmt selector nibble: replicate the byte's sign bit
_BYTES = 4


def prmt(words: Words, a: Any, b: Any, selector: Any) -> Any:
    """`prmt.b32`: byte n of the result is byte (selector nibble n) of b:a, or its sign eight times."""
    parts = []
    for n in range(_BYTES):
        nibble = words.bitand(words.shr(selector, words.const(4 * n)), words.const(0xF))
        index = words.bitand(nibble, words.const(3))
        upper = words.bitand(nibble, words.const(_BYTES))
        source = words.choose(words.equal(upper, words.const(0)), a, b)
        chosen = byte(words, source, index)
        negative = words.equal(words.shr(chosen, words.const(7)), words.const(1))
        sign = words.choose(negative, words.const(0xFF), words.const(0))
        replicate = words.equal(words.bitand(nibble, words.const(_SIGN_MODE)), words.const(_SIGN_MODE))
        parts.append(words.choose(replicate, sign, chosen))
    return pack(words, parts)


def lop3(words: Words, a: Any, b: Any, c: Any, table: int) -> Any:
    """`lop3.b32`: bit by bit the truth table `table`, whose row a b c is bit 4 a + 2 b + c."""
    ones = words.const(-1)
    total = words.const(0)
    for row in range(8):
        if not table >> row & 1:
            continue
        term = ones
        for operand, value in ((a, row >> 2 & 1), (b, row >> 1 & 1), (c, row & 1)):
            term = words.bitand(term, operand if value else words.bitxor(operand, ones))
        total = words.bitor(total, term)
    return total


def shf_l_wrap(words: Words, low: Any, high: Any, amount: Any) -> Any:
    """`shf.l.wrap.b32`: the upper word of high:low shifted left by amount mod 32."""
    n = words.bitand(amount, words.const(BITS - 1))
    other = words.sub(words.const(BITS), n)
    return words.bitor(words.shl(high, n), words.shr(low, other))


def shf_r_wrap(words: Words, low: Any, high: Any, amount: Any) -> Any:
    """`shf.r.wrap.b32`: the lower word of high:low shifted right by amount mod 32."""
    n = words.bitand(amount, words.const(BITS - 1))
    other = words.sub(words.const(BITS), n)
    return words.bitor(words.shr(low, n), words.shl(high, other))


# Number of word operands and meaning; lop3's last operand is an immediate.
INSTRUCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "prmt.b32": (3, prmt),
    "shf.l.wrap.b32": (3, shf_l_wrap),
    "shf.r.wrap.b32": (3, shf_r_wrap),
    "and.b32": (2, lambda words, a, b: words.bitand(a, b)),
    "or.b32": (2, lambda words, a, b: words.bitor(a, b)),
    "xor.b32": (2, lambda words, a, b: words.bitxor(a, b)),
    "add.u32": (2, lambda words, a, b: words.add(a, b)),
    "shl.b32": (2, lambda words, a, b: words.shl(a, b)),
    "shr.u32": (2, lambda words, a, b: words.shr(a, b)),
}
LOP3 = "lop3.b32"
