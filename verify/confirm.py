"""Whether a refutation is a fault: by running the kernel, else by evaluating what was claimed.

A property whose violation shows in a run is confirmed by one: in the device-level interpreter at the model's
shape, with the blocks, contents and schedules that are likeliest to show it (`verify.interp.device.replay`);
by results that are not the tile program's; by two schedules, or two batches, with different bits. What has no
run of its own (a limit of the hardware, a register that holds another value than the tile program's and is
never used, a condition that the compiler got wrong where nobody looks) is evaluated: the claim is made again,
and its hypotheses and goal are computed at the model in integers of any size, without a solver's word.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import z3

from dsv4_kernels.contract import ContractError
from verify import ir
from verify.arith import evaluate
from verify.engine import finding_of
from verify.extract import Extracted
from verify.interp.device.errors import ScheduleDependentError
from verify.interp.errors import InterpreterError
from verify.origin import Origins
from verify.properties import Context, all_properties
from verify.query import Model, Query, stated
from verify.solve import Answer, Obligation, Prover, by_z3_alone
from verify.symbols import summary, text_of
from verify.verdict import Counterexample, Verdict

if TYPE_CHECKING:
    from verify.interp.device.outcome import Budget

_SIZES = (1, 3, 65, 130)  # of dims that the model leaves open: one row, a few, past one tile and past two
_SHAPES = 3  # tried beside the model's own
PARAM_DATA = "param!"  # prefix of what `verify.encode` calls elements of read-only tensors
CONTENT = "content of "  # prefix of what `verify.refine.sym` calls elements of tensors and of other memory
_RLIMIT = 4_000_000  # z3 resource units to find what they hold
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
    max_steps: "int | Budget | None" = None,
    evaluated: str = "",
) -> Confirmation:
    """Return whether REFUTED is confirmed.

    Args:
        context: the kernel and its contract.
        found: the model; without one, shapes that the contract admits are tried.
        prop: the property; a fault of another kind does not confirm it.
        message: of the finding, by which its claim is found again.
        sound: the kernel before it was edited; a fault that it has as well confirms nothing.
        max_steps: instructions of groups before a run is given up, or for all runs together; None: as
            `replay` has it.
        evaluated: what `violated` said of the claim where it was made; without that it is made again.
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
    if evaluated:
        return Confirmation(True, False, evaluated)

    def again(example: Counterexample) -> str | None:
        try:
            return by_run(context, example, prop, tried.append)
        except (ir.UnsupportedIR, InterpreterError) as error:
            tried.append(f"not run: {error}")
            return None

    return _by_claim(context, prop, message, again) or Confirmation(
        False, False, "; ".join(dict.fromkeys(tried)) or "nothing to run"
    )


# --------------------------------------------------------------------------- runs
def _by_run(
    context: Context,
    found: Counterexample,
    prop: str,
    say: Callable[[str], None],
    sound: Extracted | None,
    max_steps: "int | Budget | None",
) -> str | None:
    from verify.interp.device.outcome import Budget
    from verify.interp.device.replay import MAX_STEPS, PLACES, VALUES, is_full, replay

    for shape in shapes_of(context, found, prop in PLACES):
        at = Counterexample(shape, found.block, found.thread, found.loops, found.values)
        result = replay(context.extracted, at, prop, sound=sound, max_steps=max_steps or MAX_STEPS)
        if result.confirmed:
            return result.note
        say(result.note)
        if prop not in VALUES and is_full(context.extracted.tile, shape):  # the place is the model's
            break
        if isinstance(max_steps, Budget) and not max_steps.left:
            break
    return None


def shapes_of(context: Context, found: Counterexample, is_of_place: bool = False) -> Iterator[dict[str, int]]:
    """Yield the model's shape, and small ones that the contract admits.

    The model's counts where every dim is positive, or the claim is of a place in the run: other dims may say
    how far that is, but an empty tensor has no results.
    """
    free = _free(context.extracted.tile)
    model = {**context.dims, **found.shape}
    own = {name: model.get(name, 0) for name in free} | model
    if all(own[name] > 0 or (is_of_place and name in model) for name in free):
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


