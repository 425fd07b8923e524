"""Execution of statements over all lanes at once.

Each T.Parallel loop is one more lane axis. Control flow that differs between lanes runs under a mask.
"""

import contextlib
import math
from collections.abc import Iterator

import torch

from verify import externs, ir
from verify.externs import elements
from verify.interp import dtypes, folds, memory, tileops, vectors
from verify.interp.errors import InterpreterError
from verify.interp.exprs import Expressions, UnboundError
from verify.interp.lanes import FIXED_AXES, THREAD_AXIS, Affine, Value, both, holds_anywhere
from verify.interp.progress import Progress

_MAX_WHILE_TRIPS = 1 << 20
# Ordering and scheduling only: without meaning where every lane runs each statement together.
_SCHEDULING = frozenset(
    {
        "tvm_storage_sync",
        "sync_warp",
        "fence_proxy_async",
        "pdl_sync",
        "pdl_trigger",
        "set_max_nreg",
        "no_set_max_nreg",
        "annotate_producer_reg_dealloc",
        "annotate_consumer_reg_alloc",
        "warpgroup_arrive",
        "warpgroup_commit_batch",
        "warpgroup_wait",
        "wait_wgmma",
        "cp_async_commit",
        "ptx_commit_group",
        "ptx_wait_group",
        "tma_store_arrive",
        "tma_store_wait",
        "mbarrier_wait_parity",  # for what comes before in program order, which property `mbarrier` proves
        "ptx_arrive_barrier",
        "ptx_cp_async_barrier_noinc",
        "reducer_fence",
        "sync_grid",  # the whole grid runs together
    }
)
# Annotations that place or schedule work and leave its meaning alone.
_NEUTRAL_ATTRS = frozenset(
    {
        "threadblock_swizzle_pattern",
        "tl.assume_requires_runtime_check",
        "tl.min_blocks_per_sm",
        "tl.ws_op_id",
        "tl.ws_pipeline_depth",
        "warp_specialize",  # beside a condition on the thread index, which says the same
    }
)
_NEUTRAL_BLOCK_NOTES = frozenset(
    {
        "barrier_init",
        "l2_hit_ratio_map",
        "lexical_alloc_scope",
        "reducer_info_v2",
        "pragma_import_c",
        "tl.launch_threads",
        "tl.non_restrict_params",
        "tl.smem_alignment_map",
        "tl.ws_schedule",
    }
)
_DEVICE_ASSERTS = frozenset({"device_assert", "device_assert_with_msg"})
_BREAKS = frozenset({"break_loop", "loop_break"})


class _BreakError(Exception):
    """All active lanes leave the innermost loop."""


