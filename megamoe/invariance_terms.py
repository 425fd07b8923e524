"""Values of the fused kernel's tile IR as terms, element by element: what suites `invariance*` compare.

Integers that say where something is are Z3 terms; data are `Term`s, whose digest is what is compared. A
buffer holds a function of its indices, which is evaluated where an element is read. A read of what others
have filled (a stage, the product that is handed over, the plan's tensors) is a leaf that `Leaves` names,
once its indices are those of the element that is followed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import z3

from megamoe.invariance_values import (
    ONE,
    Index,
    Term,
    as_data,
    const,
    digits,
    index_of,
    is_number,
    is_zero,
    number,
    plain,
    proved_unsat,
    same,
    stored,
    whole,
)
from verify import ir
from verify.ir import UnsupportedIR
from verify.text import show

CHANNELS = 128  # of a product's step
_IGNORED = (
    "mbarrier_wait_parity",
    "ptx_arrive_barrier",
    "wait_wgmma",
    "tvm_storage_sync",
    "fence_proxy_async",
    "sync_warp",
    "atomic_max_elem_op",
    "set_max_nreg",
)


class Leaves(Protocol):
    """What a claim knows of reads of what is not computed in the piece that is followed."""

    def read(self, name: str, indices: tuple[Index, ...]) -> "Term | Index | None":
        """Return a leaf; None: the read has no meaning here."""

    def choice(self, cond: Index) -> Term | None:
        """Return the leaf of a condition that the plan decides; None: none is known."""

    def begin(self, name: str, indices: tuple[Index, ...], conditions: tuple[Index, ...]) -> None:
        """Take note of the element of an output whose value is followed next."""


Element = Callable[[tuple[Index, ...]], Any]


@dataclass(frozen=True)
class Output:
    """A store to a tensor: of what value."""

    name: str
    value: Term
    node: ir.Store


@dataclass(frozen=True)
class State:
    """What is known at a place of a piece: names, registers by name and index, and buffers' elements."""

    names: dict[ir.Var, Any] = field(default_factory=dict)
    registers: dict[tuple[str, str], Any] = field(default_factory=dict)
    buffers: dict[ir.Var, Element] = field(default_factory=dict)
    conditions: tuple[Index, ...] = ()


