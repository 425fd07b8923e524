"""Where the integers lie that a thread keeps in variables of its own: a range for all that is ever stored.

A loop may change a variable in a way that has no closed form: a search, a count that data decide. What such
a variable holds is a symbol of its own in proofs. Here every store is evaluated in ranges, under the
conditions around it, until no range grows any more. A variable that some path reads before it is written,
or whose address is taken, gets no range.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from verify import ir
from verify.ranges import Range

MAX_ELEMENTS = 8  # of a variable: more is an array, whose elements are not told apart by name
_WIDEN = 3  # passes after which a range that still grows is taken to the next number of the text
_ADD_UP = 8  # passes after which what is added is taken for stored, if the range still grows
_MAX_PASSES = 200
_Key = tuple[object, ...]
_FLIPPED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}
_NEGATED = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}


Place = tuple[ir.Var, int | None]  # an element; None: a computed one


def place_of(buffer: ir.Buffer, index: ir.Expr) -> Place:
    """Return which element is meant."""
    return buffer.data, int(index.value) if isinstance(index, ir.Const) else None


def contents(function: ir.Function, known: Callable[[ir.Load], Range]) -> dict[Place, Range]:
    """Return the range of each element of variables that are always written before they are read.

    Args:
        function: device IR.
        known: where an element of a tensor lies; everywhere in its type is fine.
    """
    sizes = dict(_variables(function.body))
    if not sizes:
        return {}
    assigned = _Assigned(sizes)
    assigned.statement(function.body, frozenset())
    kept = set(sizes) - assigned.read_early
    if not kept:
        return {}
    computed = {
        n.buffer.data
        for n in ir.walk(function.body)
        if isinstance(n, (ir.Load, ir.Store)) and place_of(n.buffer, n.indices[0])[1] is None
    }
    run = _Run(kept - computed, known)
    numbers = sorted({n + d for n in _numbers(function.body) for d in (-1, 0, 1)})
    for number in range(_MAX_PASSES):
        before = dict(run.held)
        run.statement(function.body, {})
        run.grow()
        if run.held == before:
            return {place: found for place, found in run.held.items() if _is_within(found, run.types[place])}
        if number >= _WIDEN:
            for place, found in run.held.items():
                if place not in before or before[place] == found:
                    continue
                if place in run.grown and number < _ADD_UP:
                    continue
                run.plain.add(place)
                run.held[place] = run.stored[place] = _widened(before[place], found, numbers)
    return {}


def _variables(body: ir.Stmt) -> Iterator[tuple[ir.Var, int]]:
    """Yield the private integers of few elements that only plain loads and stores reach, with their sizes."""
    sizes: dict[ir.Var, int] = {}
    escaped: set[ir.Var] = set()
    for node in ir.walk(body):
        match node:
            case ir.Alloc(buffer=b) if b.scope in ("local", "local.var") and b.dtype.is_int:
                extents = [e.value if isinstance(e, ir.Const) else None for e in b.shape]
                if len(extents) == 1 and isinstance(extents[0], int) and extents[0] <= MAX_ELEMENTS:
                    sizes[b.data] = extents[0]
            case ir.Load(buffer=b) | ir.Store(buffer=b) if b.dtype.lanes > 1 or len(node.indices) != 1:
                escaped.add(b.data)
            case ir.Store(buffer=b, value=v) if v.dtype.lanes > 1 or v.dtype != b.dtype:
                escaped.add(b.data)
            case ir.AccessPtr(data=data) | ir.Region(buffer=ir.Buffer(data=data)):
                escaped.add(data)
            case ir.Call(op=op, args=args):
                escaped |= {a for a in args if isinstance(a, ir.Var)}
                if op == "address_of":
                    escaped |= {n.buffer.data for a in args for n in ir.walk(a) if isinstance(n, ir.Load)}
            case _:
                pass
    return ((var, size) for var, size in sizes.items() if var not in escaped)


def _numbers(body: ir.Stmt) -> Iterator[int]:
    for node in ir.walk(body):
        if isinstance(node, ir.Const) and node.dtype.is_int:
            yield int(node.value)


def _widened(before: Range, found: Range, numbers: list[int]) -> Range:
    low, high = found.low, found.high
    if low is not None and low != before.low:
        low = next((n for n in reversed(numbers) if n <= low), None)
    if high is not None and high != before.high:
        high = next((n for n in numbers if n >= high), None)
    return Range(low, high)


# --------------------------------------------------------------------------- written before it is read
@dataclass
class _Assigned:
    """Follows which elements every path has written.

    Attributes:
        read_early: variables that some path reads before.
    """

    sizes: dict[ir.Var, int]
    read_early: set[ir.Var] = field(default_factory=set)

    def reads(self, node: ir.Expr, written: frozenset[tuple[ir.Var, int]]) -> None:
        for load in (n for n in ir.walk(node) if isinstance(n, ir.Load)):
            size = self.sizes.get(load.buffer.data)
            if size is None:
                continue
            index = load.indices[0]
            places = [int(index.value)] if isinstance(index, ir.Const) else range(size)
            if any((load.buffer.data, place) not in written for place in places):
                self.read_early.add(load.buffer.data)

    def statement(
        self, node: ir.Stmt | None, written: frozenset[tuple[ir.Var, int]]
    ) -> frozenset[tuple[ir.Var, int]]:
        match node:
            case None:
                return written
            case ir.Seq(stmts=stmts):
                for stmt in stmts:
                    written = self.statement(stmt, written)
                return written
            case ir.If(cond=cond, then=then, orelse=orelse):
                self.reads(cond, written)
                return self.statement(then, written) & self.statement(orelse, written)
            case ir.For(start=start, extent=extent, body=body):
                self.reads(start, written)
                self.reads(extent, written)
                inner = self.statement(body, written)
                runs = isinstance(extent, ir.Const) and int(extent.value) > 0
                return inner if runs else written
            case ir.While(cond=cond, body=body):
                self.reads(cond, written)
                self.statement(body, written)
                return written
            case ir.Store(buffer=buffer, indices=indices, value=value):
                for expr in (*indices, value):
                    self.reads(expr, written)
                if buffer.data in self.sizes and isinstance(indices[0], ir.Const):
                    return written | {(buffer.data, int(indices[0].value))}
                return written
            case ir.Alloc(buffer=buffer):  # inside a loop: new in each round
                return frozenset(w for w in written if w[0] is not buffer.data)
        for child in ir.children(node):
            if isinstance(child, ir.Stmt):
                written = self.statement(child, written)
            else:
                self.reads(child, written)
        return written


# --------------------------------------------------------------------------- what is stored
_Facts = dict[_Key, tuple[Range, frozenset[ir.Var]]]


@dataclass
class _Run:
    """Evaluates every store once, with the ranges that are known so far.

    Attributes:
        kept: variables that are followed.
        held: what they may hold; nothing yet where it is missing.
        stored: the same, but for what is added to them.
        grown, growing: what is added to them in all, by the last pass and by this one.
        plain: places whose additions depend on what they hold: stores like any other.
        rounds: how often a thread comes here at most; None where nobody knows.
        names: launch indices, loop counters and bound names.
        changed: by statement, what it may store to.
    """

    kept: set[ir.Var]
    known: Callable[[ir.Load], Range]
    held: dict[Place, Range] = field(default_factory=dict)
    stored: dict[Place, Range] = field(default_factory=dict)
    grown: dict[Place, Range] = field(default_factory=dict)
    growing: dict[Place, Range] = field(default_factory=dict)
    plain: set[Place] = field(default_factory=set)
    types: dict[Place, ir.DType] = field(default_factory=dict)
    rounds: int | None = 1
    names: dict[ir.Var, Range] = field(default_factory=dict)
    changed: dict[int, set[ir.Var]] = field(default_factory=dict)

    def statement(self, node: ir.Stmt | None, facts: _Facts) -> _Facts:
        """Run a statement; `facts` are ranges of expressions that hold before it. Returns those after."""
        match node:
            case None | ir.Alloc() | ir.Decl():
                return facts
            case ir.Seq(stmts=stmts):
                for stmt in stmts:
                    facts = self.statement(stmt, facts)
                return facts
            case ir.Launch(var=var, extent=extent, body=body):
                self.names[var] = Range(0, _less(self.value(extent, facts).high))
                return self.statement(body, facts)
            case ir.For(var=var, start=start, extent=extent, body=body):
                first, length = self.value(start, facts), self.value(extent, facts)
                self.names[var] = Range(first.low, _less((first + length).high))
                facts = _without(facts, self._changed(body))
                if length.high is None or length.high > 0:
                    self._repeated(length.high, body, facts)
                return facts
            case ir.While(cond=cond, body=body):
                facts = _without(facts, self._changed(body))
                self._repeated(None, body, self.assume(cond, True, facts))
                return self.assume(cond, False, facts)
            case ir.If(cond=cond, then=then, orelse=orelse):
                self.statement(then, self.assume(cond, True, facts))
                self.statement(orelse, self.assume(cond, False, facts))
                return _without(facts, self._changed(node))
            case ir.Store(buffer=buffer, indices=(index,), value=value) if buffer.data in self.kept:
                self._store(place_of(buffer, index), value, facts)
                return _without(facts, {buffer.data})
            case ir.Bind(var=var, value=value):
                if value.dtype.is_int and value.dtype.lanes == 1:
                    self.names[var] = self.value(value, facts)
                return facts
            case ir.Assume(cond=cond, body=body):
                return self.statement(body, self.assume(cond, True, facts))
        for child in ir.children(node):
            if isinstance(child, ir.Stmt):
                facts = self.statement(child, facts)
        return facts

    def _repeated(self, times: int | None, body: ir.Stmt, facts: _Facts) -> None:
        outer = self.rounds
        self.rounds = None if outer is None or times is None else outer * times
        self.statement(body, facts)
        self.rounds = outer

    def _store(self, place: Place, value: ir.Expr, facts: _Facts) -> None:
        self.types[place] = value.dtype
        added = _added(place, value)
        if added is not None and self.rounds is not None and place not in self.plain:
            # However the additions are spread over the rounds: no more than all of them together.
            step = self.value(added, facts) * self.rounds | Range(0, 0)
            self.growing[place] = self.growing.get(place, Range(0, 0)) + step
            return
        found = self.value(value, facts)
        self.stored[place] = found if place not in self.stored else self.stored[place] | found
        self.held[place] = self.stored[place] + self.grown.get(place, Range(0, 0))

    def grow(self) -> None:
        """Add what this pass found to be added."""
        for place in self.plain & set(self.grown):
            del self.grown[place]
        for place, found in self.growing.items():
            self.grown[place] = self.grown.get(place, Range(0, 0)) | found
            self.held[place] = self.stored.get(place, Range()) + self.grown[place]
        self.growing = {}

    def _changed(self, node: ir.Stmt) -> set[ir.Var]:
        if id(node) not in self.changed:
            self.changed[id(node)] = {n.buffer.data for n in ir.walk(node) if isinstance(n, ir.Store)}
        return self.changed[id(node)]

    # ------------------------------------------------------------------ values
    def value(self, node: ir.Expr, facts: _Facts) -> Range:
        """Return where an integer expression lies; where it may leave its type, anywhere in that."""
        if not node.dtype.is_int or node.dtype.lanes > 1:
            return Range()
        typed = Range(*node.dtype.int_range)
        found = self._value(node, facts)
        if found.low is None or found.high is None or (found & typed) != found:
            found = typed
        key = _key(node) if facts else None
        fact = facts.get(key) if key is not None else None
        return found if fact is None else found & fact[0]

    def _value(self, node: ir.Expr, facts: _Facts) -> Range:
        match node:
            case ir.Const(value=value):
                return Range(int(value), int(value))
            case ir.Var():
                return self.names.get(node, Range())
            case ir.Cast(a=a):
                return self.value(a, facts)
            case ir.Select(cond=cond, a=a, b=b):
                first = self.value(a, self.assume(cond, True, facts))
                return first | self.value(b, self.assume(cond, False, facts))
            case ir.Load(buffer=buffer, indices=indices):
                if buffer.data not in self.kept:
                    return self.known(node)
                return self.held.get(place_of(buffer, indices[0]), Range())
            case ir.Call(op="likely" | "ignore_loop_partition", args=(inner, *_)):
                return self.value(inner, facts)
            case ir.BinOp(op=op, a=a, b=b) if a.dtype.is_int and b.dtype.is_int:
                return _binary(op, self.value(a, facts), self.value(b, facts))
        return Range()

    def assume(self, cond: ir.Expr, holds: bool, facts: _Facts) -> _Facts:
        """Return `facts` and what follows from a condition that holds, or does not."""
        match cond:
            case ir.Not(a=a):
                return self.assume(a, not holds, facts)
            case ir.Call(op="likely" | "ignore_loop_partition", args=(inner, *_)):
                return self.assume(inner, holds, facts)
            case ir.BinOp(op="and" | "or" as op, a=a, b=b) if (op == "and") is holds:
                return self.assume(b, holds, self.assume(a, holds, facts))
            case ir.BinOp(op=op, a=a, b=b) if op in _NEGATED and a.dtype.is_int and b.dtype.is_int:
                op = op if holds else _NEGATED[op]
                facts = self._limit(a, op, self.value(b, facts), facts)
                return self._limit(b, _FLIPPED[op], self.value(a, facts), facts)
        return facts

    def _limit(self, node: ir.Expr, op: str, other: Range, facts: _Facts) -> _Facts:
        if op == "ne" or isinstance(node, ir.Const) or (key := _key(node)) is None:
            return facts
        strict = op in ("lt", "gt")
        low = None if other.low is None else other.low + strict
        high = None if other.high is None else other.high - strict
        limit = {"lt": Range(None, high), "le": Range(None, high), "gt": Range(low), "ge": Range(low)}
        found = limit.get(op, other)
        if key in facts:
            found &= facts[key][0]
        loads = frozenset(n.buffer.data for n in ir.walk(node) if isinstance(n, ir.Load))
        if not all(self._is_stable(v) for v in loads):
            return facts
        return {**facts, key: (found, loads)}

    def _is_stable(self, data: ir.Var) -> bool:
        """Return whether only this thread's own stores change what is loaded."""
        return data in self.kept


