"""The tile IR as a list of steps, each an element-wise assignment or a tile operation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from verify import ir, rasterisation
from verify.ir import UnsupportedIR
from verify.refine.inline import Inliner, check_condition, loads, written
from verify.refine.moves import tile_atomic

# Calls of the tile IR that order or hint and move no data.
_WITHOUT_DATA = {
    "tvm_storage_sync",
    "sync_threads",
    "sync_warp",
    "fence_proxy_async",
    "no_set_max_nreg",
    "mbarrier_wait_parity",
    "mbarrier_expect_tx",
    "ptx_arrive_barrier",
    "ptx_arrive_barrier_expect_tx",
    "ptx_commit_group",
    "ptx_cp_async_barrier_noinc",
    "ptx_wait_group",
    "ptx_fence_barrier_init",
    "set_max_nreg",
    "annotate_producer_reg_dealloc",
    "annotate_consumer_reg_alloc",
    "tma_store_arrive",
    "tma_store_wait",
    "wait_wgmma",
    "warpgroup_arrive",
    "warpgroup_commit_batch",
    "warpgroup_wait",
    "warpgroup_fence_operand",
}
# Attributes that schedule work and leave its meaning alone.
_TRANSPARENT = {
    "tl.assume",
    "tl.min_blocks_per_sm",
    "lexical_alloc_scope",
    "pragma_unroll_explicit",
    rasterisation.KEY,  # a place for a block, on both levels: property schedule
}
ROLE = "warp_specialize"  # around what some of the warpgroups do, under a condition on the thread
# Those calls that the device has to execute in the same place.
COMPARED = frozenset(
    {
        "mbarrier_wait_parity",
        "mbarrier_expect_tx",
        "ptx_arrive_barrier",
        "ptx_arrive_barrier_expect_tx",
        "ptx_cp_async_barrier_noinc",
        "ptx_wait_group",
    }
)


@dataclass(frozen=True)
class Loop:
    """A loop around steps; `stages` is its pipeline depth, 1 where it is not pipelined."""

    var: ir.Var
    start: ir.Expr
    extent: ir.Expr
    stages: int
    line: int | None

    @property
    def is_one_round(self) -> bool:
        """Whether the compiler may have written its only round without a loop."""
        return isinstance(self.extent, ir.Const) and self.extent.value == 1


@dataclass
class Step:
    """One thing that the tile program does.

    Attributes:
        number: position in program order.
        lines: source lines that belong to it.
        loops: serial and unrolled loops around it, outermost first.
        guards: conditions under which it happens.
        what: for people.
        dst: buffer written.
    """

    number: int
    span: ir.Span | None
    lines: set[int]
    loops: tuple[Loop, ...]
    guards: tuple[ir.Expr, ...]
    what: str
    dst: ir.Buffer


@dataclass
class Assign(Step):
    """`dst[indices] = value` for all `coordinates`, in any order.

    Attributes:
        together: its threads share the coordinates out; else each executes all of it.
    """

    coordinates: tuple[tuple[ir.Var, int], ...] = ()
    indices: tuple[ir.Expr, ...] = ()
    value: ir.Expr = field(default_factory=lambda: ir.Const(ir.INT32, 0))
    is_copy: bool = False
    together: bool = False


@dataclass
class Gemm(Step):
    """c (+)= a b, with `a` (m, k) or transposed, `b` (k, n) or transposed."""

    a: ir.Region | None = None
    b: ir.Region | None = None
    c: ir.Region | None = None
    trans_a: bool = False
    trans_b: bool = False
    clear: ir.Expr = field(default_factory=lambda: ir.Const(ir.BOOL, False))


def thread_of_starts(region: ir.Region, launch: Mapping[str, tuple[ir.Var, ir.Expr]]) -> ir.Var | None:
    """Return the thread's number where an operand starts at a place that names it, else None.

    Each warpgroup then multiplies its rows of the product, 64 times its number and on, by what its own
    threads name; they have to agree.
    """
    if "threadIdx.x" not in launch:
        return None
    thread = launch["threadIdx.x"][0]
    return thread if any(n is thread for m in region.mins for n in ir.walk(m)) else None


@dataclass
class Reduce(Step):
    """dst = op over dimension `dim` of src, combined with dst unless `clear`."""

    src: ir.Region | None = None
    to: ir.Region | None = None
    op: str = ""
    dim: int = 0
    clear: bool = True


@dataclass(frozen=True)
class Sync:
    """A wait or arrival that the author wrote, before step number `before`."""

    span: ir.Span | None
    call: ir.Call
    loops: tuple[Loop, ...]
    guards: tuple[ir.Expr, ...]
    before: int


@dataclass
class TileProgram:
    """Steps in order, and what they are about.

    Attributes:
        syncs: waits and arrivals that decide which contents a step reads, in order.
        launch: launch variables by tag, with their extents.
        allocs: buffers of the block.
        has_roles: some of its statements are those of a `T.ws`.
    """

    steps: list[Step]
    launch: dict[str, tuple[ir.Var, ir.Expr]]
    allocs: tuple[ir.Buffer, ...]
    syncs: tuple[Sync, ...] = ()
    has_roles: bool = False


def read_tile(function: ir.Function) -> TileProgram:
    """Return the steps of a tile-IR function.

    Raises:
        UnsupportedIR: a statement or tile operation that is not known here.
    """
    reader = _Reader()
    reader.stmt(function.body, _Context())
    return TileProgram(
        reader.steps, reader.launch, tuple(reader.allocs), tuple(reader.syncs), reader.has_roles
    )


@dataclass
class _Context:
    loops: tuple[Loop, ...] = ()
    guards: tuple[ir.Expr, ...] = ()
    role: tuple[ir.Expr, ...] = ()
    coordinates: tuple[tuple[ir.Var, int], ...] = ()
    lines: frozenset[int] = frozenset()
    inline: Inliner = field(default_factory=Inliner)

    def inner(self, **changes: object) -> "_Context":
        values = {
            "loops": self.loops,
            "guards": self.guards,
            "role": self.role,
            "coordinates": self.coordinates,
            "lines": self.lines,
        }
        return _Context(**{**values, "inline": self.inline.copy(), **changes})  # type: ignore[arg-type]


class _Reader:
    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.syncs: list[Sync] = []
        self.launch: dict[str, tuple[ir.Var, ir.Expr]] = {}
        self.allocs: list[ir.Buffer] = []
        self.has_roles = False

    def stmt(self, stmt: ir.Stmt, ctx: _Context) -> None:
        match stmt:
            case ir.Seq(stmts=stmts):
                for inner in stmts:
                    self.stmt(inner, ctx)
            case ir.Launch(var=var, tag=tag, extent=extent, body=body):
                self.launch[tag] = (var, extent)
                self.stmt(body, ctx)
            case ir.Block(allocs=allocs, body=body):
                self.allocs += allocs
                self.stmt(body, ctx)
            case ir.Assume(body=body):
                self.stmt(body, ctx)
            case ir.For():
                self._loop(stmt, ctx)
            case ir.If(then=ir.Attr(key=key, body=body), orelse=None) if key == ROLE:
                # Those threads do all of it: a statement that another thread should have a part in fails.
                self.has_roles = True
                cond = ctx.inline(stmt.cond)
                lines = ctx.lines | ({stmt.span.line} if stmt.span else set())
                self.stmt(body, ctx.inner(role=(*ctx.role, cond), lines=lines))
                ctx.inline.forget(written(stmt))
            case ir.If(cond=cond, then=then, orelse=orelse):
                cond = ctx.inline(cond)
                check_condition(cond, (then, orelse))
                lines = ctx.lines | ({stmt.span.line} if stmt.span else set())  # what is left of a loop's
                self.stmt(then, ctx.inner(guards=(*ctx.guards, cond), lines=lines))
                if orelse is not None:
                    negated = ir.Not(ir.BOOL, cond)
                    self.stmt(orelse, ctx.inner(guards=(*ctx.guards, negated), lines=lines))
                ctx.inline.forget(written(stmt))
            case ir.Bind(var=var, value=value):
                ctx.inline.bind(var, value)
            case ir.Store():
                self._store(stmt, ctx)
            case ir.Eval(value=ir.Call() as call):
                self._call(call, stmt.span, ctx)
                ctx.inline.forget(written(stmt))
            case ir.Attr(body=body, key=key):
                if key not in _TRANSPARENT:
                    raise UnsupportedIR(f"attribute {key} in the tile IR")
                self.stmt(body, ctx)
            case _:
                raise UnsupportedIR(f"{type(stmt).__name__} in the tile IR")

    def _loop(self, loop: ir.For, ctx: _Context) -> None:
        ctx.inline.forget(written(loop.body))
        line = loop.span.line if loop.span else None
        start, extent = ctx.inline(loop.start), ctx.inline(loop.extent)
        if loop.kind in ("parallel", "vectorized"):
            if not isinstance(extent, ir.Const) or not isinstance(start, ir.Const) or start.value != 0:
                raise UnsupportedIR(f"{loop.kind} loop with a symbolic or shifted range")
            coordinates = (*ctx.coordinates, (loop.var, int(extent.value)))
            lines = ctx.lines | ({line} if line else set())
            self.stmt(loop.body, ctx.inner(coordinates=coordinates, lines=lines))
            return
        note = loop.annotations.get("num_stages")
        stages = int(note.value) if isinstance(note, ir.Const) else int(note or 1)
        own = Loop(loop.var, start, extent, max(stages, 1), line)
        self.stmt(loop.body, ctx.inner(loops=(*ctx.loops, own)))

    def _common(self, span: ir.Span | None, ctx: _Context) -> dict:
        lines = set(ctx.lines) | ({span.line} if span else set())
        return {
            "number": len(self.steps),
            "span": span,
            "lines": lines,
            "loops": ctx.loops,
            "guards": ctx.guards,
        }

    def _store(self, store: ir.Store, ctx: _Context) -> None:
        indices = tuple(ctx.inline(i) for i in store.indices)
        value = ctx.inline(store.value)
        common = self._common(store.span, ctx)
        what = f"{store.buffer.name}[...] = ..."
        self.steps.append(
            Assign(
                **common,
                what=what,
                dst=store.buffer,
                coordinates=ctx.coordinates,
                indices=indices,
                value=value,
                together=bool(ctx.coordinates),
            )
        )
        ctx.inline.forget({store.buffer.data})

    def _call(self, call: ir.Call, span: ir.Span | None, ctx: _Context) -> None:
        handlers: dict[str, Callable[[ir.Call, ir.Span | None, _Context], None]] = {
            "copy": self._copy,
            "async_copy": self._copy,
            "tma_copy": self._copy,
            "fill": self._fill,
            "gemm": self._gemm,
            "wgmma_gemm": self._gemm,
            "reduce": self._reduce,
        }
        if call.op in COMPARED:
            args = tuple(ctx.inline(a) for a in call.args)
            own = ir.Call(call.dtype, call.op, args)
            self.syncs.append(Sync(span, own, ctx.loops, (*ctx.role, *ctx.guards), len(self.steps)))
        if call.op in _WITHOUT_DATA:
            return
        update = tile_atomic(call)
        if update is not None:
            buffer, indices, value = update
            self._store(ir.Store(span, buffer, indices, value), ctx)
            return
        if call.op not in handlers:
            raise UnsupportedIR(f"tile operation {call.op}")
        handlers[call.op](call, span, ctx)

    def _region(self, expr: ir.Expr, ctx: _Context) -> ir.Region:
        if not isinstance(expr, ir.Region):
            raise UnsupportedIR("tile operation on something that is not a region")
        mins = tuple(ctx.inline(i) for i in expr.mins)
        return ir.Region(expr.dtype, expr.buffer, mins, expr.extents, expr.mode)

    def _copy(self, call: ir.Call, span: ir.Span | None, ctx: _Context) -> None:
        src, dst = self._region(call.args[0], ctx), self._region(call.args[1], ctx)
        sizes = [_wide(src), _wide(dst)]
        if sizes[0] != sizes[1]:
            raise UnsupportedIR(f"copy between boxes of {sizes[0]} and {sizes[1]}")
        names = tuple(ir.Var(ir.INT32, f"i{k}") for k in range(len(sizes[0])))
        read = ir.Load(src.buffer.dtype, src.buffer, _point(src, names))
        value: ir.Expr = read if src.buffer.dtype == dst.buffer.dtype else ir.Cast(dst.buffer.dtype, read)
        self._assign(span, ctx, dst, names, sizes[0], value, f"copy {src.buffer.name} -> {dst.buffer.name}")

    def _fill(self, call: ir.Call, span: ir.Span | None, ctx: _Context) -> None:
        dst = self._region(call.args[0], ctx)
        sizes = _wide(dst)
        names = tuple(ir.Var(ir.INT32, f"i{k}") for k in range(len(sizes)))
        value = ctx.inline(call.args[1])
        if value.dtype != dst.buffer.dtype:
            value = ir.Cast(dst.buffer.dtype, value)
        self._assign(span, ctx, dst, names, sizes, value, f"fill {dst.buffer.name}")

    def _assign(
        self,
        span: ir.Span | None,
        ctx: _Context,
        dst: ir.Region,
        names: tuple[ir.Var, ...],
        sizes: tuple[int, ...],
        value: ir.Expr,
        what: str,
    ) -> None:
        coordinates = (*ctx.coordinates, *zip(names, sizes, strict=True))
        self.steps.append(
            Assign(
                **self._common(span, ctx),
                what=what,
                dst=dst.buffer,
                coordinates=coordinates,
                indices=_point(dst, names),
                value=value,
                is_copy=isinstance(value, ir.Load) or any(True for _ in loads(value)),
                together=True,
            )
        )

    def _gemm(self, call: ir.Call, span: ir.Span | None, ctx: _Context) -> None:
        a, b, c = (self._region(x, ctx) for x in call.args[:3])
        trans_a, trans_b = (_flag(x) for x in call.args[3:5])
        clear = ctx.inline(call.args[9])
        what = f"gemm {a.buffer.name} x {b.buffer.name} -> {c.buffer.name}"
        self.steps.append(
            Gemm(
                **self._common(span, ctx),
                what=what,
                dst=c.buffer,
                a=a,
                b=b,
                c=c,
                trans_a=trans_a,
                trans_b=trans_b,
                clear=clear,
            )
        )

    def _reduce(self, call: ir.Call, span: ir.Span | None, ctx: _Context) -> None:
        src, dst = self._region(call.args[0], ctx), self._region(call.args[1], ctx)
        op, dim, clear = call.args[2:5]
        if not isinstance(op, ir.Str) or not isinstance(dim, ir.Const):
            raise UnsupportedIR("reduce with computed arguments")
        if "nan_propagate" in call.annotations:
            raise UnsupportedIR("reduce that hands nans on")
        what = f"reduce_{op.value} {src.buffer.name} -> {dst.buffer.name}"
        self.steps.append(
            Reduce(
                **self._common(span, ctx),
                what=what,
                dst=dst.buffer,
                src=src,
                to=dst,
                op=op.value,
                dim=int(dim.value),
                clear=_flag(clear),
            )
        )


def _flag(expr: ir.Expr) -> bool:
    if not isinstance(expr, ir.Const):
        raise UnsupportedIR("computed flag of a tile operation")
    return bool(expr.value)


def _wide(region: ir.Region) -> tuple[int, ...]:
    """Return the extents of a region other than 1."""
    if not all(isinstance(e, ir.Const) for e in region.extents):
        raise UnsupportedIR(f"region of {region.buffer.name} with a symbolic extent")
    return tuple(int(e.value) for e in region.extents if isinstance(e, ir.Const) and e.value != 1)


def _point(region: ir.Region, names: tuple[ir.Var, ...]) -> tuple[ir.Expr, ...]:
    """Return the index of one element: min + coordinate in each dimension that is wider than 1."""
    left = list(names)
    indices = []
    for low, extent in zip(region.mins, region.extents, strict=True):
        wide = isinstance(extent, ir.Const) and extent.value != 1
        indices.append(ir.BinOp(ir.INT32, "add", low, left.pop(0)) if wide else low)
    return tuple(indices)
