"""Check and time our kernels, then peers on the same cases, and write rows as they come."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench import machine, peak, peers
from bench.adapters import ADAPTERS
from bench.check import check_case
from bench.rows import Row, read_rows, write_rows
from bench.timer import CudaDevice, Device, time_call
from dsv4_kernels import runtime
from dsv4_kernels.registry import Case, KernelSpec, Variant, all_kernels, get_kernel
from verify.extract import cuda_sha256

BENCH_TAG = "bench"
SEED = 0


@dataclass(frozen=True)
class Job:
    """One case of one kernel."""

    spec: KernelSpec
    case: Case

    @property
    def label(self) -> str:
        """Kernel and case, for people."""
        return f"{self.spec.name} {self.case.id}"


@dataclass
class Outcome:
    """What a run brought.

    Attributes:
        rows: one for each case that was right and could be timed.
        errors: (job, what went wrong) for each other case.
    """

    rows: list[Row] = field(default_factory=list)
    errors: list[tuple[Job, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Origin:
    """What all rows of a run share."""

    ceilings: peak.Ceilings
    machine: Mapping[str, str]
    commit: str
    date: str


class Reporter:
    """Hears how far a run is; this one keeps it to itself."""

    def start(self, steps: int) -> None:
        """Begin a run of so many steps."""

    def step(self, text: str) -> None:
        """Begin the next step."""

    def line(self, text: str) -> None:
        """Tell a result."""


def select_jobs(
    kernels: Sequence[str] = (), cases: Sequence[str] = (), dims: Sequence[Mapping[str, int]] = ()
) -> list[Job]:
    """Return the benchmark cases of the named kernels, or of all; `cases` may also name others of theirs.

    Args:
        kernels: names.
        cases: ids, or patterns of them as of a shell (`m*-n1536-*`).
        dims: instead of cases: dims of others, of each named kernel; the id says them (`m1-n1536-k4096`).

    Raises:
        KeyError: a kernel does not exist, no case is so named, or dims are not those of a kernel.
    """
    specs = all_kernels()
    unknown = set(kernels) - {spec.name for spec in specs}
    if unknown:
        raise KeyError(
            f"no kernel {', '.join(sorted(unknown))}; there are: {', '.join(s.name for s in specs)}"
        )
    chosen = [spec for spec in specs if not kernels or spec.name in kernels]
    if dims:
        return [Job(spec, _case(spec, one)) for spec in chosen for one in dims]
    ids = {case.id for spec in chosen for case in spec.cases}
    missing = {pattern for pattern in cases if not fnmatch.filter(ids, pattern)}
    if missing:
        raise KeyError(f"no case {', '.join(sorted(missing))} of {', '.join(s.name for s in chosen)}")
    return [
        Job(spec, case)
        for spec in chosen
        for case in spec.cases
        if (any(fnmatch.fnmatchcase(case.id, c) for c in cases) if cases else BENCH_TAG in case.tags)
    ]


def _case(spec: KernelSpec, dims: Mapping[str, int]) -> Case:
    """Return a case of dims that the kernel's own cases need not have."""
    known = list(dict.fromkeys(", ".join(sorted(case.dims)) for case in spec.cases))
    got = ", ".join(sorted(dims))
    if got not in known:
        raise KeyError(f"dims of {spec.name} are {' or '.join(known)}, got {got}")
    return Case("-".join(f"{name}{value}" for name, value in dims.items()), dims)


def run(
    jobs: Sequence[Job],
    out: Path,
    peer_names: Sequence[str] | None = None,
    peer_timeout_s: float = 300.0,
    reporter: Reporter | None = None,
) -> Outcome:
    """Measure `jobs` on the current GPU, then their peers, and append rows to `out`.

    Args:
        jobs: what to run.
        out: results file; holds every row that is complete so far at any time.
        peer_names: which peers; None for those that each kernel names, empty for none.
        peer_timeout_s: for all cases of one kernel under one peer.
        reporter: hears of progress.

    Returns:
        The new rows, and what failed.
    """
    hear = reporter or Reporter()
    specs = list({job.spec.name: job.spec for job in jobs}.values())
    visits = [(spec, name) for spec in specs for name in peers_of(spec, peer_names)]
    hear.start(1 + len(jobs) + len(visits))
    hear.step("ceilings")
    device = CudaDevice()
    ceilings = peak.measure(device)
    hear.line(", ".join(f"{name} {value:.0f}" for name, value in vars(ceilings).items()))
    origin = Origin(ceilings, machine.describe(), machine.commit(), machine.now())
    earlier = read_rows(out)
    outcome = Outcome()
    for job in jobs:
        hear.step(job.label)
        try:
            row = measure_job(job, device, origin, torch.device("cuda"))
        except Exception as error:  # one broken kernel must not hide the figures of the others
            outcome.errors.append((job, f"{type(error).__name__}: {error}"))
        else:
            outcome.rows.append(row)
            write_rows(out, [*earlier, *outcome.rows])
            hear.line(f"{job.label}: {row.us:.1f} us, {row.fraction_of_limit:.0%} of the limit")
    torch.cuda.empty_cache()  # peers run in processes of their own
    for spec, name in visits:
        hear.step(f"{spec.name}: {name}")
        if any(row.kernel == spec.name for row in outcome.rows):
            _add_peer(outcome.rows, spec, name, peer_timeout_s, hear)
            write_rows(out, [*earlier, *outcome.rows])
    return outcome


