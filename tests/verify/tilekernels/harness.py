"""Runs TileKernels 1.0.0, a library of TileLang kernels by others, on the CPU through the interpreter.

Its wrappers allocate on `cuda`, ask the GPU for its size and launch compiled kernels: here allocations go
to the CPU, the GPU is a small made-up one, and each launch interprets the kernel's PrimFunc.
"""

import contextlib
import re
import sys
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from verify.extract import TARGET
from verify.interp.jit import interpreted_jit

NUM_SMS = 4  # of the made-up GPU; every persistent grid then has several turns
SHARED_BYTES_PER_SM = 233472
_KERNEL_NAME = re.compile(r"@T\.prim_func\s+def (\w+)\(")


_ROUNDED_ONCE = {f.__name__: f for f in (torch.exp, torch.sigmoid, torch.log1p)}


class _CudaOnCpu(TorchFunctionMode):
    """Sends `device="cuda"` to the CPU and drops pinning; rounds a reference's exponentials once.

    torch's vectorised float32 exponential can be off by a unit in the last place, which a comparison bit
    for bit of what follows would show.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _ROUNDED_ONCE.values() and not kwargs and args[0].dtype == torch.float32:
            return func(args[0].double()).float()
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


def import_tile_kernels() -> Any:
    """Import TileKernels; 1.0.0 expects a function where TileLang 0.1.15 no longer has it."""
    if "tilelang.utils.target" not in sys.modules:
        from tvm.target import Target

        module = types.ModuleType("tilelang.utils.target")
        module.__dict__["determine_target"] = lambda *args, **kwargs: Target(dict(TARGET))
        sys.modules["tilelang.utils.target"] = module
    import tile_kernels

    return tile_kernels


def kernel_names() -> list[str]:
    """Return the name of every kernel in the installed package's source."""
    spec = find_spec("tile_kernels")
    assert spec is not None
    assert spec.origin is not None
    names: list[str] = []
    for path in sorted(Path(spec.origin).parent.rglob("*_kernel.py")):
        found = _KERNEL_NAME.findall(path.read_text())
        names += [path.stem.removesuffix("_kernel") if name == "kernel" else name for name in found]
    return sorted(names)


@contextlib.contextmanager
def interpreted() -> Iterator[set[str]]:
    """Run TileKernels on the CPU inside the block; yields the names of the kernels that ran."""
    tile_kernels = import_tile_kernels()
    ran: set[str] = set()

    def note(prim_func):
        name = str(prim_func.attrs["global_symbol"])
        ran.add("multilayer_recompute" if name == "kernel" else name)

    properties = types.SimpleNamespace(
        multi_processor_count=NUM_SMS, shared_memory_per_multiprocessor=SHARED_BYTES_PER_SM
    )
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        torch.compiler.set_stance("force_eager"),
        interpreted_jit(note),
        _CudaOnCpu(),
    ):
        tile_kernels.config.get_device_num_sms.cache_clear()
        tile_kernels.config.get_max_smem_per_sm.cache_clear()
        yield ran
