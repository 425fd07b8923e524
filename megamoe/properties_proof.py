"""Properties `coverage`, `schedule`, `init`, `race` and `mbarrier` of the fused kernel, for every routing.

What these properties say of a kernel follows data here (the plan decides what roles do), so the verifier
leaves them open. Most of each is what the suites `roles` and `signals` prove of the same CUDA text, the rest
is proved here: outputs (`output_proof`), a thread's own storage (`private_proof`), how much of shared memory
is filled (`filled_proof`). A property is composed mechanically: each storage of the device IR and each place
that touches it is looked up among the events that those claims cover, and what is not found there, or rests
on a claim that is not PROVED of this text, is UNKNOWN. docs/megamoe.md has the lemmas.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, partial

import z3

from megamoe import filled_proof, output_proof, private_proof, roles_proof, signals_proof
from megamoe.config import Config
from megamoe.role_events import Box, Event, Followed
from megamoe.role_terms import shared_storages, written
from megamoe.signal_follow import STATUS
from verify import ir, suites
from verify.ir import UnsupportedIR
from verify.properties import Claims, Issue
from verify.solve import Obligation
from verify.verdict import Verdict

CLAIMS = ("coverage", "schedule", "init", "race", "mbarrier")
KERNEL = "megamoe"
ASSUMPTIONS = (
    "accesses are in bounds (property `bounds`), warps and warpgroups come whole to what they do together "
    "(property `barrier`)",
    "plan: each entry with an expert is some row's target (suite `plan`), so that its row is written",
    "`elect.sync` picks the same lane each time",
    "a generic read before an access of the async proxy needs no proxy fence",
    "`grid_word`, `signals`, `epochs` and `status` are what the launch before left, or zero at first",
)
# What each property takes from the suites, beside what covers single accesses.
_ROLES = {
    "coverage": ("walks",),
    "schedule": ("walks",),
    "init": ("walks", "stages", "sums", "places", "meetings", "barriers", "sources", "nothing-else"),
    "race": ("walks", "stages", "sums", "places", "meetings", "barriers", "nothing-else"),
    "mbarrier": ("walks", "stages", "sums", "places", "barriers", "nothing-else"),
}
_SIGNALS = {
    "coverage": ("order", "tasks", "places", "counters", "end", "nothing-else"),
    "schedule": ("order", "tasks"),
    "init": ("order", "tasks", "dispatch", "rows", "finishers", "places", "counters", "end", "nothing-else"),
    "race": ("order", "tasks", "dispatch", "rows", "finishers", "places", "counters", "end", "nothing-else"),
    "mbarrier": (),
}
# Which claims say how often a tensor's elements are written, and by whom.
_WRITES = {
    **dict.fromkeys(("x_ring", "x_ring_scale", "h_ring", "h_ring_scale", "combine"), ("signals:places",)),
    "wide_ring": (f"roles:{roles_proof.PIECES}",),
    "dispatched": ("signals:counters", "signals:dispatch"),
    "l1_done": ("signals:counters", "signals:finishers"),
    "l2_done": ("signals:counters", "signals:finishers"),
    "widened": ("signals:counters", f"signals:{signals_proof.WIDENED}"),
    **dict.fromkeys(("grid_word", "signals", "epochs"), ("signals:end",)),
    STATUS: ("signals:dispatch", "signals:rows", "signals:end", f"signals:{signals_proof.WIDENED}"),
}
_MBARRIERS = "shared.barrier"
_ONCE = "once: outputs and combine rows with an expert in a launch, a ring's place in each task that has it"
_HERE = frozenset({"here"})  # this module has all there is to say of an access

_POINTERS = {"atomic_load_elem_op": "load", "tma_load": "copy", "initialize_wgmma_descriptor": "operand"}
_NO_ACCESS = frozenset({"handle_add_byte_offset", "prefetch_tma_descriptor"})

Missing = Callable[[str], str]


@dataclass(frozen=True)
class Use:
    """A place of the device IR that touches a storage.

    Attributes:
        key: by which proofs name it: id of the access, or of the call that names the storage.
        storage: name.
        kind: private, descriptor, mbarrier, shared or global.
        how: load; store; atomic (an operation that may write); copy (in bulk, to shared memory); operand (a
            descriptor is set to it); call (which names all of it).
    """

    key: int
    storage: str
    kind: str
    how: str


def uses(function: ir.Function, copies: Mapping[str, Box]) -> list[Use]:
    """Return every place of the device IR that touches a storage; arguments as of `claims`.

    Raises:
        UnsupportedIR: a storage of a scope without a meaning here.
    """
    kinds: dict[ir.Var, tuple[str, str]] = {p: (p.name, "global") for p in function.params}
    for node in ir.walk(function.body):
        if isinstance(node, ir.Alloc):
            kinds[node.buffer.data] = node.buffer.name, _kind(node.buffer)
    for data, (name, _) in shared_storages(function).items():
        kinds.setdefault(data, (name, "shared"))
    found, pointers = [], {}
    for node in ir.walk(function.body):
        match node:
            case ir.Load(buffer=buffer) | ir.Store(buffer=buffer):
                how = "load" if isinstance(node, ir.Load) else "store"
                found.append(Use(id(node), *_known(kinds, buffer.data), how))
            case ir.AccessPtr(data=data):
                found.append(Use(id(node), *_known(kinds, data), pointers.get(id(node), "atomic")))
            case ir.Call(op=op, args=args) if op not in _NO_ACCESS:
                if op in _POINTERS:
                    own = (n for a in args for n in ir.walk(a) if isinstance(n, ir.AccessPtr))
                    pointers |= {id(pointer): _POINTERS[op] for pointer in own}
                for named in (a for a in args if isinstance(a, ir.Var) and a in kinds):
                    storage, kind = kinds[named]
                    if storage in copies:
                        storage = copies[storage].tensor
                    found.append(Use(id(node), storage, kind, "call"))
    return found


def _known(kinds: Mapping[ir.Var, tuple[str, str]], data: ir.Var) -> tuple[str, str]:
    if data not in kinds:
        raise UnsupportedIR(f"{data.name} is in no storage")
    return kinds[data]


def _kind(buffer: ir.Buffer) -> str:
    if private_proof.is_private(buffer):
        return "private"
    if buffer.scope.startswith("local"):
        return "descriptor"
    if buffer.scope == _MBARRIERS:
        return "mbarrier"
    if buffer.scope.startswith("shared"):
        return "shared"
    raise UnsupportedIR(f"{buffer.name} in scope {buffer.scope}")


# --------------------------------------------------------------------------- what covers an access
@dataclass
class _Kernel:
    """A kernel, with what the suites' claims cover of it."""

    function: ir.Function
    copies: Mapping[str, Box]
    config: Config
    roles: roles_proof.Kernel
    signals: signals_proof.Kernel
    private: private_proof.Found
    covering: dict[int, set[str]] = field(default_factory=dict)  # key of a use -> claims

    @cached_property
    def uses(self) -> list[Use]:
        return uses(self.function, self.copies)

    @cached_property
    def written(self) -> frozenset[str]:
        """Tensors in memory that the kernel writes."""
        of_memory = {u.storage for u in self.uses if u.kind == "global"}
        return written(self.function) & of_memory

    def cover(
        self, suite: str, covered: Mapping[str, set[tuple[str, int]]], found: Mapping[str, Followed]
    ) -> None:
        """Note which accesses a suite's claims cover."""
        events = {(part, e.at): e for part, followed in found.items() for e in followed.events}
        for claim, keys in covered.items():
            for key in keys:
                for use in _of_event(events[key]):
                    self.covering.setdefault(use, set()).add(f"{suite}:{claim}")


