"""Where in the author's source a statement of the device IR comes from.

Statements that the compiler makes (staging of casts, the parts of a tile operation) have no span,
or one inside TileLang. They are then placed at the tile statement that shares the most storages with
them, if there is one; else at the author's statement around them, or at the kernel's first line.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TypeGuard

from verify import ir

_LIBRARY = tuple(
    str(path)
    for name in ("tilelang", "tvm")
    if (spec := find_spec(name)) is not None
    for root in spec.submodule_search_locations or ()
    for path in (Path(root), Path(root).resolve())  # spans hold the path that was imported
)


def is_authored(span: ir.Span | None) -> TypeGuard[ir.Span]:
    """Return whether `span` is outside of the compiler's own sources."""
    return span is not None and not span.path.startswith(_LIBRARY)


class Origins:
    """The statements of a kernel's tile IR by the storage that they name."""

    def __init__(self, tile: ir.Function) -> None:
        """Index the tile IR."""
        self._uses: dict[ir.Span, set[tuple[str, str]]] = {}
        spans: list[ir.Span] = []
        self._index(tile.body, None, spans)
        self.first = min(spans, key=lambda s: (s.line, s.column)) if spans else None

    def of(self, statement: ir.Stmt, spans: tuple[ir.Span | None, ...]) -> ir.Span | None:
        """Return the author's place of `statement`; `spans` are its own and those around it, inmost first."""
        if is_authored(spans[0]):
            return spans[0]
        nested = any(isinstance(child, ir.Stmt) for child in ir.children(statement))
        names = set() if nested else _names(statement)
        scores = {span: len(names & uses) for span, uses in self._uses.items()}
        best = max(scores.values(), default=0)
        places = [span for span, score in scores.items() if score == best and best > 0]
        if len(places) == 1:
            return places[0]
        return next((span for span in spans if is_authored(span)), self.first)

    def _index(self, node: ir.Stmt, span: ir.Span | None, spans: list[ir.Span]) -> None:
        if is_authored(node.span):
            span = node.span
            spans.append(span)
        nested = [child for child in ir.children(node) if isinstance(child, ir.Stmt)]
        for child in nested:
            self._index(child, span, spans)
        if not nested and span is not None:
            self._uses.setdefault(span, set()).update(_names(node))


def _names(statement: ir.Stmt) -> set[tuple[str, str]]:
    """Return (name, r or w) of the buffers and storages that a statement names."""
    found: set[tuple[str, str]] = set()
    for node in ir.walk(statement):
        match node:
            case ir.Store(buffer=buffer):
                found |= {(buffer.data.name, "w"), (buffer.name, "w")}
            case ir.Load(buffer=buffer):
                found |= {(buffer.data.name, "r"), (buffer.name, "r")}
            case ir.Region(buffer=buffer, mode=mode):
                found |= {(name, m) for m in mode for name in (buffer.data.name, buffer.name)}
            case ir.AccessPtr(data=data, mode=mode):
                found |= {(data.name, m) for m in mode}
            case ir.Call(args=args):  # a register operand: read or written, the operation knows
                found |= {(a.name, m) for a in args if isinstance(a, ir.Var) for m in "rw"}
            case _:
                pass
    return found
