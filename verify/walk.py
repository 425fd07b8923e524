"""Visit every statement and expression of a function with what holds where it is evaluated."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import z3

from verify import externs, induction, ir, ops
from verify.contents import contents
from verify.encode import Encoder, Hypothesis, Index, Scope, Version, constants_of, is_exact, untracked
from verify.quotients import bounds_of_quotients
from verify.ranges import Range
from verify.text import show

# Calls after which other threads' writes to shared or global memory may be seen.
SYNC_OPS = frozenset(
    {
        "tvm_storage_sync",
        "mbarrier_wait_parity",
        "ptx_wait_barrier",
        "ptx_wait_group",
        "tma_store_wait",
        "warpgroup_wait",
        "wait_wgmma",
        "sync_grid",
        "sync_warp",
        "cluster_sync",
        "cluster_wait",
        "pdl_sync",
        "syncthreads_count",
        "syncthreads_and",
        "syncthreads_or",
    }
)
_PRIVATE_SCOPES = ("local",)


@dataclass(frozen=True)
class Site:
    """One node and the scope in which it is evaluated.

    Attributes:
        statement: the innermost statement around it (itself, for a statement).
        path: the statements around that, outermost first.
    """

    node: ir.Stmt | ir.Expr
    scope: Scope
    span: ir.Span | None
    statement: ir.Stmt
    path: tuple[ir.Stmt, ...]


def walk(function: ir.Function, encoder: Encoder, hypotheses: Sequence[Hypothesis]) -> list[Site]:
    """Return every site of `function` in program order, under `hypotheses`.

    Raises:
        UnsupportedIR: a loop bound, launch extent or guard cannot be encoded.
    """
    walker = _Walker(encoder, function)
    # Of the device IR all names are known; earlier stages leave shape parameters free.
    scope = Scope(closed=not function.buffers).assuming(*hypotheses)
    for param in function.params:
        if param.dtype.is_int:
            scope = scope.bind(param, encoder.dim(param.name))
    return list(walker.stmt(function.body, scope, (), None))


def holds_one(buffer: ir.Buffer) -> bool:
    """Return whether `buffer` is a private variable: one element of a thread's own."""
    return buffer.scope.startswith(_PRIVATE_SCOPES) and all(show(extent) == "1" for extent in buffer.shape)


def has_access(expr: ir.Expr) -> bool:
    """Return whether evaluating `expr` may touch memory."""
    return any(isinstance(n, (ir.Load, ir.AccessPtr, ir.Region)) for n in ir.walk(expr))


