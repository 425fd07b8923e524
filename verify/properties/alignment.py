"""Addresses are aligned as the hardware asks, and the launch is within its limits.

Vector accesses, TMA descriptors and their shared boxes, wgmma descriptors, mbarriers, grid and
block sizes, shared memory, register budgets. Limits are those of the CUDA driver API
(cuTensorMapEncodeTiled), of the PTX ISA for sm_90a and of the CUDA programming guide.
"""

import re

import z3

from verify import ir
from verify.access import Access, TmaCopy
from verify.descriptors import FIELD_BITS, INSTRUCTION_K_BYTES, UNIT_BYTES, DescriptorUse
from verify.encode import Hypothesis, Scope
from verify.host import Descriptor
from verify.instruction_limits import instruction_limits
from verify.intarith import conjunction, constant_of
from verify.properties import Claims, Context, Issue
from verify.solve import Obligation
from verify.storage import BYTE_BITS
from verify.walk import Site

NAME = "alignment"
MAX_VECTOR_BYTES = 16  # widest single access of a thread; wider ones are split by the assembler
MAX_THREADS = 1024
MAX_GRID = {"blockIdx.x": 2**31 - 1, "blockIdx.y": 65535, "blockIdx.z": 65535}
MAX_CLUSTER = 8  # blocks, without an attribute that allows more
_CLUSTER = "tir.cluster_dim_"  # tags of the launch, by axis
MAX_BLOCK_Z = 64
MAX_SHARED_BYTES = 227 * 1024  # a block's, static and dynamic
REGISTERS = 64 * 1024  # of an SM
MOST_REGISTERS = 256  # of a thread, as they are allocated
REGISTER_UNIT = 8
_LAUNCH_BOUNDS = re.compile(r"__launch_bounds__\((?P<threads>\d+), (?P<blocks>\d+)\)")
WARPGROUP_THREADS = 128
SETMAXNREG_RANGE, SETMAXNREG_STEP = (24, 256), 8

MAX_TMA_RANK, MAX_BOX = 5, 256
MAX_TMA_DTYPE = 12  # CUtensorMapDataType; the packed 4- and 6-bit types after it need sm_100
TMA_STRIDE_BYTES = 16
TMA_MAX_STRIDE = 2**40
TMA_MAX_EXTENT = 2**32
TMA_SHARED_BYTES = 128
# CUtensorMapSwizzle -> bytes of a swizzled row; the pattern repeats every 8 rows.
TMA_SWIZZLE_BYTES = {1: 32, 2: 64, 3: 128}
SHARED_ADDRESS_BITS = FIELD_BITS + 4  # a descriptor holds addresses in units of 16 bytes


class Alignment:
    """Property `alignment`."""

    name = NAME
    depends = ("overflow",)

    def claims(self, context: Context) -> Claims:
        """Return the obligations of accesses, descriptors and launch."""
        memory, claims = context.memory, Claims()
        claims.unsupported += [Issue(site.span, what) for site, what in memory.unsupported]
        claims.obligations += [o for a in memory.accesses if (o := _vector(a)) is not None]
        claims.obligations += [_operand(u) for u in memory.descriptors]
        claims.obligations += [_box(c) for c in memory.tma]
        for descriptor in context.host.descriptors.values():
            claims.obligations.append(_descriptor(context, descriptor, memory.tma))
        claims.obligations += instruction_limits(context)
        claims.obligations += _launch(context)
        registers = _registers(context, claims)
        claims.obligations += registers
        claims.assumptions += [
            "tensors start at multiples of 16 bytes: the public functions check it",
            "an empty grid is not launched: the public functions return first",
            "local arrays are kept in registers, or aligned for the vector accesses made to them",
        ]
        if registers:
            claims.assumptions.append(
                "a block with setmaxnreg starts with as many registers as its launch bounds allow (ptxas)"
            )
        return claims


PROPERTY = Alignment()


