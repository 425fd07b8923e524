"""Does a device expression compute the tile expression, point for point?"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import z3

from verify import ir
from verify.encode import Hypothesis
from verify.ir import UnsupportedIR
from verify.refine.evaluate import Cond, Evaluator
from verify.refine.keys import device_key, element_name, tile_key
from verify.refine.model import Model, Storage
from verify.refine.sym import Sym, const, distinct_points, z3_term
from verify.refine.tile import Step
from verify.solve import Obligation

MAX_OBLIGATIONS = 256  # points of one access that go to the solvers; more leave it undecided
IMPLIED_RLIMIT = 100_000  # to see whether a condition always holds; then it is claimed
SAMPLE = 8  # points tried all the same, so that an error there is found
_COMMUTATIVE = {"add", "mul", "min", "max", "eq", "ne", "and", "or", "bitand", "bitor", "bitxor"}
_SWAPPED = {"gt": "lt", "ge": "le"}
_MAY_WRAP = {"add", "sub", "mul", "shl"}


class UndecidedError(Exception):
    """A comparison by normal form failed where only that was asked for."""


@dataclass
class Comparer:
    """Compares one step with the sites that implement it, at `count` aligned points.

    Attributes:
        tile, device: evaluators of both levels at those points.
        guard: what holds at each point where the site is active.
        facts: about the loop counters around the step.
        stage: pipeline stage of a shared buffer with that many stages, at this step.
        labels: coordinates of each point, for reports.
    """

    model: Model
    step: Step
    tile: Evaluator
    device: Evaluator
    count: int
    guard: Cond
    facts: tuple[Hypothesis, ...]
    stage: Callable[[int], Sym]
    labels: dict[str, np.ndarray | Sym]
    span: ir.Span | None
    obligations: list[Obligation] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    compared: int = 0
    _trial: bool = False
    _tried: dict[tuple[int, int], tuple[ir.Expr, ir.Expr, bool]] = field(default_factory=dict)

    # ------------------------------------------------------------------ claims
    def equal(self, what: str, expected: Sym, actual: Sym, under: Cond | None = None, unit: int = 1) -> None:
        """Claim that two addresses (in bits, shown over `unit`) agree wherever `under` holds."""
        if expected.key == actual.key:
            self.compared += self.count
            return
        self._need_solver()
        involved = [expected, actual, *self.guard.syms(), *(under.syms() if under else [])]
        active = self.guard.active(self.count)
        if under:
            active = active & under.active(self.count)
        points = distinct_points([*involved, const(active.astype(np.int64))], self.count)
        points = points[active[points]]
        difference = expected - actual
        if difference.is_constant:  # only the points that differ matter
            differs = np.broadcast_to(np.not_equal(difference.constant, 0), (self.count,))
            wrong = np.flatnonzero(differs & active)
            points = np.intersect1d(points, wrong) if len(np.intersect1d(points, wrong)) else wrong
        for point in self._limited(points):
            p = int(point)
            left, right = z3_term(expected, p), z3_term(actual, p)
            if z3.eq(left, right):  # the forms over all points differ, those of this one do not
                continue
            show = {"expected address": _over(left, unit), "actual address": _over(right, unit)}
            self._oblige(what, p, left == right, show, under)
        self.compared += self.count - len(points)

    def equivalent(self, what: str, expected: Cond, actual: Cond) -> None:
        """Claim that two conditions agree where the guard holds."""
        expected, actual = self._relative(expected), self._relative(actual)
        if expected.key == actual.key:
            self.compared += self.count
            return
        self._need_solver()
        active = self.guard.active(self.count)
        masks = expected.active(self.count) & active, actual.active(self.count) & active
        same_mask = np.array_equal(*masks)
        if same_mask and expected.literals.keys() ^ actual.literals.keys() <= self._implied(expected, actual):
            self.compared += self.count
            return
        involved = [*expected.syms(), *actual.syms(), *self.guard.syms()]
        kinds = const((masks[0].astype(np.int64) * 2 + masks[1]) * 2 + active)
        points = distinct_points([*involved, kinds], self.count)
        for point in self._limited(points[active[points]]):
            p = int(point)
            left, right = expected.z3_at(p), actual.z3_at(p)
            if z3.eq(left, right):  # the forms over all points differ, those of this one do not
                continue
            self._oblige(what, p, left == right, {"expected": left, "actual": right}, None)
        self.compared += self.count

    def holds(
        self,
        what: str,
        good: np.ndarray,
        expected: np.ndarray,
        actual: np.ndarray,
        read: Callable[[int | str], int | str] = lambda value: value,
    ) -> None:
        """Claim something that is already known at each point; where it fails, no block may get there."""
        bad = np.flatnonzero(~np.broadcast_to(good, (self.count,)) & self.guard.active(self.count))
        if len(bad) == 0:
            self.compared += self.count
            return
        self._need_solver()
        for point in self._limited(ways(self.guard, bad, self.count)):
            p = int(point)
            show = {"expected": read(_item(expected, p)), "actual": read(_item(actual, p))}
            self._oblige(what, p, z3.BoolVal(False), show, None)

    def _need_solver(self) -> None:
        if self._trial:
            raise UndecidedError

    def _limited(self, points: np.ndarray) -> np.ndarray:
        return limited(points, self.step.what, self.undecided)

    def _implied(self, one: Cond, other: Cond) -> set[tuple]:
        """Return what only one of them asks, is the same at all points, and follows from the launch.

        A block's index below the grid's extent is of this kind. Each is claimed, so that both solvers see it.
        """
        found = set()
        literals = {**one.literals, **other.literals}
        for key in one.literals.keys() ^ other.literals.keys():
            single = Cond(literals={key: literals[key]})
            if len(distinct_points(single.syms(), self.count)) != 1:
                continue
            goal, solver = single.z3_at(0), z3.Solver()
            solver.set("rlimit", IMPLIED_RLIMIT)
            if (
                solver.check(*(h.term for h in (*self.model.hypotheses, *self.facts)), z3.Not(goal))
                == z3.unsat
            ):
                self._oblige("condition that always holds", 0, goal, {}, None)
                found.add(key)
        return found

    def _relative(self, cond: Cond) -> Cond:
        literals = {k: v for k, v in cond.literals.items() if k not in self.guard.literals}
        return Cond(cond.mask, literals)

    def _oblige(self, what: str, point: int, goal: z3.BoolRef, show: dict, under: Cond | None) -> None:
        where: dict[str, object] = {
            name: (z3_term(v, point) if isinstance(v, Sym) else int(v[point]))
            for name, v in self.labels.items()
        }
        hypotheses = (*self.model.hypotheses, *self.facts)
        # Guards go into the goal: the points of one access then share a context, and one query.
        guards = [c.z3_at(point) for c in (self.guard, under) if c is not None and c.literals]
        if guards:
            goal = z3.Implies(z3.And(*guards), goal)
        text = f"{self.step.what}: {what}"
        self.obligations.append(
            Obligation(text, self.step.span or self.span, hypotheses, goal, {**where, **show})
        )

    def claim_guard(self, wanted: Cond) -> None:
        """Claim that the site is active exactly where the statement takes effect."""
        actual, guard = self.guard, Cond()
        if wanted.key == actual.key:
            self.compared += self.count
            return
        self.guard = guard  # the claim is about the guard, so it may not be assumed
        self.equivalent("condition of the store", wanted, actual)
        self.guard = actual

    # ------------------------------------------------------------------ values
    def value(self, tile: ir.Expr, device: ir.Expr) -> None:
        """Claim that both expressions have one value at every point.

        Raises:
            UnsupportedIR: the expressions have different shapes that we cannot relate.
        """
        if self._tried.get((id(tile), id(device)), (None, None, False))[2]:
            return
        tile, device = _plain(tile), _plain(device)
        if isinstance(_guarded(tile)[0], ir.Load) or isinstance(_guarded(device)[0], ir.Load):
            self._load(tile, device)
            return
        if self._index_value(tile, device):
            return
        if type(tile) is not type(device):
            raise UnsupportedIR(f"{_head(tile)} became {_head(device)}")
        if tile.dtype.name != device.dtype.name:
            raise UnsupportedIR(f"{_head(tile)} of {tile.dtype.name} became one of {device.dtype.name}")
        match tile, device:
            case ir.Const(value=a), ir.Const(value=b):
                same = same_number(a, b)
                self.holds("constant", np.array(same), np.array(a), np.array(b))
            case ir.Str(value=a), ir.Str(value=b):
                self.holds("name", np.array(a == b), np.array(a), np.array(b))
            case ir.BinOp(), ir.BinOp():
                self._binary(tile, device)
            case ir.Call(), ir.Call():
                self._operator(tile.op, device.op)
                if len(tile.args) != len(device.args):
                    raise UnsupportedIR(f"{tile.op} with another number of arguments")
                for a, b in zip(tile.args, device.args, strict=True):
                    self.value(a, b)
            case ir.Select(), ir.Select():
                self.value(tile.cond, device.cond)
                self._chosen(tile, device)
                self.value(tile.b, device.b)
            case (ir.Cast(), ir.Cast()) | (ir.Not(), ir.Not()):
                for a, b in zip(ir.children(tile), ir.children(device), strict=True):
                    self.value(a, b)
            case _:
                raise UnsupportedIR(f"{_head(tile)} as data")

    def _chosen(self, tile: ir.Select, device: ir.Select) -> None:
        """Compare the first values of two choices where they are chosen, if no data takes part in that."""
        if not (device.lazy and _without_data(device.cond)):
            self.value(tile.a, device.a)
            return
        saved = self.guard, self._tried
        self.guard, self._tried = self.guard & self.device.cond(device.cond), {}
        try:
            self.value(tile.a, device.a)
        except UndecidedError:  # another operator, of which this says only that it may not be chosen
            if self._trial:
                raise
        finally:
            self.guard, self._tried = saved

    def _index_value(self, tile: ir.Expr, device: ir.Expr) -> bool:
        """Compare as index arithmetic where no data takes part in either."""
        if not (tile.dtype.is_int and device.dtype.is_int):
            return False
        if not (_without_data(tile) and _without_data(device)):
            return False
        self._fits(tile, self.tile)
        self._fits(device, self.device)
        if tile.dtype.name == "bool":
            self.equivalent("condition", self.tile.cond(tile), self.device.cond(device))
        else:
            self.equal("index value", self.tile.int(tile), self.device.int(device))
        return True

    def _fits(self, root: ir.Expr, evaluator: Evaluator) -> None:
        """Claim that integer data is what it is as an integer: `overflow` leaves what decides no address."""
        for node in ir.walk(root):
            if not isinstance(node, ir.BinOp) or node.op not in _MAY_WRAP or node.dtype.name == "bool":
                continue
            value = evaluator.int(node)
            least, greatest = node.dtype.int_range
            low, high = value.bounds()
            if low is not None and high is not None and least <= low and high <= greatest:
                continue
            self._need_solver()
            points = distinct_points([value, *self.guard.syms()], self.count)
            for point in self._limited(points[self.guard.active(self.count)[points]]):
                term = z3_term(value, int(point))
                goal = z3.And(term >= least, term <= greatest)
                self._oblige(f"{node.dtype.name} {node.op} of data", int(point), goal, {"value": term}, None)

    def _binary(self, tile: ir.BinOp, device: ir.BinOp) -> None:
        op, a, b = _ordered(tile)
        other, c, d = _ordered(device)
        self._operator(op, other)
        crossed = op in _COMMUTATIVE and not (self._matches(a, c) and self._matches(b, d))
        if crossed and self._matches(a, d) and self._matches(b, c):
            return
        self.value(a, c)
        self.value(b, d)

    def _operator(self, expected: str, actual: str) -> None:
        if expected != actual:
            self.holds("operator", np.array(False), np.array(expected), np.array(actual))
            raise UndecidedError

    def _matches(self, tile: ir.Expr, device: ir.Expr) -> bool:
        """Return whether normal forms alone show that the two agree."""
        key = (id(tile), id(device))
        if key not in self._tried:  # the expressions are kept, so that their identities stay theirs
            saved, self._trial = self._trial, True
            try:
                self.value(tile, device)
                self._tried[key] = (tile, device, True)
            except (UndecidedError, UnsupportedIR):
                self._tried[key] = (tile, device, False)
            finally:
                self._trial = saved
        return self._tried[key][2]

    # ------------------------------------------------------------------ reads
    def _load(self, tile: ir.Expr, device: ir.Expr) -> None:
        (wanted, tests), (got, checks) = _guarded(tile), _guarded(device)
        if isinstance(wanted, ir.Load) and isinstance(got, ir.Select) and isinstance(_plain(got.b), ir.Const):
            # Another fill value than the tile's zero: the read must always happen.
            self.equivalent("read that must not be skipped", Cond(), self.device.cond(got.cond))
            (got, checks) = _guarded(got.a)
        if not isinstance(wanted, ir.Load) or not isinstance(got, ir.Load):
            raise UnsupportedIR(f"{_head(wanted)} became {_head(got)}")
        storage, other = self._storages(wanted.buffer, got.buffer)
        if storage is not other:
            names = np.array(storage.buffer.name), np.array(other.buffer.name)
            self.holds("operand", np.array(False), *names)
            return
        if wanted.buffer.dtype.name != got.buffer.dtype.name:
            raise UnsupportedIR(f"{wanted.buffer.name} is read as {got.buffer.dtype.name}")
        expected = Cond()
        actual = Cond()
        for test in tests:
            expected &= self.tile.cond(test)
        for check in checks:
            actual &= self.device.cond(check)
        if storage.is_global:
            indices = tuple(self.tile.int(i) for i in wanted.indices)
            expected &= self.model.inside(wanted.buffer, indices)
        under = self._relative(expected)
        self.equivalent(f"condition for reading {storage.buffer.name}", expected, actual)
        self.place(f"read of {storage.buffer.name}", storage, wanted, got, under)

    def _storages(self, wanted: ir.Buffer, got: ir.Buffer) -> tuple[Storage, Storage]:
        storage = self.model.tile_storage.get(wanted.data)
        other = self.model.device_storage.get(got.data)
        if storage is None or other is None:
            raise UnsupportedIR(f"{wanted.name} or {got.name} is no storage of the program")
        return storage, other

    def place(self, what: str, storage: Storage, wanted: ir.Load, got: ir.Load, under: Cond | None) -> None:
        """Claim that a tile-level access and a device access of one storage meet in one place."""
        expected = self.tile_key(storage, wanted.buffer, tuple(self.tile.int(i) for i in wanted.indices))
        actual = self.device_key(storage, got.buffer, tuple(self.device.int(i) for i in got.indices))
        if storage.fragment is not None:
            left, right = (np.broadcast_to(np.asarray(s.constant), (self.count,)) for s in (expected, actual))
            self.holds(what, left == right, left, right, lambda key: element_name(storage, int(key)))
        else:
            self.equal(what, expected, actual, under, wanted.buffer.dtype.bits)

    def tile_key(self, storage: Storage, buffer: ir.Buffer, indices: tuple[Sym, ...]) -> Sym:
        """Return where the tile program's element is: its number in a fragment, else its bit address."""
        return tile_key(self.model, storage, buffer, indices, self.stage)

    def device_key(self, storage: Storage, buffer: ir.Buffer, indices: tuple[Sym, ...]) -> Sym:
        """Return which place a device access touches, in the same terms."""
        return device_key(self.model, storage, buffer, indices, self.labels["threadIdx.x"])


