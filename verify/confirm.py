"""Whether a refutation is a fault: by running the kernel, else by evaluating what was claimed.

A property whose violation shows in a run is confirmed by one: in the device-level interpreter at the model's
shape, with the blocks, contents and schedules that are likeliest to show it (`verify.interp.device.replay`);
by results that are not the tile program's; by two schedules, or two batches, with different bits. What has no
run of its own (a limit of the hardware, a register that holds another value than the tile program's and is
never used, a condition that the compiler got wrong where nobody looks) is evaluated: the claim is made again,
and its hypotheses and goal are computed at the model in integers of any size, without a solver's word.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from dsv4_kernels.contract import ContractError
from verify import ir
from verify.arith import evaluate
from verify.extract import Extracted
from verify.interp.device.errors import ScheduleDependentError
from verify.interp.errors import InterpreterError
from verify.properties import Context, all_properties
from verify.solve import Answer, Obligation, Prover
from verify.verdict import Counterexample, Verdict

_SIZES = (1, 3, 65, 130)  # of dims that the model leaves open: one row, a few, past one tile and past two
_SHAPES = 3  # tried beside the model's own
_EVALUATED = 8  # obligations of one text that are tried


@dataclass(frozen=True)
class Confirmation:
    """What a replay showed.

    Attributes:
        confirmed: the fault is there.
        by_run: a run shows it; else both sides of the claim were evaluated.
        note: one line for people.
    """

    confirmed: bool
    by_run: bool
    note: str


def confirm(
    context: Context,
    found: Counterexample | None,
    prop: str,
    message: str = "",
    *,
    sound: Extracted | None = None,
    max_steps: int | None = None,
    evaluated: str | None = None,
) -> Confirmation:
    """Return whether REFUTED is confirmed.

    Args:
        context: the kernel and its contract.
        found: the model; without one, shapes that the contract admits are tried.
        prop: the property; a fault of another kind does not confirm it.
        message: of the finding, by which its claim is found again.
        sound: the kernel before it was edited; a fault that it has as well confirms nothing.
        max_steps: instructions of groups before a run is given up; None: as `replay` has it.
        evaluated: what `violated` said of the claim where it was made; None: it is made again.
    """

    def by_run(context: Context, found: Counterexample, prop: str, say: Callable[[str], None]) -> str | None:
        return _by_run(context, found, prop, say, sound, max_steps)

    found = found or Counterexample({}, {}, {}, {}, {})
    tried = []
    for way in (by_run, _by_batches, _by_schedules):
        try:
            note = way(context, found, prop, tried.append)
        except (ir.UnsupportedIR, InterpreterError) as error:
            tried.append(f"not run: {error}")
            continue
        if note is not None:
            return Confirmation(True, True, note)
    note = _by_evaluation(context, prop, message) if evaluated is None else evaluated
    if note:
        return Confirmation(True, False, note)
    return Confirmation(False, False, "; ".join(dict.fromkeys(tried)) or "nothing to run")


# --------------------------------------------------------------------------- runs
def _by_run(
    context: Context,
    found: Counterexample,
    prop: str,
    say: Callable[[str], None],
    sound: Extracted | None,
    max_steps: int | None,
) -> str | None:
    from verify.interp.device.replay import MAX_STEPS, VALUES, replay

    for shape in shapes_of(context, found):
        at = Counterexample(shape, found.block, found.thread, found.loops, found.values)
        result = replay(context.extracted, at, prop, sound=sound, max_steps=max_steps or MAX_STEPS)
        if result.confirmed:
            return result.note
        say(result.note)
        if prop not in VALUES:  # the place is the model's
            break
    return None


def shapes_of(context: Context, found: Counterexample) -> Iterator[dict[str, int]]:
    """Yield the model's shape, and small ones that the contract admits."""
    free = _free(context.extracted.tile)
    model = {**context.dims, **found.shape}
    own = {name: model.get(name, 0) for name in free} | model
    if all(own[name] > 0 for name in free):
        yield own
    yield from islice((s for s in _sizes(context, own, free) if s != own), _SHAPES)


def _sizes(context: Context, own: Mapping[str, int], free: list[str]) -> Iterator[dict[str, int]]:
    for size in _SIZES:
        shape = {**own, **dict.fromkeys(free, size)}
        try:
            known = {n: v for n, v in shape.items() if n in context.contract.names()}
            context.contract.check("replay", **known)
        except (ContractError, KeyError, NameError):
            continue
        yield shape


def _free(tile: ir.Function) -> list[str]:
    """Return the dims of the tensors that the kernel does not fix."""
    parts = [part for b in tile.buffers.values() for part in (*b.shape, *b.strides)]
    return list(dict.fromkeys(n.name for p in parts for n in ir.walk(p) if isinstance(n, ir.Var)))


def _by_batches(context: Context, found: Counterexample, prop: str, say: Callable[[str], None]) -> str | None:
    """Run one row's data in two batches."""
    from verify.signature.refute import Program, difference

    dims = context.dispatch.batch_dims
    if prop != "batch_invariance" or not dims:
        return None
    fixed = {**context.dispatch.fixed, **{n: v for n, v in context.dims.items() if n not in dims}}
    shown = difference([Program(context.extracted.tile)], dims, fixed, context.contract)
    if shown is None:
        say("no two batches with different bits")
        return None
    return (
        f"confirmed: {dict(shown.first)} and {dict(shown.second)} give a row other bits {dict(shown.values)}"
    )


def _by_schedules(
    context: Context, found: Counterexample, prop: str, say: Callable[[str], None]
) -> str | None:
    """Run one call under several schedules."""
    from verify.interp.device import explore
    from verify.interp.device.outcome import inputs
    from verify.interp.device.run import Checks

    if prop != "determinism":
        return None
    checks = Checks(races=False, uninitialised=False, alignment=False, overflow=False)
    for shape in shapes_of(context, found):
        for zeros in (True, False):
            tensors = inputs(context.extracted.tile, shape, zeros)
            if tensors is None:
                continue
            try:
                explore(context.extracted, *tensors, checks=checks)
            except ScheduleDependentError as error:
                return f"confirmed: {error}"
        say("no two schedules with different bits")
    return None


# --------------------------------------------------------------------------- evaluation
def _by_evaluation(context: Context, prop: str, message: str) -> str | None:
    """Make the claims of the property again; evaluate one that reads like the finding and fails."""
    checked = next(p for p in all_properties() if p.name == prop)
    try:
        claims = checked.claims(context)
    except ir.UnsupportedIR:
        return None
    mine = [o for o in claims.obligations if message.startswith(o.what)]
    for obligation in mine[:_EVALUATED]:
        for answer in Prover(recheck=False).prove([obligation]):
            if answer.verdict is Verdict.REFUTED and (note := violated(answer)) is not None:
                return note
    given = [
        a for a in claims.answers if a.verdict is Verdict.REFUTED and message.startswith(a.obligation.what)
    ]
    return next((note for a in given if (note := violated(a)) is not None), None)


def violated(answer: Answer) -> str | None:
    """Return a line if every hypothesis holds at the model and the goal does not."""
    obligation: Obligation = answer.obligation
    hypotheses = [evaluate(h.term, answer.model) for h in obligation.hypotheses]
    if not all(h is True for h in hypotheses) or evaluate(obligation.goal, answer.model) is not False:
        return None
    pairs = ", ".join(f"{name}={value}" for name, value in answer.shown.items())
    return f"evaluated: {obligation.what} fails" + (f" at {pairs}" if pairs else "")
