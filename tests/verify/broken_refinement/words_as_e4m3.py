"""Words in a uint32 fragment, shown to gemm as e4m3: the operand's offset counts in words.

From the second slice of k on, wgmma reads registers past the array.

REFUTED: A register: element 64
"""

from tilelang import language as T


def make():
    n, k, block_m, block_n, block_k = 256, 512, 16, 64, 128
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        w: T.Tensor[(n, k // 4), T.uint32],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(n // block_n, T.ceildiv(m, block_m), threads=128) as (bn, bm):
            x_tile = T.alloc_shared((block_m, block_k), T.float8_e4m3fn)
            w_tile = T.alloc_shared((block_n, block_k // 4), T.uint32)
            words = T.alloc_fragment((block_n, block_k // 4), T.uint32)
            codes = T.view(words, (block_n, block_k), T.float8_e4m3fn)
            acc = T.alloc_fragment((block_n, block_m), T.float32)
            T.clear(acc)
            for ko in T.Pipelined(k // block_k, num_stages=2):
                T.copy(x[bm * block_m, ko * block_k], x_tile)
                T.copy(w[bn * block_n, ko * (block_k // 4)], w_tile)
                for i, j in T.Parallel(block_n, block_k // 4):
                    words[i, j] = w_tile[i, j] ^ T.cast(0x80808080, "uint32")
                T.gemm(codes, x_tile, acc, transpose_B=True)
            for i, j in T.Parallel(block_n, block_m):
                out[bm * block_m + j, bn * block_n + i] = acc[i, j]

    return kernel
