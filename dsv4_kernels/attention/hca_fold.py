"""Fold the parts of a query's attention in ascending order: the second half of HCA and of sparse decode."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import decode_reference
from dsv4_kernels.attention.cache_layout import HEAD_DIM, MAX_QUERIES
from dsv4_kernels.attention.decode_body import INFINITY_BITS
from dsv4_kernels.attention.decode_chunk import FLOOR, LOG2_E
from dsv4_kernels.contract import Contract, require_input, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

NAME = "hca_fold"
MAX_PARTS = 1 << 12
THREAD_DIMS = 4  # dims of a thread: 16 bytes
THREADS = HEAD_DIM // THREAD_DIMS
FOLD_STEP = 9  # parts that are on their way at once


CONTRACT = Contract(
    (
        "0 <= m",
        "m <= MAX_QUERIES",
        "0 < num_heads",
        "num_heads % HEADS == 0",
        "0 < num_parts",
        "num_parts <= MAX_PARTS",
    ),
    consts={"MAX_QUERIES": MAX_QUERIES, "MAX_PARTS": MAX_PARTS + 1, "HEADS": 8},
)


def make_fold(num_parts: int) -> Any:
    """Return the macro that folds so many parts of one head.

    Its arguments are the kernel's tensors, the block's head and query, the macro that stores the sums, which
    come as fragments [512], and [1] what they are to be multiplied by, and where it stores them.
    """
    by_dim = T.Fragment((HEAD_DIM,), lambda d: (d // THREAD_DIMS, d % THREAD_DIMS))
    parts_by_dim = T.Fragment(
        (FOLD_STEP, HEAD_DIM), lambda i, d: (d // THREAD_DIMS, i * THREAD_DIMS + d % THREAD_DIMS)
    )
    of_all = T.Fragment((1,), forward_fn=lambda i, rep: (rep, i), replicate=THREADS)
    parts_of_all = T.Fragment((FOLD_STEP,), forward_fn=lambda i, rep: (rep, i), replicate=THREADS)

    @T.macro
    def fold(
        acc_in: Any,
        top_in: Any,
        total_in: Any,
        sink: Any,
        lse: Any,
        head: Any,
        bm: Any,
        put: Any,
        out: Any,
    ):
        part_acc = T.alloc_fragment((FOLD_STEP, HEAD_DIM), T.float32)
        part_top = T.alloc_fragment((FOLD_STEP,), T.float32)
        part_total = T.alloc_fragment((FOLD_STEP,), T.float32)
        acc = T.alloc_fragment((HEAD_DIM,), T.float32)
        top = T.alloc_fragment((1,), T.float32)
        old_factor = T.alloc_fragment((1,), T.float32)
        new_factor = T.alloc_fragment((1,), T.float32)
        total = T.alloc_fragment((1,), T.float32)
        T.annotate_layout({acc: by_dim, part_acc: parts_by_dim})
        T.annotate_layout({top: of_all, old_factor: of_all, new_factor: of_all, total: of_all})
        T.annotate_layout({part_top: parts_of_all, part_total: parts_of_all})
        T.clear(acc)
        T.clear(total)
        T.fill(top, FLOOR)
        for step in T.serial(T.ceildiv(num_parts, FOLD_STEP)):
            # Past the last part: one without keys.
            for i, d in T.Parallel(FOLD_STEP, HEAD_DIM):
                part_acc[i, d] = T.if_then_else(
                    step * FOLD_STEP + i < num_parts, acc_in[bm, step * FOLD_STEP + i, head, d], 0.0
                )
            for i in T.Parallel(FOLD_STEP):
                part_top[i] = T.if_then_else(
                    step * FOLD_STEP + i < num_parts, top_in[bm, step * FOLD_STEP + i, head], FLOOR
                )
            for i in T.Parallel(FOLD_STEP):
                part_total[i] = T.if_then_else(
                    step * FOLD_STEP + i < num_parts, total_in[bm, step * FOLD_STEP + i, head], 0.0
                )
            for p in T.unroll(FOLD_STEP):
                for i in T.Parallel(1):
                    old_factor[i] = top[i]
                for i in T.Parallel(1):
                    top[i] = T.max(top[i], part_top[p])
                for i in T.Parallel(1):
                    old_factor[i] = T.exp2(old_factor[i] - top[i])
                for i in T.Parallel(1):
                    new_factor[i] = T.exp2(part_top[p] - top[i])
                for i in T.Parallel(1):
                    total[i] = T.ieee_fmaf(part_total[p], new_factor[i], T.ieee_mul(total[i], old_factor[i]))
                for d in T.Parallel(HEAD_DIM):
                    acc[d] = T.ieee_fmaf(part_acc[p, d], new_factor[0], T.ieee_mul(acc[d], old_factor[0]))
        for i in T.Parallel(1):
            new_factor[i] = T.if_then_else(
                total[i] > 0, 1.0 / (total[i] + T.exp2(sink[head] * LOG2_E - top[i])), 0.0
            )
        put(out, bm, head, acc, new_factor)
        for i in T.Parallel(1):
            lse[bm, head + i] = T.if_then_else(
                total[i] > 0,
                (top[i] + T.log2(total[i])) * (1 / LOG2_E),
                T.reinterpret(INFINITY_BITS, "float32"),
            )

    return fold


def make_kernel(num_heads: int, num_parts: int) -> Any:
    """Return the PrimFunc that folds so many parts; queries stay symbolic.

    A block has one head, and each of its threads four dims: nothing is exchanged while the parts go by.
    """
    m = T.dynamic("m")
    fold = make_fold(num_parts)

    @T.macro
    def put(out: Any, bm: Any, head: Any, acc: Any, factor: Any):
        for d in T.Parallel(HEAD_DIM):
            out[bm, head, d] = T.cast(acc[d] * factor[0], "bfloat16")

    @T.prim_func
    def hca_fold_kernel(
        acc_in: T.Tensor[(m, num_parts, num_heads, HEAD_DIM), T.float32],
        top_in: T.Tensor[(m, num_parts, num_heads), T.float32],
        total_in: T.Tensor[(m, num_parts, num_heads), T.float32],
        sink: T.Tensor[(num_heads,), T.float32],
        out: T.Tensor[(m, num_heads, HEAD_DIM), T.bfloat16],
        lse: T.Tensor[(m, num_heads), T.float32],
    ):
        with T.Kernel(num_heads, m, threads=THREADS) as (head, bm):
            fold(acc_in, top_in, total_in, sink, lse, head, bm, put, out)

    return hca_fold_kernel


def empty_outputs(
    acc: torch.Tensor, top: torch.Tensor, total: torch.Tensor, sink: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate out and lse of these arguments of `hca_fold`."""
    m, _, num_heads, dim = acc.shape
    return acc.new_empty((m, num_heads, dim), dtype=torch.bfloat16), acc.new_empty((m, num_heads))


