"""What is the same in all threads of a set, at one level of the fused kernel.

`verify.sync.uniform` finds it: threads that begin alike, come to the same statements and store the same
values stay alike. Here are the rules that the fused kernel needs besides. What is asked of the threads'
numbers is kept, to be proved: `Numbers` has an expression over the thread's number as values, one a thread,
by which it is found out what is the same, and as a term, for the solvers.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import z3

from verify import intarith, ir
from verify.refine.inline import written
from verify.sync.uniform import OPERATIONS, Uniform

WARP = 32
ELECT = "tl_shuffle_elect"
DESCRIBE = frozenset({"initialize_wgmma_descriptor", "increase_descriptor_offset"})
WGMMA = frozenset({"ptx_wgmma_ss", "ptx_wgmma_rs"})
_THREAD = "threadIdx.x"
_FULL_MASK = 0xFFFFFFFF


class Numbers:
    """Expressions over the thread's number alone, of one function.

    Attributes:
        count: threads of a block.
        bound: what each name stands for.
    """

    def __init__(self, nodes: Sequence[object]) -> None:
        """Take the function's nodes.

        Raises:
            UnsupportedIR: threads are not launched once, in one dimension, or a name stands for two things.
        """
        launches = [n for n in nodes if isinstance(n, ir.Launch) and n.tag == _THREAD]
        if len(launches) != 1 or not isinstance(launches[0].extent, ir.Const):
            raise ir.UnsupportedIR("threads that are not launched once, in one dimension")
        self.thread, self.count = launches[0].var, int(launches[0].extent.value)
        self.bound: dict[ir.Var, ir.Expr] = {}
        for n in nodes:
            if isinstance(n, ir.Bind) and self.bound.setdefault(n.var, n.value) is not n.value:
                raise ir.UnsupportedIR(f"{n.var.name} stands for two things")
        self._values: dict[ir.Expr, np.ndarray | None] = {}

    def values(self, expr: ir.Expr) -> np.ndarray | None:
        """Return the values of an expression over the thread's number alone, by thread; None for another."""
        if expr not in self._values:
            self._values[expr] = self._evaluated(expr)
        return self._values[expr]

    def _evaluated(self, expr: ir.Expr) -> np.ndarray | None:
        match expr:
            case ir.Const(value=value) if expr.dtype.is_int:
                return np.full(self.count, int(value))
            case ir.Var() if expr is self.thread:
                return np.arange(self.count)
            case ir.Var() if expr in self.bound:
                return self.values(self.bound[expr])
            case ir.Not(a=a):
                found = self.values(a)
                return None if found is None else (found == 0).astype(np.int64)
            case ir.BinOp(op=op, a=a, b=b) if op in _ARITHMETIC:
                left, right = self.values(a), self.values(b)
                if left is None or right is None or (op in _OF_NATURALS and not _is_natural(op, left, b)):
                    return None
                return np.asarray(_ARITHMETIC[op](left, right)).astype(np.int64)
            case ir.Call(op="shfl_sync", args=(mask, value, ir.Const(value=lane), ir.Const(value=32))):
                found = self.values(value)
                is_full = isinstance(mask, ir.Const) and int(mask.value) % 2**32 == _FULL_MASK
                asked = np.arange(self.count) // WARP * WARP + int(lane)
                return found[asked] if found is not None and is_full and 0 <= lane < WARP else None
        return None

    def term(self, expr: ir.Expr, thread: z3.ArithRef) -> z3.ArithRef:
        """Return the value of an expression that has `values`, in a thread, for a solver."""
        match expr:
            case ir.Const(value=value):
                return z3.IntVal(int(value))
            case ir.Var():
                return thread if expr is self.thread else self.term(self.bound[expr], thread)
            case ir.Not(a=a):
                return _number(self.term(a, thread) == 0)
            case ir.BinOp(op=op, a=a, b=b):
                return _term(op, self.term(a, thread), self.term(b, thread), expr.dtype)
            case ir.Call(args=(_, value, ir.Const(value=lane), _)):
                return self.term(value, thread / WARP * WARP + int(lane))
        raise AssertionError("values has no others")


