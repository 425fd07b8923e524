"""What `fp4_linear` may take for a row, folded or widened weights, adds the same products in the same order.

Each form is proved batch-invariant by itself. Here their terms are compared, with weights as they stand in a
product: which element a form widens, and to what, `format` says, and tests of every code and of both's bits.
"""

import pytest

from dsv4_kernels.gemm import fp8_fp4_gemm_folded, fp8_fp4_gemm_widened
from dsv4_kernels.gemm.fp8_fp4_gemm_widened import SHAPES
from tests.verify.handover import signature_of
from verify.signature.normal import Normal
from verify.signature.terms import walk

INSTRUCTION_K = 32  # channels of e4m3
BATCHES = (1, 17, 129, 300, 1000, 1024, 2048, 8192)
WEIGHTS = {"extern_element", "read"}  # widened in registers; read from what was widened before


class _Products(Normal):
    """Takes a weight of a product for one name, where it is of the channel that x has there."""

    def _rewritten(self, term, values, memo):
        made = super()._rewritten(term, values, memo)
        if made.op != "mma":
            return made
        previous, *operands, width, _ = made.args
        (x,) = (o for o in operands if o.op == "read" and o.args[0] == "x")
        (w,) = (o for o in operands if o is not x)
        assert w.op in WEIGHTS
        if w.op == "read":
            assert w.args[0] == "w"
            assert w.args[2].key == x.args[2].key
        return self.terms.make("product", made.dtype, previous, x, width)


def order_of(variant, module):
    """Return the hash of a form's sum over the products of x with weights, each instruction's once."""
    made = signature_of(module.make_kernel(**variant.kwargs))
    (term,) = made.outputs["out"].terms
    rewritten = _Products(made.terms, made.algebra, swaps=True).rewrite(term, {}, {})
    assert sum(t.op == "product" for t in walk(rewritten)) == variant.kwargs["k"] // INSTRUCTION_K
    return rewritten.digest


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_all_forms_add_the_same_products_in_one_order(n, k):
    found = {}
    for module in (fp8_fp4_gemm_folded, fp8_fp4_gemm_widened):
        for m in BATCHES:
            variant = module.SPEC.select({"m": m, "n": n, "k": k})
            found[module.NAME, variant.id] = variant, module
    orders = {name: order_of(*form) for name, form in found.items()}
    assert len({name for name, _ in orders}) == 2
    assert len(set(orders.values())) == 1, orders
