"""Buffers that are filled ahead of time, by a producer or for a later stage of a pipeline.

The device keeps one copy of such a buffer per stage and lets the producer run ahead. That is the
tile program's meaning only if each iteration fills the buffer before it reads it: then which
iteration's contents are meant never depends on what an earlier iteration left behind.
"""

import numpy as np

from verify import ir
from verify.ir import UnsupportedIR
from verify.layouts import grid, row_major
from verify.refine.device import Site
from verify.refine.evaluate import Evaluator
from verify.refine.inline import loads
from verify.refine.model import Model, Storage
from verify.refine.sym import const
from verify.refine.tile import Assign, Gemm, Reduce, Step

_PRODUCER = "producer"


def reads(step: Step) -> set[ir.Var]:
    """Return the storages whose contents a step uses."""
    exprs: tuple[ir.Expr, ...] = step.guards
    found: set[ir.Var] = set()
    match step:
        case Assign(indices=indices, value=value):
            exprs = (*exprs, *indices, value)
        case Gemm(a=ir.Region() as a, b=ir.Region() as b, c=ir.Region() as c, clear=clear):
            found = {a.buffer.data, b.buffer.data, c.buffer.data}
            exprs = (*exprs, *a.mins, *b.mins, *c.mins, clear)
        case Reduce(src=ir.Region(buffer=src), to=ir.Region(buffer=to), clear=clear):
            found = {src.data} if clear else {src.data, to.data}
    return found | {load.buffer.data for e in exprs for load in loads(e)}


def check_handover(model: Model, sites: dict[int, list[Site]]) -> None:
    """Check every buffer that a producer fills or that has several stages, and what producers read.

    Raises:
        UnsupportedIR: an iteration may read what an earlier one left, or a producer may read what
            the kernel writes.
    """
    ahead: set[ir.Var] = set()
    for step in model.tile.steps:
        if any(site.role == _PRODUCER for site in sites[step.number]):
            ahead.add(step.dst.data)
            for data in reads(step):
                if not model.tile_storage[data].is_global or data in model.written_tensors:
                    raise UnsupportedIR(
                        f"{step.what}: the producer reads {data.name}, which the kernel writes"
                    )
    staged = {d for d, s in model.tile_storage.items() if s.shared is not None and s.shared.stages > 1}
    for data in ahead | staged:
        _check_storage(model, model.tile_storage[data], data, sites)


def _check_storage(model: Model, storage: Storage, data: ir.Var, sites: dict[int, list[Site]]) -> None:
    name = storage.buffer.name
    users = [s for s in model.tile.steps if s.dst.data is data or data in reads(s)]
    ahead = [s for s in users if any(x.role == _PRODUCER for x in sites[s.number])] or users[:1]
    if not ahead or not ahead[0].loops:
        raise UnsupportedIR(f"{name} is filled ahead outside of a loop")
    loop = ahead[0].loops[-1]
    if any(loop not in step.loops for step in users):
        raise UnsupportedIR(f"{name} is used outside of the loop that fills it ahead")
    filling = []
    for step in users:
        if not isinstance(step, Assign) or step.dst.data is not data or step.loops[-1] is not loop:
            break
        filling.append(step)
    late = [s for s in users if s not in filling and any(x.role == _PRODUCER for x in sites[s.number])]
    if any(step.guards or data in reads(step) for step in filling) or late:
        raise UnsupportedIR(f"{name} is filled ahead under a condition or after it was read")
    filled: set[int] = set()
    for step in filling:
        filled |= set(_elements(model, step).tolist())
    size = int(np.prod(storage.shared.shape, dtype=np.int64)) if storage.shared else -1
    if len(filled) != size:
        raise UnsupportedIR(f"an iteration may read elements of {name} that it did not fill")


def _elements(model: Model, step: Assign) -> np.ndarray:
    points = grid(tuple(size for _, size in step.coordinates)) if step.coordinates else ()
    env = {var: const(p) for (var, _), p in zip(step.coordinates, points, strict=True)}
    evaluator = Evaluator(model.algebra, {**model.tile_env, **env})
    shape = tuple(int(s.value) for s in step.dst.shape if isinstance(s, ir.Const))
    flat = row_major(tuple(evaluator.int(i) for i in step.indices), shape)
    if not flat.is_constant:
        raise UnsupportedIR(f"{step.what} fills a part that depends on a symbol")
    return np.unique(np.atleast_1d(np.asarray(flat.constant)))


def check_parallel(model: Model) -> None:
    """Statements of one parallel loop may use each other's results only at the same iteration.

    Raises:
        UnsupportedIR: one reads an element that another iteration may write.
    """
    groups: dict[tuple[int, ...], list[Assign]] = {}
    for step in model.tile.steps:
        if isinstance(step, Assign) and step.coordinates:
            groups.setdefault(tuple(id(v) for v, _ in step.coordinates), []).append(step)
    for steps in groups.values():
        if len(steps) > 1:
            _check_group(model, steps)


def _check_group(model: Model, steps: list[Assign]) -> None:
    points = grid(tuple(size for _, size in steps[0].coordinates))
    env = {var: const(p) for (var, _), p in zip(steps[0].coordinates, points, strict=True)}
    for loop in {id(x): x for step in steps for x in step.loops}.values():
        env[loop.var], _ = model.loop_symbol(loop)
    evaluator = model.evaluator("tile", env)
    for writer in steps:
        own = tuple(evaluator.int(i).key for i in writer.indices)
        for reader in steps:
            exprs = (reader.value, *reader.indices, *reader.guards)
            for load in (x for e in exprs for x in loads(e) if x.buffer.data is writer.dst.data):
                if load.buffer is not writer.dst or tuple(evaluator.int(i).key for i in load.indices) != own:
                    raise UnsupportedIR(f"{reader.what} reads elements that other iterations write")