# --------------------------------------------------------------------------- the claim again
Data = tuple[tuple[z3.ExprRef, tuple[int | str, ...], int], ...]  # what is read, its operands, its value


def _by_claim(
    context: Context, prop: str, message: str, run: Callable[[Counterexample], str | None]
) -> Confirmation | None:
    """Make the claims of the property again; run, else evaluate, one that reads like the finding and fails.

    A model that says what index tensors hold is run with that.
    """
    checked = next(p for p in all_properties() if p.name == prop)
    try:
        with by_z3_alone():  # a model is looked for, and no proof
            claims = checked.claims(context)
    except ir.UnsupportedIR:
        return None
    mine = [o for o in claims.obligations if message.startswith(o.what)][:_EVALUATED]
    prover = Prover(recheck=False, minimise=True)
    answers = [a for o in mine for a in prover.prove([o])]
    answers += [a for a in claims.answers if message.startswith(a.obligation.what)]
    for answer in answers:
        if answer.verdict is not Verdict.REFUTED:
            continue
        data = data_of(answer)
        if held := elements_of(context, data):
            example = finding_of(context, Origins(context.extracted.tile), answer).counterexample
            assert example is not None, "it has a model"
            note = run(replace(example, values={**example.values, **held}))
            if note is not None:
                return Confirmation(True, True, note)
        if (note := violated(answer, data)) is not None:
            return Confirmation(True, False, note)
    return None


def data_of(answer: Answer) -> Data:
    """Return what the model of a refutation says of all that is a function: contents of memory, elections."""
    obligation = answer.obligation
    terms = [h.term for h in stated(obligation.hypotheses, [obligation.goal])] + [obligation.goal]
    applications = {text_of(a): a for t in terms for _, a in summary(t).applications if a.num_args()}
    if not applications:
        return ()
    solver = Query.of(obligation.hypotheses, [obligation.goal]).solver(_RLIMIT)
    for name, value in answer.model.items():
        if any(name in summary(t).names for t in terms):
            solver.add(z3.Int(name, solver.ctx) == value)
    if str(solver.check()) != "sat":
        return ()
    model, found = Model(solver), []
    for symbol in applications.values():
        value = model.value(symbol)
        if isinstance(value, int):
            found.append((symbol, tuple(model.value(a) for a in symbol.children()), value))
    return tuple(found)


def elements_of(context: Context, data: Data) -> dict[str, int]:
    """Return the elements of named memory among it, `name[place]`; of tensors by the tile program's names."""
    names = {param.name: tensor.name for param, tensor in context.host.tensors.items()}
    found = {}
    for symbol, places, value in data:
        kind = next((k for k in (PARAM_DATA, CONTENT) if symbol.decl().name().startswith(k)), None)
        if kind is not None and z3.is_int(symbol) and len(places) == 1:
            name = symbol.decl().name().removeprefix(kind).rpartition("~")[2]
            found[f"{names.get(name, name)}[{places[0]}]"] = value
    return found


def violated(answer: Answer, data: Data = ()) -> str | None:
    """Return a line if every hypothesis holds at the model and the goal does not."""
    obligation: Obligation = answer.obligation
    table: dict[tuple[str, tuple[Any, ...]], int] = {(s.decl().name(), at): v for s, at, v in data}

    def at_model(term: z3.ExprRef) -> Any:
        return evaluate(term, answer.model, table)

    hypotheses = [at_model(h.term) for h in stated(obligation.hypotheses, [obligation.goal])]
    if not all(h is True for h in hypotheses) or at_model(obligation.goal) is not False:
        return None
    pairs = ", ".join(f"{name}={value}" for name, value in answer.shown.items())
    return f"evaluated: {obligation.what} fails" + (f" at {pairs}" if pairs else "")
