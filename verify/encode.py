"""ir.Expr -> Z3, over mathematical integers.

That integers do not wrap is not assumed but proved apart (`properties/overflow.py`); every other
property depends on it. Data that the encoding does not follow (floats, values read from memory,
bits of floats) becomes a symbol of its own, limited to the range of its type.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import z3

from verify import ir
from verify.contents import Place, place_of
from verify.intarith import ARITHMETIC, BITWISE, COMPARE, WRAPPING, bitwise, in_range
from verify.ir import UnsupportedIR
from verify.ranges import Range, range_of
from verify.symbols import summary, text_of

Kind = Literal["contract", "shape", "launch", "loop", "guard", "assume", "data", "definition"]
WARP_THREADS = 32
_PROMOTED_BITS = 32  # of C's int, which narrower integers become when computed with


@dataclass(frozen=True)
class Hypothesis:
    """Something a proof may use.

    Attributes:
        label: for people and for unsat cores, e.g. `m <= 65536` or `if tx < 128`.
        kind: contract and assume come from outside and are listed in the ledger; the others hold
            by the meaning of the IR.
    """

    label: str
    kind: Kind
    term: z3.BoolRef


@dataclass(frozen=True)
class Version:
    """The contents of one storage between two writes.

    Attributes:
        indices: the loop counters open at the write.
        value: of the only element, where that is known.
    """

    number: int
    indices: tuple[z3.ArithRef, ...]
    value: z3.ExprRef | None = None


@dataclass(frozen=True)
class Index:
    """A launch index or loop counter in force: its constant, its range [start, start + extent)."""

    var: ir.Var
    const: z3.ArithRef
    start: z3.ArithRef
    extent: z3.ArithRef
    tag: str  # blockIdx.x ... threadIdx.z, loop, lane


@dataclass(frozen=True)
class Scope:
    """What holds where an expression is evaluated.

    Attributes:
        env: Z3 terms of launch indices, loop counters, bound names and parameters.
        hypotheses: contract, launch and loop ranges, guards.
        indices: launch indices and loop counters, outermost first.
        versions: private storage -> version of its contents, once it was written.
        epoch: version of all shared and global memory that the kernel writes.
        lane, lanes: which lane of a vector expression is meant, of how many.
        closed: a variable that `env` does not hold is an error and no shape parameter.
    """

    env: Mapping[ir.Var, z3.ExprRef] = field(default_factory=dict)
    hypotheses: tuple[Hypothesis, ...] = ()
    indices: tuple[Index, ...] = ()
    versions: Mapping[ir.Var, Version] = field(default_factory=dict)
    epoch: Version = Version(0, ())
    lane: z3.ArithRef | None = None
    lanes: int = 1
    closed: bool = False

    def bind(self, var: ir.Var, term: z3.ExprRef) -> "Scope":
        """Return this scope with `var` standing for `term`."""
        return replace(self, env={**self.env, var: term})

    def assuming(self, *hypotheses: Hypothesis) -> "Scope":
        """Return this scope with more hypotheses."""
        return replace(self, hypotheses=(*self.hypotheses, *hypotheses))

    @property
    def launch(self) -> tuple[Index, ...]:
        """The launch indices."""
        return tuple(i for i in self.indices if i.tag not in ("loop", "lane"))

    @property
    def loops(self) -> tuple[Index, ...]:
        """The loop counters, outermost first."""
        return tuple(i for i in self.indices if i.tag == "loop")


_DATA = "data!"  # prefix of symbols for untracked data
_PARAM_DATA = "param!"  # prefix of symbols for the contents of read-only global tensors
_EVERY = "every!"  # prefix of the symbols for any one element of a tensor that the contract speaks of
_SOME = "some!"  # prefix of the symbols for one element of such a tensor
_PAIR = "pair!"  # marks what is of every two elements
_ELECT = "elect!"
# Words of SMT-LIB that a kernel's author may use as a variable's name, `_` above all.
_RESERVED = frozenset({"_", "as", "let", "par", "match", "exists", "forall", "abs", "div", "mod", "select"})


class Encoder:
    """Turns expressions into terms; owns the names of one variant.

    Shape parameters are shared by name between the stages of a kernel (`dim`), everything else is
    per variable object.

    Attributes:
        readonly: tensors that the kernel only reads.
        ranges: where launch indices and loop counters lie, by name; filled while a function is walked.
        promised: of a tensor, by name: where the contract says that its elements lie, and the clauses.
        relied: labels of those clauses that the encoding itself rests on.
        held: where all lies that is ever stored in a private variable (`contents`).
    """

    def __init__(self) -> None:
        """Start with no names taken."""
        self.ranges: dict[str, Range] = {}
        self.promised: dict[str, tuple[Range, frozenset[str]]] = {}
        self.relied: set[str] = set()
        self.held: dict[Place, Range] = {}
        self._taken: dict[str, int] = {}
        self._opaque: dict[int, tuple[ir.Expr, z3.FuncDeclRef]] = {}
        self._dims: dict[str, z3.ArithRef] = {}
        self._lanes: dict[int, z3.ArithRef] = {}
        self._storages: dict[ir.Var, str] = {}
        self.readonly: set[ir.Var] = set()

    # ------------------------------------------------------------------ names
    def dim(self, name: str) -> z3.ArithRef:
        """Return the constant of the shape parameter `name`."""
        if name not in self._dims:
            self._dims[name] = z3.Int(name)
            self._taken[name] = 1
        return self._dims[name]

    def constant(self, name: str) -> z3.ArithRef:
        """Return a new integer constant called `name` or `name.1`, `name.2`, ..."""
        return z3.Int(self._fresh(name))

    def unknown(self, name: str, scope: Scope) -> z3.ArithRef:
        """Return the symbol for any integer, one for each thread, block, iteration and lane."""
        args = [i.const for i in scope.indices]
        return z3.Function(self._fresh(name), *[z3.IntSort()] * (len(args) + 1))(*args)

    def lane(self, lanes: int) -> z3.ArithRef:
        """Return the constant that stands for a lane of vectors of `lanes` lanes."""
        if lanes not in self._lanes:
            self._lanes[lanes] = self.constant(f"lane{lanes}")
            self.ranges[self._lanes[lanes].decl().name()] = Range(0, lanes - 1)
        return self._lanes[lanes]

    def _fresh(self, name: str) -> str:
        name = f"{name}.0" if name in _RESERVED else name
        count = self._taken.get(name, 0)
        self._taken[name] = count + 1
        return name if count == 0 else f"{name}.{count}"

    # ------------------------------------------------------------------ expressions
    def term(self, expr: ir.Expr, scope: Scope) -> z3.ExprRef:
        """Return an integer or boolean expression as a Z3 Int or Bool term.

        A vector expression is encoded for the lane `scope.lane`.

        Raises:
            UnsupportedIR: an operation without a meaning here.
        """
        kind = expr.dtype
        match expr:
            case ir.Const(value=value):
                return z3.BoolVal(bool(value)) if kind.name == "bool" else z3.IntVal(int(value))
            case ir.Var():
                return self._variable(expr, scope)
            case ir.Ramp(base=base, stride=stride):
                return self._int(base, scope) + self._int(stride, scope) * self._lane(scope)
            case ir.Broadcast(value=value):
                return self.term(value, scope)
            case ir.Let(var=var, value=value, body=body):
                if not value.dtype.is_int:
                    return self.term(body, scope)
                return self.term(body, scope.bind(var, self.term(value, scope)))
            case ir.Not(a=a):
                return z3.Not(self.boolean(a, scope))
            case ir.Cast(a=a):
                return self._cast(expr, a, scope)
            case ir.Select(cond=cond, a=a, b=b):
                return z3.If(self.boolean(cond, scope), self.term(a, scope), self.term(b, scope))
            case ir.BinOp():
                return self._binary(expr, scope)
            case ir.Load():
                return self._load(expr, scope)
            case ir.Call():
                return self._call(expr, scope)
        raise UnsupportedIR(f"{type(expr).__name__} as an integer")

    def boolean(self, expr: ir.Expr, scope: Scope) -> z3.BoolRef:
        """Return `expr` as a truth value; an integer is true unless 0."""
        term = self.term(expr, scope)
        return term if z3.is_bool(term) else term != 0

    def _int(self, expr: ir.Expr, scope: Scope) -> z3.ArithRef:
        term = self.term(expr, scope)
        return z3.If(term, z3.IntVal(1), z3.IntVal(0)) if z3.is_bool(term) else term

    def _lane(self, scope: Scope) -> z3.ArithRef:
        if scope.lane is None:
            raise UnsupportedIR("vector value where a scalar is needed")
        return scope.lane

    def _variable(self, var: ir.Var, scope: Scope) -> z3.ExprRef:
        term = scope.env.get(var)
        if term is not None:
            return term
        if var.dtype.is_int and var.dtype.lanes == 1 and not scope.closed:
            return self.dim(var.name)
        raise UnsupportedIR(f"{var.dtype} variable {var.name} as an integer")

    def _cast(self, expr: ir.Cast, a: ir.Expr, scope: Scope) -> z3.ExprRef:
        if not expr.dtype.is_int:
            raise UnsupportedIR(f"{expr.dtype} as an integer")
        if not a.dtype.is_int:
            return self.opaque(expr, scope)
        if expr.dtype.name == "bool":
            return self.boolean(a, scope)
        value = self._int(a, scope)
        return self._wrapped(value, expr.dtype) if depends_on_data(value) else value

    def _binary(self, expr: ir.BinOp, scope: Scope) -> z3.ExprRef:
        if expr.op in ("and", "or"):
            a, b = self.boolean(expr.a, scope), self.boolean(expr.b, scope)
            return z3.And(a, b) if expr.op == "and" else z3.Or(a, b)
        if not (expr.a.dtype.is_int and expr.b.dtype.is_int):
            return self.opaque(expr, scope)
        a, b = self._int(expr.a, scope), self._int(expr.b, scope)
        if expr.op in COMPARE:
            return COMPARE[expr.op](a, b)
        if expr.dtype.name == "bool" and expr.op in BITWISE:
            return {"bitand": z3.And, "bitor": z3.Or, "bitxor": z3.Xor}[expr.op](a != 0, b != 0)
        if expr.op in BITWISE:
            return bitwise(expr.op, a, b, expr.dtype)
        handler = ARITHMETIC.get(expr.op)
        if handler is None:
            raise UnsupportedIR(f"integer operation {expr.op}")
        value = handler(a, b)
        if expr.op not in WRAPPING or not depends_on_data(value):
            return value
        if expr.dtype.bits >= _PROMOTED_BITS:
            return self._wrapped(value, expr.dtype)
        # C computes narrower integers as int: whether bits that leave the type are seen depends on whether
        # the compiler makes vectors of them. A value that fits is the same either way.
        return z3.If(in_range(expr.dtype, value), value, self.opaque(expr, scope, ir.INT32))

    def unwrapped(self, expr: ir.BinOp | ir.Cast, scope: Scope) -> z3.ExprRef:
        """Return the value of `expr` before it is cut to its type; its operands are as in `term`."""
        if isinstance(expr, ir.Cast):
            return self._int(expr.a, scope)
        return ARITHMETIC[expr.op](self._int(expr.a, scope), self._int(expr.b, scope))

    def _wrapped(self, value: z3.ArithRef, dtype: ir.DType) -> z3.ArithRef:
        """Arithmetic on data wraps by definition, so it is encoded with its wrapping where it may wrap."""
        low, high = dtype.int_range
        used: set[str] = set()
        found = range_of(value, lambda symbol: self._known(symbol, used))
        if found.low is not None and found.high is not None and low <= found.low and found.high <= high:
            self.relied |= used
            return value
        return (value - low) % (1 << dtype.bits) + low

    def range_of(self, term: z3.ArithRef) -> Range:
        """Return where a term lies, from the ranges of loops, of types and of tensors in the contract."""
        return range_of(term, lambda symbol: self._known(symbol, self.relied))

    def _known(self, symbol: z3.ArithRef, used: set[str]) -> Range:
        """Return where a symbol lies; clauses that say so are added to `used`."""
        name = symbol.decl().name()
        if name in self.ranges:
            return self.ranges[name]
        if not name.startswith((_DATA, _PARAM_DATA)):
            return Range()
        kind, _, data = name.split("!", 1)[1].partition("~")
        typed = _range_of_tag(kind)
        if not name.startswith(_PARAM_DATA) or data not in self.promised:
            return typed
        promised, clauses = self.promised[data]
        used |= clauses
        return typed & promised

    def contents(self, buffer: ir.Buffer, scope: Scope) -> z3.ExprRef:
        """Return what a private variable of one element holds."""
        return self._load(ir.Load(buffer.dtype, buffer, (ir.Const(ir.INT32, 0),)), scope)

    # ------------------------------------------------------------------ data
    def opaque(self, node: ir.Expr, scope: Scope, kind: ir.DType | None = None) -> z3.ExprRef:
        """Return the symbol for the untracked value of `node`.

        It may be any value of its type, or of `kind`, one for each thread, block, iteration and lane.
        """
        args = [i.const for i in scope.indices]
        known = self._opaque.get(id(node))
        if known is None or known[1].arity() != len(args):
            kind = kind or node.dtype
            decl = _function(self._fresh(_DATA + _tag(kind)), len(args), kind)
            self._opaque[id(node)] = known = (node, decl)  # keeps `node` alive, so its id stays its own
        return known[1](*args)

    def _load(self, load: ir.Load, scope: Scope) -> z3.ExprRef:
        data = load.buffer.data
        indices = [self._int(i, scope) for i in load.indices]
        if data in self.readonly:
            name = f"{_PARAM_DATA}{_tag(load.dtype)}{data.name}"
            return _function(name, len(indices), load.dtype)(*indices)
        version = scope.versions.get(data, Version(0, ()))
        if version.value is not None and load.dtype.lanes == 1:
            return version.value
        if not load.buffer.scope.startswith("local"):
            version = scope.epoch
        where = [i.const for i in scope.launch] + list(version.indices)
        tag = _tag(load.dtype, self.held.get(place_of(load.buffer, load.indices[0])))
        name = f"{_DATA}{tag}{self._storage(data)}!{version.number}"
        return _function(name, len(where) + len(indices), load.dtype)(*where, *indices)

    def _storage(self, data: ir.Var) -> str:
        if data not in self._storages:
            self._storages[data] = self._fresh(f"{data.name}@")
        return self._storages[data]

    def _call(self, call: ir.Call, scope: Scope) -> z3.ExprRef:
        if call.op == "tl_shuffle_elect":
            return self._elect(call, scope)
        if call.op in ("likely", "ignore_loop_partition"):
            return self.term(call.args[0], scope)
        if call.dtype.is_int:
            return self.opaque(call, scope)
        raise UnsupportedIR(f"{call.op} as an integer")

    def rounds(self, scope: Scope, decided_by: frozenset[str] | None) -> z3.ArithRef:
        """Return how many rounds a loop on a condition runs, in each thread, block and iteration around it.

        Args:
            scope: of the loop.
            decided_by: names of the symbols that decide it, where all of them are followed.
        """
        args = [i.const for i in scope.indices]
        if decided_by is not None:
            args = [a for a in args if a.decl().name() in decided_by]
        kind = ir.DType("uint64")
        return _function(self._fresh(f"{_DATA}{_tag(kind)}rounds"), len(args), kind)(*args)

    def _elect(self, call: ir.Call, scope: Scope) -> z3.BoolRef:
        """One lane of one warp in each group of `extent` threads; extent 0 means of the block."""
        extent = call.args[0]
        if not isinstance(extent, ir.Const):
            raise UnsupportedIR("tl_shuffle_elect of a computed extent")
        launch = [i.const for i in scope.launch]
        thread = next((i.const for i in scope.launch if i.tag == "threadIdx.x"), None)
        if thread is None:
            raise UnsupportedIR("tl_shuffle_elect before threadIdx.x is bound")
        chosen = z3.Function(f"{_ELECT}{extent.value}", *[z3.IntSort()] * len(launch), z3.BoolSort())(*launch)
        warps = -(-int(extent.value) // WARP_THREADS)
        warp = thread / WARP_THREADS
        return z3.And(chosen, (warp == 0) if int(extent.value) == 0 else (warp % max(warps, 1) == 0))


def range_of_data(symbol: z3.ArithRef) -> Range:
    """Return the range of a data symbol, as `facts_of` states it; of another, nothing."""
    name = symbol.decl().name()
    if not name.startswith((_DATA, _PARAM_DATA)):
        return Range()
    return _range_of_tag(name.split("!", 1)[1].split("~")[0])


def elected_lane(term: z3.BoolRef, scope: Scope) -> z3.BoolRef:
    """Return `term` with lane 0 of each warp as the elected one."""
    thread = next((i.const for i in scope.launch if i.tag == "threadIdx.x"), None)
    return term if thread is None else _elected(term, lambda: thread % WARP_THREADS == 0)


def elected_any(term: z3.BoolRef) -> z3.BoolRef:
    """Return `term` where every lane counts as elected."""
    return _elected(term, lambda: z3.BoolVal(True))


def elected_none(term: z3.BoolRef) -> z3.BoolRef:
    """Return `term` where no lane counts as elected."""
    return _elected(term, lambda: z3.BoolVal(False))


def _elected(term: z3.BoolRef, choice: Callable[[], z3.BoolRef]) -> z3.BoolRef:
    chosen = [t for name, t in summary(term).applications if name.startswith(_ELECT)]
    if not chosen:
        return term
    value = choice()
    return z3.substitute(term, *((c, value) for c in chosen))


def constants_of(term: z3.ExprRef) -> frozenset[str]:
    """Return the names of the constants and data symbols in `term`."""
    return summary(term).names


def facts_of(terms: Iterable[z3.ExprRef]) -> list[Hypothesis]:
    """Return the ranges of all data symbols in `terms`."""
    found: dict[str, tuple[str, z3.ExprRef]] = {}
    for term in terms:
        for name, application in summary(term).applications:
            if name.startswith((_DATA, _PARAM_DATA)) and z3.is_int(application):
                found[text_of(application)] = (name, application)
    facts = []
    for text, (symbol, term) in sorted(found.items(), key=lambda item: item[0]):
        kind = symbol.split("!", 1)[1].split("~")[0]
        limits = _range_of_tag(kind)
        facts.append(Hypothesis(f"{text} is {kind}", "data", z3.And(term >= limits.low, term <= limits.high)))
    return facts


def every_element(names: Iterable[str], dtype: ir.DType) -> dict[str, z3.ArithRef]:
    """Return, for each name that a stage may give a read-only tensor, the symbol of any one element of it."""
    return {name: z3.Int(f"{_EVERY}{_PARAM_DATA}{_tag(dtype)}{name}") for name in names}


def of_every_element(label: str, clause: z3.BoolRef) -> Hypothesis:
    """Return an assumption that `instances_of` states of each element that a query reads.

    Elsewhere it says nothing: the tensor may be empty, so that no element need exist that satisfies it.
    """
    return Hypothesis(label, "assume", z3.Or(z3.Not(z3.Bool(_EVERY)), clause))


def of_every_pair(label: str, symbol: z3.ArithRef) -> Hypothesis:
    """Return an assumption that `instances_of` states of each two elements that a query reads.

    Of elements that are equal and not negative: their indices are equal.
    """
    return Hypothesis(
        label, "assume", z3.Or(z3.Not(z3.Bool(_EVERY)), z3.Not(z3.Bool(_PAIR)), symbol == symbol)
    )


def some_element(hypotheses: Iterable[Hypothesis]) -> list[z3.BoolRef]:
    """Return what the hypotheses say of one element of each tensor that they speak of, of its type."""
    found = []
    for hypothesis in (h for h in hypotheses if is_of_every_element(h)):
        names = sorted(constants_of(hypothesis.term))
        tensors = {n: z3.Int(n.replace(_EVERY, _SOME)) for n in names if n.startswith(_EVERY + _PARAM_DATA)}
        pairs = [(z3.Int(name), element) for name, element in tensors.items()]
        found.append(z3.substitute(hypothesis.term, (z3.Bool(_EVERY), z3.BoolVal(True)), *pairs))
        for name, element in tensors.items():
            limits = _range_of_tag(name.removeprefix(_EVERY + _PARAM_DATA).split("~")[0])
            found.append(z3.And(element >= limits.low, element <= limits.high))
    return found


def holds_for_the_call(hypothesis: Hypothesis) -> bool:
    """Return whether it is about the whole call, whoever executes: shapes, or elements of a tensor."""
    return hypothesis.kind in ("contract", "shape") or _EVERY in constants_of(hypothesis.term)


def local_assumptions(hypotheses: Sequence[Hypothesis]) -> frozenset[int]:
    """Return the identities of the terms that are assumed behind a guard or in a loop.

    They are about those who get there, and nothing about the call, whatever they speak of.
    """
    conditions = [n for n, h in enumerate(hypotheses) if h.kind in ("guard", "loop")]
    first = conditions[0] if conditions else len(hypotheses)
    return frozenset(h.term.get_id() for h in hypotheses[first:] if h.kind == "assume")


def is_of_every_element(hypothesis: Hypothesis) -> bool:
    """Return whether a hypothesis was made by `of_every_element`."""
    return _EVERY in constants_of(hypothesis.term)


def instances_of(hypotheses: Sequence[Hypothesis], terms: Iterable[z3.ExprRef]) -> list[Hypothesis]:
    """Return the hypotheses, which are of every element, for each element that `terms` read."""
    if not hypotheses:
        return []
    read: dict[str, dict[str, z3.ExprRef]] = {}
    for name, application in (a for t in terms for a in summary(t).applications):
        read.setdefault(name, {}).setdefault(text_of(application), application)
    found = []
    for hypothesis in hypotheses:
        for name in sorted(constants_of(hypothesis.term)):
            elements = read.get(name.removeprefix(_EVERY), {}) if name not in (_EVERY, _PAIR) else {}
            if _PAIR in constants_of(hypothesis.term):
                found += [replace(hypothesis, term=t) for t in _distinct(list(elements.values()))]
                continue
            for element in elements.values():
                pairs = ((z3.Int(name), element), (z3.Bool(_EVERY), z3.BoolVal(True)))
                found.append(replace(hypothesis, term=z3.substitute(hypothesis.term, *pairs)))
    return found


def _distinct(elements: Sequence[z3.ExprRef]) -> Iterator[z3.BoolRef]:
    for number, first in enumerate(elements):
        for second in elements[number + 1 :]:
            same = [a == b for a, b in zip(first.children(), second.children(), strict=True)]
            yield z3.Or(first != second, first < 0, *([z3.And(*same)] if same else []))


def is_exact(terms: Iterable[z3.ExprRef]) -> bool:
    """Return whether no term depends on data that the encoding does not follow.

    The contents of a read-only input tensor count as followed: a caller may pass any.
    """
    return not _mentions(terms, (_DATA,))


def untracked(term: z3.ExprRef) -> frozenset[str]:
    """Return the names of the symbols in `term` that stand for data which the encoding does not follow."""
    return frozenset(name for name in summary(term).names if name.startswith(_DATA))


def depends_on_data(*terms: z3.ExprRef) -> bool:
    """Return whether a term depends on values read from memory or on untracked bits."""
    return _mentions(terms, (_DATA, _PARAM_DATA))


def _mentions(terms: Iterable[z3.ExprRef], prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(prefixes) for term in terms for name in summary(term).names)


def _tag(dtype: ir.DType, held: Range | None = None) -> str:
    """Return what the name of a symbol says of its values: a type, or both ends of their range too."""
    return f"{dtype.name}~" if held is None else f"{dtype.name}={held.low}={held.high}~"


def _range_of_tag(tag: str) -> Range:
    name, *ends = tag.split("=")
    return Range(*(int(end) for end in ends)) if ends else Range(*ir.DType(name).int_range)


def _function(name: str, arity: int, dtype: ir.DType) -> z3.FuncDeclRef:
    if not dtype.is_int:
        raise UnsupportedIR(f"{dtype} as an integer")
    sort = z3.BoolSort() if dtype.name == "bool" else z3.IntSort()
    return z3.Function(name, *[z3.IntSort()] * arity, sort)
