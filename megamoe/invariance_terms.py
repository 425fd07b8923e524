"""Pieces of the fused kernel's tile IR, followed statement by statement: what suites `invariance*` compare.

What an expression is, and what is known at a place: `invariance_expressions`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import z3

from megamoe.invariance_expressions import Element, Leaves, State, Values, lost
from megamoe.invariance_values import (
    REGISTERS,
    Index,
    Term,
    const,
    digits,
    index_of,
    is_number,
    is_zero,
    registers_of,
    stored,
    whole,
)
from verify import ir
from verify.ir import UnsupportedIR
from verify.text import show

CHANNELS = 128  # of a product's step
WORD, BYTE = 4, 8  # bytes, bits
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


@dataclass(frozen=True)
class Output:
    """A store to a tensor: of what value."""

    name: str
    value: Term
    node: ir.Store


class Piece(Values):
    """Follows one piece of the tile IR, in order."""

    def __init__(
        self, leaves: Leaves, outputs: tuple[str, ...], cta: ir.Var, assumed: tuple[Index, ...] = ()
    ) -> None:
        """Begin; `outputs` are tensors whose stores are to be kept, `cta` is the launch's index."""
        super().__init__(leaves, cta, assumed)
        self.watched = outputs
        self.outputs: list[Output] = []
        self.waits: list[Index] = []  # places that this round has waited for
        self.folds: list[Fold] = []
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
                return state.named({var: self.value(value, state)})
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
            case ir.While() if not self._touches(statement):
                return self.forget(statement, state)
        raise UnsupportedIR(f"statement {type(statement).__name__}")

    def _store(self, node: ir.Store, state: State) -> State:
        at = tuple(self.value(i, state) for i in node.indices)
        name = node.buffer.name
        if name in self.watched and node.buffer.scope == "global":
            self._keep(node, at, state.conditions, state)
            return state
        if node.buffer.scope == "global":
            raise UnsupportedIR(f"a store to {name}")
        if node.buffer.scope not in REGISTERS or len(at) != 1 or not is_number(at[0]):
            raise UnsupportedIR(f"a store to {name}[{', '.join(map(str, at))}] outside parallel loops")
        return self._put(state, {(node.buffer.data, at[0]): self.value(node.value, state)})

    @staticmethod
    def _put(state: State, values: Mapping[tuple[ir.Var, int], Any]) -> State:
        return replace(state, registers={**state.registers, **values})

    def _if(self, node: ir.If, state: State) -> State:
        cond = self.value(node.cond, state)
        known = None if isinstance(cond, Term) else self.decide(cond)
        if known is not None:
            return self.follow(node.then if known else node.orelse, state)
        if self._touches(node):
            if node.orelse is not None:
                raise UnsupportedIR(f"both ways of {show(node.cond)} write")
            self._perhaps(node.then, replace(state, conditions=(*state.conditions, cond)))
            state = self._written(node, state)
        return self.forget(node, state)

    def _perhaps(self, statement: ir.Stmt, state: State) -> None:
        """Follow what may take place or not, for its outputs: nothing has been waited for behind it."""
        pending, waits = list(self._pending), len(self.waits)
        self.follow(statement, state)
        self._pending = [*pending, *(p for p in self._pending if p not in pending)]
        del self.waits[waits:]

    @staticmethod
    def _written(node: ir.Stmt, state: State) -> State:
        """The buffers that a statement may write hold nothing that is known."""
        return state.holding({data: lost(data.name) for data in stored([node])})

    def forget(self, statement: ir.Stmt, state: State) -> State:
        """Forget the registers that a statement may write."""
        changed = registers_of(statement)
        kept = {k: v for k, v in state.registers.items() if k[0] not in changed}
        since = self.next() if changed else 0
        return replace(state, registers=kept, unknown={**state.unknown, **dict.fromkeys(changed, since)})

    def _touches(self, node: ir.Stmt) -> bool:
        """Whether something below writes what is followed."""
        for each in ir.walk(node):
            match each:
                case ir.Store(buffer=b) if b.scope not in REGISTERS:
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
        reads = {
            n.buffer.data
            for n in ir.walk(body)
            if isinstance(n, ir.Load) or (isinstance(n, ir.Region) and n.mode != "w")
        }
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
        inside = state.named({each.var: self.fresh(each.var.name) for each in loops})
        for bind in binds:
            inside = self.follow(bind, inside)
        held = state.conditions + ((self.value(cond, inside),) if cond is not None else ())
        at = tuple(self.value(i, inside) for i in store.indices)
        if store.buffer.name not in self.watched:
            raise UnsupportedIR(f"a store to {store.buffer.name}")
        self._keep(store, at, held, inside)

    def _keep(self, store: ir.Store, at: tuple[Index, ...], held: tuple[Index, ...], state: State) -> None:
        self.leaves.begin(store.buffer.name, at, held)
        value = self.data(self.value(store.value, state))
        self.outputs.append(Output(store.buffer.name, value, store))

    def _element(self, loops: list[ir.For], binds: list[ir.Bind], store: ir.Store, state: State) -> Element:
        variables = [i for i in store.indices if isinstance(i, ir.Var)]
        if len(store.indices) != len(loops) or {*variables} != {x.var for x in loops}:
            raise UnsupportedIR(f"places of {store.buffer.name} in a parallel loop")
        for at, extent in zip(variables, store.buffer.shape, strict=True):
            loop = next(x for x in loops if x.var is at)
            if not (isinstance(loop.extent, ir.Const) and isinstance(extent, ir.Const)):
                raise UnsupportedIR(f"an extent of {store.buffer.name}")
            if loop.extent.value != extent.value:
                raise UnsupportedIR(f"a part of {store.buffer.name} is written")

        def element(indices: tuple[Index, ...]) -> Any:
            inside = state.named(dict(zip(variables, indices, strict=True)))
            for bind in binds:
                inside = self.follow(bind, inside)
            return self.value(store.value, inside)

        return self.remembered(element)

    def _bytes(
        self, loops: list[ir.For], binds: list[ir.Bind], to: ir.Expr, word: ir.Expr, state: State
    ) -> tuple[ir.Buffer, Element]:
        """Four bytes at a time: the row is a loop's variable, the channel a number of the others."""
        if binds or not (isinstance(to, ir.Call) and isinstance(to.args[0], ir.Load)):
            raise UnsupportedIR("where four bytes are stored")
        target = to.args[0]
        row, channel = target.indices
        others = [x for x in loops if x.var is not row]
        rows = [const(x.extent) for x in loops if x.var is row]
        if not isinstance(row, ir.Var) or rows != [const(target.buffer.shape[0])]:
            raise UnsupportedIR("rows of bytes that are stored")
        places: dict[int, dict[ir.Var, Any]] = {}
        for some in digits([const(x.extent) for x in others]):
            names = {x.var: d for x, d in zip(others, some, strict=True)}
            at = self._number(self.value(channel, state.named(names)))
            if at in places or at % WORD:
                raise UnsupportedIR("bytes that are stored twice")
            places[at] = names
        if sorted(places) != list(range(0, CHANNELS, WORD)):
            raise UnsupportedIR("bytes that are not stored")

        def words(indices: tuple[Index, ...]) -> Any:
            at = self._number(indices[1])
            if at not in places:
                raise UnsupportedIR(f"channel {at} of {target.buffer.name}")
            return self.data(self.value(word, state.named({**places[at], row: indices[0]})))

        whole_words = self.remembered(words)

        def element(indices: tuple[Index, ...]) -> Any:
            at = self._number(indices[1])
            return Term.of("byte", at % WORD, whole_words((indices[0], at // WORD * WORD)))

        return target.buffer, self.remembered(element)

    def _number(self, index: Index) -> int:
        return self.leaves.checks.number("a channel", index, self.assumed)

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
        if loop.kind in ("unrolled", "vectorized") and is_number(extent):
            if loop.kind == "vectorized":
                _independent(loop)
            for at in range(extent):
                state = self.follow(loop.body, state.named({loop.var: at}))
            return state
        if self._touches(loop):
            # Any round: it may read nothing that a round before has left.
            inside = self._written(loop, self.forget(loop, state))
            self._perhaps(loop.body, inside.named({loop.var: self.fresh(loop.var.name)}))
            state = self._written(loop, state)
        return self.forget(loop, state)

    # ----------------------------------------------------------------------- calls
    def _call(self, call: ir.Expr, state: State) -> State:
        if not isinstance(call, ir.Call):
            return state
        if call.op in ("fill", "copy", "reduce"):
            self._settled(ir.Eval(None, call))
        match call.op, call.args:
            case "fill", (ir.Region(buffer=buffer) as region, value):
                whole(region)
                what = self.data(self.value(value, state))
                return state.holding({buffer.data: lambda _: what})
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
                before = state.buffers.get(source.buffer.data, lost(source.buffer.name))
                along = self.fresh("along")
                extent = const(source.extents[1])

                def reduced(indices: tuple[Index, ...]) -> Any:
                    return Term.of("reduce", op, extent, self.data(before((indices[0], along))))

                return state.holding({to.data: self.remembered(reduced)})
            case "call_extern", (ir.Str(value="dsv4_store_b32"), ir.Call(args=(ir.Load() as target,)), word):
                return self._store_word(target, word, state)
            case "wgmma_gemm", args:
                return self._wgmma(args, state)
            case op, _ if op in _IGNORED:
                if op == "wait_wgmma":
                    left = self._number(self.value(call.args[0], state))
                    self._pending = self._pending[max(len(self._pending) - left, 0) :]
                if op == "mbarrier_wait_parity" and isinstance(call.args[0], ir.Load):
                    barrier = call.args[0]
                    if barrier.buffer.name == self.leaves.awaited:
                        self.waits.append(self.value(barrier.indices[0], state))
                return state
        raise UnsupportedIR(f"call {call.op}")

    def _store_word(self, target: ir.Load, word: ir.Expr, state: State) -> State:
        """Four bytes of an array of a thread's own."""
        buffer, value = target.buffer, self.data(self.value(word, state))
        at = [self.value(i, state) for i in target.indices]
        if buffer.scope not in REGISTERS or buffer.dtype.bits != BYTE or len(at) != 1 or not is_number(at[0]):
            raise UnsupportedIR(f"four bytes are stored to {buffer.name}")
        bytes_ = {(buffer.data, at[0] + b): Term.of("byte", b, value) for b in range(WORD)}
        return self._put(state, bytes_)

    def _copy(self, source: ir.Region, target: ir.Region, to: ir.Buffer, state: State) -> State:
        whole(target)
        first = [self.value(m, state) for m in source.mins]
        what, name = state.buffers.get(source.buffer.data), source.buffer.name
        if [const(e) for e in source.extents] != [const(e) for e in target.extents]:
            raise UnsupportedIR("a copy between shapes")

        def element(indices: tuple[Index, ...]) -> Any:
            at = tuple(index_of("add", m, i) for m, i in zip(first, indices, strict=True))
            return what(at) if what is not None else self.leaf(name, at)

        return state.holding({to.data: self.remembered(element)})

    def _wgmma(self, args: tuple[ir.Expr, ...], state: State) -> State:
        a, b, out, turned_a, turned_b, m, n, k, _, clear, *_ = args
        if not (isinstance(a, ir.Region) and isinstance(b, ir.Region) and isinstance(out, ir.Region)):
            raise UnsupportedIR("operands of a product")
        flags = [getattr(x, "value", None) for x in (turned_a, turned_b, k, clear)]
        if flags != [False, True, CHANNELS, True]:
            raise UnsupportedIR("a product that is turned, short, or does not begin at zero")
        whole(out)
        if (
            not [const(m), const(n)]
            == [const(e) for e in out.extents]
            == [const(x.extents[-2]) for x in (a, b)]
        ):
            raise UnsupportedIR("a product of other rows than its sums have")
        if any(out.buffer.data is sums for sums, _ in self._pending):
            raise UnsupportedIR("a product into the sums of one under way")
        self._pending.append((out.buffer.data, {a.buffer.data, b.buffer.data}))
        read_a, read_b = self._operand(a, state), self._operand(b, state)
        types = sorted((str(a.buffer.dtype), str(b.buffer.dtype)))

        def element(indices: tuple[Index, ...]) -> Any:
            row, column = indices
            pairs = [Term.of("mul", read_a(row, c), read_b(column, c)) for c in range(CHANNELS)]
            return Term.of("products from zero", *types, *pairs)

        return state.holding({out.buffer.data: self.remembered(element)})

    def _operand(self, region: ir.Region, state: State) -> Callable[[Index, int], Term]:
        mins = [self.value(m, state) for m in region.mins]
        if const(region.extents[-1]) != CHANNELS or any(const(e) != 1 for e in region.extents[:-2]):
            raise UnsupportedIR("an operand of other channels")
        what, name = state.buffers.get(region.buffer.data), region.buffer.name

        def read(row: Index, channel: int) -> Term:
            at = (*mins[:-2], index_of("add", mins[-2], row), index_of("add", mins[-1], channel))
            return self.data(what(at) if what is not None else self.leaf(name, at))

        return read


class Fold:
    """A product's loop: sums carried over its rounds, each of which waits for the stages that it reads."""

    def __init__(self, piece: Piece, loop: ir.For, state: State) -> None:
        """Find the round: the body of the loop, or what an unrolled turn of the ring does at one stage."""
        self.piece, self.loop, self.before = piece, loop, state
        self.number = z3.Int(f"{loop.var.name}!")
        names: dict[ir.Var, Any] = {loop.var: self.number}
        self.extent = piece.value(loop.extent, state)
        self.body, self.turn = loop.body, None
        self.conditions: tuple[Index, ...] = ()
        inner = (
            loop.body.stmts[0] if isinstance(loop.body, ir.Seq) and len(loop.body.stmts) == 1 else loop.body
        )
        if isinstance(inner, ir.For) and inner.kind == "unrolled" and is_zero(inner.start):
            self.turn = z3.Int(f"{inner.var.name}!"), piece.value(inner.extent, state)
            names[inner.var] = self.turn[0]
            self.body = inner.body
            while isinstance(self.body, ir.Seq) and len(self.body.stmts) == 1:
                self.body = self.body.stmts[0]
        self.inside = piece.forget(loop, state).named(names)  # as any round begins
        if self.turn is not None:
            while isinstance(self.body, ir.If) and self.body.orelse is None:
                self.conditions = (*self.conditions, piece.value(self.body.cond, self.inside))
                self.body = self.body.then

    def after(self) -> State:
        """Return the state behind the loop: what it writes holds folds; others' rounds are not seen."""
        piece, written = self.piece, stored([self.loop])
        start, asked = self.before.buffers, self.piece.asked

        def carried(data: ir.Var) -> Element:
            def element(indices: tuple[Index, ...]) -> Any:
                if not asked or asked[-1][0] is not data:
                    raise UnsupportedIR(f"{data.name} of a round before is read for another")
                for a, b in zip(indices, asked[-1][1], strict=True):
                    if not piece.leaves.checks.same("an element that is added to", a, b):
                        raise UnsupportedIR(f"another element of {data.name} is added")
                return Term.of("carried")

            return element

        piece.waits.clear()
        inside = self.inside.holding({data: carried(data) for data in written})
        end = piece.follow(self.body, inside)
        self.waits = tuple(piece.waits)
        if piece.pending:
            raise UnsupportedIR("a product is under way at the end of a round")

        def folded(data: ir.Var) -> Element:
            def element(indices: tuple[Index, ...]) -> Any:
                if data not in start:
                    raise UnsupportedIR(f"{data.name} has no value before the loop")
                asked.append((data, indices))
                term = piece.data(end.buffers[data](indices))
                asked.pop()
                return Term.of("fold", "rounds", piece.data(start[data](indices)), term)

            return element

        after = self.before.holding({data: folded(data) for data in written})
        return piece.forget(self.loop, after)


def _independent(loop: ir.For) -> None:
    """Check that no element of a vector is read that another writes."""
    written = {*registers_of(loop.body), *stored([loop.body])}
    if any(isinstance(n, ir.Load) and n.buffer.data in written for n in ir.walk(loop.body)):
        raise UnsupportedIR("a vector reads what it writes")