# --------------------------------------------------------------------------- points
def ways(guard: Cond, points: np.ndarray, count: int) -> np.ndarray:
    """Return, of some of `count` points, one for each different condition under which a block gets there.

    What is wrong at several points is so at those that some block gets to: each way has to be closed.
    """
    asked = np.zeros(count, dtype=np.int64)
    asked[points] = guard.active(count)[points]
    first = distinct_points([*guard.syms(), const(asked)], count)
    return first[asked[first] > 0]


def limited(points: np.ndarray, what: str, undecided: list[str]) -> np.ndarray:
    """Return the points to ask about: all, or, of too many, some, after saying so in `undecided`."""
    if len(points) <= MAX_OBLIGATIONS:
        return points
    undecided.append(f"{what}: {len(points)} different index forms to compare")
    return points[:: max(1, len(points) // SAMPLE)][:SAMPLE]


# --------------------------------------------------------------------------- expressions
def _without_data(expr: ir.Expr) -> bool:
    return not any(isinstance(e, (ir.Load, ir.Call)) or not e.dtype.is_int for e in ir.walk(expr))


def _plain(expr: ir.Expr) -> ir.Expr:
    """Strip what does not change a lane's value."""
    while True:
        match expr:
            case ir.Broadcast(value=value):
                expr = value
            case ir.Cast(a=a) if a.dtype.name == expr.dtype.name:
                expr = a
            case ir.Cast(a=a):
                inner = _plain(a)
                if (
                    isinstance(inner, ir.Const)
                    and expr.dtype.name in ("float32", "float64")
                    and _exact(inner)
                ):
                    return ir.Const(ir.DType(expr.dtype.name), float(inner.value))
                return expr
            case ir.Select(cond=cond, a=ir.Cast(a=a) as cast, b=b) if _is_zero(b) and _reads(a):
                # A conversion keeps zero, so the choice may as well be made before it.
                zero = ir.Const(ir.DType(a.dtype.name), 0)
                return replace(cast, a=ir.Select(a.dtype, cond, a, zero, lazy=True))
            case _:
                return expr


def _is_zero(expr: ir.Expr) -> bool:
    zero = _plain(expr)
    return isinstance(zero, ir.Const) and same_number(zero.value, 0)


def same_number(a: float, b: float) -> bool:
    """Return whether two constants are one: -0.0 is not 0.0, and a NaN is a NaN."""
    if a == 0 and b == 0:
        return math.copysign(1, a) == math.copysign(1, b)
    return a == b or (a != a and b != b)


def _reads(expr: ir.Expr) -> bool:
    """Return whether `expr` is a read, perhaps guarded or converted."""
    inner, _ = _guarded(expr)
    return isinstance(inner, ir.Load) or (isinstance(inner, ir.Cast) and _reads(inner.a))


def _exact(value: ir.Const) -> bool:
    return float(np.float32(value.value)) == value.value


def _guarded(expr: ir.Expr) -> tuple[ir.Expr, list[ir.Expr]]:
    """Split `x if c else 0` into x and the conditions."""
    conditions: list[ir.Expr] = []
    expr = _plain(expr)
    while isinstance(expr, ir.Select):
        if not _is_zero(expr.b) or not isinstance(_guarded(expr.a)[0], ir.Load):
            break
        conditions.append(expr.cond)
        expr = _plain(expr.a)
    return expr, conditions


def _ordered(expr: ir.BinOp) -> tuple[str, ir.Expr, ir.Expr]:
    if expr.op in _SWAPPED:
        return _SWAPPED[expr.op], expr.b, expr.a
    return expr.op, expr.a, expr.b


def _head(expr: ir.Expr) -> str:
    match expr:
        case ir.BinOp(op=op) | ir.Call(op=op):
            return op
        case ir.Load(buffer=buffer):
            return f"a read of {buffer.name}"
    return type(expr).__name__.lower()


def _over(term: z3.ArithRef, unit: int) -> z3.ArithRef:
    return term if unit == 1 else z3.simplify(term / unit)


def _item(values: np.ndarray, point: int) -> int | str:
    values = np.asarray(values)
    value = values.flat[point] if values.size > 1 else values.flat[0]
    return value.item() if hasattr(value, "item") else value