class _Walker:
    def __init__(self, encoder: Encoder, function: ir.Function) -> None:
        self.encoder = encoder
        self.scopes: dict[ir.Var, str] = {}
        self.after = Scope()  # what the last statement left
        self.launched: dict[str, Index] = {}
        self.single: dict[ir.Var, ir.Buffer] = {}  # private integers of one element
        self.number = 0
        self.counters = induction.Counters(encoder)
        for node in ir.walk(function.body):
            if isinstance(node, ir.Store) and holds_one(node.buffer) and node.buffer.dtype.is_int:
                self.single.setdefault(node.buffer.data, node.buffer)
            match node:
                case ir.Alloc(buffer=buffer) | ir.Decl(buffer=buffer) | ir.Load(buffer=buffer):
                    self.scopes.setdefault(buffer.data, buffer.scope)
                case ir.Store(buffer=buffer) | ir.Region(buffer=buffer):
                    self.scopes.setdefault(buffer.data, buffer.scope)
        encoder.readonly |= self._readonly(function)
        if not function.buffers:  # device IR
            encoder.held |= contents(function, self._element)

    def _readonly(self, function: ir.Function) -> set[ir.Var]:
        """Return the tensors that the function only reads: equal reads give equal values."""
        if any(isinstance(n, ir.Call) and n.op == "tma_store" for n in ir.walk(function.body)):
            return set()  # which tensor a descriptor writes is not known here
        written, _ = _effects(function.body, self.scopes)
        owned = {*function.params, *(b.data for b in function.buffers.values())}
        return {v for v in owned if v not in written}

    def _element(self, load: ir.Load) -> Range:
        """Return where an element of a tensor lies by the contract, if the function only reads it."""
        data = load.buffer.data
        if data not in self.encoder.readonly or data.name not in self.encoder.promised:
            return Range()
        promised, clauses = self.encoder.promised[data.name]
        self.encoder.relied |= clauses
        return promised

    # ------------------------------------------------------------------ statements
    def stmt(
        self, node: ir.Stmt, scope: Scope, path: tuple[ir.Stmt, ...], span: ir.Span | None
    ) -> Iterator[Site]:
        """Yield the sites of `node`; the scope after it is left in `self.after`."""
        span = node.span or span
        at = _At(node, path, span)
        if not isinstance(node, ir.Seq):
            yield Site(node, scope, span, node, path)
        self.after = scope
        match node:
            case ir.Seq(stmts=stmts):
                inner = scope
                for child in stmts:
                    yield from self.stmt(child, inner, path, span)
                    inner = self.after
                self.after = inner
            case ir.Launch():
                yield from self.expr(node.extent, scope, at)
                inner = self._launch(node, scope)
                yield from self.stmt(node.body, inner, (*path, node), span)
                # Device IR nests the whole kernel in its launches: nothing follows them.
                self.after = replace(self.after, hypotheses=scope.hypotheses, indices=scope.indices)
            case ir.For():
                yield from self._loop(node, scope, at)
            case ir.While():
                yield from self._while(node, scope, at)
            case ir.If():
                yield from self._if(node, scope, at)
            case ir.Store(buffer=buffer, indices=indices, value=value):
                for index in indices:
                    yield from self.expr(index, scope, at)
                yield from self.expr(value, scope, at)
                written, synced = self._atomics(value)
                self.after = self._written(scope, {buffer.data} | written, synced)
                if holds_one(buffer) and value.dtype.is_int and value.dtype == buffer.dtype:
                    version = replace(self.after.versions[buffer.data], value=self.encoder.term(value, scope))
                    self.after = replace(self.after, versions={**self.after.versions, buffer.data: version})
            case ir.Bind(var=var, value=value):
                yield from self.expr(value, scope, at)
                if var.dtype.is_int and value.dtype.is_int and value.dtype.lanes == 1:
                    self.after = scope.bind(var, self.encoder.term(value, scope))
                if any(effects := self._atomics(value)):
                    self.after = self._written(self.after, *effects)
            case ir.Eval(value=value):
                yield from self.expr(value, scope, at)
                written, synced = _effects(node, self.scopes)
                self.after = self._written(scope, written, synced)
            case ir.Assume(cond=cond, body=body):
                yield from self.expr(cond, scope, at)
                term = self.encoder.boolean(cond, scope)
                inner = scope.assuming(Hypothesis(f"assume {show(cond)}", "assume", term))
                yield from self.stmt(body, inner, (*path, node), span)
                self.after = replace(self.after, hypotheses=scope.hypotheses)
            case ir.Attr(body=body) | ir.Block(body=body):
                yield from self.stmt(body, scope, (*path, node), span)
            case ir.Assert(cond=cond):
                yield from self.expr(cond, scope, at)
            case ir.Alloc() | ir.Decl():
                return
            case _:
                raise ir.UnsupportedIR(f"statement {type(node).__name__}")

    def _launch(self, node: ir.Launch, scope: Scope) -> Scope:
        extent = self.encoder.term(node.extent, scope)
        index = self.launched.get(node.tag)
        if index is None:
            const = self.encoder.constant(node.var.name)
            index = Index(node.var, const, z3.IntVal(0), extent, node.tag)
            self.launched[node.tag] = index
            self._limit(index)
        label = f"{node.tag} {node.var.name} < {show(node.extent)}"
        ranged = Hypothesis(label, "launch", z3.And(index.const >= 0, index.const < extent))
        implied = bounds_of_quotients(node, index.const, extent)
        scope = scope.bind(node.var, index.const).assuming(ranged, *implied)
        return replace(scope, indices=(*scope.indices, index))

    def _loop(self, node: ir.For, scope: Scope, at: "_At") -> Iterator[Site]:
        yield from self.expr(node.start, scope, at)
        yield from self.expr(node.extent, scope, at)
        start, extent = self.encoder.term(node.start, scope), self.encoder.term(node.extent, scope)
        const = self.encoder.constant(node.var.name)
        index = Index(node.var, const, start, extent, "loop")
        self._limit(index)
        label = f"for {node.var.name} in [{show(node.start)}, +{show(node.extent)})"
        ranged = Hypothesis(label, "loop", z3.And(const >= start, const < start + extent))
        inner = replace(scope.bind(node.var, const).assuming(ranged), indices=(*scope.indices, index))
        written, synced = _effects(node.body, self.scopes)
        if not self._has_fixed_ends(node, scope, written, synced):
            length = f"{node.var.name}: {show(node.extent)}"
            raise ir.UnsupportedIR(f"loop whose length may change while it runs, {length}")
        inner = self._written(inner, written, synced)
        counters = self._counters(scope, written)
        begin = {v: self.counters.within_round(node, index, inner, t, v) for v, t in counters}
        yield from self.stmt(node.body, _holding(inner, begin), (*at.path, node), at.span)
        after = self._written(scope, written, synced)
        end = {v: self.counters.after_loop(node, inner, t, v) for v, t in counters}
        self.after = _holding(after, end)

    def _has_fixed_ends(self, loop: ir.For, scope: Scope, written: set[ir.Var], synced: bool) -> bool:
        """Return whether the ends of `loop` are the same in each round; compiled, it reads them in each."""
        ends = (loop.start, loop.extent)
        loads = [n for end in ends for n in ir.walk(end) if isinstance(n, ir.Load)]
        if not loads and not any(map(has_access, ends)):
            return True
        handed, _ = _effects(loop.body, self.scopes, has_stores=False)
        read = {n.buffer.data for n in loads}
        stores = [n for n in ir.walk(loop.body) if isinstance(n, ir.Store) and n.buffer.data in read]
        met = {s.buffer.data for s in stores for n in loads if not _are_apart(s, n)}
        later = self._written(scope, written - (read - met - handed), synced)
        return all(z3.eq(self.encoder.term(end, scope), self.encoder.term(end, later)) for end in ends)

    def _counters(self, scope: Scope, written: set[ir.Var]) -> list[tuple[ir.Var, z3.ArithRef]]:
        """Return the private integers in `written` of which `scope` knows what they hold."""
        known = [(v, scope.versions[v].value) for v in written if v in scope.versions]
        return [(v, term) for v, term in sorted(known, key=lambda k: k[0].name) if z3.is_int(term)]

    def _limit(self, index: Index) -> None:
        """Remember where a launch index or a loop counter lies, as arithmetic on data may depend on it."""
        low = self.encoder.range_of(index.start).low
        high = self.encoder.range_of(index.start + index.extent - 1).high
        self.encoder.ranges[index.const.decl().name()] = Range(low, high)

    def _while(self, node: ir.While, scope: Scope, at: "_At") -> Iterator[Site]:
        # The round stands for all that changes between rounds; `count` is the round that does not run.
        const = self.encoder.constant("round")
        var = ir.Var(ir.INT32, "round")
        index = Index(var, const, z3.IntVal(0), z3.IntVal(ir.INT32.int_range[1]), "loop")
        self.encoder.ranges[const.decl().name()] = Range(0, None)
        inner = scope.assuming(Hypothesis("round of the while loop", "loop", const >= 0))
        inner = replace(inner, indices=(*inner.indices, index))
        written, synced = _effects(node.body, self.scopes)
        effects, waits = self._atomics(node.cond)
        inner = self._written(inner, written | effects, synced or waits)
        counters = self._counters(scope, written)
        begin = {v: self.counters.within_while(node, const, inner, t, v) for v, t in counters}
        inner = _holding(inner, begin)
        yield from self.expr(node.cond, inner, at)
        term, text = self.encoder.boolean(node.cond, inner), show(node.cond)
        head = inner
        inner = inner.assuming(Hypothesis(f"while {text}", "guard", term))
        yield from self.stmt(node.body, inner, (*at.path, node), at.span)
        name = const.decl().name()
        # Whoever finds the same data runs as many rounds.
        followed = is_exact([term]) and all(begin.get(v) is not None for v in self._in(node.cond))
        decided = constants_of(term) if followed else None
        count = self.encoder.rounds(scope, decided)
        after = self._written(scope, written | effects, synced or waits)
        ends = {}

        def head_of(data: ir.Var) -> z3.ExprRef:
            return self.encoder.contents(self.single[data], head)

        for data in written & set(self.single):
            value = head_of(data)
            ends[data] = z3.substitute(value, (const, count)) if name in constants_of(value) else value
        self.after = _holding(after, ends)
        # Of what changes between rounds only the thread's own variables are known behind the loop.
        own = frozenset[str]().union(*(untracked(head_of(v)) for v in ends))
        parts = term.children() if z3.is_and(term) else [term]
        followed = [part for part in parts if untracked(part) <= own]
        if followed:
            last = z3.substitute(z3.And(*followed), (const, count - 1))
            ran = Hypothesis(f"last round of while {text}", "definition", z3.Or(count == 0, last))
            self.after = self.after.assuming(ran)
        if len(followed) == len(parts):
            stopped = z3.Not(z3.substitute(term, (const, count)))
            self.after = self.after.assuming(Hypothesis(f"end of while {text}", "definition", stopped))

    def _atomics(self, value: ir.Expr) -> tuple[set[ir.Var], bool]:
        """Return what atomics whose result `value` uses may write, and whether there are any."""
        if not any(isinstance(n, ir.Call) and n.op.startswith("atomic") for n in ir.walk(value)):
            return set(), False
        written, _ = _effects(ir.Eval(None, value), self.scopes)
        return written, True

    def _in(self, cond: ir.Expr) -> set[ir.Var]:
        """Return the private storages that a condition reads."""
        loads = (n.buffer for n in ir.walk(cond) if isinstance(n, ir.Load))
        return {b.data for b in loads if b.scope.startswith(_PRIVATE_SCOPES)}

    def _if(self, node: ir.If, scope: Scope, at: "_At") -> Iterator[Site]:
        yield from self.expr(node.cond, scope, at)
        cond, text = self.encoder.boolean(node.cond, scope), show(node.cond)
        if any(effects := self._atomics(node.cond)):
            scope = self._written(scope, *effects)
        taken = _choosing(scope, cond).assuming(Hypothesis(f"if {text}", "guard", cond))
        yield from self.stmt(node.then, taken, (*at.path, node), at.span)
        first = self.after
        skipped = second = _choosing(scope, z3.Not(cond))
        if node.orelse is not None:
            skipped = skipped.assuming(Hypothesis(f"else of {text}", "guard", z3.Not(cond)))
            yield from self.stmt(node.orelse, skipped, (*at.path, node), at.span)
            second = self.after
        branches = ir.Seq(None, (node.then,) if node.orelse is None else (node.then, node.orelse))
        written, synced = _effects(branches, self.scopes)
        self.after = self._joined(self._written(scope, written, synced), cond, first, second, written)

    def _joined(
        self, after: Scope, cond: z3.BoolRef, first: Scope, second: Scope, written: set[ir.Var]
    ) -> Scope:
        """Return `after` with what private integers hold behind two branches, where either knows it."""
        values = {}
        for data in written & set(self.single):
            known = [s.versions[data].value if data in s.versions else None for s in (first, second)]
            if known[0] is None and known[1] is None:
                continue
            one, other = (self.encoder.contents(self.single[data], s) for s in (first, second))
            if one.sort() == other.sort():
                values[data] = one if z3.eq(one, other) else z3.If(cond, one, other)
        return _holding(after, values)

    def _written(self, scope: Scope, written: set[ir.Var], synced: bool) -> Scope:
        """Return `scope` where the contents of `written` are no longer what they were."""
        private = {v for v in written if self.scopes.get(v, "").startswith(_PRIVATE_SCOPES)}
        loops = tuple(i.const for i in scope.loops)
        versions = dict(scope.versions)
        for var in sorted(private, key=lambda v: v.name):
            self.number += 1
            versions[var] = Version(self.number, loops)
        epoch = scope.epoch
        if synced or written - private:
            self.number += 1
            epoch = Version(self.number, loops)
        return replace(scope, versions=versions, epoch=epoch)

    # ------------------------------------------------------------------ expressions
    def expr(self, node: ir.Expr, scope: Scope, at: "_At") -> Iterator[Site]:
        lanes = node.dtype.lanes if not isinstance(node, ir.Region) else 1
        if lanes > 1:
            scope = with_lane(self.encoder, scope, lanes)
        yield Site(node, scope, at.span, at.statement, at.path)
        match node:
            case ir.Select(cond=cond, a=a, b=b, lazy=lazy) if lazy or ops.is_of_many(a) or ops.is_of_many(b):
                yield from self.expr(cond, scope, at)
                if any(has_access(e) or ops.is_of_many(e) for e in (a, b)):
                    term, text = self.encoder.boolean(cond, scope), show(cond)
                    yield from self.expr(a, scope.assuming(Hypothesis(f"if {text}", "guard", term)), at)
                    other = Hypothesis(f"else of {text}", "guard", z3.Not(term))
                    yield from self.expr(b, scope.assuming(other), at)
                else:
                    yield from self.expr(a, scope, at)
                    yield from self.expr(b, scope, at)
            case ir.BinOp(op="and" | "or" as op, a=a, b=b):
                yield from self.expr(a, scope, at)
                if (has_access(b) or ops.is_of_many(b)) and node.dtype.lanes == 1:
                    term = self.encoder.boolean(a, scope)
                    word, term = ("if", term) if op == "and" else ("else of", z3.Not(term))
                    scope = scope.assuming(Hypothesis(f"{word} {show(a)}", "guard", term))
                yield from self.expr(b, scope, at)
            case ir.Let(var=var, value=value, body=body):
                yield from self.expr(value, scope, at)
                if var.dtype.is_int and value.dtype.is_int and value.dtype.lanes == 1:
                    scope = scope.bind(var, self.encoder.term(value, scope))
                yield from self.expr(body, scope, at)
            case _:
                for child in ir.children(node):
                    yield from self.expr(child, scope, at)


