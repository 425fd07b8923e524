"""The bits of an output row depend on that row's data alone: not on the batch, the position or neighbours.

Of each variant: the computation of an output element, as a term over the tensors (`verify.signature`),
holds no batch dim, no block index and the row's number only as the row of tensors that have one. So in
two runs with other batches, positions and neighbours the element is the same function of the same data.
Of the dispatcher: for every batch of the contract it has a variant, and all variants that it may choose
for the same other dims have equal terms. `refinement` carries this from the tile program to the device.
"""

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache

import z3

from dsv4_kernels.tile.simplifier import is_quick
from dsv4_kernels.tile.wgmma import is_corrected
from verify import extract, ir
from verify.encode import Hypothesis
from verify.externs.elements import as_stores
from verify.host import read_host
from verify.properties import Claims, Context, Issue
from verify.refine.run import Refinement, refinement_of
from verify.refine.tile import Gemm, Step, read_tile
from verify.signature.choice import Range, UndecidedError, batch_bounds, may_meet, ranges, show_ranges
from verify.signature.products import INSTRUCTION_K_BITS
from verify.signature.refute import Difference, Program, difference
from verify.signature.rows import Signature, dims_of, signature
from verify.solve import Answer, Obligation
from verify.verdict import Verdict

_MMA = (
    "a wgmma result is one function of its row of A, column of B and old value, whatever the instruction's "
    "N, the warpgroup, and the operands of other rows and columns"
)
_SWAP = "batch_invariance: a wgmma result is the same with A and B exchanged (it adds the same products)"
_EXACT = (
    "products by powers of two (UE8M0 scales, tried for every byte) are exact, so contracting them into fma "
    "changes nothing: none overflows float32 or falls below its normal range"
)
_FUSED = (
    "nvcc contracts a * b + c alike in every copy and variant of one statement (the product is not exact)"
)
_EXTREMA = "maxima and minima of floats do not meet two zeros of unlike sign that then matter, nor two nans"

_MOST_KEPT = 12  # signatures; the variants for the same dims are fewer, and are checked one after the other
# Signatures of variants by all that they depend on.
_kept: dict[tuple[Hashable, ...], Signature] = {}


class BatchInvariance:
    """Property `batch_invariance`."""

    name = "batch_invariance"
    depends = ("overflow", "bounds", "refinement", "determinism")

    def claims(self, context: Context) -> Claims:
        """Return what has to be proved; what terms settle by being equal is in the notes.

        Raises:
            UnsupportedIR: the tile program is not understood.
        """
        dims = context.dispatch.batch_dims
        if not dims:
            said = "no batch dim is declared" if dims is None else "the kernel is declared to have no batch"
            return Claims(notes=[f"not asked: {said}, so nothing is claimed"])
        return _Check(context, tuple(dims)).run()


PROPERTY = BatchInvariance()


