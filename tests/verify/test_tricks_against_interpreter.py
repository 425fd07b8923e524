"""Expressions on bits: both evaluators of property `format` against the interpreter, form by form.

`OnArrays` finds the conversion that an expression may be and enumerates small domains, `AsTerms` is what the
solvers prove large ones with. Random expressions of one unknown are evaluated by all three; the operations
that either takes are listed from its source, so that none is added without being compared.
"""

import random
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
import z3

from tests.verify.test_differential import taken
from verify import externs, ir
from verify.bitvectors import Question
from verify.interp.machine import Machine
from verify.refine.inline import rewrite
from verify.tricks import evaluate, expand
from verify.tricks.evaluate import AsTerms, OnArrays

F32, I32, U32 = ir.DType("float32"), ir.DType("int32"), ir.DType("uint32")
SOURCES = ("int32", "uint32", "uint8", "int8", "uint16", "float32", "bfloat16")
INT_OPS = ("add", "sub", "mul", "min", "max", "bitand", "bitor", "bitxor", "shl", "shr")
FLOAT_OPS = ("add", "sub", "mul", "min", "max")
ORDERS = ("eq", "ne", "lt", "le", "gt", "ge")
FLOATS = (0.0, -0.0, 0.5, -3.0, 6.0, 2.0**-126, 1 / 448, 4194304.0, float("inf"))
PURE = [e for e in externs.everything() if e.is_pure]
TREES, POINTS, PROVED_POINTS = 150, 64, 5


