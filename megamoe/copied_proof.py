"""What dispatch puts in the ring of received rows is the plan's token's row: claim `copies`.

Of the tile program: each store to `x_ring` and `x_ring_scale` is followed, for any block, part and round;
what is read of tensors is an unknown function of where. Both solvers prove that what is stored for row r of a
block is, channel by channel, the row of the token that `row_source` has for row `block * block_m + r`, of the
rank that it has it of, or zeros where it has none; and that what is stored as a scale is a function of the
byte of that token's scale alone, or of 127, a one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import z3

from megamoe import schedule
from megamoe.config import Config
from megamoe.ring import given
from verify import ir
from verify.intarith import ARITHMETIC, COMPARE
from verify.ir import UnsupportedIR
from verify.properties import Claims, Issue
from verify.refine.inline import written
from verify.solve import Obligation
from verify.text import show

CLAIMS = ("copies",)
ASSUMPTIONS = (
    "copies: the device computes what the tile program does (claim `refinement`); all elements of a place "
    "are written, each once, in order: claims `places` and `dispatch` of the suites `signals`",
    "copies: `row_source` has an entry's number, rank * tokens + token, or -1 (suites `plan`)",
    "copies: a scale is the float32 of its byte (claim `format`)",
    "copies: index arithmetic is that of mathematical integers (property `overflow`)",
)
_ROWS, _SCALES = "x_ring", "x_ring_scale"
_PRIVATE = ("local", "local.var")
_ONE = 127  # UE8M0 of 2^0

Element = Callable[[tuple[z3.ArithRef, ...]], Any]


def claims(tile: ir.Function, config: Config) -> dict[str, Claims]:
    """Return what has to be proved of a kernel's tile program, by the names of CLAIMS."""
    try:
        obligations = list(_Copies(tile, config).obligations())
    except UnsupportedIR as error:
        return {"copies": Claims(unsupported=[Issue(None, f"dispatch: {error}")])}
    return {"copies": Claims(obligations=obligations, assumptions=list(ASSUMPTIONS))}


@dataclass(frozen=True)
class _State:
    """What is known at a place: names, private variables by name, elements of fragments, what holds."""

    names: Mapping[ir.Var, Any] = field(default_factory=dict)
    private: Mapping[str, Any] = field(default_factory=dict)
    fragments: Mapping[ir.Var, Element] = field(default_factory=dict)
    holds: tuple[z3.BoolRef, ...] = ()


