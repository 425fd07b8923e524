"""Meaning of the tile ops: copy, fill, gemm, reduce, cumsum, transpose, tile-wide atomics.

Floating-point sums are computed in float64 and rounded once to the accumulator's type. The order in
which the hardware adds inside one op is not modelled, so a result can differ from the GPU's by the
rounding of that order: at most gamma(K) * sum|a_k * b_k| for K terms, gamma(K) = K*u / (1 - K*u), with
u = 2^-24 for a float32 accumulator (Hopper's FP8 wgmma keeps fewer bits: u = 2^-13 relative to the
largest term of each instruction).
"""

import math
from collections.abc import Callable
from functools import reduce as fold
from typing import TYPE_CHECKING

import torch

from verify import ir
from verify.interp import arith, atomics, dtypes, folds, memory
from verify.interp.arith import float_max, float_min
from verify.interp.lanes import FIXED_AXES, THREAD_AXIS, Affine, Value

if TYPE_CHECKING:
    from verify.interp.statements import Statements

_TF32_DROPPED_BITS = 13
_THREAD_DIM = -1 - THREAD_AXIS
_WARPGROUP = 128  # threads
_INSTRUCTION_ROWS = 64  # of a product that a warpgroup has at a time
_INT_FOLDS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "bitand": torch.bitwise_and,
    "bitor": torch.bitwise_or,
    "bitxor": torch.bitwise_xor,
}


# --------------------------------------------------------------------------- regions
def _region(node: ir.Expr) -> ir.Region:
    if not isinstance(node, ir.Region):
        raise ir.UnsupportedIR(f"tile op on {type(node).__name__}")
    return node


def _extents(m: "Statements", region: ir.Region) -> tuple[int, ...]:
    return tuple(m.integer(e, "region extent") for e in region.extents)


def _index(m: "Statements", base: ir.Expr, axis: int | None) -> Value:
    return _from(m, m.evaluate(base), axis)


def _from(m: "Statements", start: Value, axis: int | None) -> Value:
    if axis is None:
        return start
    step = Affine(0, ((axis, 1),))
    if isinstance(start, Affine):
        return start.plus(step)
    return step.shifted(int(start)) if isinstance(start, int) else start + m.lanes.tensor(step)


def _read_tile(m: "Statements", region: ir.Region, starts: tuple[Value, ...] | None = None) -> torch.Tensor:
    """Return the values of a region as (z, y, x, *extents), a block of the grid in each (z, y, x).

    `starts` are those of the region, where they have been evaluated.
    """
    extents = _extents(m, region)
    with m.tile_axes(extents):
        if starts is None:
            starts = tuple(m.evaluate(base) for base in region.mins)
        indices = tuple(_from(m, start, FIXED_AXES + d) for d, start in enumerate(starts))
        value = memory.read(m, m.place(region.buffer, indices)).broadcast_to(m.lanes.shape)
    value = value.select(-1 - THREAD_AXIS, 0)
    ndim = len(extents)
    return value.permute(*range(ndim, ndim + THREAD_AXIS), *reversed(range(ndim)))


def _write_tile(m: "Statements", region: ir.Region, value: torch.Tensor) -> None:
    """Store (z, y, x, *extents) values into a region."""
    extents = _extents(m, region)
    ndim = len(extents)
    value = value.permute(*reversed(range(THREAD_AXIS, THREAD_AXIS + ndim)), *range(THREAD_AXIS))
    with m.tile_axes(extents):
        indices = tuple(_index(m, base, FIXED_AXES + d) for d, base in enumerate(region.mins))
        memory.write(m, m.place(region.buffer, indices), value.unsqueeze(-1 - THREAD_AXIS))


def _tile_axes(extents: tuple[int, ...]) -> list[int | None]:
    """Return the lane axis of each dimension: dimensions of extent 1 have none."""
    axes: list[int | None] = []
    axis = FIXED_AXES
    for extent in extents:
        axes.append(None if extent == 1 else axis)
        axis += extent != 1
    return axes