class Alike(Uniform):
    """What is the same in threads of one group.

    Attributes:
        facts: expressions over the thread's number that are one value in a group: what is to be proved.
    """

    def __init__(self, body: ir.Stmt, groups: np.ndarray, known: "Known") -> None:
        """Find it.

        Args:
            body: of the kernel, launches included.
            groups: the number of each thread's group; a thread alone in its group is like nobody else.
            known: of the same kernel.
        """
        self._known = known
        self.facts: set[ir.Expr] = set()
        self._elected = False
        super().__init__(body, groups, known.readonly)

    def _statement(self, node: ir.Stmt, together: bool) -> None:
        match node:
            case ir.Eval(value=ir.Call(op=op, args=(ir.Load() as place, *rest))) if op in DESCRIBE:
                self._stores(place.buffer.data, rest, together)
                return
            case ir.If(cond=cond, then=then, orelse=None) if any(map(elects, parts(cond))):
                rest = [p for p in parts(cond) if not elects(p)]
                outer, self._elected = self._elected, True  # one does it: any of them, as far as names go
                self._statement(then, together and all(map(self.holds, rest)))
                self._elected = outer
                return
            case ir.Store(buffer=buffer, indices=indices, value=value):
                if buffer.data in self._known.elements:
                    self._stores(self._known.element(buffer, indices), (value,), together)
                else:
                    self._stores(buffer.data, (value, *indices), together)
            case ir.Bind(var=var, value=value):
                if not (together and self.holds(value)):
                    self.differ.add(var)
            case ir.For(kind="parallel"):
                super()._statement(node, False)  # who does how many of its rounds
            case ir.Eval():
                pass
            case _:
                super()._statement(node, together)
                return
        self.differ |= self._known.called(node)

    def _stores(self, what: ir.Var, values: Sequence[ir.Expr], together: bool) -> None:
        if self._elected or not (together and all(map(self.holds, values))):
            self.differ.add(what)

    def holds(self, expr: ir.Expr) -> bool:
        """Return whether an expression has one value in all threads of a group that evaluate it together."""
        match expr:
            case ir.Var(dtype=ir.HANDLE) if (
                expr not in self._known.numbers.bound
            ):  # a storage, not what is in it
                return expr not in self._known.descriptors or expr not in self.differ
            case ir.Var() if self._known.numbers.values(expr) is not None:
                return self._is_one(expr)
            case ir.AccessPtr() | ir.Region():
                return all(self.holds(c) for c in ir.children(expr))
            case ir.Load(buffer=ir.Buffer(scope="shared.barrier"), indices=indices):
                return all(self.holds(i) for i in indices)  # which mbarrier
            case ir.Load(buffer=buffer, indices=indices) if buffer.data in self._known.elements:
                return self._known.element(buffer, indices) not in self.differ
            case ir.Call(op="handle_add_byte_offset" | "access_ptr", args=args):
                return all(self.holds(a) for a in args)
            case ir.Call(op="shfl_sync") if not self.is_within_warps:
                return self._is_one(expr)
            case ir.BinOp() | ir.Not() | ir.Cast() | ir.Select():
                return all(self.holds(c) for c in ir.children(expr)) or self._is_one(expr)
        return super().holds(expr)

    def _is_one(self, expr: ir.Expr) -> bool:
        """Return whether an expression over the thread's number alone is one value in each group."""
        values = self._known.numbers.values(expr)
        if values is None or not self._is_constant(values):
            return False
        self.facts.add(expr)
        return True

    def _of_thread(self, expr: ir.Expr) -> np.ndarray | None:
        return None  # `_is_one` is asked, which keeps what has to be proved


class Known:
    """What is known of a function for all sets of its threads.

    Attributes:
        numbers: expressions over the thread's number.
        readonly: tensors that it only reads, and not by atomic operations.
        descriptors: storages of descriptors of matrices.
        elements: private variables of which each element is always named by its number: each one's name.
    """

    def __init__(self, function: ir.Function, private: frozenset[str]) -> None:
        """Look through a function; `private`: names of variables of a thread's own.

        Raises:
            UnsupportedIR: there is no such expression, see `Numbers`.
        """
        nodes = list(ir.walk(function.body))
        self.operations = {n.op for n in nodes if isinstance(n, ir.Call)}
        self.numbers = Numbers(nodes)
        self.readonly = _readonly(function, nodes)
        described = [n.args[0] for n in nodes if isinstance(n, ir.Call) and n.op in DESCRIBE]
        self.descriptors = {place.buffer.data for place in described if isinstance(place, ir.Load)}
        self.elements = _elements(nodes, private)
        self._called: dict[ir.Stmt, set[ir.Var]] = {}

    def element(self, buffer: ir.Buffer, indices: tuple[ir.Expr, ...]) -> ir.Var:
        """Return the name of an element."""
        (index,) = indices
        assert isinstance(index, ir.Const), "by its number, always"
        names, number = self.elements[buffer.data], int(index.value)
        return names.setdefault(number, ir.Var(buffer.dtype, f"{buffer.name}[{number}]"))

    def called(self, node: ir.Stmt) -> set[ir.Var]:
        """Return what calls in a statement may write, through pointers; wgmma reads descriptors."""
        if node not in self._called:
            found: set[ir.Var] = set()
            for top in ir.children(node):
                ops = (
                    {n.op for n in ir.walk(top) if isinstance(n, ir.Call)} if isinstance(top, ir.Expr) else ()
                )
                if ops:
                    found |= written(ir.Eval(None, top)) - (self.descriptors if ops <= WGMMA else set())
            self._called[node] = found
        return self._called[node]


