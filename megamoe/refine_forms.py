"""One level of the fused kernel in the words that the verifier's refinement check knows.

Refinement compares statements that store. Each rule here keeps what a level computes, and what it says of
the rest (who waits for what, which word is added to) becomes a store to a word of each thread's own, a
*note*, which nothing else reads: so both levels have to say the same there, at the same place in their
order, under the same condition.

| What | Becomes |
|---|---|
| `while c: body` | any number of rounds of `if c: body`: rounds from equal states are compared |
| a loop of computed length | a note of the length, and rounds of `if counter < length: body` |
| a loop of one round at the most (proved) | an If |
| an atomic read | a note of the word that is read; what follows reads the note |
| an atomic update | notes of the word that it finds and of its operand, added up: twice is not once |
| an atomic store | a store of a value that names the order and the scope |
| a wait | a note: which barrier, which phase |
| an arrival, a grid barrier | a note that is one more: twice is not once |
| a choice between integers | a note under each condition; in a copy's coordinates, arithmetic |
| a sum divided by a number, in a thread's own word | one form of all equal ones (`divided_sum`, proved) |
| a read that the device guards (0 outside) | in an index: the read, and a note under the guard |
| `stmatrix` | its stores: a thread's halves, at places that other threads of its warp name |

A guard of the device is left out of an index only where the note under it says that the tile program's
index is inside the tensor under the same condition: what is outside reads as 0 on both levels.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from megamoe.refine_index import (
    MANY,
    divided_once,
    divided_sum,
    is_choice,
    is_guarded_read,
    is_zero,
    most,
    number,
    one_round,
    one_vector,
    op,
    undivided,
)
from megamoe.refine_leaves import changes
from megamoe.refine_moves import choice_is_kept, chosen_number
from megamoe.refine_words import (
    SIGHT,
    Conds,
    given,
    inner,
    inside,
    is_guarded_so,
    line,
    mapped,
    matrices,
    orders,
    parted,
    pointed,
    seq,
    unguarded,
)
from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.inline import loads, same, written
from verify.solve import Obligation

_LATER = 50  # of those, the first of what is read
_SLOTS = 8  # of a note: reads of one kind in a statement
_WARP = 32
_THREAD = "threadIdx.x"
_INDEX_TYPES = ("int32", "int64")


@dataclass(frozen=True)
class Read:
    """Reads of a tensor on a line of the source."""

    tensor: str
    line: int


@dataclass
class Shared:
    """What both levels have to know of each other.

    Attributes:
        guarded: reads in indices that the device guards.
        parallel: lines that bind names in the tile program's parallel loops.
        choices: names of choices between integers, with their lines, that both levels have.
    """

    guarded: set[Read] = field(default_factory=set)
    parallel: set[int] = field(default_factory=set)
    choices: set[tuple[str, int]] = field(default_factory=set)


class Forms:
    """Rewrites one level.

    Attributes:
        notes: buffers that it has added, by name.
        obligations: what its rules rest on.
    """

    def __init__(
        self, shared: Shared, tensors: Mapping[ir.Var, ir.Buffer], private: frozenset[str], *, device: bool
    ) -> None:
        """Take what is known of the kernel.

        Args:
            shared: see there.
            tensors: the tile program's, by this level's storage.
            private: names of what each thread has of its own.
            device: whether it is the device's level.
        """
        self.shared, self.tensors, self.private, self.device = shared, tensors, private, device
        self.notes: dict[str, ir.Buffer] = {}
        self.obligations: list[Obligation] = []
        self._env: dict[ir.Var, ir.Expr] = {}
        self._clear: dict[ir.Var, ir.Expr] = {}  # names without guards, for indices
        self._bound: dict[ir.Var, ir.Expr] = {}
        self._bools: dict[ir.Var, ir.Expr] = {}  # conditions that the compiler has named before an If
        self._choosing: dict[ir.Var, ir.Expr] = {}  # names of sums with a choice, of a thread's own words
        self._ranges: dict[ir.Var, tuple[int, int]] = {}
        self._noted: dict[int, tuple[ir.Store, Conds, Conds]] = {}  # reads: note, what is around, guards
        self._thread: ir.Var | None = None
        self._loops: list[str] = []
        self._counted = 0  # loops of computed length around
        self._asked = 0  # conditions around whose operands are written under them
        self._parallel: list[ir.For] = []
        self._before_parallel: list[ir.Stmt] = []
        self._around: list[ir.Span | None] = []
        self._last: ir.Span | None = None

    # ------------------------------------------------------------------ notes
    def note(self, name: str, dtype: ir.DType, size: int = _SLOTS) -> ir.Buffer:
        """Return a word, or some, of each thread's own."""
        return self._added(name, dtype, (size,), "local")

    def _added(self, name: str, dtype: ir.DType, shape: tuple[int, ...], scope: str) -> ir.Buffer:
        if name not in self.notes:
            zero, data = number(0), ir.Var(ir.HANDLE, name)
            self.notes[name] = ir.Buffer(name, dtype, tuple(map(number, shape)), (), scope, data, zero)
        return self.notes[name]

    def _sight(self, tensor: ir.Buffer) -> ir.Buffer:
        """Return a tensor of notes: threads share the reads of a parallel loop."""
        shape = [int(e.value) for e in tensor.shape if isinstance(e, ir.Const)]
        total = 1
        for extent in shape:
            total *= extent
        return self._added(
            f"{SIGHT}{tensor.name}", tensor.dtype, (total,) if self.device else tuple(shape), "global"
        )

    def _ahead(
        self, name: str, value: ir.Expr, before: list[ir.Stmt], span: ir.Span | None, at: int = 0
    ) -> ir.Load:
        """Note a value before a statement, and return the read of the note."""
        place = ir.Load(value.dtype, self.note(name, value.dtype), (number(at),))
        before += self._chosen(place, value, (), line(span, _LATER + at if at else 0), before)
        return place

    def _chosen(
        self,
        place: ir.Load,
        value: ir.Expr,
        path: Conds,
        span: ir.Span | None,
        before: list[ir.Stmt],
        count: int = 0,
    ) -> list[ir.Stmt]:
        """Return stores of what is chosen, each under its condition and on a line of its own."""
        if not isinstance(value, ir.Select) or not is_choice(value) or not value.dtype.is_int:
            return [given(path, ir.Store(line(span, count), place.buffer, place.indices, value))]
        cond = self._spot(value.cond, before, span)
        found = self._chosen(place, value.a, (*path, cond), span, before, count)
        rest = (*path, ir.Not(ir.BOOL, cond))
        return found + self._chosen(place, value.b, rest, span, before, count + len(found))

    # ------------------------------------------------------------------ expressions
    def _plain(self, expr: ir.Expr) -> ir.Expr:
        """Return a value with names replaced; in its indices as `_place` does."""

        def visit(e: ir.Expr) -> ir.Expr | None:
            match e:
                case ir.Var():
                    return self._env.get(e)
                case ir.Load(indices=indices) if self._clear:
                    return replace(e, indices=tuple(map(self._place, indices)))
                case ir.AccessPtr(offset=offset) if self._clear:
                    return replace(e, offset=self._place(offset))
                case ir.Select(cond=cond, a=a, b=b) if is_zero(b) and is_guarded_read(a):
                    return replace(e, cond=self._place(cond), a=self._plain(a))
                case ir.Select(cond=cond, a=a, b=ir.Const()) if e.dtype.is_int and is_guarded_read(a):
                    # The sum of two halves, of which one is 0.
                    zero = ir.Const(e.dtype, 0)
                    read = replace(e, cond=self._place(cond), a=self._plain(a), b=zero)
                    other = replace(e, cond=ir.Not(ir.BOOL, self._plain(cond)), a=e.b, b=zero)
                    return op("add", read, other)
            return None

        return mapped(expr, visit)

    def _place(self, expr: ir.Expr) -> ir.Expr:
        """Return an index with names replaced, by what has no guards."""
        names = {**self._env, **self._clear}
        return mapped(expr, lambda e: names.get(e) if isinstance(e, ir.Var) else None)

    def _value(self, expr: ir.Expr, before: list[ir.Stmt], span: ir.Span | None) -> ir.Expr:
        """Return a value whose atomic reads have been noted."""
        return self._polled(self._plain(expr), before, span)

    def _test(self, expr: ir.Expr, before: list[ir.Stmt], span: ir.Span | None) -> ir.Expr:
        """Return a condition as an index, after its atomic reads."""
        expr = self._unbound(self._place(self._plain(expr)), span)
        expr = self._polled(expr, before, span)
        return self._index(mapped(expr, undivided), before, span)

    def _polled(self, expr: ir.Expr, before: list[ir.Stmt], span: ir.Span | None) -> ir.Expr:
        count = 0

        def visit(e: ir.Expr) -> ir.Expr | None:
            nonlocal count
            test, call = unguarded(e)
            if not isinstance(call, ir.Call) or call.op != "atomic_load_elem_op":
                return None
            pointer, *how = call.args
            found, _ = self._found(pointed(pointer), test, before, span)
            count += 1
            name = "_".join(["read", found.dtype.name, *orders(how)])
            return self._ahead(name, found, before, span, count - 1)

        return mapped(expr, visit)

    def _spot(self, expr: ir.Expr, before: list[ir.Stmt], span: ir.Span | None) -> ir.Expr:
        """Return a part of an address, or a condition on one, as an index."""
        expr = self._unbound(self._place(expr), span)
        return self._index(mapped(expr, undivided), before, span)

    def _index(
        self,
        expr: ir.Expr,
        before: list[ir.Stmt],
        span: ir.Span | None,
        path: Conds = (),
        *,
        keep_choices: bool = False,
    ) -> ir.Expr:
        """Return an index: its choices made before, the guards of its reads noted before."""
        count = _SLOTS // 2

        def visit(e: ir.Expr) -> ir.Expr | None:
            nonlocal count
            if e.dtype.name not in _INDEX_TYPES:
                return None
            found = self._guarded(e)
            if found is not None:
                load, test = found
                self._touch(load, test, path, before, span)
                return load if load.dtype == e.dtype else ir.Cast(e.dtype, load)
            if isinstance(e, ir.Select) and e.dtype == ir.INT32 and not keep_choices:
                count += 1
                return self._ahead("chosen", e, before, span, count - 1)
            return None

        match expr:
            case ir.BinOp(op="and", a=a, b=b):
                a = self._index(a, before, span, path, keep_choices=keep_choices)
                b = self._index(b, before, span, (*path, a), keep_choices=keep_choices)
                return replace(expr, a=a, b=b)
        return mapped(expr, visit)

    def _guarded(self, expr: ir.Expr) -> tuple[ir.Load, Conds] | None:
        """Return a read of a tensor in an index and the device's conditions on it."""
        test, read = unguarded(expr)
        if isinstance(read, ir.Cast) and read.dtype.name == "int64" and test:  # of the index, which is wider
            read = read.a
        if isinstance(read, ir.Load) and read.buffer.data in self.tensors and read.dtype.lanes == 1:
            return read, test
        return None

    def _touch(
        self, load: ir.Load, test: Conds, path: Conds, before: list[ir.Stmt], span: ir.Span | None
    ) -> None:
        """Note what a read in an index finds, under the condition that it is made under."""
        tensor = self.tensors[load.buffer.data]
        read = Read(tensor.name, span.line if span else 0)
        if self.device and test:
            self.shared.guarded.add(read)
        if read not in self.shared.guarded:
            return
        if not self.device:
            test = inside(load)
        if read.line in self.shared.parallel:
            store: ir.Stmt = ir.Store(span, self._sight(tensor), load.indices, load)
            store = given((*path, *test), store) if self.device else store
        else:
            note = self.note(f"touch_{tensor.name}", tensor.dtype)
            others = [s for s in map(inner, before) if isinstance(s, ir.Store) and s.buffer is note]
            for other in others:
                if same(other.value, load):  # without a guard it is inside wherever it is made (`bounds`)
                    if self.device and test and not is_guarded_so(path, test, *self._noted[id(other)][1:]):
                        raise UnsupportedIR(f"reads of {tensor.name} in one statement under other guards")
                    return
            at = len(others)
            own = ir.Store(line(span, at), note, (number(at),), load)
            self._noted[id(own)], store = (own, path, test), given((*path, *test), own)
        for loop in reversed(self._parallel):
            if any(e is loop.var for i in load.indices for e in ir.walk(i)):
                store = replace(loop, body=store)
        before.append(store)

    def _unbound(self, expr: ir.Expr, span: ir.Span | None) -> ir.Expr:
        """Return the tile program's index with names replaced by the reads that the device has for them."""
        if self.device:
            return expr

        def visit(e: ir.Expr) -> ir.Expr | None:
            value = self._bound.get(e) if isinstance(e, ir.Var) else None
            reads = [x for x in ir.walk(value) if isinstance(x, ir.Load) and x.buffer.data in self.tensors]
            here = {Read(self.tensors[x.buffer.data].name, span.line if span else 0) for x in reads}
            return value if here & self.shared.guarded else None

        return mapped(expr, visit)

    def _forget(self, storages: set[ir.Var], *names: dict[ir.Var, ir.Expr]) -> None:
        for known in names or (self._bound, self._bools, self._choosing):
            for var, value in list(known.items()):
                if any(load.buffer.data in storages for load in loads(value)):
                    del known[var]

    # ------------------------------------------------------------------ atomic operations
    def _found(
        self, read: ir.Load, test: Conds, before: list[ir.Stmt], span: ir.Span | None
    ) -> tuple[ir.Expr, Conds]:
        """Return what an atomic operation finds, 0 where it is not made, and when it is made."""
        read = replace(read, indices=tuple(self._spot(i, before, span) for i in read.indices))
        test = tuple(self._spot(cond, before, span) for cond in test)
        found: ir.Expr = read
        for cond in reversed(test):
            found = ir.Select(read.dtype, cond, found, ir.Const(read.dtype, 0), lazy=True)
        return found, test if self.device else inside(read)

    def _update(self, call: ir.Call, test: Conds, span: ir.Span | None) -> Iterator[ir.Stmt]:
        before: list[ir.Stmt] = []
        pointer, operand, *how = call.args
        read = pointed(pointer)
        tensor = self.tensors[read.buffer.data]
        found, test = self._found(read, test, before, span)
        self._ahead(f"found_{found.dtype.name}", found, before, span)
        if isinstance(operand, ir.Select):
            operand = self._ahead(f"operand_{operand.dtype.name}", operand, before, span)
        note = self.note("_".join([call.op, *orders(how), tensor.name]), read.dtype, 1)
        total = op("add", ir.Load(read.dtype, note, (number(0),)), operand)
        yield from before
        yield given(test, ir.Store(span, note, (number(0),), total))

    # ------------------------------------------------------------------ statements
    def body(self, stmt: ir.Stmt) -> ir.Stmt:
        """Return a statement in these words.

        Raises:
            UnsupportedIR: there is no rule for something in it.
        """
        return seq(list(self._stmt(stmt)))

    def _stmt(self, stmt: ir.Stmt) -> Iterator[ir.Stmt]:
        if isinstance(stmt, ir.Store) and (stmt.span is None or stmt.span in self._around):
            stmt = replace(stmt, span=self._last)  # one that has lost its line has that of the last name
        if isinstance(stmt, (ir.Store, ir.Bind)):
            self._last = stmt.span
        if isinstance(stmt, (ir.Store, ir.For, ir.While)):
            self._forget(written(stmt))
        elif isinstance(stmt, ir.Eval):
            self._forget(written(stmt), self._choosing)
        before: list[ir.Stmt] = []
        match stmt:
            case ir.Seq(stmts=stmts):
                for inner in stmts:
                    yield from self._stmt(inner)
            case ir.Launch(var=var, tag=tag, extent=extent, body=body):
                if isinstance(extent, ir.Const):
                    self._ranges[var] = (0, int(extent.value))
                self._thread = var if tag == _THREAD else self._thread
                yield replace(stmt, body=self.body(body))
            case ir.Block() | ir.Attr() | ir.Assume():
                yield replace(stmt, body=self.body(stmt.body))
            case ir.While(cond=cond, body=body):
                test = self._test(cond, before, stmt.span)
                rounds = seq([*before, ir.If(stmt.span, test, self.body(body), None)])
                counter = ir.Var(ir.INT32, "round")
                yield ir.For(stmt.span, counter, number(0), number(MANY), "serial", rounds, {})
            case ir.If():
                yield from self._if(stmt)
            case ir.For(kind="parallel" | "vectorized"):
                yield from self._together(stmt)
            case ir.For():
                self._around += [stmt.span] * (stmt.kind == "serial")
                yield from self._loop(stmt)
                self._around = self._around[: -1 if stmt.kind == "serial" else None]
            case ir.Bind():
                yield from self._bind(stmt)
            case ir.Store():
                yield from self._store(stmt)
            case ir.Eval(value=ir.Call() as call):
                yield from self._call(stmt, call)
            case ir.Eval(value=ir.Const()):  # what is left of an empty branch
                return
            case ir.Alloc() | ir.Decl():
                yield stmt
            case _:
                raise UnsupportedIR(f"{type(stmt).__name__} in the fused kernel")

    def _if(self, stmt: ir.If) -> Iterator[ir.Stmt]:
        before: list[ir.Stmt] = []
        cond = self._bools.get(stmt.cond, stmt.cond) if isinstance(stmt.cond, ir.Var) else stmt.cond
        test = self._test(cond, before, stmt.span)
        late = changes(test, stmt.then, stmt.orelse)
        if late:
            test = self._before(test, before, stmt.span)
        self._asked += late
        then = self.body(stmt.then)
        orelse = None if stmt.orelse is None else self.body(stmt.orelse)
        self._asked -= late
        if self._parallel and before:
            raise UnsupportedIR("a condition with notes in a parallel loop")
        yield from before
        yield replace(stmt, cond=test, then=then, orelse=orelse)

    def _before(self, cond: ir.Expr, before: list[ir.Stmt], span: ir.Span | None) -> ir.Expr:
        """Return a condition on what its operands are before anything under it is done."""
        if not isinstance(cond, ir.BinOp) or cond.a.dtype != ir.INT32:
            raise UnsupportedIR("a condition whose operands are written under it")
        name = f"asked{self._asked}"
        a, b = (self._ahead(name, x, before, span, at) for at, x in enumerate((cond.a, cond.b)))
        return replace(cond, a=a, b=b)

    def _together(self, loop: ir.For) -> Iterator[ir.Stmt]:
        """A loop that threads share: what is noted of its reads is noted before it."""
        outermost = not self._parallel
        self._parallel.append(loop)
        body = self.body(loop.body)
        self._parallel.pop()
        if outermost:
            yield from self._before_parallel
            self._before_parallel = []
        yield replace(loop, start=self._plain(loop.start), extent=self._plain(loop.extent), body=body)

    def _loop(self, loop: ir.For) -> Iterator[ir.Stmt]:
        before: list[ir.Stmt] = []
        start, extent = self._plain(loop.start), self._plain(loop.extent)
        fixed = isinstance(extent, ir.Const)
        single = None if fixed else one_round(replace(loop, extent=extent), self._ranges)
        if single is not None:
            self.obligations.append(single)
            self._env[loop.var] = start
            yield ir.If(loop.span, op("lt", number(0), extent), self.body(loop.body), None)
            return
        whole = one_vector(loop) if self.device else None
        if whole is not None and whole.buffer.data.name not in self.private:
            yield from self._stmt(whole)
            return
        var = loop.var
        if var.name == "_":  # no name for a solver
            var = self._env[loop.var] = ir.Var(var.dtype, "unnamed")
        if var.name in self._loops:
            var = ir.Var(var.dtype, f"{var.name}.{self._loops.count(var.name)}")
            self._env[loop.var] = var
        self._loops.append(var.name)
        if self._is_known(extent):
            found = list(self._stmt(loop.body))
            for part in parted(found) if self.device and loop.kind == "unrolled" else [found]:
                yield replace(loop, var=var, start=start, extent=extent, body=seq(part))
        else:
            if not is_zero(start):
                raise UnsupportedIR("a loop of computed length that does not start at 0")
            value = self._value(loop.extent, before, loop.span)
            count = self._ahead(f"rounds{self._counted}", value, before, loop.span)
            self._counted += 1
            inner = ir.If(loop.span, op("lt", var, count), self.body(loop.body), None)
            self._counted -= 1
            yield from before
            yield replace(loop, var=var, start=start, extent=number(most(extent)), body=inner)
        self._loops.pop()

    def _is_known(self, extent: ir.Expr) -> bool:
        """Return whether a loop's length is one of launch variables other than the thread."""
        parts = list(ir.walk(extent))
        known = all(e in self._ranges and e is not self._thread for e in parts if isinstance(e, ir.Var))
        return known and not any(isinstance(e, (ir.Load, ir.Select)) for e in parts)

    def _bind(self, stmt: ir.Bind) -> Iterator[ir.Stmt]:
        before: list[ir.Stmt] = []
        value = self._plain(stmt.value)
        match value:
            case ir.Call(op="shfl_sync", args=(_, ir.Var() as var, ir.Const(value=0), ir.Const(value=32))):
                warp = op("floordiv", var, number(_WARP))  # the thread that lane 0 is
                yield replace(stmt, value=op("mul", warp, number(_WARP)))
                return
        if value.dtype == ir.BOOL:
            self._bools[stmt.var] = stmt.value
            return
        key = stmt.var.name, stmt.span.line if stmt.span else 0
        if is_choice(value) and key in self.shared.choices and not self._parallel:
            place = self._ahead(f"name_{stmt.var.name}", value, before, stmt.span)
            for var, other in list(self._env.items()):  # the note is another's now
                if isinstance(other, ir.Load) and other.buffer is place.buffer:
                    del self._env[var]
            self._env[stmt.var] = place
            yield from before
            return
        words = {load.buffer.data.name for load in loads(value)}
        if words <= self.private and any(isinstance(e, ir.Select) for e in ir.walk(value)):
            self._choosing[stmt.var] = value
        if value.dtype == ir.INT32:
            clear = self._index(value, before, stmt.span, keep_choices=True)
            if self.device and before:
                self._clear[stmt.var] = var = ir.Var(stmt.var.dtype, f"{stmt.var.name}, not guarded")
                before.append(ir.Bind(stmt.span, var, self._place(clear)))
        if self._parallel:
            self._before_parallel += before
        else:
            yield from before
            if not self.device and not before:
                self._bound[stmt.var] = value
        yield replace(stmt, value=value)

    def _store(self, stmt: ir.Store) -> Iterator[ir.Stmt]:
        before: list[ir.Stmt] = []
        indices = tuple(self._place(i) for i in stmt.indices)
        test, call = unguarded(self._plain(stmt.value))
        if isinstance(call, ir.Call) and call.op == "atomic_add_ret_elem_op":
            yield from self._update(call, test, stmt.span)
            found = self.note(f"found_{call.dtype.name}", call.dtype)
            yield replace(stmt, indices=indices, value=ir.Load(call.dtype, found, (number(0),)))
            return
        value = self._value(stmt.value, before, stmt.span)
        own = stmt.buffer.data.name in self.private and not self._parallel
        if own and value.dtype == ir.INT32:
            divided = divided_sum(value, stmt.span)
            if divided is not None:
                value, kept = divided
                self.obligations.append(kept)
        if own and is_choice(value) and value.dtype == ir.INT32:
            value = self._ahead("picked", value, before, stmt.span)
        if before and self._parallel:
            raise UnsupportedIR("a value with notes in a parallel loop")
        yield from before
        yield replace(stmt, indices=indices, value=value)

    def _call(self, stmt: ir.Eval, call: ir.Call) -> Iterator[ir.Stmt]:
        placed = self._place(call)
        assert isinstance(placed, ir.Call), "names are replaced inside it"
        call = placed
        match call.op:
            case "sync_grid":
                yield _counted(stmt.span, self.note("grid_syncs", ir.INT32), (number(0),))
            case "mbarrier_wait_parity" | "ptx_arrive_barrier":
                barrier, *how = call.args
                if not isinstance(barrier, ir.Load) or len(how) > 1:
                    raise UnsupportedIR(f"{call.op} of another form")
                (slots,) = barrier.buffer.shape
                assert isinstance(slots, ir.Const), "a kernel's barriers are counted"
                note = self.note(f"{call.op}_{barrier.buffer.data.name}", ir.INT32, int(slots.value))
                if how:
                    yield ir.Store(stmt.span, note, barrier.indices, mapped(how[0], divided_once))
                else:
                    yield _counted(stmt.span, note, barrier.indices)
            case "ptx_stmatrix":
                assert self._thread is not None, "threads are launched around it"
                yield from matrices(stmt, call, self._thread)
            case "atomic_store_elem_op":
                place = pointed(call.args[0])
                value = ir.Call(place.dtype, "stored_atomically", tuple(call.args[1:]))
                yield ir.Store(stmt.span, place.buffer, place.indices, value)
            case "atomic_max_elem_op":
                yield from self._update(call, (), stmt.span)
            case "tma_load" | "tma_copy":
                yield replace(stmt, value=self._coordinates(call, stmt.span))
            case _:
                yield replace(stmt, value=call)

    def _coordinates(self, call: ir.Call, span: ir.Span | None) -> ir.Expr:
        """Return a copy without choices in its coordinates."""

        def visit(e: ir.Expr) -> ir.Expr | None:
            if isinstance(e, ir.Var) and e in self._choosing:
                return mapped(self._choosing[e], visit)
            found = chosen_number(e)
            if found is not None:
                self.obligations.append(choice_is_kept(e, found, span))
            return found

        return mapped(call, visit)


def _counted(span: ir.Span | None, note: ir.Buffer, indices: tuple[ir.Expr, ...]) -> ir.Store:
    """Return a note that something happens once more."""
    return ir.Store(span, note, indices, op("add", ir.Load(note.dtype, note, indices), number(1)))
