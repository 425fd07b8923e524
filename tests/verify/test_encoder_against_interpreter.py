"""One misreading cannot bless itself: the prover's encoder and the interpreter evaluate the same trees.

The encoder's term is taken with symbols and then given the point's values; it must be the interpreter's
value wherever the encoder claims to be exact. It does not where integers that no data enters leave their
type (property `overflow` proves that they do not), nor where an untracked symbol is left.
"""

import itertools

import pytest
import torch
import z3
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from verify import ir
from verify.encode import Encoder, Scope, depends_on_data, is_exact
from verify.intarith import BITWISE, COMPARE, WRAPPING, in_range
from verify.interp import dtypes
from verify.interp.errors import InterpreterError
from verify.interp.lanes import Affine
from verify.interp.machine import Machine
from verify.interp.memory import Storage

TYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64")
ARITHMETIC = ("add", "sub", "mul", "min", "max", *BITWISE)
DIVISIONS = ("floordiv", "floormod", "truncdiv", "truncmod")
ELEMENTS = 4  # of each read-only tensor
POINTS = 3


def kind(name):
    return ir.DType(name)


def const(value, name):
    return ir.Const(kind(name), value)


VARS = {name: [ir.Var(kind(name), f"{name}_{i}") for i in range(2)] for name in TYPES}
BUFFERS = {}
for _name in TYPES:
    _data = ir.Var(ir.HANDLE, f"{_name}_data")
    _shape = (const(ELEMENTS, "int32"),)
    BUFFERS[_name] = ir.Buffer(f"{_name}_in", kind(_name), _shape, (), "global", _data, const(0, "int32"))


def values(name):
    low, high = kind(name).int_range
    edges = [v for v in (low, low + 1, -2, -1, 0, 1, 2, 3, 7, high - 1, high) if low <= v <= high]
    near = st.integers(max(low, -100), min(high, 100))
    return st.sampled_from(edges) | near | st.integers(low, high)


# --------------------------------------------------------------------------- trees
def leaves(name):
    loads = st.integers(0, ELEMENTS - 1).map(
        lambda i: ir.Load(kind(name), BUFFERS[name], (const(i, "int32"),))
    )
    return values(name).map(lambda v: const(v, name)) | st.sampled_from(VARS[name]) | loads


@st.composite
def trees(draw, name, depth):
    if depth == 0 or draw(st.integers(0, 5)) == 0:
        return draw(leaves(name))
    again = trees(name, depth - 1)
    shape = draw(st.integers(0, 6))
    if shape <= 1:
        return ir.BinOp(kind(name), draw(st.sampled_from(ARITHMETIC)), draw(again), draw(again))
    if shape == 2:  # an odd divisor is never 0
        odd = ir.BinOp(kind(name), "bitor", draw(again), const(1, name))
        return ir.BinOp(kind(name), draw(st.sampled_from(DIVISIONS)), draw(again), odd)
    if shape == 3:
        bound = const(kind(name).bits - 1, name)
        amount = draw(
            st.integers(0, kind(name).bits - 1).map(lambda v: const(v, name))
            | again.map(lambda e: ir.BinOp(kind(name), "bitand", e, bound))
        )
        return ir.BinOp(kind(name), draw(st.sampled_from(("shl", "shr"))), draw(again), amount)
    if shape == 4:
        source = draw(st.sampled_from(TYPES))
        return ir.Cast(kind(name), draw(trees(source, depth - 1)))
    if shape == 5:
        return ir.Select(
            kind(name), draw(conditions(depth - 1)), draw(again), draw(again), draw(st.booleans())
        )
    var = ir.Var(kind(name), "bound")
    return ir.Let(kind(name), var, draw(again), ir.BinOp(kind(name), "max", var, draw(again)))


