"""What threads of the fused kernel do together is decided by what is the same in them: claim `uniform`.

At both levels, for each statement that several threads come to: a *set* is what the conditions on the
thread's number alone leave of the block (a role, a warp or two of it). By induction over what two threads of
a set do, through all rounds of their loops: variables are the same in both as long as every store to them is
made by both, or by none, and of a value that is the same. Words that may be in it are those of tensors that
the kernel only reads; of all others (words that are polled, what atomic operations find, shared memory) each
thread is taken to find its own. `refine_alike` finds the variables of which that holds; what it takes to be
so of the threads' numbers both solvers prove, of any two of a set. What is not the same decides nothing here:

| What | is the same in |
|---|---|
| private variables in conditions, rounds, places and operands, of whatever several threads do | the set |
| conditions and rounds around what threads do together, at both levels | the set |
| operands of waits and arrivals at mbarriers, bulk copies, barriers, elections | the set |
| descriptors and operands of wgmma | each warpgroup, of which whole ones come |
| lane and mask of a shuffle | each warp |

So whichever thread is elected does the same, if it does nothing but copy, arrive, expect bytes and set
mbarriers up; what else it did would be UNKNOWN.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import z3

from megamoe.refine_alike import DESCRIBE, ELECT, WARP, WGMMA, Alike, Known, elects, parts
from megamoe.ring import given
from verify import ir, ops
from verify.properties import Claims, Issue
from verify.solve import Obligation
from verify.text import show

ASSUMPTIONS = (
    "uniform: private variables are written before they are read (claim `init` of the suites `properties`)",
    "uniform: what the kernel only reads, nobody writes while it runs, and it overlaps no other tensor",
    "uniform: a warp runs converged where all of its threads come to a call (claims `barrier` of the suites "
    "`machine`); `elect.sync` names one of the threads that ask",
)
_WARPGROUP = 128
_PRIVATE = ("local", "local.var")
# fmt: off
# All of what they are told is the same; of these, what an elected thread may do.
_BY_ELECTED = frozenset({
    "tma_load", "ptx_arrive_barrier", "ptx_arrive_barrier_expect_tx", "prefetch_tma_descriptor",
    "ptx_init_barrier_thread_count", "ptx_fence_barrier_init",
})
_SAME = _BY_ELECTED | {
    "mbarrier_wait_parity", "tvm_storage_sync", "sync_grid", "sync_warp", "set_max_nreg", "wait_wgmma",
    "warpgroup_arrive", "warpgroup_commit_batch", "warpgroup_fence_operand", ELECT,
}
# Whole warps do them, or warpgroups, or a block.
_WARPS = {ELECT: WARP, "sync_warp": WARP, "shfl_sync": WARP, "ptx_stmatrix": WARP, "tvm_storage_sync": WARP}
_WARPGROUPS = {"set_max_nreg", "wait_wgmma", "warpgroup_arrive", "warpgroup_commit_batch", *DESCRIBE, *WGMMA}
_OF_TILE = frozenset({"copy", "tma_copy", "fill", "reduce", "wgmma_gemm"})
_MATRICES = frozenset({"ptx_stmatrix"})  # each thread names a row
_SHUFFLES = frozenset({"shfl_sync"})
# One thread's own: no other takes part. A reduction is a `call_extern`, too.
_OWN = frozenset({
    "exp", "reinterpret", "ieee_fmaf", "pack_b16", "address_of", "access_ptr", "handle_add_byte_offset",
    "fence_proxy_async", "atomic_add_ret_elem_op", "atomic_load_elem_op", "atomic_max_elem_op",
    "atomic_store_elem_op", "call_extern",
})
# fmt: on
_WHOLE = {**_WARPS, **dict.fromkeys(_WARPGROUPS, _WARPGROUP)}
_KNOWN = _SAME | _OF_TILE | _MATRICES | _SHUFFLES | _OWN | DESCRIBE | WGMMA


def claims(tile: ir.Function, device: ir.Function) -> Claims:
    """Return what has to be proved of a kernel's tile program and of what is compiled of it."""
    found = Claims(assumptions=list(ASSUMPTIONS))
    allocs = [b for n in ir.walk(tile.body) if isinstance(n, ir.Block) for b in n.allocs]
    private = frozenset(b.name for b in allocs if b.scope in _PRIVATE and b.dtype.is_int)
    for level, function in (("tile", tile), ("device", device)):
        try:
            _Level(level, function, private, found).run()
        except ir.UnsupportedIR as error:
            found.unsupported.append(Issue(None, f"{level}: {error}"))
    return found