class Trees:
    """Random expressions of one unknown; `seen` notes the forms made."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.source = self.rng.choice(SOURCES)
        self.seen: set[str] = set()
        # Of a bfloat16 both evaluators know the bits alone.
        kind = ir.DType("uint16" if self.source == "bfloat16" else self.source)
        self.unknown = ir.Var(kind, "unknown")
        bits = ir.Call(ir.DType("bfloat16"), "reinterpret", (self.unknown,))
        self.cut: ir.Expr = bits if self.source == "bfloat16" else self.unknown

    def of(self, kind: ir.DType, depth: int) -> ir.Expr:
        return self.floats(depth) if kind == F32 else self.integers(kind, depth)

    def leaf(self, kind: ir.DType) -> ir.Expr:
        if self.rng.random() < 0.7:
            if self.cut.dtype == kind:
                return self.cut
            if kind == F32 and self.source == "bfloat16":
                return self._noted("Cast", ir.Cast(F32, self.cut))
            if kind.is_int and self.cut.dtype.is_int:
                return self._noted("Cast", ir.Cast(kind, self.cut))
        if kind == F32:
            return self._noted("Const", ir.Const(F32, float(np.float32(self.rng.choice(FLOATS)))))
        low, high = kind.int_range
        number = self.rng.choice([0, 1, 7, 23, 127, 255, 0x400000, 0x7F800000, high, low])
        return self._noted("Const", ir.Const(kind, max(low, min(number, high))))

    def _noted(self, form: str, node: ir.Expr) -> ir.Expr:
        self.seen.add(form)
        return node

    def shared(self, kind: ir.DType, depth: int, form: str) -> ir.Expr:
        match form:
            case "Select":
                parts = self.cond(depth - 1), self.of(kind, depth - 1), self.of(kind, depth - 1)
                return self._noted(form, ir.Select(kind, *parts, False))
            case "Broadcast":
                return self._noted(form, ir.Broadcast(kind, self.of(kind, depth - 1)))
        other = F32 if kind != F32 else self.rng.choice([I32, U32])
        return self._noted("reinterpret", ir.Call(kind, "reinterpret", (self.of(other, depth - 1),)))

    def integers(self, kind: ir.DType, depth: int) -> ir.Expr:
        if depth == 0:
            return self.leaf(kind)
        form = self.rng.choice(
            ["BinOp"] * 5 + ["Select", "Broadcast", "reinterpret", "Cast", "extern", "truth"]
        )
        if form in ("Select", "Broadcast", "reinterpret"):
            return self.shared(kind, depth, form)
        if form == "Cast":
            through = ir.DType(
                self.rng.choice(["int8", "uint8", "int16", "uint16", "int64", "int32", "uint32"])
            )
            inner = ir.Cast(through, self.integers(self.rng.choice([I32, U32]), depth - 1))
            return self._noted(form, ir.Cast(kind, inner))
        if form == "truth":
            return self._noted("truth", ir.Cast(kind, self.cond(depth - 1)))
        if form == "extern":
            extern = self.rng.choice(PURE)
            words = (self.integers(self.rng.choice([I32, U32]), depth - 1) for _ in extern.word_parameters)
            name = ir.Str(ir.DType("string"), extern.name)
            return self._noted("extern", ir.Call(kind, "call_extern", (name, *words)))
        op = self.rng.choice(INT_OPS)
        left = self.integers(kind, depth - 1)
        is_shift = op in ("shl", "shr")
        right = ir.Const(kind, self.rng.randint(0, 31)) if is_shift else self.integers(kind, depth - 1)
        return self._noted(f"int {op}", ir.BinOp(kind, op, left, right))

    def floats(self, depth: int) -> ir.Expr:
        if depth == 0:
            return self.leaf(F32)
        form = self.rng.choice(["BinOp"] * 4 + ["Select", "Broadcast", "reinterpret", "clamp"])
        if form == "clamp":
            low, high = sorted(self.rng.sample((-6.0, -0.5, 0.25, 1.0, 6.0), 2))
            ends = (ir.Const(F32, low), ir.Const(F32, high))
            return self._noted(form, ir.Call(F32, "clamp", (self.floats(depth - 1), *ends)))
        if form != "BinOp":
            return self.shared(F32, depth, form)
        op = self.rng.choice(FLOAT_OPS)
        node = ir.BinOp(F32, op, self.floats(depth - 1), self.floats(depth - 1))
        return self._noted(f"float {op}", node)

    def cond(self, depth: int) -> ir.Expr:
        form = self.rng.choice(["compare", "compare", "Not", "and", "or", "test"]) if depth > 0 else "compare"
        self.seen.add(form)
        match form:
            case "Not":
                return ir.Not(ir.BOOL, self.cond(depth - 1))
            case "and" | "or":
                return ir.BinOp(ir.BOOL, form, self.cond(depth - 1), self.cond(depth - 1))
            case "test":
                return ir.Cast(ir.BOOL, self.integers(I32, depth - 1))
        kind, op = self.rng.choice([I32, U32, F32]), self.rng.choice(ORDERS)
        self.seen.add(f"{'float' if kind == F32 else 'int'} {op}")
        inner = max(depth - 1, 0)
        return ir.BinOp(ir.BOOL, op, self.of(kind, inner), self.of(kind, inner))

    def points(self) -> np.ndarray:
        """Return values of what is cut, as bits where it is a float."""
        numbers = np.random.default_rng(self.rng.randrange(1 << 30))
        bits = self.unknown.dtype.bits
        edges = [0, 1, (1 << bits - 1) - 1, 1 << bits - 1, (1 << bits) - 1]
        floats = np.array([*FLOATS, float("nan"), 1.5, -7.25], np.float32).view(np.uint32).astype(np.int64)
        more = (
            floats >> 16 if self.source == "bfloat16" else floats if self.source == "float32" else [2, 3, 100]
        )
        pattern = np.concatenate([edges, more, numbers.integers(0, 1 << bits, POINTS)])[:POINTS]
        return pattern.astype(np.int64)


def value_of(source: str, pattern: np.ndarray) -> np.ndarray:
    if source == "float32":
        return pattern.astype(np.uint32).view(np.float32)
    return pattern if source == "bfloat16" else evaluate.wrap(pattern, ir.DType(source))


def interpreted(node: ir.Expr, made: Trees, pattern: np.ndarray) -> np.ndarray:
    machine = Machine()
    machine.lanes.extents.append(len(pattern))
    value = pattern if made.source == "bfloat16" else value_of(made.source, pattern)
    machine.env[made.unknown] = torch.from_numpy(value.copy()).reshape(-1, 1, 1, 1, 1)
    plain = rewrite(node, lambda e: scalar(e.value) if isinstance(e, ir.Broadcast) else None)
    return np.broadcast_to(machine.tensor(plain).reshape(-1).numpy(), pattern.shape)


def scalar(node: ir.Expr) -> ir.Expr:
    return rewrite(node, lambda e: scalar(e.value) if isinstance(e, ir.Broadcast) else None)


def has_bits(node: ir.Expr, made: Trees, pattern: np.ndarray) -> np.ndarray:
    """Return where no nan's bits are looked at: which nan it is, neither side says."""
    found = np.ones(pattern.shape, dtype=bool)
    for part in ir.walk(node):
        if isinstance(part, ir.Call) and part.op == "reinterpret" and part.args[0].dtype == F32:
            found &= ~np.isnan(interpreted(part.args[0], made, pattern))
    return found