def check(
    name: str,
    acc: torch.Tensor,
    top: torch.Tensor,
    total: torch.Tensor,
    contract: Contract = CONTRACT,
    dim: str = "num_parts",
) -> None:
    """Check the sums that an operator folds; `dim` is the contract's name of how many a query has.

    Raises:
        ContractError: a clause of the contract, a dtype, a device or a shape does not hold.
    """
    require_tensor(name, "acc", acc, dtype=torch.float32, ndim=4)
    m, num_parts, num_heads, _ = acc.shape
    contract.check(name, m=m, **{dim: num_parts}, num_heads=num_heads)
    require_shape(name, "acc", acc, (m, num_parts, num_heads, HEAD_DIM))
    for which, tensor in (("top", top), ("total", total)):
        shape = (m, num_parts, num_heads)
        require_input(name, which, tensor, shape, dtype=torch.float32, device=acc.device)


@operator(NAME, empty_outputs)
def hca_fold(
    acc: torch.Tensor, top: torch.Tensor, total: torch.Tensor, sink: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold what `hca_groups` or `sparse_parts` returned, parts in ascending order.

    Args:
        acc: [m, parts, num_heads, 512] fp32; m = 0 is allowed.
        top: [m, parts, num_heads] fp32.
        total: [m, parts, num_heads] fp32.
        sink: [num_heads] fp32; -inf: none.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        out: [m, num_heads, 512] bf16, not yet rotated back; zeros where nothing is attended.
        lse: [m, num_heads] fp32, natural, without the sink; +inf where nothing is attended.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    check(NAME, acc, top, total)
    m, num_parts, num_heads, _ = acc.shape
    require_input(NAME, "sink", sink, (num_heads,), dtype=torch.float32, device=acc.device)
    if runtime.uses_reference(acc):
        return decode_reference.hca_fold(acc, top, total, sink)
    out, lse = empty_outputs(acc, top, total, sink)
    if m:
        runtime.launch(make_kernel, _variant(num_heads, num_parts).kwargs, (acc, top, total, sink, out, lse))
    return out, lse


@cache
def _variant(num_heads: int, num_parts: int) -> Variant:
    return Variant(f"h{num_heads}-p{num_parts}", {"num_heads": num_heads, "num_parts": num_parts})


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    shape = (dims["m"], dims["num_parts"], dims["num_heads"], HEAD_DIM)
    acc = torch.randn(shape, generator=generator, device=device)
    top = 4 * torch.randn(shape[:3], generator=generator, device=device)
    total = 1 + 63 * torch.rand(top.shape, generator=generator, device=device)
    is_empty = torch.rand(top.shape, generator=generator, device=device) < 1 / 8
    acc, total = torch.where(is_empty[..., None], 0, acc), torch.where(is_empty, 0, total)
    sink = torch.randn(shape[2], generator=generator, device=device)
    return acc, torch.where(is_empty, FLOOR, top), total, sink


HEADS = (64, 128)  # Flash, Pro
GROUPS = 10  # of HCA decode: the window and 8192 entries of 2**20 tokens
CHUNKS = {64: 10, 128: 18}  # of sparse decode: 512 (Flash) or 1024 (Pro) entries, and the window
SHAPES = tuple(sorted({*CHUNKS.items(), *((h, GROUPS) for h in HEADS)}))  # (heads, parts)
FOLD_SPEC = KernelSpec(
    name=NAME,
    fn=hca_fold,
    reference=decode_reference.hca_fold,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(*shape) for shape in SHAPES),
    select=lambda d: _variant(d["num_heads"], d["num_parts"]),
    contract=CONTRACT,
    cases=(
        Case("empty", {"m": 0, "num_heads": 8, "num_parts": 1}),
        Case("one-row", {"m": 1, "num_heads": 8, "num_parts": 1}),
        Case("three-rows", {"m": 3, "num_heads": 16, "num_parts": 9}),
        *(
            Case(f"m{m}-h{h}", {"m": m, "num_heads": h, "num_parts": GROUPS}, ("gpu", "bench"))
            for h in HEADS
            for m in (1, 64)
        ),
        *(
            Case(f"m2-h{h}-p{p}", {"m": 2, "num_heads": h, "num_parts": p}, ("gpu", "bench"))
            for h, p in CHUNKS.items()
        ),
    ),
    tolerance=decode_reference.hca_fold_tolerance,
    num_bytes=lambda d: d["m"] * d["num_heads"] * (HEAD_DIM * 2 + d["num_parts"] * (HEAD_DIM + 2) * 4),
    source="DeepSeek-V4 report 2.3.2 and 3.3",
    small={"num_heads": 64, "num_parts": 10},
)
SPECS = (FOLD_SPEC,)