class _Copies:
    def __init__(self, tile: ir.Function, config: Config) -> None:
        self.tile, self.config = tile, config
        self._fresh = 0
        self.seen: set[int] = set()

    def obligations(self) -> Iterator[Obligation]:
        """Yield what has to be proved.

        Raises:
            UnsupportedIR: the rings are written otherwise than by stores of parallel loops.
        """
        stores = [n for n in ir.walk(self.tile.body) if _puts(n)]
        for node in ir.walk(self.tile.body):
            match node:
                case ir.Region(buffer=buffer, mode=mode) if buffer.name in (_ROWS, _SCALES) and mode != "r":
                    raise UnsupportedIR(f"{buffer.name} is written by an operation")
                case ir.AccessPtr(data=data) if data.name in (_ROWS, _SCALES):
                    raise UnsupportedIR(f"{data.name} is pointed to")
                case ir.Call(op="address_of" | "access_ptr", args=(ir.Load(buffer=buffer), *_)):
                    if buffer.name in (_ROWS, _SCALES):
                        raise UnsupportedIR(f"{buffer.name} is pointed to")
        found: list[Obligation] = []
        self._follow(self.tile.body, _State(), found)
        yield from found
        both = {n.buffer.name for n in stores} == {_ROWS, _SCALES}
        every = both and {id(n) for n in stores} == self.seen
        what = "dispatch: every store to the rings of received rows and their scales is followed"
        yield Obligation(what, None, (), z3.BoolVal(every), {"stores": len(stores)})

    # ------------------------------------------------------------------ statements
    def _follow(self, node: ir.Stmt, state: _State, found: list[Obligation]) -> _State:
        if not any(_puts(n) for n in ir.walk(node)):
            return self._past(node, state)
        match node:
            case ir.Seq(stmts=stmts):
                for stmt in stmts:
                    state = self._follow(stmt, state, found)
            case ir.Launch(var=var, extent=extent, body=body):
                number = self._number(var.name)
                holds = (number >= 0, number < self._value(extent, state))
                names = {**state.names, var: number}
                self._follow(body, replace(state, names=names, holds=state.holds + holds), found)
            case ir.Block() | ir.Attr() | ir.Assume():
                self._follow(node.body, state, found)
            case ir.If(then=then, orelse=orelse):
                self._follow(then, state, found)
                if orelse is not None:
                    self._follow(orelse, state, found)
                state = self._forgotten(node, state)
            case ir.For(kind="parallel"):
                loops, body = _parallel(node)
                self._put(loops, body, state, found)
            case ir.For(var=var, start=start, body=body):
                state = self._forgotten(node, state)
                number, low = self._number(var.name), self._value(start, state)
                high = low + self._value(node.extent, state)
                inner = replace(state, names={**state.names, var: number})
                self._follow(body, replace(inner, holds=(*state.holds, low <= number, number < high)), found)
            case _:
                raise UnsupportedIR(f"{type(node).__name__} that writes the ring of received rows")
        return state

    def _past(self, node: ir.Stmt, state: _State) -> _State:
        """Return what is known behind a statement that writes neither ring."""
        match node:
            case ir.Seq(stmts=stmts):
                for stmt in stmts:
                    state = self._past(stmt, state)
                return state
            case ir.Bind(var=var, value=value):
                return replace(state, names={**state.names, var: self._known(value, state)})
            case ir.Store(buffer=buffer, indices=(ir.Const(value=0),), value=value) if (
                buffer.scope in _PRIVATE
            ):
                return replace(state, private={**state.private, buffer.name: self._known(value, state)})
            case ir.For(kind="parallel"):
                loops, body = _parallel(node)
                filled = self._filled(loops, body, state)
                state = self._forgotten(node, state)
                return replace(state, fragments={**state.fragments, **filled})
        return self._forgotten(node, state)

    def _known(self, value: ir.Expr, state: _State) -> Any:
        try:
            return self._value(value, state)
        except UnsupportedIR:
            return self._number("unknown")

    def _forgotten(self, node: ir.Stmt, state: _State) -> _State:
        data = written(node)
        names = {v.name for v in data}
        private = {name: self._number(name) if name in names else v for name, v in state.private.items()}
        fragments = {v: element for v, element in state.fragments.items() if v not in data}
        return replace(state, private=private, fragments=fragments)

    def _number(self, name: str) -> z3.ArithRef:
        self._fresh += 1
        return z3.Int(f"{name}#{self._fresh}")

    # ------------------------------------------------------------------ parallel loops
    def _filled(self, loops: list[ir.For], body: ir.Stmt, state: _State) -> dict[ir.Var, Element]:
        """Return the elements of a fragment that parallel loops fill, all of it, with what stands before."""
        *binds, store = _flat(body)
        if not isinstance(store, ir.Store) or not all(isinstance(b, ir.Bind) for b in binds):
            return {}
        data = store.buffer.data
        reads_it = any(n.buffer.data is data for n in ir.walk(body) if isinstance(n, ir.Load))
        if store.buffer.scope != "local.fragment" or reads_it or not _is_whole(loops, store):
            return {}

        def element(at: tuple[z3.ArithRef, ...]) -> Any:
            names = {v: z3.IntVal(0) for v in (x.var for x in loops)}  # of one round, where none is named
            for i, a in zip(store.indices, at, strict=True):
                if isinstance(i, ir.Var):
                    names[i] = a
                elif not z3.is_true(z3.simplify(a == 0)):
                    raise UnsupportedIR(f"{store.buffer.name} at {a}")
            inside = replace(state, names={**state.names, **names})
            for bind in binds:
                inside = self._past(bind, inside)
            return self._value(store.value, inside)

        return {data: element}

    def _put(self, loops: list[ir.For], body: ir.Stmt, state: _State, found: list[Obligation]) -> None:
        """Claim what parallel loops put in a ring."""
        *binds, store = _flat(body)
        if not (isinstance(store, ir.Store) and _puts(store) and all(isinstance(b, ir.Bind) for b in binds)):
            raise UnsupportedIR("a parallel loop that writes more than the ring of received rows")
        holds = state.holds
        names = dict(state.names)
        for loop in loops:
            number, low = self._number(loop.var.name), self._value(loop.start, state)
            holds = (*holds, low <= number, number < low + self._value(loop.extent, state))
            names[loop.var] = number
        inside = replace(state, names=names, holds=holds)
        scale: ir.Var | None = None
        for bind in binds:
            assert isinstance(bind, ir.Bind), "checked before"
            inside = self._past(bind, inside)
            if any(isinstance(n, ir.Load) and n.buffer.name == "x_scale" for n in ir.walk(bind.value)):
                scale = bind.var
        self.seen.add(id(store))
        at = [self._value(i, inside) for i in store.indices]
        if store.buffer.name == _ROWS:
            found += self._row(store, at, self._value(store.value, inside), inside)
        elif scale is None:
            raise UnsupportedIR("a scale that is no name")
        else:
            byte = z3.Int("byte")
            value = self._value(store.value, replace(inside, names={**inside.names, scale: byte}))
            found += self._scale(store, at, inside.names[scale], inside)
            what = "dispatch: what is stored as a scale is a function of its byte alone"
            alone = {str(v) for v in z3.z3util.get_vars(value)} == {"byte"} and not _reads(value)
            found.append(Obligation(what, store.span, (), z3.BoolVal(alone), {"value": show(store.value)}))

    # ------------------------------------------------------------------ what is claimed
    def _row(self, store: ir.Store, at: list[Any], value: Any, state: _State) -> Iterator[Obligation]:
        rank, row, channel = at
        own = row - self._place(state, "slot") * self.config.block_m
        source, token = self._source(own, state)
        wanted = z3.If(source >= 0, _read("x", *token, channel), _read(f"0 of {store.value.dtype}"))
        yield from self._claims(store, rank, own, state, value == wanted, source)
        inside = z3.And(channel >= 0, channel < self.config.hidden)
        yield Obligation("dispatch: a channel is one of the row's", store.span, given(*state.holds), inside)

    def _scale(self, store: ir.Store, at: list[Any], value: Any, state: _State) -> Iterator[Obligation]:
        rank, slot, step, own = at
        source, token = self._source(own, state)
        wanted = z3.If(source >= 0, _read("x_scale", *token, step), z3.IntVal(_ONE))
        yield from self._claims(store, rank, own, state, value == wanted, source)
        yield Obligation(
            "dispatch: a scale's place is its block's",
            store.span,
            given(*state.holds),
            slot == self._place(state, "slot"),
        )

    def _claims(
        self,
        store: ir.Store,
        rank: Any,
        own: Any,
        state: _State,
        goal: z3.BoolRef,
        source: z3.ArithRef,
    ) -> Iterator[Obligation]:
        name, c = store.buffer.name, self.config
        planned = (source >= -1, source < c.num_ranks * c.tokens)
        facts = given(*state.holds, *planned)
        what = f"dispatch: what is put in {name} is of the token that the plan names for that row"
        yield Obligation(what, store.span, facts, goal)
        here = z3.And(rank == self._rank(state), own >= 0, own < c.block_m)
        part = z3.And(own / c.part_rows == self._place(state, "tile"))
        yield Obligation(
            f"dispatch: a row of {name} is one of the part's, of the CTA's rank",
            store.span,
            given(*state.holds, *self._parts(state)),
            z3.And(here, part),
        )
        slot = schedule.x_slot(c.geometry, self._place(state, "block"))
        yield Obligation(
            f"dispatch: the place in {name} is the block's",
            store.span,
            given(*state.holds),
            self._place(state, "slot") == slot,
        )

    def _source(self, own: Any, state: _State) -> tuple[z3.ArithRef, tuple[z3.ArithRef, z3.ArithRef]]:
        """Return what the plan has for a row of the block: the entry, and the rank and token of it."""
        row = self._place(state, "block") * self.config.block_m + own
        source = _read("row_source", self._rank(state), row)
        return source, (source / self.config.tokens, source % self.config.tokens)

    def _parts(self, state: _State) -> tuple[z3.BoolRef, ...]:
        part = self._place(state, "tile")
        return part >= 0, part < self.config.dispatch_parts

    def _rank(self, state: _State) -> z3.ArithRef:
        launched = [v for k, v in state.names.items() if k.name == "bx"]
        if len(launched) != 1:
            raise UnsupportedIR("a launch of another shape")
        return launched[0] / self.config.ctas

    def _place(self, state: _State, name: str) -> Any:
        if name not in state.private:
            raise UnsupportedIR(f"{name} that has not been set")
        return state.private[name]

    # ------------------------------------------------------------------ expressions
    def _value(self, node: ir.Expr, state: _State) -> Any:
        """Return an expression as a term; data are numbers that are only compared."""
        match node:
            case ir.Const(value=value, dtype=dtype):
                if dtype == ir.BOOL:
                    return z3.BoolVal(bool(value))
                if dtype.is_int:
                    return z3.IntVal(int(value))
                return _read(f"{float(value):g} of {dtype}")
            case ir.Var():
                if node not in state.names:
                    raise UnsupportedIR(f"the name {node.name}")
                return state.names[node]
            case ir.Load(buffer=buffer, indices=indices):
                at = tuple(self._value(i, state) for i in indices)
                if buffer.data in state.fragments:
                    return state.fragments[buffer.data](at)
                if buffer.scope in _PRIVATE and buffer.name in state.private and _is_first(indices):
                    return state.private[buffer.name]
                if buffer.scope != "global":
                    raise UnsupportedIR(f"a read of {buffer.name}")
                return _read(buffer.name, *at)
            case ir.Select(cond=cond, a=a, b=b):
                return z3.If(self._value(cond, state), self._value(a, state), self._value(b, state))
            case ir.BinOp(op=op, a=a, b=b) if not a.dtype.is_int:  # rounded: no arithmetic of integers
                if op in COMPARE:
                    raise UnsupportedIR(f"{op} of data in what dispatch computes")
                return _read(f"{op}:{node.dtype}", self._value(a, state), self._value(b, state))
            case ir.BinOp(op=op, a=a, b=b):
                return _operation(op, self._value(a, state), self._value(b, state), b)
            case ir.Cast(a=ir.Const(value=value), dtype=dtype) if not dtype.is_int:
                return _read(f"{float(value):g} of {dtype}")
            case ir.Cast(a=a, dtype=dtype):
                inner = self._value(a, state)
                return inner if _keeps(a.dtype, dtype) else _read(f"cast:{a.dtype}:{dtype}", inner)
            case ir.Call(op=op, args=args) if args and not any(isinstance(a, ir.Str) for a in args):
                return _read(f"{op}:{node.dtype}", *(self._value(a, state) for a in args))
        raise UnsupportedIR(f"{type(node).__name__} in what dispatch computes")


