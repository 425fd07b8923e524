"""Folded FP4 weights (`fold.fold_weights`; V4 report 5.2.1) widened to e4m3 once, for many tokens' product.

A weight times 2**(offset - 5) is an e4m3 number, so nothing is rounded; the factor of a row is left to the
product. A warp reads the sixteen words of 128 channels of a row, each twice, and writes their 128 bytes.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.contract import Contract, require_input, require_tensor
from dsv4_kernels.gemm import reference
from dsv4_kernels.gemm.folded_tile import BLOCK_K, BLOCK_WORDS, MAX_OFFSET, SCALE_K, WORD, widen
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from verify import externs

NAME = "fp4_widen"
THREADS = 256
ROWS = 16  # weight rows of a block
STEP_K = 512  # channels of a block
MAX_ROWS = 2**31 - 256  # launch extents are int32
QUAD = 4  # weights of a word of e4m3
_STEP_QUADS = STEP_K // QUAD

CONTRACT = Contract(
    ("0 <= m", "m <= MAX_ROWS", "0 < k", "k % STEP_K == 0", "k <= 65536"),
    consts={"MAX_ROWS": MAX_ROWS, "STEP_K": STEP_K},
)


def make_kernel(k: int) -> Any:
    """Return the PrimFunc for weights of k channels; the number of weight rows m stays symbolic.

    `widened` is [m, k] e4m3 seen as words of four.
    """
    m = T.dynamic("m")
    source = externs.source("dsv4_prmt")

    @T.prim_func
    def fp4_widen_kernel(
        words: T.Tensor[(m, k // WORD), T.uint32],
        offsets: T.Tensor[(m, k // SCALE_K), T.uint8],
        widened: T.Tensor[(m, k // QUAD), T.uint32],
    ):
        with T.Kernel(T.ceildiv(m, ROWS), k // STEP_K, threads=THREADS) as (bm, bk):
            T.import_source(source)
            codes = T.alloc_fragment((ROWS, _STEP_QUADS), T.uint32)
            shift = T.alloc_fragment((ROWS, _STEP_QUADS), T.uint8)
            # Quad 8 g + 4 h + t of a block of 128 channels is half h of word 4 t + g.
            for i, q in T.Parallel(ROWS, _STEP_QUADS):
                codes[i, q] = words[
                    bm * ROWS + i,
                    (bk * (STEP_K // BLOCK_K) + q // 32) * BLOCK_WORDS + q % 4 * 4 + q % 32 // 8,
                ]
            for i, q in T.Parallel(ROWS, _STEP_QUADS):
                shift[i, q] = offsets[bm * ROWS + i, bk * (STEP_K // SCALE_K) + q // 8]
            for i, q in T.Parallel(ROWS, _STEP_QUADS):
                widened[bm * ROWS + i, bk * _STEP_QUADS + q] = T.Select(
                    q % 8 < 4,
                    widen(codes[i, q], T.cast(shift[i, q], "int32"), 0),
                    widen(codes[i, q], T.cast(shift[i, q], "int32"), 1),
                )

    return fp4_widen_kernel


def launch(words: torch.Tensor, offsets: torch.Tensor, widened: torch.Tensor) -> None:
    """Widen into `widened`; all are as `fp4_widen` checks and makes them, and not empty."""
    k = widened.shape[1]
    args = (words.view(torch.uint32), offsets, widened.view(torch.uint32))
    runtime.launch(make_kernel, _variant(k).kwargs, args)


def _empty_output(words: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return words.new_empty((words.shape[0], words.shape[1] * WORD), dtype=torch.float8_e4m3fn)


@operator(NAME, _empty_output)
def fp4_widen(words: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Widen folded FP4 weights (see `fold.FoldedWeights`), without their rows' factors; exact.

    Args:
        words: [m, k / 8] int32, contiguous, of m weight rows; m = 0 is allowed.
        offsets: [m, k / 32] uint8, at most MAX_OFFSET (not checked here), contiguous.
        Both 16-byte aligned, on one device; k a multiple of 512 up to 65536.

    Returns:
        [m, k] e4m3: each weight times 2**(offset - 5).

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_tensor(NAME, "words", words, dtype=torch.int32, ndim=2)
    m, k = words.shape[0], words.shape[1] * WORD
    CONTRACT.check(NAME, m=m, k=k)
    require_input(NAME, "offsets", offsets, (m, k // SCALE_K), dtype=torch.uint8, device=words.device)
    if runtime.uses_reference(words):
        return reference.fp4_widen(words, offsets)
    widened = _empty_output(words, offsets)
    if m:
        launch(words, offsets, widened)
    return widened


@cache
def _variant(k: int) -> Variant:
    return Variant(f"k{k}", {"k": k})


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    m, k = dims["m"], dims["k"]
    generator = torch.Generator(device).manual_seed(seed)
    words = torch.randint(0, 256, (m, k // 2), generator=generator, device=device, dtype=torch.uint8)
    shape = (m, k // SCALE_K)
    offsets = torch.randint(0, MAX_OFFSET + 1, shape, generator=generator, device=device, dtype=torch.uint8)
    return words.view(torch.int32), offsets


def _case(m: int, k: int, *tags: str) -> Case:
    return Case(f"m{m}-k{k}", {"m": m, "k": k}, tags)


# n x k of V4's experts (Flash, Pro): gate and up together, down.
SHAPES = ((4096, 4096), (4096, 2048), (6144, 7168), (7168, 3072))

SPEC = KernelSpec(
    name=NAME,
    fn=fp4_widen,
    reference=reference.fp4_widen,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(k) for k in sorted({k for _, k in SHAPES})),
    select=lambda d: _variant(d["k"]),
    contract=CONTRACT,
    cases=(
        _case(0, 512, "test"),
        _case(1, 512, "test"),
        _case(45, 1024, "test"),
        *(_case(n, k, "gpu", "bench") for n, k in SHAPES),
    ),
    num_bytes=lambda d: d["m"] * (d["k"] // 2 + d["k"] // SCALE_K + d["k"]),
    peers=("torch_copy",),
    source="DeepSeek-V4 report 5.2.1; reference kernel fp4_gemm",
    small={"k": 512},
)
