"""32-bit words, computed on by one text in two ways: as Z3 bit-vectors and as arrays of integers.

The meaning of a device function and the steps of its source are both written over `Words`, so each can
be proved for all inputs and run on data.
"""

from typing import Any, Protocol

import numpy as np

BITS = 32
MASK = (1 << BITS) - 1


class Words(Protocol):
    """Arithmetic modulo 2**32; a truth value is whatever `equal` and `less` return."""

    def const(self, value: int) -> Any:
        """Return the word `value`."""

    def bitand(self, a: Any, b: Any) -> Any:
        """Return a & b."""

    def bitor(self, a: Any, b: Any) -> Any:
        """Return a | b."""

    def bitxor(self, a: Any, b: Any) -> Any:
        """Return a ^ b."""

    def add(self, a: Any, b: Any) -> Any:
        """Return a + b."""

    def sub(self, a: Any, b: Any) -> Any:
        """Return a - b."""

    def mul(self, a: Any, b: Any) -> Any:
        """Return a * b."""

    def shl(self, a: Any, amount: Any) -> Any:
        """Return a << amount, 0 from 32 on."""

    def shr(self, a: Any, amount: Any) -> Any:
        """Return a >> amount of an unsigned word, 0 from 32 on."""

    def equal(self, a: Any, b: Any) -> Any:
        """Return whether a == b."""

    def less(self, a: Any, b: Any) -> Any:
        """Return whether a < b as unsigned numbers."""

    def choose(self, condition: Any, a: Any, b: Any) -> Any:
        """Return a where the condition holds, else b."""


class _Operators:
    """What terms and arrays of words have Python's operators for."""

    def bitand(self, a: Any, b: Any) -> Any:
        """Return a & b."""
        return a & b

    def bitor(self, a: Any, b: Any) -> Any:
        """Return a | b."""
        return a | b

    def bitxor(self, a: Any, b: Any) -> Any:
        """Return a ^ b."""
        return a ^ b

    def equal(self, a: Any, b: Any) -> Any:
        """Return whether a == b."""
        return a == b


class BitVectors(_Operators):
    """Words as Z3 terms."""

    def __init__(self) -> None:
        """Import Z3, which running a kernel does not need."""
        import z3

        self.z3 = z3

    def const(self, value: int) -> Any:
        """Return the word `value`."""
        return self.z3.BitVecVal(value & MASK, BITS)

    def variable(self, name: str) -> Any:
        """Return a word that may be anything."""
        return self.z3.BitVec(name, BITS)

    def add(self, a: Any, b: Any) -> Any:
        """Return a + b."""
        return a + b

    def sub(self, a: Any, b: Any) -> Any:
        """Return a - b."""
        return a - b

    def mul(self, a: Any, b: Any) -> Any:
        """Return a * b."""
        return a * b

    def shl(self, a: Any, amount: Any) -> Any:
        """Return a << amount, 0 from 32 on."""
        return a << amount

    def shr(self, a: Any, amount: Any) -> Any:
        """Return a >> amount of an unsigned word, 0 from 32 on."""
        return self.z3.LShR(a, amount)

    def less(self, a: Any, b: Any) -> Any:
        """Return whether a < b as unsigned numbers."""
        return self.z3.ULT(a, b)

    def choose(self, condition: Any, a: Any, b: Any) -> Any:
        """Return a where the condition holds, else b."""
        return self.z3.If(condition, a, b)


class Arrays(_Operators):
    """Words as numpy int64 arrays of values below 2**32, element by element."""

    def const(self, value: int) -> Any:
        """Return the word `value`."""
        return np.int64(value & MASK)

    def add(self, a: Any, b: Any) -> Any:
        """Return a + b."""
        return (a + b) & MASK

    def sub(self, a: Any, b: Any) -> Any:
        """Return a - b."""
        return (a - b) & MASK

    def mul(self, a: Any, b: Any) -> Any:
        """Return a * b, whose low bits survive the overflow of int64."""
        with np.errstate(over="ignore"):
            return (a * b) & MASK

    def shl(self, a: Any, amount: Any) -> Any:
        """Return a << amount, 0 from 32 on."""
        return np.where(amount < BITS, (a << np.minimum(amount, BITS - 1)) & MASK, 0)

    def shr(self, a: Any, amount: Any) -> Any:
        """Return a >> amount of an unsigned word, 0 from 32 on."""
        return np.where(amount < BITS, a >> np.minimum(amount, BITS - 1), 0)

    def less(self, a: Any, b: Any) -> Any:
        """Return whether a < b as unsigned numbers."""
        return a < b

    def choose(self, condition: Any, a: Any, b: Any) -> Any:
        """Return a where the condition holds, else b."""
        return np.where(condition, a, b)


def byte(words: Words, word: Any, number: Any) -> Any:
    """Return byte `number` (0 is the least significant) of a word."""
    number = words.const(number) if isinstance(number, int) else number
    return words.bitand(words.shr(word, words.shl(number, words.const(3))), words.const(0xFF))


def pack(words: Words, parts: list[Any]) -> Any:
    """Return the word whose bytes, lowest first, are the low bytes of `parts`."""
    total = words.const(0)
    for number, part in enumerate(parts):
        low = words.bitand(part, words.const(0xFF))
        total = words.bitor(total, words.shl(low, words.const(8 * number)))
    return total