def _keeps(kind: ir.DType, to: ir.DType) -> bool:
    """Return whether a type has every integer of another."""
    if not (kind.is_int and to.is_int):
        return False
    (low, high), (least, greatest) = kind.int_range, to.int_range
    return least <= low and high <= greatest


def _operation(op: str, a: Any, b: Any, divisor: ir.Expr) -> Any:
    if op in ("floordiv", "floormod") and not (isinstance(divisor, ir.Const) and divisor.value > 0):
        raise UnsupportedIR(f"{op} by what is no number")
    if op in ("bitand", "bitor", "bitxor", "shl", "shr"):
        return _read(op, a, b)
    if op not in _OPERATIONS:
        raise UnsupportedIR(f"{op} in what dispatch computes")
    return _OPERATIONS[op](a, b)


_OPERATIONS: Mapping[str, Callable[[Any, Any], Any]] = {**COMPARE, **ARITHMETIC, "and": z3.And, "or": z3.Or}
_TENSORS = ("x", "x_scale", "row_source")


def _read(name: str, *at: Any) -> z3.ArithRef:
    """Return an unknown function's value; of nothing, a constant of that name."""
    integer = z3.IntSort()
    return z3.Function(name, *[integer] * len(at), integer)(*at) if at else z3.Int(name)


