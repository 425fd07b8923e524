"""Every layout is one-to-one, and all that reads or writes a buffer takes it to be laid out alike.

Read from the compiler's `layout_map` and decided by enumeration: a shared layout gives no two elements
one address and stays inside its allocation; a fragment gives no two elements one register of one thread,
keeps its replicas apart, and stays inside the threads and the array that it is declared for; the
compiler's inverse, where it makes one, goes back. Views agree with what they view, bit by bit. The
TMA engine, the tensor core's descriptors and its register fragments, each by the hardware's own rule,
find at every position the element that the layout put there. That every other access goes through the
layout is what `refinement` proves, on which this property depends.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import z3

from verify import ir, placements
from verify.encode import Scope
from verify.hardware_layout import Hardware, Mismatch
from verify.ir import UnsupportedIR
from verify.placements import Placed
from verify.properties import Claims, Context, Issue
from verify.solve import Obligation

NAME = "layout"


class Layout:
    """Property `layout`."""

    name = NAME
    depends = ("refinement",)

    def claims(self, context: Context) -> Claims:
        """Return one obligation for each layout, view and hardware access."""
        claims = Claims()
        placed = placements.read_placements(context.extracted)
        inverses = 0
        for item in placed:
            claims.obligations += _injective(item)
            claims.obligations += _inside(context, item)
            try:
                differs = placements.inverse_differs(item.layout, item.placement)
                inverses += 1
                claims.obligations.append(_fact(item, "inverse of the layout goes back", _at(item, differs)))
            except ValueError:
                pass
        claims.obligations += _views(context, placed)
        hardware = Hardware(context, placed)
        for check in hardware.checks():
            if isinstance(check, Mismatch):
                shown = check.show
                found = Obligation(check.what, check.span, check.hypotheses, z3.BoolVal(not shown), shown)
                claims.obligations.append(found)
            else:
                claims.obligations.append(check)
        claims.unknown += [Issue(span, what) for span, what in hardware.unknown]
        claims.unsupported += [Issue(site.span, what) for site, what in context.memory.unsupported]
        claims.notes.append(
            f"layouts: {len(placed)}, inverted by the compiler: {inverses}; "
            f"hardware accesses compared: {hardware.compared}"
        )
        return claims


PROPERTY = Layout()


def _fact(item: Placed, what: str, wrong: Mapping[str, object] | None) -> Obligation:
    """Return something known already as an obligation: false where `wrong` shows a case."""
    show = {k: v if isinstance(v, int) else str(v) for k, v in (wrong or {}).items()}
    return Obligation(f"{_name(item)}: {what}", None, (), z3.BoolVal(wrong is None), show)


def _name(item: Placed) -> str:
    return f"layout of {item.name or 'a view'}"


def _at(item: Placed, element: int | None) -> dict[str, object] | None:
    return None if element is None else {"element": item.placement.index(element)}


def _injective(item: Placed) -> Iterator[Obligation]:
    placement = item.placement
    pair, wrong = placement.collision(), None
    if pair is not None:
        first, second = pair
        wrong = {"element": placement.index(first), "other": placement.index(second)}
        wrong |= _place(item, first)
    what = "no two elements in one " + ("address" if placement.thread is None else "register of a thread")
    yield _fact(item, what, wrong)
    if placement.thread is not None:
        what = "replicas of an element in different registers"
        yield _fact(item, what, _at(item, placement.idle_replica()))


def _place(item: Placed, element: int) -> dict[str, object]:
    placement = item.placement
    found: dict[str, object] = {"position": int(placement.position[0, element])}
    if placement.thread is not None:
        found["threadIdx.x"] = int(placement.thread[0, element])
    return found


def _inside(context: Context, item: Placed) -> Iterator[Obligation]:
    placement = item.placement
    bad = np.argwhere(~placement.within)
    wrong = None if not len(bad) else _at(item, int(bad[0][1]))
    yield _fact(item, "every position inside the physical shape", wrong)
    if placement.thread is not None and placement.threads is not None:
        first, end = placement.threads
        outside = np.argwhere((placement.thread < first) | (placement.thread >= end))
        wrong = None
        if len(outside):
            replica, element = (int(x) for x in outside[0])
            held = int(placement.thread[replica, element])
            wrong = {"element": placement.index(element), "threadIdx.x": held, "threads": f"{first} to {end}"}
        yield _fact(item, "held by the threads it is declared for", wrong)
        extent = context.encoder.term(context.host.extents["threadIdx.x"], Scope())
        what = f"{_name(item)}: its threads {first} to {end - 1} are launched"
        yield Obligation(what, None, (), z3.And(extent >= end, z3.BoolVal(first >= 0)), {"threads": extent})
    allocated = item.lowered
    if allocated is not None and item.tile is not None:
        room = _elements(allocated) * allocated.dtype.bits
        used = placement.size * item.tile.dtype.bits
        wrong = None if used <= room else {"bits": used, "allocated": room}
        yield _fact(item, "fits its allocation", wrong)


def _elements(buffer: ir.Buffer) -> int:
    total = 1
    for extent in buffer.shape:
        if not isinstance(extent, ir.Const):
            raise UnsupportedIR(f"{buffer.name} of symbolic shape")
        total *= int(extent.value)
    return total


# --------------------------------------------------------------------------- views
def _views(context: Context, placed: list[Placed]) -> Iterator[Obligation]:
    """A view of a buffer under another type finds each bit where the buffer's layout put it."""
    owners = {p.tile.data: p for p in placed if p.tile is not None}
    seen: set[ir.Buffer] = set()
    for node in ir.walk(context.extracted.tile.body):
        if not isinstance(node, (ir.Load, ir.Store, ir.Region)) or node.buffer in seen:
            continue
        seen.add(node.buffer)
        view, owner = node.buffer, owners.get(node.buffer.data)
        if owner is None or owner.tile is view:
            continue
        shape = tuple(int(e.value) for e in view.shape if isinstance(e, ir.Const))
        own = [p for p in placed if p.tile is None and p.name == view.name and p.placement.shape == shape]
        for item in own:
            yield _view(item, view, owner)


def _view(item: Placed, view: ir.Buffer, owner: Placed) -> Obligation:
    assert owner.tile is not None, "owners are declared"
    what = f"view of {owner.name} as {view.dtype} lies as {owner.name} does"
    wide, narrow = owner.tile.dtype.bits, view.dtype.bits
    count = item.placement.position.shape[1]
    bits = np.arange(count) * narrow  # from the start of the tile, in the order of its elements
    element = bits // wide
    if (
        element.max() >= owner.placement.position.shape[1]
        or item.placement.replicas != owner.placement.replicas
    ):
        return _fact(owner, what, {"view": str(item.placement.shape), "buffer": str(owner.placement.shape)})
    for replica in range(item.placement.replicas):
        expected = owner.placement.position[replica, element] * wide + bits % wide
        same = item.placement.position[replica] * narrow == expected
        if item.placement.thread is not None and owner.placement.thread is not None:
            same &= item.placement.thread[replica] == owner.placement.thread[replica, element]
        wrong = np.flatnonzero(~same)
        if len(wrong):
            at = int(wrong[0])
            shown = {
                "element": item.placement.index(at),
                "bit": int(item.placement.position[replica, at]) * narrow,
            }
            return _fact(owner, what, {**shown, "expected bit": int(expected[at])})
    return _fact(owner, what, None)
