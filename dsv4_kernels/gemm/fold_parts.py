"""Add the parts of a product, the first part first: the second half of `narrow_gemm` (V4 report 3.3)."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.contract import Contract, ContractError, require_tensor
from dsv4_kernels.gemm import narrow_reference
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

NAME = "fold_parts"
THREADS = 128
ROWS, COLUMNS = 8, 64  # of a block: 16 bytes of each part a thread
MAX_TOKENS = 2**31 - 256  # launch extents are int32
F32, BF16 = "float32", "bfloat16"  # kinds of outputs
_KINDS = {torch.float32: F32, torch.bfloat16: BF16}

CONTRACT = Contract(
    (
        "0 <= m",
        "m <= MAX_TOKENS",
        "0 < num_parts",
        "num_parts <= 64",
        "0 < n",
        "n % COLUMNS == 0",
        "n <= 4096",
    ),
    consts={"MAX_TOKENS": MAX_TOKENS, "COLUMNS": COLUMNS},
)


def make_kernel(n: int, num_parts: int, out: str) -> Any:
    """Return the PrimFunc for rows of n outputs; the number of tokens m stays symbolic."""
    m = T.dynamic("m")

    def total(parts: Any, row: Any, column: Any) -> Any:
        value = parts[row, 0, column]
        for part in range(1, num_parts):
            value = value + parts[row, part, column]
        return value

    @T.prim_func
    def fold_parts_kernel(
        parts: T.Tensor[(m, num_parts, n), T.float32],
        folded: T.Tensor[(m, n), out],
    ):
        with T.Kernel(T.ceildiv(m, ROWS), n // COLUMNS, threads=THREADS) as (bm, bn):
            for i, j in T.Parallel(ROWS, COLUMNS):
                folded[bm * ROWS + i, bn * COLUMNS + j] = T.cast(
                    total(parts, bm * ROWS + i, bn * COLUMNS + j), out
                )

    return fold_parts_kernel


def launch(parts: torch.Tensor, folded: torch.Tensor) -> None:
    """Add the parts into `folded`; both are as `fold_parts` checks and makes them, and not empty."""
    num_parts, n = parts.shape[1:]
    runtime.launch(make_kernel, _variant(n, num_parts, _KINDS[folded.dtype]).kwargs, (parts, folded))


def _empty_output(parts: torch.Tensor, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return parts.new_empty((parts.shape[0], parts.shape[2]), dtype=out_dtype)


@operator(NAME, _empty_output)
def fold_parts(parts: torch.Tensor, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Add the parts of each output in fp32, ((part 0 + part 1) + part 2) and so on, and round once.

    Args:
        parts: [m, parts, n] float32, contiguous, 16-byte aligned; n % 64 == 0, n <= 4096, parts <= 64.
        out_dtype: float32 or bfloat16.

    Returns:
        [m, n] of `out_dtype`.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_tensor(NAME, "parts", parts, dtype=torch.float32, ndim=3)
    m, num_parts, n = parts.shape
    CONTRACT.check(NAME, m=m, num_parts=num_parts, n=n)
    if out_dtype not in _KINDS:
        raise ContractError(f"{NAME}: requires out_dtype in {(*_KINDS,)}, got out_dtype={out_dtype}")
    if runtime.uses_reference(parts):
        return narrow_reference.fold_parts(parts, out_dtype)
    folded = _empty_output(parts, out_dtype)
    if m:
        launch(parts, folded)
    return folded


@cache
def _variant(n: int, num_parts: int, out: str) -> Variant:
    return Variant(f"n{n}-p{num_parts}-{out}", {"n": n, "num_parts": num_parts, "out": out})


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[Any, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    parts = torch.randn(dims["m"], dims["num_parts"], dims["n"], generator=generator, device=device)
    return parts, torch.float32 if dims["f32_out"] else torch.bfloat16


def _case(m: int, n: int, num_parts: int, out: str, *tags: str) -> Case:
    dims = {"m": m, "n": n, "num_parts": num_parts, "f32_out": int(out == F32)}
    name = "one-row" if m == 1 and "test" in tags else f"m{m}-n{n}-p{num_parts}-{out}"
    return Case(name, dims, tags)


# Outputs, parts and type of `narrow_gemm`'s shapes.
SHAPES = ((64, 4, BF16), (256, 4, F32), (384, 4, F32))

SPEC = KernelSpec(
    name=NAME,
    fn=fold_parts,
    reference=narrow_reference.fold_parts,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(*shape) for shape in SHAPES),
    select=lambda d: _variant(d["n"], d["num_parts"], F32 if d["f32_out"] else BF16),
    contract=CONTRACT,
    cases=(
        _case(0, 64, 4, F32, "test"),
        _case(1, 64, 4, BF16, "test"),
        _case(19, 128, 3, F32, "test"),
        *(_case(m, *shape, "gpu", "bench") for shape in SHAPES for m in (64, 4096)),
    ),
    num_bytes=lambda d: d["m"] * d["n"] * (4 * d["num_parts"] + (4 if d["f32_out"] else 2)),
    peers=("torch_copy", "torch_compile"),
    source="DeepSeek-V4 report 2.1, 3.3: batch-invariant sums",
    small={"n": 64},
)
