"""Terms of signatures as numbers: operations by the interpreter, all that a term refers to by its text.

What a term says of places, counters, steps of a sum and instructions is read here anew, from the words of
`verify/signature`: no code of it takes part, but for the walk over index expressions.
"""

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import torch

from verify import ir
from verify.interp import dtypes
from verify.interp.machine import Machine
from verify.interp.tileops import reduce_values
from verify.refine.sym import Sym

PRIME = "'"  # after a counter's name: the same depth, another range


class Values:
    """Evaluates terms at many elements of an output at once.

    Attributes:
        tensors: what the kernel reads, by name, as carriers.
        met: operations of terms that were evaluated.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], count: int) -> None:
        self.tensors, self.count = tensors, count
        self.met: set[str] = set()
        self._holes: dict[tuple[int, int], torch.Tensor] = {}

    def term(
        self, term: Any, env: Mapping[str, np.ndarray], depth: int = 0, memo: Any = None
    ) -> torch.Tensor:
        """Return the term's value as a carrier of its type, one for each element.

        Args:
            env: values of the symbols of index expressions, by name.
            depth: counters that are open around it.
            memo: values of terms for this `env`.
        """
        memo = {} if memo is None else memo
        key = id(term), depth
        if key not in memo:
            self.met.add(term.op)
            kind = dtypes.carrier_dtype(term.dtype.name)
            memo[key] = self._term(term, env, depth, memo).to(kind).expand(self.count)
        return memo[key]

    def _term(self, term: Any, env: Mapping[str, np.ndarray], depth: int, memo: Any) -> torch.Tensor:
        args = term.args
        match term.op:
            case "const":
                value = args[0] if term.dtype.is_int else float.fromhex(args[0])
                return torch.as_tensor(dtypes.constant(value, term.dtype))
            case "index":
                return self._int(args[0], env)
            case "read":
                return self._read(term, env, depth, memo)
            case "inside":
                within = torch.stack([self._int(s, env) >= 0 for s in args[1]]).all(dim=0)
                safe = {n: np.where(within.numpy(), v, 0) for n, v in env.items()}
                return torch.where(
                    within, self.term(args[0], safe, depth), torch.zeros((), dtype=torch.uint8)
                )
            case "gather":
                value, *chosen = args
                picked = [self.term(c, env, depth, memo).numpy() for c in chosen]
                return self.term(value, {**env, **_counters(depth, picked)}, depth + len(picked))
            case "scatter":
                return self._scattered(term, env, depth, memo)
            case "select":
                test, a, b = (self.term(a, env, depth, memo) for a in args)
                return torch.where(test != 0, a, b)
            case "mma":
                previous, a, b, width, _ = args
                one = (
                    torch.zeros(self.count)
                    if previous == "cleared"
                    else self.term(previous, env, depth, memo)
                )
                total = one.clone()
                for k in range(width):
                    inner = {**env, **_counters(depth, [np.full(self.count, k)])}
                    x, y = (self._wide(t, inner, depth + 1) for t in (a, b))
                    total += x * y
                return total
            case "reduce":
                op, length, _, body = args
                parts = [
                    self.term(body, {**env, **_counters(depth, [np.full(self.count, k)])}, depth + 1)
                    for k in range(length)
                ]
                return reduce_values(torch.stack(parts), op, 0, term.dtype.name)
            case "fold":
                return self._fold(term, env, depth, memo)
            case "carried":
                return self._holes[args[0], args[1]]
            case "bits":
                whole, part = args
                pattern = dtypes.to_bits(self.term(whole, env, depth, memo), whole.dtype.name)
                cut = (pattern >> (self._int(part, env) * term.dtype.bits)) & ((1 << term.dtype.bits) - 1)
                return dtypes.from_bits(cut, term.dtype.name)
        return self._operation(term, [self.term(a, env, depth, memo) for a in args])

    def _wide(self, term: Any, env: Mapping[str, np.ndarray], depth: int) -> torch.Tensor:
        return dtypes.cast(self.term(term, env, depth), term.dtype.name, "float32")

    def _operation(self, term: Any, values: list[torch.Tensor]) -> torch.Tensor:
        names = [ir.Var(a.dtype, f"operand {n}") for n, a in enumerate(term.args)]
        if term.op == "cast":
            node: ir.Expr = ir.Cast(term.dtype, names[0])
        elif term.op == "not":
            node = ir.Not(term.dtype, names[0])
        elif len(names) == len(("left", "right")):
            node = ir.BinOp(term.dtype, term.op, *names)
        else:
            node = ir.Call(term.dtype, term.op, tuple(names))
        machine = Machine()
        machine.lanes.extents.append(self.count)
        machine.env.update(zip(names, values, strict=True))
        found = machine.tensor(node)
        return (
            dtypes.wrap(found, term.dtype.name) if term.dtype.is_int and found.dtype == torch.int64 else found
        )

    def _read(self, term: Any, env: Mapping[str, np.ndarray], depth: int, memo: Any) -> torch.Tensor:
        name, *indices = term.args
        places = [
            self._int(i, env) if isinstance(i, Sym) else self.term(i, env, depth, memo) for i in indices
        ]
        return self.tensors[name][tuple(p.expand(self.count) for p in places)]

    def _scattered(self, term: Any, env: Mapping[str, np.ndarray], depth: int, memo: Any) -> torch.Tensor:
        old, element, extents, where, guards, added = term.args
        total = self.term(old, env, depth, memo).clone()
        wanted = [self.term(e, env, depth, memo) for e in element]
        for values in product(*map(range, extents)):
            inner = {**env, **_counters(depth, [np.full(self.count, v) for v in values])}
            deep, here = depth + len(values), {}
            hit = torch.ones(self.count, dtype=torch.bool)
            for place, want in zip(where, wanted, strict=True):
                hit &= self.term(place, inner, deep, here) == want
            for guard in guards:
                hit &= self.term(guard, inner, deep, here) != 0
            total += torch.where(hit, self.term(added, inner, deep, here), 0)
        return dtypes.wrap(total, term.dtype.name)

    def _fold(self, term: Any, env: Mapping[str, np.ndarray], depth: int, memo: Any) -> torch.Tensor:
        loop, start, extent, which, inits, bodies = term.args
        states = [self.term(init, env, depth, memo) for init in inits]
        rounds = self._int(extent, env).expand(self.count)
        saved = dict(self._holes)
        for value in range(start, start + int(rounds.max())):
            self._holes |= {(loop, n): state for n, state in enumerate(states)}
            inner, here = {**env, f"t{loop}": np.full(self.count, value)}, {}
            after = [self.term(body, inner, depth, here) for body in bodies]
            runs = value - start < rounds
            states = [torch.where(runs, new, old) for new, old in zip(after, states, strict=True)]
        self._holes = saved
        return states[which]

    # ------------------------------------------------------------------ index expressions
    def _int(self, value: Sym, env: Mapping[str, np.ndarray]) -> torch.Tensor:
        return torch.as_tensor(np.broadcast_to(self._sym(value, env), (self.count,)).copy())

    def _sym(self, value: Sym, env: Mapping[str, np.ndarray]) -> np.ndarray:
        total = np.zeros(self.count, dtype=np.int64)
        for monomial, coefficient in value.terms.items():
            factor = np.full(self.count, coefficient)
            for atom in monomial:
                factor = factor * self._atom(atom, env)
            total = total + factor
        return total

    def _atom(self, atom: Any, env: Mapping[str, np.ndarray]) -> np.ndarray:
        if atom.kind == "var":
            return env[atom.args[0].rstrip(PRIME)]
        if atom.kind == "load":  # an entry of the row's own, in the range of a loop
            tensor = self.tensors[atom.args[0].removesuffix(" of the row")]
            return tensor[torch.as_tensor(env["row"])].numpy()
        a, b = (self._sym(x, env) if isinstance(x, Sym) else np.int64(x) for x in atom.args)
        return {"floordiv": np.floor_divide, "floormod": np.mod, "min": np.minimum, "max": np.maximum}[
            atom.kind
        ](a, b)


def _counters(depth: int, values: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Return the counters that a sum or a choice opens, named by depth."""
    return {f"k{depth + n}": v for n, v in enumerate(values, 1)}
