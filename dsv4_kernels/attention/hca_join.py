"""Fold what HCA's chunks left: those of each group in ascending order, then the groups; for few queries.

A block has a quarter of a head's dims, and a warp for each group, which folds its chunks from zero; one warp
folds the groups. So 13 chunks follow each other, then the groups, and not all chunks. The operations are
those of `hca_groups` and `hca_fold`, in the same order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import decode_reference, hca_fold
from dsv4_kernels.attention.cache_layout import HEAD_DIM, MAX_QUERIES
from dsv4_kernels.attention.decode_body import INFINITY_BITS
from dsv4_kernels.attention.decode_chunk import FLOOR, LOG2_E
from dsv4_kernels.attention.hca_fold import THREAD_DIMS
from dsv4_kernels.attention.hca_lists import GROUP, HEADS, MILLION, WINDOW_CHUNKS, groups_of
from dsv4_kernels.contract import Contract, require_input
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

NAME = "hca_join"
LANES = 32  # threads of a group
DIMS = LANES * THREAD_DIMS  # of a block
QUARTERS = HEAD_DIM // DIMS
MOST_GROUPS = 16  # of a block: 512 threads, each of which has all chunks of its group on their way
MOST_CHUNKS = MOST_GROUPS * GROUP

CONTRACT = Contract(
    (
        "0 <= m",
        "m <= MAX_QUERIES",
        "0 < num_heads",
        "num_heads % HEADS == 0",
        "WINDOW_CHUNKS < num_chunks",
        "num_chunks <= MOST_CHUNKS",
    ),
    consts={
        "MAX_QUERIES": MAX_QUERIES,
        "MOST_CHUNKS": MOST_CHUNKS,
        "WINDOW_CHUNKS": WINDOW_CHUNKS,
        "HEADS": 8,
    },
)


@dataclass(frozen=True)
class Sums:
    """Registers of rows that are folded: of all groups, or the one of them all.

    Attributes:
        acc: fp32 [rows, 128].
        top, total, old_factor, new_factor: fp32 [rows].
    """

    acc: Any
    top: Any
    total: Any
    old_factor: Any
    new_factor: Any


def threads_of(num_chunks: int) -> int:
    """Return the threads of a block that joins so many chunks."""
    return groups_of(num_chunks - WINDOW_CHUNKS) * LANES


def make_join(num_chunks: int) -> Any:
    """Return the macro that joins so many chunks of one quarter of a head.

    Its arguments are the kernel's tensors, the block's quarter, head and query, the macro that stores the
    sums, which come as fragments [1, 128], and [1] what they are to be multiplied by, and where it stores
    them.
    """
    groups, threads = groups_of(num_chunks - WINDOW_CHUNKS), threads_of(num_chunks)
    group_at = T.Fragment((groups, DIMS), lambda g, d: (g * LANES + d // THREAD_DIMS, d % THREAD_DIMS))
    chunks_at = T.Fragment(
        (GROUP, groups, DIMS),
        lambda i, g, d: (g * LANES + d // THREAD_DIMS, i * THREAD_DIMS + d % THREAD_DIMS),
    )
    of_group = T.Fragment((groups,), forward_fn=lambda g, rep: (g * LANES + rep, 0), replicate=LANES)
    chunks_of_group = T.Fragment(
        (GROUP, groups), forward_fn=lambda i, g, rep: (g * LANES + rep, i), replicate=LANES
    )
    whole_at = T.Fragment((1, DIMS), lambda i, d: (d // THREAD_DIMS, d % THREAD_DIMS))
    of_all = T.Fragment((1,), forward_fn=lambda i, rep: (rep, i), replicate=threads)

    @T.macro
    def fold(rows: int, part_acc: Any, part_top: Any, part_total: Any, p: Any, sums: Any):
        """Fold part p of each of `rows` into `sums`."""
        for g in T.Parallel(rows):
            sums.old_factor[g] = sums.top[g]
        for g in T.Parallel(rows):
            sums.top[g] = T.max(sums.top[g], part_top[p, g])
        for g in T.Parallel(rows):
            sums.old_factor[g] = T.exp2(sums.old_factor[g] - sums.top[g])
        for g in T.Parallel(rows):
            sums.new_factor[g] = T.exp2(part_top[p, g] - sums.top[g])
        for g in T.Parallel(rows):
            sums.total[g] = T.ieee_fmaf(
                part_total[p, g], sums.new_factor[g], T.ieee_mul(sums.total[g], sums.old_factor[g])
            )
        for g, d in T.Parallel(rows, DIMS):
            sums.acc[g, d] = T.ieee_fmaf(
                part_acc[p, g, d], sums.new_factor[g], T.ieee_mul(sums.acc[g, d], sums.old_factor[g])
            )

    @T.macro
    def join(
        acc_in: Any,
        top_in: Any,
        total_in: Any,
        sink: Any,
        lse: Any,
        quarter: Any,
        head: Any,
        bm: Any,
        put: Any,
        out: Any,
    ):
        chunk_acc = T.alloc_fragment((GROUP, groups, DIMS), T.float32)
        chunk_top = T.alloc_fragment((GROUP, groups), T.float32)
        chunk_total = T.alloc_fragment((GROUP, groups), T.float32)
        group_acc = T.alloc_fragment((groups, DIMS), T.float32)
        group_top = T.alloc_fragment((groups,), T.float32)
        group_total = T.alloc_fragment((groups,), T.float32)
        group_old = T.alloc_fragment((groups,), T.float32)
        group_new = T.alloc_fragment((groups,), T.float32)
        all_acc = T.alloc_shared((groups, 1, DIMS), T.float32)
        all_top = T.alloc_shared((groups, 1), T.float32)
        all_total = T.alloc_shared((groups, 1), T.float32)
        acc = T.alloc_fragment((1, DIMS), T.float32)
        top = T.alloc_fragment((1,), T.float32)
        total = T.alloc_fragment((1,), T.float32)
        old_factor = T.alloc_fragment((1,), T.float32)
        new_factor = T.alloc_fragment((1,), T.float32)
        T.annotate_layout({group_acc: group_at, chunk_acc: chunks_at, acc: whole_at})
        T.annotate_layout(
            {group_top: of_group, group_total: of_group, group_old: of_group, group_new: of_group}
        )
        T.annotate_layout({chunk_top: chunks_of_group, chunk_total: chunks_of_group})
        T.annotate_layout({top: of_all, total: of_all, old_factor: of_all, new_factor: of_all})

        # Past the last chunk: one without keys.
        for i, g, d in T.Parallel(GROUP, groups, DIMS):
            chunk_acc[i, g, d] = T.if_then_else(
                g * GROUP + i < num_chunks, acc_in[bm, g * GROUP + i, head, quarter * DIMS + d], 0.0
            )
        for i, g in T.Parallel(GROUP, groups):
            chunk_top[i, g] = T.if_then_else(
                g * GROUP + i < num_chunks, top_in[bm, g * GROUP + i, head], FLOOR
            )
        for i, g in T.Parallel(GROUP, groups):
            chunk_total[i, g] = T.if_then_else(
                g * GROUP + i < num_chunks, total_in[bm, g * GROUP + i, head], 0.0
            )
        T.clear(group_acc)
        T.clear(group_total)
        T.fill(group_top, FLOOR)
        for i in T.unroll(GROUP):
            of_groups = Sums(group_acc, group_top, group_total, group_old, group_new)
            fold(groups, chunk_acc, chunk_top, chunk_total, i, of_groups)
        for g, d in T.Parallel(groups, DIMS):
            all_acc[g, 0, d] = group_acc[g, d]
        for g in T.Parallel(groups):
            all_top[g, 0] = group_top[g]
        for g in T.Parallel(groups):
            all_total[g, 0] = group_total[g]
        T.clear(acc)
        T.clear(total)
        T.fill(top, FLOOR)
        for g in T.unroll(groups):
            fold(1, all_acc, all_top, all_total, g, Sums(acc, top, total, old_factor, new_factor))
        for i in T.Parallel(1):
            new_factor[i] = T.if_then_else(
                total[i] > 0, 1.0 / (total[i] + T.exp2(sink[head] * LOG2_E - top[i])), 0.0
            )
        put(out, bm, quarter, head, acc, new_factor)
        if quarter == 0:
            for i in T.Parallel(1):
                lse[bm, head + i] = T.if_then_else(
                    total[i] > 0,
                    (top[i] + T.log2(total[i])) * (1 / LOG2_E),
                    T.reinterpret(INFINITY_BITS, "float32"),
                )

    return join


def make_kernel(num_heads: int, num_chunks: int) -> Any:
    """Return the PrimFunc that joins so many chunks; queries stay symbolic."""
    m = T.dynamic("m")
    join = make_join(num_chunks)

    @T.macro
    def put(out: Any, bm: Any, quarter: Any, head: Any, acc: Any, factor: Any):
        for i, d in T.Parallel(1, DIMS):
            out[bm, head + i, quarter * DIMS + d] = T.cast(acc[i, d] * factor[i], "bfloat16")

    @T.prim_func
    def hca_join_kernel(
        acc_in: T.Tensor[(m, num_chunks, num_heads, HEAD_DIM), T.float32],
        top_in: T.Tensor[(m, num_chunks, num_heads), T.float32],
        total_in: T.Tensor[(m, num_chunks, num_heads), T.float32],
        sink: T.Tensor[(num_heads,), T.float32],
        out: T.Tensor[(m, num_heads, HEAD_DIM), T.bfloat16],
        lse: T.Tensor[(m, num_heads), T.float32],
    ):
        with T.Kernel(QUARTERS, num_heads, m, threads=threads_of(num_chunks)) as (quarter, head, bm):
            join(acc_in, top_in, total_in, sink, lse, quarter, head, bm, put, out)

    return hca_join_kernel


def check(name: str, acc: torch.Tensor, top: torch.Tensor, total: torch.Tensor) -> None:
    """Check these arguments of `hca_join`.

    Raises:
        ContractError: a clause of CONTRACT, a dtype, a device or a shape does not hold.
    """
    hca_fold.check(name, acc, top, total, CONTRACT, "num_chunks")


@operator(NAME, hca_fold.empty_outputs)
def hca_join(
    acc: torch.Tensor, top: torch.Tensor, total: torch.Tensor, sink: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold what `hca_chunks` returned: chunks of a group in ascending order, then the groups.

    Args:
        acc: [m, chunks, num_heads, 512] fp32; m = 0 is allowed; 3 to 208 chunks.
        top: [m, chunks, num_heads] fp32.
        total: [m, chunks, num_heads] fp32.
        sink: [num_heads] fp32; -inf: none.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        out: [m, num_heads, 512] bf16, not yet rotated back; zeros where nothing is attended.
        lse: [m, num_heads] fp32, natural, without the sink; +inf where nothing is attended.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    check(NAME, acc, top, total)
    m, num_chunks, num_heads, _ = acc.shape
    require_input(NAME, "sink", sink, (num_heads,), dtype=torch.float32, device=acc.device)
    if runtime.uses_reference(acc):
        return decode_reference.hca_fold(acc, top, total, sink)
    out, lse = hca_fold.empty_outputs(acc, top, total, sink)
    if m:
        kwargs = variant_of(num_heads, num_chunks).kwargs
        runtime.launch(make_kernel, kwargs, (acc, top, total, sink, out, lse))
    return out, lse


@cache
def variant_of(num_heads: int, num_chunks: int) -> Variant:
    """Return the variant of so many heads and chunks."""
    return Variant(f"h{num_heads}-c{num_chunks}", {"num_heads": num_heads, "num_chunks": num_chunks})


def make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Return the inputs of `hca_fold` for as many parts."""
    return hca_fold.FOLD_SPEC.make_inputs({**dims, "num_parts": dims["num_chunks"]}, device, seed)


