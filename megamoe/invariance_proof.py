"""That a row's bits are a function of that row's data: suites `invariance*`, of the fused kernel's tile IR.

The pieces that compute are found in the tile IR and followed for any element (`invariance_terms`). That its
reads are of that element's row is asked of both solvers (`invariance_leaves`, `invariance_checks`), and a
place, counter or rank in a value is refused; what remains is a term without any of these, whose digest is the
*signature* of the piece. Weights that are widened once are the terms that the others have in registers
(`invariance_widened`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import z3

from megamoe.config import Config
from megamoe.invariance_checks import Checks
from megamoe.invariance_expressions import State
from megamoe.invariance_leaves import CHANNEL, EXPERT, ROW, Epilogue, Products, Sums
from megamoe.invariance_terms import Fold, Piece
from megamoe.invariance_values import Term
from megamoe.invariance_widened import RING, widened_bytes
from megamoe.ring import every
from megamoe.schedule import Kind
from verify import ir
from verify.ir import UnsupportedIR
from verify.properties import Claims, Issue
from verify.solve import Answer, Obligation
from verify.verdict import Verdict

CLAIMS = ("products", "epilogue", "combine")  # as in _MAKERS
ASSUMPTIONS = (
    "invariance: a wgmma result is one function of its row of A, its column of B and zero, for every width "
    "of the instruction, and of both operands alike",
    "invariance: what stands in a stage, in the product that is handed over, in the plan's tensors and in "
    "`combine` is that row's, and at the place of a piece that is widened, and in the ring, that piece's "
    "(suites `roles`, `signals` and `plan`); that the device IR computes what the tile IR says, and takes "
    "channels in the order of k, is `refinement` of kernels that have that suite",
    "invariance: factors of e4m3 weights are ones (`weights.Packed`); a value times one is that value",
    "invariance: index arithmetic is that of mathematical integers (property `overflow`)",
)
_WATCHED = ("h_ring", "h_ring_scale", "combine", "y")
_HANDED = ("out_a", "out_b")
_REGISTERS = ("kind", "block", "tile", "done")


@dataclass(frozen=True)
class Signature:
    """What was found of a piece: terms by name, and what was checked on the way."""

    terms: Mapping[str, Term]
    checked: tuple[str, ...]


def products(function: ir.Function, config: Config, checks: Checks) -> Signature:
    """Return the terms of what is handed over, of both kinds of product and every format of weights.

    Args:
        function: the kernel's tile IR.
        config: the kernel's.
        checks: gets what is asked of indices.

    Raises:
        UnsupportedIR: something else than that row's data may be in them.
    """
    piece, terms, checked = _piece(function, _has_product), {}, []
    _only(function, piece, _HANDED)
    cta, registers = _places(function)
    widened: tuple[tuple[Term, ...], ...] = ()
    if config.widened:
        widened = widened_bytes(function, config, checks, cta)
        _only_stored(function, RING)
        checked.append(f"{RING}: of a weight row, what is widened of its codes and offsets")
    for kind in (Kind.LINEAR1, Kind.LINEAR2):
        for fp8 in (True, False) if config.is_mixed else (config.fp8,):
            leaves = Products(config, checks, kind, fp8, widened)
            assumed: tuple[Any, ...] = (z3.Int("done[0]") >= 0,)
            if config.is_mixed:
                assumed = (*assumed, EXPERT == 0 if fp8 else EXPERT != 0)
            follow = Piece(leaves, (), cta, assumed)
            leaves.waits = follow.waits
            end = follow.follow(piece, State(registers={(registers["kind"], 0): kind.value}))
            steps = config.used_l1_steps if kind is Kind.LINEAR1 else config.used_l2_steps
            if len(follow.folds) != 1:
                raise UnsupportedIR(f"{len(follow.folds)} loops of a product")
            rounds(follow.folds[0], config, leaves, steps, assumed)
            format_ = "e4m3" if fp8 else "e2m1"
            what = f"{kind.name.lower()} by {format_}"
            checked.append(f"{what}: {steps} rounds of 128 channels, each of its own visit, row for row")
            leaves.waits = list(follow.folds[0].waits)
            for name in _HANDED:
                handed = [element for data, element in end.buffers.items() if data.name == name]
                if len(handed) != 1:
                    raise UnsupportedIR(f"{name} is not written")
                term = follow.data(handed[0]((ROW, CHANNEL)))
                terms[f"{what}: {name}"] = Term.of("rounds", steps, term)
    return Signature(terms, tuple(checked))


def rounds(fold: Fold, config: Config, leaves: Products, steps: int, assumed: tuple[Any, ...]) -> None:
    """Check that a product's loop makes `steps` rounds, one after the other, each of its visits.

    Raises:
        UnsupportedIR: that is not shown.
    """
    if len(fold.waits) != leaves.visits:
        raise UnsupportedIR(f"a round waits for {len(fold.waits)} stages, not for {leaves.visits}")
    what = f"a product makes {steps} rounds"
    if fold.turn is None:
        right = not fold.conditions and leaves.checks.same(what, fold.extent, steps, assumed)
    else:
        # Whole turns of the ring: rounds are made where begin <= number < begin + steps, in ascending order.
        turn, stages = fold.turn
        begin = z3.Int("done[0]") % config.num_stages
        number = fold.number * config.num_stages + turn
        enough = fold.extent * config.num_stages >= begin + steps
        inside = (*assumed, turn >= 0, turn < stages, fold.number >= 0)
        those = every(*fold.conditions) == z3.And(begin <= number, number < begin + steps)
        right = (
            leaves.checks.same(what, stages, config.num_stages, assumed)
            and leaves.checks.holds(what, enough, assumed)
            and leaves.checks.holds(what, those, inside)
        )
    if not right:
        raise UnsupportedIR(f"a product is not shown to make {steps} rounds")


def epilogue(function: ir.Function, config: Config, checks: Checks) -> Signature:
    """Return the terms of `h`, of its scales and of the rows that are sent; arguments as of `products`.

    Raises:
        UnsupportedIR: something else than that row's data may be in them.
    """
    piece, terms = _piece(function, lambda n: _writes(n, "h_ring")), {}
    _only(function, piece, _WATCHED[:3])
    cta, registers = _places(function)
    for kind in (Kind.LINEAR1, Kind.LINEAR2):
        follow = Piece(Epilogue(config, checks), _WATCHED[:3], cta)
        follow.follow(piece, State(registers={(registers["kind"], 0): kind.value}))
        for number, output in enumerate(follow.outputs):
            terms[f"{kind.name.lower()}: {output.name} {number}"] = output.value
    wanted = ["h_ring_scale", "h_ring", "combine", "combine"]
    if [name.split()[1] for name in terms] != wanted:
        raise UnsupportedIR(f"outputs are {', '.join(terms)}")
    return Signature(terms, ("h, its scale and what is sent: of that row's product and routing weight",))


def combine(function: ir.Function, config: Config, checks: Checks) -> Signature:
    """Return the term of `y`; arguments as of `products`.

    Raises:
        UnsupportedIR: something else than what that token's experts gave may be in it.
    """
    loops = [n for n in ir.walk(function.body) if isinstance(n, ir.For) and n.kind == "serial"]
    loops = [n for n in loops if _writes(n, "y")]
    if len(loops) != 1:
        raise UnsupportedIR(f"{len(loops)} loops write y")
    _only(function, loops[0], ("y",))
    follow = Piece(Sums(config, checks), ("y",), _places(function)[0])
    follow.follow(loops[0], State())
    if [o.name for o in follow.outputs] != ["y"]:
        raise UnsupportedIR("y is not written once a round")
    return Signature({"y": follow.outputs[0].value}, ("y: the sum over that token's slots, in their order",))


_MAKERS: dict[str, Callable[[ir.Function, Config, Checks], Signature]] = {
    "products": products,
    "epilogue": epilogue,
    "combine": combine,
}


def signature(function: ir.Function, config: Config, checks: Checks) -> dict[str, str]:
    """Return the digests of all of a kernel's terms, by name; arguments as of `products`.

    Raises:
        UnsupportedIR: something in a term is refused.
    """
    found = [make(function, config, checks) for make in _MAKERS.values()]
    return {name: term.digest for each in found for name, term in each.terms.items()}


def claims(function: ir.Function, config: Config) -> dict[str, Claims]:
    """Return what has to be proved of a kernel, by the names of CLAIMS."""
    return {name: _claimed(make, function, config) for name, make in _MAKERS.items()}


def one_signature(kernels: Mapping[str, Callable[[], tuple[ir.Function, Config]]]) -> Claims:
    """Claim that kernels have one signature."""
    found: dict[str, dict[str, str]] = {}
    checks = Checks()  # of all: what is asked of several is asked once
    for name, kernel in kernels.items():
        try:
            found[name] = signature(*kernel(), checks)
        except UnsupportedIR as error:
            return Claims(unsupported=[Issue(None, f"{name}: {error}")])
    first, *others = found
    answers = []
    for other in others:
        same = found[first] == found[other]
        goal = Obligation(f"{other} has the signature of {first}", None, (), z3.BoolVal(same))
        differ = [n for n in {**found[first], **found[other]} if found[first].get(n) != found[other].get(n)]
        answers.append(Answer(goal, Verdict.PROVED if same else Verdict.UNKNOWN, "; ".join(differ)))
    notes = [f"{name}: {digest[:16]}" for name, digest in found[first].items()]
    return Claims(obligations=checks.obligations, answers=answers, assumptions=list(ASSUMPTIONS), notes=notes)


def _claimed(
    make: Callable[[ir.Function, Config, Checks], Signature], function: ir.Function, config: Config
) -> Claims:
    checks = Checks()
    try:
        found = make(function, config, checks)
    except UnsupportedIR as error:
        return Claims(unknown=[Issue(None, str(error))])
    answers = [
        Answer(Obligation(what, None, (), z3.BoolVal(True)), Verdict.PROVED, "") for what in found.checked
    ]
    notes = [f"signature of {name}: {term.digest}" for name, term in found.terms.items()]
    return Claims(obligations=checks.obligations, answers=answers, assumptions=list(ASSUMPTIONS), notes=notes)


# --------------------------------------------------------------------------- pieces
def _places(function: ir.Function) -> tuple[ir.Var, dict[str, ir.Var]]:
    """Return the launch's index, and the registers that say which product it is: one each, of known kinds."""
    buffers: dict[str, set[ir.Var]] = {}
    for node in ir.walk(function.body):
        match node:
            case ir.Block(allocs=allocs):
                for buffer in allocs:
                    buffers.setdefault(buffer.name, set()).add(buffer.data)
            case ir.Store(buffer=b, value=value) if b.name == "kind":
                kinds = [0, Kind.LINEAR1.value, Kind.LINEAR2.value]
                if not (isinstance(value, ir.Const) and value.value in kinds):
                    raise UnsupportedIR("a kind of product that is not known")
    if any(len(buffers.get(name, ())) != 1 for name in _REGISTERS):
        raise UnsupportedIR("two registers of one name")
    found = [n.var for n in ir.walk(function.body) if isinstance(n, ir.Launch) and n.tag == "blockIdx.x"]
    if len(found) != 1:
        raise UnsupportedIR("a launch of another shape")
    return found[0], {name: next(iter(buffers[name])) for name in _REGISTERS}


