"""`with interpreted_jit():` runs kernels made by `@tilelang.jit` in the interpreter.

    with interp.interpreted_jit():
        kernel = matmul(1024, 1024, 1024)  # a @tilelang.jit factory: nothing is compiled
        out = kernel(a, b)                 # CPU tensors

The launcher keeps TileLang's calling convention: outputs named by `out_idx` are allocated and returned,
and None may stand for a tensor that the kernel does not touch.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from verify import ir
from verify.interp import dtypes
from verify.interp.errors import InterpreterError

# Called with each PrimFunc before it runs.
Observer = Callable[[Any], None]


class InterpretedKernel:
    """What a jit factory returns inside `interpreted_jit`: callable like a compiled kernel.

    Attributes:
        prim_func: the captured PrimFunc.
        out_idx: positions of the outputs that a call allocates and returns, in order.
    """

    def __init__(
        self, prim_func: Any, out_idx: Sequence[int] | int | None, observer: Observer | None
    ) -> None:
        """Keep the PrimFunc; it is parsed on the first call."""
        self.prim_func = prim_func
        count = len(prim_func.params)
        chosen = [] if out_idx is None else [out_idx] if isinstance(out_idx, int) else list(out_idx)
        self.out_idx = [i % count for i in chosen]
        self._observer = observer

    def __call__(self, *args: Any) -> Any:
        """Run on CPU tensors; return the outputs named by `out_idx` (one: itself, several: a list)."""
        from verify import extract, interp

        if self._observer is not None:
            self._observer(self.prim_func)
        function = extract.tile_function(self.prim_func)
        if not self.out_idx:
            interp.run_function(function, args)
            return None
        outputs = dict.fromkeys(self.out_idx)
        rest = iter(args)
        values = [None if i in outputs else next(rest, None) for i in range(len(function.params))]
        sizes = _solved_dims(function, values)
        for i in outputs:
            values[i] = _empty(function, i, sizes)
        interp.run_function(function, tuple(values))
        results = [values[i] for i in self.out_idx]
        return results[0] if len(results) == 1 else results

    def get_kernel_source(self) -> str:
        """Return the PrimFunc's script: there is no CUDA text of a kernel that was not compiled."""
        return self.prim_func.script()


@contextlib.contextmanager
def interpreted_jit(observer: Observer | None = None) -> Iterator[None]:
    """Make `@tilelang.jit` factories that are called inside the block return interpreted kernels.

    Args:
        observer: called with a PrimFunc each time that it is about to run.
    """
    import tilelang

    jit = importlib.import_module("tilelang.jit")  # the attribute `jit` of the package is its decorator

    def capture(func: Any, out_idx: Any = None, *args: Any, **kwargs: Any) -> InterpretedKernel:
        return InterpretedKernel(func, out_idx, observer)

    # A factory keeps what it made, by its arguments: inside the block it starts with nothing kept.
    kept: dict[int, tuple[Any, Any, Any]] = {}
    call, compile_in_jit, compile_at_top = jit.JITImpl.__call__, jit.compile, tilelang.compile

    def call_with_own_cache(factory: Any, *args: Any, **kwargs: Any) -> Any:
        if id(factory) not in kept:
            kept[id(factory)] = factory, factory._kernel_cache, factory._call_form_cache
            factory._kernel_cache, factory._call_form_cache = {}, jit._CallFormCache()
        return call(factory, *args, **kwargs)

    jit.JITImpl.__call__ = call_with_own_cache
    setattr(jit, "compile", capture)  # noqa: B010
    setattr(tilelang, "compile", capture)  # noqa: B010
    try:
        yield
    finally:
        jit.JITImpl.__call__ = call
        setattr(jit, "compile", compile_in_jit)  # noqa: B010
        setattr(tilelang, "compile", compile_at_top)  # noqa: B010
        for factory, kernels, forms in kept.values():
            factory._kernel_cache, factory._call_form_cache = kernels, forms


def _solved_dims(function: ir.Function, values: Sequence[Any]) -> dict[ir.Var, int]:
    sizes: dict[ir.Var, int] = {}
    for param, value in zip(function.params, values, strict=True):
        buffer = function.buffers.get(param)
        if buffer is None:
            if isinstance(value, int):
                sizes[param] = value
            continue
        if value is not None:
            for symbol, extent in zip(buffer.shape, value.shape, strict=False):
                if isinstance(symbol, ir.Var):
                    sizes[symbol] = int(extent)
    return sizes


def _empty(function: ir.Function, index: int, sizes: dict[ir.Var, int]) -> torch.Tensor:
    from verify.interp.machine import Machine

    buffer = function.buffers[function.params[index]]
    machine = Machine()
    machine.env.update(sizes)
    try:
        shape = [machine.integer(s, "buffer shape") for s in buffer.shape]
    except ir.UnsupportedIR as error:
        raise InterpreterError(f"{function.name}: the shape of {buffer.name} is not known") from error
    name = buffer.dtype.name
    if name == dtypes.FP4:
        shape[-1] //= 2
    return torch.empty(shape, dtype=dtypes.argument_dtypes(name)[0])
