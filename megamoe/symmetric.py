"""Memory that the ranks of one NVLink domain share: every rank's part of a region side by side, at each rank.

torch's symmetric memory allocates a part on each GPU and hands its handle to the peers; each rank then maps
all parts of a region into one range of addresses. So a region is one tensor [ranks, bytes] in every process,
part r of it rank r's memory, and a kernel reaches a peer by an index: no table of addresses, and the same
code as for ranks on one GPU. A rank reaches its own part through this range too: memory that a kernel
writes at one address and reads at another would need fences of its own. NVLink multicast is not used.
"""

import ctypes
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

PART_BYTES = 2 << 20  # parts are multiples of it: memory of a GPU is mapped in pages of this size
KEPT_BYTES = 64 << 10  # of each part, at its end: torch's own signals lie there
_DEVICE, _READ_WRITE = 1, 3  # CU_MEM_LOCATION_TYPE_DEVICE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE
_NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


class SymmetricMemoryError(RuntimeError):
    """The ranks cannot share memory: not one NVLink domain, or a driver or torch that does not allow it."""


class _Location(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int), ("number", ctypes.c_int))


class _Access(ctypes.Structure):
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise SymmetricMemoryError("mega_moe: requires an NVIDIA driver for several ranks") from error


def _call(name: str, *args: Any) -> None:
    """Call a function of the driver.

    Raises:
        SymmetricMemoryError: it fails.
    """
    code = getattr(_driver(), name)(*args)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        said = (text.value or b"unknown error").decode()
        raise SymmetricMemoryError(f"mega_moe: {name} failed with {code}: {said}")


class _Range:
    """Consecutive addresses that several allocations, of any GPU, are mapped to.

    The driver maps whole allocations alone: each has `part_bytes`.
    """

    def __init__(self, handles: list[ctypes.c_ulonglong], part_bytes: int, device: torch.device) -> None:
        self.part_bytes, self.mapped = part_bytes, 0
        self.total = part_bytes * len(handles)
        start = ctypes.c_ulonglong()
        size = ctypes.c_size_t
        _call(
            "cuMemAddressReserve",
            ctypes.byref(start),
            size(self.total),
            size(PART_BYTES),
            ctypes.c_ulonglong(0),
            ctypes.c_ulonglong(0),
        )
        self.start = start.value
        access = _Access(_Location(_DEVICE, device.index), _READ_WRITE)
        for number, handle in enumerate(handles):
            at = ctypes.c_ulonglong(self.start + number * part_bytes)
            try:
                _call("cuMemMap", at, size(part_bytes), size(0), handle, ctypes.c_ulonglong(0))
            finally:
                _call("cuMemRelease", handle)  # the mapping holds the memory
            self.mapped += 1
            _call("cuMemSetAccess", at, size(part_bytes), ctypes.byref(access), size(1))

    def close(self) -> None:
        """Give the addresses back."""
        for number in range(self.mapped):
            at = ctypes.c_ulonglong(self.start + number * self.part_bytes)
            _call("cuMemUnmap", at, ctypes.c_size_t(self.part_bytes))
        self.mapped = 0
        _call("cuMemAddressFree", ctypes.c_ulonglong(self.start), ctypes.c_size_t(self.total))


def _handle_of(pointer: int) -> ctypes.c_ulonglong:
    """Return the handle, to be released, of the allocation that is mapped at an address."""
    handle = ctypes.c_ulonglong()
    _call("cuMemRetainAllocationHandle", ctypes.byref(handle), ctypes.c_void_p(pointer))
    return handle


def tensor_at(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """Return [num_bytes] uint8 at an address that `device` can reach; it does not own the memory."""
    storage = torch._C._construct_storage_from_data_pointer(address, device, num_bytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)  # pyright: ignore[reportArgumentType, reportCallIssue]


class SharedRegions:
    """Regions of which each rank of a group has one part, all of them mapped at every rank.

    Attributes:
        tensors: by name, [ranks, bytes of a part] uint8, zero at first.
    """

    def __init__(
        self, part_bytes: Mapping[str, int], group: dist.ProcessGroup | None, device: torch.device
    ) -> None:
        """Allocate; every rank of the group calls it with the same sizes.

        Args:
            part_bytes: bytes of a rank's part of each region, multiples of PART_BYTES; the last KEPT_BYTES of
                a part are not to be used.
            group: of the ranks, of one host or NVLink domain; None: all.
            device: this rank's GPU.

        Raises:
            SymmetricMemoryError: memory cannot be shared.
            ValueError: a size is no multiple of PART_BYTES, or the device is no GPU.
        """
        if device.type != "cuda":
            raise ValueError(f"mega_moe: requires a CUDA device for several ranks, got {device}")
        for name, size in part_bytes.items():
            if size <= 0 or size % PART_BYTES:
                raise ValueError(f"mega_moe: requires parts of {PART_BYTES} bytes each, got {name}={size}")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        group = group or dist.group.WORLD
        ranks = dist.get_world_size(group)
        self._ranges: list[_Range] = []
        self._kept: list[Any] = []
        self.tensors: dict[str, torch.Tensor] = {}
        with torch.cuda.device(device):
            for name, size in part_bytes.items():
                found = _Range(self._allocate(size, group, device), size, device)
                self._ranges.append(found)
                whole = tensor_at(found.start, ranks * size, device).view(ranks, size)
                whole[dist.get_rank(group)].zero_()
                self.tensors[name] = whole
            torch.cuda.synchronize(device)
        dist.barrier(group)

    def _allocate(self, size: int, group: Any, device: torch.device) -> list[ctypes.c_ulonglong]:
        """Return handles of each rank's part of `size` bytes.

        torch adds room for signals and rounds up to pages, so that the whole allocation is the part.
        """
        size -= KEPT_BYTES
        os.environ.setdefault(_NO_MULTICAST, "1")
        from torch._C._distributed_c10d import _SymmetricMemory
        from torch.distributed import _symmetric_memory as symmetric

        try:
            part = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)
            handle = symmetric.rendezvous(part, group)
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise SymmetricMemoryError(
                f"mega_moe: requires ranks of one NVLink domain, each with its own GPU, for backend='fused' "
                f"(use backend='distributed' for others), got: {first}"
            ) from error
        self._kept += [part, handle]
        pointers = [int(p) for p in handle.buffer_ptrs]  # pyright: ignore[reportAttributeAccessIssue]
        if pointers[handle.rank] != part.data_ptr():
            raise SymmetricMemoryError(
                "mega_moe: requires allocations of their own from torch's symmetric memory"
            )
        return [_handle_of(pointer) for pointer in pointers]

    def close(self) -> None:
        """Unmap all parts; no kernel may use them any more, on any rank."""
        torch.cuda.synchronize()
        self.tensors.clear()
        for found in self._ranges:
            found.close()
        self._ranges.clear()
        self._kept.clear()
