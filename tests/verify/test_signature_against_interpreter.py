"""Signatures mean what the interpreter computes: terms of output elements, evaluated, are the elements' bits.

`batch_invariance` compares terms, so a term that stood for another computation could make two kernels equal
that are not. Here the terms of small kernels are evaluated at random elements, on data on which every sum is
exact, and compared with the interpreter's run of the kernel.
"""

import ast
import inspect
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import z3
from tilelang import language as T

from tests.verify import invariance_kernels as kernels
from tests.verify import round_kernels
from tests.verify.refinement_kernels import halves_of_k
from tests.verify.term_values import Values
from verify import extract, interp, ir
from verify import signature as package
from verify.encode import Hypothesis
from verify.interp import dtypes
from verify.signature.rows import signature
from verify.signature.state import integer_of

ROWS, ELEMENTS = 37, 48
COLUMNS = kernels.COLUMNS
_M = z3.Int("m")
GIVEN = (Hypothesis("0 <= m", "contract", _M >= 0), Hypothesis("m <= 65536", "contract", _M <= 1 << 16))
NOT = getattr(T, "Not")  # noqa: B009  (declared dynamically)


# --------------------------------------------------------------------------- more kernels
def padded_shift() -> Any:
    """Each element plus its right neighbour, which is 0 beyond the row's end."""
    m, width = T.dynamic("m"), 100

    @T.prim_func
    def kernel(x: T.Tensor[(m, width), T.float32], out: T.Tensor[(m, width), T.float32]):
        with T.Kernel(m, 2, threads=64) as (row, half):
            tile = T.alloc_shared((65,), T.float32)
            for j in T.Parallel(65):
                tile[j] = x[row, half * 64 + j]
            for j in T.Parallel(64):
                out[row, half * 64 + j] = tile[j] + tile[j + 1]

    return kernel


def rounds_apart() -> Any:
    """A sum over two rounds: the second one reads beyond the row's end, and counts otherwise."""
    m, width = T.dynamic("m"), 64

    @T.prim_func
    def kernel(x: T.Tensor[(m, width), T.float32], out: T.Tensor[(m, width), T.float32]):
        with T.Kernel(m, threads=width) as row:
            tile = T.alloc_shared((width,), T.float32)
            total = T.alloc_fragment((width,), T.float32)
            T.clear(total)
            for k in T.serial(2):
                T.copy(x[row, k * width], tile)
                for j in T.Parallel(width):
                    total[j] += T.if_then_else(k < 1, tile[j] * 3.0, tile[j] + 1.0)
            for j in T.Parallel(width):
                out[row, j] = total[j]

    return kernel


def octets_of_words() -> Any:
    """The bytes of words, negated where the word is not positive, else the odd ones halved."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, 16), T.int32], out: T.Tensor[(m, 64), T.int32]):
        with T.Kernel(m, threads=64) as row:
            words = T.alloc_shared((16,), T.int32)
            positive = T.alloc_shared((16,), T.bool)
            for j in T.Parallel(16):
                words[j] = x[row, j]
            for j in T.Parallel(16):
                positive[j] = words[j] > 0
            octets = T.view(words, (64,), T.uint8)
            for j in T.Parallel(64):
                value = T.cast(octets[j], "int32")
                out[row, j] = T.if_then_else(NOT(positive[j // 4]), 0 - value, value >> (j % 2))

    return kernel


def bits_of_floats() -> Any:
    """Floats seen as integers through a view, with arithmetic on both."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, 32), T.float32], out: T.Tensor[(m, 32), T.int32]):
        with T.Kernel(m, threads=32) as row:
            tile = T.alloc_shared((32,), T.float32)
            for j in T.Parallel(32):
                tile[j] = T.max(x[row, j] * 3.0 - x[row, 31 - j], -5.0)
            words = T.view(tile, (32,), T.int32)
            for j in T.Parallel(32):
                out[row, j] = (words[j] >> 3) ^ (j * 7)

    return kernel