def _holding(scope: Scope, values: Mapping[ir.Var, z3.ExprRef | None]) -> Scope:
    """Return `scope` with the known contents of private variables; None is not known."""
    known = {v: replace(scope.versions[v], value=t) for v, t in values.items() if t is not None}
    return replace(scope, versions={**scope.versions, **known}) if known else scope


def _choosing(scope: Scope, guard: z3.BoolRef) -> Scope:
    """Return `scope` where the contents of private variables that `guard` decides are decided."""
    values = {v: known.value for v, known in scope.versions.items() if known.value is not None}
    return _holding(scope, {v: induction.resolved(t, guard) for v, t in values.items()})


def with_lane(encoder: Encoder, scope: Scope, lanes: int) -> Scope:
    """Return `scope` for any one lane of vector expressions of `lanes` lanes."""
    if scope.lanes == lanes:
        return scope
    const = encoder.lane(lanes)
    index = Index(ir.Var(ir.INT32, "lane"), const, z3.IntVal(0), z3.IntVal(lanes), "lane")
    ranged = Hypothesis(f"lane < {lanes}", "loop", z3.And(const >= 0, const < lanes))
    indices = (*(i for i in scope.indices if i.tag != "lane"), index)
    return replace(scope.assuming(ranged), lane=const, lanes=lanes, indices=indices)


