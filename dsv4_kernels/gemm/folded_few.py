"""The form of `fp8_fp4_gemm_folded` for few tokens by few weight rows: warpgroups share out k.

A tile has 32 weight rows, so that 4096 of them fill the multiprocessors. The instruction's 64 rows are two
blocks of channels of these rows, one above the other, by the rows of x of both blocks; what is wanted of the
product are the two squares on its diagonal. Each warpgroup has two blocks of channels at a time. All that
blocks share is the order in which their sums are added, so sums go to shared memory, and all threads add them
in the order of k.

All channels of a tile's weights and of its rows of x are asked for before anything else, and are multiplied
as they arrive: no stage is filled twice. Measurements: docs/gemm/fp4.md.
"""

from typing import Any

from tilelang import language as T
from tvm import tirx

from dsv4_kernels.gemm.folded_tile import BLOCK_K, BLOCK_WORDS, SCALE_K, WORD, source, widen
from dsv4_kernels.tile.own_sync import own_sync
from dsv4_kernels.tile.scale import ue8m0_to_f32
from dsv4_kernels.tile.shared import MAX_SHARED_BYTES

BLOCK_N = 32  # weight rows
WARPGROUP = 128  # threads
_INSTRUCTION_M = 64  # rows of one wgmma
_PAIR = _INSTRUCTION_M // BLOCK_N  # blocks of channels of one product
_COPY_BYTES = 16  # by one cp.async
_COPY_WORDS = 4
_TURNS = 2  # of the place of sums: those of one round are added while others store the next one's
_PADDING = 8  # sums after each row of them, so that those of eight rows lie in different banks
_SHARED_BYTES = MAX_SHARED_BYTES - 2048  # less what mbarriers and alignment take
_ROWS = T.GemmWarpPolicy.FullRow
# The copies of a loop become cp.async, and waiting for them is left to the kernel.
_ASYNC = {"parallel_async_without_async_commit_wait": True}


def serves(k: int, block_m: int, warpgroups: int) -> bool:
    """Return whether two or more whole rounds make up k channels, and all of a tile fits into shared memory.

    Of one round the compiler drops the loops, and `refinement` does not follow what is left: that kernel is
    not PROVED. On an H200 four warpgroups gave other bits by it (docs/gemm/fp4.md).
    """
    blocks, together = k // BLOCK_K, _PAIR * warpgroups
    held = BLOCK_N * k // 2 + block_m * k + block_m * blocks * 4 + (BLOCK_N + 1) * blocks * 4
    held += _TURNS * together * BLOCK_N * (_PAIR * block_m + _PADDING) * 4
    return k % (together * BLOCK_K) == 0 and blocks > together and held <= _SHARED_BYTES