def _of_event(event: Event) -> Iterator[int]:
    """Yield the keys of the uses that an event stands for."""
    own = {event.what, event.barrier[0], STATUS if event.kind == "poll" else ""}
    for node in ir.walk(event.node):
        match node:
            case ir.Load(buffer=buffer) | ir.Store(buffer=buffer) if buffer.data.name in own:
                yield id(node)
            case ir.AccessPtr(data=data) if data.name in own:
                yield id(node)
            case ir.Call() if node is event.node:
                yield id(node)


def _read(function: ir.Function, copies: Mapping[str, Box], config: Config) -> _Kernel:
    roles = roles_proof.read(function, copies, roles_proof.roles_of(config))
    signals = signals_proof.read(function, copies, config)

    private = private_proof.follow(
        function, roles.roles.parts, copies, {output_proof.ADDED: partial(output_proof.has_row, config)}
    )
    kernel = _Kernel(function, copies, config, roles, signals, private)
    kernel.cover("roles", roles_proof.covering(roles)[1], roles.found)
    kernel.cover("signals", signals_proof.covering(signals)[1], signals.found)
    return kernel


# --------------------------------------------------------------------------- the properties
def claims(
    function: ir.Function, copies: Mapping[str, Box], config: Config, missing: Missing
) -> dict[str, Claims]:
    """Return what has to be proved of a kernel, by the names of CLAIMS.

    Args:
        function: device IR.
        copies: see `roles_proof.boxes`.
        config: of the kernel.
        missing: says why a claim, written roles:claim or signals:claim, is not proved of it; "": it is.

    Where something has no meaning, all of them are UNSUPPORTED.
    """
    try:
        kernel = _read(function, copies, config)
        found = {
            "coverage": Claims(obligations=list(_coverage(kernel))),
            "schedule": Claims(obligations=list(output_proof.items(config, _writers(kernel)))),
            "init": Claims(obligations=list(_init(kernel))),
            "race": Claims(obligations=list(_race(kernel)), unknown=list(kernel.private.issues)),
            "mbarrier": Claims(),
        }
        for name, claim in found.items():
            _compose(kernel, name, claim, missing)
    except UnsupportedIR as error:
        return {name: Claims(unsupported=[Issue(None, str(error))]) for name in CLAIMS}
    return found


