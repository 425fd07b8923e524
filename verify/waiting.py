"""Loops that wait for words in memory, as the text of a kernel has them.

`determinism` allows a value that depends on arrival to end a wait and nothing else. What a wait orders is the
same in every run if, once satisfied, it stays so: a counter that only grows is waited for until it is at
least a number. A lock is the counter-example: it is waited for as well, but is free, taken and free again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from verify import ir
from verify.refine.inline import same


@dataclass(frozen=True)
class Wait:
    """A loop that polls one word.

    Attributes:
        loop: its body writes private variables only.
        load: the atomic load of the word.
        goes_on: the part of the condition that has the load.
        others: the other parts.
        stays: once the word has ended the loop, a larger one would have ended it as well.
    """

    loop: ir.While
    load: ir.Call
    goes_on: ir.Expr
    others: tuple[ir.Expr, ...]
    stays: bool


def read_wait(loop: ir.While) -> Wait | None:
    """Return a loop as a wait for one word; None if it does more, or waits in another way."""
    parts = list(_parts(loop.cond))
    polling = [p for p in parts if any(_is_atomic(n) for n in ir.walk(p))]
    if len(polling) != 1 or not _is_private(loop.body):
        return None
    (goes_on,) = polling
    atomics = [n for n in ir.walk(goes_on) if _is_atomic(n)]
    if len(atomics) != 1 or atomics[0].op != "atomic_load_elem_op":
        return None
    others = tuple(p for p in parts if p is not goes_on)
    return Wait(loop, atomics[0], goes_on, others, _ends_for_good(goes_on, atomics[0]))


def _is_atomic(node: object) -> bool:
    return isinstance(node, ir.Call) and node.op.startswith("atomic")


def _parts(condition: ir.Expr) -> Iterator[ir.Expr]:
    if isinstance(condition, ir.BinOp) and condition.op == "and":
        yield from _parts(condition.a)
        yield from _parts(condition.b)
    else:
        yield condition


def _is_private(body: ir.Stmt) -> bool:
    """Return whether a body stores to private variables and changes nothing else."""
    for node in ir.walk(body):
        match node:
            case ir.Store(buffer=buffer) if not buffer.scope.startswith("local"):
                return False
            case ir.Eval() | ir.While() | ir.For():
                return False
            case ir.Call(op=op) if _is_atomic(node) and op != "atomic_load_elem_op":
                return False
    return True


def _ends_for_good(goes_on: ir.Expr, load: ir.Call) -> bool:
    """Return whether a condition that a value of `load` makes false is false for larger values."""
    if not isinstance(goes_on, ir.BinOp):
        return False
    low, high = (goes_on.a, goes_on.b) if goes_on.op in ("lt", "le") else (goes_on.b, goes_on.a)
    return goes_on.op in ("lt", "le", "gt", "ge") and _grows(low, load) and not _has(high, load)


def _grows(value: ir.Expr, load: ir.Call) -> bool:
    """Return whether `value` does not fall when `load` grows."""
    if value is load or not _has(value, load):
        return True
    if isinstance(value, ir.Select) and not _has(value.cond, load):
        return _grows(value.a, load) and _grows(value.b, load)
    return False


def _has(value: ir.Expr, load: ir.Call) -> bool:
    return any(n is load for n in ir.walk(value))


# --------------------------------------------------------------------------- giving up
@dataclass(frozen=True)
class _Leaf:
    """A statement that holds no others, or a loop on a condition, and what it is under."""

    node: ir.Stmt
    under: tuple[tuple[str, object], ...]


def reports(body: ir.Stmt) -> dict[int, ir.Call]:
    """Return, for waits that end otherwise too and say so, the call that says it, by the loop's id.

    The statement behind such a loop is an atomic maximum under the conditions of the loop and the opposite
    of the one part of its condition that may end it otherwise.
    """
    leaves = [leaf for leaf in _leaves(body, ()) if not isinstance(leaf.node, (ir.Bind, ir.Decl, ir.Alloc))]
    found: dict[int, ir.Call] = {}
    for leaf, behind in pairwise(leaves):
        wait = read_wait(leaf.node) if isinstance(leaf.node, ir.While) else None
        if wait is None or len(wait.others) != 1 or not isinstance(behind.node, ir.Eval):
            continue
        call, under = behind.node.value, behind.under
        if not isinstance(call, ir.Call) or call.op != "atomic_max_elem_op" or not under:
            continue
        kind, condition = under[-1]
        if kind != "if" or not isinstance(condition, ir.Expr) or not _opposite(condition, wait.others[0]):
            continue
        if len(under) == len(leaf.under) + 1 and all(map(_alike, leaf.under, under[:-1])):
            found[id(wait.loop)] = call
    return found


def _leaves(node: ir.Stmt, under: tuple[tuple[str, object], ...]) -> Iterator[_Leaf]:
    match node:
        case ir.Seq(stmts=stmts):
            for child in stmts:
                yield from _leaves(child, under)
        case ir.If(cond=cond, then=then, orelse=orelse):
            yield from _leaves(then, (*under, ("if", cond)))
            if orelse is not None:
                yield from _leaves(orelse, (*under, ("else", cond)))
        case ir.While():
            yield _Leaf(node, under)  # what is in it is no business of what stands behind it
        case ir.For(body=body) | ir.Launch(body=body) | ir.Block(body=body):
            yield from _leaves(body, (*under, ("in", node)))
        case ir.Assume(body=body) | ir.Attr(body=body):
            yield from _leaves(body, under)
        case _:
            yield _Leaf(node, under)


def _alike(a: tuple[str, object], b: tuple[str, object]) -> bool:
    if a[0] != b[0] or a[0] == "in":
        return a == b
    return _is_plain(a[1]) and same(a[1], b[1])


def _is_plain(condition: object) -> bool:
    """Return whether equal texts of a condition have equal values where nothing is written between."""
    nodes = list(ir.walk(condition))
    loads = [n for n in nodes if isinstance(n, ir.Load)]
    return not any(isinstance(n, (ir.Call, ir.AccessPtr, ir.Region)) for n in nodes) and all(
        n.buffer.scope.startswith("local") for n in loads
    )


def _opposite(condition: ir.Expr, other: ir.Expr) -> bool:
    """Return whether a comparison of integers is `not other`."""
    if not isinstance(condition, ir.BinOp) or not isinstance(other, ir.BinOp) or not other.a.dtype.is_int:
        return False
    turned = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le"}.get(other.op)
    mirrored = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}
    if turned is None or not _is_plain(condition) or not _is_plain(other):
        return False
    if condition.op == turned:
        return same(condition.a, other.a) and same(condition.b, other.b)
    return condition.op == mirrored[turned] and same(condition.a, other.b) and same(condition.b, other.a)
