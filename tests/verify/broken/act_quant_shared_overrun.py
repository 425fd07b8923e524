# REFUTED bounds: the per-row maxima get a shared buffer of half a tile
"""act_quant whose row maxima go through a shared buffer that is too short."""

from tilelang import language as T

BLOCK_M, BLOCK_K, THREADS = 64, 128, 128


def make_kernel():
    num_blocks = T.dynamic("num_blocks")

    @T.prim_func
    def act_quant_kernel(
        x: T.Tensor[(num_blocks, BLOCK_K), T.bfloat16],
        scale: T.Tensor[(num_blocks,), T.float32],
    ):
        with T.Kernel(T.ceildiv(num_blocks, BLOCK_M), threads=THREADS) as bm:
            x_frag = T.alloc_fragment((BLOCK_M, BLOCK_K), T.bfloat16)
            magnitude = T.alloc_fragment((BLOCK_M, BLOCK_K), T.float32)
            amax = T.alloc_fragment((BLOCK_M,), T.float32)
            rows = T.alloc_shared((BLOCK_M // 2,), T.float32)
            T.copy(x[bm * BLOCK_M, 0], x_frag)
            T.copy(x_frag, magnitude)
            T.reduce_max(magnitude, amax, dim=1)
            for i in T.Parallel(BLOCK_M):
                rows[i] = amax[i]  # broken here
            for i in T.Parallel(BLOCK_M // 2):
                scale[bm * BLOCK_M + i] = rows[i]

    return act_quant_kernel


KERNELS = {"act_quant": make_kernel()}
CONTRACTS = {"act_quant": ("0 <= num_blocks", "num_blocks <= 1048576")}
