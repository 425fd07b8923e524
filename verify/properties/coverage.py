"""Every element of every output tensor is written exactly once.

At most once: for each store the index's digits are guessed, and lemmas proved that make an element
determine the block, thread and iteration that write it; where they fail two copies of the store are
compared. Stores are compared pairwise. At least once: the guessed
writer of an arbitrary element is proved to exist, to pass its guards and to write that element. Of a tensor
that is updated in place only the first is asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import z3

from verify import ir, ops
from verify.encode import (
    Hypothesis,
    Index,
    Scope,
    constants_of,
    depends_on_data,
    elected_any,
    elected_lane,
    local_assumptions,
    range_of_data,
)
from verify.intarith import conjunction, constant_of
from verify.inverse import Axis, NotDigitsError, candidate
from verify.origin import Origins
from verify.overlap import meet, meet_by_digits
from verify.properties import Claims, Context, Issue
from verify.properties.schedule import show_tiles, stores_of, wave_of
from verify.solve import Answer, Obligation, Prover
from verify.storage import BYTE_BITS
from verify.verdict import Verdict
from verify.walk import Site

NAME = "coverage"
SEARCH_RLIMIT = 10_000_000  # z3 resource units to see whether a guess is worth an obligation
_GIVEN = ("contract", "shape")  # hypotheses about the call, not about who writes


@dataclass(frozen=True)
class Writer:
    """One statement that writes a tensor: a box of `axes` for each value of `indices`."""

    site: Site
    what: str
    axes: tuple[Axis, ...]
    unit_bits: int
    hypotheses: tuple[Hypothesis, ...]
    indices: tuple[Index, ...]

    def substituted(self, names: Mapping[str, z3.ArithRef]) -> "Writer":
        """Return the writer with its indices replaced."""
        pairs = [(i.const, names[i.const.decl().name()]) for i in self.indices]
        own = tuple(h for h in self.hypotheses if not self.is_given(h))
        return replace(
            self,
            axes=tuple(Axis(z3.substitute(a.index, *pairs), a.count) for a in self.axes),
            hypotheses=tuple(replace(h, term=z3.substitute(h.term, *pairs)) for h in own),
        )

    def is_given(self, hypothesis: Hypothesis) -> bool:
        """Return whether a hypothesis is about the call alone, not about who writes."""
        if hypothesis.kind in _GIVEN:
            return True
        names = {i.const.decl().name() for i in self.indices}
        about_call = hypothesis.kind == "assume" and hypothesis.term.get_id() not in self._local
        return about_call and not names & constants_of(hypothesis.term)

    @cached_property
    def _local(self) -> frozenset[int]:
        return local_assumptions(self.hypotheses)

    @property
    def conditions(self) -> list[z3.BoolRef]:
        """What makes it write; what is assumed where it does is no condition."""
        return [h.term for h in self.hypotheses if h.kind != "assume"]

    def writes(self, positions: Sequence[z3.ArithRef]) -> z3.BoolRef:
        """Return that the box holds `positions`."""
        pairs = zip(self.axes, positions, strict=True)
        return conjunction([z3.And(a.index <= p, p < a.index + a.count) for a, p in pairs])


class Coverage:
    """Property `coverage`."""

    name = NAME
    depends = ("overflow", "bounds")

    def claims(self, context: Context) -> Claims:
        """Return the obligations for every tensor that the kernel writes."""
        claims = Claims()
        for site in context.device_sites:
            if isinstance(site.node, ir.Call) and site.node.op in ops.EARLY_EXIT:
                claims.unsupported.append(Issue(site.span, f"{site.node.op}: what follows may not run"))
        claims.unsupported += [Issue(site.span, what) for site, what in context.memory.unsupported]
        outputs = _writers(context, claims)
        if not outputs and not claims.unsupported and not claims.notes:
            claims.unknown.append(Issue(None, "the kernel writes no tensor"))
        for name in _untouched(context):
            claims.unknown.append(
                Issue(None, f"{name} is never accessed: if it is an output, nothing writes it")
            )
        looped = {id(s.site.node): (s, w) for s in stores_of(context) if (w := wave_of(s)) is not None}
        for tensor, extents, writers in outputs:
            rounds = looped.get(id(writers[0].site.node))
            if len(writers) == 1 and rounds is not None:  # tiles in turn: by the schedule
                prover = Prover()
                show_tiles(context, prover, *rounds, claims)
                claims.spent.append(prover)
                continue
            _once(context, tensor.name, writers, claims)
            if tensor.name in context.dispatch.in_place:
                note = f"{tensor.name} is updated in place: elements that no store reaches keep their values"
                claims.notes.append(note)
                continue
            _all(context, tensor.name, extents, writers, claims)
        if any(site_uses_elect(w.site) for _, _, writers in outputs for w in writers):
            claims.assumptions.append("elect.sync picks exactly one lane of the warp")
        claims.notes.append("outputs: " + ", ".join(tensor.name for tensor, _, _ in outputs))
        return claims


PROPERTY = Coverage()


def _writers(
    context: Context, claims: Claims
) -> list[tuple[ir.Buffer, tuple[z3.ArithRef, ...], list[Writer]]]:
    found: dict[ir.Buffer, tuple[tuple[z3.ArithRef, ...], list[Writer]]] = {}
    for access in context.memory.accesses:
        storage, site = access.storage, access.site
        if storage.kind != "global" or access.mode == "r" or storage.tensor is None:
            continue
        count = constant_of(access.count)
        if storage.tensor.name in context.dispatch.in_place and _updates(site):
            note = (
                f"{storage.tensor.name} is updated in place, atomically: what each element gets is no output"
            )
            claims.notes += [note] if note not in claims.notes else []
            continue
        if access.mode == "rw" or count is None or access.unit_bits != storage.element.bits:
            claims.unsupported.append(Issue(site.span, f"{access.what}: not a plain store of known width"))
            continue
        if count * access.unit_bits % BYTE_BITS:  # the rest of the byte is read and written back
            claims.unsupported.append(Issue(site.span, f"{access.what}: part of a byte"))
            continue
        writer = writer_of(site, access.what, (Axis(access.start, count),), access.unit_bits)
        _extents, writers = found.setdefault(storage.tensor, ((storage.elements,), []))
        writers.append(writer)
    for copy in context.memory.tma:
        if not copy.store:
            continue
        tensor = copy.descriptor.tensor
        if copy.reduce:
            claims.unsupported.append(Issue(copy.site.span, f"TMA reduction into {tensor.name}"))
            continue
        axes = tuple(Axis(c, b) for c, b in zip(copy.coordinates, copy.descriptor.box, strict=True))
        extents = tuple(context.encoder.term(e, Scope()) for e in copy.descriptor.dims)
        known, writers = found.setdefault(tensor, (extents, []))
        if len(known) != len(axes):
            claims.unknown.append(
                Issue(copy.site.span, f"{tensor.name} is written by TMA and by plain stores")
            )
            continue
        writers.append(writer_of(copy.site, f"TMA store to {tensor.name}", axes, tensor.dtype.bits))
    return [(tensor, extents, writers) for tensor, (extents, writers) in found.items()]


def _untouched(context: Context) -> list[str]:
    """Return the tensors of the tile program that no device statement reads or writes."""
    touched = {a.storage.tensor.name for a in context.memory.accesses if a.storage.tensor is not None}
    touched |= {copy.descriptor.tensor.name for copy in context.memory.tma}
    return [b.name for b in context.extracted.tile.buffers.values() if b.name not in touched]


def _updates(site: Site) -> bool:
    return isinstance(site.node, ir.Call) and site.node.op.startswith("atomic_")


def writer_of(site: Site, what: str, axes: tuple[Axis, ...], unit_bits: int) -> Writer:
    """Return a statement that writes the box `axes` as one that can be compared and inverted."""
    scope = site.scope
    # Any one lane is elected; lane 0 stands for it. `_once` compares indices, which then has to
    # hold for lane 0 alone, and no more than one lane runs.
    hypotheses = tuple(replace(h, term=elected_lane(h.term, scope)) for h in scope.hypotheses)
    return Writer(site, what, axes, unit_bits, hypotheses, scope.indices)


def site_uses_elect(site: Site) -> bool:
    """Return whether an elected lane alone runs the statement."""
    return any(not z3.eq(h.term, elected_lane(h.term, site.scope)) for h in site.scope.hypotheses)


# --------------------------------------------------------------------------- at most once
def _once(context: Context, tensor: str, writers: Sequence[Writer], claims: Claims) -> None:
    for number, writer in enumerate(writers):
        lemmas = _determined(tensor, writer)
        claims.obligations += lemmas or [apart(context, tensor, writer, writer)]
        claims.obligations += [apart(context, tensor, writer, other) for other in writers[number + 1 :]]
        if site_uses_elect(writer.site):
            claims.obligations.append(_lane_free(context, writer))


def _determined(tensor: str, writer: Writer) -> list[Obligation]:
    """Return lemmas that make the written element determine the indices; none if they do not hold."""
    try:
        inverse = candidate(writer.axes, writer.indices, writer.hypotheses)
    except NotDigitsError:
        return []
    consts = {i.const.decl().name(): i.const for i in writer.indices}
    what = f"the element of {tensor} that is written determines its writer"
    obligations = [
        Obligation(what, writer.site.span, writer.hypotheses, lemma, {}, writer.site)
        for lemma in inverse.lemmas(writer.axes, consts)
    ]
    return obligations if _hold(obligations) else []


def apart(context: Context, tensor: str, first: Writer, second: Writer) -> Obligation:
    """Return that two runs of two stores (or of one, then different runs) write different elements."""
    names = {i.const.decl().name(): context.encoder.constant(f"{i.var.name}'") for i in second.indices}
    other = second.substituted(names)
    overlap = conjunction([_meet(a, b) for a, b in zip(first.axes, other.axes, strict=True)])
    goal = z3.Not(overlap)
    if first is second:
        same = conjunction([i.const == names[i.const.decl().name()] for i in first.indices])
        goal = z3.Or(same, goal)
    show: dict[str, Any] = {"buffer": tensor, "element": first.axes[0].index}
    show["byte_address"] = first.axes[0].index * first.unit_bits / BYTE_BITS
    if len(first.axes) > 1:
        show = {"buffer": tensor, "coordinates": str([z3.simplify(a.index) for a in first.axes])}
    show |= {f"{i.var.name}'": names[i.const.decl().name()] for i in second.indices}
    if second is not first:
        show["other store"] = str(second.site.span)
    what = f"no element of {tensor} is written twice"
    return Obligation(what, first.site.span, (*first.hypotheses, *other.hypotheses), goal, show, first.site)


def _meet(a: Axis, b: Axis) -> z3.BoolRef:
    if depends_on_data(a.index, b.index):
        return meet_by_digits(a.index, a.count, b.index, b.count, range_of_data)
    return meet(a.index, a.count, b.index, b.count)


def _lane_free(context: Context, writer: Writer) -> Obligation:
    """Return that which lane is elected changes neither the guards nor the address."""
    thread = next(i for i in writer.indices if i.tag == "threadIdx.x")
    lane = context.encoder.constant("lane'")
    moved = (thread.const, thread.const - thread.const % ops.WARP_THREADS + lane)
    within = Hypothesis("lane of the same warp", "loop", z3.And(lane >= 0, lane < ops.WARP_THREADS))
    guards = [h for h in writer.site.scope.hypotheses if not writer.is_given(h)]
    goals = [z3.substitute(elected_any(h.term), moved) for h in guards]
    goals += [z3.substitute(a.index, moved) == a.index for a in writer.axes]
    what = f"{writer.what} by an elected lane does not depend on the lane"
    return Obligation(
        what, writer.site.span, (*writer.hypotheses, within), conjunction(goals), {}, writer.site
    )


# --------------------------------------------------------------------------- at least once
def _all(
    context: Context,
    tensor: str,
    extents: tuple[z3.ArithRef, ...],
    writers: Sequence[Writer],
    claims: Claims,
) -> None:
    encoder = context.encoder
    positions = [encoder.constant(f"{tensor}.element") for _ in extents]
    given = list(dict.fromkeys(h for w in writers for h in w.hypotheses if w.is_given(h)))
    for position, extent in zip(positions, extents, strict=True):
        inside = z3.And(position >= 0, position < extent)
        given.append(Hypothesis(f"element of {tensor}", "loop", inside))
    facts, options = [], []
    for writer in writers:
        try:
            inverse = candidate(writer.axes, writer.indices, writer.hypotheses)
        except NotDigitsError as error:
            claims.unknown.append(Issue(writer.site.span, f"writer of {tensor} cannot be inverted: {error}"))
            return
        witness = inverse.witness(positions, encoder.constant)
        given += [Hypothesis("digits of the element", "definition", d) for d in witness.definitions]
        chosen = writer.substituted(witness.indices)
        facts.append(conjunction(list(witness.facts)))
        options.append(z3.And(*chosen.conditions, chosen.writes(positions)))
    span = Origins(context.extracted.tile).of(writers[0].site.statement, (writers[0].site.span,))
    show: dict[str, Any] = {"buffer": tensor, "element": positions[0]}
    if len(positions) == 1:
        show["byte_address"] = positions[0] * writers[0].unit_bits / BYTE_BITS
    show |= {f"axis {axis}": p for axis, p in enumerate(positions) if axis}
    what = f"every element of {tensor} is written"

    def obligation(goal: z3.BoolRef, *lemmas: Hypothesis) -> Obligation:
        return Obligation(what, span, (*given, *lemmas), goal, show)

    if len(writers) == 1:  # first that the digits come out again, then with it that the guards pass
        lemma = Hypothesis("digits of the indices", "definition", facts[0])
        obligations = [obligation(facts[0]), obligation(options[0], lemma)]
    else:
        both = [z3.And(f, o) for f, o in zip(facts, options, strict=True)]
        obligations = [obligation(z3.Or(*both))]
    answers = Prover(SEARCH_RLIMIT, recheck=False).prove(obligations)
    failed = next((a for a in answers if a.model), None)
    if failed is None:
        claims.obligations += obligations
    elif _nobody_writes(context, failed, positions, writers):
        reason = f"no thread writes it: {tensor}"
        claims.answers.append(replace(failed, verdict=Verdict.REFUTED, reason=reason))
    else:
        claims.unknown.append(Issue(span, f"no writer found for element {dict(failed.shown)} of {tensor}"))


def _nobody_writes(
    context: Context, answer: Answer, positions: Sequence[z3.ArithRef], writers: Sequence[Writer]
) -> bool:
    """Return whether, at the shape and element of a failed guess, no index at all writes."""
    names = [p.name for p in context.extracted.device.params if p.dtype.is_int]
    fixed = [z3.Int(n) == answer.model[n] for n in names if n in answer.model]
    fixed += [p == answer.model.get(p.decl().name(), 0) for p in positions]
    given = Hypothesis("the shape and element found", "guard", conjunction(fixed))
    prover = Prover(SEARCH_RLIMIT)
    claims = [
        Obligation("", None, (*w.hypotheses, given), z3.Not(w.writes(positions)), {}, w.site) for w in writers
    ]
    return all(a.verdict is Verdict.PROVED for a in prover.prove(claims))


def _hold(obligations: Sequence[Obligation]) -> bool:
    answers = Prover(SEARCH_RLIMIT, recheck=False).prove(obligations)
    return all(a.verdict is Verdict.PROVED for a in answers)
