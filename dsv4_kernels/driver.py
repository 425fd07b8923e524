"""Launches through the CUDA driver's C functions: modules, TMA descriptors, kernels.

`direct_launch` makes a function of a launch whose numbers are all known but addresses and stream: it writes
these into memory laid out as the driver reads it, and calls the driver.
"""

import ctypes
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from operator import itemgetter

import torch

from dsv4_kernels.host_text import Address, Launch, TensorMap

# Of torch; a build without CUDA has neither.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)

INVALID_CONTEXT = 201  # CUresult: this thread has no context yet
_MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64  # CUtensorMap
_MAX_MAPS = 4096  # descriptors kept of one tensor of a launch
_WORD = 8  # bytes
# CUlaunchConfig: seven numbers of 4 bytes, the stream from byte 32 on, attributes, their number.
_CONFIG_BYTES, _STREAM = 56, 32


class DriverError(RuntimeError):
    """The CUDA driver refused a call."""


class _Driver:
    """libcuda.so.1. Its calls let other Python threads run."""

    def __init__(self) -> None:
        lib = ctypes.CDLL("libcuda.so.1")
        address, number = ctypes.c_void_p, ctypes.c_uint32
        self.launch = lib.cuLaunchKernelEx
        self.launch.argtypes = [address] * 4
        self._encode = lib.cuTensorMapEncodeTiled
        self._encode.argtypes = [address, number, number, *[address] * 5, *[number] * 4]
        self._load, self._function = lib.cuModuleLoadData, lib.cuModuleGetFunction
        self._load.argtypes = [address, ctypes.c_char_p]
        self._function.argtypes = [address, address, ctypes.c_char_p]
        self._attribute = lib.cuFuncSetAttribute
        self._attribute.argtypes = [address, ctypes.c_int, ctypes.c_int]
        self._retain, self._current = lib.cuDevicePrimaryCtxRetain, lib.cuCtxSetCurrent
        self._retain.argtypes = [address, ctypes.c_int]
        self._current.argtypes = [address]
        self._name = lib.cuGetErrorName
        self._name.argtypes = [ctypes.c_int, address]

    def check(self, result: int, what: str) -> None:
        """Raise DriverError unless `result` is success."""
        if result:
            name = ctypes.c_char_p()
            self._name(result, ctypes.byref(name))
            raise DriverError(f"{what}: {(name.value or b'?').decode()} ({result})")

    def use_device(self, index: int) -> None:
        """Make the primary context of a device this thread's."""
        context = ctypes.c_void_p()
        self.check(self._retain(ctypes.byref(context), index), "cuDevicePrimaryCtxRetain")
        self.check(self._current(context), "cuCtxSetCurrent")

    def function(self, module: bytes, name: str, shared_bytes: int) -> int:
        """Load a module into the current context and return one of its functions.

        Args:
            module: a cubin.
            name: of the function.
            shared_bytes: dynamic shared memory that it may be launched with.
        """
        loaded, found = ctypes.c_void_p(), ctypes.c_void_p()
        self.check(self._load(ctypes.byref(loaded), module), "cuModuleLoadData")
        self.check(self._function(ctypes.byref(found), loaded, name.encode()), f"cuModuleGetFunction {name}")
        if shared_bytes:
            self.check(self._attribute(found, _MAX_SHARED, shared_bytes), f"cuFuncSetAttribute {name}")
        return int(found.value or 0)

    def describer(self, tensor: TensorMap) -> Callable[[int], bytes]:
        """Return the function of an address that gives the descriptor of `tensor` there."""
        rank, encode = len(tensor.dims), self._encode
        longs, numbers = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank
        memory_type = ctypes.c_uint8 * (_MAP_BYTES + _MAP_ALIGNMENT)
        shape = longs(*tensor.dims), longs(*tensor.strides)
        tile = numbers(*tensor.box), numbers(*tensor.element_strides), *tensor.modes

        def describe(address: int) -> bytes:
            memory = memory_type()
            start = ctypes.addressof(memory)
            start += -start % _MAP_ALIGNMENT
            result = encode(start, tensor.dtype, rank, address, *shape, *tile)
            if result:
                self.check(result, f"cuTensorMapEncodeTiled of {tensor} at {address:#x}")
            return ctypes.string_at(start, _MAP_BYTES)

        return describe


@cache
def driver() -> _Driver:
    """Return the driver; OSError: there is none."""
    return _Driver()


class Functions:
    """The functions of one compiled kernel, loaded once a device."""

    def __init__(self, module: bytes) -> None:
        """Keep the cubin `module`."""
        self._module = module
        self._loaded: dict[tuple[int, str], int] = {}
        self._lock = threading.Lock()

    def get(self, device: int, launch: Launch) -> int:
        """Return the function that `launch` names, on a device; loaded at the first call."""
        with self._lock:
            found = self._loaded.get((device, launch.function))
            if found is None:
                driver().use_device(device)
                found = driver().function(self._module, launch.function, launch.shared_bytes)
                self._loaded[device, launch.function] = found
            return found