def _writers(kernel: _Kernel) -> Followed:
    return kernel.signals.found[output_proof.WRITER]


def _coverage(kernel: _Kernel) -> Iterator[Obligation]:
    """Elements of outputs, and words of counters that are cleared, are written once."""
    yield from output_proof.written_once(kernel.config, kernel.signals.found)
    yield from _cleared(kernel)


def _init(kernel: _Kernel) -> Iterator[Obligation]:
    """Reads of a thread's own storage, of shared memory and of combine rows find what was put there."""
    yield from kernel.private.initialised
    yield from kernel.private.used
    yield from output_proof.sources(kernel.config, _writers(kernel))
    yield from filled_proof.filled(kernel.roles.rings, kernel.config.pool_blocks)


def _cleared(kernel: _Kernel) -> Iterator[Obligation]:
    """Counters are cleared by one thread a word."""
    found = kernel.signals.found.values()
    threads = sum(f.part.threads for f in found)
    for tensor, words in signals_proof.counters(kernel.config).items():
        puts = [(f, e) for f in found for e in f.events if e.kind == "put" and e.what == tensor]
        yield from output_proof.cleared_once(kernel.config, tensor, words, puts, threads)


def _race(kernel: _Kernel) -> Iterator[Obligation]:
    """Bytes that one thread alone writes: of outputs, cleared counters, and of shared memory in one turn."""
    yield from _cleared(kernel)
    yield from output_proof.written_once(kernel.config, kernel.signals.found)
    yield from filled_proof.filled(kernel.roles.rings, kernel.config.pool_blocks)


