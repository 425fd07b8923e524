"""Every access of the device IR to memory, whatever statement or intrinsic makes it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import z3

from verify import externs, ir, ops
from verify.descriptors import Descriptors, DescriptorUse, accumulator_registers, mma_shape
from verify.encode import Hypothesis, Scope
from verify.host import Descriptor
from verify.storage import BYTE_BITS, Storage
from verify.text import show
from verify.walk import Site, with_lane

if TYPE_CHECKING:
    from verify.properties import Context

REGISTER_BITS = 32
A_REGISTERS = 4  # of wgmma with A in registers: 64 rows x 256 bits over 128 threads of 32-bit registers
MATRIX_ROW_BITS = 128  # one 8x8 b16 matrix row: what one lane's address of ldmatrix or stmatrix stands for
_TMA_LOAD_PREFIX = 3  # descriptor, mbarrier, destination
_TMA_STORE_PREFIX = 2  # descriptor, source


@dataclass(frozen=True)
class Access:
    """`count` consecutive units from unit `start` of a storage.

    Attributes:
        what: the operation, for messages.
        mode: r, w, rw; `pointer` for a range that is only handed on.
        unit_bits: size of what `start` and `count` count.
        wide: one instruction moves all `count` units, so the start has to be aligned to them.
        each: every unit is moved by an instruction of its own, so all of them have to be aligned to one.
    """

    what: str
    mode: str
    storage: Storage
    start: z3.ArithRef
    count: z3.ArithRef
    unit_bits: int
    site: Site
    wide: bool = False
    each: bool = False


@dataclass(frozen=True)
class TmaCopy:
    """One TMA load or store of a whole box."""

    site: Site
    descriptor: Descriptor
    store: bool
    reduce: bool
    shared: Access
    coordinates: tuple[z3.ArithRef, ...]


@dataclass
class Memory:
    """All accesses of one kernel.

    Attributes:
        descriptors: wgmma operands in shared memory.
        unsupported: statements with an operation without a meaning.
    """

    accesses: list[Access] = field(default_factory=list)
    tma: list[TmaCopy] = field(default_factory=list)
    descriptors: list[DescriptorUse] = field(default_factory=list)
    unsupported: list[tuple[Site, str]] = field(default_factory=list)


def read_memory(context: "Context") -> Memory:
    """Return every access of the device IR of `context`."""
    reader = _Reader(context)
    for site in context.device_sites:
        try:
            reader.site(site)
        except ir.UnsupportedIR as error:
            reader.memory.unsupported.append((site, str(error)))
    return reader.memory


class _Reader:
    def __init__(self, context: "Context") -> None:
        self.context = context
        self.memory = Memory()
        self.descriptors = Descriptors(context.encoder)
        self.taken: set[int] = set()  # pointer arguments that an operation has given a meaning to
        self.handlers: dict[str, Callable[[Site, ir.Call], None]] = {
            "tma_load": self._tma_load,
            "tma_store": self._tma_store,
            "initialize_wgmma_descriptor": self._initialize,
            "increase_descriptor_offset": self._increase,
            "ptx_wgmma_rs": self._wgmma_rs,
            "ptx_wgmma_ss": self._wgmma_ss,
            "warpgroup_fence_operand": self._fence_operand,
            "ptx_cp_async": self._cp_async,
            "ptx_ldmatrix": self._ldmatrix,
            "ptx_stmatrix": self._stmatrix,
            "call_extern": self._extern,
        }
        for name, count in (("", 1), ("x2", 2), ("x4", 4)):
            for ret in ("", "_ret"):
                self.handlers[f"atomic_add{name}{ret}_elem_op"] = partial(self._atomic, count=count)
        for name in ("max", "min", "max_ret", "min_ret", "or", "load", "store"):
            self.handlers[f"atomic_{name}_elem_op"] = partial(self._atomic, count=1)

    def site(self, site: Site) -> None:
        match site.node:
            case ir.Store(buffer=buffer, indices=indices):
                self._element(site, buffer, indices, "store to", "w", site.node.value.dtype.lanes)
            case ir.Load(buffer=buffer, indices=indices) if id(site.node) not in self.taken:
                what, mode = ("mbarrier", "rw") if buffer.scope == "shared.barrier" else ("load from", "r")
                self._element(site, buffer, indices, what, mode, site.node.dtype.lanes)
            case ir.AccessPtr() if id(site.node) not in self.taken:
                raise ir.UnsupportedIR(f"pointer to {site.node.data.name} outside of a known operation")
            case ir.Region():
                raise ir.UnsupportedIR("tile region in the device IR")
            case ir.Call():
                self._call(site, site.node)
            case ir.Bind(value=ir.Call(op="handle_add_byte_offset")):
                return
            case ir.Bind(var=var) if var.dtype.name == "handle":
                raise ir.UnsupportedIR(f"computed pointer {var.name}")

    def _call(self, site: Site, call: ir.Call) -> None:
        if ops.is_plain(call):
            if call.op != "prefetch_tma_descriptor" and any(_is_pointer(a) for a in call.args):
                raise ir.UnsupportedIR(f"pointer passed to {call.op}")
            return
        if call.op in ("address_of", "handle_add_byte_offset"):
            return
        handler = self.handlers.get(call.op)
        if handler is None:
            raise ir.UnsupportedIR(f"operation {call.op}")
        handler(site, call)

    # ------------------------------------------------------------------ elements
    def term(self, expr: ir.Expr, scope: Scope) -> z3.ArithRef:
        term = self.context.encoder.term(expr, scope)
        return z3.If(term, z3.IntVal(1), z3.IntVal(0)) if z3.is_bool(term) else term

    def _element(
        self, site: Site, buffer: ir.Buffer, indices: tuple[ir.Expr, ...], what: str, mode: str, lanes: int
    ) -> None:
        storage = self.context.storages.of(buffer.data)
        if buffer.scope.startswith("local.descriptor"):
            return
        scope, count = site.scope, 1
        if len(indices) == 1 and isinstance(indices[0], ir.Ramp) and show(indices[0].stride) == "1":
            indices, count = (indices[0].base,), lanes
        elif any(i.dtype.lanes > 1 for i in indices):
            scope = with_lane(self.context.encoder, scope, lanes)
        start = self._linear(buffer, indices, scope)
        self.memory.accesses.append(
            Access(
                f"{what} {buffer.name}",
                mode,
                storage,
                start,
                z3.IntVal(count),
                buffer.dtype.bits,
                site if scope is site.scope else _with_scope(site, scope),
                wide=True,
            )
        )

    def _linear(self, buffer: ir.Buffer, indices: tuple[ir.Expr, ...], scope: Scope) -> z3.ArithRef:
        if len(indices) != 1 or any(show(s) != "1" for s in buffer.strides):
            raise ir.UnsupportedIR(f"{buffer.name} is not flat")
        if buffer.dtype.lanes != 1:  # bits of a type are those of one lane
            raise ir.UnsupportedIR(f"{buffer.name} of vectors {buffer.dtype}")
        start = self.term(indices[0], scope)
        offset = self.term(buffer.offset, scope)
        return z3.simplify(start + offset) if not z3.eq(offset, z3.IntVal(0)) else start

    # ------------------------------------------------------------------ pointers
    def _pointer(
        self, site: Site, pointer: ir.Expr, what: str, mode: str, bits: int | None, wide: bool = False
    ) -> Access:
        """Record the access of an operation through `pointer`: `bits` from it, or its own extent."""
        scope = site.scope
        match pointer:
            case ir.AccessPtr(data=data, element=element, offset=offset, extent=extent):
                if element.lanes != 1:
                    raise ir.UnsupportedIR(f"{what}: pointer to vectors {element}")
                start, unit, size = self.term(offset, scope), element.bits, self.term(extent, scope)
                if bits is not None and bits % unit:
                    raise ir.UnsupportedIR(f"{what}: {bits} bits of {element} elements")
                count = size if bits is None else z3.IntVal(bits // unit)
            case ir.Call(op="address_of", args=(ir.Load(buffer=buffer, indices=indices) as load,)):
                self.taken.add(id(load))
                data, unit = buffer.data, buffer.dtype.bits
                start = self._linear(buffer, indices, scope)
                if bits is None or bits % unit:
                    raise ir.UnsupportedIR(f"{what}: extent of the address of an element")
                count = z3.IntVal(bits // unit)
            case _:
                raise ir.UnsupportedIR(f"{what}: pointer {show(pointer)}")
        self.taken.add(id(pointer))
        access = Access(what, mode, self.context.storages.of(data), start, count, unit, site, wide)
        self.memory.accesses.append(access)
        return access

    def _register(self, site: Site, data: ir.Expr, offset: ir.Expr, count: int, what: str, mode: str) -> None:
        """Record `count` 32-bit registers from `data + offset`, counted in the array's own type."""
        if not isinstance(data, ir.Var):
            raise ir.UnsupportedIR(f"{what}: computed register array")
        storage = self.context.storages.of(data)
        bits = storage.element.bits
        if storage.kind != "local" or bits < BYTE_BITS:
            raise ir.UnsupportedIR(f"{what}: register operand in {storage.kind} {storage.element} memory")
        start = self.term(offset, site.scope)
        units = z3.IntVal(count * REGISTER_BITS // bits) if REGISTER_BITS % bits == 0 else None
        if units is None:
            raise ir.UnsupportedIR(f"{what}: registers of {storage.element}")
        self.memory.accesses.append(Access(what, mode, storage, start, units, bits, site))

    # ------------------------------------------------------------------ TMA
    def _tma_load(self, site: Site, call: ir.Call) -> None:
        if not isinstance(call.args[0], ir.Var):
            raise ir.UnsupportedIR("tma_load without a descriptor")
        self._tma(site, call, call.args[2], call.args[_TMA_LOAD_PREFIX:-1], "TMA load into", store=False)

    def _tma_store(self, site: Site, call: ir.Call) -> None:
        if not isinstance(call.args[0], ir.Var):
            raise ir.UnsupportedIR("tma_store without a descriptor")
        reduce = call.args[-2]
        if not isinstance(reduce, ir.Const):
            raise ir.UnsupportedIR("tma_store with a computed reduction flag")
        coordinates = call.args[_TMA_STORE_PREFIX:-2]
        self._tma(site, call, call.args[1], coordinates, "TMA store from", True, bool(reduce.value))

    def _tma(
        self,
        site: Site,
        call: ir.Call,
        pointer: ir.Expr,
        coordinates: tuple[ir.Expr, ...],
        what: str,
        store: bool,
        reduce: bool = False,
    ) -> None:
        handle = call.args[0]
        descriptor = self.context.host.descriptors.get(handle) if isinstance(handle, ir.Var) else None
        if descriptor is None:
            raise ir.UnsupportedIR(f"descriptor {show(handle)} is not made by the host")
        if len(coordinates) != len(descriptor.box):
            raise ir.UnsupportedIR(f"{len(coordinates)} coordinates for a box of rank {len(descriptor.box)}")
        elements = 1
        for extent in descriptor.box:
            elements *= extent
        bits = elements * descriptor.tensor.dtype.bits
        name = pointer.data.name if isinstance(pointer, ir.AccessPtr) else show(pointer)
        shared = self._pointer(site, pointer, f"{what} {name}", "r" if store else "w", bits)
        terms = tuple(self.term(c, site.scope) for c in coordinates)
        self.memory.tma.append(TmaCopy(site, descriptor, store, reduce, shared, terms))

    # ------------------------------------------------------------------ tensor core
    def _initialize(self, site: Site, call: ir.Call) -> None:
        target, pointer, *fields = call.args
        shift = 0
        if isinstance(pointer, ir.Call) and pointer.op == "handle_add_byte_offset":
            pointer, offset = pointer.args
            if not isinstance(offset, ir.Const):
                raise ir.UnsupportedIR("wgmma descriptor from a pointer with a computed byte offset")
            shift = int(offset.value)
        base = self._pointer(site, pointer, "wgmma descriptor of", "pointer", None)
        self.descriptors.initialize(site, self._descriptor_of(target), base, shift, fields)

    def _increase(self, site: Site, call: ir.Call) -> None:
        target, offset = call.args
        self.descriptors.increase(site, self._descriptor_of(target), self.term(offset, site.scope))

    def _descriptor_of(self, target: ir.Expr) -> ir.Var:
        if not isinstance(target, ir.Load):
            raise ir.UnsupportedIR("wgmma descriptor that is no variable")
        return target.buffer.data

    def _wgmma_rs(self, site: Site, call: ir.Call) -> None:
        shape, b_k_major, _, b_type, c_type, a, a_offset, b, b_offset, c, c_offset, *_ = call.args
        m, n, k = mma_shape(shape)
        self._register(site, a, a_offset, A_REGISTERS, "wgmma A registers", "r")
        self._accumulate(site, c, c_offset, c_type, m, n)
        self._operand(site, b, b_offset, b_type, b_k_major, n, k, "B")

    def _wgmma_ss(self, site: Site, call: ir.Call) -> None:
        shape, a_major, b_major, a_type, b_type, c_type, a, a_off, b, b_off, c, c_off, *_ = call.args
        m, n, k = mma_shape(shape)
        self._accumulate(site, c, c_off, c_type, m, n)
        self._operand(site, a, a_off, a_type, a_major, m, k, "A")
        self._operand(site, b, b_off, b_type, b_major, n, k, "B")

    def _accumulate(self, site: Site, data: ir.Expr, offset: ir.Expr, dtype: ir.Expr, m: int, n: int) -> None:
        self._register(site, data, offset, accumulator_registers(dtype, m, n), "wgmma accumulators", "rw")

    def _operand(
        self,
        site: Site,
        data: ir.Expr,
        offset: ir.Expr,
        dtype: ir.Expr,
        k_major: ir.Expr,
        rows: int,
        k: int,
        name: str,
    ) -> None:
        use = self.descriptors.read(site, data, self.term(offset, site.scope), dtype, k_major, rows, k, name)
        self.memory.descriptors.append(use)

    def _fence_operand(self, site: Site, call: ir.Call) -> None:
        _, data, offset, count = call.args
        if not isinstance(count, ir.Const):
            raise ir.UnsupportedIR("warpgroup_fence_operand of a computed number of registers")
        self._register(site, data, offset, int(count.value), "wgmma register fence", "rw")

    # ------------------------------------------------------------------ copies and atomics
    def _cp_async(self, site: Site, call: ir.Call) -> None:
        target, source, count, *predicate = call.args
        if not isinstance(count, ir.Const):
            raise ir.UnsupportedIR("ptx_cp_async of a computed size")
        element = target.element if isinstance(target, ir.AccessPtr) else None
        if element is None:
            raise ir.UnsupportedIR("ptx_cp_async to a pointer that is no access_ptr")
        bits = int(count.value) * element.bits
        self._pointer(site, target, "cp.async into shared", "w", bits, wide=True)
        if predicate:  # where it is false zeros are written and nothing is read
            guard = self.context.encoder.boolean(predicate[0], site.scope)
            taken = Hypothesis(f"if {show(predicate[0])}", "guard", guard)
            site = _with_scope(site, site.scope.assuming(taken))
        self._pointer(site, source, "cp.async from global", "r", bits, wide=True)

    def _ldmatrix(self, site: Site, call: ir.Call) -> None:
        _, count, source, target = call.args
        if not isinstance(count, ir.Const):
            raise ir.UnsupportedIR("ptx_ldmatrix of a computed number")
        self._pointer(site, source, "ldmatrix from shared", "r", MATRIX_ROW_BITS, wide=True)
        self._pointer(site, target, "ldmatrix into registers", "w", int(count.value) * REGISTER_BITS)

    def _stmatrix(self, site: Site, call: ir.Call) -> None:
        _, count, target, *values = call.args
        if not isinstance(count, ir.Const) or any(_is_pointer(v) for v in values):
            raise ir.UnsupportedIR("ptx_stmatrix form")
        self._pointer(site, target, "stmatrix into shared", "w", MATRIX_ROW_BITS, wide=True)

    def _atomic(self, site: Site, call: ir.Call, count: int) -> None:
        target = call.args[0]
        match target:
            case ir.AccessPtr(element=element):
                bits = element.bits
            case ir.Call(op="address_of", args=(ir.Load(buffer=buffer),)):
                bits = buffer.dtype.bits
            case _:
                raise ir.UnsupportedIR(f"{call.op} on {show(target)}")
        if count > 1:
            self._pointer(site, call.args[1], f"{call.op} source", "r", count * bits)
        self._pointer(site, target, f"{call.op} on", "rw", count * bits, wide=True)

    def _extern(self, site: Site, call: ir.Call) -> None:
        if (extern := externs.called(call)) is not None:
            self._registered(site, call, extern)
            return
        reduction = ops.all_reduce(call)
        if reduction is None:
            raise ir.UnsupportedIR(f"external function {show(call.args[0])}")
        if reduction.workspace is not None:
            thread = next(i.const for i in site.scope.launch if i.tag == "threadIdx.x")
            slot = thread - reduction.offset
            group = slot - slot % reduction.threads
            self._slots(site, reduction.workspace, group, reduction.threads, call.args[1].dtype)

    def _registered(self, site: Site, call: ir.Call, extern: externs.Extern) -> None:
        """Record the words that a registered function reads and writes through its pointers."""
        externs.check_calls(self.context.extracted.device)
        for position, (mode, size) in extern.accesses.items():
            pointer = call.args[1 + position]
            first = self._pointer(site, pointer, f"{extern.name} through", mode, REGISTER_BITS, wide=True)
            units = REGISTER_BITS // first.unit_bits
            for word in range(1, size * BYTE_BITS // REGISTER_BITS):
                self.memory.accesses.append(replace(first, start=first.start + word * units))

    def _slots(self, site: Site, pointer: ir.Expr, first: z3.ArithRef, count: int, value: ir.DType) -> None:
        """Record that `count` elements from `first` of a reduction's workspace are written and read."""
        if not isinstance(pointer, ir.AccessPtr):
            raise ir.UnsupportedIR(f"reduction workspace {show(pointer)}")
        if pointer.element != value:  # AllReduce::run takes a T and a pointer to T
            raise ir.UnsupportedIR(f"reduction of {value} through a workspace of {pointer.element}")
        self.taken.add(id(pointer))
        storage = self.context.storages.of(pointer.data)
        start = self.term(pointer.offset, site.scope) + first
        what = f"reduction workspace {storage.name}"
        bits = pointer.element.bits
        self.memory.accesses.append(
            Access(what, "rw", storage, start, z3.IntVal(count), bits, site, each=True)
        )


def _is_pointer(expr: ir.Expr) -> bool:
    return expr.dtype.name == "handle" or isinstance(expr, ir.AccessPtr)


def _with_scope(site: Site, scope: Scope) -> Site:
    return Site(site.node, scope, site.span, site.statement, site.path)
