"""Conditions at what they are around, and those that data decides taken off what threads do together.

The verifier compares the condition of a store for each thread. Of products and reductions, which threads do
together, it knows no condition that data decides; so both levels note in the place of each of them, thread
by thread, that it is done, and the product itself is compared without those conditions: for all contents.
"""

from dataclasses import replace

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.inline import loads, written

ELECTED, TOGETHER = "elected", "done_together"  # notes
ELECTED_OF = 1025  # sizes of a group in which a thread is elected, 0 for a block
_PRODUCTS = ("gemm", "wgmma_gemm", "reduce")
_OF_PRODUCTS = (
    "initialize_wgmma_descriptor",
    "increase_descriptor_offset",
    "ptx_wgmma_rs",
    "ptx_wgmma_ss",
)
_SCOPE = "lexical_alloc_scope"
_LINE = ir.Span("", -1, 0)  # of notes that something is done together

Guards = tuple[ir.Expr, ...]


class Leaves:
    """Puts a level's conditions around single statements."""

    def __init__(
        self,
        notes: dict[str, ir.Buffer],
        own: frozenset[str],
        reductions: frozenset[ir.Span],
        *,
        device: bool,
    ) -> None:
        """Take what is known of the level.

        Args:
            notes: with ELECTED and TOGETHER.
            own: names of the tile program's storages, notes included: others are the compiler's.
            reductions: lines of the tile program's reductions; the device's statements for one have its line.
            device: whether it is the device's level.
        """
        self.notes, self.own, self.reductions, self.device = notes, own, reductions, device
        self._words = {id(b) for b in notes.values() if b.scope == "local"}
        self._known: set[ir.Var] = set()
        self._run: Guards | None = None  # of the product that the last statement is of
        self._stored: dict[ir.Var, Guards] = {}  # the compiler's temporaries: where they are stored

    def body(self, stmt: ir.Stmt, guards: Guards = ()) -> ir.Stmt:
        """Return a statement so.

        Raises:
            UnsupportedIR: what a condition reads is written under it.
        """
        found = self._leaves(stmt, guards)
        return found[0] if len(found) == 1 else ir.Seq(None, tuple(found))

    def _leaves(self, stmt: ir.Stmt, guards: Guards) -> list[ir.Stmt]:
        self._check_temporaries(stmt, guards)
        match stmt:
            case ir.Seq(stmts=stmts):
                return [leaf for inner in stmts for leaf in self._leaves(inner, guards)]
            case ir.Launch(var=var):
                self._known.add(var)
                return [replace(stmt, body=self.body(stmt.body, guards))]
            case ir.Attr(key=key, body=body) if key == _SCOPE:
                return self._leaves(body, guards)
            case ir.Block() | ir.Attr() | ir.Assume():
                return [replace(stmt, body=self.body(stmt.body, guards))]
            case ir.If():
                return self._branches(stmt, guards)
            case _ if self._is_together(stmt):
                return self._together(stmt, guards)
            case ir.For(var=var, kind=kind):
                self._known.add(var)
                self._run = None
                if kind in ("parallel", "vectorized"):
                    return [_under(guards, stmt)]
                body = self.body(stmt.body, guards)
                self._run = None
                return [replace(stmt, body=body)]
            case ir.Store(buffer=buffer) if self._is_temporary(buffer):
                self._stored.setdefault(buffer.data, guards)
                if not _is_prefix(self._stored[buffer.data], guards) or len(guards) != len(
                    self._stored[buffer.data]
                ):
                    raise UnsupportedIR(f"{buffer.name} is stored under two conditions")
                return [stmt]
            case ir.Store(buffer=buffer):
                self._run = None
                if id(buffer) in self._words:
                    guards = tuple(map(self._elected, guards))
                return [_under(guards, stmt)]
            case ir.Eval():
                return [_under(guards, stmt)]
            case ir.Bind() | ir.Alloc() | ir.Decl():
                return [stmt]
        raise UnsupportedIR(f"{type(stmt).__name__} in the fused kernel")

    def _branches(self, stmt: ir.If, guards: Guards) -> list[ir.Stmt]:
        if changes(stmt.cond, stmt.then, stmt.orelse):
            raise UnsupportedIR("a condition whose operands are written under it")
        found = self._leaves(stmt.then, (*guards, *_parts(stmt.cond)))
        self._run = None
        if stmt.orelse is not None:
            found += self._leaves(stmt.orelse, (*guards, ir.Not(ir.BOOL, stmt.cond)))
            self._run = None
        return found

    # ------------------------------------------------------------------ the compiler's temporaries
    def _is_temporary(self, buffer: ir.Buffer) -> bool:
        return self.device and buffer.scope == "local" and not {buffer.name, buffer.data.name} & self.own

    def _check_temporaries(self, stmt: ir.Stmt, guards: Guards) -> None:
        """Check that the compiler's temporaries, whose stores keep no condition, are read under it.

        Raises:
            UnsupportedIR: one is read elsewhere.
        """
        if not isinstance(stmt, (ir.Store, ir.Eval, ir.Bind, ir.If)):
            return
        exprs = [stmt.cond] if isinstance(stmt, ir.If) else ir.children(stmt)
        for load in (x for e in exprs for x in loads(e)):
            if load.buffer.data in self._stored and not _is_prefix(self._stored[load.buffer.data], guards):
                raise UnsupportedIR(f"{load.buffer.name} is read under another condition")

    # ------------------------------------------------------------------ what threads do together
    def _is_together(self, stmt: ir.Stmt) -> bool:
        match stmt:
            case ir.For(body=body, kind="serial" | "unrolled"):
                return self._is_together(body)
            case ir.Seq(stmts=stmts):
                return bool(stmts) and all(map(self._is_together, stmts))
            case ir.Eval(value=ir.Call(op=op)):
                return op in (_OF_PRODUCTS if self.device else _PRODUCTS)
            case ir.Store(span=span):
                return self.device and span in self.reductions
        return False

    def _together(self, stmt: ir.Stmt, guards: Guards) -> list[ir.Stmt]:
        run, self._run = self._run, guards
        own = _under(tuple(g for g in guards if self._is_known(g)), stmt)
        if run is not None and len(run) == len(guards) and _is_prefix(run, guards):
            return [own]
        note = ir.Store(_LINE, self.notes[TOGETHER], (ir.Const(ir.INT32, 0),), ir.Const(ir.INT32, 1))
        return [_under(guards, note), own]

    def _is_known(self, guard: ir.Expr) -> bool:
        vars_ = {e for e in ir.walk(guard) if isinstance(e, ir.Var)}
        return vars_ <= self._known and not any(isinstance(e, (ir.Load, ir.Call)) for e in ir.walk(guard))

    def _elected(self, guard: ir.Expr) -> ir.Expr:
        """Return that a thread is the elected one as a word of its own."""
        match guard:
            case ir.Call(op="tl_shuffle_elect", args=(ir.Const(value=threads),)):
                word = ir.Load(ir.INT32, self.notes[ELECTED], (ir.Const(ir.INT32, int(threads)),))
                return ir.BinOp(ir.BOOL, "ne", word, ir.Const(ir.INT32, 0))
        return guard


def changes(cond: ir.Expr, *branches: ir.Stmt | None) -> bool:
    """Return whether something under a condition, but for the last store, writes what it reads."""
    read = {load.buffer.data for load in loads(cond)}
    for branch in branches:
        stmts = [] if branch is None else _flat(branch)
        last = stmts[-1:] if stmts and not isinstance(stmts[-1], ir.Store) else []
        if any(written(stmt) & read for stmt in (*stmts[:-1], *last)):
            return True
    return False


def _is_prefix(first: Guards, guards: Guards) -> bool:
    return len(first) <= len(guards) and all(a is b for a, b in zip(first, guards, strict=False))


def _under(guards: Guards, stmt: ir.Stmt) -> ir.Stmt:
    for guard in reversed(guards):
        stmt = ir.If(None, guard, stmt, None)
    return stmt


def _parts(cond: ir.Expr) -> Guards:
    match cond:
        case ir.BinOp(op="and", a=a, b=b):
            return (*_parts(a), *_parts(b))
    return (cond,)


def _flat(stmt: ir.Stmt) -> list[ir.Stmt]:
    if isinstance(stmt, ir.Seq):
        return [leaf for inner in stmt.stmts for leaf in _flat(inner)]
    return [stmt]