# --------------------------------------------------------------------------- ops
def _transfer(m: "Statements", node: ir.Call, sink: Callable[[memory.Place, torch.Tensor], None]) -> None:
    """Move a region into another of the same extents, dimensions of extent 1 aside."""
    src, dst = _region(node.args[0]), _region(node.args[1])
    src_extents, dst_extents = _extents(m, src), _extents(m, dst)
    squeezed = [e for e in src_extents if e != 1]
    if squeezed != [e for e in dst_extents if e != 1]:
        raise ir.UnsupportedIR(f"{node.op} between regions of extents {src_extents} and {dst_extents}")
    with m.tile_axes(squeezed, src.buffer, dst.buffer):
        places = []
        for region, extents in ((src, src_extents), (dst, dst_extents)):
            axes = _tile_axes(extents)
            indices = tuple(_index(m, b, a) for b, a in zip(region.mins, axes, strict=True))
            places.append(m.place(region.buffer, indices))
        value = memory.read(m, places[0])
        sink(places[1], dtypes.cast(value, src.buffer.dtype.name, dst.buffer.dtype.name))


def _copy(m: "Statements", node: ir.Call) -> None:
    _transfer(m, node, lambda place, value: memory.write(m, place, value))


def _atomic_tile(op: str) -> Callable[["Statements", ir.Call], None]:
    def apply(m: "Statements", node: ir.Call) -> None:
        def sink(place: memory.Place, value: torch.Tensor) -> None:
            atomics.update(m, place, op, value, returns=False)

        if isinstance(node.args[0], ir.Region):
            _transfer(m, node, sink)
            return
        dst = _region(node.args[1])
        with m.tile_axes(_extents(m, dst)):
            indices = tuple(_index(m, base, FIXED_AXES + d) for d, base in enumerate(dst.mins))
            value = m.cast_to(node.args[0], dst.buffer.dtype.name)
            sink(m.place(dst.buffer, indices), value)

    return apply


def _fill(m: "Statements", node: ir.Call) -> None:
    dst = _region(node.args[0])
    with m.tile_axes(_extents(m, dst), dst.buffer):
        indices = tuple(_index(m, base, FIXED_AXES + d) for d, base in enumerate(dst.mins))
        value = m.cast_to(node.args[1], dst.buffer.dtype.name)
        memory.write(m, m.place(dst.buffer, indices), value)


def _transpose(m: "Statements", node: ir.Call) -> None:
    src, dst = _region(node.args[0]), _region(node.args[1])
    value = _read_tile(m, src).transpose(-1, -2)
    _write_tile(m, dst, dtypes.cast(value, src.buffer.dtype.name, dst.buffer.dtype.name))


