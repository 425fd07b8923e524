"""Private counters: what a variable holds that every round of a loop advances.

A variable of one element that a loop changes only by adding constants (or by flipping its last bit)
has a closed form in the loop's counter. A round may advance it under a guard, such as "this wave has
a tile": then the form holds in the rounds where the guard does, provided that no round with the
guard follows one without it, which is proved here by both solvers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import z3

from verify import ir
from verify.encode import Encoder, Hypothesis, Index, Scope, constants_of, is_exact
from verify.intarith import constant_of


@dataclass(frozen=True)
class Step:
    """One round adds `amount` where `guards` hold; `flips` if it flips the last bit so often instead."""

    amount: z3.ArithRef
    guards: tuple[z3.BoolRef, ...] = ()
    flips: bool = False


class NotACounterError(Exception):
    """A loop changes the variable in some other way."""


class Counters:
    """Closed forms of the private counters of one function."""

    def __init__(self, encoder: Encoder) -> None:
        """Keep the names of one variant."""
        self.encoder = encoder

    def within_round(
        self, loop: ir.For, index: Index, scope: Scope, entry: z3.ArithRef, var: ir.Var
    ) -> z3.ArithRef | None:
        """Return what `var` holds where a round of `loop` begins, or None where that is not known.

        Args:
            loop: the loop.
            index: its counter.
            scope: at the beginning of a round, less what the round changes.
            entry: what `var` holds before the loop.
            var: the storage of a private variable of one element.
        """
        step = self._step(loop, scope, entry, var)
        if step is None:
            return None
        value = _advanced(entry, step, z3.simplify(index.const - index.start))
        for guard in reversed(step.guards):
            if not is_prefix(self.encoder, scope.hypotheses, index, guard):
                return None
            value = z3.If(guard, value, self.encoder.unknown(f"{var.name}.unknown", scope))
        return value

    def within_while(
        self, loop: ir.While, round_: z3.ArithRef, scope: Scope, entry: z3.ArithRef, var: ir.Var
    ) -> z3.ArithRef | None:
        """Return what `var` holds where round `round_` of a loop on a condition begins, or None.

        Other arguments as in `within_round`.
        """
        step = self._step(loop, scope, entry, var)
        return None if step is None or step.guards else _advanced(entry, step, round_)

    def after_loop(self, loop: ir.For, scope: Scope, entry: z3.ArithRef, var: ir.Var) -> z3.ArithRef | None:
        """Return what `var` holds after `loop`, or None; arguments as in `within_round`."""
        step = self._step(loop, scope, entry, var)
        if step is None or step.guards:
            return None
        rounds = self.encoder.term(loop.extent, scope)
        return _advanced(entry, step, z3.simplify(z3.If(rounds > 0, rounds, z3.IntVal(0))))

    def _step(self, loop: ir.For | ir.While, scope: Scope, entry: z3.ArithRef, var: ir.Var) -> Step | None:
        try:
            steps = _Steps(self.encoder, var).of(loop.body, scope)
        except (NotACounterError, ir.UnsupportedIR):
            return None
        if len(steps) != 1:
            return Step(z3.IntVal(0)) if not steps else None
        step = steps[0]
        own = {scope.env[loop.var].decl().name()} if isinstance(loop, ir.For) else set()
        if own & constants_of(step.amount) or not is_exact([step.amount, *step.guards]):
            return None
        return None if step.flips and not _is_bit(entry) else step


def is_prefix(
    encoder: Encoder,
    given: Sequence[Hypothesis],
    index: Index,
    guard: z3.BoolRef,
) -> bool:
    """Return whether the rounds in which `guard` holds come first, by both solvers.

    Args:
        encoder: names.
        given: what holds in a round.
        index: the loop's counter.
        guard: what holds in some rounds.
    """
    const, name = index.const, index.const.decl().name()
    if name not in constants_of(guard):
        return True
    from verify import lemma  # whose solvers import the walker, which imports this

    prover, earlier = lemma.small_prover(), encoder.constant(f"{name}'")
    stop = index.start + index.extent
    ranges = [Hypothesis("a round", "loop", z3.And(index.start <= const, const < stop))]
    # Of all that holds in this round only what does not speak of it holds in an earlier one too.
    ranges += [h for h in lemma.near(given, guard, stop) if name not in constants_of(h.term)]
    guard = lemma.decided(prover, ranges, guard)
    ranges += [
        Hypothesis("guard of a round", "guard", guard),
        Hypothesis("an earlier round", "loop", z3.And(index.start <= earlier, earlier < const)),
    ]
    return lemma.holds(prover, ranges, z3.substitute(guard, (const, earlier)))


def resolved(value: z3.ExprRef, guard: z3.BoolRef) -> z3.ExprRef:
    """Return `value` where `guard` holds, if it is a choice by that guard."""
    chosen = z3.is_app(value) and value.decl().kind() == z3.Z3_OP_ITE and z3.eq(value.arg(0), guard)
    return value.arg(1) if chosen else value


def _advanced(entry: z3.ArithRef, step: Step, rounds: z3.ArithRef) -> z3.ArithRef:
    if step.flips:
        return z3.simplify((entry + step.amount * rounds) % 2)
    return z3.simplify(entry + step.amount * rounds)


def _is_bit(term: z3.ArithRef) -> bool:
    """Return whether `term` is 0 or 1 by its form."""
    if constant_of(term) is not None:
        return constant_of(term) in (0, 1)
    return term.decl().kind() == z3.Z3_OP_MOD and constant_of(term.arg(1)) == 2


class _Steps:
    """What one run of a statement adds to a variable."""

    def __init__(self, encoder: Encoder, var: ir.Var) -> None:
        self.encoder = encoder
        self.var = var

    def of(self, node: ir.Stmt, scope: Scope) -> list[Step]:
        """Return the steps of `node`, those without a guard summed up."""
        match node:
            case ir.Seq(stmts=stmts):
                steps: list[Step] = []
                for child in stmts:
                    steps = _sum(steps, self.of(child, scope))
                    if isinstance(child, ir.Bind):
                        scope = self._bind(child, scope)
                return steps
            case ir.Store(buffer=buffer, value=value) if buffer.data is self.var:
                return [self._stored(buffer, value)]
            case ir.For(var=var, extent=extent, body=body):
                if not self._changes(body):
                    return []
                const = self.encoder.constant(var.name)
                inner = self.of(body, scope.bind(var, const))
                rounds = self.encoder.term(extent, scope)
                return [self._repeated(step, const, rounds) for step in inner]
            case ir.If(cond=cond, then=then, orelse=orelse):
                if not self._changes(node):
                    return []
                guard = self.encoder.boolean(cond, scope)
                first = [replace(s, guards=(guard, *s.guards)) for s in self.of(then, scope)]
                second = [] if orelse is None else self.of(orelse, scope)
                return _sum(first, [replace(s, guards=(z3.Not(guard), *s.guards)) for s in second])
            case ir.Attr(body=body) | ir.Block(body=body) | ir.Assume(body=body):
                return self.of(body, scope)
        if self._changes(node):
            raise NotACounterError
        return []

    def _changes(self, node: ir.Stmt) -> bool:
        for child in ir.walk(node):
            match child:
                case ir.Store(buffer=buffer) if buffer.data is self.var:
                    return True
                case ir.AccessPtr(data=data) if data is self.var:
                    return True
                case ir.Call(args=args) if any(a is self.var for a in args):
                    return True
                case ir.Call(op="address_of" | "call_extern", args=args):
                    for load in (n for a in args for n in ir.walk(a)):
                        if isinstance(load, ir.Load) and load.buffer.data is self.var:
                            return True
                case _:
                    pass
        return False

    def _stored(self, buffer: ir.Buffer, value: ir.Expr) -> Step:
        match value:
            case ir.BinOp(op="add", a=ir.Load(buffer=b), b=ir.Const(value=c)) if b.data is buffer.data:
                return Step(z3.IntVal(int(c)))
            case ir.BinOp(op="sub", a=ir.Load(buffer=b), b=ir.Const(value=c)) if b.data is buffer.data:
                return Step(z3.IntVal(-int(c)))
            case ir.BinOp(op="bitxor", a=ir.Load(buffer=b), b=ir.Const(value=1)) if b.data is buffer.data:
                return Step(z3.IntVal(1), flips=True)
            case ir.BinOp(op="sub", a=ir.Const(value=1), b=ir.Load(buffer=b)) if b.data is buffer.data:
                return Step(z3.IntVal(1), flips=True)
        raise NotACounterError

    def _repeated(self, step: Step, const: z3.ArithRef, rounds: z3.ArithRef) -> Step:
        name = const.decl().name()
        if any(name in constants_of(t) for t in (step.amount, *step.guards)):
            raise NotACounterError
        times = z3.simplify(z3.If(rounds > 0, rounds, z3.IntVal(0)))
        return replace(step, amount=z3.simplify(step.amount * times))

    def _bind(self, bind: ir.Bind, scope: Scope) -> Scope:
        if not bind.var.dtype.is_int or bind.value.dtype.lanes != 1:
            return scope
        try:
            return scope.bind(bind.var, self.encoder.term(bind.value, scope))
        except ir.UnsupportedIR:
            return scope  # a step that depends on it is unknown then


def _sum(first: list[Step], second: list[Step]) -> list[Step]:
    """Add steps under the same guards; flips do not mix with sums."""
    total = list(first)
    for step in second:
        for at, known in enumerate(total):
            same = len(known.guards) == len(step.guards) and all(
                z3.eq(a, b) for a, b in zip(known.guards, step.guards, strict=True)
            )
            if same and known.flips == step.flips:
                total[at] = replace(known, amount=z3.simplify(known.amount + step.amount))
                break
        else:
            if any(known.flips != step.flips for known in total):
                raise NotACounterError
            total.append(step)
    return total