def _is_within(found: Range, dtype: ir.DType) -> bool:
    return None not in (found.low, found.high) and found & Range(*dtype.int_range) == found


def _added(place: Place, value: ir.Expr) -> ir.Expr | None:
    """Return what a store adds to what the place holds, if it does that and no more."""
    if isinstance(value, ir.BinOp) and value.op == "add":
        for old, added in ((value.a, value.b), (value.b, value.a)):
            if isinstance(old, ir.Load) and place_of(old.buffer, old.indices[0]) == place:
                return added
    return None


def _binary(op: str, a: Range, b: Range) -> Range:
    match op:
        case "add":
            return a + b
        case "sub":
            return a + b * -1
        case "mul":
            return _product(a, b)
        case "min" | "max":
            return _extreme(op, a, b)
    number = b.low if b.low == b.high else None
    if number is not None and number > 0:
        if op == "floordiv" or (op == "truncdiv" and a.low is not None and a.low >= 0):
            return a // number
        if op == "floormod" or (op == "truncmod" and a.low is not None and a.low >= 0):
            return a % number
        if op == "bitand" and number & (number + 1) == 0:
            return a % (number + 1)
    if number is not None and number >= 0 and op == "shr":
        return a // (1 << number)
    return Range()


def _product(a: Range, b: Range) -> Range:
    ends = (a.low, a.high, b.low, b.high)
    if any(end is None for end in ends):
        return Range()
    products = [x * y for x in (a.low, a.high) for y in (b.low, b.high) if x is not None and y is not None]
    return Range(min(products), max(products))


def _extreme(op: str, a: Range, b: Range) -> Range:
    if None in (a.low, a.high, b.low, b.high):
        return Range()
    pick = min if op == "min" else max
    return Range(pick(a.low, b.low), pick(a.high, b.high))  # type: ignore[type-var]


def _less(end: int | None) -> int | None:
    return None if end is None else end - 1


def _without(facts: _Facts, changed: set[ir.Var]) -> _Facts:
    return {key: fact for key, fact in facts.items() if not fact[1] & changed} if facts else facts


def _key(node: ir.Expr) -> _Key | None:
    """Return what two expressions with one value have in common; None for what may change by itself."""
    match node:
        case ir.Const(value=value):
            return ("const", value)
        case ir.Var():
            return ("var", id(node))
        case ir.Load(buffer=buffer, indices=indices):
            inner = tuple(_key(i) for i in indices)
            return None if None in inner else ("load", id(buffer.data), *inner)
        case ir.BinOp(op=op, a=a, b=b):
            inner = (_key(a), _key(b))
            return None if None in inner else (op, *inner)
        case ir.Cast(a=a):
            inner = _key(a)
            return None if inner is None else ("cast", node.dtype.name, inner)
    return None