def _im2col(m: "Statements", node: ir.Call) -> None:
    """Gather rows of a convolution.

    Args: NHWC image, tile, pixel step, channel step, kernel size, stride, dilation, padding.

    A row of the tile is one output pixel, its columns are (kernel row, kernel column, channel) in that order.
    What lies outside the image is zero, as the copy engine fills it.
    """
    image, tile = _region(node.args[0]), _region(node.args[1])
    _, height, width, channels = _extents(m, image)
    *outer, pixels, columns = _extents(m, tile)
    if image.buffer.dtype != tile.buffer.dtype or any(e != 1 for e in outer):
        raise ir.UnsupportedIR("im2col that casts, or into several tiles")
    kernel, stride, dilation, padding = (m.integer(arg, "im2col parameter") for arg in node.args[4:8])
    rows, row_width = (
        (extent + 2 * padding - (kernel - 1) * dilation - 1) // stride + 1 for extent in (height, width)
    )
    with m.tile_axes((pixels, columns)):
        pixel_axis, column_axis = FIXED_AXES, FIXED_AXES + 1
        pixel = m.lanes.tensor(m.evaluate(node.args[2])) * pixels + m.lanes.index(pixel_axis)
        column = m.lanes.tensor(m.evaluate(node.args[3])) * columns + m.lanes.index(column_axis)
        tap, channel = column // channels, column % channels
        y = stride * (pixel // row_width % rows) - padding + dilation * (tap // kernel)
        x = stride * (pixel % row_width) - padding + dilation * (tap % kernel)
        batch = pixel // (row_width * rows)
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        # Reads past the last image give zero as well: those of any global buffer do.
        place = m.place(image.buffer, (batch, y.clamp(0, height - 1), x.clamp(0, width - 1), channel))
        value = memory.read(m, place)
        value = torch.where(inside, value, torch.zeros((), dtype=value.dtype)).broadcast_to(m.lanes.shape)
        axes = (*(None for _ in outer), pixel_axis, column_axis)
        indices = tuple(_index(m, base, axis) for base, axis in zip(tile.mins, axes, strict=True))
        memory.write(m, m.place(tile.buffer, indices), value)


def _gemm(m: "Statements", node: ir.Call) -> None:
    """C (+)= op(A) @ op(B); args: A, B, C, transpose A, transpose B, M, N, K, policy, clear, ..."""
    a, b, c = (_region(arg) for arg in node.args[:3])
    left, groups = _operand(m, a, node.args[3]), _starts_by_warpgroup(m, b)
    if len(groups) == 1:
        total = left @ _operand(m, b, node.args[4])
    else:
        rows = left.split(_INSTRUCTION_ROWS, dim=-2)
        if len(rows) != len(groups) or rows[-1].shape[-2] != _INSTRUCTION_ROWS:
            raise ir.UnsupportedIR("a gemm operand by thread where warpgroups have other than 64 rows")
        parts = [r @ _operand(m, b, node.args[4], starts) for r, starts in zip(rows, groups, strict=True)]
        total = torch.cat(parts, dim=-2)
    name = c.buffer.dtype.name
    clear = m.evaluate(node.args[9])
    if isinstance(clear, torch.Tensor) or not clear:
        accumulator = _read_tile(m, c)
        old = _matrix(accumulator).to(torch.float64)
        if isinstance(clear, torch.Tensor):
            old = torch.where(_per_block(clear), 0.0, old)
        total = total + old
    if name == "int32":
        value = dtypes.wrap(total.to(torch.int64), name)
    elif name in ("float32", "float16", "float64"):
        value = dtypes.cast(total, "float64", name)
    else:
        raise ir.UnsupportedIR(f"gemm into {name}")
    _write_tile(m, c, value.reshape(*value.shape[:THREAD_AXIS], *_extents(m, c)))


def _starts_by_warpgroup(m: "Statements", region: ir.Region) -> list[tuple[Value, ...] | None]:
    """Return where an operand starts for each warpgroup; [None] where that is the same for all."""
    starts = [m.evaluate(base) for base in region.mins]
    starts = [m.lanes.tensor(start) if isinstance(start, Affine) else start for start in starts]
    if not any(_threads(start) > 1 for start in starts):
        return [None]
    groups: list[tuple[Value, ...] | None] = []
    for first in range(0, max(_threads(start) for start in starts), _WARPGROUP):
        own: list[Value] = []
        for start in starts:
            if isinstance(start, torch.Tensor) and _threads(start) > 1:
                part = start.narrow(_THREAD_DIM, first, _WARPGROUP)
                if not bool((part == part.narrow(_THREAD_DIM, 0, 1)).all()):
                    raise ir.UnsupportedIR("a gemm operand that differs within a warpgroup")
                own.append(part.narrow(_THREAD_DIM, 0, 1))
            else:
                own.append(start)
        groups.append(tuple(own))
    return groups


def _threads(value: Value) -> int:
    """Return how many threads have a value of their own."""
    return value.shape[_THREAD_DIM] if isinstance(value, torch.Tensor) and value.dim() > THREAD_AXIS else 1


def _operand(
    m: "Statements", region: ir.Region, transpose: ir.Expr, starts: tuple[Value, ...] | None = None
) -> torch.Tensor:
    name = region.buffer.dtype.name
    tile = _matrix(_read_tile(m, region, starts))
    if name == "float32":
        # The tensor core reads the upper 19 bits of a float32 operand as tf32.
        bits = dtypes.to_bits(tile, name) >> _TF32_DROPPED_BITS << _TF32_DROPPED_BITS
        tile = dtypes.from_bits(bits, name)
    elif name in dtypes.CODED:
        tile = dtypes.decode(tile, name)
    elif name not in ("float16", "bfloat16", "tfloat32", "float64", "int8", "uint8"):
        raise ir.UnsupportedIR(f"gemm of {name}")
    tile = tile.to(torch.float64)
    return tile.transpose(-1, -2) if m.integer(transpose, "transpose flag") else tile


def _matrix(tile: torch.Tensor) -> torch.Tensor:
    """Drop the leading dimensions of extent 1 of a (z, y, x, 1, ..., rows, columns) tile."""
    return tile.reshape(*tile.shape[:THREAD_AXIS], *tile.shape[-2:])


def _per_block(value: torch.Tensor) -> torch.Tensor:
    """Return a value of lane shape (1.., z, y, x) as (z, y, x, 1, 1)."""
    if math.prod(value.shape[:-THREAD_AXIS]) != 1:
        raise ir.UnsupportedIR("a gemm flag that differs between threads")
    blocks = value.reshape(value.shape[-THREAD_AXIS:])
    return blocks.unsqueeze(-1).unsqueeze(-1)


def _reduce(m: "Statements", node: ir.Call) -> None:
    """Reduce a dimension; args: source, destination, kind, dimension, clear."""
    src, dst, kind_node, dim_node, clear_node = node.args[:5]
    src, dst = _region(src), _region(dst)
    if not isinstance(kind_node, ir.Str):
        raise ir.UnsupportedIR("reduce of a computed kind")
    kind, name = kind_node.value, dst.buffer.dtype.name
    dim = THREAD_AXIS + m.integer(dim_node, "reduce dimension")
    value = dtypes.cast(_read_tile(m, src), src.buffer.dtype.name, name)
    nan_wins = bool(node.annotations.get("nan_propagate", False))
    result = reduce_values(value, kind, dim, name, nan_wins=nan_wins)
    result = result.reshape(*result.shape[:THREAD_AXIS], *_extents(m, dst))
    if not m.integer(clear_node, "clear flag"):
        stacked = torch.stack([_read_tile(m, dst), result])
        base = {"abssum": "sum", "absmax": "max"}.get(kind, kind)
        result = reduce_values(stacked, base, 0, name, nan_wins=nan_wins)
    _write_tile(m, dst, result)


def reduce_values(
    value: torch.Tensor, kind: str, dim: int, name: str, *, nan_wins: bool = False
) -> torch.Tensor:
    """Return values of type `name` reduced along `dim`, by TileLang's reduction `kind`."""
    if name in dtypes.CODED:
        raise ir.UnsupportedIR(f"reduce of {name}")
    if kind in ("abssum", "absmax"):
        value = dtypes.wrap(value.abs(), name) if ir.DType(name).is_int else value.abs()
        kind = kind.removeprefix("abs")
    if kind in _INT_FOLDS and ir.DType(name).is_int:
        return fold(_INT_FOLDS[kind], value.unbind(dim))
    if ir.DType(name).is_int:
        return _reduce_ints(value, kind, dim, name)
    if kind == "sum":
        return dtypes.cast(value.to(torch.float64).sum(dim), "float64", name)
    if kind in ("max", "min"):
        return _extreme(value, kind, dim, nan_wins)
    raise ir.UnsupportedIR(f"reduce {kind} of {name}")


def _reduce_ints(value: torch.Tensor, kind: str, dim: int, name: str) -> torch.Tensor:
    if kind == "sum":
        return dtypes.wrap(value.sum(dim), name)
    ordered = dtypes.unsigned_order(value, name)
    if kind == "max":
        return dtypes.unsigned_order(ordered.amax(dim), name)
    if kind == "min":
        return dtypes.unsigned_order(ordered.amin(dim), name)
    raise ir.UnsupportedIR(f"reduce {kind} of {name}")


def _extreme(value: torch.Tensor, kind: str, dim: int, nan_wins: bool) -> torch.Tensor:
    if nan_wins:
        return value.amax(dim) if kind == "max" else value.amin(dim)
    start = torch.full((), float("-inf") if kind == "max" else float("inf"), dtype=value.dtype)
    value = torch.where(value.isnan(), start, value)
    result = value.amax(dim) if kind == "max" else value.amin(dim)
    if bool((result == 0).any()):  # torch leaves the sign of a zero open
        combine = float_max if kind == "max" else float_min
        result = torch.where(result == 0, fold(combine, value.unbind(dim)), result)
    return result


def _cumsum(m: "Statements", node: ir.Call) -> None:
    """Inclusive prefix sum; args: source, destination, dimension, reverse."""
    src, dst = _region(node.args[0]), _region(node.args[1])
    name = dst.buffer.dtype.name
    dim = THREAD_AXIS + m.integer(node.args[2], "cumsum dimension")
    value = dtypes.cast(_read_tile(m, src), src.buffer.dtype.name, name)
    reverse = bool(m.integer(node.args[3], "reverse flag"))
    value = value.flip(dim) if reverse else value
    if ir.DType(name).is_int:
        total = dtypes.wrap(value.cumsum(dim), name)
    elif name in dtypes.CODED:
        raise ir.UnsupportedIR(f"cumsum of {name}")
    else:
        total = dtypes.cast(value.to(torch.float64).cumsum(dim), "float64", name)
    total = total.flip(dim) if reverse else total
    _write_tile(m, dst, total.reshape(*total.shape[:THREAD_AXIS], *_extents(m, dst)))


def _cummax(m: "Statements", node: ir.Call) -> None:
    """Inclusive running maximum; args: source, destination, dimension, reverse."""
    src, dst = _region(node.args[0]), _region(node.args[1])
    kind = dst.buffer.dtype
    if kind.name in dtypes.CODED:
        raise ir.UnsupportedIR(f"cummax of {kind}")
    dim = THREAD_AXIS + m.integer(node.args[2], "cummax dimension")
    slices = list(dtypes.cast(_read_tile(m, src), src.buffer.dtype.name, kind.name).unbind(dim))
    if m.integer(node.args[3], "reverse flag"):
        slices.reverse()
    for place in range(1, len(slices)):
        larger = arith.binary("max", kind, slices[place - 1], slices[place], m.lanes, None)
        slices[place] = m.lanes.tensor(larger)
    if m.integer(node.args[3], "reverse flag"):
        slices.reverse()
    result = torch.stack(slices, dim)
    _write_tile(m, dst, result.reshape(*result.shape[:THREAD_AXIS], *_extents(m, dst)))


def _reducer_init(m: "Statements", node: ir.Call) -> None:
    """Open a reducer; args: reducer, optional value that the result starts from."""
    dst = _region(node.args[0])
    kind = dst.buffer.dtype
    op = folds.REDUCER_OPS[m.reducers[dst.buffer.data]]
    with m.tile_axes(_extents(m, dst), dst.buffer):
        indices = tuple(_index(m, base, FIXED_AXES + d) for d, base in enumerate(dst.mins))
        if len(node.args) > 1:
            value = m.cast_to(node.args[1], kind.name)
        else:
            value = m.lanes.tensor(dtypes.constant(folds.identity(op, kind), kind))
        memory.write(m, m.place(dst.buffer, indices), value)


OPS: dict[str, Callable[["Statements", ir.Call], None]] = {
    "reducer_init": _reducer_init,
    "finalize_reducer_v2": _copy,
    "copy": _copy,
    "async_copy": _copy,
    "tma_copy": _copy,
    "fill": _fill,
    "transpose": _transpose,
    "im2col": _im2col,
    "gemm": _gemm,
    "wgmma_gemm": _gemm,
    "reduce": _reduce,
    "cumsum": _cumsum,
    "cummax": _cummax,
    "atomicadd": _atomic_tile("add"),
    "atomicmax": _atomic_tile("max"),
    "atomicmin": _atomic_tile("min"),
}
