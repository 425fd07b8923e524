"""No form of an expression is encoded and not compared: what the encoders take is listed from their source.

`encode.Encoder` (all properties) and `refine.evaluate.Evaluator` (indices of `refinement`) are held against
the interpreter. Trees of the common forms are in `test_encoder_against_interpreter.py`; here are the rest of
the first encoder's, every form of the second, and the lists.
"""

import ast
import inspect
import random
import textwrap
from functools import cache

import numpy as np
import pytest
import z3

from tests.verify import test_encoder_against_interpreter as trees
from tests.verify.device import build
from tests.verify.test_encoder_against_interpreter import Encoded, as_int, const, kind, machine_with
from verify import ir
from verify.encode import Encoder, Scope
from verify.intarith import ARITHMETIC, BITWISE, COMPARE
from verify.refine import evaluate
from verify.refine.evaluate import Evaluator
from verify.refine.sym import Algebra, z3_term
from verify.refine.sym import const as sym_const
from verify.walk import walk

NO_DATA = {name: [0] * trees.ELEMENTS for name in trees.TYPES}
THREADS, BLOCKS, LANES, WARP = 64, 5, 4, 32


def taken(method):
    """Return the classes and the operations named by the patterns and comparisons of a method."""
    source = ast.parse(textwrap.dedent(inspect.getsource(method)))
    patterns = [p.cls for p in ast.walk(source) if isinstance(p, ast.MatchClass)]
    classes = {cls.attr for cls in patterns if isinstance(cls, ast.Attribute)}
    words = {n.value for n in ast.walk(source) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return classes, words


# --------------------------------------------------------------------------- encode.Encoder
# Which test holds a form against the interpreter.
FORMS = {
    "Const": trees.test_integer_trees,
    "Var": trees.test_integer_trees,
    "Let": trees.test_integer_trees,
    "Cast": trees.test_casts,
    "Select": trees.test_integer_trees,
    "BinOp": trees.test_each_operation_is_the_integers_own,
    "Not": trees.test_conditions,
    "Ramp": trees.test_ramps,
    "Load": trees.test_reads_of_read_only_tensors_at_computed_places,
    "Broadcast": "test_one_value_in_every_lane",
    "Call": "test_who_is_elected",
}
CALLS = {"tl_shuffle_elect", "likely", "ignore_loop_partition"}


def test_every_form_that_the_encoder_takes_is_compared():
    classes, _ = taken(Encoder.term)
    assert classes == set(FORMS)
    assert all(callable(test) or test in globals() for test in FORMS.values())


def test_every_operation_that_the_encoder_takes_is_compared():
    _, words = taken(Encoder._binary)
    by_name = {word for word in words if word.isalpha() and word.islower()} - {"bool"}
    assert by_name == {"and", "or", *BITWISE}
    assert {*ARITHMETIC, *BITWISE, *COMPARE} == set(trees.OPS)
    _, words = taken(Encoder._call)
    assert {word for word in words if word.replace("_", "").isalpha()} == CALLS


def stored(value):
    """Return what a device run stores of a vector in each thread: (threads, lanes)."""
    out = build.buffer("out", "int32", THREADS * LANES, "global")
    kernel = build.Kernel(
        threads=THREADS, tensors=[out], body=[build.store(out, build.mul(build.TX, LANES), value, LANES)]
    )
    result = build.ints(THREADS * LANES)
    kernel.run(result, policy="late")
    return result.reshape(THREADS, LANES).tolist()


def test_one_value_in_every_lane():
    node = ir.Broadcast(ir.DType("int32", LANES), build.mul(build.TX, 3))
    thread, lane = z3.Int("tx"), z3.Int("lane")
    term = Encoder().term(node, Scope(env={build.TX: thread}, closed=True, lane=lane, lanes=LANES))
    for number, got in enumerate(stored(node)):
        assert set(got) == {as_int(z3.simplify(z3.substitute(term, (thread, z3.IntVal(number)))))}


@pytest.mark.parametrize("name", sorted(CALLS - {"tl_shuffle_elect"}))
def test_hints_to_the_compiler_change_nothing(name):
    var = trees.VARS["int32"][0]
    node = ir.Call(ir.BOOL, name, (ir.BinOp(ir.BOOL, "lt", var, const(3, "int32")),))
    for value in (2, 3):
        encoded = Encoded(NO_DATA)
        machine = machine_with(NO_DATA)
        machine.env[var] = value
        want = as_int(encoded.at(encoded.encoder.term(node, encoded.scope), {var: value}))
        assert bool(machine.tensor(node)) == want == (value < 3)


@pytest.mark.parametrize("op", BITWISE)
def test_bit_operations_on_truth_values(op):
    pair = [ir.BinOp(ir.BOOL, "ne", v, const(0, "int32")) for v in trees.VARS["int32"]]
    node = ir.BinOp(ir.BOOL, op, *pair)
    for a in (0, 1):
        for b in (0, 1):
            point = dict(zip(trees.VARS["int32"], (a, b), strict=True))
            encoded, machine = Encoded(NO_DATA), machine_with(NO_DATA)
            machine.env.update(point)
            term = encoded.encoder.term(node, encoded.scope)
            assert bool(machine.tensor(node)) == as_int(encoded.at(term, point))


def test_a_cast_to_bool_is_a_test_for_zero():
    var = trees.VARS["int32"][0]
    for value in (-1, 0, 1, 256):
        encoded, machine = Encoded(NO_DATA), machine_with(NO_DATA)
        machine.env[var] = value
        term = encoded.encoder.term(ir.Cast(ir.BOOL, var), encoded.scope)
        assert bool(machine.tensor(ir.Cast(ir.BOOL, var))) == as_int(encoded.at(term, {var: value}))


@pytest.mark.parametrize("extent", [0, 32, 64])
def test_who_is_elected(extent):
    """The device run marks the threads that an election takes: those of the encoder's term, for lane 0."""
    out = build.buffer("out", "int32", THREADS, "global")
    elected = ir.Call(ir.BOOL, "tl_shuffle_elect", (const(extent, "int32"),))
    one, none = const(1, "int32"), const(0, "int32")
    mark = build.store(out, build.TX, ir.Select(build.I32, elected, one, none, False))
    kernel = build.Kernel(threads=THREADS, tensors=[out], body=[mark])
    result = build.ints(THREADS)
    kernel.run(result, policy="late")
    site = next(s for s in walk(kernel.function, Encoder(), ()) if s.node is elected)
    term = Encoder().term(elected, site.scope)
    names = {i.tag: i.const for i in site.scope.launch}
    chosen = next(t for t in _applications(term) if t.decl().name().startswith("elect!"))
    for thread in range(THREADS):
        lane_0 = z3.BoolVal(thread % WARP == 0)
        at = z3.substitute(z3.substitute(term, (chosen, lane_0)), (names["threadIdx.x"], z3.IntVal(thread)))
        assert int(result[thread]) == as_int(z3.simplify(at)), thread


def _applications(term):
    if z3.is_app(term) and term.decl().kind() == z3.Z3_OP_UNINTERPRETED and term.num_args():
        yield term
    for child in term.children():
        yield from _applications(child)


# --------------------------------------------------------------------------- refine.evaluate.Evaluator
TX, BX, KO = (ir.Var(ir.INT32, name) for name in ("tx", "bx", "ko"))
VARIABLES = {TX: THREADS, BX: BLOCKS, KO: 9}
INTEGERS = {"Const", "Var", "Ramp", "Broadcast", "Cast", "Let", "BinOp", "Select", "Load", "Call"}
INT_OPS = (
    "add",
    "sub",
    "mul",
    "min",
    "max",
    "floordiv",
    "floormod",
    "truncdiv",
    "truncmod",
    "shl",
    "shr",
    *BITWISE,
)
CONDITIONS = {"Const", "BinOp", "Not", "Broadcast", "Call", "Var", "Cast"}
TABLE = ir.Buffer(
    "table", ir.INT32, (const(8, "int32"),), (), "global", ir.Var(ir.HANDLE, "table"), const(0, "int32")
)


def test_every_form_that_refinement_takes_is_compared():
    """The generator below makes all of them."""
    assert taken(Evaluator._int)[0] == INTEGERS - {"Const"}  # which `int` takes itself
    assert taken(Evaluator.cond)[0] == CONDITIONS
    assert {w for w in taken(Evaluator._binary)[1] if w.isalpha() and w.islower()} - {
        "in",
        "an",
        "index",
    } == set(INT_OPS)
    assert set(evaluate._NEGATED) == set(COMPARE)


class Trees:
    """Random index expressions; `seen` notes the forms made."""

    def __init__(self, seed):
        self.rng, self.seen = random.Random(seed), set()
        self.bound = {}

    def _note(self, *forms):
        self.seen.update(forms)

    def small(self):
        return const(self.rng.randint(0, 5), "int32")

    def index(self, depth):
        if depth == 0:
            leaf = self.rng.choice([TX, BX, KO, self.small()])
            self._note(type(leaf).__name__)
            return leaf
        form = self.rng.choice([*sorted(INTEGERS - {"Const", "Var", "Ramp"}), *["BinOp"] * 6])
        self._note(form)
        inner = self.index(depth - 1)
        match form:
            case "Cast":
                return ir.Cast(kind(self.rng.choice(["int64", "int32"])), inner)
            case "Let":
                var = ir.Var(ir.INT32, "bound")
                return ir.Let(ir.INT32, var, inner, ir.BinOp(ir.INT32, "add", var, self.index(depth - 1)))
            case "Select":  # on what tells threads apart alone
                cond = ir.BinOp(ir.BOOL, self.rng.choice(sorted(COMPARE)), TX, self.small())
                return ir.Select(ir.INT32, cond, inner, self.index(depth - 1), False)
            case "Load":
                return ir.Load(ir.INT32, TABLE, (ir.BinOp(ir.INT32, "bitand", inner, const(7, "int32")),))
            case "Call":
                return ir.Call(ir.INT32, "likely", (inner,))
            case "Broadcast":
                return ir.Broadcast(ir.INT32, inner)
        op = self.rng.choice(INT_OPS)
        self._note(op)
        if op in ("floordiv", "floormod", "truncdiv", "truncmod"):
            right = const(self.rng.choice([1, 2, 3, 4, 7, 8]), "int32")
        elif op in ("mul", "shl", "shr", *BITWISE):
            right = self.small()
        else:
            right = self.index(depth - 1)
        return ir.BinOp(ir.INT32, op, inner, right)

    def cond(self, depth):
        form = self.rng.choice(["BinOp", "BinOp", *sorted(CONDITIONS)]) if depth else "Compare"
        self._note(form)
        match form:
            case "Const":
                return ir.Const(ir.BOOL, self.rng.random() < 0.5)
            case "Not":
                return ir.Not(ir.BOOL, self.cond(depth - 1))
            case "Broadcast":
                return ir.Broadcast(ir.BOOL, self.cond(depth - 1))
            case "Call":
                return ir.Call(ir.BOOL, "likely", (self.cond(depth - 1),))
            case "Cast":
                return ir.Cast(ir.BOOL, self.cond(depth - 1))
            case "Var":
                var = ir.Var(ir.BOOL, f"named{len(self.bound)}")
                self.bound[var] = self.cond(depth - 1)
                return var
            case "BinOp":
                op = self.rng.choice(("and", "or", "bitand", "bitor"))
                self._note(f"bool {op}")
                return ir.BinOp(ir.BOOL, op, self.cond(depth - 1), self.cond(depth - 1))
        op = self.rng.choice(sorted(COMPARE))
        self._note(op)
        return ir.BinOp(ir.BOOL, op, self.index(1), self.index(1))


def symbolic(bound):
    """Return an evaluator whose reads of the table are a function, and the symbols of block and round."""
    algebra = Algebra()
    env = {TX: sym_const(np.arange(THREADS))}
    env |= {v: algebra.var(v.name, 0, VARIABLES[v] - 1) for v in (BX, KO)}
    low, high = ir.INT32.int_range

    def load(self, node):
        return algebra.call("load", ("table", self.int(node.indices[0])), low, high)

    return Evaluator(algebra, env, bound, load=load)


def points(rng, count=6):
    return [{v: rng.randrange(n) for v, n in VARIABLES.items()} for _ in range(count)]


CONTENT = [3, 1, 4, 1, 5, 9, 2, 6]


def at(term, point):
    """Return a term of `symbolic` at a point."""
    known = [(z3.Int(v.name), z3.IntVal(point[v])) for v in (BX, KO)]
    table = z3.Function("content of table", z3.IntSort(), z3.IntSort())
    for _ in range(4):  # as deep as reads may stand in each other
        term = z3.simplify(z3.substitute(term, *known))
        known = [(table(z3.IntVal(i)), z3.IntVal(v)) for i, v in enumerate(CONTENT)]
    return as_int(term)


def _scalar(node):
    """Drop broadcasts to one lane, which a tile program does not have."""
    return build.rewrite(node, lambda n: _scalar(n.value) if isinstance(n, ir.Broadcast) else n)


def interpreted(node, point, bound):
    machine = machine_with(NO_DATA)
    machine.storages[TABLE.data] = trees.Storage(
        trees.dtypes.to_stored(trees.torch.tensor(CONTENT), "int32"), "int32", "global", is_written=True
    )
    machine.env.update(point)
    for var, value in bound.items():
        machine.env[var] = machine.tensor(_scalar(value))
    return int(machine.tensor(_scalar(node)))


PARTS = range(2)


@cache
def compared_indices(part: int) -> frozenset[str]:
    """Compare a half of the indices with the interpreter's values; return the forms compared."""
    compared, met = 0, set()
    for seed in range(part * 80, part * 80 + 80):
        made = Trees(seed)
        node = made.index(3)
        try:
            value = symbolic({}).int(node)
            found = [(p, at(z3_term(value, p[TX]), p)) for p in points(made.rng)]
        except ir.UnsupportedIR:
            continue
        for point, got in found:
            assert got == interpreted(node, point, {}), (node, point)
        compared += 1
        met |= made.seen
    assert compared > 25
    return frozenset(met)


@cache
def compared_conditions() -> frozenset[str]:
    """Compare conditions with the interpreter's values; return the forms compared."""
    compared, met = 0, set()
    for seed in range(120):
        made = Trees(seed)
        node = made.cond(2)
        try:
            cond = symbolic(made.bound).cond(node)
            found = [(p, at(cond.z3_at(p[TX]), p)) for p in points(made.rng)]
        except ir.UnsupportedIR:
            continue
        for point, got in found:
            assert got == interpreted(node, point, made.bound), (node, point)
        compared += 1
        met |= made.seen
    assert compared > 40
    return frozenset(met)


@pytest.mark.parametrize("part", PARTS)
def test_indices_of_refinement_have_the_interpreters_values(part):
    assert compared_indices(part)


def test_conditions_of_refinement_have_the_interpreters_values():
    assert compared_conditions()


def test_lanes_of_refinement_are_the_ramps():
    algebra = Algebra()
    lane = algebra.var("lane", 0, LANES - 1)
    evaluator = Evaluator(algebra, {build.TX: sym_const(np.arange(THREADS))}, lane=lane)
    node = ir.Ramp(ir.DType("int32", LANES), build.mul(build.TX, 8), const(3, "int32"))
    value = evaluator.int(node)
    for number, got in enumerate(stored(node)):
        term = z3_term(value, number)
        assert got == [
            as_int(z3.simplify(z3.substitute(term, (z3.Int("lane"), z3.IntVal(k))))) for k in range(LANES)
        ]


def test_the_comparison_met_every_form():
    """Fails where an expression of some form was never decided."""
    met = compared_conditions().union(*map(compared_indices, PARTS))
    assert {*CONDITIONS, *INTEGERS, *COMPARE} - {"Ramp"} <= met
    assert {f"bool {op}" for op in ("and", "or", "bitand", "bitor")} <= met
    assert set(INT_OPS) - met <= {"bitor", "bitxor"}  # of a computed value: UNSUPPORTED in an index
