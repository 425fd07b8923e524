"""Entry points: run a kernel, run a function of one's own, try many schedules."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from verify import host, ir
from verify.interp.arguments import Argument, Arguments
from verify.interp.device import errors
from verify.interp.device.run import DEFAULT_MAX_STEPS, WARP, Checks, Run, Summary, Tensor, flat_bytes
from verify.interp.device.schedule import POLICIES, Policy
from verify.interp.device.schedule import policy as find_policy
from verify.interp.dtypes import FP4
from verify.interp.errors import UnsupportedOpError
from verify.interp.machine import Machine

ALL_CHECKS = Checks()
ViewSizes = Mapping[ir.Var, tuple[ir.DType, int]]


def extracted_of(kernel: Any) -> Any:
    """Return `kernel`, or its stages if it is a PrimFunc."""
    from verify.extract import Extracted, extract

    return kernel if isinstance(kernel, Extracted) else extract(kernel)


def run(
    kernel: Any,
    *tensors: Argument,
    seed: int = 0,
    policy: str | Policy = "random",
    checks: Checks = ALL_CHECKS,
    max_steps: int = DEFAULT_MAX_STEPS,
    wave_threads: int = WARP,
    resident: int | None = None,
) -> Summary:
    """Run the device IR of a kernel on CPU tensors; outputs are written in place.

    Args:
        kernel: a TileLang PrimFunc, or an `Extracted` (whose `device` may have been replaced).
        tensors: as the PrimFunc lists them; FP4 packed, two elements a byte.
        seed: of every choice of the schedule; the same seed and policy give the same run.
        policy: a name in POLICIES, or a Policy.
        checks: what to look for.
        max_steps: instructions of groups before a StepLimitError.
        wave_threads: threads that start together: 32, or 128 to run faster with fewer schedules.
        resident: blocks that fit the chip together, for kernels whose blocks wait for each other; None: all.

    Raises:
        DeviceError: the first fault, one of its subclasses.
        InterpreterError: an argument does not fit the kernel.
        UnsupportedOpError: the kernel uses something that has no meaning here.
    """
    extracted = extracted_of(kernel)
    launch = host.read_host(extracted.host, extracted.device, extracted.tile)
    named, dims = bind(extracted.tile, tensors)
    return run_function(
        extracted.device,
        launch,
        named,
        dims,
        view_sizes=view_sizes(extracted.device, extracted.lowered),
        seed=seed,
        policy=policy,
        checks=checks,
        max_steps=max_steps,
        wave_threads=wave_threads,
        resident=resident,
    )


def run_function(
    device: ir.Function,
    launch: host.Host,
    tensors: Mapping[str, Tensor],
    dims: Mapping[str, int],
    *,
    view_sizes: ViewSizes | None = None,
    seed: int = 0,
    policy: str | Policy = "random",
    checks: Checks = ALL_CHECKS,
    max_steps: int = DEFAULT_MAX_STEPS,
    wave_threads: int = WARP,
    blocks: list[int] | None = None,
    resident: int | None = None,
) -> Summary:
    """Run a parsed device function, e.g. one that was edited; what is not listed is as in `run`.

    Args:
        device: the function.
        launch: its launch facts (`verify.host.read_host`).
        tensors: memory by tensor name, as `bind` returns it.
        dims: values by shape parameter.
        view_sizes: element type and bits of each part of the shared arena; without it a part reaches to
            the arena's end.
        seed: as in `run`.
        policy: as in `run`.
        checks: as in `run`.
        max_steps: as in `run`.
        wave_threads: as in `run`.
        blocks: linear numbers of the blocks to run, None for all.
        resident: as in `run`.
    """
    try:
        launched = Run(
            device,
            launch,
            tensors,
            dims,
            policy=find_policy(policy),
            seed=seed,
            checks=checks,
            view_sizes=view_sizes or {},
            max_steps=max_steps,
            wave_threads=wave_threads,
        )
        return launched.execute(blocks, resident)
    except UnsupportedOpError:
        raise
    except ir.UnsupportedIR as error:
        raise UnsupportedOpError(str(error)) from error


def launched(
    kernel: Any, *tensors: Argument, seed: int, policy: str | Policy, wave_threads: int = WARP
) -> Run:
    """Return a launch that has not begun, of which `execute` runs all blocks or some; arguments as of `run`.

    Raises:
        UnsupportedIR: the kernel uses something that has no meaning here.
        InterpreterError: an argument does not fit the kernel, or the driver would refuse the launch.
    """
    extracted = extracted_of(kernel)
    launch = host.read_host(extracted.host, extracted.device, extracted.tile)
    named, dims = bind(extracted.tile, tensors)
    return Run(
        extracted.device,
        launch,
        named,
        dims,
        policy=find_policy(policy),
        seed=seed,
        checks=ALL_CHECKS,
        view_sizes=view_sizes(extracted.device, extracted.lowered),
        wave_threads=wave_threads,
    )


def explore(
    kernel: Any,
    *tensors: Argument,
    seeds: int = 3,
    policies: Sequence[str | Policy] = tuple(POLICIES),
    checks: Checks = ALL_CHECKS,
    wave_threads: int = WARP,
) -> list[Summary]:
    """Run a kernel under every policy with `seeds` seeds each; outputs of the first run are written.

    Raises:
        DeviceError: as `run`; ScheduleDependentError if two schedules write different results.
    """
    extracted = extracted_of(kernel)
    before = [t.clone() if isinstance(t, torch.Tensor) else t for t in tensors]
    summaries: list[Summary] = []
    for chosen in policies:
        for seed in range(seeds):
            args = tensors if not summaries else [_again(t) for t in before]
            summaries.append(
                run(extracted, *args, seed=seed, policy=chosen, checks=checks, wave_threads=wave_threads)
            )
            for position, (first, other) in enumerate(zip(tensors, args, strict=True)):
                if isinstance(first, torch.Tensor) and isinstance(other, torch.Tensor):
                    _compare(extracted.tile.params[position].name, first, other, summaries)
    return summaries


def _again(tensor: Argument) -> Argument:
    return tensor.clone() if isinstance(tensor, torch.Tensor) else tensor


def _compare(name: str, first: torch.Tensor, other: torch.Tensor, summaries: list[Summary]) -> None:
    a, b = (t.contiguous().view(torch.uint8) for t in (first, other))
    if not torch.equal(a, b):
        one, two = summaries[0], summaries[-1]
        count = int((a != b).sum())
        raise errors.ScheduleDependentError(
            f"{count} bytes of {name} differ between {one.policy}/{one.seed} and {two.policy}/{two.seed}",
            errors.Where(storage=name),
        )


def bind(tile: ir.Function, tensors: Sequence[Argument]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Check call arguments; return memory by tensor name and values by shape parameter.

    Raises:
        InterpreterError: an argument does not fit the kernel.
    """
    machine = Machine()
    Arguments(machine, tile, tuple(tensors))
    dims = {v.name: value for v, value in machine.env.items() if isinstance(value, int)}
    named: dict[str, Tensor] = {}
    for param, value in zip(tile.params, tensors, strict=True):
        buffer = tile.buffers.get(param)
        if buffer is None or not isinstance(value, torch.Tensor):
            continue
        shape = [machine.integer(s, "buffer shape") for s in buffer.shape]
        span = 1 + sum((e - 1) * s for e, s in zip(value.shape, value.stride(), strict=True))
        span = span if value.numel() else 0
        packed = 2 if buffer.dtype.name == FP4 else 1
        strides = [machine.integer(s, "buffer stride") for s in buffer.strides]
        count = _count(shape, strides) if value.numel() else 0
        named[buffer.name] = Tensor(
            count * buffer.dtype.bits, flat_bytes(value, span) if span else flat_bytes(value, 0)
        )
        assert packed * span >= count or not span, "the tensor has the elements that the kernel addresses"
    return named, dims


