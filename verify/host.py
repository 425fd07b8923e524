"""What the host side of a compiled kernel passes to the device function.

The host function takes the call's arguments apart, makes the TMA descriptors and launches. From it
come: which tensor each device pointer is, which dims each integer parameter is, each descriptor's
fields, and the launch extents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from verify import ir
from verify.ir import UnsupportedIR

_TENSORMAP = "__tvm_tensormap_create_tiled"
_ARRAY_DATA, _ARRAY_SHAPE = 1, 2  # tvm_struct_get fields of a tensor
_ANY_POINTER = 15  # tvm_struct_get field: the handle of one call argument


@dataclass(frozen=True)
class Descriptor:
    """A TMA descriptor as the host creates it.

    Attributes:
        dtype: CUtensorMapDataType.
        tensor: the tile IR's buffer that it describes.
        dims, strides: of the global tensor, innermost first; strides in bytes, `strides[0]` included.
        box, element_strides: per dimension, innermost first.
        interleave, swizzle, l2_promotion, oob_fill: the enumeration values of the driver API.
    """

    name: str
    dtype: int
    tensor: ir.Buffer
    dims: tuple[ir.Expr, ...]
    strides: tuple[ir.Expr, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    interleave: int
    swizzle: int
    l2_promotion: int
    oob_fill: int


@dataclass(frozen=True)
class Host:
    """Facts about the launch.

    Attributes:
        tensors: device pointer parameter -> the tile IR's buffer.
        descriptors: device descriptor parameter -> descriptor.
        dims: device integer parameter -> the tile IR's shape parameter that it is.
        extents: launch extents by tag, and the bytes of dynamic shared memory as `dynamic_shared`.
        asserts: conditions that the host checks before it launches.
    """

    tensors: dict[ir.Var, ir.Buffer]
    descriptors: dict[ir.Var, Descriptor]
    dims: dict[ir.Var, ir.Var]
    extents: dict[str, ir.Expr]
    asserts: tuple[ir.Expr, ...]


def read_host(host: ir.Function, device: ir.Function, tile: ir.Function) -> Host:
    """Return the launch facts of a kernel.

    Raises:
        UnsupportedIR: the host function does something that is not understood.
    """
    binds = {n.var: n.value for n in ir.walk(host.body) if isinstance(n, ir.Bind)}
    shapes = {n.buffer: n.buffer.data for n in ir.walk(host.body) if isinstance(n, ir.Decl)}
    calls = [n for n in ir.walk(host.body) if isinstance(n, ir.Call) and n.op == "tvm_call_packed"]
    kernel = device.attrs.get("global_symbol", device.name)
    launches = [c for c in calls if _callee(c) == kernel]
    if len(launches) != 1:
        raise UnsupportedIR(f"host: {len(launches)} launches of {kernel}")
    tensormaps = {c.args[1]: c for c in calls if _callee(c) == _TENSORMAP}
    reader = _Reader(binds, shapes, tile)
    tensors, descriptors, dims = {}, {}, {}
    arguments = launches[0].args[1:]
    for param, value in zip(device.params, arguments, strict=False):
        if value in tensormaps:
            descriptors[param] = reader.descriptor(param.name, tensormaps[value])
        elif param.dtype.is_int:
            dims[param] = reader.dim(value)
            if dims[param].name != param.name:  # shape parameters are known by name in every stage
                raise UnsupportedIR(f"host: passes {dims[param].name} as {param.name}")
        else:
            tensors[param] = reader.tensor(value)
    return Host(
        tensors,
        descriptors,
        dims,
        _extents(arguments[len(device.params) :], device),
        tuple(n.cond for n in ir.walk(host.body) if isinstance(n, ir.Assert)),
    )


def _callee(call: ir.Call) -> str:
    return call.args[0].value if call.args and isinstance(call.args[0], ir.Str) else ""


@dataclass(frozen=True)
class _Reader:
    binds: dict[ir.Var, ir.Expr]
    shapes: dict[ir.Buffer, ir.Var]
    tile: ir.Function

    def dim(self, value: ir.Expr) -> ir.Var:
        """Return the shape parameter that `value` holds: `int32(shape of argument i [j])`."""
        found = self.binds.get(value) if isinstance(value, ir.Var) else None
        match found:
            case ir.Cast(a=ir.Load(buffer=buffer, indices=(ir.Const(value=axis),))) if buffer in self.shapes:
                position = self.argument(self.shapes[buffer], _ARRAY_SHAPE)
                extent = self.tile.buffers[self.tile.params[position]].shape[int(axis)]
                if isinstance(extent, ir.Var):
                    return extent
        raise UnsupportedIR("host: integer argument that is no shape of a tensor")

    def tensor(self, value: ir.Expr) -> ir.Buffer:
        position = self.argument(value, _ARRAY_DATA)
        return self.tile.buffers[self.tile.params[position]]

    def argument(self, value: ir.Expr, field: int) -> int:
        """Return which call argument `value` is `field` of."""
        value = self.binds.get(value, value) if isinstance(value, ir.Var) else value
        match value:
            case ir.Call(op="tvm_struct_get", args=(handle, _, ir.Const(value=got))) if got == field:
                return self.position(handle)
        raise UnsupportedIR("host: kernel argument that is no tensor's data")

    def position(self, handle: ir.Expr) -> int:
        handle = self.binds.get(handle, handle) if isinstance(handle, ir.Var) else handle
        if isinstance(handle, ir.Select):  # an object handle or a plain one, of the same argument
            handle = handle.b
        match handle:
            case ir.Call(op="tvm_struct_get", args=(_, ir.Const(value=position), ir.Const(value=field))):
                if field == _ANY_POINTER:
                    return int(position)
        raise UnsupportedIR("host: tensor handle that is no call argument")

    def descriptor(self, name: str, call: ir.Call) -> Descriptor:
        _, _, dtype, rank, pointer, *rest = call.args
        n = _integer(rank)
        dims, strides = rest[:n], rest[n : 2 * n]
        box = [_integer(e) for e in rest[2 * n : 3 * n]]
        steps = [_integer(e) for e in rest[3 * n : 4 * n]]
        modes = [_integer(e) for e in rest[4 * n :]]
        if len(modes) != 4:
            raise UnsupportedIR(f"host: descriptor {name} with {len(modes)} modes")
        tensor = self.tensor(pointer)
        return Descriptor(
            name, _integer(dtype), tensor, tuple(dims), tuple(strides), tuple(box), tuple(steps), *modes
        )


def _integer(node: ir.Expr) -> int:
    while isinstance(node, ir.Cast):
        node = node.a
    if not isinstance(node, ir.Const):
        raise UnsupportedIR("host: descriptor field that is not a constant")
    return int(node.value)


def _extents(values: Sequence[ir.Expr], device: ir.Function) -> dict[str, ir.Expr]:
    tags: Sequence[str] = device.attrs.get("tirx.kernel_launch_params", ())
    names = ["dynamic_shared" if "dyn_shared" in tag else tag for tag in tags]
    if len(names) != len(values):
        raise UnsupportedIR("host: launch arguments do not match the kernel's launch parameters")
    return dict(zip(names, values, strict=True))