class Statements(Expressions):
    """Runs statements other than a launch, which a subclass adds; attributes as in Expressions.

    Attributes:
        span: the Python line of the statement that is running.
        progress: what shows how far a launch is, None outside one.
        reducers: what each reducer combines by, by its pointer.
    """

    def __init__(self) -> None:
        """Start outside any statement."""
        super().__init__()
        self.span: ir.Span | None = None
        self.progress: Progress | None = None
        self.reducers: dict[ir.Var, str] = {}
        # Lanes that have left: the kernel (first entry) and each enclosing loop.
        self._left: list[torch.Tensor | None] = []

    def execute(self, stmt: ir.Stmt) -> None:
        """Run `stmt` for the active lanes."""
        if not self.is_active:
            return
        method = _METHODS.get(type(stmt))
        if method is None:
            raise ir.UnsupportedIR(f"statement {type(stmt).__name__}")
        if stmt.span is not None:
            self.span = stmt.span
        if self.progress is not None:
            self.progress.tick(self.span)
        getattr(self, method)(stmt)

    # ------------------------------------------------------------------ scopes
    @contextlib.contextmanager
    def block_wide(self) -> Iterator[None]:
        """Run once for a thread block what its threads share out: the thread axis has extent 1."""
        if self.is_block_wide:
            yield
            return
        threads, before = self.lanes.extents[THREAD_AXIS], self.mask
        self.is_block_wide = True
        self.lanes.extents[THREAD_AXIS] = 1
        if before is not None and before.dim() > THREAD_AXIS:
            self.mask = before.any(-1 - THREAD_AXIS, keepdim=True)
        try:
            yield
        finally:
            self.is_block_wide, self.mask = False, before
            self.lanes.extents[THREAD_AXIS] = threads

    @contextlib.contextmanager
    def tile_axes(self, extents: tuple[int, ...] | list[int], *buffers: ir.Buffer) -> Iterator[None]:
        """Add a lane axis for each dimension of a tile, the first at FIXED_AXES.

        An op on one of `buffers` that belongs to a thread runs in each thread.
        """
        if self.lanes.rank != FIXED_AXES:
            raise ir.UnsupportedIR("tile op inside T.Parallel")
        by_thread = any(buffer.scope in memory.THREAD_SCOPES for buffer in buffers)
        with contextlib.nullcontext() if by_thread else self.block_wide():
            self.lanes.extents.extend(extents)
            self.is_tile_op = True
            try:
                yield
            finally:
                self.is_tile_op = False
                del self.lanes.extents[FIXED_AXES:]

    # ------------------------------------------------------------------ statements
    def _seq(self, stmt: ir.Seq) -> None:
        before = self.mask
        try:
            for part in stmt.stmts:
                self.execute(part)
                if self._left and self._left[-1] is not None:
                    self.mask = both(before, ~self._left[-1])
        finally:
            self.mask = before

    def _bind(self, stmt: ir.Bind) -> None:
        try:
            if stmt.var.dtype.lanes != 1:
                self.vectors[stmt.var] = vectors.components(self, stmt.value)
                return
            self.env[stmt.var] = self.bound(stmt.var, self.evaluate(stmt.value))
        except UnboundError:
            self.env[stmt.var] = stmt.value  # its operands are bound by a loop that follows

    def _store(self, stmt: ir.Store) -> None:
        if folds.store(self, stmt):
            return
        indices = tuple(self.evaluate(i) for i in stmt.indices)
        lanes, name = stmt.buffer.dtype.lanes, stmt.buffer.dtype.name
        if lanes == 1:
            memory.write(self, self.place(stmt.buffer, indices), self.cast_to(stmt.value, name))
            return
        for component, part in enumerate(vectors.components(self, stmt.value)):
            value = dtypes.cast(self.lanes.tensor(part), stmt.value.dtype.name, name)
            memory.write(self, self.place(stmt.buffer, indices, component), value)

    def _eval(self, stmt: ir.Eval) -> None:
        call = stmt.value
        if not isinstance(call, ir.Call):
            self.evaluate(call)
        elif (extern := externs.called(call)) is not None and not extern.is_pure:
            self.execute(elements.stores(stmt, extern))
        elif call.op in tileops.OPS:
            tileops.OPS[call.op](self, call)
        elif call.op in _BREAKS:
            self._break()
        elif call.op == "thread_return":
            self._return()
        elif call.op == "reducer_update":
            folds.update(self, call)
        elif call.op in _DEVICE_ASSERTS:
            self._require(call.args[0], "T.device_assert failed")
        elif call.op not in _SCHEDULING:
            self.evaluate(call)

    def _if(self, stmt: ir.If) -> None:
        cond = self._truth(stmt.cond)
        if not isinstance(cond, torch.Tensor):
            if cond:
                self.execute(stmt.then)
            elif stmt.orelse is not None:
                self.execute(stmt.orelse)
            return
        with self.masked(cond):
            self.execute(stmt.then)
        if stmt.orelse is not None:
            with self.masked(~cond):
                self.execute(stmt.orelse)

    def _assume(self, stmt: ir.Assume) -> None:
        self._require(stmt.cond, "an assumption does not hold")
        self.execute(stmt.body)

    def _assert(self, stmt: ir.Assert) -> None:
        self._require(stmt.cond, stmt.message)

    def _require(self, cond: ir.Expr, message: str) -> None:
        value = self._truth(cond)
        fails = holds_anywhere(~value, self.mask) if isinstance(value, torch.Tensor) else not value
        if fails:
            raise InterpreterError(message)

    def _attr(self, stmt: ir.Attr) -> None:
        if stmt.key not in _NEUTRAL_ATTRS:
            raise ir.UnsupportedIR(f"attribute {stmt.key}")
        self.execute(stmt.body)

    def _block(self, stmt: ir.Block) -> None:
        for key in stmt.annotations:
            if key not in _NEUTRAL_BLOCK_NOTES:
                raise ir.UnsupportedIR(f"block annotation {key}")
        self.reducers.update(stmt.annotations.get("reducer_info_v2", {}))
        for buffer in stmt.allocs:
            if buffer.scope != "shared.barrier":  # holds no data
                self._allocate(buffer)
        self.execute(stmt.body)

    def _alloc(self, stmt: ir.Alloc) -> None:
        self._allocate(stmt.buffer)

    def _decl(self, stmt: ir.Decl) -> None:
        if stmt.buffer.data not in self.storages and stmt.buffer.data not in self.env:
            raise ir.UnsupportedIR(f"{stmt.buffer.name}: a view of storage that is not allocated")

    def _allocate(self, buffer: ir.Buffer) -> None:
        size = math.prod(self.integer(s, "buffer shape") for s in buffer.shape) * buffer.dtype.lanes
        self.storages[buffer.data] = memory.allocate(buffer, size, self.lanes)

    # ------------------------------------------------------------------ loops
    def _for(self, stmt: ir.For) -> None:
        if stmt.kind == "parallel":
            with self.block_wide():
                self._parallel(stmt)
            return
        start, extent = self.evaluate(stmt.start), self.evaluate(stmt.extent)
        trips: int
        counts: torch.Tensor | None = None
        if isinstance(extent, int):
            trips = extent
        else:
            counts = self.lanes.tensor(extent)
            active = counts if self.mask is None else torch.where(self.mask, counts, 0)
            trips = int(active.max())
        self._loop(self._trips(stmt.var, start, trips, counts), stmt.body)

    def _trips(
        self, var: ir.Var, start: Value, trips: int, counts: torch.Tensor | None
    ) -> Iterator[torch.Tensor | None]:
        for trip in range(trips):
            if isinstance(start, torch.Tensor):
                self.env[var] = start + trip
            else:
                self.env[var] = start.shifted(trip) if isinstance(start, Affine) else start + trip
            yield None if counts is None else counts > trip

    def _while(self, stmt: ir.While) -> None:
        self._loop(self._while_conditions(stmt.cond), stmt.body)

    def _while_conditions(self, cond: ir.Expr) -> Iterator[torch.Tensor | None]:
        for _ in range(_MAX_WHILE_TRIPS):
            value = self._truth(cond)
            if not isinstance(value, torch.Tensor):
                if not value:
                    return
                yield None
            else:
                if not holds_anywhere(value, self.mask):
                    return
                yield value
        raise InterpreterError(f"a while loop runs more than {_MAX_WHILE_TRIPS} times")

    def _loop(self, conditions: Iterator[torch.Tensor | None], body: ir.Stmt) -> None:
        """Run `body` once for each condition, for the lanes in which all conditions so far held."""
        before = self.mask
        self._left.append(None)
        try:
            for cond in conditions:
                if cond is not None:
                    self._leave(~cond)
                left = self._left[-1]
                self.mask = before if left is None else both(before, ~left)
                if not self.is_active:
                    break
                self.execute(body)
                left = self._left[-1]
                self.mask = before if left is None else both(before, ~left)
        except _BreakError:
            pass
        finally:
            self._left.pop()
            self.mask = before

    def _leave(self, lanes: torch.Tensor) -> None:
        left = self._left[-1]
        self._left[-1] = lanes if left is None else left | lanes

    def _break(self) -> None:
        if len(self._left) <= 1:
            raise ir.UnsupportedIR("break outside a loop")
        if self.mask is None:
            raise _BreakError
        self._leave(self.mask)

    def _return(self) -> None:
        """Active lanes leave the kernel."""
        lanes = torch.ones((), dtype=torch.bool) if self.mask is None else self.mask
        for place, left in enumerate(self._left):
            self._left[place] = lanes if left is None else left | lanes

    @property
    def is_parallel(self) -> bool:
        """Inside a T.Parallel loop."""
        return self.lanes.rank > FIXED_AXES

    def _parallel(self, stmt: ir.For) -> None:
        start, extent = self.evaluate(stmt.start), self.evaluate(stmt.extent)
        counts: torch.Tensor | None = None
        if not isinstance(extent, int):
            counts = self.lanes.tensor(extent)
            extent = int((counts if self.mask is None else torch.where(self.mask, counts, 0)).max())
        if extent <= 0:
            return
        axis = self.lanes.rank
        self.lanes.extents.append(extent)
        step = Affine(0, ((axis, 1),))
        if isinstance(start, torch.Tensor):
            self.env[stmt.var] = start + self.lanes.index(axis)
        else:
            self.env[stmt.var] = step.plus(start) if isinstance(start, Affine) else step.shifted(start)
        inside = None if counts is None else self.lanes.index(axis) < counts
        try:
            with self.masked(inside):
                self.execute(stmt.body)
        finally:
            self.lanes.extents.pop()
            for storage in self.storages.values():
                memory.end_axis(storage, max(axis, FIXED_AXES))


_METHODS: dict[type, str] = {
    ir.Seq: "_seq",
    ir.Bind: "_bind",
    ir.Store: "_store",
    ir.Eval: "_eval",
    ir.If: "_if",
    ir.For: "_for",
    ir.While: "_while",
    ir.Launch: "_launch",
    ir.Assume: "_assume",
    ir.Assert: "_assert",
    ir.Attr: "_attr",
    ir.Block: "_block",
    ir.Alloc: "_alloc",
    ir.Decl: "_decl",
}