def _reads(term: z3.ExprRef) -> bool:
    """Return whether a term reads a tensor."""
    todo = [term]
    while todo:
        inner = todo.pop()
        if z3.is_app(inner) and inner.decl().name() in _TENSORS:
            return True
        todo += inner.children()
    return False


def _puts(node: object) -> bool:
    return isinstance(node, ir.Store) and node.buffer.name in (_ROWS, _SCALES)


def _is_first(indices: tuple[ir.Expr, ...]) -> bool:
    return len(indices) == 1 and _constant(indices[0]) == 0


def _constant(node: ir.Expr) -> int | None:
    return int(node.value) if isinstance(node, ir.Const) else None


def _parallel(node: ir.For) -> tuple[list[ir.For], ir.Stmt]:
    """Return parallel loops, outermost first, and what is in them."""
    loops, body = [node], node.body
    while isinstance(body, ir.For) and body.kind == "parallel":
        loops.append(body)
        body = body.body
    return loops, body


def _is_whole(loops: list[ir.For], store: ir.Store) -> bool:
    """Return whether parallel loops store every element of a buffer, each at the loops' own numbers."""
    sizes: dict[ir.Expr, int | None] = {x.var: _constant(x.extent) for x in loops}
    named = [i for i in store.indices if i in sizes]
    of_one = all(sizes[x.var] == 1 for x in loops if x.var not in named)
    if any(_constant(x.start) != 0 for x in loops) or not of_one or len({*named}) != len(named):
        return False
    return all(
        _constant(extent) == sizes[i] if i in sizes else (_constant(extent), _constant(i)) == (1, 0)
        for i, extent in zip(store.indices, store.buffer.shape, strict=True)
    )


def _flat(stmt: ir.Stmt) -> list[ir.Stmt]:
    if isinstance(stmt, ir.Seq):
        return [leaf for inner in stmt.stmts for leaf in _flat(inner)]
    return [stmt]
