"""Which device sites implement which step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.device import Site
from verify.refine.model import Model, Storage
from verify.refine.moves import is_atomic
from verify.refine.tile import COMPARED, Assign, Gemm, Reduce, Step
from verify.refine.waits import Waits

_DESCRIPTOR_CALLS = ("initialize_wgmma_descriptor", "increase_descriptor_offset")
_MMA = ("ptx_wgmma_rs", "ptx_wgmma_ss")


def match(model: Model) -> dict[int, list[Site]]:
    """Return the sites of each step, by step number; none where the device does not do it.

    Sites of one role come in the order of the steps; a site belongs to the next step that writes its
    storage and, where the compiler kept the source line, has that line.

    Raises:
        UnsupportedIR: a site belongs to no step, or a wait of the author's is not in its place.
    """
    found: dict[int, list[Site]] = {step.number: [] for step in model.tile.steps}
    position: dict[str, int] = {}
    pending: dict[str, list[Site]] = {}
    loops = _Loops()
    waits = Waits(model)
    reached: dict[str, int] = {}  # latest statement of a role
    for site in model.device.sites:
        if site.role == "all":
            start = max(position.values(), default=0)
        else:
            start = max(position.get(site.role, 0), position.get("all", 0))
        if isinstance(site.stmt, ir.Eval) and _call(site).op in COMPARED:
            before = waits.take(site)
            latest = max(n for role, n in (("", -1), *reached.items()) if _follows(model, role, site.role))
            if before is not None and before <= latest:
                raise UnsupportedIR(f"{_call(site).op} comes after a later statement of the tile program")
            if before is not None:
                position[site.role] = before
            continue
        if isinstance(site.stmt, ir.Eval) and _call(site).op in _DESCRIPTOR_CALLS:
            pending.setdefault(site.role, []).append(site)
            continue
        if _is_scratch(model, site):
            pending.setdefault(site.role, []).append(site)
            continue
        storage = _written(model, site)
        step = _next(model, site, storage, start)
        if isinstance(step, Gemm) and found[step.number] and pending.get(site.role):
            # New descriptors: the next product into the same accumulator.
            step = _next(model, site, storage, step.number + 1)
        if step is None:
            line = f"line {site.span.line}" if site.span else "no source line"
            raise UnsupportedIR(
                f"device statement ({line}) writing {storage.buffer.name} matches no statement"
            )
        if isinstance(step, (Gemm, Reduce)) and not found[step.number]:
            found[step.number] += pending.pop(site.role, [])
        found[step.number].append(site)
        position[site.role] = step.number
        reached[site.role] = max(reached.get(site.role, -1), step.number)
        loops.check(site, step)
    waits.finish()
    if any(pending.values()):
        raise UnsupportedIR("device statements that prepare something no statement uses")
    return found


def _follows(model: Model, earlier: str, role: str) -> bool:
    """Return whether threads of both roles meet, so that the order of their statements is one."""
    return earlier == role or not {earlier, role} <= model.device.roles.keys()


def _is_scratch(model: Model, site: Site) -> bool:
    """Return whether a site writes an accumulator that the compiler added."""
    if not isinstance(site.stmt, ir.Store) or site.stmt.buffer.scope != "local":
        return False
    return model.device_storage.get(site.stmt.buffer.data) is None


def _call(site: Site) -> ir.Call:
    assert isinstance(site.stmt, ir.Eval), "only calls have an operator"
    assert isinstance(site.stmt.value, ir.Call), "an Eval holds a call"
    return site.stmt.value


def _written(model: Model, site: Site) -> Storage:
    if isinstance(site.stmt, ir.Store):
        data = site.stmt.buffer.data
    else:
        call = _call(site)
        if call.op == "tma_load":
            data = next(a.data for a in call.args if isinstance(a, ir.AccessPtr))
        elif call.op == "tma_store":
            data = _target(model, call)
        elif call.op in _MMA:
            data = call.args[9] if call.op == "ptx_wgmma_rs" else call.args[10]
        else:
            raise UnsupportedIR(f"device call {call.op}")
    storage = model.device_storage.get(data) or model.tile_storage.get(data)  # type: ignore[arg-type]
    if storage is None:
        raise UnsupportedIR(f"store to {getattr(data, 'name', data)}, which is no buffer of the program")
    return storage


def _target(model: Model, call: ir.Call) -> ir.Var:
    """Return the tensor parameter that a TMA store writes.

    Raises:
        UnsupportedIR: the tensor map is not of this launch.
    """
    given = call.args[0]
    if isinstance(given, ir.AccessPtr):
        return given.data
    descriptor = model.host.descriptors.get(given)  # type: ignore[call-overload]
    if descriptor is None:
        raise UnsupportedIR("TMA store without a tensor map of this launch")
    storage = model.tile_storage[descriptor.tensor.data]
    return next((var for var, own in model.device_storage.items() if own is storage), descriptor.tensor.data)


def _next(model: Model, site: Site, storage: Storage, start: int) -> Step | None:
    is_mma = isinstance(site.stmt, ir.Eval) and _call(site).op in _MMA
    if isinstance(site.stmt, ir.Store) and site.span is None and storage.is_global:
        # Without a line, of the statements that write a tensor the first that reads the same ones.
        read = _tensors(model.device_storage, site.stmt.value)
        for step in model.tile.steps[start:]:
            if not isinstance(step, Assign) or is_atomic(step.value):
                continue
            writes = model.tile_storage.get(step.dst.data) is storage
            if writes and _tensors(model.tile_storage, step.value) == read:
                return step
    found = None
    for step in model.tile.steps[start:]:
        if model.tile_storage.get(step.dst.data) is not storage or isinstance(step, Gemm) != is_mma:
            continue
        if isinstance(site.stmt, ir.Store):
            # A library macro's statements have that file's lines; there is one step at each of them, or for
            # each tensor that the macro was called with.
            placed = site.span is None or site.span.line in step.lines
            if placed and is_atomic(site.stmt.value) == (isinstance(step, Assign) and is_atomic(step.value)):
                if not isinstance(step, Assign) or _reads_alike(model, site.stmt.value, step.value):
                    return step
                found = found or step
        elif is_mma or _is_plain_copy(step):
            return step
    return found


def _reads_alike(model: Model, device: ir.Expr, tile: ir.Expr) -> bool:
    """Return whether both levels' values read the same arguments of the kernel."""

    def arguments(storages: Mapping[ir.Var, Storage], value: ir.Expr) -> set[int]:
        loads = [storages.get(e.buffer.data) for e in ir.walk(value) if isinstance(e, ir.Load)]
        return {id(s) for s in loads if s is not None and s.is_global}

    return arguments(model.device_storage, device) == arguments(model.tile_storage, tile)


