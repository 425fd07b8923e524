"""Which conversion an expression on bits computes, as a function of which part of it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import z3

from verify import ir
from verify.bitvectors import Question
from verify.interp.machine import Machine
from verify.ir import UnsupportedIR
from verify.refine.inline import rewrite
from verify.tricks.catalogue import WITH_SIGN, Meaning, estimate, fixed, scale_of
from verify.tricks.evaluate import AsTerms, Key, OnArrays, key_of, resize

_SAMPLES = 4096  # inputs that a candidate has to agree on before it is proved
_EXHAUSTED = 1 << 16  # domains up to this size are enumerated
_CUTS = 12  # parts of one expression tried as its input


@dataclass(frozen=True)
class Trick:
    """An expression on bits and what it is.

    Attributes:
        meaning: the conversion it computes for every input of the domain; None where there is none.
        cut: the part it is a function of.
        sign: the part whose sign it takes, where it is a function of two.
        how: who decided, for the report.
        nearest: of the conversion that agrees most often: its name and the first input that differs.
        agreement: the share of inputs on which that one agrees.
    """

    expr: ir.Expr
    meaning: Meaning | None
    cut: ir.Expr | None = None
    how: str = ""
    nearest: tuple[str, str] | None = None
    agreement: float = 0.0
    sign: ir.Expr | None = None


def tricks(expr: ir.Expr, around: Trick | None = None) -> Iterator[Trick]:
    """Yield the tricks of a value, outermost first; each reinterpret is in one or is one without meaning.

    Args:
        expr: the value.
        around: of the expressions without meaning that hold `expr`, the one nearest to a conversion.
    """
    if not any(_is_reinterpret(n) for n in ir.walk(expr)):
        return
    if not isinstance(expr, (ir.Ramp, ir.Load, ir.Const, ir.Broadcast)):
        found = identify(expr)
        if found.meaning is not None and found.cut is not None:
            yield found
            yield from tricks(found.cut)
            return
        if (signed := _with_sign(expr)) is not None and signed.cut is not None and signed.sign is not None:
            yield signed
            yield from tricks(signed.cut)
            yield from tricks(signed.sign)
            return
        if around is None or found.agreement > around.agreement:
            around = found
        if _is_reinterpret(expr):
            if _is_constant(expr):
                return
            yield around
    for child in ir.children(expr):
        yield from tricks(child, around)


def _is_reinterpret(node: object) -> bool:
    return isinstance(node, ir.Call) and node.op == "reinterpret"


def _is_constant(expr: ir.Expr) -> bool:
    leaf = (ir.Load, ir.Var, ir.AccessPtr)
    return not any(isinstance(n, leaf) for n in ir.walk(expr))


def identify(expr: ir.Expr) -> Trick:
    """Return what `expr` computes, as a function of the smallest part for which that is known."""
    best: tuple[float, str, str] | None = None
    for cut in parts_that_cut(expr):
        runs: dict[tuple[int, int], _Run | None] = {}
        for meaning in _candidates(expr, cut.expr):
            if meaning.domain not in runs:
                runs[meaning.domain] = _run(expr, cut, meaning.domain)
            run = runs[meaning.domain]
            if run is None:
                continue
            agreement, first = _agreement(expr, run, meaning)
            if first is None:
                how = _prove(expr, cut, meaning)
                if how is not None:
                    return Trick(expr, meaning, cut.expr, how)
            elif best is None or agreement > best[0]:
                best = (agreement, meaning.name, first)
    if best is None:
        return Trick(expr, None)
    return Trick(expr, None, nearest=best[1:], agreement=best[0])


@dataclass(frozen=True)
class Part:
    """A part of an expression, and the identities of all its occurrences."""

    expr: ir.Expr
    ids: frozenset[int]


def parts_that_cut(expr: ir.Expr, besides: frozenset[int] = frozenset()) -> list[Part]:
    """Return the parts, smallest first, on which alone `expr` depends, once `besides` are known."""
    parts: dict[Key, list[ir.Expr]] = {}
    for node in ir.walk(expr):
        if node is not expr and isinstance(node, ir.Expr) and not isinstance(node, (ir.Const, ir.Str)):
            parts.setdefault(key_of(node), []).append(node)
    cuts = (Part(nodes[0], frozenset(id(n) for n in nodes)) for nodes in parts.values())
    return sorted((c for c in cuts if _cut_by(expr, c.ids | besides)), key=lambda c: _size(c.expr))[:_CUTS]


def _cut_by(expr: ir.Expr, ids: frozenset[int]) -> bool:
    """Return whether nothing is read once the parts `ids` are known."""
    stack = [expr]
    while stack:
        node = stack.pop()
        if id(node) in ids:
            continue
        if isinstance(node, (ir.Load, ir.Var, ir.AccessPtr, ir.Region)):
            return False
        stack += [c for c in ir.children(node) if isinstance(c, ir.Expr)]
    return True


def _size(expr: ir.Expr) -> int:
    return sum(1 for _ in ir.walk(expr))


def _candidates(expr: ir.Expr, cut: ir.Expr) -> list[Meaning]:
    found = [*fixed()]
    constants = {float(n.value) for n in ir.walk(expr) if isinstance(n, ir.Const) and not n.dtype.is_int}
    pairs = [(a, b) for a in constants for b in constants if len(constants) <= 4]
    match expr:
        case ir.Call(op="reinterpret", args=(ir.BinOp(op="sub", a=ir.Const(value=value), b=b),)):
            if _bits_of(b) is cut and (meaning := estimate(int(value))) is not None:
                found.append(meaning)
    found += [m for least, factor in pairs if (m := scale_of(least, factor)) is not None]
    return [m for m in found if _fits(cut.dtype, m.source) and _fits(expr.dtype, m.target)]


def _bits_of(expr: ir.Expr) -> ir.Expr | None:
    """Return the float32 whose bits `expr` is, as an int32; None if it is something else."""
    if isinstance(expr, ir.Call) and _is_reinterpret(expr) and expr.dtype.name == "int32":
        return expr.args[0] if expr.args[0].dtype.name == "float32" else None
    return None


def _with_sign(expr: ir.Expr) -> Trick | None:
    """Return `expr` as the magnitude of one float32 with the sign of another, if it is that."""
    if not _is_reinterpret(expr) or expr.dtype.name != "float32":
        return None
    bits = ir.children(expr)[0]
    words: dict[Key, list[ir.Expr]] = {}
    for node in ir.walk(bits):
        if _bits_of(node) is not None:
            words.setdefault(key_of(node), []).append(node)
    parts = [Part(nodes[0], frozenset(id(n) for n in nodes)) for nodes in words.values()]
    for magnitude, sign in itertools.permutations(parts, 2):
        if not _cut_by(bits, magnitude.ids | sign.ids):
            continue
        first, second = z3.BitVec("magnitude", 32), z3.BitVec("sign", 32)
        terms = AsTerms(magnitude.ids, first, magnitude.expr.dtype, dict.fromkeys(sign.ids, second))
        try:
            got = terms(bits)
        except UnsupportedIR:
            continue
        assert WITH_SIGN.on_terms is not None, "it is of terms"
        goal = got == WITH_SIGN.on_terms(z3.Concat(second, first))
        if Question(WITH_SIGN.name, terms.definitions, goal).decide().is_valid:
            of, by = _bits_of(magnitude.expr), _bits_of(sign.expr)
            return Trick(expr, WITH_SIGN, of, "every input, z3 and cvc5", sign=by)
    return None


def _fits(kind: ir.DType, names: tuple[str, ...]) -> bool:
    if kind.name in names:
        return True
    return "int" in names and kind.is_int and kind.name != "bool" and kind.bits <= 32


# --------------------------------------------------------------------------- agreement
def _inputs(cut: ir.Expr, domain: tuple[int, int]) -> np.ndarray:
    """Return inputs as 32-bit patterns: the whole domain where it is small, else its ends and a sample."""
    low, high = domain
    bits = cut.dtype.bits
    if not cut.dtype.is_int or not cut.dtype.is_signed:
        high = min(high, (1 << bits) - 1)
    if high - low < _EXHAUSTED:
        return np.arange(low, high + 1)
    rng = np.random.default_rng(0)
    spread = rng.integers(low, high, _SAMPLES, endpoint=True)
    near = [e + d for e in (low, high) for d in range(-300, 301) if low <= e + d <= high]
    powers = [p for b in range(33) for d in (-1, 0, 1) if low <= (p := (1 << b) + d) <= high]
    return np.unique(np.concatenate([spread, near, powers]).astype(np.int64))


def _as_value(cut: ir.Expr, pattern: np.ndarray) -> np.ndarray:
    """Return 32-bit patterns as values of the type of `cut`, those that it does not have dropped."""
    kind = cut.dtype
    if kind.is_signed:
        return np.where(pattern >= 1 << 31, pattern - (1 << 32), pattern)
    return pattern.astype(np.uint32).view(np.float32) if kind.name == "float32" else pattern


@dataclass(frozen=True)
class _Run:
    """Inputs as 32-bit patterns, and what the expression gives for each."""

    pattern: np.ndarray
    got: np.ndarray


def _run(expr: ir.Expr, part: Part, domain: tuple[int, int]) -> _Run | None:
    cut = part.expr
    pattern = _inputs(cut, domain)
    value = _as_value(cut, pattern)
    if cut.dtype.is_int:
        low, high = cut.dtype.int_range
        keep = (value >= low) & (value <= high)
        pattern, value = pattern[keep], value[keep]
    try:
        got = OnArrays(part.ids, value)(expr)
    except UnsupportedIR:
        return None
    return _Run(pattern, np.broadcast_to(np.asarray(got), pattern.shape))


def _agreement(expr: ir.Expr, run: _Run, meaning: Meaning) -> tuple[float, str | None]:
    """Return the share of inputs on which they agree, and the first on which they do not."""
    pattern, got = run.pattern, run.got
    wanted = np.broadcast_to(meaning.on_arrays(pattern), pattern.shape)
    if expr.dtype.name == "float32":
        bits = np.asarray(got, np.float32).view(np.uint32).astype(np.int64)
        same = (bits == wanted) | (np.isnan(got) & (wanted & 0x7FFFFFFF > 0x7F800000))
    else:
        mask = (1 << expr.dtype.bits) - 1
        same = (got & mask) == (wanted & mask)
    wrong = np.flatnonzero(~same)
    if not len(wrong):
        return 1.0, None
    at = int(wrong[0])
    text = f"input {int(pattern[at]):#x} gives {got[at]!s}, not the value of bits {int(wanted[at]):#x}"
    return float(same.mean()), text


# --------------------------------------------------------------------------- proof
def _prove(expr: ir.Expr, cut: Part, meaning: Meaning) -> str | None:
    if meaning.on_terms is None:
        low, high = meaning.domain
        if high - low >= _EXHAUSTED or not _again(expr, cut, meaning):
            return None
        return f"each of {high - low + 1} inputs, two evaluators"
    question = _question(expr, cut, meaning)
    return "every input, z3 and cvc5" if question is not None and question.decide().is_valid else None


def _question(expr: ir.Expr, cut: Part, meaning: Meaning) -> Question | None:
    assert meaning.on_terms is not None, "decided by the caller"
    kind = cut.expr.dtype
    variable = z3.BitVec("input", kind.bits)
    terms = AsTerms(cut.ids, variable, kind)
    try:
        value = terms(expr)
        got = terms.bits(value)
    except UnsupportedIR:
        return None
    word = resize(variable, 32, kind.is_signed)
    low, high = meaning.domain
    given = [z3.UGE(word, low), z3.ULE(word, high), *terms.definitions]
    wanted = meaning.on_terms(word)
    width = got.size()
    goal = got == resize(wanted, width, False)
    if expr.dtype.name == "float32":
        both = [z3.UGT(b & 0x7FFFFFFF, 0x7F800000) for b in (got, wanted)]
        goal = z3.Or(goal, z3.And(*both))
    return Question(meaning.name, given, goal, "QF_BVFP" if terms.uses_floats else "QF_BV")


def _again(expr: ir.Expr, part: Part, meaning: Meaning) -> bool:
    """Evaluate once more over the whole domain, by the interpreter's arithmetic."""
    pattern = np.arange(meaning.domain[0], meaning.domain[1] + 1)
    cut = part.expr
    var = ir.Var(cut.dtype, "input")

    def replaced(node: ir.Expr) -> ir.Expr | None:
        return var if id(node) in part.ids else None

    machine = Machine()
    machine.lanes.extents.append(len(pattern))
    machine.env[var] = torch.from_numpy(_as_value(cut, pattern).copy())
    got = machine.tensor(rewrite(expr, replaced))
    return bool((got.reshape(-1).numpy() == meaning.on_arrays(pattern)).all())