@dataclass(frozen=True)
class _Place:
    """Where a statement stands: who comes there, what decides it, whether one of them is elected."""

    threads: np.ndarray
    decides: tuple[ir.Expr, ...] = ()
    elected: bool = False

    def within(self, *decides: ir.Expr) -> "_Place":
        return _Place(self.threads, (*self.decides, *decides), self.elected)


@dataclass
class _Level:
    """One level; `private`: names of the tile program's integer variables of a thread's own."""

    name: str
    function: ir.Function
    private: frozenset[str]
    found: Claims
    sets: dict[tuple[bytes, int], Alike] = field(default_factory=dict)
    statements: int = 0
    variables: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.known = Known(self.function, self.private)
        self.numbers = self.known.numbers
        if unknown := self.known.operations - _KNOWN:
            raise ir.UnsupportedIR(f"whether threads do {', '.join(sorted(unknown))} together")

    def run(self) -> None:
        """Add what is claimed of the level."""
        self._walk(self.function.body, _Place(np.ones(self.numbers.count, dtype=bool)))
        for (threads, size), alike in self.sets.items():
            self.found.obligations.append(self._claim(np.frombuffer(threads, dtype=bool), size, alike))
        self.found.notes.append(
            f"{self.name}: {self.statements} statements of several threads, by {len(self.sets)} sets, "
            f"are decided by {', '.join(sorted(self.variables))}"
        )

    # ------------------------------------------------------------------ sets
    def _of(self, threads: np.ndarray, size: int = 0) -> Alike:
        """Return what is the same in a set; `size`: in its threads of one group of so many."""
        key = threads.tobytes(), size
        if key not in self.sets:
            own = np.arange(self.numbers.count)
            together = own // size if size else np.zeros_like(own)
            groups = np.where(threads, together, self.numbers.count + own)
            self.sets[key] = Alike(self.function.body, groups, self.known)
        return self.sets[key]

    def _claim(self, threads: np.ndarray, size: int, alike: Alike) -> Obligation:
        """Return that all that is asked of the threads' numbers is one value in any two of a set."""
        one, other = z3.Ints("thread other")
        edges = np.flatnonzero(np.diff(np.concatenate(([0], threads.astype(np.int8), [0]))))
        spans = [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        inside = [z3.Or(*(z3.And(t >= a, t < b) for a, b in spans)) for t in (one, other)]
        group = [one / size == other / size] if size else []
        terms = ((self.numbers.term(e, one), self.numbers.term(e, other)) for e in alike.facts)
        goals = {goal.get_id(): goal for goal in (a == b for a, b in terms)}
        text = ", ".join(f"{a} to {b - 1}" for a, b in spans) + (f", {size} at a time" if size else "")
        what = f"{self.name}: threads {text}, compute alike"
        return Obligation(what, None, given(*inside, *group), z3.And(z3.BoolVal(True), *goals.values()))

    # ------------------------------------------------------------------ statements
    def _walk(self, node: ir.Stmt, at: _Place) -> None:
        if not at.threads.any():
            return
        match node:
            case ir.Seq(stmts=stmts):
                for stmt in stmts:
                    self._walk(stmt, at)
            case ir.If():
                self._branches(node, at)
            case ir.For(start=start, extent=extent, body=body, kind=kind):
                if kind == "parallel":
                    self._site(node, at.within(start, extent))
                self._walk(body, at.within(start, extent))
            case ir.While(cond=cond, body=body):
                self._walk(body, at.within(cond))
            case ir.Launch() | ir.Attr() | ir.Assume() | ir.Block():
                self._walk(node.body, at)
            case ir.Store() | ir.Bind() | ir.Eval():
                self._site(node, at)
            case ir.Alloc() | ir.Decl():
                pass
            case _:
                raise ir.UnsupportedIR(f"{type(node).__name__} in the fused kernel")

    def _branches(self, node: ir.If, at: _Place) -> None:
        threads, decides, elected = at.threads, list[ir.Expr](), at.elected
        for part in parts(node.cond):
            values = self.numbers.values(part)
            if values is not None:
                threads = threads & (values != 0)
            elif elects(part):
                self._site(ir.Eval(node.span, part), _Place(threads, (*at.decides, *decides), at.elected))
                elected = True
            else:
                decides.append(part)
        self._walk(node.then, _Place(threads, (*at.decides, *decides), elected))
        if node.orelse is None:
            return
        values = self.numbers.values(node.cond)
        if values is not None:
            self._walk(node.orelse, _Place(at.threads & (values == 0), at.decides, at.elected))
        elif elected != at.elected:
            raise ir.UnsupportedIR("something that those do who are not elected")
        else:
            self._walk(node.orelse, at.within(node.cond))

    def _site(self, node: ir.Stmt, at: _Place) -> None:
        """Look at a statement, not at what is inside it."""
        calls = [] if isinstance(node, ir.For) else [n for n in ir.walk(node) if isinstance(n, ir.Call)]
        for call in calls:
            if (part := self._part(call, at.threads)) is not None:
                self._open(node, f"{call.op} by {part}")
        if at.threads.sum() == 1:
            return
        self.statements += 1
        same = self._of(at.threads)
        if at.elected and not _is_plain(node):
            self._open(node, "an elected thread does more than to copy and to arrive")
        for load in self._variables(node, at):
            if not same.holds(load):
                self._open(node, f"{show(load)} may differ between threads that come here")
        together = at.elected or isinstance(node, ir.For)
        for call in calls:
            done = self._together(call, at)
            if done is None:
                continue
            together, (alike, operands) = True, done
            for operand in operands:
                if not alike.holds(operand):
                    self._open(node, f"{call.op}: {show(operand)} may differ between threads that do it")
        for cond in at.decides if together else ():
            if not same.holds(cond):
                self._open(node, f"{show(cond)} decides what threads do together, and may differ")

    def _together(self, call: ir.Call, at: _Place) -> tuple[Alike, Sequence[ir.Expr]] | None:
        """Return who does a call together, and what of it has to be the same; None: each thread by itself."""
        if call.op in _SAME or call.op in _OF_TILE:
            return self._of(at.threads), call.args
        if call.op in DESCRIBE or call.op in WGMMA:
            return self._of(at.threads, _WARPGROUP), call.args
        if call.op in _SHUFFLES:
            mask, _, *rest = call.args
            return self._of(at.threads, WARP), (mask, *rest)
        if call.op in _MATRICES:
            return self._of(at.threads), call.args[:2]
        if ops.all_reduce(call) is not None:
            return self._of(at.threads), ()
        return None

    def _part(self, call: ir.Call, threads: np.ndarray) -> str | None:
        """Return that less threads come than a call is for, or more; None if it is all of them."""
        size = WARP if ops.all_reduce(call) is not None else _WHOLE.get(call.op, 1)
        if not _is_whole(threads, size):
            return f"part of {size} threads"
        count = self.numbers.count
        match call:
            case ir.Call(op="tvm_storage_sync", args=(_, _, ir.Const(value=wanted))) if wanted:
                count = int(wanted)
            case ir.Call(op="tvm_storage_sync" | "sync_grid"):
                pass
            case _:
                return None
        return None if threads.sum() == count else f"{threads.sum()} threads, for {count}"

    def _variables(self, node: ir.Stmt, at: _Place) -> Iterator[ir.Load]:
        """Yield reads of private variables that decide a statement, where it is, and where it reads.

        What is stored to a private variable is the thread's own, and so is where an atomic operation is.
        """
        match node:
            case ir.Store(buffer=buffer, indices=indices, value=value) if buffer.name not in self.private:
                tops: tuple[ir.Expr, ...] = (*indices, *_places(value))
            case ir.For():
                tops = ()
            case ir.Eval(value=ir.Call(op=op, args=args)) if op not in _OWN:
                tops = args
            case _:
                return
        left, seen = [*at.decides, *tops], set[ir.Expr]()
        while left:
            for n in ir.walk(left.pop()):
                if n in seen:
                    continue
                if isinstance(n, ir.Var) and n in self.numbers.bound:
                    seen.add(n)
                    left.append(self.numbers.bound[n])
                elif isinstance(n, ir.Load) and n.buffer.name in self.private:
                    seen.add(n)
                    self.variables.add(n.buffer.name)
                    yield n

    def _open(self, node: ir.Stmt, what: str) -> None:
        self.found.unknown.append(Issue(node.span, f"{self.name}: {what}"))


def _places(expr: ir.Expr) -> Iterator[ir.Expr]:
    """Yield where an expression reads, and the conditions on which it does."""
    for n in ir.walk(expr):
        match n:
            case ir.Load(indices=indices):
                yield from indices
            case ir.AccessPtr(offset=offset):
                yield offset
            case ir.Select(cond=cond, lazy=True):
                yield cond


def _is_plain(node: ir.Stmt) -> bool:
    """Return whether a statement does the same whoever does it, if it is told the same."""
    match node:
        case ir.Eval(value=ir.Call(op=op)):
            return op in _BY_ELECTED
    return isinstance(node, ir.Bind)


def _is_whole(threads: np.ndarray, size: int) -> bool:
    groups = threads.reshape(-1, size) if len(threads) % size == 0 else np.array([[True, False]])
    return bool((groups.all(1) | ~groups.any(1)).all())