@st.composite
def conditions(draw, depth):
    shape = draw(st.integers(0, 3)) if depth else 0
    if shape <= 1:
        name = draw(st.sampled_from(TYPES))
        pair = trees(name, max(depth - 1, 0))
        return ir.BinOp(ir.BOOL, draw(st.sampled_from(sorted(COMPARE))), draw(pair), draw(pair))
    if shape == 2:
        return ir.Not(ir.BOOL, draw(conditions(depth - 1)))
    parts = conditions(depth - 1)
    return ir.BinOp(ir.BOOL, draw(st.sampled_from(("and", "or"))), draw(parts), draw(parts))


@st.composite
def points(draw):
    """Values of the variables at several points, and of the tensors."""
    where = [{v: draw(values(n)) for n in TYPES for v in VARS[n]} for _ in range(POINTS)]
    return where, {n: [draw(values(n)) for _ in range(ELEMENTS)] for n in TYPES}


# --------------------------------------------------------------------------- both evaluations
class Encoded:
    """The encoder's side: terms with symbols, then values at a point."""

    def __init__(self, data):
        self.encoder = Encoder()
        self.encoder.readonly |= {b.data for b in BUFFERS.values()}
        self.symbols = {v: z3.Int(v.name) for vs in VARS.values() for v in vs}
        self.scope = Scope(env=dict(self.symbols), closed=True)
        self.data = data
        self.tables = []
        for name in TYPES:
            for i in range(ELEMENTS):
                load = ir.Load(kind(name), BUFFERS[name], (const(i, "int32"),))
                self.tables.append((self.encoder.term(load, self.scope), z3.IntVal(data[name][i])))

    def at(self, term, point):
        known = [(self.symbols[v], z3.IntVal(value)) for v, value in point.items()]
        placed = z3.simplify(z3.substitute(term, *known))
        return z3.simplify(z3.substitute(placed, *self.tables))

    def fits(self, node, point, scope=None):
        """Return whether no integer free of data leaves its type below `node`."""
        scope = scope or self.scope
        if isinstance(node, ir.Let):
            inner = scope.bind(node.var, self.encoder.term(node.value, scope))
            return self.fits(node.value, point, scope) and self.fits(node.body, point, inner)
        if (isinstance(node, ir.BinOp) and node.op in WRAPPING) or isinstance(node, ir.Cast):
            value = self.encoder.unwrapped(node, scope)
            if not depends_on_data(value) and not z3.is_true(self.at(in_range(node.dtype, value), point)):
                return False
        return all(self.fits(child, point, scope) for child in ir.children(node))


def machine_with(data):
    machine = Machine()
    for name, buffer in BUFFERS.items():
        stored = dtypes.to_stored(torch.tensor(data[name]), name)
        machine.storages[buffer.data] = Storage(stored, name, "global", is_written=True)
    return machine


def plain(value):
    return int(value)


def interpreted(tree, where, data):
    """Return the tree's value at each point: computed one by one, and together as lanes."""
    apart = []
    for point in where:
        machine = machine_with(data)
        machine.env.update(point)
        apart.append(plain(machine.tensor(tree)))
    machine = machine_with(data)
    machine.lanes.extents[0] = len(where)
    for var in where[0]:
        machine.env[var] = torch.tensor([point[var] for point in where])
    together = machine.tensor(tree).broadcast_to(machine.lanes.shape).reshape(-1).tolist()
    return apart, [plain(v) for v in together]


def as_int(term):
    if z3.is_bool(term):
        return int(z3.is_true(term)) if z3.is_true(term) or z3.is_false(term) else None
    return term.as_long() if z3.is_int_value(term) else None


def check(tree, sample):
    where, data = sample
    encoded = Encoded(data)
    try:
        term = encoded.encoder.term(tree, encoded.scope)
    except ir.UnsupportedIR:
        assume(False)  # a bit operation between two computed 64-bit values
        return
    try:
        apart, together = interpreted(tree, where, data)
    except InterpreterError:
        assume(False)  # a promoted shift amount, or the least integer's absolute value
        return
    assert apart == together
    compared = 0
    for point, got in zip(where, apart, strict=True):
        value = encoded.at(term, point)
        if is_exact([value]) and encoded.fits(tree, point):
            want = as_int(value)
            assert want is not None, value
            assert got == want, (point, data)
            compared += 1
    assume(compared)


