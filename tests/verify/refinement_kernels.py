"""Kernels that the refinement tests prove and then break."""

from tilelang import language as T

FP8_MAX = 448.0


def fp8_fp4_gemm(registers: bool):
    """FP8 x FP4 with a scale per 32 of k; weights through registers, or through shared memory."""
    n, k, block_m, block_n, block_k, group, num_stages = 512, 512, 16, 64, 128, 32, 3
    m = T.dynamic("m")

    @T.prim_func
    def in_registers(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        w: T.Tensor[(n, k), T.float4_e2m1fn],
        ws: T.Tensor[(n, k // group), T.float8_e8m0fnu],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(n // block_n, T.ceildiv(m, block_m), threads=128) as (bn, bm):
            x_tile = T.alloc_shared((block_m, block_k), T.float8_e4m3fn)
            w_tile = T.alloc_shared((block_n, block_k), T.float4_e2m1fn)
            w_packed = T.alloc_fragment((block_n, group), T.float4_e2m1fn)
            w_wide = T.alloc_fragment((block_n, group), T.float8_e4m3fn)
            part = T.alloc_fragment((block_n, block_m), T.float32)
            acc = T.alloc_fragment((block_n, block_m), T.float32)
            T.clear(acc)
            for ko in T.Pipelined(k // block_k, num_stages=num_stages):
                T.copy(x[bm * block_m, ko * block_k], x_tile)
                T.copy(w[bn * block_n, ko * block_k], w_tile)
                for kk in T.unroll(block_k // group):
                    T.copy(w_tile[:, kk * group : (kk + 1) * group], w_packed)
                    T.copy(w_packed, w_wide)
                    T.gemm(
                        w_wide,
                        x_tile[:, kk * group : (kk + 1) * group],
                        part,
                        transpose_B=True,
                        clear_accum=True,
                    )
                    for i, j in T.Parallel(block_n, block_m):
                        scale = T.cast(ws[bn * block_n + i, ko * (block_k // group) + kk], "float32")
                        acc[i, j] += part[i, j] * scale
            for i, j in T.Parallel(block_n, block_m):
                out[bm * block_m + j, bn * block_n + i] = acc[i, j]

    @T.prim_func
    def in_shared(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        w: T.Tensor[(n, k), T.float4_e2m1fn],
        ws: T.Tensor[(n, group), T.float32],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(n // block_n, T.ceildiv(m, block_m), threads=128) as (bn, bm):
            x_tile = T.alloc_shared((block_m, block_k), T.float8_e4m3fn)
            w_tile = T.alloc_shared((block_n, block_k), T.float4_e2m1fn)
            w_wide = T.alloc_shared((block_n, block_k), T.float8_e4m3fn)
            scales = T.alloc_shared((block_n, group), T.float32)
            acc = T.alloc_fragment((block_n, block_m), T.float32)
            T.copy(ws[bn * block_n, 0], scales)
            T.clear(acc)
            for ko in T.Pipelined(k // block_k, num_stages=num_stages):
                T.copy(x[bm * block_m, ko * block_k], x_tile)
                T.copy(w[bn * block_n, ko * block_k], w_tile)
                T.copy(w_tile, w_wide)
                T.gemm(w_wide, x_tile, acc, transpose_B=True)
            for i, j in T.Parallel(block_n, block_m):
                out[bm * block_m + j, bn * block_n + i] = acc[i, j] * scales[i, 0]

    return in_registers if registers else in_shared


def bf16_gemm(transpose_b: bool, threads: int, block_m: int, block_n: int):
    """A pipelined product; `b` is (n, k) if transposed."""
    n, k, block_k = 512, 512, 64
    m = T.dynamic("m")
    b_shape = (n, k) if transpose_b else (k, n)
    b_tile_shape = (block_n, block_k) if transpose_b else (block_k, block_n)

    @T.prim_func
    def kernel(
        a: T.Tensor[(m, k), T.bfloat16],
        b: T.Tensor[b_shape, T.bfloat16],
        c: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(n // block_n, T.ceildiv(m, block_m), threads=threads) as (bn, bm):
            a_tile = T.alloc_shared((block_m, block_k), T.bfloat16)
            b_tile = T.alloc_shared(b_tile_shape, T.bfloat16)
            acc = T.alloc_fragment((block_m, block_n), T.float32)
            T.clear(acc)
            for ko in T.Pipelined(k // block_k, num_stages=2):
                T.copy(a[bm * block_m, ko * block_k], a_tile)
                if transpose_b:
                    T.copy(b[bn * block_n, ko * block_k], b_tile)
                else:
                    T.copy(b[ko * block_k, bn * block_n], b_tile)
                T.gemm(a_tile, b_tile, acc, transpose_B=transpose_b)
            T.copy(acc, c[bm * block_m, bn * block_n])

    return kernel


def act_quant():
    """Row blocks to FP8 with a power-of-two scale: copy, reduction, guarded stores."""
    block_m, block_k = 32, 128
    rows = T.dynamic("rows")

    @T.prim_func
    def kernel(
        x: T.Tensor[(rows, block_k), T.bfloat16],
        out: T.Tensor[(rows, block_k), T.float8_e4m3fn],
        scale: T.Tensor[(rows,), T.uint8],
    ):
        with T.Kernel(T.ceildiv(rows, block_m), threads=128) as b:
            x_frag = T.alloc_fragment((block_m, block_k), T.bfloat16)
            magnitude = T.alloc_fragment((block_m, block_k), T.int32)
            amax = T.alloc_fragment((block_m,), T.int32)
            exponent = T.alloc_fragment((block_m,), T.int32)
            codes = T.alloc_fragment((block_m, block_k), T.float8_e4m3fn)
            T.copy(x[b * block_m, 0], x_frag)
            for i, j in T.Parallel(block_m, block_k):
                magnitude[i, j] = T.cast(T.reinterpret(x_frag[i, j], "uint16"), "int32") & 0x7FFF
            T.reduce_max(magnitude, amax, dim=1)
            for i in T.Parallel(block_m):
                exponent[i] = T.min((amax[i] >> 7) + 1, 254)
            for i in T.Parallel(block_m):
                scale[b * block_m + i] = T.cast(exponent[i], "uint8")
            for i, j in T.Parallel(block_m, block_k):
                inverse = T.reinterpret((254 - exponent[i]) << 23, "float32")
                value = T.clamp(T.cast(x_frag[i, j], "float32") * inverse, -FP8_MAX, FP8_MAX)
                codes[i, j] = T.cast(value, "float8_e4m3fn")
            T.copy(codes, out[b * block_m, 0])

    return kernel


def row_sum():
    """A sum over rows, added to what was there: AllReduce and a merge."""
    block_m, n = 16, 256
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, n), T.bfloat16], out: T.Tensor[(m,), T.float32]):
        with T.Kernel(T.ceildiv(m, block_m), threads=128) as b:
            x_frag = T.alloc_fragment((block_m, n), T.float32)
            total = T.alloc_fragment((block_m,), T.float32)
            T.copy(x[b * block_m, 0], x_frag)
            T.clear(total)
            T.reduce_sum(x_frag, total, dim=1, clear=False)
            T.copy(total, out[b * block_m])

    return kernel


def fp4_dequant():
    """Packed FP4 and a scale per row to BF16."""
    block_m, block_k = 128, 32
    rows = T.dynamic("rows")

    @T.prim_func
    def kernel(
        x: T.Tensor[(rows, block_k), T.float4_e2m1fn],
        scale: T.Tensor[(rows,), T.float8_e8m0fnu],
        out: T.Tensor[(rows, block_k), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(rows, block_m), threads=128) as b:
            x_frag = T.alloc_fragment((block_m, block_k), T.float4_e2m1fn)
            out_frag = T.alloc_fragment((block_m, block_k), T.bfloat16)
            T.copy(x[b * block_m, 0], x_frag)
            for i, j in T.Parallel(block_m, block_k):
                value = T.cast(x_frag[i, j], "float32") * T.cast(scale[b * block_m + i], "float32")
                out_frag[i, j] = T.cast(value, "bfloat16")
            T.copy(out_frag, out[b * block_m, 0])

    return kernel


def packed_view():
    """Whole rows fetched as consecutive bytes, read as packed FP4 through a view of the registers."""
    n, k, block_n = 256, 256, 64

    @T.prim_func
    def kernel(w: T.Tensor[(n, k // 2), T.uint8], out: T.Tensor[(n, k), T.float8_e4m3fn]):
        with T.Kernel(n // block_n, threads=128) as b:
            w_tile = T.alloc_shared((block_n, k // 2), T.uint8)
            packed = T.alloc_fragment((block_n, k // 2), T.uint8)
            codes = T.alloc_fragment((block_n, k), T.float8_e4m3fn)
            T.copy(w[b * block_n, 0], w_tile)
            T.copy(w_tile, packed)
            T.copy(T.view(packed, (block_n, k), T.float4_e2m1fn), codes)
            T.copy(codes, out[b * block_n, 0])

    return kernel


def row_stream():
    """Rows through a pipelined shared buffer, fetched as consecutive bytes."""
    n, steps = 128, 8

    @T.prim_func
    def kernel(x: T.Tensor[(steps, n), T.float32], out: T.Tensor[(steps, n), T.float32]):
        with T.Kernel(1, threads=128):
            row = T.alloc_shared((n,), T.float32)
            for k in T.Pipelined(steps, num_stages=2):
                T.copy(x[k, :], row)
                for i in T.Parallel(n):
                    out[k, i] = row[i]

    return kernel


def two_products():
    """Two products of one tile into one accumulator, under way together."""
    m, n, k, block_m, block_n, block_k = 128, 32, 256, 64, 32, 64

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, k), T.bfloat16],
        w: T.Tensor[(2, n, k), T.bfloat16],
        out: T.Tensor[(m, n), T.float32],
    ):
        with T.Kernel(m // block_m, threads=128) as bm:
            x_tile = T.alloc_shared((block_m, block_k), T.bfloat16)
            w_tile = T.alloc_shared((2, block_n, block_k), T.bfloat16)
            acc = T.alloc_fragment((block_m, block_n), T.float32)
            T.clear(acc)
            for ko in T.Pipelined(k // block_k, num_stages=2):
                T.copy(x[bm * block_m, ko * block_k], x_tile)
                T.copy(w[0:2, 0:block_n, ko * block_k : (ko + 1) * block_k], w_tile)
                T.wgmma_gemm(x_tile, w_tile[0, :, :], acc, transpose_B=True)
                T.gemm(x_tile, w_tile[1, :, :], acc, transpose_B=True)
            for i, j in T.Parallel(block_m, block_n):
                out[bm * block_m + i, j] = acc[i, j]

    return kernel


def manual_ring():
    """Stages that a producer fills by TMA and hands over by barriers of the author's own."""
    steps, stages, rows, columns, consumers, producers = 8, 2, 16, 64, 128, 128
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, steps, rows, 2 * columns), T.bfloat16],
        out: T.Tensor[(m, steps, rows, columns), T.bfloat16],
    ):
        with T.Kernel(m, threads=consumers + producers) as b:
            ring = T.alloc_shared((stages, rows, columns), T.bfloat16)
            full = T.alloc_barrier([producers] * stages)
            empty = T.alloc_barrier([consumers] * stages)
            tx = T.get_thread_binding()
            if tx >= consumers:
                for k in T.serial(steps):
                    T.mbarrier_wait_parity(empty[k % stages], (k // stages % 2) ^ 1)
                    T.tma_copy(x[b, k, 0:rows, 0:columns], ring[k % stages, :, :], barrier=full[k % stages])
                    T.mbarrier_arrive(full[k % stages])
            else:
                for k in T.serial(steps):
                    T.mbarrier_wait_parity(full[k % stages], k // stages % 2)
                    for i in T.serial(rows * columns // consumers):
                        out[b, k, i * 2 + tx // columns, tx % columns] = ring[
                            k % stages, i * 2 + tx // columns, tx % columns
                        ]
                    T.mbarrier_arrive(empty[k % stages])

    return kernel


def turns():
    """Two warpgroups in turn: a barrier in a pipelined loop; the output takes the pipeline's bytes."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, 256), T.bfloat16],
        w: T.Tensor[(128, 256), T.bfloat16],
        out: T.Tensor[(m, 128), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, 64), threads=256) as bm:
            x_tile = T.alloc_shared((64, 64), T.bfloat16)
            w_tile = T.alloc_shared((128, 64), T.bfloat16)
            out_tile = T.alloc_shared((64, 128), T.bfloat16)
            acc = T.alloc_fragment((64, 128), T.float32)
            turn = T.alloc_barrier([128])
            thread = T.get_thread_binding()
            T.clear(acc)
            for ko in T.Pipelined(4, num_stages=2):
                T.copy(x[bm * 64, ko * 64], x_tile)
                T.copy(w[0, ko * 64], w_tile)
                if thread >= 128:
                    T.mbarrier_wait_parity(turn, ko & 1)
                else:
                    T.mbarrier_arrive(turn)
                T.gemm(x_tile, w_tile, acc, transpose_B=True, policy=T.GemmWarpPolicy.FullCol)
            for i, j in T.Parallel(64, 128):
                out_tile[i, j] = T.cast(acc[i, j], "bfloat16")
            T.copy(out_tile, out[bm * 64, 0], disable_tma=True)

    return kernel


def local_sum():
    """A sum in an array of each thread's own, read by its own index; a scalar of the thread's own as well."""
    steps, threads = 4, 128
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, steps * threads), T.float32],
        shift: T.Tensor[(m, threads), T.int32],
        out: T.Tensor[(m, threads), T.float32],
    ):
        with T.Kernel(m, threads=threads) as b:
            tx = T.get_thread_binding()
            acc = T.alloc_local((2,), T.float32)
            step = T.alloc_var(T.int32)
            step = T.min(T.max(shift[b, tx], 0), 3)
            acc[0] = 0
            acc[1] = 1
            for i in T.serial(steps):
                acc[0] += x[b, i * threads + tx]
            if step < 2:
                acc[1] = x[b, step * threads + tx]
            out[b, tx] = acc[0] * acc[1]

    return kernel


def private_row():
    """A tile whose row is in a variable of the threads' own."""
    rows, columns = 16, 64
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, rows, columns), T.float32],
        which: T.Tensor[(m,), T.int32],
        out: T.Tensor[(m, rows, columns), T.float32],
    ):
        with T.Kernel(m, threads=128) as b:
            row = T.alloc_var(T.int32)
            row = T.min(T.max(which[b], 0), 65535)
            for i, j in T.Parallel(rows, columns):
                out[b, i, j] = x[row, i, j]

    return kernel


def tma_store():
    """Tiles that leave through shared memory by TMA, the last one over the tensor's edge."""
    rows, columns, n = 64, 64, 256
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, n), T.bfloat16], out: T.Tensor[(m, n), T.bfloat16]):
        with T.Kernel(T.ceildiv(m, rows), n // columns, threads=128) as (b, c):
            tile = T.alloc_shared((rows, columns), T.bfloat16)
            T.copy(x[b * rows, c * columns], tile)
            T.copy(tile, out[b * rows, c * columns])

    return kernel


def product_by_tma_store():
    """A product of two warpgroups behind a producer; it and its negative leave by TMA stores."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, 128), T.bfloat16],
        w: T.Tensor[(64, 128), T.bfloat16],
        out: T.Tensor[(m, 128), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, 128), threads=256) as bm:
            T.annotate_producer_reg_dealloc(24)
            T.annotate_consumer_reg_alloc(240)
            x_tile = T.alloc_shared((128, 64), T.bfloat16)
            w_tile = T.alloc_shared((64, 64), T.bfloat16)
            out_tile = T.alloc_shared((128, 64), T.bfloat16)
            acc = T.alloc_fragment((128, 64), T.float32)
            T.clear(acc)
            for ko in T.Pipelined(2, num_stages=2):
                T.copy(x[bm * 128, ko * 64], x_tile)
                T.copy(w[0, ko * 64], w_tile)
                T.gemm(x_tile, w_tile, acc, transpose_B=True)
            for i, j in T.Parallel(128, 64):
                out_tile[i, j] = T.cast(acc[i, j], "bfloat16")
            T.tma_copy(out_tile, out[bm * 128, 0])
            T.tma_store_wait(0)
            for i, j in T.Parallel(128, 64):
                out_tile[i, j] = T.cast(-acc[i, j], "bfloat16")
            T.tma_copy(out_tile, out[bm * 128, 64])

    return kernel


def async_ring():
    """cp.async with the author's own waits."""
    steps, width = 4, 512
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, steps, width), T.float32], out: T.Tensor[(m, steps, width), T.float32]):
        with T.Kernel(m, threads=128) as b:
            ring = T.alloc_shared((steps, width), T.float32)
            for k in T.unroll(steps):
                T.async_copy(x[b, k, :], ring[k, :])
            T.ptx_wait_group(0)
            T.sync_threads()
            for k in T.unroll(steps):
                for j in T.Parallel(width):
                    out[b, k, j] = ring[k, j]

    return kernel


def histogram():
    """Atomic updates: one of a place per element, and one of a single place per thread of some."""
    bins, threads = 16, 128
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, threads), T.int32],
        counts: T.Tensor[(bins,), T.int32],
        total: T.Tensor[(1,), T.int32],
    ):
        with T.Kernel(m, threads=threads) as b:
            tx = T.get_thread_binding()
            for i in T.Parallel(threads):
                T.atomic_add(counts[i % bins], x[b, i])
            if tx < 5:
                T.atomic_add(total[0], 1)

    return kernel


def digits():
    """Counts in shared memory, at places that values in registers decide, of some of them."""
    bins, size = 16, 256
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, size), T.int32], out: T.Tensor[(m, bins), T.int32]):
        with T.Kernel(m, threads=128) as b:
            counts = T.alloc_shared((bins,), T.int32)
            values = T.alloc_fragment((size,), T.int32)
            for i in T.Parallel(size):
                values[i] = x[b, i]
            for i in T.Parallel(bins):
                counts[i] = 0
            for i in T.Parallel(size):
                if values[i] > 0:
                    T.atomic_add(counts[values[i] >> 3 & (bins - 1)], 1)
            for i in T.Parallel(bins):
                out[b, i] = counts[i]

    return kernel


def gathered():
    """Rows by an index tensor, -1 for none; which row of the indices, by one staged in shared memory."""
    count, width = 64, 128
    m, s = T.dynamic("m"), T.dynamic("s")

    @T.prim_func
    def kernel(
        kv: T.Tensor[(s, width), T.bfloat16],
        idx: T.Tensor[(m, count), T.int32],
        out: T.Tensor[(m, count, width), T.bfloat16],
    ):
        with T.Kernel(m, threads=128) as b:
            rows = T.alloc_shared((count,), T.int32)
            for i in T.Parallel(count):
                rows[i] = idx[b, i]
            for i, j in T.Parallel(count, width):
                out[b, i, j] = T.if_then_else(rows[i] >= 0, kv[rows[i], j], T.cast(0, "bfloat16"))

    return kernel


def products_in_flight():
    """Two products under way together, each waited for where it is read."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, 256), T.bfloat16],
        w: T.Tensor[(128, 256), T.bfloat16],
        out: T.Tensor[(m, 128), T.float32],
    ):
        with T.Kernel(T.ceildiv(m, 64), threads=128) as bm:
            x_tile = T.alloc_shared((64, 64), T.bfloat16)
            w_tile = T.alloc_shared((128, 64), T.bfloat16)
            part0 = T.alloc_fragment((64, 64), T.float32)
            part1 = T.alloc_fragment((64, 64), T.float32)
            acc0 = T.alloc_fragment((64, 64), T.float32)
            acc1 = T.alloc_fragment((64, 64), T.float32)
            T.clear(acc0)
            T.clear(acc1)
            for ko in T.Pipelined(4, num_stages=2):
                T.copy(x[bm * 64, ko * 64], x_tile)
                T.copy(w[0, ko * 64], w_tile)
                T.wgmma_gemm(x_tile, w_tile[0:64, :], part0, transpose_B=True, clear_accum=True)
                T.wgmma_gemm(x_tile, w_tile[64:128, :], part1, transpose_B=True, clear_accum=True)
                T.wait_wgmma(1)
                for i, j in T.Parallel(64, 64):
                    acc0[i, j] += part0[i, j]
                T.wait_wgmma(0)
                for i, j in T.Parallel(64, 64):
                    acc1[i, j] += part1[i, j]
            for i, j in T.Parallel(64, 64):
                out[bm * 64 + i, j] = acc0[i, j]
            for i, j in T.Parallel(64, 64):
                out[bm * 64 + i, 64 + j] = acc1[i, j]

    return kernel


def halves_of_k(swapped: bool = False, together: int = 128):
    """A product that two warpgroups share out by K: the other operand starts where the warpgroup says."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, 2, 64, 64), T.bfloat16],
        w: T.Tensor[(64, 128), T.bfloat16],
        out: T.Tensor[(m, 2, 64, 64), T.float32],
    ):
        with T.Kernel(m, threads=256) as b:
            group = T.get_thread_binding() // together
            half = 1 - group if swapped else group
            w_tile = T.alloc_shared((64, 128), T.bfloat16)
            x_part = T.alloc_fragment((128, 64), T.bfloat16)
            part = T.alloc_fragment((128, 64), T.float32)
            T.copy(w, w_tile)
            for g, i, j in T.Parallel(2, 64, 64):
                x_part[g * 64 + i, j] = x[b, g, i, j]
            T.gemm(
                x_part,
                w_tile[:, half * 64 : half * 64 + 64],
                part,
                transpose_B=True,
                clear_accum=True,
                policy=T.GemmWarpPolicy.FullRow,
            )
            for g, i, j in T.Parallel(2, 64, 64):
                out[b, g, i, j] = part[g * 64 + i, j]

    return kernel


def sum_of_padded_rows():
    """Sums of five rows by steps of nine: one round of steps, with a fill value past the end."""
    m, rows, step, dim, threads = T.dynamic("m"), 5, 9, 512, 128

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, rows, dim), T.float32],
        out: T.Tensor[(m, dim), T.float32],
    ):
        with T.Kernel(m, threads=threads) as b:
            part = T.alloc_fragment((step, dim), T.float32)
            acc = T.alloc_fragment((dim,), T.float32)
            T.annotate_layout({
                acc: T.Fragment((dim,), lambda d: (d // 4, d % 4)),
                part: T.Fragment((step, dim), lambda i, d: (d // 4, i * 4 + d % 4)),
            })  # fmt: skip
            T.clear(acc)
            for s in T.serial(T.ceildiv(rows, step)):
                for i, d in T.Parallel(step, dim):
                    part[i, d] = T.if_then_else(s * step + i < rows, x[b, s * step + i, d], -1.0)
                for p in T.unroll(step):
                    for d in T.Parallel(dim):
                        acc[d] = acc[d] + part[p, d]
            for d in T.Parallel(dim):
                out[b, d] = acc[d]

    return kernel


def rows_behind():
    """Thread t writes in the last t blocks: thread 0 never does."""
    n = T.dynamic("n")

    @T.prim_func
    def rows_behind_kernel(x: T.Tensor[(n, 128), T.int32], out: T.Tensor[(n, 128), T.int32]):
        with T.Kernel(n, threads=128) as bx:
            tx = T.get_thread_binding(0)
            if bx + tx >= n:
                out[bx, tx] = T.max(x[bx, tx], 5)

    return rows_behind_kernel