class _Layout:
    """Memory of one call as the driver reads it, 64-byte aligned.

    CUlaunchConfig; the parameters that are addresses of tensors; descriptors; the parameters that are
    numbers; a pointer to each parameter. What a call has to write follows each other, from the stream on.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        params = launch.params
        self.addresses = [i for i, p in enumerate(params) if isinstance(p, Address)]
        self.maps = [i for i, p in enumerate(params) if isinstance(p, TensorMap)]
        numbers = [i for i, p in enumerate(params) if isinstance(p, int)]
        end = _CONFIG_BYTES + _WORD * len(self.addresses)
        padding = -end % _MAP_ALIGNMENT
        first_map = end + padding
        first_number = first_map + _MAP_BYTES * len(self.maps)
        self.params = first_number + _WORD * len(numbers)
        self._bytes = self.params + _WORD * len(params)
        self._places = {
            **{i: _CONFIG_BYTES + _WORD * place for place, i in enumerate(self.addresses)},
            **{i: first_map + _MAP_BYTES * place for place, i in enumerate(self.maps)},
            **{i: first_number + _WORD * place for place, i in enumerate(numbers)},
        }
        maps = f"{_MAP_BYTES}s" * len(self.maps)
        # The stream, no attributes and their number, and then the call's own.
        self.format = struct.Struct(f"=3Q{len(self.addresses)}Q{padding}x{maps}")

    def frame(self) -> tuple[ctypes.Array, int, int, int]:
        """Return new memory; where in it a call writes; the addresses of configuration and parameters."""
        memory = (ctypes.c_uint8 * (self._bytes + _MAP_ALIGNMENT))()
        offset = -ctypes.addressof(memory) % _MAP_ALIGNMENT
        start, launch = ctypes.addressof(memory) + offset, self._launch
        struct.pack_into("=7I", memory, offset, *launch.grid, *launch.block, launch.shared_bytes)
        for i, param in enumerate(launch.params):
            place = self._places[i]
            if isinstance(param, int):
                struct.pack_into("=q", memory, offset + place, param)
            struct.pack_into("=Q", memory, offset + self.params + _WORD * i, start + place)
        return memory, offset + _STREAM, start, start + self.params


def direct_launch(
    launch: Launch, functions: Functions, device: int, sources: Sequence[tuple[int, int]]
) -> Callable[[list[int], int], None]:
    """Return a function (addresses of a call, CUstream) that launches; several threads may call it.

    It raises DriverError where the driver refuses.

    Args:
        launch: all of it but addresses.
        functions: of the kernel.
        device: its index.
        sources: for each argument of the launch, which address of the call it is relative to, and bytes.
    """
    cuda = driver()
    call, function = cuda.launch, ctypes.c_void_p(functions.get(device, launch))
    layout = _Layout(launch)
    pack = layout.format.pack_into
    params = launch.params
    pick = _picker([sources[p.argument] for p in params if isinstance(p, Address)])
    maps = [(*sources[p.argument], cuda.describer(p), {}) for p in params if isinstance(p, TensorMap)]
    frames = []  # not in use: a call takes one, so that no two threads write the same

    def describe(describer: Callable[[int], bytes], address: int, known: dict[int, bytes]) -> bytes:
        if len(known) >= _MAX_MAPS:
            known.clear()
        known[address] = made = describer(address)
        return made

    def run(addresses: list[int], stream: int) -> None:
        try:
            frame = frames.pop()
        except IndexError:
            frame = layout.frame()
        memory, place, config, values = frame
        if maps:
            described = []
            for i, offset, describer, known in maps:
                address = addresses[i] + offset
                described.append(known.get(address) or describe(describer, address, known))
            pack(memory, place, stream, 0, 0, *pick(addresses), *described)
        else:
            pack(memory, place, stream, 0, 0, *pick(addresses))
        result = call(config, function, values, None)
        if result == INVALID_CONTEXT:
            cuda.use_device(device)
            result = call(config, function, values, None)
        frames.append(frame)
        if result:
            cuda.check(result, f"launch of {launch}")

    return run


def _picker(sources: Sequence[tuple[int, int]]) -> Callable[[Sequence[int]], Iterable[int]]:
    """Return the function that takes `sources`, each an address and bytes from there, of the addresses."""
    if len(sources) > 1 and not any(offset for _, offset in sources):
        return itemgetter(*[source for source, _ in sources])
    return lambda addresses: [addresses[source] + offset for source, offset in sources]
