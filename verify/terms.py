"""z3's Python operators on integers and Booleans, each in one call of the C library.

z3's own make objects of the sorts of their operands, coerce them, and ask after every call into the library
whether it failed: `And(a, b)` takes 90 microseconds, of which the library has less than one. A proof builds
hundreds of thousands of terms, so the operators that it uses most are replaced in this process. For operands
of sorts that need no coercion (integers and Booleans of the main context, and Python's integers) the
replacement makes the very node that z3's own would, nodes of its operands first and in the same order;
everything else is left to z3's own. A call that fails returns no node, which raises as it does there.
"""

from collections.abc import Callable, Sequence
from ctypes import PYFUNCTYPE, Array, c_char_p, c_int64, c_uint, c_void_p, cast
from typing import Any

import z3
from z3 import z3 as stock
from z3 import z3core

Ast, FuncDecl = z3core.Ast, z3core.FuncDecl


def function(wrapper: Callable[..., Any], result: Any, *arguments: Any) -> Callable[..., Any]:
    """Return the C function behind one of z3's Python functions, called without the error check.

    Args:
        wrapper: of `z3.z3core`.
        result: its type, for ctypes.
        arguments: their types.
    """
    behind = next(d for d in wrapper.__defaults__ or () if isinstance(d, z3core.Elementaries)).f
    address = cast(behind, c_void_p).value
    if address is None:
        raise RuntimeError(f"z3 has no {wrapper.__name__}")
    return PYFUNCTYPE(result, *arguments)(address)


