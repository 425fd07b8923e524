"""That the fused kernel's device IR computes what its tile IR says: suites `refinement*`.

The verifier's own checks do the comparing: claims are its properties of these names. `refinement` has no
words for loops that wait, for atomic operations with a result and for conditions that data decides around
products; `refine_names`, `refine_forms` and `refine_leaves` say the same in words that it has, at both levels
and by the same rules. `format` knows no read of a float32 from a word of integers: `_words` says what it is.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import z3

from dsv4_kernels.contract import Contract
from megamoe import refine_uniform
from megamoe.quotients import parted
from megamoe.refine_forms import Forms, Shared
from megamoe.refine_index import is_choice
from megamoe.refine_leaves import ELECTED, ELECTED_OF, TOGETHER, Leaves
from megamoe.refine_moves import once, under_condition
from megamoe.refine_names import apart
from verify import ir
from verify.extract import Extracted
from verify.host import Host, read_host
from verify.ir import UnsupportedIR
from verify.properties import Claims, Context, Issue
from verify.properties.format import PROPERTY as FORMAT
from verify.properties.layout import PROPERTY as LAYOUT
from verify.properties.refinement import PROPERTY as REFINEMENT
from verify.solve import Obligation
from verify.walk import holds_one

CLAIMS = ("refinement", "layout", "format", "uniform")
ROUNDS = (
    "refinement: a round of a loop that waits finds what it finds at both levels; how often it is made is "
    "nobody's data"
)
INDICES = "refinement: index arithmetic is that of mathematical integers (property `overflow`)"
_WRAPS = " of data"  # how the verifier's claims end that a number which decides no address does not wrap
ASSUMPTIONS = (
    ROUNDS,
    "PTX: stmatrix stores matrix m's row r at the address of lane 8 m + r, halves as in the fragments of mma",
    INDICES,
)
# What the verifier assumes where it needs it; and what else is needed of a thread that is elected.
_ALIKE = "a variable of the threads' own that a tile operation uses holds the same in all of them"
_ELECTED = "refinement: a thread that is elected among some is the same one wherever its level asks"
_PRIVATE = ("local", "local.var")
_SCALES, _PACKED = "o_tile", "offsets"  # words of a stage, and the tensor that they are copied from
_SCALE_READ = re.compile(rf"reinterpret\({_SCALES}\[.*\]\) is no known conversion")


def rewritten(extracted: Extracted, host: Host) -> tuple[Extracted, Host, list[Obligation]]:
    """Return a kernel and its launch in words that refinement knows, and what the rules rest on.

    Raises:
        UnsupportedIR: there is no rule for something in it.
    """
    extracted = apart(extracted)
    tile, device = extracted.tile, extracted.device
    allocated = [b for n in ir.walk(tile.body) if isinstance(n, ir.Block) for b in n.allocs]
    private = frozenset(b.data.name for b in allocated if b.scope in _PRIVATE)
    device = under_condition(device, private, once(tile))
    shared = Shared(parallel=_bound_together(tile), choices=_choices(tile) & _choices(device))
    # The device's first: which reads it guards on a line has to be known for all of that line.
    Forms(shared, host.tensors, private, device=True).body(device.body)
    of_device = Forms(shared, host.tensors, private, device=True)
    of_tile = Forms(shared, {b.data: b for b in tile.buffers.values()}, private, device=False)
    bodies = []
    for forms, function in ((of_device, device), (of_tile, tile)):
        bodies.append(forms.body(function.body))
        forms.note(TOGETHER, ir.INT32, 1)
        forms.note(ELECTED, ir.INT32, ELECTED_OF)
    own = frozenset(b.data.name for b in allocated) | set(of_tile.notes)
    reductions = frozenset(_reductions(tile))
    at_leaves = [
        Leaves(forms.notes, own, reductions, device=forms.device).body(body)
        for forms, body in zip((of_device, of_tile), bodies, strict=True)
    ]
    if of_device.notes.keys() != of_tile.notes.keys():  # else the verifier would take one for a temporary
        names = ", ".join(sorted(of_device.notes.keys() ^ of_tile.notes.keys()))
        raise UnsupportedIR(f"something is done at one level alone: {names}")
    words = [[b for b in forms.notes.values() if b.scope == "local"] for forms in (of_device, of_tile)]
    allocs = tuple(ir.Alloc(None, b) for b in words[0])
    block = ir.Block(None, "notes", tuple(words[1]), {}, {}, at_leaves[1])
    # Notes that threads share are tensors, the same argument at both levels.
    tensors = {
        buffer.data: of_tile.notes[name]
        for name, buffer in of_device.notes.items()
        if buffer.scope == "global"
    }
    buffers = {**tile.buffers, **{ir.Var(ir.HANDLE, b.name): b for b in tensors.values()}}
    params = (*device.params, *tensors)
    new = replace(
        extracted,
        tile=replace(tile, body=block, buffers=buffers),
        device=replace(device, body=ir.Seq(None, (*allocs, at_leaves[0])), params=params),
    )
    claimed = [*of_device.obligations, *of_tile.obligations]
    return new, replace(host, tensors={**host.tensors, **tensors}), claimed


def claims(extracted: Extracted, names: Sequence[str] = CLAIMS) -> dict[str, Claims]:
    """Return what has to be proved of a kernel, by the names of CLAIMS that are asked for.

    `refinement` rests on `uniform`, and is proved with it; asked for alone, it assumes it. Where there is no
    rule for something, it is UNSUPPORTED.
    """
    found: dict[str, Claims] = {}
    if "uniform" in names:
        found["uniform"] = refine_uniform.claims(extracted.tile, extracted.device)
    if "refinement" in names:
        found["refinement"] = _refinement(extracted, found.get("uniform"))
    if "layout" in names or "format" in names:
        found |= _of_text(extracted, names)
    return found


def _of_text(extracted: Extracted, names: Sequence[str]) -> dict[str, Claims]:
    """Return those that ask nothing of the tile IR, of one reading of the device IR."""
    found: dict[str, Claims] = {}
    try:
        context = _apart(extracted)
        if "layout" in names:
            found["layout"] = _layouts(context)
    except UnsupportedIR as error:
        return {name: _unsupported(error) for name in ("layout", "format") if name in names}
    if "format" in names:
        found["format"] = _formats(extracted, context)
    return found


def _apart(extracted: Extracted) -> Context:
    return Context(apart(extracted), Contract(()), {})


def _unsupported(error: UnsupportedIR) -> Claims:
    return Claims(unsupported=[Issue(None, str(error))])


def _refinement(extracted: Extracted, alike: Claims | None) -> Claims:
    try:
        host = read_host(extracted.host, extracted.device, extracted.tile)
        kernel, launch, rules = rewritten(extracted, host)
    except UnsupportedIR as error:
        return _unsupported(error)
    context = Context(kernel, Contract(()), {})
    context.__dict__["host"] = launch  # with the notes that threads share
    found = REFINEMENT.claims(context)
    found.obligations = [*_not_of_indices(found.obligations, kernel.device), *rules]
    found.assumptions += [*ASSUMPTIONS, _ELECTED]
    if alike is not None:
        found.obligations += alike.obligations
        found.unknown += alike.unknown
        found.unsupported += alike.unsupported
        by = "DISCHARGED by claim `uniform`, whose obligations are among this one's: "
        found.assumptions = [by + a if a in (_ALIKE, _ELECTED) else a for a in found.assumptions]
        found.assumptions += alike.assumptions
    return found


def _not_of_indices(claimed: Sequence[Obligation], device: ir.Function) -> Iterator[Obligation]:
    """Leave out what `overflow` claims: that variables which decide addresses do not wrap on the way.

    The verifier claims it of each number that is stored, as if it were data, of both levels. Left out is what
    both levels claim alike of a variable of the device that decides an address, and that only; how often a
    loop that waits is made, on which it may rest, is known to the contract and not here.
    """
    deciding, times = _deciding(device), Counter(map(_said, claimed))
    for obligation in claimed:
        name, is_store, _ = obligation.what.partition("[...] = ...: ")
        is_wrap = obligation.what.endswith(_WRAPS) and is_store
        # An even number of times: of the tile program's expression and of the device's.
        if not (is_wrap and name in deciding and times[_said(obligation)] % 2 == 0):
            yield obligation


def _said(obligation: Obligation) -> tuple[object, ...]:
    hypotheses = tuple(h.term.get_id() for h in obligation.hypotheses)
    return obligation.what, obligation.goal.get_id(), hypotheses


def _deciding(device: ir.Function) -> frozenset[str]:
    """Return the variables whose values decide addresses, by name."""
    values: dict[ir.Var, list[ir.Expr]] = {}
    pending: list[ir.Expr] = []
    for node in ir.walk(device.body):
        match node:
            case ir.Store(buffer=buffer, indices=indices, value=value):
                pending += indices
                if holds_one(buffer):
                    values.setdefault(buffer.data, []).append(value)
            case ir.Load(indices=indices):
                pending += indices
            case ir.AccessPtr(offset=offset):
                pending.append(offset)
            case ir.Bind(var=var, value=value) | ir.Let(var=var, value=value):
                values.setdefault(var, []).append(value)
    found: set[ir.Var] = set()
    while pending:
        for node in ir.walk(pending.pop()):
            var = node.buffer.data if isinstance(node, ir.Load) else node
            if var in values.keys() - found:
                found.add(var)
                pending += values[var]
    return frozenset(var.name for var in found)


def layouts(extracted: Extracted) -> Claims:
    """Return what has to be proved of a kernel's layouts."""
    try:
        return _layouts(_apart(extracted))
    except UnsupportedIR as error:
        return _unsupported(error)


