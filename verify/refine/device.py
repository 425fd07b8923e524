"""The device IR as a list of sites: every store to a buffer of the program and every data-moving call."""

from dataclasses import dataclass, field

from verify import ir, rasterisation
from verify.ir import UnsupportedIR
from verify.refine.inline import Inliner, check_condition, loads, written
from verify.refine.moves import device_store
from verify.refine.tile import COMPARED, ROLE

_INIT = "ptx_init_barrier_thread_count"
# Calls that order, allocate or hint; what they synchronise is checked by other properties.
_WITHOUT_DATA = {
    "mbarrier_wait_parity",
    "mbarrier_expect_tx",
    "ptx_arrive_barrier",
    "ptx_arrive_barrier_expect_tx",
    _INIT,
    "ptx_fence_barrier_init",
    "ptx_commit_group",
    "ptx_cp_async_barrier_noinc",
    "ptx_wait_group",
    "fence_proxy_async",
    "tvm_storage_sync",
    "sync_warp",
    "set_max_nreg",
    "no_set_max_nreg",
    "prefetch_tma_descriptor",
    "warpgroup_arrive",
    "warpgroup_commit_batch",
    "warpgroup_wait",
    "wait_wgmma",
    "warpgroup_fence_operand",
    "tma_store_arrive",
    "tma_store_wait",
}
_DATA_CALLS = {
    "tma_load",
    "tma_store",
    "ptx_wgmma_rs",
    "ptx_wgmma_ss",
    "initialize_wgmma_descriptor",
    "increase_descriptor_offset",
}
_ARMS = ("then", "else")
ROLE_SCOPE = "kWarpSpecializationScope"
_TRANSPARENT = {
    rasterisation.KEY,
    "lexical_alloc_scope",
    ROLE_SCOPE,
    ROLE,  # beside the condition that says the same
    "storage_alignment",
    "tl.assume",
    "tl.min_blocks_per_sm",
    "pragma_import_c",
}


@dataclass(frozen=True)
class Guard:
    """A condition of an enclosing If, negated in its else branch."""

    cond: ir.Expr
    holds: bool


@dataclass
class Site:
    """A store or data-moving call of the device program.

    Attributes:
        span: of the statement, else of the innermost loop that has one.
        path: enclosing loops and guards, outermost first.
        role: which arm of the warp-specialised program it is in.
        stmt: the statement, without names and temporaries in its expressions.
        arena: for a call, the pointer names in scope (name -> bytes from the start of shared memory).
    """

    span: ir.Span | None
    path: tuple["ir.For | Guard", ...]
    role: str
    stmt: ir.Store | ir.Eval

    @property
    def loops(self) -> tuple[ir.For, ...]:
        """The enclosing loops."""
        return tuple(p for p in self.path if isinstance(p, ir.For))

    @property
    def guards(self) -> tuple[Guard, ...]:
        """The enclosing conditions."""
        return tuple(p for p in self.path if isinstance(p, Guard))


@dataclass
class DeviceProgram:
    """The device function, taken apart.

    Attributes:
        sites: in program order.
        launch: launch variables by tag, with their extents.
        allocs: storage -> buffer it was allocated as; the type there is what pointers count in.
        arena_start: shared storage -> byte offset in the block's dynamic shared memory.
        roles: the arms of a split by threads whose rounds wait for each other, by their sites' role.
        inits: mbarriers that are set up, with their counts.
    """

    sites: list[Site] = field(default_factory=list)
    launch: dict[str, tuple[ir.Var, ir.Expr]] = field(default_factory=dict)
    allocs: dict[ir.Var, ir.Buffer] = field(default_factory=dict)
    arena_start: dict[ir.Var, int] = field(default_factory=dict)
    roles: dict[str, Guard] = field(default_factory=dict)
    inits: list[ir.Call] = field(default_factory=list)


