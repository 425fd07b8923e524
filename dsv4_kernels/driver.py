"""Launches through the CUDA driver's C functions: modules, TMA descriptors, kernels.

`DirectLaunch` is a launch whose numbers are all known but addresses and stream: it says where in memory that
is laid out as the driver reads it these are to be written, and calls the driver. `written_out` does that.
"""

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch

from dsv4_kernels.host_text import Launch, TensorMap

# Of torch; a build without CUDA has neither.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)
# Of the current stream, into a CUDA graph. A torch that cannot tell: as if it were.
is_capturing: Callable[[], bool] = (
    getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: True)
    if torch.backends.cuda.is_built()
    else lambda: True
)

INVALID_CONTEXT = 201  # CUresult: this thread has no context yet
_MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64  # CUtensorMap
_MAX_MAPS = 4096  # descriptors kept of one tensor of a launch
_WORD = 8  # bytes
# CUlaunchConfig: seven numbers of 4 bytes, the stream from byte 32 on, attributes, their number.
_CONFIG_BYTES, STREAM_WORD = 56, 32 // _WORD
MAP_WORDS = _MAP_BYTES // _WORD


class DriverError(RuntimeError):
    """The CUDA driver refused a call."""


class Driver:
    """libcuda.so.1. Its calls let other Python threads run.

    Attributes:
        library: its functions.
    """

    def __init__(self) -> None:
        """Load it; OSError: there is none."""
        self.library = lib = ctypes.CDLL("libcuda.so.1")
        address, number = ctypes.c_void_p, ctypes.c_uint32
        self._launch = lib.cuLaunchKernelEx  # its arguments are converted once: see `prepared`
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

    def prepared(self, config: int, function: int, params: int) -> Callable[[], int]:
        """Return what launches and returns a CUresult.

        Args:
            config: address of a CUlaunchConfig.
            function: CUfunction.
            params: address of a pointer to each parameter.
        """
        pointer = ctypes.c_void_p.from_param
        return partial(self._launch, pointer(config), pointer(function), pointer(params), None)

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
def driver() -> Driver:
    """Return the driver; OSError: there is none."""
    return Driver()


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
    """Memory of one launch as the driver reads it, 64-byte aligned.

    CUlaunchConfig; descriptors; the other parameters; a pointer to each parameter.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        maps = [i for i, p in enumerate(launch.params) if isinstance(p, TensorMap)]
        words = [i for i, p in enumerate(launch.params) if not isinstance(p, TensorMap)]
        first_map = _CONFIG_BYTES + -_CONFIG_BYTES % _MAP_ALIGNMENT
        first_word = first_map + _MAP_BYTES * len(maps)
        self._params = first_word + _WORD * len(words)
        self._bytes = self._params + _WORD * len(launch.params)
        self.places = {  # of each parameter, in bytes from the start
            **{i: first_map + _MAP_BYTES * place for place, i in enumerate(maps)},
            **{i: first_word + _WORD * place for place, i in enumerate(words)},
        }

    def memory(self) -> tuple[memoryview, int, int]:
        """Return new memory as words, all written but stream, addresses and descriptors.

        And the addresses of the configuration and of the pointers to the parameters in it, which are good as
        long as the memory is kept.
        """
        memory = (ctypes.c_uint8 * (self._bytes + _MAP_ALIGNMENT))()
        offset = -ctypes.addressof(memory) % _MAP_ALIGNMENT
        start, launch = ctypes.addressof(memory) + offset, self._launch
        struct.pack_into("=7I", memory, offset, *launch.grid, *launch.block, launch.shared_bytes)
        for i, param in enumerate(launch.params):
            place = self.places[i]
            if isinstance(param, int):
                struct.pack_into("=q", memory, offset + place, param)
            struct.pack_into("=Q", memory, offset + self._params + _WORD * i, start + place)
        words = memoryview(memory).cast("B")[offset : offset + self._bytes].cast("Q")
        return words, start, start + self._params


class Written(NamedTuple):
    """What a call writes into a launch's memory: an address of the call, or the descriptor there.

    Attributes:
        place: index of the (first) word.
        source: which address of the call.
        offset: bytes from there.
        describe: address -> the descriptor's words; None: the address itself is written.
    """

    place: int
    source: int
    offset: int
    describe: Callable[[int], memoryview] | None


class DirectLaunch:
    """A launch whose numbers are all known but addresses and stream.

    Attributes:
        function: CUfunction.
        written: what a call writes into the launch's memory.
    """

    def __init__(
        self, launch: Launch, functions: Functions, device: int, sources: Sequence[tuple[int, int]]
    ) -> None:
        """Load the function, and lay out what the driver reads.

        Args:
            launch: all of it but addresses.
            functions: of the kernel.
            device: its index.
            sources: for each argument of the launch, which address of the call it is relative to, and bytes.
        """
        self._launch, self._device, self._driver = launch, device, driver()
        self.function = functions.get(device, launch)
        self._layout = _Layout(launch)
        self.written = [
            Written(
                self._layout.places[i] // _WORD,
                *sources[param.argument],
                _known(self._driver.describer(param)) if isinstance(param, TensorMap) else None,
            )
            for i, param in enumerate(launch.params)
            if not isinstance(param, int)
        ]

    def memory(self) -> tuple[memoryview, int, int]:
        """Return memory of a launch, and in it the addresses of CUlaunchConfig and of pointers to parameters.

        It is good as long as it is kept. Stream, addresses and descriptors are yet to be written.
        """
        return self._layout.memory()

    def frame(self) -> tuple[memoryview, Callable[[], int]]:
        """Return memory of a launch, and what launches with it and returns the driver's CUresult.

        The stream (at STREAM_WORD) and all of `written` have to be in it by then. No two launches may use the
        same memory at the same time; the driver has read all of it when it returns.
        """
        words, config, params = self.memory()
        return words, self._driver.prepared(config, self.function, params)

    def failed(self, result: int, launch: Callable[[], int]) -> None:
        """Try again what `launch` of a frame did with that `result` where this thread had no context.

        Raises:
            DriverError: the driver refused.
        """
        if result == INVALID_CONTEXT:
            self._driver.use_device(self._device)
            result = launch()
        if result:
            self._driver.check(result, f"launch of {self._launch}")


def _known(describe: Callable[[int], bytes]) -> Callable[[int], memoryview]:
    """Return `describe` that remembers, and gives words."""
    known: dict[int, memoryview] = {}

    def words(address: int) -> memoryview:
        found = known.get(address)
        if found is None:
            if len(known) >= _MAX_MAPS:
                known.clear()
            found = known[address] = memoryview(describe(address)).cast("Q")
        return found

    return words
