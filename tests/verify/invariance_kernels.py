"""Kernels whose rows do, or do not, depend on the batch."""

from typing import Any

from tilelang import language as T

COLUMNS = 64


def scaled_rows(block_m: int, leak: int = 0) -> Any:
    """Each row times its scale, or that of the row `leak` below it."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, COLUMNS), T.float32],
        scale: T.Tensor[(m,), T.float32],
        out: T.Tensor[(m, COLUMNS), T.float32],
    ):
        with T.Kernel(T.ceildiv(m, block_m), threads=128) as bm:
            for i, j in T.Parallel(block_m, COLUMNS):
                out[bm * block_m + i, j] = x[bm * block_m + i, j] * scale[bm * block_m + i + leak]

    return kernel


def numbered_rows() -> Any:
    """Adds the number of the row."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, COLUMNS), T.float32], out: T.Tensor[(m, COLUMNS), T.float32]):
        with T.Kernel(T.ceildiv(m, 32), threads=128) as bm:
            for i, j in T.Parallel(32, COLUMNS):
                out[bm * 32 + i, j] = x[bm * 32 + i, j] + T.cast(bm * 32 + i, "float32")

    return kernel


def split_sums(chosen_by_batch: bool) -> Any:
    """Row sums in chunks, whose number is fixed or follows the batch."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, COLUMNS), T.float32], out: T.Tensor[(m,), T.float32]):
        with T.Kernel(T.ceildiv(m, 32), threads=32) as bm:
            total = T.alloc_fragment((32,), T.float32)
            part = T.alloc_fragment((32,), T.float32)
            splits = T.if_then_else(m <= 64, 4, 1) if chosen_by_batch else 4  # type: ignore[operator]
            T.clear(total)
            for s in T.serial(splits):
                T.clear(part)
                for k in T.serial(COLUMNS // splits):
                    for i in T.Parallel(32):
                        part[i] += x[bm * 32 + i, s * (COLUMNS // splits) + k]
                for i in T.Parallel(32):
                    total[i] += part[i]
            for i in T.Parallel(32):
                out[bm * 32 + i] = total[i]

    return kernel


def chunked_sums(chunk: int, is_reversed: bool = False) -> Any:
    """Row sums, one element after the other; how the loop is cut does not matter, its direction does."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, COLUMNS), T.float32], out: T.Tensor[(m,), T.float32]):
        with T.Kernel(T.ceildiv(m, 32), threads=32) as bm:
            total = T.alloc_fragment((32,), T.float32)
            T.clear(total)
            for c in T.serial(COLUMNS // chunk):
                for k in T.serial(chunk):
                    for i in T.Parallel(32):
                        if is_reversed:
                            total[i] += x[bm * 32 + i, COLUMNS - 1 - c * chunk - k]
                        else:
                            total[i] += x[bm * 32 + i, c * chunk + k]
            for i in T.Parallel(32):
                out[bm * 32 + i] = total[i]

    return kernel


def reduced_rows(block_m: int, threads: int) -> Any:
    """Row sums by a tile reduction, whose tree follows the layout."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, 128), T.float32], out: T.Tensor[(m,), T.float32]):
        with T.Kernel(T.ceildiv(m, block_m), threads=threads) as bm:
            frag = T.alloc_fragment((block_m, 128), T.float32)
            total = T.alloc_fragment((block_m,), T.float32)
            T.copy(x[bm * block_m, 0], frag)
            T.reduce_sum(frag, total, dim=1)
            for i in T.Parallel(block_m):
                out[bm * block_m + i] = total[i]

    return kernel


def chosen_elements(shift: int) -> Any:
    """Elements of a row that the row's own integers choose, `shift` places on for each row."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, COLUMNS), T.float32],
        choice: T.Tensor[(m, COLUMNS), T.int32],
        out: T.Tensor[(m, COLUMNS), T.float32],
    ):
        with T.Kernel(m, threads=COLUMNS) as row:
            tile = T.alloc_shared((COLUMNS,), T.float32)
            for j in T.Parallel(COLUMNS):
                tile[j] = x[row, j]
            for j in T.Parallel(COLUMNS):
                out[row, j] = tile[(choice[row, j] + row * shift) & (COLUMNS - 1)]

    return kernel