def _node(wrapper: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """Return a C function of a context, and of more, that returns a node."""
    return function(wrapper, Ast, c_void_p, *arguments)


_NUMERAL, _APP = z3.Z3_NUMERAL_AST, z3.Z3_APP_AST
_INT64 = 1 << 63
_MAIN = z3.main_ctx()
_CONTEXT = _MAIN.ctx
_PAIR = c_void_p * 2
_SEVERAL = (c_uint, c_void_p)  # a number of operands and where they lie
_TWO = (c_void_p, c_void_p)

_inc_ref = function(z3core.Z3_inc_ref, None, *_TWO)
_dec_ref = function(z3core.Z3_dec_ref, None, *_TWO)
_sort_of = function(z3core.Z3_get_sort, c_void_p, *_TWO)
_kind_of = function(z3core.Z3_get_ast_kind, c_uint, *_TWO)
_id_of = function(z3core.Z3_get_ast_id, c_uint, *_TWO)
_decl_of = function(z3core.Z3_get_app_decl, FuncDecl, *_TWO)
_operator_of = function(z3core.Z3_get_decl_kind, c_uint, *_TWO)
_arity_of = function(z3core.Z3_get_app_num_args, c_uint, *_TWO)
_operand_of = _node(z3core.Z3_get_app_arg, c_void_p, c_uint)
_digits_of = function(z3core.Z3_get_numeral_string, c_char_p, *_TWO)
_decl_arity = function(z3core.Z3_get_arity, c_uint, *_TWO)
_decl_domain = function(z3core.Z3_get_domain, c_void_p, *_TWO, c_uint)
_decl_name = function(z3core.Z3_get_decl_name, c_void_p, *_TWO)
_symbol_kind = function(z3core.Z3_get_symbol_kind, c_uint, *_TWO)
_symbol_text = function(z3core.Z3_get_symbol_string, c_char_p, *_TWO)
_mk_int64 = _node(z3core.Z3_mk_int64, c_int64, c_void_p)
_mk_add = _node(z3core.Z3_mk_add, *_SEVERAL)
_mk_sub = _node(z3core.Z3_mk_sub, *_SEVERAL)
_mk_mul = _node(z3core.Z3_mk_mul, *_SEVERAL)
_mk_and = _node(z3core.Z3_mk_and, *_SEVERAL)
_mk_or = _node(z3core.Z3_mk_or, *_SEVERAL)
_mk_distinct = _node(z3core.Z3_mk_distinct, *_SEVERAL)
_mk_minus = _node(z3core.Z3_mk_unary_minus, c_void_p)
_mk_not = _node(z3core.Z3_mk_not, c_void_p)
_mk_div = _node(z3core.Z3_mk_div, *_TWO)
_mk_mod = _node(z3core.Z3_mk_mod, *_TWO)
_mk_lt = _node(z3core.Z3_mk_lt, *_TWO)
_mk_le = _node(z3core.Z3_mk_le, *_TWO)
_mk_gt = _node(z3core.Z3_mk_gt, *_TWO)
_mk_ge = _node(z3core.Z3_mk_ge, *_TWO)
_mk_eq = _node(z3core.Z3_mk_eq, *_TWO)
_mk_implies = _node(z3core.Z3_mk_implies, *_TWO)
_mk_ite = _node(z3core.Z3_mk_ite, *_TWO, c_void_p)
_mk_app = _node(z3core.Z3_mk_app, c_void_p, *_SEVERAL)
_simplify = _node(z3core.Z3_simplify, c_void_p)
_substitute = _node(z3core.Z3_substitute, c_void_p, c_uint, *_TWO)

_integers, _booleans = z3.IntSort(), z3.BoolSort()
_INT_SORT, _BOOL_SORT = _integers.ast.value, _booleans.ast.value
_INT_AST = _integers.ast
_TRUE, _FALSE = (
    z3.BoolVal(True).ast.value,
    z3.BoolVal(False).ast.value,
)  # one node each, of the context itself
_NEW = object.__new__
# Classes of terms that may be integers. Which operand of a comparison Python asks first depends on both
# classes, as a number's is derived from the other one: so terms are of no class but z3's.
_ARITHMETIC = (z3.ArithRef, z3.IntNumRef)


# --------------------------------------------------------------------------- objects
def _init(self: z3.AstRef, ast: Any, ctx: z3.Context | None = None) -> None:
    self.ast = ast
    self.ctx = owner = _MAIN if ctx is None else ctx
    _inc_ref(owner.ctx, ast)


def _del(self: z3.AstRef, _release: Callable[..., None] = _dec_ref) -> None:
    context = self.ctx.ctx
    if context is not None and self.ast is not None:
        _release(context, self.ast)
        self.ast = None


def _made(kind: type[Any], ast: Any) -> Any:
    """Return a new integer or Boolean of the main context as an object of z3's class `kind`."""
    if not ast:
        raise z3.Z3Exception("no term was made")
    term = _NEW(kind)
    term.ast = ast
    term.ctx = _MAIN
    term.is_plain = True
    _inc_ref(_CONTEXT, ast)
    return term


def expression(ast: Any, ctx: z3.Context) -> z3.ExprRef:
    """Return z3's object of a node."""
    if ctx is _MAIN and type(ast) is Ast and ast:
        kind = _kind_of(_CONTEXT, ast)
        if kind in (_APP, _NUMERAL):
            sort = _sort_of(_CONTEXT, ast)
            if sort == _INT_SORT:
                return _made(z3.ArithRef if kind == _APP else z3.IntNumRef, ast)
            if sort == _BOOL_SORT:
                return _made(z3.BoolRef, ast)
    return _stock_expression(ast, ctx)


def _is_integer(term: Any) -> bool:
    """Return whether `term` is an integer of the main context."""
    if type(term) not in _ARITHMETIC:
        return False
    if not term.is_plain:
        term.is_plain = term.ctx is _MAIN and _sort_of(_CONTEXT, term.ast) == _INT_SORT
    return term.is_plain


def _is_boolean(term: Any) -> bool:
    return type(term) is z3.BoolRef and term.ctx is _MAIN


def _number(value: int) -> z3.IntNumRef:
    return _made(z3.IntNumRef, _mk_int64(_CONTEXT, value, _INT_AST))


def _is_small(value: Any) -> bool:
    return type(value) is int and -_INT64 <= value < _INT64


def _array(terms: Sequence[z3.AstRef]) -> Array[c_void_p]:
    return (c_void_p * len(terms))(*[t.ast for t in terms])


def _operand(value: Any) -> z3.ArithRef | None:
    """Return an operand of integer arithmetic as a term; None where z3's own have to see to it."""
    if _is_integer(value):
        return value
    return _number(value) if _is_small(value) else None


# --------------------------------------------------------------------------- operators
def _binary(kind: type[Any], make: Callable[..., Any], own: Any, swap: bool = False) -> Any:
    """Return an operator on integers: `make` takes both operands, `own` is z3's."""

    def operator(self: z3.ArithRef, other: Any) -> Any:
        term = _operand(other) if _is_integer(self) else None
        if term is None:
            return own(self, other)
        return _made(kind, make(_CONTEXT, term.ast, self.ast) if swap else make(_CONTEXT, self.ast, term.ast))

    return operator


def _listed(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return `make`, which takes an array, as a function of two nodes."""
    return lambda context, a, b: make(context, 2, _PAIR(a, b))


def _equality(make: Callable[..., Any], own: Any) -> Any:
    def operator(self: z3.ExprRef, other: Any) -> Any:
        if _is_integer(self):
            term = _operand(other)
            if term is not None:
                return _made(z3.BoolRef, make(_CONTEXT, self.ast, term.ast))
        elif _is_boolean(self) and _is_boolean(other):
            return _made(z3.BoolRef, make(_CONTEXT, self.ast, other.ast))
        return own(self, other)

    return operator


def _junction(make: Callable[..., Any], own: Any) -> Any:
    def junction(*args: Any) -> Any:
        terms = args[0] if len(args) == 1 and type(args[0]) in (list, tuple) else args
        if terms and all(_is_boolean(t) for t in terms):
            return _made(z3.BoolRef, make(_CONTEXT, len(terms), _array(terms)))
        return own(*args)

    return junction


def _negate(self: z3.ArithRef) -> Any:
    if _is_integer(self):
        return _made(z3.ArithRef, _mk_minus(_CONTEXT, self.ast))
    return _stock_negate(self)


def _not(a: Any, ctx: z3.Context | None = None) -> Any:
    if ctx is None and _is_boolean(a):
        return _made(z3.BoolRef, _mk_not(_CONTEXT, a.ast))
    return _stock_not(a, ctx)


def _implies(a: Any, b: Any, ctx: z3.Context | None = None) -> Any:
    if ctx is None and _is_boolean(a) and _is_boolean(b):
        return _made(z3.BoolRef, _mk_implies(_CONTEXT, a.ast, b.ast))
    return _stock_implies(a, b, ctx)


def _if(a: Any, b: Any, c: Any, ctx: z3.Context | None = None) -> Any:
    if ctx is None and _is_boolean(a):
        if _is_boolean(b) and _is_boolean(c):
            return _made(z3.BoolRef, _mk_ite(_CONTEXT, a.ast, b.ast, c.ast))
        if (_is_small(b) or _is_integer(b)) and (_is_small(c) or _is_integer(c)):
            b, c = _operand(b), _operand(c)
            return _made(z3.ArithRef, _mk_ite(_CONTEXT, a.ast, b.ast, c.ast))
    return _stock_if(a, b, c, ctx)


def _sum(*args: Any) -> Any:
    terms = args[0] if len(args) == 1 and type(args[0]) in (list, tuple) else args
    if terms and all(_is_integer(t) for t in terms):
        return _made(z3.ArithRef, _mk_add(_CONTEXT, len(terms), _array(terms)))
    return _stock_sum(*args)


def _int_val(val: Any, ctx: z3.Context | None = None) -> Any:
    return _number(val) if ctx is None and _is_small(val) else _stock_int_val(val, ctx)


def _apply(self: z3.FuncDeclRef, *args: Any) -> Any:
    if self.ctx is _MAIN and len(args) == _decl_arity(_CONTEXT, self.ast):
        wanted = [_decl_domain(_CONTEXT, self.ast, place) for place in range(len(args))]
        sorts = [_INT_SORT if _is_integer(a) else _BOOL_SORT if _is_boolean(a) else None for a in args]
        if sorts == wanted:
            return expression(_mk_app(_CONTEXT, self.ast, len(args), _array(args)), _MAIN)
    return _stock_apply(self, *args)


def _simplified(a: Any, *arguments: Any, **keywords: Any) -> Any:
    if arguments or keywords or not (_is_integer(a) or _is_boolean(a)):
        return _stock_simplify(a, *arguments, **keywords)
    return expression(_simplify(_CONTEXT, a.ast), _MAIN)


def _substituted(t: Any, *m: Any) -> Any:
    pairs = m[0] if len(m) == 1 and type(m[0]) is list else m
    if not (_is_integer(t) or _is_boolean(t)) or not all(_is_replacement(p) for p in pairs):
        return _stock_substitute(t, *m)
    old, new = _array([p for p, _ in pairs]), _array([q for _, q in pairs])
    return expression(_substitute(_CONTEXT, t.ast, len(pairs), old, new), _MAIN)


def _is_replacement(pair: Any) -> bool:
    if type(pair) is not tuple or len(pair) != 2:
        return False
    old, new = pair
    return (_is_integer(old) and _is_integer(new)) or (_is_boolean(old) and _is_boolean(new))


# --------------------------------------------------------------------------- questions
def _is_app(a: Any) -> bool:
    return isinstance(a, z3.ExprRef) and _is_applied(a)


def _is_app_of(a: Any, k: int) -> bool:
    if not isinstance(a, z3.ExprRef):
        return False
    context, ast = a.ctx.ctx, a.ast
    if _kind_of(context, ast) not in (_NUMERAL, _APP):
        return False
    return _operator_of(context, _decl_of(context, ast)) == k


def _is_true(a: Any) -> bool:
    if isinstance(a, z3.ExprRef) and a.ctx is _MAIN:
        return a.ast.value == _TRUE
    return _is_app_of(a, z3.Z3_OP_TRUE)


def _is_false(a: Any) -> bool:
    if isinstance(a, z3.ExprRef) and a.ctx is _MAIN:
        return a.ast.value == _FALSE
    return _is_app_of(a, z3.Z3_OP_FALSE)


def _is_same(self: z3.AstRef, other: Any) -> bool:
    """Return whether both are one node: equal terms of a context are, and those of two contexts are not."""
    if isinstance(other, z3.AstRef):
        return self.ast.value == other.ast.value
    return _stock_is_same(self, other)


def _is_int(self: z3.ArithRef) -> bool:
    return _is_integer(self) or _stock_is_int(self)


def _is_int_value(a: Any) -> bool:
    return isinstance(a, z3.ArithRef) and a.is_int() and _kind_of(a.ctx.ctx, a.ast) == _NUMERAL


def _as_long(self: z3.IntNumRef) -> int:
    return int(_digits_of(self.ctx.ctx, self.ast))


def _get_id(self: z3.ExprRef) -> int:
    return _id_of(self.ctx.ctx, self.ast)


def _is_applied(self: z3.ExprRef) -> bool:
    return _kind_of(self.ctx.ctx, self.ast) in (_NUMERAL, _APP)


def _decl(self: z3.ExprRef) -> z3.FuncDeclRef:
    if not _is_applied(self):
        return _stock_decl(self)
    return z3.FuncDeclRef(_decl_of(self.ctx.ctx, self.ast), self.ctx)


def _num_args(self: z3.ExprRef) -> int:
    return _arity_of(self.ctx.ctx, self.ast) if _is_applied(self) else _stock_num_args(self)


def _nth(self: z3.ExprRef, idx: int) -> z3.ExprRef:
    if not (_is_applied(self) and 0 <= idx < _arity_of(self.ctx.ctx, self.ast)):
        return _stock_nth(self, idx)
    return expression(_operand_of(self.ctx.ctx, self.ast, idx), self.ctx)


def _children(self: z3.ExprRef) -> list[z3.ExprRef]:
    context, ast = self.ctx.ctx, self.ast
    if not _is_applied(self):
        return []
    return [expression(_operand_of(context, ast, n), self.ctx) for n in range(_arity_of(context, ast))]


def _name(self: z3.FuncDeclRef) -> str:
    context = self.ctx.ctx
    symbol = _decl_name(context, self.ast)
    if _symbol_kind(context, symbol) == z3.Z3_STRING_SYMBOL:
        return _symbol_text(context, symbol).decode()
    return _stock_name(self)


# --------------------------------------------------------------------------- in place of z3's own
_stock_expression = stock._to_expr_ref
_stock_negate, _stock_not, _stock_implies, _stock_if = z3.ArithRef.__neg__, z3.Not, z3.Implies, z3.If
_stock_sum, _stock_int_val, _stock_apply = z3.Sum, z3.IntVal, z3.FuncDeclRef.__call__
_stock_simplify, _stock_substitute = z3.simplify, z3.substitute
_stock_decl, _stock_num_args, _stock_nth = z3.ExprRef.decl, z3.ExprRef.num_args, z3.ExprRef.arg
_stock_is_same = z3.AstRef.eq
_stock_is_int, _stock_name = z3.ArithRef.is_int, z3.FuncDeclRef.name


_OPERATORS = {
    "add": (z3.ArithRef, _listed(_mk_add)),
    "sub": (z3.ArithRef, _listed(_mk_sub)),
    "mul": (z3.ArithRef, _listed(_mk_mul)),
    "div": (z3.ArithRef, _mk_div),
    "mod": (z3.ArithRef, _mk_mod),
    "lt": (z3.BoolRef, _mk_lt),
    "le": (z3.BoolRef, _mk_le),
    "gt": (z3.BoolRef, _mk_gt),
    "ge": (z3.BoolRef, _mk_ge),
}
_METHODS: dict[tuple[type[Any], str], Any] = {
    (z3.AstRef, "__init__"): _init,
    (z3.AstRef, "__del__"): _del,
    (z3.AstRef, "eq"): _is_same,
    (z3.ExprRef, "get_id"): _get_id,
    (z3.ExprRef, "decl"): _decl,
    (z3.ExprRef, "num_args"): _num_args,
    (z3.ExprRef, "arg"): _nth,
    (z3.ExprRef, "children"): _children,
    (z3.ExprRef, "__eq__"): _equality(_mk_eq, z3.ExprRef.__eq__),
    (z3.ExprRef, "__ne__"): _equality(_listed(_mk_distinct), z3.ExprRef.__ne__),
    (z3.ArithRef, "__neg__"): _negate,
    (z3.ArithRef, "is_int"): _is_int,
    (z3.IntNumRef, "as_long"): _as_long,
    (z3.FuncDeclRef, "__call__"): _apply,
    (z3.FuncDeclRef, "name"): _name,
}
for _word, (_kind, _make) in _OPERATORS.items():
    for _prefix in ("", "r"):
        _full = f"__{_prefix}{_word}__"
        if hasattr(z3.ArithRef, _full):  # comparisons have none with the operands swapped
            _own = getattr(z3.ArithRef, _full)
            _METHODS[z3.ArithRef, _full] = _binary(_kind, _make, _own, swap=bool(_prefix))
_FUNCTIONS: dict[str, Any] = {
    "And": _junction(_mk_and, z3.And),
    "Or": _junction(_mk_or, z3.Or),
    "Not": _not,
    "Implies": _implies,
    "If": _if,
    "Sum": _sum,
    "IntVal": _int_val,
    "simplify": _simplified,
    "substitute": _substituted,
    "is_app": _is_app,
    "is_app_of": _is_app_of,
    "is_true": _is_true,
    "is_false": _is_false,
    "is_int_value": _is_int_value,
    "_to_expr_ref": expression,
}
# What z3 itself has there.
STOCK: dict[tuple[Any, str], Any] = {
    **{place: getattr(*place) for place in _METHODS},
    **{(stock, name): getattr(stock, name) for name in _FUNCTIONS},
}


def use() -> None:
    """Use the replacements in this process from now on."""
    z3.AstRef.is_plain = False  # until it is known of a term: an integer or Boolean of the main context
    for (owner, name), method in _METHODS.items():
        setattr(owner, name, method)
    for name, replacement in _FUNCTIONS.items():
        setattr(stock, name, replacement)
        if hasattr(z3, name):
            setattr(z3, name, replacement)
