"""What one output row is computed from: the signature, and whether it is free of the batch.

The element at `(row, o1, ...)` of an output is expressed by those numbers alone: the block and tile
coordinates that write it are digits of them. If the term then holds no block, no batch dim and the
row's number nowhere but as the row of tensors that have one, it is one function of that row's data
for every batch, position and neighbour.
"""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import z3

from verify import ir
from verify.ask import Asker
from verify.encode import Hypothesis
from verify.externs.elements import as_stores
from verify.ir import UnsupportedIR
from verify.refine.evaluate import Cond, Evaluator, compare, literal_z3
from verify.refine.sym import Algebra, Sym, const
from verify.refine.tile import Assign, Step, TileProgram, read_tile
from verify.signature import finite
from verify.signature.digits import index_map
from verify.signature.normal import Normal
from verify.signature.program import Body, Frame, LoopBody, Place, tree
from verify.signature.regions import Region, digest_of, region_of
from verify.signature.state import BatchDependentError, Settings
from verify.signature.terms import Term, Terms, is_power_of_two, show_sym, walk
from verify.signature.values import Values
from verify.solve import Obligation

SEARCH_RLIMIT = 2_000_000  # z3 resource units to see whether a condition always holds
RECURSION_LIMIT = 300_000  # Python frames; some fifteen for each iteration of a loop that is no fold
ROW = "row"


@dataclass
class Output:
    """The signature of one tensor.

    Attributes:
        digest: of the terms of its elements; equal digests are equal computations.
        terms: one for each statement that writes it.
        regions: which elements each of those writes.
    """

    name: str
    dtype: ir.DType
    digest: str
    terms: tuple[Term, ...]
    regions: tuple[Region, ...]


@dataclass
class Signature:
    """The signature of a kernel.

    Attributes:
        terms, algebra: makers of its terms and indices.
        outputs: by tensor name.
        problems: what depends on the batch, or may.
        unsupported: what could not be followed.
        obligations: conditions that were taken to hold; they have to be proved.
        fused: sums whose product is not exact, so that contraction into one operation would show.
        exact: sums whose product is by a power of two.
        float_extrema: floating-point maxima or minima whose order is left open.
    """

    terms: Terms
    algebra: Algebra
    outputs: dict[str, Output] = field(default_factory=dict)
    problems: list[tuple[ir.Span | None, str]] = field(default_factory=list)
    unsupported: list[tuple[ir.Span | None, str]] = field(default_factory=list)
    obligations: list[Obligation] = field(default_factory=list)
    fused: int = 0
    exact: int = 0
    float_extrema: int = 0
    uses_mma: bool = False
    _runs: dict[bool, dict[str, str]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """One hash over all outputs."""
        text = ";".join(f"{name}={self.outputs[name].digest}" for name in sorted(self.outputs))
        return hashlib.sha256(text.encode()).hexdigest()

    def as_runs(self, swaps: bool) -> dict[str, str]:
        """Return the hash of each output with its loops taken apart; see `normal.Normal`."""
        if swaps not in self._runs:
            normal = Normal(self.terms, self.algebra, swaps)
            outputs = self.outputs.values()
            self._runs[swaps] = {o.name: normal.digest(o.name, o.dtype, o.terms, o.regions) for o in outputs}
        return self._runs[swaps]


def signature(
    function: ir.Function,
    batch_dims: Sequence[str],
    hypotheses: Sequence[Hypothesis],
    order: Callable[[Step], object],
    shared_rows: Mapping[str, int] | None = None,
) -> Signature:
    """Return the signature of a tile function.

    Args:
        function: the kernel at the tile stage.
        batch_dims: names of its dims that count rows.
        hypotheses: what holds of its dims, over Z3 integers of their names.
        order: the tree of a floating-point reduce step.
        shared_rows: tensor -> how many consecutive rows have one entry, or equal ones.

    Raises:
        UnsupportedIR: the tile program is not understood.
    """
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, RECURSION_LIMIT))  # a value is followed through every iteration
    try:
        return _Reader(function, frozenset(batch_dims), tuple(hypotheses), order, shared_rows or {}).run()
    except RecursionError as error:
        raise UnsupportedIR("a computation of too many steps") from error
    finally:
        sys.setrecursionlimit(limit)


