"""Preconditions, written once as text and read by the host check, the prover and the docs."""

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType
from typing import Any

import torch

_ARITH = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod}
_COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.LtE: operator.le,
    ast.Lt: operator.lt,
    ast.GtE: operator.ge,
    ast.Gt: operator.gt,
}


_DISTINCT = "distinct"
ALIGNMENT_BYTES = 16  # widest vector access and what a TMA descriptor asks of a base address


class ContractError(ValueError):
    """A call broke a stated precondition of a kernel; nothing was launched or written."""


@dataclass(frozen=True)
class Contract:
    """A conjunction of integer comparisons over named dims and constants.

    Attributes:
        clauses: one (chained) comparison each, over dim names, `consts` and integer literals,
            with `+ - * %`. A modulus must be a constant, so that no model divides by zero. Or `distinct(x)`:
            no two elements of the vector x, one of `tensors`, are equal, unless they are negative.
        consts: names that stand for fixed integers in the clauses.
        tensors: names that stand for every element of an input tensor. `check` leaves clauses on them
            out; proofs that use one list it as an assumption.
    """

    clauses: tuple[str, ...]
    consts: Mapping[str, int] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Reject a clause that is not a comparison of integer arithmetic."""
        for clause in self.clauses:
            if distinct_of(clause) is None:
                _check_clause(clause, self.consts)

    def check(self, kernel: str, **dims: int) -> None:
        """Raise ContractError naming the first clause that `dims` breaks and the values in it."""
        if eval(self._joined, {"__builtins__": {}, **self.consts}, dims):  # one expression: host cost
            return
        for clause, code in self._code.items():
            if not eval(code, {"__builtins__": {}, **self.consts}, dims):
                got = ", ".join(f"{name}={dims[name]}" for name in code.co_names if name in dims)
                raise ContractError(f"{kernel}: requires {clause}, got {got}")

    def terms(
        self, env: Mapping[str, Any], only: Callable[[set[str]], bool] = lambda names: True
    ) -> list[tuple[str, Any]]:
        """Return (clause, term) for every comparison, over `env` whose values are ints or Z3 Ints.

        Args:
            env: values by name.
            only: says of the names that a clause mentions whether it is wanted.
        """
        env = {**self.consts, **env}
        wanted = [c for c in self.clauses if only(self.names_of(c)) and distinct_of(c) is None]
        return [(clause, term) for clause in wanted for term in _terms(clause, env)]

    def names(self) -> set[str]:
        """Return every name that the clauses mention, of dims and of tensors."""
        return {name for clause in self.clauses for name in self.names_of(clause)}

    def names_of(self, clause: str) -> set[str]:
        """Return the names that one clause mentions, constants left out."""
        return set(compile(clause, "<contract>", "eval").co_names) - set(self.consts) - {_DISTINCT}

    @property
    def distinct(self) -> dict[str, str]:
        """The tensors without equal elements, each with its clause."""
        return {name: c for c in self.clauses if (name := distinct_of(c)) is not None}

    @cached_property
    def _code(self) -> dict[str, CodeType]:
        ours = [c for c in self.clauses if distinct_of(c) is None and not self.names_of(c) & self.tensors]
        return {clause: compile(clause, "<contract>", "eval") for clause in ours}

    @cached_property
    def _joined(self) -> CodeType:
        text = " and ".join(f"({clause})" for clause in self._code) or "True"
        return compile(text, "<contract>", "eval")


def distinct_of(clause: str) -> str | None:
    """Return the tensor whose elements `clause` says to be distinct, None for a comparison."""
    match ast.parse(clause, mode="eval").body:
        case ast.Call(func=ast.Name(id=function), args=[ast.Name(id=name)], keywords=[]) if (
            function == _DISTINCT
        ):
            return name
    return None


def require_tensor(
    kernel: str,
    name: str,
    tensor: torch.Tensor,
    *,
    dtype: torch.dtype,
    ndim: int,
    device: torch.device | None = None,
) -> None:
    """Raise ContractError unless `tensor` is contiguous, aligned, `ndim`-d, of `dtype` (on `device`)."""
    if not isinstance(tensor, torch.Tensor):
        kind = type(tensor).__name__
        raise ContractError(f"{kernel}: requires {name} to be a tensor, got {name}={kind}")
    if tensor.dtype != dtype:
        raise ContractError(f"{kernel}: requires {name}.dtype == {dtype}, got {name}.dtype={tensor.dtype}")
    if tensor.dim() != ndim:
        raise ContractError(
            f"{kernel}: requires {name}.ndim == {ndim}, got {name}.shape={tuple(tensor.shape)}"
        )
    if not tensor.is_contiguous():
        raise ContractError(f"{kernel}: requires {name} contiguous, got {name}.stride()={tensor.stride()}")
    if tensor.numel() and tensor.data_ptr() % ALIGNMENT_BYTES:
        clause, got = f"{name}.data_ptr() % {ALIGNMENT_BYTES} == 0", tensor.data_ptr()
        raise ContractError(f"{kernel}: requires {clause}, got {name}.data_ptr()={got}")
    if device is not None and tensor.device != device:
        raise ContractError(
            f"{kernel}: requires {name}.device == {device}, got {name}.device={tensor.device}"
        )


def require_shape(kernel: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise ContractError unless `tensor` has exactly `shape`."""
    if tuple(tensor.shape) != shape:
        got = tuple(tensor.shape)
        raise ContractError(f"{kernel}: requires {name}.shape == {shape}, got {name}.shape={got}")


def require_input(
    kernel: str,
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise ContractError unless `tensor` is as `require_tensor` asks for and has exactly `shape`."""
    require_tensor(kernel, name, tensor, dtype=dtype, ndim=len(shape), device=device)
    require_shape(kernel, name, tensor, shape)


def _check_clause(clause: str, consts: Mapping[str, int]) -> None:
    node = ast.parse(clause, mode="eval").body
    # `a and b` on Z3 terms keeps only `b`, so a clause is one (chained) comparison and nothing else.
    if not isinstance(node, ast.Compare) or any(type(op) not in _COMPARE for op in node.ops):
        raise SyntaxError(f"contract clause must be a comparison: {clause!r}")
    for part in (node.left, *node.comparators):
        _check_arithmetic(part, consts)


def _check_arithmetic(node: ast.expr, consts: Mapping[str, int]) -> None:
    match node:
        case ast.Constant(value=int()) | ast.Name():
            return
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int())):
            return
        case ast.BinOp(left=left, op=ast.Mod(), right=right):
            if not (isinstance(right, ast.Constant) or (isinstance(right, ast.Name) and right.id in consts)):
                raise SyntaxError(f"a modulus must be a constant: {ast.unparse(node)!r}")
            _check_arithmetic(left, consts)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITH:
            _check_arithmetic(left, consts)
            _check_arithmetic(right, consts)
        case _:
            raise SyntaxError(f"not integer arithmetic: {ast.unparse(node)!r}")


def _terms(clause: str, env: Mapping[str, Any]) -> list[Any]:
    node = ast.parse(clause, mode="eval").body
    if not isinstance(node, ast.Compare):
        raise SyntaxError(f"contract clause must be a comparison: {clause!r}")
    values = [_value(n, env) for n in (node.left, *node.comparators)]
    return [_COMPARE[type(op)](a, b) for op, a, b in zip(node.ops, values, values[1:], strict=False)]


def _value(node: ast.expr, env: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            return env[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, env)
        case ast.BinOp(left=left, op=op, right=right):
            return _ARITH[type(op)](_value(left, env), _value(right, env))
    raise SyntaxError(f"not integer arithmetic: {ast.unparse(node)}")