def read_device(function: ir.Function, known: set[str], has_roles: bool = False) -> DeviceProgram:
    """Return the sites of a device function; local storage not named in `known` is the compiler's own.

    With `has_roles` the rounds of a tile program with a `T.ws` may be a loop for each role.

    Raises:
        UnsupportedIR: a statement or call that is not known here.
    """
    reader = _Reader(known, _accumulators(function), set(function.params), has_roles)
    reader.stmt(function.body, (), "all", Inliner())
    return reader.program


def role_split(body: ir.Stmt) -> ir.If | None:
    """Return the If whose arms are the producer and the consumer of a warp-specialised scope.

    Raises:
        UnsupportedIR: there are several.
    """
    stmts = body.stmts if isinstance(body, ir.Seq) else (body,)
    splits = [s for s in stmts if isinstance(s, ir.If) and s.orelse is not None]
    if len(splits) > 1:
        raise UnsupportedIR("warp-specialised scope with several splits")
    return splits[0] if splits else None


def _waiting_rounds(body: ir.Stmt) -> set[str]:
    """Return the names of the counters of loops that wait or arrive."""
    loops = [node for node in ir.walk(body) if isinstance(node, ir.For)]
    return {
        loop.var.name
        for loop in loops
        if any(isinstance(node, ir.Call) and node.op in COMPARED for node in ir.walk(loop.body))
    }


def _accumulators(function: ir.Function) -> set[ir.Var]:
    """Return storages with a store that reads what it overwrites: no expression stands for those."""
    stores = (node for node in ir.walk(function.body) if isinstance(node, ir.Store))
    return {s.buffer.data for s in stores if any(x.buffer.data is s.buffer.data for x in loads(s.value))}