def bits_of(value: np.ndarray) -> np.ndarray:
    if value.dtype != np.float32:
        return np.asarray(value).astype(np.int64)
    bits = value.view(np.uint32).astype(np.int64)
    return np.where(np.isnan(value), 0x7FC00000, bits)


def solved(terms: AsTerms, value: z3.ExprRef, variable: z3.BitVecRef, pattern: int) -> int | None:
    """Return a term at one point; the bits of computed floats follow from what defines them."""
    known = [(variable, z3.BitVecVal(pattern, variable.size()))]
    for definition in terms.definitions:
        bits, computed = definition.arg(0).arg(0), definition.arg(1)
        known.append((bits, z3.simplify(z3.fpToIEEEBV(z3.substitute(computed, *known)))))
    found = z3.simplify(z3.substitute(value, *known))
    if z3.is_fp(found):
        if z3.is_true(z3.simplify(z3.fpIsNaN(found))):
            return 0x7FC00000
        found = z3.simplify(z3.fpToIEEEBV(found))
    if z3.is_bool(found):
        return int(z3.is_true(found))
    return found.as_long() if isinstance(found, z3.BitVecNumRef) else None


def made_trees() -> Iterator[tuple[Trees, ir.Expr]]:
    for seed in range(TREES):
        made = Trees(seed)
        yield made, made.of(made.rng.choice([I32, U32, F32]), 3)


@cache
def compared_as_arrays() -> frozenset[str]:
    """Compare values on arrays with the interpreter's; return the forms compared."""
    compared, met = 0, set()
    for made, node in made_trees():
        pattern = made.points()
        cut = frozenset({id(made.cut)})
        got = np.broadcast_to(np.asarray(OnArrays(cut, value_of(made.source, pattern))(node)), pattern.shape)
        keep = has_bits(node, made, pattern)
        want = interpreted(node, made, pattern)
        if node.dtype == F32:
            got = got.astype(np.float32)
        assert np.array_equal(bits_of(got)[keep], bits_of(want)[keep]), (made.source, node)
        compared += bool(keep.any())
        met |= made.seen
    assert compared > TREES // 2
    return frozenset(met)


@cache
def compared_as_terms() -> frozenset[str]:
    """Compare values of terms at points with the interpreter's; return the forms compared."""
    compared, met = 0, set()
    for made, node in made_trees():
        if any(isinstance(e, ir.Call) and e.op == "clamp" for e in ir.walk(node)):
            continue  # terms have none
        pattern = made.points()[:PROVED_POINTS]
        variable = z3.BitVec("unknown", made.unknown.dtype.bits)
        terms = AsTerms(frozenset({id(made.cut)}), variable, made.cut.dtype)
        value = terms(node)
        keep, want = has_bits(node, made, pattern), bits_of(interpreted(node, made, pattern))
        for at in np.flatnonzero(keep):
            got = solved(terms, value, variable, int(pattern[at]))
            assert got is not None
            assert got == int(want[at]) & ((1 << node.dtype.bits) - 1), (made.source, node, hex(pattern[at]))
            compared += 1
        met |= made.seen
    assert compared > TREES
    return frozenset(met)