@dataclass(frozen=True)
class _At:
    statement: ir.Stmt
    path: tuple[ir.Stmt, ...]
    span: ir.Span | None


def _are_apart(store: ir.Store, load: ir.Load) -> bool:
    """Return whether they are of other storages, or of elements of one buffer with other constant indices."""
    if store.buffer.data is not load.buffer.data:
        return True
    pairs = zip(store.indices, load.indices, strict=True) if store.buffer is load.buffer else ()
    return any(isinstance(a, ir.Const) and isinstance(b, ir.Const) and a.value != b.value for a, b in pairs)


def _effects(
    node: ir.Stmt, scopes: dict[ir.Var, str], *, has_stores: bool = True
) -> tuple[set[ir.Var], bool]:
    """Return the storages that `node` may write, and whether it synchronises.

    Without `has_stores`: that it may write otherwise than by a Store.
    """
    written: set[ir.Var] = set()
    synced = False
    for child in ir.walk(node):
        match child:
            case ir.Store(buffer=buffer):
                written |= {buffer.data} if has_stores else set()
            case ir.AccessPtr(data=data, mode=mode) if mode != "r":
                written.add(data)
            case ir.Region(buffer=buffer, mode=mode) if mode != "r":
                written.add(buffer.data)
            case ir.Call(op=op, args=args):
                synced |= op in SYNC_OPS
                # A storage handed over by name, or by the address of an element, may be written.
                written |= {a for a in args if isinstance(a, ir.Var) and a in scopes}
                if (extern := externs.called(child)) is not None:
                    args = tuple(args[1 + i] for i, (mode, _) in extern.accesses.items() if mode != "r")
                if op.startswith("atomic"):  # a value that is added is no place that is written
                    args = tuple(a for a in args if isinstance(a, ir.AccessPtr) or a.dtype.name == "handle")
                if op in ("address_of", "call_extern", "ptx_ldmatrix") or op.startswith("atomic"):
                    written |= {data for a in args for data in _pointed(a)}
            case _:
                pass
    return written, synced


def _pointed(expr: ir.Expr) -> Iterator[ir.Var]:
    """Yield the storages that `expr` may point into; what only an index reads is not among them."""
    match expr:
        case ir.Load(buffer=buffer):
            yield buffer.data
        case ir.AccessPtr(data=data):
            yield data
        case _:
            for child in ir.children(expr):
                yield from _pointed(child)