@settings(max_examples=80)
@given(tree=st.sampled_from(TYPES).flatmap(lambda n: trees(n, 3)), sample=points())
def test_integer_trees(tree, sample):
    check(tree, sample)


@settings(max_examples=40)
@given(tree=conditions(3), sample=points())
def test_conditions(tree, sample):
    check(tree, sample)


# --------------------------------------------------------------------------- single operations
def exact(op, a, b):
    """Return a op b over the integers, as the languages define the operation."""
    truncated = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else 0
    return {
        "add": lambda: a + b,
        "sub": lambda: a - b,
        "mul": lambda: a * b,
        "min": lambda: min(a, b),
        "max": lambda: max(a, b),
        "bitand": lambda: a & b,
        "bitor": lambda: a | b,
        "bitxor": lambda: a ^ b,
        "shl": lambda: a << b,
        "shr": lambda: a >> b,
        "floordiv": lambda: a // b,
        "floormod": lambda: a % b,
        "truncdiv": lambda: truncated,
        "truncmod": lambda: a - truncated * b,
        **{name: lambda name=name: int(COMPARED[name](a, b)) for name in COMPARE},
    }[op]()


COMPARED = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
OPS = (*ARITHMETIC, *DIVISIONS, "shl", "shr", *COMPARE)


def operand_pairs(op, name):
    low, high = kind(name).int_range
    edge = [v for v in (low, -9, -4, -1, 0, 1, 3, 9, high) if low <= v <= high]
    for a, b in itertools.product(edge, repeat=2):
        if op in DIVISIONS and b == 0:
            continue
        if op in ("shl", "shr") and not 0 <= b < kind(name).bits:
            continue
        yield a, b


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("op", OPS)
def test_each_operation_is_the_integers_own(op, name):
    """Encoder before wrapping, encoder on data after it, and interpreter, against Python's integers."""
    left, right = VARS[name]
    result = ir.BOOL if op in COMPARE else kind(name)
    node = ir.BinOp(result, op, left, right)
    wraps = op in WRAPPING
    symbols = {left: z3.Int("a"), right: z3.Int("b")}
    encoder = Encoder()
    scope = Scope(env=dict(symbols), closed=True)
    constant_right = kind(name).bits > 32 and op in BITWISE  # symbolic ones are UNSUPPORTED
    term = None if constant_right else encoder.term(node, scope)
    for a, b in operand_pairs(op, name):
        want = exact(op, a, b)
        wrapped = want if not wraps or op in COMPARE else dtypes.wrap_int(want, kind(name))
        machine = machine_with({n: [0] * ELEMENTS for n in TYPES})
        machine.env.update({left: a, right: b})
        assert int(machine.tensor(ir.Cast(result, node))) == wrapped, (a, b)
        if constant_right:
            term = encoder.term(ir.BinOp(result, op, left, const(b, name)), scope)
        encoded = z3.simplify(
            z3.substitute(term, (symbols[left], z3.IntVal(a)), (symbols[right], z3.IntVal(b)))
        )
        assert as_int(encoded) == want, (a, b)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("op", sorted(WRAPPING))
def test_data_wraps_or_is_untracked(op, name):
    """On data, what does not fit wraps from 32 bits on; of narrower integers nothing is claimed."""
    node_data = [ir.Load(kind(name), BUFFERS[name], (const(i, "int32"),)) for i in range(2)]
    node = ir.BinOp(kind(name), op, *node_data)
    encoded = Encoded({n: [0] * ELEMENTS for n in TYPES})
    term = encoded.encoder.term(node, encoded.scope)
    loads = [encoded.encoder.term(load, encoded.scope) for load in node_data]
    for a, b in operand_pairs(op, name):
        data = {n: [0] * ELEMENTS for n in TYPES} | {name: [a, b, 0, 0]}
        value = z3.simplify(z3.substitute(term, *zip(loads, (z3.IntVal(a), z3.IntVal(b)), strict=True)))
        want = exact(op, a, b)
        if kind(name).bits >= 32 or want == dtypes.wrap_int(want, kind(name)):
            assert as_int(value) == dtypes.wrap_int(want, kind(name)), (a, b)
            assert int(machine_with(data).tensor(node)) == as_int(value), (a, b)
        else:
            assert not is_exact([value])