class _Check:
    def __init__(self, context: Context, batch_dims: tuple[str, ...]) -> None:
        self.context, self.claims = context, Claims()
        self.function = context.extracted.tile
        present = dims_of(self.function)
        self.batch_dims = tuple(d for d in batch_dims if d in present)
        self.fixed = {n: v for n, v in context.dims.items() if n not in batch_dims}

    def run(self) -> Claims:
        claims, context = self.claims, self.context
        if not self.batch_dims:
            claims.unknown.append(Issue(None, "no dim of the kernel's tensors is a batch dim"))
            return claims
        source = extract.source_of(context.extracted)
        order = self._order(context.refinement)
        if source is None:
            own = self._signature(self.function, order)
        else:
            own = self._kept_signature(source, self.function, order)
        self._report(own)
        self._instructions(read_tile(as_stores(self.function)).steps)
        claims.obligations += own.obligations
        if not own.problems and not own.unsupported:
            claims.facts["signature"] = own.digest
            outputs = ", ".join(f"{o.name} {o.digest[:16]}" for o in own.outputs.values())
            claims.notes.append(f"signature over rows ({', '.join(self.batch_dims)}): {outputs}")
            self._siblings(own)
        return claims

    def _signature(self, function: ir.Function, order: "_Order | _LazyOrder") -> Signature:
        shared = self.context.dispatch.shared_rows
        return signature(function, self.batch_dims, self.context.hypotheses, order, shared)

    def _kept_signature(self, source: str, function: ir.Function, order: "_Order | _LazyOrder") -> Signature:
        """Return the signature of a variant, worked out once for all that are compared with it.

        Args:
            source: the variant's `extract.source_sha256`.
            function: its tile stage.
            order: the trees of its reductions.
        """
        given = tuple((h.label, h.kind, h.term.sexpr()) for h in self.context.hypotheses)
        shared = tuple(sorted(self.context.dispatch.shared_rows.items()))
        key = (source, self.batch_dims, given, shared)
        if key not in _kept:
            while len(_kept) >= _MOST_KEPT:
                del _kept[next(iter(_kept))]
            _kept[key] = self._signature(function, order)
        return _kept[key]

    # ------------------------------------------------------------------ the variant itself
    def _order(self, refinement: Refinement) -> "_Order":
        return _Order(refinement)

    def _report(self, own: Signature) -> None:
        claims = self.claims
        claims.unsupported += [Issue(span, what) for span, what in own.unsupported]
        if own.problems:
            programs = [Program(self.function)]
            found = difference(programs, self.batch_dims, self.fixed, self.context.contract)
            for span, what in own.problems:
                self._problem(span, what, found)
        used = ((own.uses_mma, _MMA), (own.exact, _EXACT), (own.fused, _FUSED), (own.float_extrema, _EXTREMA))
        claims.assumptions += [f"batch_invariance: {text}" for is_used, text in used if is_used]
        claims.assumptions += [
            f"batch_invariance: {name} has one entry for {count} consecutive rows, or equal ones"
            for name, count in self.context.dispatch.shared_rows.items()
        ]

    def _problem(self, span: ir.Span | None, what: str, found: Difference | None) -> None:
        if found is None:
            self.claims.unknown.append(Issue(span, what))
            return
        obligation = Obligation(what, span, (), z3.BoolVal(False))
        second = {f"{name}'": value for name, value in found.second.items()}
        shown = {**found.first, **second, **found.values}
        model = {name: value for name, value in found.first.items() if name in self.batch_dims}
        self.claims.answers.append(Answer(obligation, Verdict.REFUTED, model=model, shown=shown))

    def _instructions(self, steps: Sequence[Step]) -> None:
        """Check that the device takes K in the order that the terms have."""
        for step in steps:
            if not isinstance(step, Gemm) or step.a is None:
                continue
            width = INSTRUCTION_K_BITS // step.a.buffer.dtype.bits
            depth = step.a.extents[-2 if step.trans_a else -1]
            length = int(depth.value) if isinstance(depth, ir.Const) else 0
            wanted = tuple(tuple(range(k, k + width)) for k in range(0, length, width))
            if self.context.refinement.orders.get(step.number) != {wanted}:
                message = f"{step.what}: the instructions do not take K in ascending chunks of {width}"
                self.claims.unknown.append(Issue(step.span, message))

    # ------------------------------------------------------------------ the dispatcher
    def _siblings(self, own: Signature) -> None:
        dispatch = self.context.dispatch
        if dispatch.select is None:
            return
        try:
            bounds = batch_bounds(self.context.contract, dispatch.fixed, self.batch_dims)
            found = list(ranges(dispatch.select, dispatch.fixed, bounds))
        except UndecidedError as error:
            self.claims.unknown.append(Issue(None, str(error)))
            return
        served = {dispatch.variant, *dispatch.siblings}
        mine = [p for p in found if p.variant == dispatch.variant]
        chosen: dict[str, list[Range]] = {}
        for part in (p for p in found if any(self._may_meet(p, own_part) for own_part in mine)):
            if part.variant not in served:
                self._unserved(part)
            else:
                chosen.setdefault(part.variant or "", []).append(part)
        names = sorted(chosen, key=lambda v: min(p.bounds[d][0] for p in chosen[v] for d in self.batch_dims))
        self.claims.facts["chosen"] = " ".join(names)
        for name in names:
            if name != dispatch.variant:
                self._sibling(own, name, chosen)
        text = "; ".join(f"{name} for {show_ranges(chosen[name])}" for name in names)
        self.claims.notes.append(f"dispatcher: {text or 'never chooses this variant'}")

    def _may_meet(self, first: Range, second: Range) -> bool:
        """Return whether calls of both ranges may differ in batch dims alone."""
        return may_meet(first, second, self.batch_dims)

    def _unserved(self, part: Range) -> None:
        what = (
            "the dispatcher has no variant for this batch"
            if part.variant is None
            else (f"the dispatcher chooses {part.variant}, which is no variant for these dims")
        )
        obligation = Obligation(f"{what} ({show_ranges([part])})", None, (), z3.BoolVal(False))
        model = {name: low for name, (low, _) in part.bounds.items()}
        shown = {"dispatcher": part.error or str(part.variant)}
        self.claims.answers.append(Answer(obligation, Verdict.REFUTED, model=model, shown=shown))

    def _sibling(self, own: Signature, name: str, chosen: Mapping[str, list[Range]]) -> None:
        prim_func = self.context.dispatch.siblings[name]()
        function = extract.tile_function(prim_func)
        source = _source(prim_func, (is_corrected(), is_quick()))
        order = _LazyOrder(prim_func, source, self.context.hypotheses)
        other = self._kept_signature(source, function, order)
        for span, what in (*other.problems, *other.unsupported):
            self.claims.unknown.append(Issue(span, f"variant {name}: {what}"))
        if other.problems or other.unsupported:
            return
        self.claims.obligations += other.obligations
        self.claims.facts[f"as {name}"] = other.digest
        if other.digest == own.digest:
            return
        if not self._same_runs(own, other):
            self._unequal(own, other, name, function, chosen)

    def _same_runs(self, own: Signature, other: Signature) -> bool:
        """Return whether signatures agree once loops are taken apart, if need be with operands exchanged."""
        try:
            if own.as_runs(swaps=False) == other.as_runs(swaps=False):
                return True
            same = own.as_runs(swaps=True) == other.as_runs(swaps=True)
        except ir.UnsupportedIR:
            return False
        if same and _SWAP not in self.claims.assumptions:
            self.claims.assumptions.append(_SWAP)
        return same

    def _unequal(
        self,
        own: Signature,
        other: Signature,
        name: str,
        function: ir.Function,
        chosen: Mapping[str, list[Range]],
    ) -> None:
        variant = self.context.dispatch.variant
        names = [
            o
            for o in own.outputs
            if o not in other.outputs or own.outputs[o].digest != other.outputs[o].digest
        ]
        what = f"{variant} and {name} compute {', '.join(names)} in different ways, and the batch decides"
        programs = [
            Program(code, chosen[one][0].bounds[self.batch_dims[0]])
            for code, one in ((self.function, variant), (function, name))
            if one in chosen
        ]
        found = difference(programs, self.batch_dims, self.fixed, self.context.contract)
        self._problem(None, what, found if len(programs) > 1 else None)