class _Reader:
    def __init__(
        self, known: set[str], accumulators: set[ir.Var], tensors: set[ir.Var], has_roles: bool
    ) -> None:
        self.known = known
        self.has_roles = has_roles
        self.tensors = tensors
        self.accumulators = accumulators
        self.program = DeviceProgram()
        self.split: ir.If | None = None

    def stmt(self, stmt: ir.Stmt, path: tuple, role: str, inline: Inliner) -> None:
        match stmt:
            case ir.Seq(stmts=stmts):
                for inner in stmts:
                    self.stmt(inner, path, role, inline)
            case ir.Launch(var=var, tag=tag, extent=extent, body=body):
                self.program.launch[tag] = (var, extent)
                self.stmt(body, path, role, inline)
            case ir.Assume(body=body):
                self.stmt(body, path, role, inline)
            case ir.Attr(key=key, body=body):
                if key not in _TRANSPARENT:
                    raise UnsupportedIR(f"attribute {key} in the device IR")
                if key == ROLE_SCOPE:
                    self.split = role_split(body)
                self.stmt(body, path, role, inline)
            case ir.Alloc(buffer=buffer):
                self._alloc(buffer, inline)
            case ir.Decl():
                return
            case ir.For(start=start, extent=extent, body=body):
                inline.forget(written(body))
                loop = ir.For(
                    stmt.span, stmt.var, inline(start), inline(extent), stmt.kind, body, stmt.annotations
                )
                inner = inline.copy()
                inner.range(loop.var, loop.start, loop.extent)
                self.stmt(body, (*path, loop), role, inner)
            case ir.If():
                self._branches(stmt, path, inline, self._roles(stmt, role, inline))
            case ir.Bind(var=var, value=value):
                self._bind(var, value, inline)
            case ir.Store(buffer=buffer, indices=indices, value=value):
                self._store(stmt, buffer, tuple(map(inline, indices)), inline(value), path, role, inline)
            case ir.Eval(value=ir.Call() as call):
                self._call(stmt, call, path, role, inline)
            case _:
                raise UnsupportedIR(f"{type(stmt).__name__} in the device IR")

    def _roles(self, stmt: ir.If, role: str, inline: Inliner) -> tuple[str, str]:
        """Return the roles of both arms.

        Raises:
            UnsupportedIR: threads are split several times.
        """
        if stmt is self.split:
            return "producer", "consumer"
        thread = self.program.launch.get("threadIdx.x", (None,))[0]
        cond = inline(stmt.cond)
        by_thread = all(e is thread for e in ir.walk(cond) if isinstance(e, (ir.Var, ir.Load)))
        if not self.has_roles or role != "all" or stmt.orelse is None or not by_thread:
            return role, role
        if not _waiting_rounds(stmt.then) & _waiting_rounds(stmt.orelse):
            return role, role
        if self.program.roles or self.split is not None:
            raise UnsupportedIR("threads that are split into roles several times")
        self.program.roles = {_ARMS[0]: Guard(cond, True), _ARMS[1]: Guard(cond, False)}
        return _ARMS

    def _branches(self, stmt: ir.If, path: tuple, inline: Inliner, roles: tuple[str, str]) -> None:
        cond = inline(stmt.cond)
        check_condition(cond, (stmt.then, stmt.orelse))
        if roles[0] != roles[1]:  # the arms run side by side: neither knows what the other's storages hold
            inline.forget(written(stmt))
        self.stmt(stmt.then, (*path, Guard(cond, True)), roles[0], inline.copy())
        if stmt.orelse is not None:
            self.stmt(stmt.orelse, (*path, Guard(cond, False)), roles[1], inline.copy())
        inline.forget(written(stmt))

    def _alloc(self, buffer: ir.Buffer, inline: Inliner) -> None:
        self.program.allocs[buffer.data] = buffer
        if buffer.scope == "shared.dyn":
            self.program.arena_start.setdefault(buffer.data, 0)
        own = buffer.scope == "local" and not ({buffer.name, buffer.data.name} & self.known)
        if own and buffer.data not in self.accumulators:
            inline.temporaries.add(buffer.data)
            inline.contents[buffer.data] = []

    def _bind(self, var: ir.Var, value: ir.Expr, inline: Inliner) -> None:
        match value:
            case ir.Call(op="handle_add_byte_offset", args=(ir.Var(), ir.Const(value=offset))):
                self.program.arena_start[var] = int(offset)
            case _ if var.dtype.name == "handle":
                raise UnsupportedIR(f"pointer {var.name} to a computed address")
            case _:
                inline.bind(var, value)

    def _store(
        self,
        stmt: ir.Store,
        buffer: ir.Buffer,
        indices: tuple[ir.Expr, ...],
        value: ir.Expr,
        path: tuple,
        role: str,
        inline: Inliner,
    ) -> None:
        if buffer.data in inline.temporaries:
            inline.store(buffer, indices, value)
            return
        inline.forget({buffer.data})
        self._site(ir.Store(stmt.span, buffer, indices, value), path, role)

    def _call(self, stmt: ir.Eval, call: ir.Call, path: tuple, role: str, inline: Inliner) -> None:
        if call.op in COMPARED:
            self._site(
                ir.Eval(stmt.span, ir.Call(call.dtype, call.op, tuple(map(inline, call.args)))), path, role
            )
        if call.op == _INIT:
            self.program.inits.append(ir.Call(call.dtype, call.op, tuple(map(inline, call.args))))
        if call.op in _WITHOUT_DATA:
            return
        moved = device_store(stmt.span, ir.Call(call.dtype, call.op, tuple(map(inline, call.args))))
        if moved is not None:
            inline.forget({moved.buffer.data})
            self._site(moved, path, role)
            return
        if call.op not in _DATA_CALLS:
            raise UnsupportedIR(f"device call {call.op}")
        args = tuple(inline(a) for a in call.args)
        # A tensor map does not name its tensor here: whatever was read of any may be another now.
        inline.forget(written(stmt) | (self.tensors if call.op == "tma_store" else set()))
        self._site(ir.Eval(stmt.span, ir.Call(call.dtype, call.op, args, call.annotations)), path, role)

    def _site(self, stmt: ir.Store | ir.Eval, path: tuple, role: str) -> None:
        spans = [p.span for p in path if isinstance(p, ir.For) and p.span is not None]
        span = stmt.span or (spans[-1] if spans else None)
        self.program.sites.append(Site(span, path, role, stmt))
