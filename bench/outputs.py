"""Outputs of kernels on the GPU against the interpreter: recorded there, compared again where there is none.

A kernel without a tolerance (casts, quantisers, routing, layouts) gives the interpreter's bits: a row keeps
the SHA-256 of each output, and any machine can compare its interpreter with them.

A kernel that adds in floating point has a tolerance: a bound on the distance of either result from the exact
one, derived from the order in which sm_90a adds (the kernel's reference module says how). The interpreter
adds the terms of one tile op exactly and rounds once, so its own distance is within that bound as well, and
the two results are at most twice the bound apart. A row keeps the largest distance in units of that.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import dsv4_kernels
from bench.status import OUTPUTS_PREFIX
from dsv4_kernels import runtime
from dsv4_kernels.registry import Case, KernelSpec, all_kernels
from verify.extract import cuda_sha256

SEED = 7
_NAN_HAS_PAYLOAD = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DISTANCES = 2  # in tolerances: the interpreter's from the exact result, and the GPU's


@dataclass(frozen=True)
class Outputs:
    """What one case gave on a GPU.

    Attributes:
        inputs, outputs: SHA-256 of each tensor.
        deviation: largest distance from the interpreter's result over the bound on it; None where the kernel
            has no tolerance and bits are compared.
        passed: equal bits, or a deviation of at most 1.
    """

    kernel: str
    variant: str
    cuda_sha256: str
    test: str
    case: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    deviation: float | None
    passed: bool
    gpu: str
    torch: str
    commit: str
    date: str


def digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's type, shape and bytes; every NaN of 16 bits or more counts as one."""
    tensor = tensor.detach().cpu()
    if tensor.dtype in _NAN_HAS_PAYLOAD:
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
    head = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    octets = tensor.contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(head + octets.numpy().tobytes()).hexdigest()


def cases() -> Iterator[tuple[KernelSpec, Case]]:
    """Yield every case that is compared: those of the tests that launch something."""
    for spec in all_kernels():
        for case in spec.cases:
            if "test" in case.tags and make_inputs(spec, case)[0].numel():  # else nothing is launched
                yield spec, case


def make_inputs(spec: KernelSpec, case: Case) -> tuple[Any, ...]:
    """Return the inputs of a case, made on the CPU so that every machine has the same."""
    return spec.make_inputs(case.dims, torch.device("cpu"), SEED)


def interpreted(spec: KernelSpec, inputs: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """Return what the interpreter makes of `inputs`."""
    with dsv4_kernels.backend("interpret"):
        return as_tuple(spec.fn(*inputs))


def as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    """Return one output or several as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def deviation(
    spec: KernelSpec, inputs: tuple[Any, ...], got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]
) -> float:
    """Return the largest |got - want| in units of its bound; infinite where only one is NaN or infinite."""
    assert spec.tolerance is not None, "a kernel without a bound is compared by its bits"
    exact = as_tuple(spec.reference(*inputs))
    worst = 0.0
    for g, w, bound in zip(got, want, spec.tolerance(*exact, *inputs), strict=True):
        g, w = g.double(), w.double()
        same = (g == w) | (g.isnan() & w.isnan())
        ratio = (g - w).abs() / (_DISTANCES * bound)
        ratio = torch.where(same, 0.0, torch.where(ratio.isnan(), torch.inf, ratio))
        worst = max(worst, float(ratio.max()) if ratio.numel() else 0.0)
    return worst


def record(spec: KernelSpec, case: Case) -> Outputs:
    """Run a case on the GPU and compare it with the interpreter."""
    inputs = make_inputs(spec, case)
    given = tuple(digest(i) for i in inputs if isinstance(i, torch.Tensor))  # a kernel may write in place
    on_gpu = (i.cuda() if isinstance(i, torch.Tensor) else i for i in inputs)
    got = tuple(t.cpu() for t in as_tuple(spec.fn(*on_gpu)))
    want = interpreted(spec, inputs)
    hashes = tuple(digest(t) for t in got)
    far = deviation(spec, inputs, got, want) if spec.tolerance else None
    passed = far <= 1 if far is not None else hashes == tuple(digest(t) for t in want)
    variant = spec.select(case.dims)
    return Outputs(
        kernel=spec.name,
        variant=variant.id,
        cuda_sha256=cuda_sha256(runtime.compiled(spec.make_kernel, variant.kwargs).get_kernel_source()),
        test=f"{OUTPUTS_PREFIX}{case.id}",
        case=case.id,
        inputs=given,
        outputs=hashes,
        deviation=far,
        passed=passed,
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        commit=os.environ.get("DSV4_COMMIT", ""),
        date=datetime.now(UTC).date().isoformat(),
    )


def write(path: Path, rows: list[Outputs]) -> None:
    """Put `rows` into a file of test results, in the place of earlier ones of the same cases."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = {(r.kernel, r.test) for r in rows}
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.strip() and _key(line) not in fresh]
    kept += [json.dumps(asdict(r), sort_keys=True) for r in rows]
    path.write_text("\n".join(kept) + "\n")


def _key(line: str) -> tuple[str, str]:
    row = json.loads(line)
    return row["kernel"], row.get("test", "")


def read(folder: Path) -> list[Outputs]:
    """Return the recorded outputs in all files of test results in `folder`."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in filter(str.strip, path.read_text().splitlines()):
            row = json.loads(line)
            if row.get("test", "").startswith(OUTPUTS_PREFIX):
                lists = {name: tuple(row[name]) for name in ("inputs", "outputs")}
                found.append(Outputs(**{**row, **lists}))
    return found