def num_bytes(dims: Mapping[str, int], output_bytes: int) -> int:
    """Return the bytes of the sums that are read, and of so many a head that are written."""
    return dims["m"] * dims["num_heads"] * (output_bytes + dims["num_chunks"] * (HEAD_DIM + 2) * 4)


CHUNKS = WINDOW_CHUNKS + MILLION
VARIANTS = tuple(variant_of(h, CHUNKS) for h in HEADS)
SHAPES = tuple((m, h) for h in HEADS for m in (1, 2))
SPEC = KernelSpec(
    name=NAME,
    fn=hca_join,
    reference=decode_reference.hca_fold,
    make_inputs=make_inputs,
    make_kernel=make_kernel,
    variants=VARIANTS,
    select=lambda d: variant_of(d["num_heads"], d["num_chunks"]),
    contract=CONTRACT,
    cases=(
        Case("empty", {"m": 0, "num_heads": 8, "num_chunks": 3}),
        Case("one-row", {"m": 1, "num_heads": 8, "num_chunks": 3}),
        Case("three-rows", {"m": 3, "num_heads": 16, "num_chunks": 21}),
        *(
            Case(f"m{m}-h{h}", {"m": m, "num_heads": h, "num_chunks": CHUNKS}, ("gpu", "bench"))
            for m, h in SHAPES
        ),
    ),
    tolerance=decode_reference.hca_fold_tolerance,
    num_bytes=lambda d: num_bytes(d, HEAD_DIM * 2 + 4),
    source="DeepSeek-V4 report 2.3.2 and 3.3",
    small={"num_heads": 8, "num_chunks": 18},
)
