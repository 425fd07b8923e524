"""Keep what the compiler's front end makes of a Python function.

The front end reads, rewrites and compiles the source of a macro at each use, of which one lowering has
dozens: the generators of wgmma define theirs anew for each product. What it makes depends on the code
object, on the names of the closure, and on a few expressions that it evaluates while it rewrites. Where
all these are what they were, so is the compiled text, and only the closure is made again.
"""

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from tilelang.language.eager import ast as rewriting
from tilelang.language.eager import builder, utils

_stock: Callable[..., Any] = builder.mutate


@dataclass(frozen=True)
class _Kept:
    """One function's rewritten source.

    Attributes:
        original: the function's code, alive, so that its address stays its own.
        module: compiled text that defines `make_closure`.
        names: the namespace of the function's module.
        asked: expressions that were evaluated, and what they were.
        source, hints: as the front end returns them.
    """

    original: CodeType
    module: CodeType
    names: Mapping[str, Any]
    asked: tuple[tuple[ast.expr, Any], ...]
    source: str
    hints: Mapping[str, Any]


_kept: dict[tuple[int, tuple[str, ...]], _Kept] = {}


class _Rewriting(rewriting.DSLMutator):
    """The compiler's, which also notes what it evaluates."""

    def __init__(self, nonlocals: dict[str, Any], names: dict[str, Any], filename: str) -> None:
        super().__init__(nonlocals, names, filename)
        self.asked: list[tuple[ast.expr, Any]] = []

    def _try_eval(self, node: ast.expr) -> Any:
        text = ast.unparse(node)
        value = super()._try_eval(node)
        self.asked.append((ast.parse(text, mode="eval").body, value))
        return value


def rewritten(function: Callable[..., Any]) -> Any:
    """Return what the compiler's `mutate` returns, in a fraction of its time from the second use on."""
    if not inspect.isfunction(function):
        return _stock(function)
    closure = utils.get_func_nonlocals(function)
    key = id(function.__code__), tuple(closure)
    kept = _kept.get(key)
    if kept is None:
        kept = _kept[key] = _rewrite(function, closure)
    elif kept.names is not function.__globals__ or any(
        rewriting._try_eval(node, closure, function.__globals__) is not value for node, value in kept.asked
    ):
        return _stock(function)
    defined: dict[str, Any] = {}
    exec(kept.module, function.__globals__, defined)
    generator = defined["make_closure"](**closure)
    return rewriting.IRGenerator(gen=generator, source=kept.source, extra_type_hints=dict(kept.hints))


def _rewrite(function: Callable[..., Any], closure: dict[str, Any]) -> _Kept:
    filename = inspect.getsourcefile(function) or inspect.getfile(function)
    rewriter = _Rewriting(closure, function.__globals__, str(Path(filename).absolute()))
    tree = rewriter.visit(utils.get_ast(function))
    ast.fix_missing_locations(tree)
    module = compile(tree, filename, "exec")
    asked = tuple(rewriter.asked)
    hints = rewriter.extra_type_hints
    return _Kept(function.__code__, module, function.__globals__, asked, ast.unparse(tree), hints)


def keep() -> None:
    """Use `rewritten` in this process from now on."""
    builder.mutate = rewritten