def tile_amax() -> Any:
    """One scale for the rows of a tile: each row sees its neighbours."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, COLUMNS), T.float32], out: T.Tensor[(m, COLUMNS), T.float32]):
        with T.Kernel(T.ceildiv(m, 32), threads=128) as bm:
            frag = T.alloc_fragment((32, COLUMNS), T.float32)
            row_amax = T.alloc_fragment((32,), T.float32)
            amax = T.alloc_fragment((1,), T.float32)
            T.copy(x[bm * 32, 0], frag)
            T.reduce_absmax(frag, row_amax, dim=1)
            T.reduce_max(row_amax, amax, dim=0)
            for i, j in T.Parallel(32, COLUMNS):
                out[bm * 32 + i, j] = frag[i, j] / amax[0]

    return kernel


def product(block_m: int, block_k: int) -> Any:
    """A bf16 product; the same chain of instructions for every chunk of K."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, 256), T.bfloat16],
        w: T.Tensor[(64, 256), T.bfloat16],
        out: T.Tensor[(m, 64), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, block_m), threads=128) as bm:
            x_tile = T.alloc_shared((block_m, block_k), T.bfloat16)
            w_tile = T.alloc_shared((64, block_k), T.bfloat16)
            acc = T.alloc_fragment((block_m, 64), T.float32)
            T.clear(acc)
            for ko in T.Pipelined(256 // block_k, num_stages=2):
                T.copy(x[bm * block_m, ko * block_k], x_tile)
                T.copy(w[0, ko * block_k], w_tile)
                T.gemm(x_tile, w_tile, acc, transpose_B=True)
            for i, j in T.Parallel(block_m, 64):
                out[bm * block_m + i, j] = T.cast(acc[i, j], "bfloat16")

    return kernel


def clamped_rows() -> Any:
    """Rows beyond the last read the last one, and are not stored."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, COLUMNS), T.float32], out: T.Tensor[(m, COLUMNS), T.float32]):
        with T.Kernel(T.ceildiv(m, 32), threads=128) as bm:
            for i, j in T.Parallel(32, COLUMNS):
                out[bm * 32 + i, j] = x[T.min(bm * 32 + i, m - 1), j] * 2.0  # type: ignore[operator]

    return kernel


def rotated_sums() -> Any:
    """Row sums that start at an element which the batch chooses."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, COLUMNS), T.float32], out: T.Tensor[(m,), T.float32]):
        with T.Kernel(T.ceildiv(m, 32), threads=32) as bm:
            total = T.alloc_fragment((32,), T.float32)
            T.clear(total)
            for k in T.serial(COLUMNS):
                for i in T.Parallel(32):
                    total[i] += x[bm * 32 + i, (k + m) % COLUMNS]
            for i in T.Parallel(32):
                out[bm * 32 + i] = total[i]

    return kernel


def grouped_rows(block_m: int) -> Any:
    """Each tile of rows is scaled by its expert's factors."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, COLUMNS), T.float32],
        expert: T.Tensor[(m,), T.int32],
        factors: T.Tensor[(8, COLUMNS), T.float32],
        out: T.Tensor[(m, COLUMNS), T.float32],
    ):
        with T.Kernel(T.ceildiv(m, block_m), threads=128) as bm:
            for i, j in T.Parallel(block_m, COLUMNS):
                out[bm * block_m + i, j] = x[bm * block_m + i, j] * factors[expert[bm * block_m], j]

    return kernel


def counted_sums(block_m: int, leak: int = 0) -> Any:
    """Sums of so many columns as the tile's entry says, or the entry `leak` tiles below."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, COLUMNS), T.float32],
        count: T.Tensor[(m,), T.int32],
        out: T.Tensor[(m,), T.float32],
    ):
        with T.Kernel(T.ceildiv(m, block_m), threads=32) as bm:
            total = T.alloc_fragment((block_m,), T.float32)
            T.clear(total)
            for k in T.serial(T.min(T.max(count[bm * block_m + leak * block_m], 0), COLUMNS)):  # pyright: ignore[reportOperatorIssue]
                for i in T.Parallel(block_m):
                    total[i] += x[bm * block_m + i, k]
            for i in T.Parallel(block_m):
                out[bm * block_m + i] = total[i]

    return kernel


