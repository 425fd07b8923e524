"""What two launches compute together: the terms of one that reads what the other wrote, put into each other.

`batch_invariance` follows one kernel. Where the second reads elements of its own row that the first wrote,
what it computes of the inputs is its term with the first one's terms in place of those reads: each element is
written once (`coverage`), before the second launch begins.
"""

from dataclasses import dataclass, field
from typing import Any

from dsv4_kernels.tile.corrections import corrected
from verify import extract
from verify.refine.sym import Sym
from verify.signature.normal import Normal
from verify.signature.rows import ROW, Signature, signature
from verify.signature.terms import Term


def signature_of(prim_func: Any) -> Signature:
    """Return the signature of a kernel whose rows are counted by m; it has to be free of the batch."""
    with corrected():
        found = signature(extract.tile_function(prim_func), ("m",), (), lambda step: "any")
    assert not found.problems, found.problems
    assert not found.unsupported, found.unsupported
    return found


def digest_of(made: Signature, output: str) -> str:
    """Return the hash of what a kernel computes: loops taken apart, operands of products in either order."""
    (term,) = made.outputs[output].terms
    return Normal(made.terms, made.algebra, swaps=True).rewrite(term, {}, {}).digest


def composed_digest(first: Signature, handed: str, second: Signature, output: str) -> str:
    """Return the hash of what both compute together.

    Args:
        first: writes the tensor `handed` [m, ...] by one statement.
        handed: that the second reads in the row that it writes.
        second: of the reader.
        output: tensor that the reader writes.
    """
    (written,), (reading,) = first.outputs[handed].terms, second.outputs[output].terms
    term = _Handover(first, handed, written).put(reading)
    return Normal(first.terms, first.algebra, swaps=True).rewrite(term, {}, {}).digest


@dataclass
class _Handover:
    """Puts the terms of what was written in place of its reads."""

    first: Signature
    handed: str
    written: Term
    _known: dict[int, Term] = field(default_factory=dict)

    def put(self, term: Term) -> Term:
        """Return `term` over the inputs of the first kernel."""
        if id(term) not in self._known:
            self._known[id(term)] = self._put(term)
        return self._known[id(term)]

    def _put(self, term: Term) -> Term:
        if term.op == "read" and term.args[0] == self.handed:
            return self._element(*term.args[1:])
        args = tuple(self.put(a) if isinstance(a, Term) else a for a in term.args)
        assert not any(isinstance(a, tuple) for a in args), f"{term.op} is not followed"
        if term.op == "add":
            return self.first.terms.binary(term.op, term.dtype, *args)
        assert term.op in ("cast", "const"), f"{term.op} is not followed"
        return self.first.terms.make(term.op, term.dtype, *args)

    def _element(self, row: Sym, *others: Sym) -> Term:
        (atom,) = row.atoms()
        assert row.terms == {(atom,): 1}, f"another row than its own: {row}"
        assert atom.args[0] == ROW, f"another row than its own: {row}"
        values = {f"o{axis}": index for axis, index in enumerate(others, start=1)}
        # Not kept: an element's terms are of its own values.
        return Normal(self.first.terms, self.first.algebra).rewrite(self.written, values, {})