def rings(depth: int) -> Any:
    """Row sums of a buffer that is filled some rounds ahead."""
    m, rounds = T.dynamic("m"), 12

    @T.prim_func
    def kernel(x: T.Tensor[(m, rounds * 8), T.float32], out: T.Tensor[(m, 8), T.float32]):
        with T.Kernel(m, threads=32) as row:
            ring = T.alloc_shared((depth + 1, 8), T.float32)
            total = T.alloc_fragment((8,), T.float32)
            T.clear(total)
            for d in T.serial(depth):
                for j in T.Parallel(8):
                    ring[d, j] = x[row, d * 8 + j]
            for k in T.serial(rounds - depth):
                for j in T.Parallel(8):
                    ring[(k + depth) % (depth + 1), j] = x[row, (k + depth) * 8 + j]
                for j in T.Parallel(8):
                    total[j] = total[j] * 2.0 + ring[k % (depth + 1), j]
            for j in T.Parallel(8):
                out[row, j] = total[j]

    return kernel


def both_operands_turned() -> Any:
    """A product of transposed operands, on top of what the accumulator holds."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, 64, 64), T.bfloat16],
        w: T.Tensor[(64, 32), T.bfloat16],
        out: T.Tensor[(m, 64, 32), T.float32],
    ):
        with T.Kernel(m, threads=128) as row:
            a = T.alloc_shared((64, 64), T.bfloat16)
            b = T.alloc_shared((64, 32), T.bfloat16)
            acc = T.alloc_fragment((64, 32), T.float32)
            T.copy(x[row, 0, 0], a)
            T.copy(w, b)
            for i, j in T.Parallel(64, 32):
                acc[i, j] = T.cast(i * 3 - j, "float32")
            T.gemm(a, b, acc, transpose_A=True)
            T.copy(acc, out[row, 0, 0])

    return kernel


def reductions(op: str, clear: bool) -> Any:
    """A reduction of integers, on top of what is there."""
    m = T.dynamic("m")
    reduce = getattr(T, f"reduce_{op}")

    @T.prim_func
    def kernel(x: T.Tensor[(m, 4, 32), T.int32], out: T.Tensor[(m, 4), T.int32]):
        with T.Kernel(m, threads=32) as row:
            tile = T.alloc_fragment((4, 32), T.int32)
            found = T.alloc_fragment((4,), T.int32)
            for i, j in T.Parallel(4, 32):
                tile[i, j] = x[row, i, j]
            for i in T.Parallel(4):
                found[i] = i - 2
            reduce(tile, found, dim=1, clear=clear)
            for i in T.Parallel(4):
                out[row, i] = found[i]

    return kernel


KERNELS = {
    "scales": kernels.scaled_rows(32),
    "clamped": kernels.clamped_rows(),
    "splits": kernels.split_sums(False),
    "a loop, folded": kernels.chunked_sums(16),
    "backwards": kernels.chunked_sums(16, is_reversed=True),
    "a tree": kernels.reduced_rows(32, 128),
    "choices of data": kernels.chosen_elements(0),
    "counts": kernels.digit_counts(),
    "a product": kernels.product(64, 64),
    "halves of a tile": kernels.column_scales(True),
    "in two places": kernels.moving_sums(2),
    "in three places": kernels.moving_sums(3),
    "as long as data say": kernels.counted_sums(32),
    "pages": kernels.pages(),
    "tiles": kernels.grid_stride(False),
    "operands by warpgroup": halves_of_k(),
    "operands by warpgroup, swapped": halves_of_k(swapped=True),
    "beyond the end": padded_shift(),
    "rounds apart": rounds_apart(),
    "halves in halves": kernels.halves_in_halves(),
    "bytes": octets_of_words(),
    "bits": bits_of_floats(),
    "one round ahead": rings(1),
    "two rounds ahead": rings(2),
    "a round late": round_kernels.late_sums(),
    "three rounds late": round_kernels.late_sums(3),
    "five rounds late": round_kernels.late_sums(5),
    "first by another factor": round_kernels.filled_ahead(3.0),
    "ahead of its round": round_kernels.filled_ahead(),
    "running sums": round_kernels.running_sums(),
    "rows in turn": round_kernels.rows_in_turn(),
    "transposed": both_operands_turned(),
    "sum": reductions("sum", True),
    "sum on top": reductions("sum", False),
    "absmax": reductions("absmax", True),
    "max on top": reductions("max", False),
    "min": reductions("min", True),
}
SHARED = {"as long as data say": {"count": 32}}
DIMS = {"pages": {"size": 9}}


def arguments(function: ir.Function, name: str) -> dict[str, torch.Tensor]:
    """Return tensors by name: small integers, so that every sum and product is exact."""
    generator = torch.Generator().manual_seed(len(name))
    dims = {"m": ROWS, **DIMS.get(name, {})}
    found = {}
    for param in function.params:
        buffer = function.buffers[param]
        shape = [dims[e.name] if isinstance(e, ir.Var) else integer_of(e) for e in buffer.shape]
        kind = dtypes.argument_dtypes(buffer.dtype.name)[0]
        low, high = (0, 9) if buffer.name in ("count", "table") else (-8, 9)
        values = torch.randint(low, high, shape, generator=generator)
        if name == "bytes":
            values = values * 0x01234567
        if buffer.name == "count":
            values = values[: 1 + ROWS // 32].repeat_interleave(32)[:ROWS]
        found[buffer.name] = torch.zeros(shape, dtype=kind) if buffer.name == "out" else values.to(kind)
    return found


@cache
def compared(name: str) -> frozenset[str]:
    """Compare elements of a kernel's output with their terms; return the operations in these."""
    function = extract.tile_function(KERNELS[name])
    found = signature(function, ("m",), GIVEN, lambda step: "any", SHARED.get(name))
    assert not found.problems, found.problems
    assert not found.unsupported, found.unsupported
    tensors = arguments(function, name)
    interp.run_function(function, tuple(tensors.values()))
    types = {b.name: b.dtype.name for b in function.buffers.values()}
    carried = {n: dtypes.to_carrier(t, types[n]) for n, t in tensors.items()}
    rng = np.random.default_rng(0)
    assert found.outputs.keys() == {"out"}
    (term, *others) = found.outputs["out"].terms
    shape = carried["out"].shape
    places = [rng.integers(0, extent, ELEMENTS) for extent in shape]
    env = {"row": places[0], **{f"o{n}": p for n, p in enumerate(places)}, **DIMS.get(name, {})}
    values = Values(carried, ELEMENTS)
    got = values.term(term, env)
    want = carried["out"][tuple(torch.as_tensor(p) for p in places)]
    assert not others
    assert torch.equal(dtypes.to_bits(got.contiguous(), types["out"]), dtypes.to_bits(want, types["out"]))
    assert len(set(want.tolist())) > 1, "a constant would agree with much"
    return frozenset(values.met)


@pytest.mark.parametrize("name", KERNELS)
def test_terms_have_the_values_of_the_elements(name):
    assert compared(name)


def made() -> set[str]:
    """Return the operations of terms that the package names where it makes one."""
    folder = Path(inspect.getfile(package)).parent
    calls = (
        n for f in folder.glob("*.py") for n in ast.walk(ast.parse(f.read_text())) if isinstance(n, ast.Call)
    )
    makes = (c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "make" and c.args)
    return {str(c.args[0].value) for c in makes if isinstance(c.args[0], ast.Constant)}


def test_every_kind_of_term_was_compared():
    assert made() >= {"mma", "fold", "carried", "scatter", "inside"}
    assert made() <= set().union(*(compared(name) for name in KERNELS))
