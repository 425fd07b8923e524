"""Follows the threads of one part of a CTA through the device IR: see `role_events`."""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

import z3

from megamoe.memo import of_a_term
from megamoe.role_events import (
    BLOCK,
    LINE,
    OPAQUE,
    THREAD,
    WARP,
    Box,
    Event,
    Followed,
    Loop,
    Part,
    Search,
    names,
)
from megamoe.role_terms import Terms, shared_storages
from verify import ir, ops
from verify.descriptors import mma_shape
from verify.ir import UnsupportedIR

_ATOM_ROWS, _SWIZZLED, _UNIT = 8, 1, 16  # rows; layout type; bytes of a descriptor's units
_K_BYTES = 32  # of a row, in one matrix instruction
_COPY_PREFIX = 3  # arguments of a bulk copy before the coordinates
_NO_MEMORY = frozenset({"dsv4_store_b32", "dsv4_prmt", "dsv4_store_release_sys", "dsv4_load_acquire_sys"})
_SETTING_UP = frozenset(
    {"ptx_init_barrier_thread_count", "ptx_fence_barrier_init", "prefetch_tma_descriptor"}
)
_ATOMIC = re.compile(r"atomic_\w+_elem_op")


def follow(
    function: ir.Function, part: Part, copies: Mapping[str, Box], targets: Container[str] = ()
) -> Followed:
    """Return what the threads of a part do.

    Args:
        function: device IR.
        part: the threads.
        copies: boxes of copies by the names of their descriptors.
        targets: tensors in memory whose stores are events too.

    Raises:
        UnsupportedIR: an operation without a meaning here.
    """
    follower = Follower(function, part, copies, targets)
    follower.run(function.body)
    return follower.found


@dataclass(frozen=True)
class _Descriptor:
    """Of a matrix in shared memory: first byte in its buffer, bytes between atoms, and where it was set."""

    data: ir.Var
    start: z3.ArithRef
    stride: int
    path: tuple[z3.BoolRef, ...]
    loops: tuple[Loop, ...]

    def reaches(self, path: list[z3.BoolRef], loops: list[Loop]) -> bool:
        return (
            all(map(z3.eq, self.path, path))
            and len(self.path) <= len(path)
            and self.loops == tuple(loops[: len(self.loops)])
        )


def _sets_up(node: ir.Stmt) -> bool:
    """Return whether a statement does no more than to set mbarriers up."""
    match node:
        case ir.Seq(stmts=stmts):
            return all(map(_sets_up, stmts))
        case ir.Eval(value=ir.Call(op=op)):
            return op in _SETTING_UP
    return False


@of_a_term
def _agreed(term: z3.BoolRef, part: Part) -> bool | None:
    """Return what a condition is for all threads of a part; None: not the same, or it is on more."""
    values = [z3.simplify(z3.substitute(term, (THREAD, z3.IntVal(t)))) for t in part.numbers]
    for answer, is_it in ((True, z3.is_true), (False, z3.is_false)):
        if all(map(is_it, values)):
            return answer
    return None