def _elements(nodes: Sequence[object], private: frozenset[str]) -> dict[ir.Var, dict[int, ir.Var]]:
    kinds: dict[ir.Var, set[ir.DType]] = {}
    others: set[ir.Var] = set()
    for n in nodes:
        match n:
            case ir.Load(buffer=b, indices=(ir.Const(),)) | ir.Store(buffer=b, indices=(ir.Const(),)):
                kinds.setdefault(b.data, set()).add(b.dtype)
            case ir.Load(buffer=b) | ir.Store(buffer=b) | ir.Region(buffer=b):
                others.add(b.data)
            case ir.AccessPtr(data=data):
                others.add(data)
            case ir.Call(op="address_of" | "access_ptr", args=(ir.Load(buffer=b), *_)):
                others.add(b.data)
            case ir.Call(args=args):
                others |= {a for a in args if isinstance(a, ir.Var)}
    found = [data for data, of in kinds.items() if data.name in private and len(of) == 1]
    return {data: {} for data in found if data not in others}


def _readonly(function: ir.Function, nodes: Sequence[object]) -> set[ir.Var]:
    changed: set[ir.Var] = set()
    for n in nodes:
        match n:
            case ir.Store(buffer=buffer):
                changed.add(buffer.data)
            case ir.AccessPtr(data=data, mode=mode) if mode != "r":
                changed.add(data)
            case ir.Region(buffer=buffer, mode=mode) if mode != "r":
                changed.add(buffer.data)
            case ir.Call(op=op, args=args):
                changed |= {a for a in args if isinstance(a, ir.Var) and a.dtype == ir.HANDLE}
                if op.startswith("atomic") or op in ("address_of", "access_ptr"):
                    changed |= {data for a in args for data in _pointed(a)}
    owned = {*function.params, *(b.data for b in function.buffers.values())}
    return owned - changed


def _pointed(expr: ir.Expr) -> Iterator[ir.Var]:
    """Yield the storage that an operand points into, if it is a pointer."""
    match expr:
        case ir.AccessPtr(data=data):
            yield data
        case ir.Load(buffer=buffer):
            yield buffer.data


def elects(cond: ir.Expr) -> bool:
    """Return whether a condition is that a thread is the elected one."""
    return isinstance(cond, ir.Call) and cond.op == ELECT


def parts(cond: ir.Expr) -> tuple[ir.Expr, ...]:
    """Return conditions that all have to hold."""
    match cond:
        case ir.BinOp(op="and", a=a, b=b):
            return (*parts(a), *parts(b))
    return (cond,)


# --------------------------------------------------------------------------- arithmetic
_OF_NATURALS = frozenset({"floordiv", "floormod", "truncdiv", "truncmod", "bitand", "shr"})
_ARITHMETIC = {**OPERATIONS, "bitand": np.bitwise_and, "shr": np.right_shift}


def _is_natural(op: str, left: np.ndarray, right: ir.Expr) -> bool:
    """Return whether values and terms are the machine's: of naturals, by a number; masks are ones alone."""
    number = int(right.value) if isinstance(right, ir.Const) else -1
    is_mask = op != "bitand" or not number & (number + 1)
    return left.min() >= 0 and is_mask and number >= (0 if op in ("bitand", "shr") else 1)


def _term(op: str, a: z3.ArithRef, b: z3.ArithRef, dtype: ir.DType) -> z3.ArithRef:
    if op in intarith.COMPARE:
        return _number(intarith.COMPARE[op](a, b))
    if op in ("and", "or"):
        return _number((z3.And if op == "and" else z3.Or)(a != 0, b != 0))
    return intarith.bitwise(op, a, b, dtype) if op in intarith.BITWISE else intarith.ARITHMETIC[op](a, b)


def _number(cond: z3.BoolRef) -> z3.ArithRef:
    return z3.If(cond, z3.IntVal(1), z3.IntVal(0))