def _piece(function: ir.Function, is_it: Callable[[ir.Stmt], bool]) -> ir.Stmt:
    """Return what a role does for one product: what is under `0 < kind[0]` in its walk."""
    found = [n for n in ir.walk(function.body) if _of_a_product(n) and is_it(n)]
    if len(found) != 1:
        raise UnsupportedIR(f"{len(found)} roles do what one should")
    return found[0].then


def _of_a_product(node: Any) -> bool:
    match node:
        case ir.If(cond=ir.BinOp(op="lt", a=ir.Const(value=0), b=ir.Load(buffer=b)), orelse=None):
            return b.name == "kind"
    return False


def _has_product(node: ir.Stmt) -> bool:
    return any(isinstance(n, ir.Call) and n.op == "wgmma_gemm" for n in ir.walk(node))


def _writes(node: ir.Stmt, name: str) -> bool:
    return any(isinstance(n, ir.Store) and n.buffer.name == name for n in ir.walk(node))


def _written(node: Any, names: Sequence[str]) -> Iterator[Any]:
    """Yield all that may write some buffers."""
    for each in ir.walk(node):
        match each:
            case ir.Store(buffer=b) if b.name in names:
                yield each
            case ir.Region(buffer=b, mode=mode) if b.name in names and mode != "r":
                yield each
            case ir.AccessPtr(data=data) if data.name in names:
                yield each
            case ir.Call(op="address_of" | "access_ptr", args=(ir.Load(buffer=b), *_)) if b.name in names:
                yield each


def _only_stored(function: ir.Function, name: str) -> None:
    """Check that one store writes a buffer, and nothing else."""
    if len(list(_written(function.body, (name,)))) != 1:
        raise UnsupportedIR(f"{name}: written in another place, too")


def _only(function: ir.Function, piece: ir.Stmt, names: Sequence[str]) -> None:
    """Check that nothing beside a piece writes some buffers."""
    inside = {id(n) for n in _written(piece, names)}
    if any(id(n) not in inside for n in _written(function.body, names)):
        raise UnsupportedIR(f"{', '.join(names)}: written in another place, too")
