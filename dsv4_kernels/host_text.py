"""What the compiler's host function launches, read from its C text.

Before a launch that function takes the arguments apart, checks them, makes the TMA descriptors and hands
everything to the driver: several microseconds, most of them the same numbers every time. Read once, these
numbers can be handed to the driver directly (`driver`). Anything in the text that is not understood is
`UnreadableHostError`: the kernel is then called through its host function.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import CodeType

BLOCK_AXES = 3  # threadIdx.x, y and z: always given
MAX_GRID_AXES = 3  # those of blockIdx that the kernel uses
DESCRIPTOR_MODES = 4  # interleave, swizzle, L2 promotion, fill beyond the tensor

_SET_DEVICE, _TENSOR_MAP = "__tvm_set_device_packed", "__tvm_tensormap_create_tiled_packed"
# A launch with attributes that neither the arguments nor this module say.
_SPECIAL = re.compile(
    r"cooperative_groups|griddepcontrol|cudaGridDependency|cudaTriggerProgrammatic|this_grid"
)
_STRING = re.compile(r'"(?:\\.|[^"\\])*"')
_HANDLE = re.compile(
    r"void\* (\w+)_handle = \(\(\1_handle_type_index == \d+\) \?.*args\)\[(\d+)\]\.v_ptr\)\);"
)
_DATA = re.compile(r"void\* (\w+) = \(\(\(DLTensor\*\)(\w+)_handle\)\[0\]\.data\);")
_SHAPE = re.compile(r"void\* (\w+) = \(\(\(DLTensor\*\)(\w+)_handle\)\[0\]\.shape\);")
_DIM = re.compile(r"int(?:32|64)_t (\w+) = \(\(int(?:32|64)_t\)\(\(int64_t\*\)(\w+)\)\[(\d+)\]\);")
_STACK = re.compile(r"void\* (\w+) = stack_\d+;")
_VALUE = re.compile(r"\(\(\(TVMFFIAny\*\)stack_ffi_any\)\[(\d+)\]\.(v_int64|v_ptr)\) = (.*);")
_CALL = re.compile(r"if \(TVMFFIFunctionCall\((\w+), \(TVMFFIAny\*\) stack_ffi_any, (\d+), &\w+\) != 0\) \{")
_CAST = re.compile(r"\(u?int(?:32|64)_t\)")
_OPERATORS = (
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.FloorDiv,
    ast.Mod,
    ast.LShift,
    ast.RShift,
    ast.BitAnd,
    ast.BitOr,
)
_ARITHMETIC = (ast.Expression, ast.BinOp, *_OPERATORS, ast.Constant, ast.Name, ast.Load)
_EFFECT = re.compile(r"TVMFFIFunctionCall|\]\.v_\w+\) = |return 0|\bgoto\b")
_LOOP = re.compile(r"\b(?:for|while|do|switch)\b *[({]")


class UnreadableHostError(ValueError):
    """The host text does something else than check, describe tensors and launch one kernel."""


@dataclass(frozen=True)
class TensorMap:
    """A TMA descriptor but for its address.

    Attributes:
        argument: of the call, whose memory it describes.
        dtype: CUtensorMapDataType.
        dims: elements of the global tensor, innermost first.
        strides: bytes, of every dimension but the innermost.
        box, element_strides: innermost first.
        modes: interleave, swizzle, L2 promotion, fill beyond the tensor: the driver's enumeration values.
    """

    argument: int
    dtype: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    modes: tuple[int, ...]


@dataclass(frozen=True)
class Address:
    """A parameter of the device function: the address of the call's `argument`."""

    argument: int