def column_scales(is_halved: bool, swapped: int = 0) -> Any:
    """Columns times the scale of their 64, a tile at once or in two halves; swapped: each by the other's."""
    m = T.dynamic("m")
    half = 64

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, 4 * half), T.float32],
        scale: T.Tensor[(4,), T.float32],
        out: T.Tensor[(m, 4 * half), T.float32],
    ):
        with T.Kernel(T.ceildiv(m, 32), 2, threads=128) as (bm, bn):
            tile = T.alloc_shared((32, 2 * half), T.float32)
            if is_halved:
                for i, j in T.Parallel(32, half):
                    tile[i, j] = x[bm * 32 + i, bn * 2 * half + j] * scale[bn * 2 + swapped]
                for i, j in T.Parallel(32, half):
                    tile[i, half + j] = x[bm * 32 + i, bn * 2 * half + half + j] * scale[bn * 2 + 1 - swapped]
            else:
                for i, j in T.Parallel(32, 2 * half):
                    tile[i, j] = x[bm * 32 + i, bn * 2 * half + j] * scale[(bn * 2 * half + j) // half]
            for i, j in T.Parallel(32, 2 * half):
                out[bm * 32 + i, bn * 2 * half + j] = tile[i, j]

    return kernel


def column_tiles(swapped: int = 0) -> Any:
    """As column_scales: two tiles a block in turn, each stored in halves."""
    m = T.dynamic("m")
    half = 64

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, 4 * half), T.float32],
        scale: T.Tensor[(4,), T.float32],
        out: T.Tensor[(m, 4 * half), T.float32],
    ):
        with T.Kernel(T.ceildiv(m, 32), threads=128) as bm:
            tile = T.alloc_shared((32, half), T.float32)
            for t in T.serial(2):
                for i, j in T.Parallel(32, half):
                    tile[i, j] = x[bm * 32 + i, t * 2 * half + j] * scale[t * 2 + swapped]
                T.copy(tile, out[bm * 32, t * 2 * half])
                for i, j in T.Parallel(32, half):
                    tile[i, j] = x[bm * 32 + i, t * 2 * half + half + j] * scale[t * 2 + 1 - swapped]
                T.copy(tile, out[bm * 32, t * 2 * half + half])

    return kernel


def halves_in_halves(swapped: bool = False) -> Any:
    """Halves of other halves, and of the sum of all of them; swapped: each of the other's place."""
    m, half = T.dynamic("m"), COLUMNS // 2
    first, second = (half, 0) if swapped else (0, half)

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, COLUMNS), T.float32],
        y: T.Tensor[(m, COLUMNS), T.float32],
        out: T.Tensor[(m, COLUMNS), T.float32],
    ):
        with T.Kernel(m, threads=COLUMNS) as row:
            inner = T.alloc_shared((COLUMNS,), T.float32)
            values = T.alloc_fragment((COLUMNS,), T.float32)
            total = T.alloc_fragment((1,), T.float32)
            tile = T.alloc_shared((COLUMNS,), T.float32)
            for j in T.Parallel(half):
                inner[j] = x[row, j]
            for j in T.Parallel(half):
                inner[half + j] = y[row, half + j]
            for j in T.Parallel(COLUMNS):
                values[j] = inner[j]
            T.reduce_sum(values, total, dim=0)
            for j in T.Parallel(half):
                tile[j] = inner[first + j] * total[0]
            for j in T.Parallel(half):
                tile[half + j] = inner[second + j] + total[0]
            for j in T.Parallel(COLUMNS):
                out[row, j] = tile[j]

    return kernel


def pages() -> Any:
    """Rows gathered page by page: the page is a coordinate of the output."""
    page, width, count = 16, 128, 4
    m, size = T.dynamic("m"), T.dynamic("size")

    @T.prim_func
    def pages_kernel(
        cache: T.Tensor[(size, page, width), T.bfloat16],
        table: T.Tensor[(m, count), T.int32],
        out: T.Tensor[(m, count * page, width), T.bfloat16],
    ):
        with T.Kernel(m, threads=128) as b:
            tile = T.alloc_shared((page, width), T.bfloat16)
            for t in T.serial(count):
                T.copy(cache[table[b, t], 0:page, 0:width], tile)
                for i, j in T.Parallel(page, width):
                    out[b, t * page + i, j] = tile[i, j]

    return pages_kernel