def _compose(kernel: _Kernel, name: str, claim: Claims, missing: Missing) -> None:
    """Add to a property what it rests on, and what is not covered."""
    rests = {f"roles:{what}" for what in _ROLES[name]} | {f"signals:{what}" for what in _SIGNALS[name]}
    if kernel.config.widened:
        rests.add(f"roles:{roles_proof.PIECES}")
        if _SIGNALS[name]:
            rests.add(f"signals:{signals_proof.WIDENED}")
    left: set[str] = set()
    count = 0
    for use in kernel.uses:
        needs = _needs(kernel, name, use)
        if needs is None:
            continue
        by = kernel.covering.get(use.key, set()) & needs
        count, rests = count + 1, rests | by
        if needs != _HERE and not by:
            left.add(f"{use.how} of {use.storage} ({use.kind}) is covered by no claim of {sorted(needs)}")
    claim.unknown += [Issue(None, message) for message in sorted(left)]
    for what in sorted(rests):
        reason = missing(what)
        if reason:
            claim.unknown.append(Issue(None, f"rests on {what}: {reason}"))
    covered = Obligation(f"{count} accesses are covered", None, (), z3.BoolVal(count > 0 and not left))
    if not left:
        claim.obligations.append(covered)
    of_suites = dict.fromkeys((*roles_proof.ASSUMPTIONS, *signals_proof.ASSUMPTIONS))
    # What either suite takes from the other is proved: by induction over the order of tasks.
    proved = {roles_proof.SIGNALS_COME, signals_proof.ROLES_DO}
    claim.assumptions += [*ASSUMPTIONS, *(a for a in of_suites if a not in proved)]
    claim.notes += [_ONCE] if name == "coverage" else []
    for suite in ("roles", "signals"):
        names = sorted(what.partition(":")[2] for what in rests if what.startswith(f"{suite}:"))
        if names:
            claim.notes.append(f"rests on {suite}: {', '.join(names)}")


def _needs(kernel: _Kernel, name: str, use: Use) -> frozenset[str] | None:
    """Return claims of which one has to cover a use, or _HERE; None: the property has no part in it."""
    all_roles = frozenset(f"roles:{what}" for what in roles_proof.names(kernel.config))
    all_signals = frozenset(f"signals:{what}" for what in signals_proof.names(kernel.config))
    if use.kind == "global":
        if use.storage not in kernel.written:
            return None  # nobody writes it: an input
        if use.storage == output_proof.OUTPUT:
            return _HERE if use.how == "store" else frozenset()
        if name in ("coverage", "schedule"):
            return frozenset(_WRITES.get(use.storage, ())) if use.how in ("store", "atomic") else None
        return all_signals if name in ("init", "race") else None
    if name not in ("init", "race") and (name, use.kind) != ("mbarrier", "mbarrier"):
        return None
    if use.kind == "private":  # a call takes registers: of the tensor core, which `private_proof` follows
        return _HERE if use.how == "call" or use.key in kernel.private.seen else frozenset()
    if use.kind == "descriptor" or use.how == "operand":
        return _HERE  # `role_follow` refuses one that is not set on every way to its use, which is an event
    return all_roles


# --------------------------------------------------------------------------- suites that properties rest on
@cache
def _proved(name: str) -> Mapping[str, Verdict]:
    return {p.name: p.verdict for p in suites.check(KERNEL, name).properties}


def missing_of(text: str, of: Mapping[str, str]) -> Missing:
    """Return what says why a claim of a suite is not proved of a CUDA text.

    Args:
        text: SHA-256 of it.
        of: suites of the kernel, by what comes before the colon.
    """

    def missing(claim: str) -> str:
        kind, _, what = claim.partition(":")
        suite = suites.suites().get((KERNEL, of[kind]))
        if suite is None or suite.text is None or what not in suite.claims:
            return f"{of[kind]} has no such claim"
        if suite.text() != text:
            return f"{of[kind]} is about other code"
        verdict = _proved(of[kind])[what]
        return "" if verdict is Verdict.PROVED else f"in {of[kind]} it is {verdict}"

    return missing