def test_arrays_have_the_interpreters_values():
    assert compared_as_arrays()


def test_terms_have_the_interpreters_values():
    assert compared_as_terms()


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "shl"])
def test_what_leaves_a_narrow_type_is_not_followed(op, kind):
    """C computes it as int, a vector of it wraps: which of them the compiler emits is not known here."""
    x = ir.Var(ir.DType(kind), "x")
    node = ir.BinOp(x.dtype, op, x, ir.Const(x.dtype, 3))
    cut = frozenset({id(x)})
    low, high = x.dtype.int_range
    with pytest.raises(ir.UnsupportedIR, match="leave"):
        OnArrays(cut, np.arange(low, high + 1))(node)
    assert OnArrays(cut, np.array([4]))(node)[0] == {"add": 7, "sub": 1, "mul": 12, "shl": 32}[op]
    with pytest.raises(ir.UnsupportedIR, match="leave"):
        AsTerms(cut, z3.BitVec("x", x.dtype.bits), x.dtype)(node)


def test_every_form_and_operation_was_compared():
    forms = {"Const", "Broadcast", "Not", "Cast", "Select", "BinOp", "Call"}
    for evaluator in (OnArrays, AsTerms):
        classes, _ = taken(evaluator.__call__)
        assert classes == forms
    met = {f"{kind} {op}" for kind in ("int", "float") for op in ORDERS} | {f"float {op}" for op in FLOAT_OPS}
    met |= {f"int {op}" for op in INT_OPS} | (forms - {"BinOp", "Call"}) | {"reinterpret", "extern", "truth"}
    assert met | {"and", "or", "test", "clamp"} <= compared_as_arrays()
    assert met | {"and", "or", "test"} <= compared_as_terms()
    assert {*evaluate._NP, *evaluate._COMPARE} == {*INT_OPS, *ORDERS} - {"min", "max", "shl", "shr"}
    assert taken(OnArrays._binary)[1] >= {"and", "or", "min", "max", "shl", "shr"}
    named = taken(OnArrays.__call__)[1] | taken(AsTerms.__call__)[1]
    assert {w for w in named if w.isalpha()} == {"reinterpret", "clamp", "bool", "min", "max"}


# --------------------------------------------------------------------------- constants
def test_constants_of_a_trip_are_computed_as_the_interpreter_does():
    rng = random.Random(0)
    ops = ("add", "sub", "mul", "floordiv", "floormod")
    for number in range(200):
        kind = ir.DType(rng.choice(["int32", "uint32"]))
        low, high = kind.int_range
        a, b = (rng.choice([low, -5, 0, 3, 1 << 20, high, rng.randint(low, high)]) for _ in range(2))
        op, trip = ops[number % len(ops)], ir.Var(kind, "trip")
        a, b = max(a, low), max(b, low)
        if b == 0 and op.startswith("floor"):
            continue
        folded = expand._folded(ir.BinOp(kind, op, trip, ir.Const(kind, b)), {trip: a})
        machine = Machine()
        machine.env[trip] = a
        assert isinstance(folded, ir.Const)
        assert folded.value == int(machine.tensor(ir.BinOp(kind, op, trip, ir.Const(kind, b)))), (op, a, b)


def test_a_question_that_is_wrong_at_one_input_is_not_valid():
    """The smallest thing that a proof could overlook."""
    x = z3.BitVec("x", 32)
    assert Question("all", [], x ^ x == 0).decide().is_valid
    assert not Question("but one", [], x != 0x12345678).decide().is_valid