def _layouts(context: Context) -> Claims:
    found = LAYOUT.claims(context)
    # Places are sums of whole stages and little else: said so, no more than a few digits are left to find.
    found.obligations = [replace(o, goal=parted(o.goal)) for o in found.obligations]
    found.assumptions.append("layout: accesses are where the layouts say (claim `refinement`)")
    return found


def _formats(extracted: Extracted, context: Context) -> Claims:
    found = FORMAT.claims(context)
    scales = [issue for issue in found.unknown if _SCALE_READ.match(issue.message)]
    if scales:
        found.unknown = [issue for issue in found.unknown if issue not in scales]
        found.obligations += _words(extracted, scales)
        found.assumptions.append(
            f"format: the words of `{_PACKED}` that a step of e4m3 weights has are its scale's bits "
            "(`weights.Packed`; claim `sources` of the suites `roles` says which step they are of)"
        )
    return found


def _words(extracted: Extracted, scales: Sequence[Issue]) -> Iterator[Obligation]:
    """Scales of e4m3 weights are words of the packed tensor, each read as the float32 whose bits it is."""
    reads = [
        n
        for n in ir.walk(extracted.device.body)
        if isinstance(n, ir.Call)
        and n.op == "reinterpret"
        and n.dtype.name == "float32"
        and any(isinstance(x, ir.Load) and x.buffer.data.name == _SCALES for x in ir.walk(n))
    ]
    plain = [isinstance(a, ir.Load) and a.dtype == ir.INT32 for n in reads for a in n.args]
    what = "a scale is the float32 of the bits of one word"
    yield Obligation(what, scales[0].span, (), z3.BoolVal(all(plain) and len(reads) >= len(scales)))
    host = read_host(extracted.host, extracted.device, extracted.tile)
    writes = []
    for node in ir.walk(extracted.device.body):
        match node:
            case ir.Store(buffer=buffer) if buffer.data.name == _SCALES:
                writes.append("a store")
            case ir.Eval(value=ir.Call(args=args)):
                if any(
                    isinstance(a, ir.AccessPtr) and a.data.name == _SCALES and a.mode != "r" for a in args
                ):
                    map_ = host.descriptors.get(args[0]) if isinstance(args[0], ir.Var) else None
                    writes.append(map_.tensor.name if map_ is not None else "a call")
    only = bool(writes) and set(writes) == {_PACKED}
    text = ", ".join(sorted(set(writes)))
    what = f"words of {_SCALES} are copies of {_PACKED}"
    yield Obligation(what, scales[0].span, (), z3.BoolVal(only), {"written by": text})


def _reductions(tile: ir.Function) -> set[ir.Span]:
    return {
        n.span
        for n in ir.walk(tile.body)
        if isinstance(n, ir.Eval) and isinstance(n.value, ir.Call) and n.value.op == "reduce" and n.span
    }


def _bound_together(tile: ir.Function) -> set[int]:
    """Return the lines of names that are bound in parallel loops."""
    loops = (n for n in ir.walk(tile.body) if isinstance(n, ir.For) and n.kind == "parallel")
    binds = (n for loop in loops for n in ir.walk(loop.body) if isinstance(n, ir.Bind))
    return {n.span.line for n in binds if n.span}


def _choices(function: ir.Function) -> set[tuple[str, int]]:
    """Return names of choices between integers, with their lines."""
    binds = (n for n in ir.walk(function.body) if isinstance(n, ir.Bind) and n.span is not None)
    return {
        (n.var.name, n.span.line)
        for n in binds
        if n.span and n.value.dtype == ir.INT32 and is_choice(n.value)
    }
