"""Two runs on equal inputs give equal bits, whatever the order in which threads and blocks arrive.

A kernel without data races depends on arrival only through atomics, through values that differ from
run to run (clocks, which lanes happen to be active) and through loops that wait on memory. Atomics
are fine where no two updates meet in one element (proved), or where the updates are integer
operations of one kind whose result does not depend on their order and no intermediate value is
returned. What else they produce is followed to the tensors that the kernel writes. It may end a wait:
for a counter that only grows to be large enough, since what such waits order is the same in every run
of a kernel without data races, or for a word that a claim of a suite speaks of.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
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
from verify.waiting import Wait, read_wait, reports
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
        flow = _Flow(context, sources, updates)
        flow.follow()
        allowed = _Waits(context, flow, updates, claims).check()
        flow.report(claims, allowed)
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
    loads = [u for u in (first, second) if u.kind == "load"]
    if len(loads) == 1:
        (load,) = loads
        known = sources.get(id(load.node))
        if known is None or known.answer is None or known.answer.verdict is not Verdict.REFUTED:
            sources[id(load.node)] = Source(f"the value that atomic load of {storage} finds", answer)
        return
    if loads:
        return
    if first.is_float or second.is_float:
        ways = "in an order that varies: floating-point results differ"
        message = f"two threads update one element of {storage} by atomic {first.kind} {ways}"
    elif first.kind != second.kind or first.kind not in _ORDERLESS:
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


@dataclass(frozen=True)
class _Reach:
    """A statement through which an unstable value reaches a tensor, or threads that wait for it."""

    site: Site
    how: str
    cause: Source


class _Flow:
    """What depends on unstable values."""

    def __init__(self, context: Context, sources: Mapping[int, Source], updates: Sequence[Update]) -> None:
        self.sources = sources
        self.tainted: dict[ir.Var, Source] = {}
        self.found: dict[int, _Reach] = {}
        self._tensors = {v for v, s in context.storages.by_var.items() if s.kind == "global"}
        self.sites = [s for s in context.device_sites if isinstance(s.node, ir.Stmt)]
        self._updates = {id(u.node): u for u in updates if u.kind != "load"}

    def follow(self) -> None:
        """Find all that is reached: run through the statements until nothing is added."""
        changed = bool(self.sources)
        while changed:
            changed = False
            for site in self.sites:
                for target, how, cause in self._reached(site):
                    if target in self._tensors or target is None:
                        self.found.setdefault(id(site.node), _Reach(site, how, cause))
                    elif target not in self.tainted:
                        self.tainted[target] = cause
                        changed = True

    def report(self, claims: Claims, allowed: set[int]) -> None:
        """Add an answer for each statement but those of `allowed`."""
        for key, reach in self.found.items():
            if key in allowed:
                continue
            site, cause = reach.site, reach.cause
            what = f"{reach.how} depends on {cause.what}"
            if cause.answer is not None and cause.answer.verdict is not Verdict.REFUTED:
                reason = f", which threads may compete for ({cause.answer.reason})"
                claims.unknown.append(Issue(site.span, what + reason))
                continue
            goal = Obligation(what, site.span, site.scope.hypotheses, z3.BoolVal(False), {}, site)
            (answer,) = Prover(SEARCH_RLIMIT, recheck=False).prove([goal])
            if answer.model and cause.answer is not None:
                # Either update may come first: the model is of the two, the place is of the consequence.
                pair = replace(cause.answer.obligation, what=what, site=site, span=site.span)
                answer = replace(cause.answer, obligation=pair)
            claims.answers.append(answer)

    def cause(self, *nodes: ir.Expr, but: ir.Expr | None = None) -> Source | None:
        """Return an unstable value that expressions depend on, other than the result of `but`."""
        for node in (n for top in nodes for n in ir.walk(top)):
            if node is not but and id(node) in self.sources:
                return self.sources[id(node)]
            if isinstance(node, ir.Load) and node.buffer.data in self.tainted:
                return self.tainted[node.buffer.data]
            if isinstance(node, ir.Var) and node in self.tainted:
                return self.tainted[node]
        return None

    def guard(self, site: Site) -> Source | None:
        """Return an unstable value that decides whether, or how often, a statement runs."""
        conditions = [s.cond for s in site.path if isinstance(s, (ir.If, ir.While))]
        conditions += [e for s in site.path if isinstance(s, ir.For) for e in (s.start, s.extent)]
        return self.cause(*conditions)

    def _reached(self, site: Site) -> Iterator[tuple[ir.Var | None, str, Source]]:
        """Yield (storage, how, cause) for what the statement makes depend on an unstable value."""
        guard = self.guard(site)
        match site.node:
            case ir.Store(buffer=buffer, indices=indices, value=value):
                for how, cause in (
                    (f"where {buffer.name} is written", self.cause(*indices)),
                    (f"what is written to {buffer.name}", self.cause(value)),
                    (f"whether {buffer.name} is written", guard),
                ):
                    if cause is not None:
                        yield buffer.data, how, cause
            case ir.Bind(var=var, value=value):
                if cause := self.cause(value) or guard:
                    yield var, "", cause
            case ir.Eval(value=ir.Call(op=op, args=args) as call) if not ops.is_plain(call):
                # The node itself being a source is no use of its value.
                if cause := self.cause(*args) or guard:
                    targets = [n.data for a in args for n in ir.walk(a) if isinstance(n, ir.AccessPtr)]
                    targets += [a for a in args if isinstance(a, ir.Var)]
                    for target in targets or [None]:
                        yield target, f"{op} on a tensor", cause
            case ir.Eval(value=ir.Call(op=op, args=args)) if op in ops.SYNC or op in ops.EARLY_EXIT:
                if cause := self.cause(*args) or guard:
                    yield None, f"whether {op} is reached", cause
        own = _expressions(site.node)
        for node in (n for top in own for n in ir.walk(top)):
            if (update := self._updates.get(id(node))) is None:
                continue
            if cause := self.cause(*own, but=update.node) or guard:
                yield None, f"atomic {update.kind} on {update.storage}", cause


def _expressions(node: ir.Stmt | ir.Expr) -> tuple[ir.Expr, ...]:
    """Return what a statement evaluates itself, without the statements in it."""
    return tuple(child for child in ir.children(node) if isinstance(child, ir.Expr))


# --------------------------------------------------------------------------- loops that wait
class _Waits:
    """Which loops may run as often as it happens, since what they order does not vary."""

    def __init__(self, context: Context, flow: _Flow, updates: Sequence[Update], claims: Claims) -> None:
        self.context, self.flow, self.claims = context, flow, claims
        self.updates = updates
        self.reports = reports(context.extracted.device.body)
        self.storage = {id(u.node): u.storage for u in updates}
        accesses = context.memory.accesses
        atomics = {id(u.node) for u in updates}
        self.plainly = {a.storage.name for a in accesses if a.mode != "r" and id(a.site.node) not in atomics}
        self.written = {a.storage.name for a in accesses if a.mode != "r"}
        self.written |= {c.descriptor.tensor.name for c in context.memory.tma if c.store}
        self.allowed: dict[int, str] = {}  # statement of a report -> storage that it is in

    def check(self) -> set[int]:
        """Report loops that may order otherwise in another run; return the reports of waits given up."""
        for site in self.flow.sites:
            if isinstance(site.node, ir.While) and (reason := self._wrong(site, site.node)):
                message = "a loop that ends when other threads have written: how often it runs varies"
                self.claims.unknown.append(Issue(site.span, f"{message} ({reason})"))
        return self._reports()

    def _wrong(self, site: Site, loop: ir.While) -> str:
        """Return why what a loop orders may differ between runs; empty if it does not wait, or is fine."""
        loads = [n for n in ir.walk(loop.cond) if isinstance(n, ir.Load)]
        for load in loads:
            if reason := self._read(load):
                return reason
        cause = self.flow.cause(loop.cond)
        if cause is None and not any(id(n) in self.storage for n in ir.walk(loop.cond)):
            return ""
        wait = read_wait(loop)
        if wait is None:
            return "it is no wait for one word"
        if (outside := self.flow.guard(site)) is not None:
            return f"whether it is reached depends on {outside.what}"
        word = self.storage[id(wait.load)]
        claim = self.context.dispatch.exchanged.get(word)
        reason = self._counter(wait, word)
        if reason and claim is None:
            return reason
        if claim is not None:
            self.claims.rests.setdefault(claim, set()).add(word)
        else:
            assumed = (
                f"determinism: what a launch adds to an element of {word} does not pass the end of its type"
            )
            self.claims.assumptions += [] if assumed in self.claims.assumptions else [assumed]
        return self._given_up(wait)

    def _read(self, load: ir.Load) -> str:
        """Return why a value that a loop's condition reads may be one that others write meanwhile."""
        storage = self.context.storages.by_var.get(load.buffer.data)
        if load.buffer.scope.startswith("local"):
            return ""
        if storage is None or storage.kind != "global":
            return f"{load.buffer.name} is read in its condition"
        if (claim := self.context.dispatch.exchanged.get(storage.name)) is not None:
            self.claims.rests.setdefault(claim, set()).add(storage.name)
            return ""
        return f"{storage.name} is read in its condition" if storage.name in self.written else ""

    def _counter(self, wait: Wait, word: str) -> str:
        """Return why a wait may be satisfied by a word, and later no longer."""
        adds = [u for u in self.updates if u.storage == word and u.kind != "load"]
        if not wait.stays:
            return f"it does not wait for {word} to be at least something"
        if (cause := self.flow.cause(wait.goes_on, but=wait.load)) is not None:
            return f"what it waits for depends on {cause.what}"
        grows = all(u.kind == "add" and _is_natural(u.node) for u in adds)
        if not adds or not grows or word in self.plainly:
            return f"{word} does not only grow by atomic adds"
        note = f"{word}: a counter that only grows; waits are until it is large enough"
        self.claims.notes += [] if note in self.claims.notes else [note]
        return ""

    def _given_up(self, wait: Wait) -> str:
        """Return why a wait may end unsatisfied without a word of it."""
        if not wait.others:
            return ""
        if any(id(n) in self.storage for other in wait.others for n in ir.walk(other)):
            return "it waits for several words"
        said = self.reports.get(id(wait.loop))
        if said is None:
            return "it may be given up, and nothing says so"
        self.allowed[id(said)] = self.storage[id(said)]
        return ""

    def _reports(self) -> set[int]:
        """Return the statements by which waits that were given up say so; what they say is above 0."""
        found: set[int] = set()
        for word in dict.fromkeys(self.allowed.values()):
            others = [u for u in self.updates if u.storage == word and u.kind != "load"]
            if any(id(u.node) not in self.allowed for u in others) or word in self.plainly:
                span = others[0].writer.site.span
                self.claims.unknown.append(Issue(span, f"{word} says more than that a wait was given up"))
                continue
            self.claims.assumptions.append(
                f"determinism: of launches that leave {word} at 0; a wait that is given up raises it by an "
                "atomic maximum, and what such a launch leaves is not compared"
            )
            for update in others:
                site = update.writer.site
                code = self.context.encoder.term(update.node.args[1], site.scope)
                what = f"a wait that is given up puts a number above 0 in {word}"
                goal = Obligation(what, site.span, site.scope.hypotheses, code >= 1, {"code": code}, site)
                self.claims.obligations.append(goal)
                found.add(id(site.statement))
        return found


def _is_natural(add: ir.Call) -> bool:
    """Return whether an atomic adds a constant that is not below 0."""
    amount = add.args[1]
    return isinstance(amount, ir.Const) and amount.dtype.is_int and amount.value >= 0
