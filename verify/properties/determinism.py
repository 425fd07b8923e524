"""Two runs on equal inputs give equal bits, whatever the order in which threads and blocks arrive.

A kernel without data races depends on arrival only through atomics, through values that differ from
run to run (clocks, which lanes happen to be active) and through loops that wait on memory. Atomics
are fine where no two updates meet in one element (proved), or where the updates are integer
operations of one kind whose result does not depend on their order and no intermediate value is
returned. What else they produce is followed to the tensors that the kernel writes.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import z3

from verify import ir, ops
from verify.access import Access
from verify.encode import Index
from verify.intarith import constant_of
from verify.inverse import Axis
from verify.properties import Claims, Context, Issue
from verify.properties.coverage import Writer, apart, writer_of
from verify.solve import Answer, Obligation, Prover
from verify.text import show
from verify.verdict import Verdict
from verify.walk import Site

NAME = "determinism"
SEARCH_RLIMIT = 10_000_000  # z3 resource units to see whether two updates may meet
_ATOMIC = re.compile(r"atomic_(add|max|min|or|load|store)(x2|x4)?(_ret)?_elem_op")
# Values that differ between runs: which lanes are active together, clocks, where a block runs.
_UNSTABLE = frozenset({"activemask", "tvm_warp_activemask", "ballot"})
_CLOCK = re.compile(r"\W*(clock|clock64|globaltimer|smid|nsmid|warpid|nwarpid|wall_clock64)\W*(\(.*)?")
_ORDERLESS = ("add", "max", "min", "or")  # commutative and associative on integers that wrap


@dataclass(frozen=True)
class Update:
    """One atomic statement.

    Attributes:
        kind: add, max, min, or, load or store.
        returns: its result is the value before the update.
    """

    kind: str
    returns: bool
    is_float: bool
    writer: Writer
    storage: str
    is_shared: bool
    node: ir.Expr

    @property
    def is_orderless(self) -> bool:
        """The contents after all updates do not depend on their order."""
        return self.kind in _ORDERLESS and not self.is_float


@dataclass(frozen=True)
class Source:
    """An unstable value; `answer` shows two updates that compete for it, where that is why."""

    what: str
    answer: Answer | None = None


class Determinism:
    """Property `determinism`."""

    name = NAME
    depends = ("overflow", "bounds", "race")

    def claims(self, context: Context) -> Claims:
        """Return what has to hold of every atomic, and where unstable values end up."""
        claims = Claims()
        claims.unsupported += [Issue(site.span, what) for site, what in context.memory.unsupported]
        updates = list(_updates(context))
        sources: dict[int, Source] = {}
        for storage in dict.fromkeys(u.storage for u in updates):
            group = [u for u in updates if u.storage == storage]
            _check_group(context, storage, group, sources, claims)
        for site in context.device_sites:
            if isinstance(site.node, ir.Call) and _is_unstable(site.node):
                sources[id(site.node)] = Source(show(site.node))
            if isinstance(site.node, ir.While) and _waits(site.node):
                message = "a loop that ends when other threads have written: how often it runs varies"
                claims.unknown.append(Issue(site.span, message))
        if sources:
            _follow(context, sources, claims)
        if not updates:
            claims.notes.append("no atomics: every value is computed in program order by its own thread")
        return claims


PROPERTY = Determinism()


# --------------------------------------------------------------------------- atomics
def _updates(context: Context) -> Iterator[Update]:
    for access in context.memory.accesses:
        node = access.site.node
        found = _ATOMIC.fullmatch(node.op) if isinstance(node, ir.Call) else None
        if found is None or access.mode != "rw" or not isinstance(node, ir.Call):
            continue
        count = constant_of(access.count) or 1
        writer = _private(access, Axis(access.start, count))
        is_float = not _element(access).is_int
        is_shared = access.storage.kind == "shared"
        kind, returns = found[1], found[3] is not None
        yield Update(kind, returns, is_float, writer, access.storage.name, is_shared, node)
    for copy in context.memory.tma:
        if copy.store and copy.reduce:
            axes = tuple(Axis(c, b) for c, b in zip(copy.coordinates, copy.descriptor.box, strict=True))
            tensor = copy.descriptor.tensor
            writer = writer_of(copy.site, f"TMA reduction into {tensor.name}", axes, tensor.dtype.bits)
            assert isinstance(copy.site.node, ir.Call), "a copy is a call"
            is_float = not tensor.dtype.is_int
            yield Update("add", False, is_float, writer, tensor.name, False, copy.site.node)


def _element(access: Access) -> ir.DType:
    match access.site.node:
        case ir.Call(args=(ir.AccessPtr(element=element), *_)):
            return element
        case ir.Call(args=(ir.Call(op="address_of", args=(ir.Load(buffer=buffer),)), *_)):
            return buffer.dtype
    return access.storage.element


def _private(access: Access, axis: Axis) -> Writer:
    """Return the update as a writer; of shared memory the block is the same for all that meet."""
    writer = writer_of(access.site, access.what, (axis,), access.unit_bits)
    if access.storage.kind != "shared":
        return writer
    within: tuple[Index, ...] = tuple(i for i in writer.indices if not i.tag.startswith("blockIdx"))
    return replace(writer, indices=within)


def _check_group(
    context: Context, storage: str, group: Sequence[Update], sources: dict[int, Source], claims: Claims
) -> None:
    kinds = {u.kind for u in group}
    if len(kinds) == 1 and all(u.is_orderless and not u.returns for u in group):
        (kind,) = kinds
        claims.notes.append(
            f"{storage}: integer atomic {kind}, commutative and associative, nothing returned"
        )
        return
    pairs = [(a, b) for n, a in enumerate(group) for b in group[n:]]
    if any(len(a.writer.axes) != len(b.writer.axes) for a, b in pairs):
        claims.unknown.append(Issue(group[0].writer.site.span, f"{storage} is updated in two ways"))
        return
    obligations = [apart(context, storage, a.writer, b.writer) for a, b in pairs]
    answers = Prover(SEARCH_RLIMIT, recheck=False).prove(obligations)
    if all(a.verdict is Verdict.PROVED for a in answers):
        claims.obligations += [
            replace(o, what=f"no two updates meet in an element of {storage}") for o in obligations
        ]
        claims.notes.append(f"{storage}: atomics, at most one update an element")
        return
    by_goal = {id(a.obligation): a for a in answers}
    for obligation, (first, second) in zip(obligations, pairs, strict=True):
        answer = by_goal[id(obligation)]
        if answer.verdict is not Verdict.PROVED:
            _meeting(storage, first, second, answer, sources, claims)


def _meeting(
    storage: str,
    first: Update,
    second: Update,
    answer: Answer,
    sources: dict[int, Source],
    claims: Claims,
) -> None:
    """Report two updates that may meet, or remember that what they return depends on their order."""
    if first.is_float and second.is_float:
        ways = "in an order that varies: floating-point results differ"
        message = f"two threads update one element of {storage} by atomic {first.kind} {ways}"
    elif first.kind != second.kind or first.kind not in _ORDERLESS:
        if {first.kind, second.kind} == {"load"}:
            return
        message = (
            f"atomic {first.kind} and {second.kind} meet in one element of {storage}: their order decides"
        )
    else:
        for update in (first, second):
            if update.returns:
                what = f"the value that atomic {update.kind} on {storage} returns"
                sources[id(update.node)] = Source(what, answer)
        return
    claims.answers.append(replace(answer, obligation=replace(answer.obligation, what=message)))


# --------------------------------------------------------------------------- unstable values
def _is_unstable(call: ir.Call) -> bool:
    if call.op in _UNSTABLE:
        return True
    if call.op not in ("call_extern", "call_pure_extern"):
        return False
    return any(isinstance(a, ir.Str) and _CLOCK.fullmatch(a.value) for a in call.args[:1])


def _waits(loop: ir.While) -> bool:
    """Return whether the loop's condition reads memory that other threads can write."""
    loads = [n for n in ir.walk(loop.cond) if isinstance(n, ir.Load)]
    shared = any(not n.buffer.scope.startswith("local") for n in loads)
    calls = any(isinstance(n, ir.Call) and n.op.startswith("atomic") for n in ir.walk(loop.cond))
    return shared or calls