def grid_stride(carries: bool) -> Any:
    """Blocks that go on to further tiles; with `carries` what a tile's sum was is added to the next."""
    grid, rows, columns = 132, 16, 256
    m = T.dynamic("m")

    @T.prim_func
    def stride_kernel(x: T.Tensor[(m, 4 * columns), T.float32], out: T.Tensor[(m, 4 * columns), T.float32]):
        with T.Kernel(grid, threads=128) as b:
            acc = T.alloc_fragment((rows, columns), T.float32)
            T.clear(acc)
            block: Any = b
            for w in T.serial(T.ceildiv(T.ceildiv(m, rows) * 4 - block, grid)):
                t = block + w * grid
                if not carries:
                    T.clear(acc)
                for i, j in T.Parallel(rows, columns):
                    acc[i, j] += x[t // 4 * rows + i, t % 4 * columns + j]
                for i, j in T.Parallel(rows, columns):
                    out[t // 4 * rows + i, t % 4 * columns + j] = acc[i, j]

    return stride_kernel


def moving_sums(turns: int, late: int = 0) -> Any:
    """Row sums that move through a buffer of so many places, from one iteration to the next."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, COLUMNS), T.float32], out: T.Tensor[(m,), T.float32]):
        with T.Kernel(T.ceildiv(m, 32), threads=32) as bm:
            moved = T.alloc_shared((turns, 32), T.float32)
            total = T.alloc_fragment((32,), T.float32)
            T.clear(moved)
            T.clear(total)
            for k in T.serial(COLUMNS):
                for i in T.Parallel(32):
                    total[i] = moved[(k + late) % turns, i] + x[bm * 32 + i, k]
                for i in T.Parallel(32):
                    moved[(k + 1) % turns, i] = total[i]
            for i in T.Parallel(32):
                out[bm * 32 + i] = total[i]

    return kernel


def digit_counts(leak: int = 0) -> Any:
    """How many of a row's positive numbers have each low digit; with `leak`, its position counts too."""
    m, bins = T.dynamic("m"), 16

    @T.prim_func
    def kernel(x: T.Tensor[(m, COLUMNS), T.int32], out: T.Tensor[(m, bins), T.int32]):
        with T.Kernel(m, threads=COLUMNS) as row:
            counts = T.alloc_shared((bins,), T.int32)
            values = T.alloc_fragment((COLUMNS,), T.int32)
            for i in T.Parallel(COLUMNS):
                values[i] = x[row, i]
            for i in T.Parallel(bins):
                counts[i] = 0
            for i in T.Parallel(COLUMNS):
                if values[i] > 0:
                    T.atomic_add(counts[(values[i] + row * leak) & (bins - 1)], 1)
            for i in T.Parallel(bins):
                out[row, i] = counts[i]

    return kernel


def two_factors(first: float, second: float, block_m: int) -> Any:
    """One half of the columns by one factor, the other by another: two statements that write the output."""
    m = T.dynamic("m")
    half = 64

    @T.prim_func
    def kernel(x: T.Tensor[(m, 2 * half), T.float32], out: T.Tensor[(m, 2 * half), T.float32]):
        with T.Kernel(T.ceildiv(m, block_m), threads=128) as bm:
            for i, j in T.Parallel(block_m, half):
                out[bm * block_m + i, j] = x[bm * block_m + i, j] * first
            for i, j in T.Parallel(block_m, half):
                out[bm * block_m + i, half + j] = x[bm * block_m + i, half + j] * second

    return kernel


def by_threads(crossed: int = 0) -> Any:
    """Two rows a block, a thread for each element; crossed: a thread takes what the other row's wrote."""
    m = T.dynamic("m")
    dim = 64

    @T.prim_func
    def kernel(x: T.Tensor[(m, dim), T.float32], out: T.Tensor[(m, dim), T.float32]):
        with T.Kernel(T.ceildiv(m, 2), threads=2 * dim) as b:
            tx = T.get_thread_binding()
            tile = T.alloc_shared((2 * dim,), T.float32)
            T.clear(tile)
            T.sync_threads()
            if b * 2 + tx // dim < m:
                tile[tx] = x[b * 2 + tx // dim, tx % dim]
            T.sync_threads()
            if b * 2 + tx // dim < m:
                out[b * 2 + tx // dim, tx % dim] = tile[(tx + dim * crossed) % (2 * dim)]

    return kernel


def by_other_threads(back: int = 0) -> Any:
    """Half of the threads fetch a row, or that `back` rows before; the others store it."""
    m = T.dynamic("m")
    dim, threads = 64, 256

    @T.prim_func
    def kernel(x: T.Tensor[(m, dim), T.float32], out: T.Tensor[(m, dim), T.float32]):
        with T.Kernel(m, threads=threads) as b:
            tx = T.get_thread_binding()
            tile = T.alloc_shared((dim,), T.float32)
            T.clear(tile)
            T.sync_threads()
            if tx < threads // 2:
                for j in T.Parallel(dim):
                    tile[j] = x[T.max(b - back, 0), j]
            T.sync_threads()
            if tx >= threads // 2:
                for j in T.Parallel(dim):
                    out[b, j] = tile[j]

    return kernel


def counted_by_each(threads: int) -> Any:
    """Every thread adds one to a count, which is so the number of threads."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, 64), T.int32], out: T.Tensor[(m, 64), T.int32]):
        with T.Kernel(m, threads=threads) as b:
            count = T.alloc_shared((1,), T.int32)
            T.clear(count)
            T.sync_threads()
            T.atomic_add(count[0], 1)
            T.sync_threads()
            for j in T.Parallel(64):
                out[b, j] = x[b, j] + count[0]

    return kernel