@lru_cache(maxsize=_MOST_KEPT)
def _source(prim_func: object, compiler: tuple[bool, bool]) -> str:
    """Return `extract.source_sha256`, kept by the PrimFunc's identity and the state of the compiler."""
    del compiler
    return extract.source_sha256(prim_func)


class _Order:
    """The tree in which the device adds up a reduce step."""

    def __init__(self, refinement: Refinement) -> None:
        self._refinement = refinement

    def __call__(self, step: Step) -> object:
        """Return the tree's hash.

        Raises:
            UnsupportedIR: rows have different trees, or it is not known.
        """
        return _tree(self._refinement, step)


class _LazyOrder:
    """Likewise for another variant, which is lowered only if a tree is asked for."""

    def __init__(
        self,
        prim_func: object,
        source: str,
        hypotheses: tuple[Hypothesis, ...],
    ) -> None:
        self._lowered = lambda: extract.lowered(prim_func, None, source)
        self._hypotheses = hypotheses
        self._refinement: Refinement | None = None

    def __call__(self, step: Step) -> object:
        if self._refinement is None:
            found = self._lowered()
            host = read_host(found.host, found.device, found.tile)
            self._refinement = refinement_of(found, host, self._hypotheses)
        return _tree(self._refinement, step)


def _tree(refinement: Refinement, step: Step) -> object:
    found = refinement.orders.get(step.number, set())
    if len(found) != 1:
        why = "rows of a tile are added up in different orders" if found else "its order is not known"
        raise ir.UnsupportedIR(f"{step.what}: {why}")
    return next(iter(found))