def _follow(context: Context, sources: dict[int, Source], claims: Claims) -> None:
    """Report every statement through which an unstable value reaches a tensor or a result of one."""
    tainted: dict[ir.Var, Source] = {}
    tensors = {v for v, s in context.storages.by_var.items() if s.kind == "global"}
    sites = [s for s in context.device_sites if isinstance(s.node, ir.Stmt)]
    reported: dict[int, tuple[Site, str, Source]] = {}
    changed = True
    while changed:
        changed = False
        for site in sites:
            for target, how, cause in _reached(site, sources, tainted):
                if target in tensors or target is None:
                    reported.setdefault(id(site.node), (site, how, cause))
                elif target not in tainted:
                    tainted[target] = cause
                    changed = True
    for site, how, cause in reported.values():
        what = f"{how} depends on {cause.what}"
        goal = Obligation(what, site.span, site.scope.hypotheses, z3.BoolVal(False), {}, site)
        (answer,) = Prover(SEARCH_RLIMIT, recheck=False).prove([goal])
        if answer.model and cause.answer is not None and cause.answer.verdict is Verdict.REFUTED:
            # Either update may come first: the model is of the two, the place is of the consequence.
            pair = replace(cause.answer.obligation, what=what, site=site, span=site.span)
            answer = replace(cause.answer, obligation=pair)
        claims.answers.append(answer)


def _reached(
    site: Site, sources: dict[int, Source], tainted: dict[ir.Var, Source]
) -> Iterator[tuple[ir.Var | None, str, Source]]:
    """Yield (storage, how, cause) for what the statement makes depend on an unstable value."""

    def cause_of(*nodes: ir.Expr) -> Source | None:
        for node in (n for top in nodes for n in ir.walk(top)):
            if id(node) in sources:
                return sources[id(node)]
            if isinstance(node, ir.Load) and node.buffer.data in tainted:
                return tainted[node.buffer.data]
            if isinstance(node, ir.Var) and node in tainted:
                return tainted[node]
        return None

    conditions = [s.cond for s in site.path if isinstance(s, (ir.If, ir.While))]
    conditions += [s.extent for s in site.path if isinstance(s, ir.For)]
    guard = cause_of(*conditions) if conditions else None
    match site.node:
        case ir.Store(buffer=buffer, indices=indices, value=value):
            for how, cause in (
                (f"where {buffer.name} is written", cause_of(*indices)),
                (f"what is written to {buffer.name}", cause_of(value)),
                (f"whether {buffer.name} is written", guard),
            ):
                if cause is not None:
                    yield buffer.data, how, cause
        case ir.Bind(var=var, value=value):
            if cause := cause_of(value) or guard:
                yield var, "", cause
        case ir.Eval(value=ir.Call(op=op, args=args) as call) if not ops.is_plain(call):
            # The node itself being a source is no use of its value.
            if cause := cause_of(*args) or guard:
                targets = [n.data for a in args for n in ir.walk(a) if isinstance(n, ir.AccessPtr)]
                targets += [a for a in args if isinstance(a, ir.Var)]
                for target in targets or [None]:
                    yield target, f"{op} on a tensor", cause