class _Reader:
    def __init__(
        self,
        function: ir.Function,
        batch_dims: frozenset[str],
        hypotheses: tuple[Hypothesis, ...],
        order: Callable[[Step], object],
        shared_rows: Mapping[str, int],
    ) -> None:
        self.shared_rows = shared_rows
        function = as_stores(function)
        self.function, self.batch_dims, self.hypotheses, self.order = function, batch_dims, hypotheses, order
        self.program: TileProgram = read_tile(function)
        self.tensors = {b.data: b for b in function.buffers.values()}
        self.written = {s.dst.data for s in self.program.steps if s.dst.data in self.tensors}
        self.root: Body = tree(self.program)
        self.places = dict(_places(self.root, None))
        self.algebra = Algebra()
        self.terms = Terms()
        self.result = Signature(self.terms, self.algebra)
        # By the literals of a condition and of what is known.
        self.decided: dict[object, tuple[bool | None, bool]] = {}
        self.asker = Asker(SEARCH_RLIMIT)
        self.evaluations: dict[tuple, Values] = {}
        self.started: list[Place] = []
        self.literals: dict[object, z3.BoolRef] = {}
        self.dims: dict[ir.Var, Sym] = {}
        for buffer in self.tensors.values():
            for expr in (*buffer.shape, *buffer.strides):
                for node in ir.walk(expr):
                    if isinstance(node, ir.Var):
                        self.dims.setdefault(node, self.algebra.var(node.name, 0, node.dtype.int_range[1]))

    def run(self) -> Signature:
        if not self.written:
            self.result.unsupported.append((None, "the kernel writes no tensor"))
        for data in sorted(self.written, key=lambda v: self.tensors[v].name):
            self._output(self.tensors[data])
        return self.result

    def _output(self, tensor: ir.Buffer) -> None:
        steps = [s for s in self.program.steps if s.dst.data is tensor.data]
        terms, regions, by_position = [], [], False
        for step in steps:
            try:
                term, region, depends = self._term(tensor, step)
                terms.append(term)
                regions.append(region)
                by_position |= depends
            except BatchDependentError as error:
                self.result.problems.append((step.span, f"{tensor.name}: {error}"))
            except UnsupportedIR as error:
                self.result.unsupported.append((step.span, f"{tensor.name}: {error}"))
        if by_position and len(steps) > 1 and len({t.digest for t in terms}) > 1:
            what = f"{tensor.name}: two statements compute it in two ways, and the row's position decides"
            self.result.problems.append((steps[0].span, what))
        elif len(terms) == len(steps):
            ways = [(t.digest, region) for t, region in zip(terms, regions, strict=True)]
            digest = digest_of(tensor.name, tensor.dtype, ways)
            output = Output(tensor.name, tensor.dtype, digest, tuple(terms), tuple(regions))
            self.result.outputs[tensor.name] = output
            for term in terms:
                self._count(term)

    # ------------------------------------------------------------------ one statement
    def _term(self, tensor: ir.Buffer, step: Step) -> tuple[Term, Region, bool]:
        """Return what a statement writes to an element, to which, and whether by the row's position."""
        if not isinstance(step, Assign) or step.dst is not tensor:
            raise UnsupportedIR(f"{step.what} writes a tensor in a way that is not followed")
        base = Evaluator(self.algebra, self.dims)
        extents = [base.int(e) for e in tensor.shape]
        batch = [n for n, e in enumerate(tensor.shape) if self._counts_rows(e)]
        if len(batch) > 1:
            raise UnsupportedIR("an output with two batch axes")
        axes, inside = [], Cond()
        for number, extent in enumerate(extents):
            _, high = extent.bounds()
            name = ROW if number in batch else f"o{number}"
            axes.append(self.algebra.var(name, 0, None if high is None else max(high - 1, 0)))
            inside &= compare("lt", axes[-1], extent)
        launch = [(var, self._extent(extent)) for var, extent in self.program.launch.values()]
        # A loop around the statement, over tiles or pages, is a coordinate as the block's number is: each
        # element is written once (`coverage`), so in one iteration, and what that one left is its value.
        rounds = [(x.var, self._extent(x.extent)) for x in step.loops]
        if any(not isinstance(x.start, ir.Const) or x.start.value != 0 for x in step.loops):
            raise UnsupportedIR(f"{step.what} in a loop that does not start at 0")
        coordinates = [*launch, *rounds, *step.coordinates]
        used = {v for e in step.indices for v in ir.walk(e) if isinstance(v, ir.Var)}
        writing = [(v, size) for v, size in coordinates if v in used]
        found, cond = index_map(self.algebra, writing, step.indices, base, -1 - step.number).solve(
            self.algebra, axes
        )
        env = {**self.dims, **found}
        names = {ROW, *self.batch_dims}
        for var, size in coordinates:
            if var not in env:  # a value that no output index gives: must not matter
                label = f"{var.name}?"
                env[var] = const(0) if size == 1 else self.algebra.var(label, 0, None)
                names.add(label)
        known = {*inside.literals, *cond.literals}
        at = Evaluator(self.algebra, env)
        for guard in step.guards:
            try:
                cond &= at.cond(guard)
            except UnsupportedIR as error:
                raise UnsupportedIR(f"{step.what} under a condition on data: {error}") from error
        known |= cond.literals.keys()
        beyond = Cond(cond.mask, {k: v for k, v in cond.literals.items() if k not in inside.literals})
        facts = inside & cond
        own = {v for v, _ in step.coordinates}
        settings = Settings(
            {v: value for v, value in env.items() if v not in own},
            known,
            facts,
            lambda c, given: self._decide(c, given, step),
            self.order,
            self.tensors,
            self.written,
            lambda s: _mentions(s, names),
            self.program.launch,
            axes[batch[0]] if batch else None,
            self.shared_rows,
        )
        place = _in_round(self.places[step.number], env)
        term = self._values(settings, names, place).expression(step.value, at, place)
        if term.dtype != tensor.dtype:
            term = self.terms.make("cast", tensor.dtype, term)
        row = axes[batch[0]] if batch else None
        self._check(term, row, extents[batch[0]] if batch else None, names)
        region = region_of(beyond, [axis for n, axis in enumerate(axes) if n not in batch])
        return term, region, any(_mentions(s, names) for s in beyond.syms())

    def _values(self, settings: Settings, names: set[str], place: Place) -> Values:
        """Return what evaluates reads at `place`: one object for all statements of which the same holds."""
        self.started.append(place)  # kept, so that the identity of its frames stays their own
        if settings.facts.mask is not True:
            return Values(self.algebra, self.terms, settings)
        env = frozenset((var, value.key) for var, value in settings.env.items())
        row = settings.row.key if settings.row is not None else None
        key = (env, row, frozenset(names), tuple(settings.facts.literals))
        if key not in self.evaluations:
            self.evaluations[key] = Values(self.algebra, self.terms, settings)
        found = self.evaluations[key]
        found.state.settings.decide = settings.decide  # questions are of the statement that is followed
        return found

    def _extent(self, expr: ir.Expr) -> int | None:
        return int(expr.value) if isinstance(expr, ir.Const) else None

    def _counts_rows(self, extent: ir.Expr) -> bool:
        return any(isinstance(n, ir.Var) and n.name in self.batch_dims for n in ir.walk(extent))

    # ------------------------------------------------------------------ freedom from the batch
    def _check(self, term: Term, row: Sym | None, rows: Sym | None, names: set[str]) -> None:
        by_name = {b.name: b for b in self.tensors.values()}
        for node in walk(term):
            if node.op == "read":
                self._read(node, by_name[node.args[0]], row, rows, names)
            elif any(_mentions(s, names) for s in node.syms()):
                shown = ", ".join(show_sym(s) for s in node.syms())
                raise BatchDependentError(f"the value depends on where the row lies ({node.op} of {shown})")

    def _read(
        self, node: Term, tensor: ir.Buffer, row: Sym | None, rows: Sym | None, names: set[str]
    ) -> None:
        base = Evaluator(self.algebra, self.dims)
        for index, extent in zip(node.args[1:], tensor.shape, strict=True):
            if self._counts_rows(extent):
                if row is None or rows is None:
                    raise BatchDependentError(f"an output without a batch axis reads rows of {tensor.name}")
                if not isinstance(index, Sym):
                    raise UnsupportedIR(f"a row of {tensor.name} that data chooses")
                self._own(index, base.int(extent), tensor.name, row, rows)
            elif isinstance(index, Sym) and _mentions(index, names):
                text = f"{tensor.name}[{', '.join(_show(i) for i in node.args[1:])}]"
                raise BatchDependentError(f"the value reads {text}: which element depends on the position")

    def _own(self, index: Sym, extent: Sym, tensor: str, row: Sym, rows: Sym) -> None:
        """Check that `index` is of the row's own part: the row itself, or its share of several."""
        if index.key == row.key and (extent.key == rows.key or tensor in self.shared_rows):
            return
        shares = [int(c) for m, c in index.terms.items() if m == next(iter(row.terms))]  # type: ignore[arg-type]
        if len(shares) == 1 and extent.key == rows.scaled(shares[0]).key:
            low, high = (index - row.scaled(shares[0])).bounds()
            if low is not None and high is not None and low >= 0 and high < shares[0]:
                return
        raise BatchDependentError(f"a row reads {tensor}[{show_sym(index)}, ...], which is not its own")

    # ------------------------------------------------------------------ conditions
    def _decide(self, cond: Cond, facts: Cond, step: Step) -> tuple[bool | None, bool]:
        """Return whether `cond` always holds, or never does; and whether trying all values settled it."""
        if cond.mask is not True or facts.mask is not True:
            return self._asked(cond, facts, step), False
        key = (frozenset(cond.literals), frozenset(facts.literals))
        if key not in self.decided:
            is_known, value = finite.decided(cond, facts)
            self.decided[key] = (value if is_known else self._asked(cond, facts, step)), is_known
        return self.decided[key]

    def _asked(self, cond: Cond, facts: Cond, step: Step) -> bool | None:
        try:
            goal, given = z3.And(*self._parts(cond)), self._parts(facts)
            atoms = {a for s in (*cond.syms(), *facts.syms()) for a in s.atoms() if a.kind == "var"}
        except UnsupportedIR:
            return None
        ranges = []
        for atom in sorted(atoms, key=lambda a: a.number):
            name = z3.Int(atom.args[0])
            ranges += [name >= atom.low] if atom.low is not None else []
            ranges += [name <= atom.high] if atom.high is not None else []
        inside = "the element is in bounds, and this statement writes it"
        hypotheses = (
            *self.hypotheses,
            *(Hypothesis(inside, "guard", term) for term in given),
            *(Hypothesis("ranges of the coordinates", "loop", term) for term in ranges),
        )
        found = self.asker.decide(hypotheses, goal)
        if found is None:
            return None
        value, used = found
        what, claim = f"{step.what}: a condition of a read", goal if value else z3.Not(goal)
        self.result.obligations.append(Obligation(what, step.span, tuple(used), claim))
        return value

    def _parts(self, cond: Cond) -> list[z3.BoolRef]:
        """Return terms of which a condition is the conjunction; those of literals are made once."""
        if cond.mask is not True:
            return [cond.z3_at(0)]
        for key, literal in cond.literals.items():
            if key not in self.literals:
                self.literals[key] = literal_z3(literal, 0)
        return [self.literals[key] for key in cond.literals]

    # ------------------------------------------------------------------ what is assumed of arithmetic
    def _count(self, term: Term) -> None:
        powers: dict[int, bool] = {}

        def is_power(factor: Term) -> bool:
            if id(factor) not in powers:
                powers[id(factor)] = is_power_of_two(factor)
            return powers[id(factor)]

        for node in walk(term):
            self.result.uses_mma |= node.op == "mma"
            if node.dtype.is_int:
                continue
            if node.op == "reduce" and node.args[0] in ("max", "min", "absmax"):
                self.result.float_extrema += 1
            if node.op in ("add", "sub"):
                for product in (a for a in node.args if a.op == "mul"):
                    if any(is_power(factor) for factor in product.args):
                        self.result.exact += 1
                    else:
                        self.result.fused += 1


