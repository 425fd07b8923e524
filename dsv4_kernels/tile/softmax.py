"""exp of numbers that are not positive, each step rounded as IEEE says: a softmax with defined bits.

The hardware's exp2 is an approximation whose bits no other unit has. This one is a product, two fused
multiply-adds and a polynomial, so that a reference has its bits: relative error below 2**-19.
"""

from typing import Any

from tilelang import language as T

from dsv4_kernels.tile.scale import F32_MANTISSA_BITS

F32_BIAS = 127  # of exponents
LOG2_E = 1.4426950408889634
LEAST = -86.0  # below it the result is that of LEAST, 2**-124: normal
TO_INTEGER = 1.5 * 2.0**23  # added to |x| < 2**22, leaves round(x) in the sum's low bits
# 2**f for |f| <= 1/2, the factors of f, f**2, ...; least relative error (2**-23) with 1 for f = 0.
EXP2_FACTORS = (0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957)
EXP2_LAST = 0.0013264723820611835


def exp_weight(x: Any) -> Any:
    """Return exp(x) in float32 for x <= 0 or -inf; exactly 1 for 0.

    The integer nearest x * log2(e) goes to the exponent; the rest, at most 1/2, to the polynomial.
    """
    bounded = T.max(x, LEAST)
    shifted = T.ieee_fmaf(bounded, LOG2_E, TO_INTEGER)
    rest = T.ieee_fmaf(bounded, LOG2_E, TO_INTEGER - shifted)
    value: Any = EXP2_LAST
    for factor in reversed(EXP2_FACTORS):
        value = T.ieee_fmaf(value, rest, factor)
    value = T.ieee_fmaf(value, rest, 1.0)
    # Of the sum's bits the lowest nine count up with the integer; those above are shifted out.
    exponent = (T.reinterpret(shifted, "int32") + F32_BIAS) << F32_MANTISSA_BITS
    return T.ieee_mul(value, T.reinterpret(exponent, "float32"))