def peers_of(spec: KernelSpec, names: Sequence[str] | None) -> list[str]:
    """Return the peers to time beside `spec`: its own, or those of `names` that have a counterpart."""
    if names is None:
        return list(spec.peers)
    return [name for name in names if ADAPTERS[name].supports(spec.name)]


def measure_job(job: Job, device: Device, origin: Origin, where: torch.device) -> Row:
    """Check one case against the reference, time it, and return its row.

    Raises:
        WrongResultError: the outputs are not right; nothing was timed.
    """
    spec, dims = job.spec, job.case.dims
    inputs = spec.make_inputs(dims, where, SEED)
    check = check_case(spec, dims, inputs)
    timing = time_call(lambda: spec.fn(*inputs), device)
    chain = _chain_call(spec, dims, inputs)
    variant = spec.select(dims)
    num_bytes, num_flops = spec.num_bytes(dims), spec.num_flops(dims)
    limit_us, limited_by = origin.ceilings.limit_us(
        num_bytes, num_flops, origin.ceilings.matmul_tflops(inputs)
    )
    return Row(
        kernel=spec.name,
        variant=variant.id,
        case=job.case.id,
        dims=dict(dims),
        us=timing.us,
        p20_us=timing.p20_us,
        p80_us=timing.p80_us,
        replays=timing.replays,
        method=timing.method,
        checked=check.kind,
        worst_error=check.worst_error,
        num_bytes=num_bytes,
        num_flops=num_flops,
        limit_us=limit_us,
        limited_by=limited_by,
        chain_us=time_call(chain, device).us if chain else None,
        cuda_sha256=_running_digest(spec, variant),
        ceilings=vars(origin.ceilings),
        machine=origin.machine,
        commit=origin.commit,
        date=origin.date,
    )


def _running_digest(spec: KernelSpec, variant: Variant) -> str:
    """Return the digest of the CUDA text that was just timed."""
    return cuda_sha256(runtime.compiled(spec.make_kernel, variant.kwargs).get_kernel_source())


def _chain_call(
    spec: KernelSpec, dims: Mapping[str, int], inputs: tuple[Any, ...]
) -> Callable[[], Any] | None:
    """Return this kernel with the one that a peer's call includes too; None where no peer's does.

    The product of a bf16 input is cast and product; decode of few queries is parts and their fold, as is
    HCA decode in either form.
    """
    if spec.name == "sparse_parts":
        from dsv4_kernels.attention.sparse_decode import sparse_decode

        decode = get_kernel("sparse_decode").make_inputs(dims, inputs[0].device, SEED)
        return lambda: sparse_decode(*decode)
    if spec.name in ("hca_chunks", "hca_groups"):
        fold = get_kernel("hca_join" if spec.name == "hca_chunks" else "hca_fold").fn
        sink = torch.zeros(dims["num_heads"], device=inputs[0].device)
        return lambda: fold(*spec.fn(*inputs), sink)
    if spec.name != "fp8_fp4_gemm":
        return None
    from dsv4_kernels.quant.act_quant import act_quant

    _, _, w, w_scale = inputs
    generator = torch.Generator(w.device).manual_seed(SEED)
    x = torch.randn(dims["m"], dims["k"], generator=generator, device=w.device).to(torch.bfloat16)
    return lambda: spec.fn(*act_quant(x), w, w_scale)


def _add_peer(rows: list[Row], spec: KernelSpec, name: str, timeout_s: float, hear: Reporter) -> None:
    """Time peer `name` on the cases of `spec` in `rows` and put the results into them."""
    places = [place for place, row in enumerate(rows) if row.kernel == spec.name]
    results = peers.run_peer(name, spec.name, [rows[place].dims for place in places], timeout_s, hear.line)
    for index, place in enumerate(places):
        rows[place] = replace(rows[place], peers={**rows[place].peers, **results[index]})