@dataclass(frozen=True)
class Launch:
    """One launch, but for addresses and stream.

    Attributes:
        function: of the device module.
        params: of that function; an int is passed by value.
        grid, block: extents x, y, z.
        shared_bytes: dynamic shared memory.
    """

    function: str
    params: tuple[int | Address | TensorMap, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int


@dataclass(frozen=True)
class HostText:
    """The host function of one kernel: how a launch follows from the arguments' shapes.

    Attributes:
        function: name of the device function.
        dims: name in the text -> (argument, axis).
        params: of the device function: ("address", argument), ("map", index into `maps`) or ("value", code).
        maps: argument, and the codes of dtype, rank and everything behind the address.
        extents: codes of the launch extents: of the grid, of a block, bytes of dynamic shared memory.
    """

    function: str
    dims: Mapping[str, tuple[int, int]]
    params: tuple[tuple[str, int | CodeType], ...]
    maps: tuple[tuple[int, tuple[CodeType, ...]], ...]
    extents: tuple[tuple[CodeType, ...], tuple[CodeType, ...], CodeType | None]

    def launch(self, shapes: Sequence[Sequence[int]]) -> Launch:
        """Return the launch for arguments of these shapes.

        Raises:
            UnreadableHostError: a number depends on something else than shapes.
        """
        dims = {name: int(shapes[argument][axis]) for name, (argument, axis) in self.dims.items()}

        def number(code: CodeType) -> int:
            try:
                return eval(code, {"__builtins__": {}}, dims)
            except NameError as error:
                raise UnreadableHostError(f"{self.function}: {error}") from None

        maps = [_tensor_map(argument, [number(c) for c in codes]) for argument, codes in self.maps]
        params: list[int | Address | TensorMap] = []
        for kind, what in self.params:
            if isinstance(what, CodeType):
                params.append(number(what))
            else:
                params.append(maps[what] if kind == "map" else Address(what))
        grid, block, shared = self.extents
        return Launch(
            self.function,
            tuple(params),
            _three([number(c) for c in grid]),
            _three([number(c) for c in block]),
            0 if shared is None else number(shared),
        )


def _three(extents: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*extents, 1, 1)[:MAX_GRID_AXES]
    return x, y, z


def _tensor_map(argument: int, numbers: Sequence[int]) -> TensorMap:
    dtype, rank, *rest = numbers
    if len(rest) != 4 * rank + DESCRIPTOR_MODES:
        raise UnreadableHostError(f"descriptor of rank {rank} with {len(rest)} numbers")
    dims, strides, box, steps = (tuple(rest[i * rank : (i + 1) * rank]) for i in range(4))
    return TensorMap(argument, dtype, dims, strides[1:], box, steps, tuple(rest[4 * rank :]))


def read_host(host_text: str, device_text: str) -> HostText:
    """Return what the host function in `host_text` does with the device function of `device_text`.

    Raises:
        UnreadableHostError: something in it is not understood.
    """
    reader = _Reader()
    for line in _body(host_text):
        reader.read(line)
    return reader.result(device_text)


def _body(text: str) -> list[str]:
    """Return the lines of the host function, which is the first one defined."""
    lines = text.splitlines()
    found = re.compile(r"int32_t __tvm_ffi_\w+\(.*\) \{$")
    first = next((i for i, line in enumerate(lines) if found.match(line)), None)
    if first is None:
        raise UnreadableHostError("no host function")
    last = next((i for i in range(first, len(lines)) if lines[i] == "}"), None)
    return lines[first + 1 : last]


class _Reader:
    def __init__(self) -> None:
        self.depth = 0
        self.handles: dict[str, int] = {}
        self.data: dict[str, int] = {}
        self.shapes: dict[str, int] = {}
        self.dims: dict[str, tuple[int, int]] = {}
        self.descriptors: dict[str, int | None] = {}  # name -> index into maps, once made
        self.values: dict[int, tuple[str, str]] = {}
        self.maps: list[tuple[int, tuple[CodeType, ...]]] = []
        self.launched: tuple[str, list[tuple[str, str]]] | None = None

    def read(self, line: str) -> None:
        line = _STRING.sub('""', line.strip())
        if _LOOP.search(line):
            raise UnreadableHostError(line)
        if self.depth == 0:
            self._statement(line)
        elif _EFFECT.search(line):
            raise UnreadableHostError(line)  # what happens under a condition only
        self.depth += line.count("{") - line.count("}")

    def _statement(self, line: str) -> None:
        if found := _HANDLE.fullmatch(line):
            self.handles[found[1]] = int(found[2])
        elif found := _DATA.fullmatch(line):
            self.data[found[1]] = self.handles[found[2]]
        elif found := _SHAPE.fullmatch(line):
            self.shapes[found[1]] = self.handles[found[2]]
        elif found := _DIM.fullmatch(line):
            self.dims[found[1]] = (self.shapes[found[2]], int(found[3]))
        elif found := _STACK.fullmatch(line):
            self.descriptors[found[1]] = None
        elif found := _VALUE.fullmatch(line):
            self._value(int(found[1]), found[2], found[3])
        elif found := _CALL.fullmatch(line):
            self._call(found[1], [self.values[i] for i in range(int(found[2]))])
        elif _EFFECT.search(line) and line != "return 0;":
            raise UnreadableHostError(line)

    def _value(self, place: int, field: str, text: str) -> None:
        if field == "v_ptr" or text not in ("0", "(int64_t)0"):  # a pointer's word is cleared first
            self.values[place] = (field, text)
        else:
            self.values.pop(place, None)

    def _call(self, callee: str, values: list[tuple[str, str]]) -> None:
        if self.launched is not None:
            raise UnreadableHostError(f"{callee} after the launch")
        if callee == _SET_DEVICE:
            return
        if callee == _TENSOR_MAP:
            (_, name), dtype, rank, (_, data), *rest = values
            if self.descriptors.get(name, 0) is not None or data not in self.data:
                raise UnreadableHostError(f"descriptor {name} of {data}")
            self.descriptors[name] = len(self.maps)
            self.maps.append((self.data[data], tuple(_code(v) for v in (dtype, rank, *rest))))
            return
        self.launched = callee.removesuffix("_packed"), values

    def result(self, device_text: str) -> HostText:
        if self.launched is None or self.depth:
            raise UnreadableHostError("no launch")
        function, values = self.launched
        names, threads, body = _device_function(function, device_text)
        params, extents = values[: len(names)], values[len(names) :]
        shared = _code(extents.pop()) if "extern __shared__" in body else None
        grid, block = extents[:-BLOCK_AXES], extents[-BLOCK_AXES:]
        if not 1 <= len(grid) <= MAX_GRID_AXES or len(block) != BLOCK_AXES or len(params) != len(names):
            raise UnreadableHostError(f"{function}: {len(values)} arguments for {len(names)} parameters")
        blocks = tuple(_code(e) for e in block)
        sizes = [eval(c, {"__builtins__": {}}) for c in blocks if not c.co_names]
        if len(sizes) != BLOCK_AXES or sizes[0] * sizes[1] * sizes[2] != threads:
            raise UnreadableHostError(f"{function}: blocks of {sizes} threads, compiled for {threads}")
        return HostText(
            function,
            self.dims,
            tuple(self._param(n, v) for n, v in zip(names, params, strict=True)),
            tuple(self.maps),
            (tuple(_code(e) for e in grid), blocks, shared),
        )

    def _param(self, name: str, value: tuple[str, str]) -> tuple[str, int | CodeType]:
        field, text = value
        if field == "v_int64" and _CAST.sub("", text).strip("()") == name:
            return "value", _code(value)
        if text == name and text in self.data:
            return "address", self.data[text]
        made = self.descriptors.get(text) if text == name else None
        if made is None:
            raise UnreadableHostError(f"passes {text} as {name}")
        return "map", made


def _device_function(function: str, text: str) -> tuple[list[str], int, str]:
    """Return the parameters' names, the threads of a block and the body of a device function."""
    head = re.search(
        rf"__global__ void __launch_bounds__\((\d+), \d+\) {re.escape(function)}\((.*)\) \{{", text
    )
    if head is None or text.count("__launch_bounds__") != 1:
        raise UnreadableHostError(f"{function} is not the one device function")
    body = text[head.end() :]
    if _SPECIAL.search(body):
        raise UnreadableHostError(f"{function} is launched with attributes")
    names = [re.split(r"[\s*]", part.strip())[-1] for part in head[2].split(",")]
    return names, int(head[1]), body


def _code(value: tuple[str, str]) -> CodeType:
    field, text = value
    try:
        tree = ast.parse(_CAST.sub("", text).replace("/", "//").strip(), mode="eval")
    except SyntaxError:
        raise UnreadableHostError(f"not a number: {text}") from None
    if field != "v_int64" or not all(isinstance(node, _ARITHMETIC) for node in ast.walk(tree)):
        raise UnreadableHostError(f"not a number: {text}")
    return compile(tree, "<host>", "eval")
