"""Refinement of one kernel: every step of the tile program against the device program."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import z3

from verify import ir
from verify.encode import Hypothesis
from verify.externs.elements import as_stores
from verify.extract import Extracted, source_of
from verify.host import Host
from verify.ir import UnsupportedIR
from verify.refine.assign import check_assign, check_update
from verify.refine.device import Site
from verify.refine.frame import Frame
from verify.refine.handover import check_handover, check_parallel
from verify.refine.match import is_copy_by_tma, match
from verify.refine.model import Model, Outcome, build_model
from verify.refine.moves import is_atomic
from verify.refine.order import check_order, taking_turns
from verify.refine.reduction import check_reduce
from verify.refine.tile import Assign, Gemm, Reduce, Step
from verify.refine.tma import Descriptor, check_tma, read_descriptors
from verify.refine.turns import check_turns
from verify.refine.wgmma import check_gemm
from verify.solve import Obligation
from verify.text import show


@dataclass
class Refinement:
    """What comparing the two levels found, before any solver is asked.

    Attributes:
        obligations: what normal forms left open.
        unsupported: places that are not understood, with the reason.
        compared: addresses, operands and conditions found equal by normal form, one per point.
        steps: statements and tile operations of the tile program.
        orders: in which a product takes its chunks of K, or the tree of a reduction, by step number; more
            than one where elements differ.
    """

    obligations: list[Obligation] = field(default_factory=list)
    unsupported: list[tuple[ir.Span | None, str]] = field(default_factory=list)
    compared: int = 0
    steps: int = 0
    uses: set[str] = field(default_factory=set)
    orders: dict[int, set[tuple]] = field(default_factory=dict)


_MOST_KEPT = 6  # comparisons
# Of kernels that `extract` keeps, each with what holds of its dims.
_kept: dict[tuple[object, ...], tuple[Extracted, Refinement]] = {}


def refinement_of(extracted: Extracted, host: Host, clauses: Sequence[Hypothesis]) -> Refinement:
    """Return `refine` of these, worked out once for a kernel and all that are compared with it."""
    if source_of(extracted) is None:
        return refine(extracted, host, clauses)
    key = (id(extracted), *((h.label, h.kind, h.term.sexpr()) for h in clauses))
    if key not in _kept:
        while len(_kept) >= _MOST_KEPT:
            del _kept[next(iter(_kept))]
        _kept[key] = (extracted, refine(extracted, host, clauses))
    return _kept[key][1]


def refine(
    extracted: Extracted,
    host: Host,
    clauses: Sequence[Hypothesis],
    known: Mapping[int, str] | None = None,
) -> Refinement:
    """Compare the tile IR of a kernel with its device IR.

    Args:
        extracted: the kernel at every stage.
        host: its launch.
        clauses: what holds of the shape parameters, over Z3 integers of their names.
        known: `readings` of a kernel with this tile program: steps that read the same are left out.

    Returns:
        The kernel refines its tile program iff nothing is unsupported and every obligation holds.
    """
    result = Refinement()
    try:
        model, sites = _matched(extracted, host, clauses)
        check_parallel(model)
        check_handover(model, sites)
        check_turns(model)
        model.in_turn = taking_turns(model, sites)
        maps = read_descriptors(model)
    except UnsupportedIR as reason:
        result.unsupported.append((None, str(reason)))
        return result
    result.steps = len(model.tile.steps)
    for step in model.tile.steps:
        if known is not None and known.get(step.number) == _reading(sites[step.number]):
            continue
        try:
            outcome = _check(model, step, sites[step.number], maps, result.uses)
        except UnsupportedIR as reason:
            result.unsupported.append((step.span, str(reason)))
            continue
        result.obligations += outcome.obligations
        result.unsupported += [(step.span, reason) for reason in outcome.undecided]
        result.compared += outcome.compared
        if outcome.orders:
            result.orders[step.number] = outcome.orders
    try:
        check_order(model, sites, model.turns)
    except UnsupportedIR as reason:
        result.unsupported.append((None, str(reason)))
    result.uses |= model.uses
    return result


def readings(extracted: Extracted, host: Host, clauses: Sequence[Hypothesis]) -> dict[int, str]:
    """Return the text of the device statements of each step, by its number.

    Raises:
        UnsupportedIR: the two levels cannot be compared.
    """
    _, sites = _matched(extracted, host, clauses)
    return {number: _reading(found) for number, found in sites.items()}


def _matched(
    extracted: Extracted, host: Host, clauses: Sequence[Hypothesis]
) -> tuple[Model, dict[int, list[Site]]]:
    stages = {"tile": as_stores(extracted.tile), "device": as_stores(extracted.device)}
    model = build_model(replace(extracted, **stages), host, tuple(clauses))
    return model, match(model)


def _reading(sites: Sequence[Site]) -> str:
    """Return the statements of a step as text, with the loops and guards around them."""
    lines = []
    for site in sites:
        around = [show(p) if isinstance(p, ir.For) else f"{p.holds} {show(p.cond)}" for p in site.path]
        lines.append(f"{site.role} {around} {show(site.stmt)}")
    return "\n".join(lines)


def _check(model: Model, step: Step, sites: list, maps: dict[ir.Var, Descriptor], uses: set[str]) -> Outcome:
    if not sites:
        return _missing(model, step)
    match step:
        case Assign() if is_copy_by_tma(sites):
            uses.add("tma")
            return check_tma(model, step, sites, maps)
        case Assign() if is_atomic(step.value):
            return check_update(model, step, sites)
        case Assign():
            return check_assign(model, step, sites)
        case Gemm():
            uses.add("wgmma")
            return check_gemm(model, step, sites)
        case Reduce():
            uses.add("reduce")
            return check_reduce(model, step, sites)
    raise UnsupportedIR(f"{step.what} is no known step")


def _missing(model: Model, step: Step) -> Outcome:
    """A step without device statement: wrong where a caller can see it, else perhaps dead."""
    if not model.tile_storage[step.dst.data].is_global:
        raise UnsupportedIR(f"{step.what} has no device statement")
    frame = Frame.of(model, step, frozenset())
    show = {"expected": f"a store to {step.dst.name}", "actual": "no device statement"}
    hypotheses = (*model.hypotheses, *frame.facts)
    obligation = Obligation(f"{step.what}: dropped", step.span, hypotheses, z3.BoolVal(False), show)
    return Outcome(obligations=[obligation])