def _vector(access: Access) -> Obligation | None:
    count = 1 if access.each else constant_of(access.count)
    if not (access.wide or access.each) or count is None:
        return None
    width = count * access.unit_bits // BYTE_BITS
    if width == 0:  # one packed sub-byte element: its byte is addressed
        return None
    needed = min(width & -width, MAX_VECTOR_BYTES)
    goals = [z3.BoolVal(access.storage.alignment_bytes % needed == 0)]
    goals.append((access.start * access.unit_bits) % (needed * BYTE_BITS) == 0)
    return Obligation(
        f"{access.what} of {width} bytes at a multiple of {needed}",
        access.site.span,
        access.site.scope.hypotheses,
        conjunction(goals),
        show={
            "buffer": f"{access.storage.name} ({access.storage.kind} {access.storage.element})",
            "element": access.start,
            "byte_address": access.start * access.unit_bits / BYTE_BITS,
            "alignment_bytes": needed,
            "base_alignment_bytes": access.storage.alignment_bytes,
        },
        site=access.site,
    )


def _operand(use: DescriptorUse) -> Obligation:
    storage, start = use.base.storage, use.start_bytes
    position = start % use.atom_bytes
    goals = [start % UNIT_BYTES == 0, *(offset % UNIT_BYTES == 0 for offset in use.offsets)]
    if use.swizzle:
        # The hardware permutes by address bits, and base_offset is 0: atoms have to be aligned, and
        # an operand may only start inside the first row of one.
        goals.append(z3.BoolVal(storage.alignment_bytes % use.atom_bytes == 0))
        goals.append(position + INSTRUCTION_K_BYTES <= use.row_bytes if use.k_major else position == 0)
    else:
        goals.append(z3.BoolVal(storage.alignment_bytes % UNIT_BYTES == 0))
    fields = (use.leading_bytes, use.stride_bytes)
    goals += [z3.BoolVal(0 <= f // UNIT_BYTES < 1 << FIELD_BITS) for f in fields]
    if storage.arena_bytes is not None:
        end = storage.arena_bytes + start + use.extent_bytes
        goals.append(end <= MAX_SHARED_BYTES)
    return Obligation(
        f"wgmma operand {use.name} descriptor fields and swizzle atom",
        use.site.span,
        use.site.scope.hypotheses,
        conjunction(goals),
        show={"buffer": storage.name, "byte_address": start, "atom_bytes": use.atom_bytes},
        site=use.site,
    )


def _box(copy: TmaCopy) -> Obligation:
    """The shared side of a TMA copy starts at a multiple of 128 bytes, and of its swizzle pattern."""
    shared, swizzle = copy.shared, copy.descriptor.swizzle
    if swizzle and swizzle not in TMA_SWIZZLE_BYTES:
        raise ir.UnsupportedIR(f"TMA swizzle mode {swizzle}")
    needed = max(TMA_SHARED_BYTES, 8 * TMA_SWIZZLE_BYTES.get(swizzle, 0))
    goals = [
        z3.BoolVal(shared.storage.alignment_bytes % needed == 0),
        (shared.start * shared.unit_bits) % (needed * BYTE_BITS) == 0,
    ]
    return Obligation(
        f"{shared.what} at a multiple of {needed} bytes",
        copy.site.span,
        copy.site.scope.hypotheses,
        conjunction(goals),
        show={
            "buffer": shared.storage.name,
            "byte_address": shared.start * shared.unit_bits / BYTE_BITS,
            "alignment_bytes": needed,
        },
        site=copy.site,
    )


def _descriptor(context: Context, descriptor: Descriptor, copies: list[TmaCopy]) -> Obligation:
    if descriptor.interleave != 0:
        raise ir.UnsupportedIR(f"TMA interleave mode {descriptor.interleave}")
    term = context.encoder.term
    bits = descriptor.tensor.dtype.bits
    inner_bits = descriptor.box[0] * bits
    span = TMA_SWIZZLE_BYTES.get(descriptor.swizzle)
    goals = [
        z3.BoolVal(0 <= descriptor.dtype <= MAX_TMA_DTYPE),
        z3.BoolVal(1 <= len(descriptor.box) <= MAX_TMA_RANK),
        z3.BoolVal(all(1 <= b <= MAX_BOX for b in descriptor.box)),
        z3.BoolVal(inner_bits % (TMA_STRIDE_BYTES * BYTE_BITS) == 0),
        z3.BoolVal(span is None or inner_bits <= span * BYTE_BITS),
    ]
    for extent in (term(d, Scope()) for d in descriptor.dims):
        goals.append(z3.And(extent >= 1, extent <= TMA_MAX_EXTENT))
    for stride in (term(s, Scope()) for s in descriptor.strides[1:]):
        goals.append(z3.And(stride % TMA_STRIDE_BYTES == 0, stride < TMA_MAX_STRIDE))
    spans = [c.site.span for c in copies if c.descriptor is descriptor]
    return Obligation(
        f"TMA descriptor {descriptor.name} within the driver's limits",
        spans[0] if spans else None,
        (*context.hypotheses, *_not_empty(context)),
        conjunction(goals),
        show={"buffer": descriptor.tensor.name, "box": str(descriptor.box), "swizzle": descriptor.swizzle},
    )


# --------------------------------------------------------------------------- launch
def _not_empty(context: Context) -> list[Hypothesis]:
    found = []
    for tag, extent in context.host.extents.items():
        if tag.startswith("blockIdx"):
            term = context.encoder.term(extent, Scope())
            found.append(Hypothesis(f"{tag} extent >= 1: an empty grid is not launched", "assume", term >= 1))
    return found


def _launch(context: Context) -> list[Obligation]:
    term = context.encoder.term
    host = {tag: term(extent, Scope()) for tag, extent in context.host.extents.items()}
    found = []
    for site in context.device_sites:  # what the device code takes for its extents is what is launched
        if isinstance(site.node, ir.Launch) and site.node.tag in host:
            value = term(site.node.extent, site.scope)
            what = f"{site.node.tag} is launched with the extent that the kernel assumes"
            goal = value == host[site.node.tag]
            found.append(
                Obligation(what, site.span, site.scope.hypotheses, goal, {"value": host[site.node.tag]}, site)
            )
    for tag, limit in MAX_GRID.items():
        if tag in host:
            what = f"{tag} extent at most {limit}"
            goal = z3.And(host[tag] >= 0, host[tag] <= limit)
            found.append(Obligation(what, None, context.hypotheses, goal, {"value": host[tag]}))
    found += _clusters(context, host)
    threads = z3.IntVal(1)
    for tag in ("threadIdx.x", "threadIdx.y", "threadIdx.z"):
        threads = threads * host.get(tag, z3.IntVal(1))
    goal = z3.And(threads >= 1, threads <= MAX_THREADS, host.get("threadIdx.z", z3.IntVal(1)) <= MAX_BLOCK_Z)
    found.append(Obligation(f"at most {MAX_THREADS} threads", None, (), goal, {"value": threads}))
    found.append(_shared_memory(context, host.get("dynamic_shared", z3.IntVal(0))))
    return found


def _clusters(context: Context, host: dict[str, z3.ArithRef]) -> list[Obligation]:
    """Return that the grid is made of whole clusters, of as many blocks as may be in one."""
    blocks = z3.IntVal(1)
    found = []
    for axis in "xyz":
        dim, extent = host.get(f"{_CLUSTER}{axis}"), host.get(f"blockIdx.{axis}", z3.IntVal(1))
        if dim is None:
            continue
        blocks = blocks * dim
        what = f"blockIdx.{axis} extent is a multiple of the cluster's"
        found.append(Obligation(what, None, context.hypotheses, extent % dim == 0, {"value": extent}))
    if found:
        goal = z3.And(blocks >= 1, blocks <= MAX_CLUSTER)
        found.append(Obligation(f"at most {MAX_CLUSTER} blocks a cluster", None, (), goal, {"value": blocks}))
    return found


def _shared_memory(context: Context, dynamic: z3.ArithRef) -> Obligation:
    storages = context.storages
    static = z3.IntVal(0)
    for storage in storages.by_var.values():
        owned = storage.kind in ("shared", "barrier") and storage.arena_bytes is None
        if owned and storage is not storages.arena:
            static = static + storage.elements * storage.element.bits / BYTE_BITS + UNIT_BYTES  # padding
    arena = storages.arena.elements if storages.arena is not None else z3.IntVal(0)
    goal = z3.And(dynamic >= arena, static + dynamic <= MAX_SHARED_BYTES)
    show = {"static_bytes": static, "dynamic_bytes": dynamic}
    return Obligation(f"shared memory at most {MAX_SHARED_BYTES} bytes", None, (), goal, show)


def _registers(context: Context, claims: Claims) -> list[Obligation]:
    """Return that setmaxnreg hands out no more registers than the block was launched with.

    It takes them from the block's own: a warpgroup that asks for one more waits for ever, also where the
    multiprocessor has it. 384 threads have 168 each, 64512 and not 65536.
    """
    sites = [s for s in context.device_sites if isinstance(s.node, ir.Call) and s.node.op == "set_max_nreg"]
    if not sites:
        return []
    extent = constant_of(context.encoder.term(context.host.extents["threadIdx.x"], Scope()))
    if extent is None or extent % WARPGROUP_THREADS:
        claims.unknown.append(Issue(sites[0].span, "setmaxnreg in a block that is no whole warpgroups"))
        return []
    bounds = _LAUNCH_BOUNDS.search(context.extracted.cuda_text)
    if bounds is None or int(bounds["threads"]) != extent:
        claims.unknown.append(Issue(sites[0].span, "setmaxnreg in a kernel without launch bounds"))
        return []
    resident = extent * int(bounds["blocks"])
    launched = min(REGISTERS // resident // REGISTER_UNIT * REGISTER_UNIT, MOST_REGISTERS) * extent
    total, found = 0, []
    for first in range(0, extent, WARPGROUP_THREADS):
        ran = [s for s in sites if _runs(s, first) and _runs(s, first + WARPGROUP_THREADS - 1)]
        part = [s for s in sites if _runs(s, first) != _runs(s, first + WARPGROUP_THREADS - 1)]
        if len(ran) != 1 or part or any(_runs(s, first) is None for s in sites):
            message = f"setmaxnreg of threads {first} to {first + WARPGROUP_THREADS - 1} is not decided"
            claims.unknown.append(Issue(sites[0].span, message))
            return []
        count = _register_count(ran[0].node)
        legal = SETMAXNREG_RANGE[0] <= count <= SETMAXNREG_RANGE[1] and count % SETMAXNREG_STEP == 0
        goal = z3.BoolVal(legal)
        found.append(Obligation(f"setmaxnreg {count}", ran[0].span, (), goal, {"registers": count}, ran[0]))
        total += count * WARPGROUP_THREADS
    goal = z3.BoolVal(total <= launched)
    what = f"registers of all warpgroups at most the {launched} that the block is launched with"
    return [*found, Obligation(what, sites[0].span, (), goal, {"registers": total})]


def _register_count(call: ir.Stmt | ir.Expr) -> int:
    match call:
        case ir.Call(args=(ir.Const(value=count), *_)):
            return int(count)
    raise ir.UnsupportedIR("setmaxnreg of a computed number of registers")


def _runs(site: Site, thread: int) -> bool | None:
    """Return whether thread `thread` gets to `site`; None where that depends on more than its index."""
    index = next(i for i in site.scope.launch if i.tag == "threadIdx.x")
    guards = [h.term for h in site.scope.hypotheses if h.kind == "guard"]
    term = z3.simplify(z3.substitute(conjunction(guards), (index.const, z3.IntVal(thread))))
    return z3.is_true(term) if z3.is_true(term) or z3.is_false(term) else None
