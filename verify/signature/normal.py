"""Terms compared as runs: folds taken apart, so that loops cut in other ways may be seen to agree."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.sym import Algebra, Sym, const
from verify.signature.regions import Region, digest_of
from verify.signature.terms import Term, Terms, integer

MAX_ITERATIONS = 4096  # of one fold
OTHER_RANGE = "'"  # after the name of a counter: one of the same depth whose range is another
_COMPUTED = frozenset(
    {"add", "sub", "mul", "min", "max", "shl", "shr", "bitand", "bitor", "bitxor", "floordiv"}
)
_COMPARED = frozenset({"floormod", "lt", "le", "gt", "ge", "eq", "ne", "and", "or"})


@dataclass
class Normal:
    """Rewrites terms.

    Attributes:
        swaps: a matrix instruction counts as the same with its operands exchanged.
    """

    terms: Terms
    algebra: Algebra
    swaps: bool = False
    _closed: dict[int, bool] = field(default_factory=dict)
    _known: dict[int, Term] = field(default_factory=dict)

    def digest(self, name: str, dtype: ir.DType, terms: tuple[Term, ...], regions: tuple[Region, ...]) -> str:
        """Return the hash of an output's terms after rewriting; `regions`: which elements each writes.

        Raises:
            UnsupportedIR: a fold of symbolic length, or one that is too long.
        """
        ways = [(self.rewrite(t, {}, {}).digest, r) for t, r in zip(terms, regions, strict=True)]
        return digest_of(name, dtype, ways)

    def rewrite(self, term: Term, values: Mapping[str, Any], memo: dict[int, Term]) -> Term:
        """Return `term` where `values` gives counters their numbers and carried terms their values."""
        memo = self._known if self._is_closed(term) else memo
        found = memo.get(id(term))
        if found is None:
            found = memo[id(term)] = self._rewritten(term, values, memo)
        return found

    def _rewritten(self, term: Term, values: Mapping[str, Any], memo: dict[int, Term]) -> Term:
        if term.op == "carried":
            return values[f"carried {term.args[0]} {term.args[1]}"]
        if term.op == "fold":
            return self._unfolded(term, values, memo)
        args = tuple(self._argument(a, values, memo) for a in term.args)
        if term.op in _COMPUTED or term.op in _COMPARED:
            return self.terms.binary(term.op, term.dtype, *args)
        if term.op == "index":
            return self.terms.index(args[0], term.dtype)
        if term.op == "select" and (truth := integer(args[0])) is not None:
            return args[1] if truth else args[2]
        if term.op == "mma" and self.swaps:
            previous, a, b, width, kinds = args
            if a.digest > b.digest:
                args = (previous, b, a, width, tuple(reversed(kinds)))
        return self.terms.make(term.op, term.dtype, *args)

    def _argument(self, arg: Any, values: Mapping[str, Any], memo: dict[int, Term]) -> Any:
        if isinstance(arg, Term):
            return self.rewrite(arg, values, memo)
        if isinstance(arg, Sym):
            return self.index(arg, values)
        if isinstance(arg, tuple):
            return tuple(self._argument(a, values, memo) for a in arg)
        return arg

    def _unfolded(self, term: Term, values: Mapping[str, Any], memo: dict[int, Term]) -> Term:
        depth, start, extent, which, inits, bodies = term.args
        extent = self.index(extent, values)
        if not extent.is_constant or int(extent.constant) > MAX_ITERATIONS:
            raise UnsupportedIR("a loop whose length is no small number")
        states = [self.rewrite(init, values, memo) for init in inits]
        for value in range(start, start + int(extent.constant)):
            inner = {**values, f"t{depth}": value}
            inner |= {f"carried {depth} {n}": state for n, state in enumerate(states)}
            here: dict[int, Term] = {}
            states = [self.rewrite(body, inner, here) for body in bodies]
        return states[which]

    def index(self, value: Sym, values: Mapping[str, Any]) -> Sym:
        """Return `value` where `values` gives counters their numbers, or what stands for them."""
        if not any(a.kind == "var" and _name(a) in values for a in value.atoms()):
            return value
        return self._placed(value, values)

    def _placed(self, value: Sym, values: Mapping[str, Any]) -> Sym:
        total = const(0)
        for monomial, coefficient in value.terms.items():
            product = const(coefficient)
            for atom in monomial:
                product = product * self._atom(atom, values)
            total = total + product
        return total

    def _atom(self, atom: Any, values: Mapping[str, Any]) -> Sym:
        if atom.kind == "var":
            given = values.get(_name(atom), Sym({(atom,): 1}))
            return given if isinstance(given, Sym) else const(given)
        args: tuple[Any, ...] = tuple(self.index(a, values) if isinstance(a, Sym) else a for a in atom.args)
        if atom.kind == "floordiv":
            return self.algebra.floordiv(*args)
        if atom.kind in ("min", "max"):
            return self.algebra.extremum(atom.kind, *args)
        return self.algebra.call(atom.kind, args, atom.low, atom.high)

    def _is_closed(self, term: Term) -> bool:
        """Return whether no loop around it is needed to know its value."""
        known = self._closed.get(id(term))
        if known is None:
            counters = (a for s in term.syms() for a in s.atoms() if a.kind == "var")
            known = term.op not in ("carried", "fold") and not any(_is_counter(_name(a)) for a in counters)
            known = known and all(self._is_closed(c) for c in term.children())
            self._closed[id(term)] = known
        return known


def _name(atom: Any) -> str:
    return atom.args[0].rstrip(OTHER_RANGE)


def _is_counter(name: str) -> bool:
    return name.startswith("t") and name[1:].isdigit()