def _count(shape: list[int], strides: list[int]) -> int:
    if strides:
        return 1 + sum((e - 1) * s for e, s in zip(shape, strides, strict=True))
    total = 1
    for extent in shape:
        total *= extent
    return total


def view_sizes(device: ir.Function, lowered: ir.Function) -> dict[ir.Var, tuple[ir.DType, int]]:
    """Return element type and bits of each part of the shared arena, by the device IR's variable.

    Merging allocations into one arena keeps their names and not their sizes; those are read before it.
    """
    sizes: dict[str, list[tuple[ir.DType, int]]] = {}
    for node in ir.walk(lowered.body):
        if isinstance(node, ir.Block):
            for buffer in node.allocs:
                if buffer.scope == "shared.dyn" and all(isinstance(s, ir.Const) for s in buffer.shape):
                    count = _count([int(s.value) for s in buffer.shape if isinstance(s, ir.Const)], [])
                    found = sizes.setdefault(buffer.data.name, [])
                    found.append((buffer.dtype, count * buffer.dtype.bits))
    views: dict[ir.Var, tuple[ir.DType, int]] = {}
    for node in ir.walk(device.body):
        if (
            isinstance(node, ir.Bind)
            and isinstance(node.value, ir.Call)
            and node.value.op == "handle_add_byte_offset"
        ):
            known = sizes.get(node.var.name, [])
            if len(known) == 1:
                views[node.var] = known[0]
    return views