class Follower(Terms):
    """What `follow` does, statement by statement; `found` is what it has found."""

    def __init__(
        self, function: ir.Function, part: Part, copies: Mapping[str, Box], targets: Container[str]
    ) -> None:
        """Begin before the first statement; arguments as of `follow`."""
        super().__init__(function, part)
        self.copies, self.targets, self.found = copies, targets, Followed(part)
        self.shared = shared_storages(function)
        self.path: list[z3.BoolRef] = []
        self.ranges: list[z3.BoolRef] = []
        self.lengths: list[z3.ArithRef] = []  # of all loops around
        self.loops: list[Loop] = []
        self.elected = False
        self.descriptors: dict[ir.Var, _Descriptor] = {}
        self.thread_var: ir.Var | None = None
        self.span: ir.Span | None = None

    # ------------------------------------------------------------------ events
    def emit(self, kind: str, what: str, node: Any, **fields: Any) -> None:
        """Enter an event."""
        self.found.seen |= {id(node), *(map(id, ir.walk(node)) if isinstance(node, ir.Call) else ())}
        self.found.events.append(
            Event(
                kind,
                what,
                tuple(self.path),
                tuple(self.ranges),
                tuple(self.loops),
                self.elected,
                node,
                self.span,
                len(self.found.events),
                **fields,
            )
        )

    def _access(self, kind: str, data: ir.Var, node: Any, index: Any, bits: int, lanes: int) -> None:
        first = self.first(index)
        if first is None:
            raise UnsupportedIR(f"elements of {data.name} that are not neighbours")
        first = first * bits / 8 if bits % 8 else first * (bits // 8)
        name = self.shared[data][0] if data in self.shared else data.name
        self.emit(kind, name, node, first=first, last=first + lanes * bits // 8 - 1)

    def reads(self, *nodes: Any) -> None:
        """Enter the reads of shared memory in expressions; refuse what has no meaning."""
        for top in nodes:
            for node in ir.walk(top):
                match node:
                    case ir.Load(buffer=buffer) if self._is_lost(buffer):
                        raise UnsupportedIR(f"{buffer.name} has no known place in shared memory")
                    case ir.Load(buffer=buffer, indices=(index,)) if buffer.data in self.shared:
                        if buffer.scope == "shared.barrier":
                            raise UnsupportedIR(f"mbarrier {buffer.name} as a value")
                        self._access("read", buffer.data, node, index, buffer.dtype.bits, node.dtype.lanes)
                    case ir.Load(buffer=buffer) if buffer.data in self.shared:
                        raise UnsupportedIR(f"{buffer.name} is not flat")
                    case ir.AccessPtr(data=data) if data in self.shared:
                        raise UnsupportedIR(f"a pointer to {data.name}")
                    case ir.Var() if node in self.shared:
                        raise UnsupportedIR(f"a pointer to {node.name}")
                    case ir.Call():
                        self._check_value(node)

    def _is_lost(self, buffer: ir.Buffer) -> bool:
        return buffer.scope.startswith("shared") and buffer.data not in self.shared

    def _check_value(self, call: ir.Call) -> None:
        if call.op == "call_extern":
            reduce = ops.all_reduce(call)
            if reduce is not None and reduce.threads <= WARP and reduce.workspace is None:
                return
            if isinstance(call.args[0], ir.Str) and call.args[0].value in _NO_MEMORY:
                return
        elif call.op in ops.PURE or call.op == "address_of" or _ATOMIC.fullmatch(call.op):
            return
        raise UnsupportedIR(f"operation {call.op}")

    # ------------------------------------------------------------------ statements
    def run(self, node: ir.Stmt | None) -> None:
        """Enter the events of a statement."""
        if node is not None and node.span is not None:
            self.span = node.span
        match node:
            case None | ir.Alloc() | ir.Decl():
                return
            case ir.Seq(stmts=stmts):
                for stmt in stmts:
                    self.run(stmt)
            case ir.Launch(var=var, tag=tag, extent=ir.Const(value=extent), body=body):
                self._launch(var, tag, int(extent))
                self.run(body)
            case ir.Assume(body=body) | ir.Block(body=body) | ir.Attr(body=body):
                self.run(body)
            case ir.Bind(var=var, value=value):
                if var.dtype.name == "handle":
                    return  # `shared_storages` has read it
                self.reads(value)
                if var.dtype.is_int:
                    self.env[var] = self.term(value)
            case ir.If():
                self._if(node)
            case ir.For():
                self._for(node)
            case ir.While():
                self._while(node)
            case ir.Store():
                self._store(node)
            case ir.Eval(value=ir.Call() as call):
                self._call(call)
            case _:
                raise UnsupportedIR(f"{type(node).__name__} in a role")

    def _launch(self, var: ir.Var, tag: str, extent: int) -> None:
        if tag == "threadIdx.x":
            self.thread_var, self.env[var] = var, THREAD
            self.ranges.append(z3.And(self.part.first <= THREAD, self.part.numbers[-1] >= THREAD))
        elif tag == "blockIdx.x":
            self.env[var] = BLOCK
            self.ranges.append(z3.And(BLOCK >= 0, extent > BLOCK))
        elif extent == 1:
            self.env[var] = z3.IntVal(0)
        else:
            raise UnsupportedIR(f"a launch over {tag}")

    def _if(self, node: ir.If) -> None:
        match node.cond:
            case ir.Call(op="tl_shuffle_elect", args=(ir.Const(value=extent),)):
                if node.orelse is not None or self.elected:
                    raise UnsupportedIR("an election with another branch, or in another")
                if extent == 0 and self.part.first > 0:
                    return  # one thread of the CTA, of its first warp
                if extent not in (0, WARP):
                    raise UnsupportedIR(f"an election among {extent} threads")
                if extent == 0 and not _sets_up(node.then):  # what a lane of each warp does is counted so
                    raise UnsupportedIR("one thread of the CTA does more than to set mbarriers up")
                before, self.elected = dict(self.local), True
                self.run(node.then)
                self.elected = False
                for name, value in self.local.items():
                    if name not in before or not z3.eq(before[name], value):
                        self.local[name] = self.symbol(name)
                        self.found.stored.append((name, frozenset({OPAQUE})))
                return
        self.reads(node.cond)
        known = self._of_threads(node.cond)
        if known is not None:
            self.run(node.then if known else node.orelse)
            return
        cond = self.boolean(node.cond)
        before = dict(self.local)
        self.path.append(cond)
        self.run(node.then)
        taken, self.local = self.local, before
        self.path[-1] = z3.Not(cond)
        self.run(node.orelse)
        self.path.pop()
        for name in taken.keys() | self.local.keys():
            yes, no = (side[name] if name in side else self.symbol(name) for side in (taken, self.local))
            self.local[name] = yes if z3.eq(yes, no) else z3.If(cond, yes, no)

    def _of_threads(self, cond: Any) -> bool | None:
        """Return a condition on the thread's number alone that all threads of the part agree on."""
        for inner in ir.walk(cond):
            if isinstance(inner, ir.Load | ir.Call | ir.AccessPtr):
                return None
            if isinstance(inner, ir.Var) and inner is not self.thread_var:
                return None
        return _agreed(self.boolean(cond), self.part)

    def _forget(self, changed: set[str]) -> dict[str, z3.ArithRef]:
        for name in changed:
            self.local[name] = self.symbol(name)
        return {name: self.local[name] for name in changed}

    def _for(self, node: ir.For) -> None:
        self.reads(node.start, node.extent)
        start, extent = self.integer(node.start), self.integer(node.extent)
        if node.kind == "unrolled" and isinstance(node.extent, ir.Const) and self._has_barriers(node.body):
            for number in range(int(node.extent.value)):
                self.env[node.var] = start + number
                self.run(node.body)
            return
        changed = self.changed(node.body)
        # Compiled loops look up where they end in each round.
        for inner in (*ir.walk(node.start), *ir.walk(node.extent)):
            if isinstance(inner, ir.Load) and self.element(inner.buffer, inner.indices[0]) in changed:
                raise UnsupportedIR(f"a loop's length {inner.buffer.name} that its rounds change")
        before = {name: self.local.get(name, self.symbol(name)) for name in changed}
        steps = self.steps(node.body)
        counts = self._has_barriers(node.body)
        depth = len(self.loops)
        var = z3.Int(f"round{depth}") if counts and depth < 2 else self.symbol("round")
        self._forget(changed)
        self.local |= {name: before[name] + (var - start) * step for name, step in steps.items()}
        entry = {name: self.local[name] for name in changed}
        loop = Loop(var, start, extent, tuple(self.path), before, entry)
        self.env[node.var] = var
        self.ranges.append(loop.range)
        self.lengths += (start, extent)
        if counts or self._is_shared(node.body):
            self.found.loops.append((tuple(self.loops), loop))
            self.loops.append(loop)
            self.run(node.body)
            self.loops.pop()
        else:
            self.run(node.body)
        self.ranges.pop()
        del self.lengths[-2:]
        loop.leave = {name: self.local[name] for name in changed}
        self._forget(changed)
        rounds = z3.If(extent > 0, extent, z3.IntVal(0))
        self.local |= {name: before[name] + rounds * step for name, step in steps.items()}
        loop.after = {name: self.local[name] for name in changed}

    def _while(self, node: ir.While) -> None:
        """A search is kept; of another loop nothing is known but that it touches no shared memory."""
        self.reads(node.cond)
        if self._has_barriers(node.body) or self._is_shared(node.body):
            raise UnsupportedIR("shared memory in a loop on a condition")
        changed = self.changed(node.body)
        match node.body:
            case ir.Store(
                buffer=b, indices=(i,), value=ir.BinOp(op="add", a=ir.Load() as old, b=ir.Const() as one)
            ):
                name = self.element(b, i)
                if name is not None and self.element(old.buffer, old.indices[0]) == name and one.value == 1:
                    return self._search(node, name)
        self._forget(changed)
        self.path.append(z3.BoolVal(True))
        self.run(node.body)
        self.path.pop()
        self._forget(changed)
        # How often a thread goes round is its own.
        self.found.stored += [(name, frozenset({OPAQUE})) for name in changed]
        return None

    def _search(self, node: ir.While, name: str) -> None:
        if name not in self.local:
            raise UnsupportedIR(f"a search from {name}, which nothing was put in")
        start, found = self.local[name], self.symbol(name)

        def goes_on(number: z3.ArithRef) -> z3.BoolRef:
            kept = self.local[name]
            self.local[name] = number
            term = self.boolean(node.cond)
            self.local[name] = kept
            return term

        self.found.searches[name] = Search(start, found, goes_on)
        used = names(goes_on(found)).union(names(start), *map(names, (*self.path, *self.lengths)))
        self.found.stored.append((name, used))
        self.local[name] = found

    def _store(self, node: ir.Store) -> None:
        self.reads(node.value, *node.indices)
        if self._is_lost(node.buffer):
            raise UnsupportedIR(f"{node.buffer.name} has no known place in shared memory")
        if node.buffer.data in self.shared:
            if len(node.indices) != 1:
                raise UnsupportedIR(f"{node.buffer.name} is not flat")
            lanes = node.value.dtype.lanes
            self._access("write", node.buffer.data, node, node.indices[0], node.buffer.dtype.bits, lanes)
            return
        if node.buffer.data.name in self.targets:
            lanes, bits = node.value.dtype.lanes, node.buffer.dtype.bits
            self._access("store", node.buffer.data, node, node.indices[0], bits, lanes)
        name = self.element(node.buffer, node.indices[0])
        if name is not None:
            value = self.integer(node.value)
            used = names(value).union(*map(names, (*self.path, *self.lengths)))
            self.found.stored.append((name, used))
            self.local[name] = value

    def _has_barriers(self, node: Any) -> bool:
        return any(
            isinstance(n, ir.Call) and (n.op in ops.SYNC - _LOCAL_SYNC or n.op == "tma_load")
            for n in ir.walk(node)
        )

    def _is_shared(self, node: Any) -> bool:
        return any(
            (isinstance(n, ir.Load | ir.Store) and n.buffer.data in self.shared)
            or (isinstance(n, ir.AccessPtr) and n.data in self.shared)
            for n in ir.walk(node)
        ) or any(isinstance(n, ir.Call) and n.op.startswith("ptx_wgmma") for n in ir.walk(node))

    # ------------------------------------------------------------------ calls
    def _call(self, call: ir.Call) -> None:
        args = call.args
        match call.op:
            case "mbarrier_wait_parity":
                array, number = self._mbarrier(args[0])
                self.reads(args[1])
                self.emit("wait", array, call, first=number, value=self.integer(args[1]))
            case "ptx_arrive_barrier" if len(args) == 1:
                array, number = self._mbarrier(args[0])
                self.emit("arrive", array, call, first=number, value=z3.IntVal(0))
            case "ptx_arrive_barrier_expect_tx":
                array, number = self._mbarrier(args[0])
                self.emit("arrive", array, call, first=number, value=self.integer(args[1]))
            case "ptx_init_barrier_thread_count":
                array, number = self._mbarrier(args[0])
                self.emit("init", array, call, first=number, value=self.integer(args[1]))
            case "ptx_fence_barrier_init":
                self.emit("fence", "", call)
            case "tma_load":
                self._copy(call)
            case "ptx_stmatrix" if isinstance(args[2], ir.AccessPtr) and args[2].data in self.shared:
                pointer = args[2]
                self.reads(*args[:2], *args[3:], pointer.offset)
                lanes = self._constant(pointer.extent)
                self._access("write", pointer.data, call, pointer.offset, pointer.element.bits, lanes)
            case "initialize_wgmma_descriptor":
                self._descriptor(call)
            case "increase_descriptor_offset":
                known = self._known(args[0])
                if len(known.loops) != len(self.loops):
                    raise UnsupportedIR("a matrix descriptor that moves on in a loop")
                moved = known.start + self.integer(args[1])
                self.descriptors[self._described(args[0])] = replace(known, start=moved)
            case "ptx_wgmma_rs":
                _, n, _ = mma_shape(args[0])
                self._tensor(call, args[7], args[8], n, args[1])
            case "ptx_wgmma_ss":
                m, n, _ = mma_shape(args[0])
                self._tensor(call, args[6], args[7], m, args[1])
                self._tensor(call, args[8], args[9], n, args[2])
            case "warpgroup_commit_batch":
                self.emit("commit", "", call)
            case "wait_wgmma":
                self.emit("drain", "", call, value=self._constant(args[0]))
            case "tvm_storage_sync":
                number = self._constant(args[1]) if len(args) > 1 else 0
                threads = self._constant(args[2]) if len(args) > 2 else 0
                self.emit("sync", str(number), call, value=threads)
            case "sync_grid":
                self.emit("sync", "grid", call)
            case _ if call.op in _HARMLESS:
                self.reads(*(a for a in args if not isinstance(a, ir.Var)))
                if any(isinstance(a, ir.Var) and a in self.shared for a in args):
                    raise UnsupportedIR(f"{call.op} of shared memory")
            case _:
                self.reads(call)

    def _constant(self, node: Any) -> int:
        if isinstance(node, ir.Const) and not isinstance(node.value, float):
            return int(node.value)
        raise UnsupportedIR("an operand that is not constant")

    def _mbarrier(self, node: Any) -> tuple[str, z3.ArithRef]:
        match node:
            case ir.Load(buffer=buffer, indices=(index,)) if buffer.scope == "shared.barrier":
                self.reads(index)
                return buffer.data.name, self.integer(index)
        raise UnsupportedIR("an mbarrier that is no element of an array")

    def _copy(self, call: ir.Call) -> None:
        descriptor, barrier, target, *coordinates = call.args
        box = self.copies.get(descriptor.name) if isinstance(descriptor, ir.Var) else None
        if box is None or not isinstance(target, ir.AccessPtr) or target.data not in self.shared:
            raise UnsupportedIR("a copy without a descriptor, or not to shared memory")
        self.reads(target.offset, *coordinates)
        first = self.integer(target.offset) * target.element.bits / 8
        self.emit(
            "copy",
            self.shared[target.data][0],
            call,
            first=z3.simplify(first),
            last=z3.simplify(first + box.bytes_ - 1),
            value=box.bytes_,
            barrier=self._mbarrier(barrier),
            source=box.tensor,
            coordinates=tuple(self.integer(c) for c in coordinates[:-1]),
        )

    def _described(self, node: Any) -> ir.Var:
        match node:
            case ir.Load(buffer=buffer, indices=(ir.Const(value=0),)):
                return buffer.data
            case ir.Var():
                return node
        raise UnsupportedIR("a matrix descriptor that is no variable")

    def _descriptor(self, call: ir.Call) -> None:
        target, pointer, kind, _, stride = call.args
        shift = 0
        if isinstance(pointer, ir.Call) and pointer.op == "handle_add_byte_offset":
            shift, pointer = self._constant(pointer.args[1]), pointer.args[0]
        if not isinstance(pointer, ir.AccessPtr) or pointer.data not in self.shared:
            raise UnsupportedIR("a matrix descriptor of computed memory")
        name, at = self.shared[pointer.data]
        if self._constant(kind) != _SWIZZLED or at % LINE:
            raise UnsupportedIR(f"matrix operand {name} is not of swizzled rows of {LINE} bytes")
        start = self.integer(pointer.offset) * (pointer.element.bits // 8) + shift
        self.found.seen.add(id(pointer))
        self.descriptors[self._described(target)] = _Descriptor(
            pointer.data, start, self._constant(stride) * _UNIT, tuple(self.path), tuple(self.loops)
        )

    def _known(self, node: Any) -> "_Descriptor":
        """Return a descriptor that was set on every way to here, in this round."""
        known = self.descriptors.get(self._described(node))
        if known is None or not known.reaches(self.path, self.loops):
            raise UnsupportedIR("a matrix descriptor that is not set on every way")
        return known

    def _tensor(self, call: ir.Call, descriptor: Any, offset: Any, rows: int, k_major: Any) -> None:
        """Rows of 128 bytes, in atoms of eight, of each of which K takes 32 bytes, swizzled in the row."""
        if not self._constant(k_major) or rows % _ATOM_ROWS:
            raise UnsupportedIR("a matrix operand that is not K-major")
        known = self._known(descriptor)
        first = known.start + self.integer(offset) * _UNIT
        last = first + (rows // _ATOM_ROWS - 1) * known.stride + (_ATOM_ROWS - 1) * LINE + _K_BYTES - 1
        # Swizzled inside their lines: a place that consists of whole lines holds what lies in its lines.
        self.emit("tensor", self.shared[known.data][0], call, first=first, last=last)


_LOCAL_SYNC = frozenset(
    {
        "fence_proxy_async",
        "set_max_nreg",
        "warpgroup_arrive",
        "warpgroup_commit_batch",
        "wait_wgmma",
        "sync_warp",
    }
    | {"prefetch_tma_descriptor", "ptx_fence_barrier_init"}
)
# Order a warp's or a thread's own operations, or none: they take nothing from, and add nothing to, the proof.
_HARMLESS = (_LOCAL_SYNC | {"warpgroup_fence_operand"}) - {
    "warpgroup_commit_batch",
    "wait_wgmma",
    "ptx_fence_barrier_init",
}
