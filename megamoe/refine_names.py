"""Storages of one name told apart, at every level of a kernel."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np

from verify import ir
from verify.extract import Extracted
from verify.ir import UnsupportedIR
from verify.layouts import FragmentPlace, extents

_UNUSED = ".unused"


def apart(extracted: Extracted) -> Extracted:
    """Return a kernel in which no two storages go by one name: the second in the program's order is `name.1`.

    Raises:
        UnsupportedIR: another number of storages goes by a name at another level.
    """
    levels = {"tile": extracted.tile, "device": extracted.device}
    found = {n: _storages(f) for n, f in levels.items()}
    own = found["tile"]  # others are the compiler's
    names = [name for name in own if any(len(s.get(name, ())) > 1 for s in found.values())]
    changed, tile_names = {}, dict[ir.Var, ir.Var]()
    for level, storages in found.items():
        if wrong := [n for n in names if len(storages.get(n, ())) != len(own[n])]:
            raise UnsupportedIR(f"storages called {wrong[0]} at one level and not at another")
        new = {
            var: ir.Var(var.dtype, _name(name, n))
            for name in names
            for n, var in enumerate(storages[name])
            if n
        }
        new |= {
            var: ir.Var(var.dtype, f"{var.name}.{n}{_UNUSED}")
            for n, var in enumerate(_allocated(levels[level]))
            if var not in storages.get(var.name, ()) and var.name in own
        }
        changed[level] = _Renamer(new)(levels[level]) if new else levels[level]
        tile_names |= new if level == "tile" else {}
    allocated = [b for n in ir.walk(extracted.tile.body) if isinstance(n, ir.Block) for b in n.allocs]
    buffers: dict[str, list[tuple[str, ir.Buffer]]] = {}
    for buffer in allocated:  # in the order of the text, which is the lowered IR's too
        new = tile_names.get(buffer.data, buffer.data).name
        buffers.setdefault(buffer.data.name, []).append((new, buffer))
    several = {name: found for name, found in buffers.items() if len(found) > 1}
    return replace(extracted, lowered=_Lowered(several)(extracted.lowered), **changed)


def _name(name: str, number: int) -> str:
    return f"{name}.{number}" if number else name


class _Lowered:
    """Renames allocations and layouts of the lowered IR, from which nothing else is read."""

    def __init__(self, buffers: dict[str, list[tuple[str, ir.Buffer]]]) -> None:
        self.buffers = buffers
        self.left = {name: [new for new, _ in found] for name, found in buffers.items()}

    def __call__(self, function: ir.Function) -> ir.Function:
        known: dict[str, list[Any]] = {}
        for node in ir.walk(function.body):
            if isinstance(node, ir.Block):
                for var, layout in node.layouts.items():
                    known.setdefault(var.name, []).append(layout)
        layouts = {}
        for name in self.buffers.keys() & known.keys():
            for new, buffer in self.buffers[name]:
                if buffer.scope == "local.fragment" and not new.endswith(_UNUSED):
                    layouts[ir.Var(ir.HANDLE, new)] = _layout(buffer, known[name])
                elif buffer.scope not in ("local", "local.var", "local.fragment"):
                    raise UnsupportedIR(f"two storages called {name} in {buffer.scope}")
        body = self.visit(function.body)
        return replace(function, body=ir.Block(None, "layouts", (), layouts, {}, body))

    def visit(self, node: Any) -> Any:
        match node:
            case ir.Block(allocs=allocs, layouts=layouts):
                kept = {var: layout for var, layout in layouts.items() if var.name not in self.buffers}
                own = tuple(map(self.alloc, allocs))
                return replace(node, allocs=own, layouts=kept, body=self.visit(node.body))
            case ir.Seq(stmts=stmts):
                return replace(node, stmts=tuple(map(self.visit, stmts)))
            case ir.If(then=then, orelse=orelse):
                other = None if orelse is None else self.visit(orelse)
                return replace(node, then=self.visit(then), orelse=other)
            case ir.For() | ir.While() | ir.Launch() | ir.Assume() | ir.Attr():
                return replace(node, body=self.visit(node.body))
        return node

    def alloc(self, buffer: ir.Buffer) -> ir.Buffer:
        left = self.left.get(buffer.data.name)
        if left is None:
            return buffer
        if not left:
            raise UnsupportedIR(f"another number of storages called {buffer.data.name}")
        name = left.pop(0)
        return replace(buffer, name=name, data=ir.Var(ir.HANDLE, name))


def _layout(buffer: ir.Buffer, layouts: list[Any]) -> Any:
    shape = extents(buffer.shape, buffer.name)
    places = [
        (layout, FragmentPlace.of(layout, buffer.dtype.bits))
        for layout in layouts
        if hasattr(layout, "forward_thread")
    ]
    of = [(layout, place) for layout, place in places if place.shape == shape]
    for _, place in of[1:]:
        first = of[0][1]
        same = np.array_equal(place.thread, first.thread) and np.array_equal(place.local, first.local)
        if not same or not np.array_equal(place.holder, first.holder):
            raise UnsupportedIR(f"which of the buffers {buffer.name} a layout is of")
    if not of:
        raise UnsupportedIR(f"fragment {buffer.name} without a layout")
    return of[0][0]


def _storages(function: ir.Function) -> dict[str, list[ir.Var]]:
    """Return allocated storages by name, in the order in which they are first used."""
    own = set(_allocated(function))
    found: dict[str, list[ir.Var]] = {}
    for var in _used(function.body):
        if var in own and var not in found.setdefault(var.name, []):
            found[var.name].append(var)
    return found


def _allocated(function: ir.Function) -> list[ir.Var]:
    found = []
    for node in ir.walk(function.body):
        if isinstance(node, ir.Block):
            found += [b.data for b in node.allocs]
        elif isinstance(node, ir.Alloc):
            found.append(node.buffer.data)
    return found


def _used(body: ir.Stmt) -> Iterator[ir.Var]:
    for node in ir.walk(body):
        match node:
            case ir.Load(buffer=buffer) | ir.Store(buffer=buffer) | ir.Region(buffer=buffer):
                yield buffer.data
            case ir.AccessPtr(data=data):
                yield data
            case ir.Var(dtype=ir.DType(name="handle")):
                yield node


class _Renamer:
    def __init__(self, new: dict[ir.Var, ir.Var]) -> None:
        self.new = new
        self.done: dict[int, tuple[Any, Any]] = {}

    def __call__(self, node: Any) -> Any:
        if isinstance(node, ir.Var):
            return self.new.get(node, node)
        if isinstance(node, tuple):
            mapped = tuple(self(n) for n in node)
            return node if all(a is b for a, b in zip(mapped, node, strict=True)) else mapped
        if isinstance(node, dict):
            items = {self(k): self(v) for k, v in node.items()}
            return node if all(node.get(k) is v for k, v in items.items()) else items
        if not is_dataclass(node) or isinstance(node, (ir.DType, ir.Span, type)):
            return node
        if id(node) not in self.done:
            values = {f.name: getattr(node, f.name) for f in fields(node)}
            mapped = {name: self(value) for name, value in values.items()}
            if isinstance(node, ir.Buffer) and mapped["data"] is not values["data"]:
                mapped["name"] = mapped["data"].name
            same = all(mapped[n] is values[n] for n in values)
            self.done[id(node)] = node, node if same else replace(node, **mapped)
        return self.done[id(node)][1]
