"""Terms: which identities are used, and which are not since they would lose a bit."""

import pytest

from verify import ir
from verify.refine.sym import Algebra
from verify.signature.terms import Terms, is_power_of_two

F32, I32, U8 = ir.DType("float32"), ir.DType("int32"), ir.DType("uint8")


@pytest.fixture
def terms():
    return Terms()


def read(terms, name, dtype=F32):
    return terms.make("read", dtype, name)


def test_zero_is_dropped_only_where_its_sign_cannot_show(terms):
    p, acc = read(terms, "p"), terms.binary("add", F32, terms.const(0.0, F32), read(terms, "q"))
    padded = terms.binary("add", F32, terms.const(0.0, F32), p)
    assert padded is not p
    assert terms.binary("add", F32, acc, padded) is terms.binary("add", F32, acc, p)
    unsigned = read(terms, "acc")  # may be -0, and then -0 + (0 + p) is not -0 + p for p = -0
    assert terms.binary("add", F32, unsigned, padded) is not terms.binary("add", F32, unsigned, p)
    scaled = terms.binary("mul", F32, padded, read(terms, "s"))
    plain = terms.binary("mul", F32, p, read(terms, "s"))
    assert terms.binary("add", F32, acc, scaled) is terms.binary("add", F32, acc, plain)
    negative = terms.binary("add", F32, terms.const(-0.0, F32), p)
    assert not negative.never_minus_zero


def test_sums_commute_and_do_not_associate(terms):
    a, b, c = (read(terms, n) for n in "abc")
    left = terms.binary("add", F32, terms.binary("add", F32, a, b), c)
    assert left is terms.binary("add", F32, c, terms.binary("add", F32, b, a))
    assert left is not terms.binary("add", F32, a, terms.binary("add", F32, b, c))
    assert terms.binary("sub", F32, a, b) is not terms.binary("sub", F32, b, a)
    assert terms.binary("max", F32, a, b) is not terms.binary("max", F32, b, a)


def test_integers_fold_with_their_wrapping(terms):
    big, one = terms.const(2**31 - 1, I32), terms.const(1, I32)
    assert terms.binary("add", I32, big, one) is terms.const(-(2**31), I32)
    x = read(terms, "x", I32)
    assert terms.binary("shr", I32, x, terms.const(0, I32)) is x
    assert terms.binary("sub", I32, terms.const(0, I32), x) is not x


def decoded(terms, shift, floor):
    byte = terms.make("cast", I32, read(terms, "code", U8))
    bits = terms.binary("shl", I32, byte, terms.const(shift, I32))
    return terms.make("reinterpret", F32, terms.binary("max", I32, bits, terms.const(floor, I32)))


def test_powers_of_two_are_tried_for_every_byte(terms):
    assert is_power_of_two(decoded(terms, 23, 0x00400000))
    assert not is_power_of_two(decoded(terms, 22, 0x00400000))  # odd codes have a mantissa bit
    assert not is_power_of_two(decoded(terms, 23, 0x00600000))  # code 0 is 1.5 * 2**-127
    both = terms.binary("mul", F32, decoded(terms, 23, 0x00400000), read(terms, "s"))
    assert not is_power_of_two(both)
    assert is_power_of_two(terms.const(0.25, F32))
    assert not is_power_of_two(terms.const(0.75, F32))


def test_counters_of_one_name_and_other_ranges_are_two_symbols():
    algebra = Algebra()
    narrow, wide = algebra.var("k1", 0, 15), algebra.var("k1", 0, 63)
    assert narrow.key != wide.key
    assert wide.bounds() == (0, 63)
    assert algebra.var("k1", 0, 15).key == narrow.key