def make_few(n: int, k: int, block_m: int, warpgroups: int) -> Any:
    """Return the PrimFunc for tiles of 32 weight rows by block_m tokens.

    Raises:
        ValueError: `serves` says no.
    """
    if not serves(k, block_m, warpgroups):
        tile = f"tiles of {block_m} tokens"
        raise ValueError(f"folded_few: {warpgroups} warpgroups do not serve k = {k} by {tile}")
    m = T.dynamic("m")
    blocks = k // BLOCK_K
    together = _PAIR * warpgroups  # blocks of channels of a round
    rounds = blocks // together
    height, width = _INSTRUCTION_M * warpgroups, _PAIR * block_m
    threads = WARPGROUP * warpgroups
    round_words, round_k = together * BLOCK_WORDS, together * BLOCK_K
    text = source()
    zero = tirx.FloatImm("float8_e4m3fn", 0.0)

    # A thread copies 16 bytes at a time: of words eight threads two rows of a block, which lie side by side
    # in shared memory; of x all threads whole rows.
    word_rows, x_rows = threads // (_COPY_WORDS * together), threads // (BLOCK_K // _COPY_BYTES * together)
    by_words = T.Fragment(
        (BLOCK_N * round_words,),
        lambda q: (
            q // (together * BLOCK_N) // _COPY_WORDS
            + q % 2 * 4
            + q // BLOCK_N % together * 8
            + q % word_rows // 2 * (8 * together),
            q % BLOCK_N // word_rows * _COPY_WORDS + q // (together * BLOCK_N) % _COPY_WORDS,
        ),
    )
    by_bytes = T.Fragment(
        (block_m * round_k,),
        lambda q: (
            q % round_k // _COPY_BYTES + q // round_k % x_rows * (8 * together),
            q // round_k // x_rows * _COPY_BYTES + q % _COPY_BYTES,
        ),
    )

    @T.prim_func
    def fp8_fp4_gemm_folded_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, blocks), T.uint8],
        words: T.Tensor[(n, k // WORD), T.uint32],
        offsets: T.Tensor[(n, blocks), T.int32],
        factors: T.Tensor[(n,), T.float32],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, block_m), n // BLOCK_N, threads=threads) as (bm, bn):
            T.import_source(text)
            group = T.get_thread_binding() // WARPGROUP
            x_tile = T.alloc_shared((rounds, together * block_m, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((rounds, together, BLOCK_N, BLOCK_WORDS), T.uint32)
            x_scales = T.alloc_shared((blocks, block_m), T.float32)
            row_offsets = T.alloc_shared((blocks, BLOCK_N + 1), T.int32)
            row_factors = T.alloc_shared((BLOCK_N,), T.float32)
            parts = T.alloc_shared((_TURNS, together * BLOCK_N, width + _PADDING), T.float32)
            full = T.alloc_barrier([threads] * rounds)
            offset = T.alloc_fragment((height,), T.int32)
            codes = T.alloc_fragment((height, 4, 4), T.uint32)
            w = T.alloc_fragment((height, BLOCK_K), T.float8_e4m3fn)
            part = T.alloc_fragment((height, width), T.float32)
            acc = T.alloc_fragment((BLOCK_N, block_m), T.float32)
            # One coordinate each: nested loops would be fused, and lose the line that `refinement` goes by.
            # Words of a block are its slowest digit, which `batch_invariance` then finds without a bound.
            for s in T.serial(rounds):
                for q in T.Parallel(BLOCK_N * round_words, loop_layout=by_words, annotations=_ASYNC):
                    w_tile[s, q // BLOCK_N % together, q % BLOCK_N, q // (together * BLOCK_N)] = words[
                        bn * BLOCK_N + q % BLOCK_N,
                        (s * together + q // BLOCK_N % together) * BLOCK_WORDS + q // (together * BLOCK_N),
                    ]
                for q in T.Parallel(block_m * round_k, loop_layout=by_bytes, annotations=_ASYNC):
                    x_tile[s, q % round_k // BLOCK_K * block_m + q // round_k, q % BLOCK_K] = T.if_then_else(
                        bm * block_m + q // round_k < m,
                        x[bm * block_m + q // round_k, s * round_k + q % round_k],
                        zero,
                    )
                T.cp_async_barrier_noinc(full[s])
            for kb, j in T.Parallel(blocks, block_m):
                x_scales[kb, j] = ue8m0_to_f32(T.cast(x_scale[bm * block_m + j, kb], "int32"), 0)
            for i, kb in T.Parallel(BLOCK_N, blocks):
                row_offsets[kb, i] = offsets[bn * BLOCK_N + i, kb]
            for i in T.Parallel(BLOCK_N):
                row_factors[i] = factors[bn * BLOCK_N + i]
            T.clear(acc)
            T.sync_threads()
            for ko in T.serial(rounds):
                T.mbarrier_wait_parity(full[ko], 0)
                T.fence_proxy_async()
                # Row r of a product is row r % BLOCK_N of the tile, in block r // BLOCK_N of the round.
                for r in T.Parallel(height):
                    offset[r] = row_offsets[ko * together + r // BLOCK_N, r % BLOCK_N]
                for r, t, g in T.Parallel(height, 4, 4):
                    codes[r, t, g] = w_tile[ko, r // BLOCK_N, r % BLOCK_N, t * 4 + g]
                for r, g, h, t in T.Parallel(height, 4, 2, 4):
                    T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
                        "handle",
                        "dsv4_store_b32",
                        T.address_of(w[r, g * SCALE_K + h * 16 + t * 4]),
                        widen(codes[r, t, g], (offset[r] >> (8 * g)) & 0xFF, h),
                    )
                T.gemm(
                    w,
                    x_tile[ko, group * width : group * width + width, :],
                    part,
                    transpose_B=True,
                    clear_accum=True,
                    policy=_ROWS,
                )
                for r, j in T.Parallel(height, width):
                    if r % _INSTRUCTION_M // BLOCK_N == j // block_m:
                        parts[ko % _TURNS, r, j] = part[r, j]
                T.sync_threads()
                for b in T.serial(together):
                    for i, j in T.Parallel(BLOCK_N, block_m):
                        acc[i, j] += (
                            parts[ko % _TURNS, b * BLOCK_N + i, b % _PAIR * block_m + j]
                            * x_scales[ko * together + b, j]
                        )
            for i, j in T.Parallel(BLOCK_N, block_m):
                if bm * block_m + j < m:
                    out[bm * block_m + j, bn * BLOCK_N + i] = T.cast(acc[i, j] * row_factors[i], "bfloat16")

    return own_sync(fp8_fp4_gemm_folded_kernel)