def _places(body: Body, outer: Place | None) -> list[tuple[int, Place]]:
    found: list[tuple[int, Place]] = []
    for index, item in enumerate(body.items):
        here = Place(body, index, outer)
        if isinstance(item, Step):
            found.append((item.number, here))
        else:
            found += _places(item, here)
    return found


def _in_round(place: Place, env: Mapping[ir.Var, Sym]) -> Place:
    """Return `place` in the iteration of the loops around it that `env` gives."""
    outer = _in_round(place.outer, env) if place.outer is not None else None
    value: int | Frame = place.value
    if isinstance(place.body, LoopBody) and place.body.loop is not None:
        value = Frame(env[place.body.loop.var], 0)
    return Place(place.body, place.index, outer, value)


def _mentions(value: Sym, names: set[str]) -> bool:
    return any(a.kind == "var" and a.args[0] in names for a in value.atoms())


def _show(index: object) -> str:
    return show_sym(index) if isinstance(index, Sym) else "..."


def dims_of(function: ir.Function) -> Mapping[str, ir.Var]:
    """Return the symbolic dims of a function's tensors by name."""
    exprs = (e for b in function.buffers.values() for e in (*b.shape, *b.strides))
    return {n.name: n for e in exprs for n in ir.walk(e) if isinstance(n, ir.Var)}
