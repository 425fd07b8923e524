"""Every byte that is read has been written: registers, variables, shared memory, and outputs.

For each storage of the device IR the statements that touch it are followed in program order with the
set of units that are surely written (`verify.writes`). A private storage has one set a thread; a shared
one has one for the block, since a byte may come from any thread in an earlier or the same barrier
interval (that the write is ordered before the read is what `race` proves). Threads, loops inside a tile
and pipeline stages are enumerated; writes under conditions on blocks and shapes, such as the guarded
part of a ragged tile, count where the solvers show that the condition follows from the read's.
"""

from collections.abc import Iterator, Sequence
from math import gcd

import z3

from verify import ir, ops
from verify.access import Access
from verify.descriptors import DescriptorUse
from verify.intarith import conjunction, constant_of
from verify.ir import UnsupportedIR
from verify.properties import Claims, Context, Issue
from verify.solve import Obligation
from verify.storage import BYTE_BITS, Storage
from verify.writes.flow import Flow, Missing
from verify.writes.tree import Use, build, counters_of

NAME = "init"
_FENCE = "wgmma register fence"  # keeps registers in place for the compiler; reads none of their values
_WORKSPACE = "reduction workspace"  # each thread writes its slot before any reads it
_SCALE_D = {"ptx_wgmma_rs": 11, "ptx_wgmma_ss": 12}  # argument: 0 where the old accumulator is not read
_FOLLOWED = ("local", "shared")


class Init:
    """Property `init`."""

    name = NAME
    depends = ("overflow", "bounds", "race")

    def claims(self, context: Context) -> Claims:
        """Return what has to hold where writes are conditional; what enumeration settles is in the notes."""
        claims = Claims()
        claims.unsupported += [Issue(site.span, what) for site, what in context.memory.unsupported]
        for site in context.device_sites:
            if isinstance(site.node, ir.Call) and site.node.op in ops.EARLY_EXIT:
                claims.unsupported.append(Issue(site.span, f"{site.node.op}: what follows may not run"))
        followed, reads, checked = 0, 0, 0
        for storage, uses in _by_storage(context).values():
            if not any(u.reads for u in uses):
                continue
            try:
                flow = _follow(context, storage, uses, claims)
                followed, reads, checked = followed + 1, reads + flow.reads, checked + flow.checked
            except UnsupportedIR as reason:
                span = next(u.site.span for u in uses if u.reads)
                claims.unknown.append(Issue(span, f"{storage.name}: {reason}"))
        _tensors(context, claims)
        claims.notes.append(f"{followed} storages, {reads} reads; enumerated: {checked} units of threads")
        return claims


PROPERTY = Init()


# --------------------------------------------------------------------------- private and shared memory
def _by_storage(context: Context) -> dict[int, tuple[Storage, list[Use]]]:
    found: dict[int, tuple[Storage, list[Access | DescriptorUse]]] = {}
    for access in context.memory.accesses:
        if access.storage.kind in _FOLLOWED and access.mode != "pointer" and access.what != _FENCE:
            found.setdefault(id(access.storage), (access.storage, []))[1].append(access)
    for use in context.memory.descriptors:
        found.setdefault(id(use.base.storage), (use.base.storage, []))[1].append(use)
    return {key: (storage, _uses(context, storage, accesses)) for key, (storage, accesses) in found.items()}


def _uses(context: Context, storage: Storage, accesses: Sequence[Access | DescriptorUse]) -> list[Use]:
    unit = _unit(storage, accesses)
    uses = []
    for access in accesses:
        if isinstance(access, DescriptorUse):
            start = access.start_bytes
            if access.swizzle:  # chunks may come from anywhere in the aligned atom
                start = start - start % access.atom_bytes
            per = BYTE_BITS // unit
            what = f"wgmma {access.name} from {storage.name}"
            uses.append(
                Use(
                    what,
                    access.site,
                    start * per,
                    access.extent_bytes * per,
                    unit,
                    True,
                    False,
                    is_bound=True,
                )
            )
            continue
        count = constant_of(access.count)
        per = access.unit_bits // unit
        start = access.start * per if per > 1 else access.start
        if count is None:
            count = -1
        reads, writes, when = "r" in access.mode, "w" in access.mode, None
        if access.what.startswith(_WORKSPACE):
            reads = False
        if access.what == "wgmma accumulators":
            when = _keeps(context, access)
        what = access.what if storage.name in access.what.split() else f"{access.what} {storage.name}"
        uses.append(Use(what, access.site, start, count * per, unit, reads, writes, when))
    return uses


def _unit(storage: Storage, accesses: Sequence[Access | DescriptorUse]) -> int:
    unit = storage.element.bits
    for access in accesses:
        unit = gcd(unit, BYTE_BITS if isinstance(access, DescriptorUse) else access.unit_bits)
    return unit


