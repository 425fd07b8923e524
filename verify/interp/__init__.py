"""Runs a kernel's tile IR on CPU tensors: what the kernel means, before any lowering decision.

    from verify import interp
    interp.run(make_kernel(n=4096, k=4096), x, x_scale, w, w_scale, out)

Every operation has the semantics of its scalar type (see `dtypes`, `arith`, `intrinsics`): float32 is
rounded after each operation, integers wrap, casts to 8-bit and 4-bit floats round to nearest even and
saturate. Three things are left to the hardware and not modelled: the order of additions inside one
tile op (`tileops` states the bound), the last bits of transcendental functions, and the contraction of
`a * b + c` into one fused operation by nvcc.
"""

from typing import Any

import torch

from verify import ir
from verify.interp.arguments import Argument, Arguments
from verify.interp.errors import InterpreterError, UnsupportedOpError
from verify.interp.intrinsics import register_extern
from verify.interp.jit import interpreted_jit
from verify.interp.machine import Machine
from verify.interp.pointers import addressable

__all__ = [
    "InterpreterError",
    "UnsupportedOpError",
    "addressable",
    "interpreted_jit",
    "register_extern",
    "run",
    "run_function",
]


def run(prim_func: Any, *tensors: Argument) -> None:
    """Run a TileLang PrimFunc on CPU tensors; outputs are written in place.

    Args:
        prim_func: from `@T.prim_func`, before lowering.
        tensors: as the PrimFunc lists them; a Python number for a scalar parameter. FP4 operands are packed,
            two elements a byte with the even one in the low nibble, as uint8 of half the last dimension.

    Raises:
        InterpreterError: an argument does not fit the kernel, or the kernel breaks a rule while it runs; the
            message starts with the Python line.
        UnsupportedOpError: the kernel uses something that the interpreter has no meaning for.
    """
    from verify import extract

    run_function(extract.tile_function(prim_func), tensors)


def run_function(function: ir.Function, tensors: tuple[Argument, ...]) -> None:
    """Run a parsed function of the tile stage; arguments and errors as in `run`."""
    machine = Machine()
    try:
        # Modes of the caller (a default device, autograd) are not for the interpreter's own tensors.
        with torch._C.DisableTorchFunction(), torch.no_grad():
            arguments = Arguments(machine, function, tensors)
            machine.execute(function.body)
            arguments.write_back()
    except InterpreterError as error:
        raise InterpreterError(str(error), machine.span) from error
    except ir.UnsupportedIR as error:
        raise UnsupportedOpError(str(error), machine.span) from error
