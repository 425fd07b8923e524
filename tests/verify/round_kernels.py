"""Kernels whose rounds leave values to the next round, each in the loop that stores the output."""

from typing import Any

from tilelang import language as T

ROUNDS, WIDTH, TERMS = 6, 32, 8


def two_sets(swapped: str = "") -> Any:
    """Sums of two rows a block: of one in the round of its terms, of the other in the round after.

    Args:
        swapped: each is stored as the other's, "always" or where the "batch" is odd.
    """
    m, pairs = T.dynamic("m"), 2

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, ROUNDS * WIDTH, TERMS), T.float32], out: T.Tensor[(m, ROUNDS * WIDTH), T.float32]
    ):
        with T.Kernel(T.ceildiv(m, pairs), threads=WIDTH) as b:
            now = T.alloc_fragment((WIDTH, TERMS), T.float32)
            late = T.alloc_fragment((WIDTH, TERMS), T.float32)
            total = T.alloc_fragment((WIDTH,), T.float32)
            late_total = T.alloc_fragment((WIDTH,), T.float32)
            other: Any = m % 2 if swapped == "batch" else int(swapped == "always")  # type: ignore[operator]
            T.clear(late)
            for k in T.serial(ROUNDS + 1):
                for j, h in T.Parallel(WIDTH, TERMS):
                    now[j, h] = T.if_then_else(
                        k < ROUNDS, x[b * pairs, T.min(k, ROUNDS - 1) * WIDTH + j, h], 0.0
                    )
                T.reduce_sum(late, late_total, dim=1)
                for j in T.Parallel(WIDTH):
                    if k >= 1:
                        out[b * pairs + 1 - other, (k - 1) * WIDTH + j] = late_total[j]
                for j, h in T.Parallel(WIDTH, TERMS):
                    late[j, h] = T.if_then_else(
                        b * pairs + 1 < m, x[b * pairs + 1, T.min(k, ROUNDS - 1) * WIDTH + j, h], 0.0
                    )
                T.reduce_sum(now, total, dim=1)
                for j in T.Parallel(WIDTH):
                    if k < ROUNDS:
                        out[b * pairs + other, k * WIDTH + j] = total[j]

    return kernel


def late_sums(delay: int = 1, is_set: bool = True) -> Any:
    """Sums that are stored `delay` rounds after their terms are read.

    Args:
        is_set: else they are stored from the first round on, where there are none yet.
    """
    m, count = T.dynamic("m"), ROUNDS + delay if is_set else ROUNDS
    first = delay if is_set else 0

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, ROUNDS * WIDTH, TERMS), T.float32], out: T.Tensor[(m, ROUNDS * WIDTH), T.float32]
    ):
        with T.Kernel(m, threads=WIDTH) as row:
            read = T.alloc_fragment((WIDTH, TERMS), T.float32)
            total = T.alloc_fragment((WIDTH,), T.float32)
            waiting = T.alloc_shared((delay, WIDTH), T.float32)
            if is_set:
                T.clear(waiting)
            for k in T.serial(count):
                for j in T.Parallel(WIDTH):
                    if k >= first:
                        out[row, (k - first) * WIDTH + j] = waiting[delay - 1, j]
                for d in T.serial(delay - 1):
                    for j in T.Parallel(WIDTH):
                        waiting[delay - 1 - d, j] = waiting[delay - 2 - d, j]
                for j, h in T.Parallel(WIDTH, TERMS):
                    read[j, h] = x[row, T.min(k, ROUNDS - 1) * WIDTH + j, h]
                T.reduce_sum(read, total, dim=1)
                for j in T.Parallel(WIDTH):
                    waiting[0, j] = total[j]

    return kernel


def filled_ahead(factor: float = 2.0) -> Any:
    """Elements scaled a round before they are stored, the first before the loop and by `factor`."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, ROUNDS * WIDTH), T.float32], out: T.Tensor[(m, ROUNDS * WIDTH), T.float32]):
        with T.Kernel(m, threads=WIDTH) as row:
            read = T.alloc_fragment((WIDTH,), T.float32)
            for j in T.Parallel(WIDTH):
                read[j] = x[row, j] * factor
            for k in T.serial(ROUNDS):
                for j in T.Parallel(WIDTH):
                    out[row, k * WIDTH + j] = read[j]
                for j in T.Parallel(WIDTH):
                    read[j] = x[row, T.min(k + 1, ROUNDS - 1) * WIDTH + j] * 2.0

    return kernel


def running_sums() -> Any:
    """Sums over all rounds so far, each stored in its round."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, ROUNDS * WIDTH), T.float32], out: T.Tensor[(m, ROUNDS * WIDTH), T.float32]):
        with T.Kernel(m, threads=WIDTH) as row:
            total = T.alloc_fragment((WIDTH,), T.float32)
            for j in T.Parallel(WIDTH):
                total[j] = T.cast(j, "float32")
            for k in T.serial(ROUNDS):
                for j in T.Parallel(WIDTH):
                    total[j] = total[j] * 2.0 + x[row, k * WIDTH + j]
                for j in T.Parallel(WIDTH):
                    out[row, k * WIDTH + j] = total[j]

    return kernel


def rows_in_turn(late: bool = False) -> Any:
    """A row a round; late: with the sums of the row before, where there is one in the block."""
    m, rows = T.dynamic("m"), 4

    @T.prim_func
    def kernel(x: T.Tensor[(m, WIDTH, TERMS), T.float32], out: T.Tensor[(m, WIDTH), T.float32]):
        with T.Kernel(T.ceildiv(m, rows), threads=WIDTH) as b:
            read = T.alloc_fragment((WIDTH, TERMS), T.float32)
            total = T.alloc_fragment((WIDTH,), T.float32)
            T.clear(total)
            T.clear(read)
            for k in T.serial(rows):
                if not late:
                    for j, h in T.Parallel(WIDTH, TERMS):
                        read[j, h] = T.if_then_else(b * rows + k < m, x[b * rows + k, j, h], 0.0)
                T.reduce_sum(read, total, dim=1)
                for j in T.Parallel(WIDTH):
                    if b * rows + k < m:
                        out[b * rows + k, j] = total[j]
                if late:
                    for j, h in T.Parallel(WIDTH, TERMS):
                        read[j, h] = T.if_then_else(b * rows + k < m, x[b * rows + k, j, h], 0.0)

    return kernel