@pytest.mark.parametrize(("source", "target"), list(itertools.product(TYPES, TYPES)))
def test_casts(source, target):
    node = ir.Cast(kind(target), ir.Load(kind(source), BUFFERS[source], (const(0, "int32"),)))
    low, high = kind(source).int_range
    for value in {low, low + 1, -1, 0, 1, 127, 128, 255, 256, high - 1, high}:
        if low <= value <= high:
            data = {n: [0] * ELEMENTS for n in TYPES} | {source: [value, 0, 0, 0]}
            encoded = Encoded(data)
            want = dtypes.wrap_int(value, kind(target))
            assert as_int(encoded.at(encoded.encoder.term(node, encoded.scope), {})) == want
            assert int(machine_with(data).tensor(node)) == want


# --------------------------------------------------------------------------- lanes and reads
@settings(max_examples=40)
@given(
    tree=trees("int32", 3),
    base=st.integers(-50, 50),
    step=st.integers(-7, 7),
    sample=points(),
)
def test_affine_lanes(tree, base, step, sample):
    """A launch index that the interpreter keeps as base + step * lane, at each lane."""
    where, data = sample
    var = VARS["int32"][0]
    machine = machine_with(data)
    machine.env.update(where[0])
    machine.lanes.extents[0] = POINTS
    machine.env[var] = Affine(base, ((0, step),)) if step else base
    encoded = Encoded(data)
    try:
        got = machine.tensor(tree).broadcast_to(machine.lanes.shape).reshape(-1).tolist()
        term = encoded.encoder.term(tree, encoded.scope)
    except (ir.UnsupportedIR, InterpreterError):
        assume(False)
        return
    for lane in range(POINTS):
        point = where[0] | {var: base + step * lane}
        value = encoded.at(term, point)
        if is_exact([value]) and encoded.fits(tree, point):
            assert int(got[lane]) == as_int(value)


@settings(max_examples=25)
@given(base=trees("int32", 2), stride=st.integers(-9, 9), lanes=st.sampled_from((2, 4)), sample=points())
def test_ramps(base, stride, lanes, sample):
    """Each lane of base + stride * lane: the encoder's lane symbol against scalar evaluation."""
    where, data = sample
    encoded = Encoded(data)
    ramp = ir.Ramp(ir.DType("int32", lanes), base, const(stride, "int32"))
    lane = z3.Int("lane")
    scope = Scope(env=dict(encoded.symbols), closed=True, lane=lane, lanes=lanes)
    try:
        term = encoded.encoder.term(ramp, scope)
        start = interpreted(base, where[:1], data)[0][0]
    except (ir.UnsupportedIR, InterpreterError):
        assume(False)
        return
    assume(encoded.fits(base, where[0]))
    for index in range(lanes):
        value = encoded.at(z3.substitute(term, (lane, z3.IntVal(index))), where[0])
        if is_exact([value]):
            assert as_int(value) == start + stride * index


@given(data=points().map(lambda p: p[1]), index=st.integers(0, ELEMENTS - 1))
@settings(max_examples=15)
def test_reads_of_read_only_tensors_at_computed_places(data, index):
    var = VARS["int32"][0]
    for name in TYPES:
        node = ir.Load(kind(name), BUFFERS[name], (ir.BinOp(ir.INT32, "bitand", var, const(3, "int32")),))
        encoded = Encoded(data)
        term = encoded.at(encoded.encoder.term(node, encoded.scope), {var: index})
        machine = machine_with(data)
        machine.env[var] = index
        assert as_int(term) == int(machine.tensor(node)) == data[name][index]