def _tensors(storages: Mapping[ir.Var, Storage], value: ir.Expr) -> set[int]:
    return {id(storages.get(e.buffer.data)) for e in ir.walk(value) if isinstance(e, ir.Load)}


def _is_plain_copy(step: Step) -> bool:
    return isinstance(step, Assign) and isinstance(step.value, ir.Load)


@dataclass
class _Loops:
    """Which device loop plays which tile loop, and which serves a single parallel statement."""

    owners: dict[tuple[str, int], ir.Stmt] = field(default_factory=dict)
    shared: dict[int, int] = field(default_factory=dict)
    private: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def check(self, site: Site, step: Step) -> None:
        """Steps of one tile loop stay together in one device loop, and no other loop repeats them.

        Raises:
            UnsupportedIR: the device nests its loops in another way.
        """
        names = {loop.var.name: loop for loop in step.loops}
        played = []
        nest = tuple(id(v) for v, _ in step.coordinates) if isinstance(step, Assign) else ()
        nest = nest or (-1 - step.number,)
        for loop in site.loops:
            body = id(loop.body)
            own = names.get(loop.var.name)
            if own is None:
                if body in self.shared or self.private.setdefault(body, nest) != nest:
                    raise UnsupportedIR(f"device loop {loop.var.name} repeats several statements")
                continue
            played.append(own)
            first = self.owners.setdefault((site.role, id(own.var)), loop.body)
            if (
                first is not loop.body
                or body in self.private
                or self.shared.setdefault(body, id(own)) != id(own)
            ):
                raise UnsupportedIR(f"the loop over {own.var.name} was split or merged")
        seen = {id(loop) for loop in played}
        if played != [loop for loop in step.loops if id(loop) in seen or not loop.is_one_round]:
            raise UnsupportedIR(f"{step.what}: its loops are nested in another order on the device")


def is_copy_by_tma(sites: list[Site]) -> bool:
    """Return whether a step became TMA copies."""
    return any(isinstance(s.stmt, ir.Eval) and _call(s).op in ("tma_load", "tma_store") for s in sites)
