"""Lower a PrimFunc as the compiler does for the target and keep every stage that is read.

Needs no GPU. Stages: `tile` (tile ops, before any lowering decision), `lowered` (after LowerTileOp:
loops and accesses over physical layouts, not yet flattened), `device` (what CUDA is printed from)
and `host` (TMA descriptors, launch extents, argument checks).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from verify import ir, parse
from verify.environment import compiler_environment

TARGET: Mapping[str, str] = {"kind": "cuda", "arch": "sm_90a"}
_TILE_STAGE = "tl.VerifyBufferInit"
_LOWERED_STAGE = "tl.LowerTileOp"
_TILE_CACHE_SIZE = 256
# What the compiler reads besides the PrimFunc and its environment: its own packages, and the solver it proves
# guards with.
_COMPILER = ("tilelang", "apache-tvm-ffi", "z3-solver")


@dataclass(frozen=True)
class Extracted:
    """One kernel at every stage.

    Attributes:
        name: of the PrimFunc.
        tile, lowered, device, host: the stages, parsed.
        cuda_text: the CUDA source that nvcc gets.
        cuda_sha256: of that text; joins certificates, GPU tests and benchmark rows.
        host_sha256: of the host function, which decides grid and descriptors.
    """

    name: str
    tile: ir.Function
    lowered: ir.Function
    device: ir.Function
    host: ir.Function
    cuda_text: str
    host_sha256: str = ""

    @property
    def cuda_sha256(self) -> str:
        """Identity of the compiled kernel."""
        return cuda_sha256(self.cuda_text)


def cuda_sha256(cuda_text: str) -> str:
    """Return the hex SHA-256 of a generated CUDA text."""
    return hashlib.sha256(cuda_text.encode()).hexdigest()


def source_sha256(
    prim_func: Any, target: Mapping[str, str] = TARGET, pass_configs: Mapping[str, Any] | None = None
) -> str:
    """Return a hash over everything that decides the CUDA text of `prim_func`, in milliseconds.

    Two runs with the same hash lower to the same text: it covers the PrimFunc (its whole text with metadata,
    and the compiler's structural hash, which sees what text might abbreviate), the target, the pass
    configuration, and the versions and the environment of the compiler.
    """
    import tilelang
    from tvm.ir import structural_hash

    from dsv4_kernels.tile.corrections import sources_sha256
    from dsv4_kernels.tile.simplifier import is_quick
    from dsv4_kernels.tile.wgmma import is_corrected

    parts = {
        "corrected": is_corrected(),
        "quick": is_quick(),
        "corrections": sources_sha256(),
        "prim_func": prim_func.script(show_meta=True),
        "structure": str(structural_hash(prim_func, map_free_vars=True)),
        "target": dict(target),
        "pass_configs": {name: repr(value) for name, value in (pass_configs or {}).items()},
        "compiler": _compiler_versions(),
        "environment": compiler_environment(os.environ, Path(tilelang.__file__).parent),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def _compiler_versions() -> dict[str, str]:
    return {package: metadata.version(package) for package in _COMPILER}


def extract(
    prim_func: Any,
    target: Mapping[str, str] = TARGET,
    pass_configs: Mapping[str, Any] | None = None,
) -> Extracted:
    """Lower `prim_func` for `target` and parse each stage.

    Args:
        prim_func: the tirx.PrimFunc.
        target: for which.
        pass_configs: of the compiler.

    Raises:
        UnsupportedIR: a stage holds a node that `verify.ir` has no meaning for, or there is not
            exactly one device kernel.
    """
    import tilelang
    from tilelang import tvm
    from tvm.ir.instrument import pass_instrument
    from tvm.target import Target

    from dsv4_kernels.tile import simplifier
    from verify import frontend

    frontend.keep()
    snapshots: dict[str, Any] = {}

    @pass_instrument
    class Snapshot:
        def run_after_pass(self, mod: Any, info: Any) -> None:
            if info.name in (_TILE_STAGE, _LOWERED_STAGE):
                snapshots[info.name] = mod

    chip = Target(dict(target))
    config = dict(pass_configs or {})
    passes = tvm.transform.PassContext(opt_level=3, config=config, instruments=[Snapshot()])
    with simplifier.lowering(), passes, chip:
        artifact = tilelang.lower(prim_func, target=chip)
    name = str(prim_func.attrs["global_symbol"])
    stages = (snapshots[_TILE_STAGE], snapshots[_LOWERED_STAGE], artifact.device_mod, artifact.host_mod)
    tile, lowered, device, host = (_only(stage, name) for stage in stages)
    host_digest = hashlib.sha256(artifact.host_mod.script(show_meta=True).encode()).hexdigest()
    return Extracted(name, tile, lowered, device, host, artifact.kernel_source, host_digest)


_MOST_KEPT = 6  # kernels; a variant's siblings are lowered for its sake, and checked soon after
# What this process lowered last, by `source_sha256`.
_kept: dict[str, Extracted] = {}


def lowered(prim_func: Any, pass_configs: Mapping[str, Any] | None, source: str) -> Extracted:
    """Return what `extract` gives, kept for a while by the kernel's `source_sha256`; no key, nothing kept.

    Raises:
        UnsupportedIR: as in `extract`.
    """
    if source in _kept:
        return _kept[source]
    found = extract(prim_func, pass_configs=pass_configs)
    if source:
        while len(_kept) >= _MOST_KEPT:
            del _kept[next(iter(_kept))]
        _kept[source] = found
    return found


def source_of(extracted: Extracted) -> str | None:
    """Return the `source_sha256` of what `lowered` gave not long ago, None of anything else."""
    return next((source for source, kept in _kept.items() if kept is extracted), None)


def _only(mod: Any, name: str) -> ir.Function:
    functions = [f for f in mod.functions.values() if hasattr(f, "body")]
    if len(functions) != 1:
        raise ir.UnsupportedIR(f"{name}: expected one function at this stage, found {len(functions)}")
    return parse.parse_function(functions[0], name)


@lru_cache(maxsize=_TILE_CACHE_SIZE)
def tile_function(prim_func: Any) -> ir.Function:
    """Return the tile stage of `prim_func`, as `extract(prim_func).tile`, in a few milliseconds.

    The passes after that stage do not run, so a kernel that they reject still has one. Results are
    kept by the PrimFunc's identity.

    Raises:
        UnsupportedIR: as in `extract`.
    """
    from tilelang import tvm
    from tilelang.backend import create_backend_context
    from tilelang.engine.lower import lower_to_host_device_ir
    from tvm.ir.instrument import pass_instrument
    from tvm.target import Target

    snapshots: list[Any] = []

    @pass_instrument
    class StopAtTileStage:
        # To end the pipeline by an exception costs more than a second: the compiler looks up its own
        # symbols for the first one.
        def should_run(self, mod: Any, info: Any) -> bool:
            del mod, info
            return not snapshots

        def run_after_pass(self, mod: Any, info: Any) -> None:
            if info.name == _TILE_STAGE:
                snapshots.append(mod)

    chip = Target(dict(TARGET))
    try:
        with tvm.transform.PassContext(opt_level=3, instruments=[StopAtTileStage()]), chip:
            lower_to_host_device_ir(prim_func, create_backend_context(chip, None, "auto"))
    except Exception:  # of the pipeline's own checks on what the skipped passes leave
        if not snapshots:
            raise
    return _only(snapshots[0], str(prim_func.attrs["global_symbol"]))
