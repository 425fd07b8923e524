"""What the passes over the compiler's IR have in common: nodes of a tree, and a loop with another body."""

from typing import Any

from tvm import tirx


def nodes(tree: Any, kind: Any = object) -> list[Any]:
    """Return the nodes of a statement or expression that are of `kind`, inner ones first."""
    found: list[Any] = []
    tirx.stmt_functor.post_order_visit(tree, lambda n: found.append(n) if isinstance(n, kind) else None)
    return found


def with_body(loop: tirx.For, body: tirx.Stmt) -> tirx.For:
    """Return the loop with another body."""
    return tirx.For(
        loop.loop_var,
        loop.min,
        loop.extent,
        loop.kind,
        body,
        loop.thread_binding,
        loop.annotations,
        loop.step,
        span_of(loop),
    )


def span_of(stmt: tirx.Stmt) -> Any:
    """Return where the statement's text is, None of a statement that does not show its own."""
    return getattr(stmt, "span", None)