def _keeps(context: Context, access: Access) -> z3.BoolRef:
    """Return where a product adds to the old accumulator."""
    call = access.site.node
    assert isinstance(call, ir.Call), "accumulators are operands of a call"
    return context.encoder.boolean(call.args[_SCALE_D[call.op]], access.site.scope)


def _follow(context: Context, storage: Storage, uses: Sequence[Use], claims: Claims) -> Flow:
    if any(u.count < 0 for u in uses):
        raise UnsupportedIR("an access of symbolic size")
    size = constant_of(storage.elements)
    if size is None:
        raise UnsupportedIR("storage of symbolic size")
    launch = {i.tag: i for i in uses[0].site.scope.launch if i.tag.startswith("threadIdx")}
    extents = {tag: constant_of(i.extent) for tag, i in launch.items()}
    if "threadIdx.x" not in launch or extents["threadIdx.x"] is None:
        raise UnsupportedIR("symbolic number of threads")
    if any(extents[tag] != 1 for tag in extents if tag != "threadIdx.x"):
        raise UnsupportedIR("threads in more than one dimension")
    fixed = {i.const.decl().name(): 0 for tag, i in launch.items() if tag != "threadIdx.x"}
    units = size * storage.element.bits // uses[0].unit_bits
    thread = launch["threadIdx.x"].const.decl().name()
    nodes = build(_lifetime(context, storage), uses)
    counters = {i.const.decl().name() for u in uses for i in u.site.scope.loops}
    around = frozenset(counters - counters_of(nodes))
    flow = Flow(units, storage.kind == "local", thread, extents["threadIdx.x"] or 0, around)
    flow.run(nodes, fixed)
    claims.obligations += [_obligation(storage, missing) for missing in flow.missing]
    return flow


def _lifetime(context: Context, storage: Storage) -> ir.Stmt:
    """Return the statements for which a storage lasts: an iteration of the loop that declares it, if any."""
    stack = [(context.extracted.device.body, context.extracted.device.body)]
    while stack:
        node, root = stack.pop()
        if isinstance(node, ir.Alloc) and context.storages.by_var.get(node.buffer.data) is storage:
            return root
        inner = node.body if isinstance(node, (ir.For, ir.While)) else root
        stack += [(child, inner) for child in ir.children(node) if isinstance(child, ir.Stmt)]
    return context.extracted.device.body


def _obligation(storage: Storage, missing: Missing) -> Obligation:
    use = missing.use
    pins = conjunction([z3.Int(name) == value for name, value in missing.points.items()])
    # Which read it is goes into the goal: those of one access then share a context, and one query.
    happens = z3.And(pins, missing.when)
    goal = z3.Implies(happens, z3.Or(*missing.writers) if missing.writers else z3.BoolVal(False))
    why = "written only under a condition" if missing.writers else "never written before"
    what = f"{use.what}: every unit is written before ({why})"
    element = missing.unit * use.unit_bits // storage.element.bits
    show = {"buffer": storage.name, "element": element}
    given = use.site.scope.hypotheses
    return Obligation(what, use.site.span, given, goal, show, use.site, exact=not use.is_bound)


# --------------------------------------------------------------------------- tensors
def _tensors(context: Context, claims: Claims) -> None:
    """A tensor that the kernel writes and reads: its contents on entry must be declared to matter."""
    written = {a.storage.name for a in _global(context) if a.mode != "r"}
    written |= {c.descriptor.tensor.name for c in context.memory.tma if c.store}
    in_place = set(context.dispatch.in_place)
    for access in _global(context):
        name = access.storage.name
        if name not in written or access.mode == "w":
            continue
        if name in in_place:
            claims.assumptions.append(f"init: the caller has filled {name}, which is updated in place")
            continue
        if (claim := context.dispatch.exchanged.get(name)) is not None:
            claims.rests.setdefault(claim, set()).add(name)
            continue
        what = f"{access.what}: the kernel reads a tensor that it writes, and nothing says that it was filled"
        site, show = access.site, {"buffer": name, "element": access.start}
        claims.obligations.append(
            Obligation(what, site.span, site.scope.hypotheses, z3.BoolVal(False), show, site)
        )
    for copy in context.memory.tma:
        name = copy.descriptor.tensor.name
        if name not in in_place and name in written and (copy.reduce or not copy.store):
            if (claim := context.dispatch.exchanged.get(name)) is not None and not copy.reduce:
                claims.rests.setdefault(claim, set()).add(name)
                continue
            claims.unknown.append(Issue(copy.site.span, f"TMA reads {name}, which the kernel writes"))


def _global(context: Context) -> Iterator[Access]:
    return (a for a in context.memory.accesses if a.storage.kind == "global")