class Piece:
    """Follows one piece of the tile IR, in order."""

    def __init__(
        self, leaves: Leaves, outputs: tuple[str, ...], cta: ir.Var, assumed: tuple[Index, ...] = ()
    ) -> None:
        """Begin; `outputs` are tensors whose stores are to be kept, `cta` is the launch's index."""
        self.cta = cta
        self.leaves, self.watched, self.assumed = leaves, outputs, assumed
        self.outputs: list[Output] = []
        self.waits: list[Index] = []  # stages that this round has waited for
        self.folds: list[Fold] = []
        self._numbers = 0
        self._pending: list[tuple[ir.Var, set[ir.Var]]] = []  # products under way: sums, operands

    @property
    def pending(self) -> bool:
        """Whether products are under way."""
        return bool(self._pending)

    # ----------------------------------------------------------------------- statements
    def follow(self, statement: ir.Stmt | None, state: State) -> State:
        """Return what is known after a statement.

        Raises:
            UnsupportedIR: it has no meaning here.
        """
        match statement:
            case None | ir.Assert() | ir.Decl() | ir.Alloc():
                return state
            case ir.Seq(stmts=stmts):
                for each in stmts:
                    state = self.follow(each, state)
                return state
            case ir.Attr(body=body) | ir.Assume(body=body) | ir.Block(body=body):
                return self.follow(body, state)
            case ir.Bind(var=var, value=value):
                return replace(state, names={**state.names, var: self.value(value, state)})
            case ir.Store():
                return self._store(statement, state)
            case ir.If():
                return self._if(statement, state)
            case ir.For(kind="parallel"):
                return self._parallel(statement, state)
            case ir.For():
                return self._loop(statement, state)
            case ir.Eval(value=value):
                return self._call(value, state)
            case ir.While():
                return _forget(statement, state)
        raise UnsupportedIR(f"statement {type(statement).__name__}")

    def _store(self, node: ir.Store, state: State) -> State:
        at = tuple(self.value(i, state) for i in node.indices)
        name = node.buffer.name
        if name in self.watched and node.buffer.scope == "global":
            self._keep(node, at, state.conditions, state)
            return state
        if node.buffer.scope == "global":
            raise UnsupportedIR(f"a store to {name}")
        key = (name, str(plain(at[0]))) if len(at) == 1 else None
        if key is None or not is_number(at[0]):
            raise UnsupportedIR(f"a store to {name}[{', '.join(map(str, at))}] outside parallel loops")
        return replace(state, registers={**state.registers, key: self.value(node.value, state)})

    def _if(self, node: ir.If, state: State) -> State:
        cond = self.value(node.cond, state)
        known = None if isinstance(cond, Term) else self.decide(cond)
        if known is not None:
            return self.follow(node.then if known else node.orelse, state)
        if not self._touches(node):
            return _forget(node, state)
        if node.orelse is not None:
            raise UnsupportedIR(f"both ways of {show(node.cond)} write")
        after = self.follow(node.then, replace(state, conditions=(*state.conditions, cond)))
        return replace(after, conditions=state.conditions)

    def _touches(self, node: ir.Stmt) -> bool:
        """Whether something below writes what is followed."""
        for each in ir.walk(node):
            match each:
                case ir.Store(buffer=b) if b.scope not in ("local", "local.var"):
                    if b.name in self.watched or b.scope != "global":
                        return True
                case ir.Call(op="wgmma_gemm" | "copy" | "reduce" | "fill" | "call_extern"):
                    return True
        return False

    def _parallel(self, loop: ir.For, state: State) -> State:
        loops, body = [loop], loop.body
        while isinstance(body, ir.For) and body.kind == "parallel":
            loops.append(body)
            body = body.body
        if not all(is_zero(x.start) for x in loops):
            raise UnsupportedIR("a parallel loop that does not begin at 0")
        return self._together(loops, body, state)

    def _together(self, loops: list[ir.For], body: ir.Stmt, state: State) -> State:
        """All elements of parallel loops: those they write hold what the snapshot gives."""
        self._settled(body)
        new = dict(state.buffers)
        inner = [body] if not isinstance(body, ir.Seq) else list(body.stmts)
        binds = [s for s in inner if isinstance(s, ir.Bind)]
        for statement in inner:
            match statement:
                case ir.Bind():
                    pass
                case ir.Store(buffer=buffer) if buffer.scope == "global" or buffer.name in self.watched:
                    self._output(loops, binds, statement, None, state)
                case ir.If(then=ir.Store() as store, orelse=None, cond=cond):
                    self._output(loops, binds, store, cond, state)
                case ir.Store(buffer=buffer):
                    self._apart(statement, inner)
                    new[buffer.data] = self._element(loops, binds, statement, state)
                case ir.Eval(
                    value=ir.Call(op="call_extern", args=(ir.Str(value="dsv4_store_b32"), to, word))
                ):
                    buffer, element = self._bytes(loops, binds, to, word, state)
                    new[buffer.data] = element
                case _:
                    raise UnsupportedIR(f"{type(statement).__name__} in a parallel loop")
        return replace(state, buffers=new)

    def _settled(self, body: ir.Stmt) -> None:
        """What a product under way writes is not read or written, nor its operands written."""
        reads = {n.buffer.data for n in ir.walk(body) if isinstance(n, ir.Load)}
        for sums, operands in self._pending:
            if sums in reads or stored([body]) & {sums, *operands}:
                raise UnsupportedIR(f"{sums.name}: of a product that is not waited for")

    @staticmethod
    def _apart(statement: ir.Store, inner: list[ir.Stmt]) -> None:
        """What a parallel loop writes it reads at its own element alone, and in no other statement."""
        own = statement.buffer.data
        for each in inner:
            for node in ir.walk(each):
                if isinstance(node, ir.Load) and node.buffer.data is own:
                    pairs = zip(node.indices, statement.indices, strict=True)
                    if each is not statement or not all(a is b for a, b in pairs):
                        raise UnsupportedIR(f"a parallel loop reads what it writes, {own.name}")

    def _output(
        self, loops: list[ir.For], binds: list[ir.Bind], store: ir.Store, cond: ir.Expr | None, state: State
    ) -> None:
        names = dict(state.names)
        for each in loops:
            names[each.var] = self._fresh(each.var.name)
        inside = replace(state, names=names)
        for bind in binds:
            inside = self.follow(bind, inside)
        held = state.conditions + ((self.value(cond, inside),) if cond is not None else ())
        at = tuple(self.value(i, inside) for i in store.indices)
        if store.buffer.name not in self.watched:
            raise UnsupportedIR(f"a store to {store.buffer.name}")
        self._keep(store, at, held, inside)

    def _keep(self, store: ir.Store, at: tuple[Index, ...], held: tuple[Index, ...], state: State) -> None:
        self.leaves.begin(store.buffer.name, at, held)
        value = as_data(self.value(store.value, state))
        self.outputs.append(Output(store.buffer.name, value, store))

    def _element(self, loops: list[ir.For], binds: list[ir.Bind], store: ir.Store, state: State) -> Element:
        variables = [x.var for x in loops]
        if len(store.indices) != len(variables) or {*store.indices} != {*variables}:
            raise UnsupportedIR(f"places of {store.buffer.name} in a parallel loop")
        for at, extent in zip(store.indices, store.buffer.shape, strict=True):
            loop = next(x for x in loops if x.var is at)
            if not (isinstance(loop.extent, ir.Const) and isinstance(extent, ir.Const)):
                raise UnsupportedIR(f"an extent of {store.buffer.name}")
            if loop.extent.value != extent.value:
                raise UnsupportedIR(f"a part of {store.buffer.name} is written")

        def element(indices: tuple[Index, ...]) -> Any:
            names = {**state.names, **dict(zip(store.indices, indices, strict=True))}
            inside = replace(state, names=names)
            for bind in binds:
                inside = self.follow(bind, inside)
            return self.value(store.value, inside)

        return _remembered(element)

    def _bytes(
        self, loops: list[ir.For], binds: list[ir.Bind], to: ir.Expr, word: ir.Expr, state: State
    ) -> tuple[ir.Buffer, Element]:
        """Four bytes at a time: the row is a loop's variable, the channel a number of the others."""
        if binds or not (isinstance(to, ir.Call) and isinstance(to.args[0], ir.Load)):
            raise UnsupportedIR("where four bytes are stored")
        target = to.args[0]
        row, channel = target.indices
        others = [x for x in loops if x.var is not row]
        if len(others) != len(loops) - 1:
            raise UnsupportedIR("rows of bytes that are stored")
        places: dict[int, dict[ir.Var, Any]] = {}
        for some in digits([int(x.extent.value) for x in others if isinstance(x.extent, ir.Const)]):
            names = {x.var: z3.IntVal(d) for x, d in zip(others, some, strict=True)}
            at = number(self.value(channel, replace(state, names={**state.names, **names})))
            if at in places or at % 4:
                raise UnsupportedIR("bytes that are stored twice")
            places[at] = names
        if sorted(places) != list(range(0, CHANNELS, 4)):
            raise UnsupportedIR("bytes that are not stored")

        def element(indices: tuple[Index, ...]) -> Any:
            at = number(indices[1])
            names = {**state.names, **places[at // 4 * 4], row: indices[0]}
            return Term.of("byte", at % 4, as_data(self.value(word, replace(state, names=names))))

        return target.buffer, _remembered(element)

    # ----------------------------------------------------------------------- loops
    def _loop(self, loop: ir.For, state: State) -> State:
        ops = {n.op for n in ir.walk(loop.body) if isinstance(n, ir.Call)}
        if not is_zero(loop.start):
            raise UnsupportedIR(f"a loop that begins at {show(loop.start)}")
        if "wgmma_gemm" in ops:
            fold = Fold(self, loop, state)
            self.folds.append(fold)
            return fold.after()
        extent = self.value(loop.extent, state)
        if loop.kind == "unrolled" and is_number(extent):
            for at in range(number(extent)):
                names = {**state.names, loop.var: z3.IntVal(at)}
                state = self.follow(loop.body, replace(state, names=names))
            return state
        if not self._touches(loop):
            return _forget(loop, state)
        # Any round: it may read nothing that a round before has left.
        state = _forget(loop.body, state)
        buffers = {k: v for k, v in state.buffers.items() if k not in stored([loop.body])}
        names = {**state.names, loop.var: self._fresh(loop.var.name)}
        after = self.follow(loop.body, replace(state, names=names, buffers=buffers))
        written = stored([loop.body])
        kept = {k: v for k, v in after.buffers.items() if k not in written}
        return replace(_forget(loop.body, state), buffers=kept)

    # ----------------------------------------------------------------------- calls
    def _call(self, call: ir.Expr, state: State) -> State:
        if not isinstance(call, ir.Call):
            return state
        match call.op, call.args:
            case "fill", (ir.Region(buffer=buffer) as region, value):
                whole(region)
                what = as_data(self.value(value, state))
                return replace(state, buffers={**state.buffers, buffer.data: lambda _: what})
            case "copy", (ir.Region() as source, ir.Region(buffer=to) as target, *_):
                return self._copy(source, target, to, state)
            case "reduce", (
                ir.Region() as source,
                ir.Region(buffer=to) as target,
                ir.Str(value=op),
                dim,
                clear,
            ):
                whole(source)
                whole(target)
                if not (isinstance(dim, ir.Const) and dim.value == 1 and getattr(clear, "value", 0)):
                    raise UnsupportedIR("a reduction of another dimension")
                if not source.buffer.dtype.is_int or op != "max":
                    raise UnsupportedIR(f"a reduction by {op}, whose order may matter")
                before = state.buffers[source.buffer.data]
                along = self._fresh("along")
                extent = const(source.extents[1])

                def reduced(indices: tuple[Index, ...]) -> Any:
                    return Term.of("reduce", op, extent, as_data(before((indices[0], along))))

                return replace(state, buffers={**state.buffers, to.data: _remembered(reduced)})
            case "wgmma_gemm", args:
                return self._wgmma(args, state)
            case op, _ if op in _IGNORED:
                if op == "wait_wgmma":
                    left = number(self.value(call.args[0], state))
                    self._pending = self._pending[max(len(self._pending) - left, 0) :]
                if op == "mbarrier_wait_parity" and isinstance(call.args[0], ir.Load):
                    barrier = call.args[0]
                    if barrier.buffer.name == "full":
                        self.waits.append(self.value(barrier.indices[0], state))
                return state
        raise UnsupportedIR(f"call {call.op}")

    def _copy(self, source: ir.Region, target: ir.Region, to: ir.Buffer, state: State) -> State:
        whole(target)
        first = [self.value(m, state) for m in source.mins]
        what, name = state.buffers.get(source.buffer.data), source.buffer.name
        if [const(e) for e in source.extents] != [const(e) for e in target.extents]:
            raise UnsupportedIR("a copy between shapes")

        def element(indices: tuple[Index, ...]) -> Any:
            at = tuple(plain(m + i) for m, i in zip(first, indices, strict=True))
            return what(at) if what is not None else self._leaf(name, at)

        return replace(state, buffers={**state.buffers, to.data: _remembered(element)})

    def _wgmma(self, args: tuple[ir.Expr, ...], state: State) -> State:
        a, b, out, turned_a, turned_b, _, _, k, _, clear, *_ = args
        if not (isinstance(a, ir.Region) and isinstance(b, ir.Region) and isinstance(out, ir.Region)):
            raise UnsupportedIR("operands of a product")
        flags = [getattr(x, "value", None) for x in (turned_a, turned_b, k, clear)]
        if flags != [False, True, CHANNELS, True]:
            raise UnsupportedIR("a product that is turned, short, or does not begin at zero")
        whole(out)
        if any(out.buffer.data is sums for sums, _ in self._pending):
            raise UnsupportedIR("a product into the sums of one under way")
        self._pending.append((out.buffer.data, {a.buffer.data, b.buffer.data}))
        read_a, read_b = self._operand(a, state), self._operand(b, state)
        types = sorted((str(a.buffer.dtype), str(b.buffer.dtype)))

        def element(indices: tuple[Index, ...]) -> Any:
            row, column = indices
            pairs = [Term.of("mul", read_a(row, c), read_b(column, c)) for c in range(CHANNELS)]
            return Term.of("products from zero", *types, *pairs)

        return replace(state, buffers={**state.buffers, out.buffer.data: _remembered(element)})

    def _operand(self, region: ir.Region, state: State) -> Callable[[Index, int], Term]:
        mins = [self.value(m, state) for m in region.mins]
        if const(region.extents[-1]) != CHANNELS or any(const(e) != 1 for e in region.extents[:-2]):
            raise UnsupportedIR("an operand of other channels")
        what, name = state.buffers.get(region.buffer.data), region.buffer.name

        def read(row: Index, channel: int) -> Term:
            at = (*mins[:-2], plain(mins[-2] + row), plain(mins[-1] + channel))
            return as_data(what(at) if what is not None else self._leaf(name, at))

        return read

    # ----------------------------------------------------------------------- expressions
    def value(self, node: ir.Expr, state: State) -> Any:
        """Return an expression's value: a Term of data, a Z3 term of an index.

        Raises:
            UnsupportedIR: it has no meaning here.
        """
        match node:
            case ir.Const(value=value, dtype=dtype):
                if dtype.name == "bool":
                    return z3.BoolVal(bool(value))
                return (
                    z3.IntVal(int(value)) if dtype.is_int else Term.of(f"const:{dtype}", repr(float(value)))
                )
            case ir.Var():
                return (
                    z3.Int("bx")
                    if node is self.cta
                    else state.names.get(node, z3.Int(f"{node.name}@{id(node)}"))
                )
            case ir.Let(var=var, value=value, body=body):
                names = {**state.names, var: self.value(value, state)}
                return self.value(body, replace(state, names=names))
            case ir.Load(buffer=buffer, indices=indices):
                at = tuple(plain(self.value(i, state)) for i in indices)
                return self._load(buffer, at, state)
            case ir.Cast(a=a, dtype=dtype):
                inner = self.value(a, state)
                if z3.is_expr(inner):
                    if not dtype.is_int:
                        raise UnsupportedIR(f"{dtype} of an index")
                    return inner
                return inner if dtype == a.dtype else Term.of(f"cast:{a.dtype}:{dtype}", inner)
            case ir.Not(a=a):
                inner = self.value(a, state)
                return z3.Not(inner) if z3.is_expr(inner) else Term.of("not", inner)
            case ir.Select(cond=cond, a=a, b=b):
                return self._select(self.value(cond, state), a, b, state)
            case ir.BinOp(op=op, a=a, b=b, dtype=dtype):
                left, right = self.value(a, state), self.value(b, state)
                if z3.is_expr(left) and z3.is_expr(right):
                    return index_of(op, left, right)
                left, right = as_data(left), as_data(right)
                if op == "mul" and ONE in (left, right):
                    return left if right == ONE else right
                kind = op if a.dtype.is_int or op in ("add", "mul") else f"float {op}"
                return Term.of(f"{kind}:{a.dtype}:{dtype}", left, right)
            case ir.Call(op=op, args=args, dtype=dtype):
                parts = [a.value if isinstance(a, ir.Str) else as_data(self.value(a, state)) for a in args]
                return Term.of(f"call {op}:{dtype}", *parts)
        raise UnsupportedIR(f"expression {type(node).__name__}")

    def _select(self, cond: Any, a: ir.Expr, b: ir.Expr, state: State) -> Any:
        if z3.is_expr(cond):
            known = self.decide(cond)
            if known is not None:
                return self.value(a if known else b, state)
            named = self.leaves.choice(cond)
            if named is None:
                left, right = self.value(a, state), self.value(b, state)
                if z3.is_expr(left) and z3.is_expr(right):
                    return z3.If(cond, left, right)
                raise UnsupportedIR(f"a choice by {cond}")
            cond = named
        return Term.of("select", cond, as_data(self.value(a, state)), as_data(self.value(b, state)))

    def _load(self, buffer: ir.Buffer, at: tuple[Index, ...], state: State) -> Any:
        if buffer.data in state.buffers:
            return state.buffers[buffer.data](at)
        if buffer.scope in ("local", "local.var") and len(at) == 1:
            key = (buffer.name, str(at[0]))
            if key in state.registers:
                return state.registers[key]
            if buffer.dtype.is_int:
                return z3.Int(f"{buffer.name}[{at[0]}]")
        return self._leaf(buffer.name, at)

    def _leaf(self, name: str, at: tuple[Index, ...]) -> Any:
        found = self.leaves.read(name, at)
        if found is None:
            raise UnsupportedIR(f"a read of {name}[{', '.join(map(str, at))}]")
        return found

    def decide(self, cond: Index) -> bool | None:
        """Return whether a condition holds, if what is assumed decides it."""
        cond = z3.simplify(cond)
        if z3.is_true(cond) or z3.is_false(cond):
            return z3.is_true(cond)
        for answer, goal in ((True, z3.Not(cond)), (False, cond)):
            if self.assumed and proved_unsat((*self.assumed, goal)):
                return answer
        return None

    def _fresh(self, name: str) -> z3.ArithRef:
        self._numbers += 1
        return z3.Int(f"{name}#{self._numbers}")


class Fold:
    """A product's loop: sums carried over its rounds, each of which waits for the stages that it reads."""

    def __init__(self, piece: Piece, loop: ir.For, state: State) -> None:
        """Find the round: the body of the loop, or what an unrolled turn of the ring does at one stage."""
        self.piece, self.loop, self.before = piece, loop, state
        self.number = z3.Int(f"{loop.var.name}!")
        names = {**state.names, loop.var: self.number}
        self.extent = piece.value(loop.extent, state)
        self.body, self.turn = loop.body, None
        self.conditions: tuple[Index, ...] = ()
        inner = (
            loop.body.stmts[0] if isinstance(loop.body, ir.Seq) and len(loop.body.stmts) == 1 else loop.body
        )
        if isinstance(inner, ir.For) and inner.kind == "unrolled" and is_zero(inner.start):
            turn = z3.Int(f"{inner.var.name}!")
            names[inner.var] = turn
            self.turn = turn, piece.value(inner.extent, state)
            self.body = inner.body
            while isinstance(self.body, ir.Seq) and len(self.body.stmts) == 1:
                self.body = self.body.stmts[0]
            state_in = replace(state, names=names)
            while isinstance(self.body, ir.If) and self.body.orelse is None:
                self.conditions = (*self.conditions, piece.value(self.body.cond, state_in))
                self.body = self.body.then
        self.inside = replace(state, names=names)

    def after(self) -> State:
        """Return the state behind the loop: what it writes holds folds; others' rounds are not seen."""
        piece, written = self.piece, stored([self.body])
        start = {**self.before.buffers}
        asked: list[tuple[ir.Var, tuple[Index, ...]]] = []

        def carried(data: ir.Var) -> Element:
            def element(indices: tuple[Index, ...]) -> Any:
                if not asked or asked[-1][0] is not data:
                    raise UnsupportedIR(f"{data.name} of a round before is read for another")
                if any(not same(a, b) for a, b in zip(indices, asked[-1][1], strict=True)):
                    raise UnsupportedIR(f"another element of {data.name} is added")
                return Term.of("carried")

            return element

        buffers = {**start, **{data: carried(data) for data in written}}
        piece.waits.clear()
        end = piece.follow(self.body, _forget(self.body, replace(self.inside, buffers=buffers)))
        self.waits = tuple(piece.waits)
        if piece.pending:
            raise UnsupportedIR("a product is under way at the end of a round")

        def folded(data: ir.Var) -> Element:
            def element(indices: tuple[Index, ...]) -> Any:
                if data not in start:
                    raise UnsupportedIR(f"{data.name} has no value before the loop")
                asked.append((data, indices))
                term = as_data(end.buffers[data](indices))
                asked.pop()
                return Term.of("fold", "rounds", as_data(start[data](indices)), term)

            return element

        kept = {**start, **{data: folded(data) for data in written}}
        return replace(_forget(self.body, self.before), buffers=kept)


# --------------------------------------------------------------------------- helpers


def _forget(statement: Any, state: State) -> State:
    """Forget the registers that a statement may write."""
    names = {n.buffer.name for n in ir.walk(statement) if isinstance(n, ir.Store)}
    kept = {k: v for k, v in state.registers.items() if k[0] not in names}
    lost = {k: z3.Int(f"{k[0]}[{k[1]}]'{id(statement)}") for k in state.registers if k[0] in names}
    return replace(state, registers={**kept, **lost})


def _remembered(element: Element) -> Element:
    found: dict[tuple[str, ...], Any] = {}

    def read(indices: tuple[Index, ...]) -> Any:
        key = tuple(i.sexpr() for i in indices)
        if key not in found:
            found[key] = element(indices)
        return found[key]

    return read
