"""What CTAs of the fused expert layer do when: `python -m bench.megamoe_timeline`, virtual ranks on one GPU.

    python -m bench.megamoe_timeline --ranks 4 --tokens 4096 --out timeline.png
    torchrun --nproc-per-node 4 -m bench.megamoe_timeline --tokens 4096 --out timeline.png   # a process a GPU

Plotted are tasks as an instrumented build of the kernel notes them (`megamoe.trace`). Times are of the kernel
as it is used: the layer, compute alone (every rank's tokens go to its own experts, as many rows), and of
of copies alone (same kernel and routing, nothing multiplied); overlap is the first over the longer one.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

from bench import machine
from bench.megamoe import SHAPES, TOPK, config
from bench.megamoe_ranks import RanksDevice, random_experts
from bench.timer import CudaDevice, time_call

KERNEL = "mega_moe_timeline"
EVENTS = 1024  # a track
SCALE_CHANNELS = 128
_WARM = 3
_KINDS = {1: "dispatch", 2: "linear 1", 3: "linear 2", 4: "last barrier", 5: "combine"}
_COLOURS = {1: "tab:green", 2: "tab:blue", 3: "tab:orange", 4: "lightgrey", 5: "tab:red"}
COPIES = {"copies_only": True}  # changes of the kernel's Config
TRACED = {"trace": EVENTS}


def virtual_config(model: str, tokens: int, ranks: int, multiprocessors: int) -> Any:
    """Return the kernel of all ranks on one GPU, an equal share of its multiprocessors each."""
    base = config(model, tokens, multiprocessors, ranks=ranks)
    ctas = base.ctas_per_sm * (multiprocessors // ranks)
    return replace(base, num_ranks=ranks, launch_ranks=ranks, ctas=ctas)


def routed(model: str, tokens: int, ranks: int, rank: int, *, at_home: bool) -> tuple[torch.Tensor, ...]:
    """Return a rank's x [tokens, hidden] e4m3, scales, experts [tokens, 6] int32 evenly spread, weights.

    Args:
        model: of SHAPES.
        tokens: of the rank.
        ranks: how many there are.
        rank: whose tokens.
        at_home: experts are the rank's own.
    """
    from dsv4_kernels.quant.act_quant import act_quant

    s = SHAPES[model]
    generator = torch.Generator("cuda").manual_seed(100 + rank)
    options: Any = {"generator": generator, "device": "cuda"}
    x = torch.randn(tokens, s["hidden"], **options).bfloat16()
    scores = torch.rand(tokens, s["experts"] * (1 if at_home else ranks), **options)
    idx = scores.topk(TOPK, -1).indices + (s["experts"] * rank if at_home else 0)
    return *act_quant(x, SCALE_CHANNELS), idx.int(), torch.rand(tokens, TOPK, **options)


class Virtual:
    """All ranks on this GPU, an equal share of its multiprocessors each."""

    def __init__(self, model: str, tokens: int, ranks: int) -> None:
        """Lay out the weights of all ranks."""
        from megamoe.weights import pack

        s, device = SHAPES[model], torch.device("cuda")
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self.config = virtual_config(model, tokens, ranks, multiprocessors)
        experts = [random_experts(model, s["experts"], rank) for rank in range(ranks)]
        self._weights = pack([(e.l1.stacked(), e.l2.stacked()) for e in experts])
        self.model, self.tokens, self.ranks, self.device = model, tokens, ranks, CudaDevice()

    def layer(self, *, at_home: bool, changes: dict[str, Any]) -> tuple[Callable[[], Any], Any]:
        """Return a call of the layer, and its `VirtualRanks`."""
        from megamoe.virtual import VirtualRanks

        c = replace(self.config, **changes)
        moe = VirtualRanks(c, self._weights)
        parts = [routed(self.model, self.tokens, self.ranks, r, at_home=at_home) for r in range(self.ranks)]
        x, scale, idx, weights = (torch.stack([p[i].view(v) for p in parts]) for i, v in enumerate(
            (torch.uint8, torch.uint8, torch.int32, torch.float32)
        ))  # fmt: skip
        codes = x.view(torch.float8_e4m3fn)

        def call() -> torch.Tensor:
            return moe.launch(codes, scale, idx, moe.plan(idx, weights))

        return call, moe


class Real:
    """A process a GPU, started by torchrun."""

    def __init__(self, model: str, tokens: int, ranks: int) -> None:
        """Make this rank's experts."""
        self.experts = random_experts(model, SHAPES[model]["experts"], dist.get_rank())
        self.model, self.tokens, self.ranks, self.device = model, tokens, ranks, RanksDevice()

    def layer(self, *, at_home: bool, changes: dict[str, Any]) -> tuple[Callable[[], Any], Any]:
        """Return a call of the layer, and its `VirtualRanks`."""
        from megamoe.layer import FusedLayer

        fused = FusedLayer(self.experts, topk=TOPK, max_tokens=self.tokens, timeout_s=20.0, changes=changes)
        inputs = routed(self.model, self.tokens, self.ranks, dist.get_rank(), at_home=at_home)

        def call() -> torch.Tensor:
            return fused(*inputs, self.tokens)[0]

        return call, fused.sized(inputs[0], self.tokens).ranks


def measure(place: Virtual | Real) -> tuple[dict[str, Any], list[Any]]:
    """Return a row of times, and the events of one launch."""
    row: dict[str, Any] = {"model": place.model, "tokens": place.tokens, "ranks": place.ranks}
    row["virtual"] = isinstance(place, Virtual)
    cases: dict[str, tuple[bool, dict[str, Any]]] = {
        "us": (False, {}),
        "compute_us": (True, {}),
        "copies_us": (False, COPIES),
    }
    for name, (at_home, changes) in cases.items():
        call, moe = place.layer(at_home=at_home, changes=changes)
        row[name] = _slowest(time_call(call, place.device).us)
        moe.check()
        del call, moe
    row["overlap"] = row["us"] / max(row["compute_us"], row["copies_us"])
    call, moe = place.layer(at_home=False, changes=TRACED)
    for _ in range(_WARM):
        call()
    moe.check()
    moe.events()
    if dist.is_initialized():
        dist.barrier()
    call()
    moe.check()
    return row, moe.events()


def _slowest(us: float) -> float:
    if not dist.is_initialized():
        return us
    found = torch.tensor(us, device="cuda", dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def summary(events: list[Any]) -> dict[str, Any]:
    """Return mean durations and shares of each kind of task, and what CTAs spent doing nothing noted."""
    found: dict[str, Any] = {}
    span = max(e.end_us for e in events)
    ctas = len({(e.rank, e.cta) for e in events})
    for track, whose in enumerate(("consumers", "finishers")):
        for kind, name in _KINDS.items():
            times = [e.end_us - e.begin_us for e in events if (e.track, e.kind) == (track, kind)]
            if times:
                found[f"{whose}, {name}"] = {
                    "tasks": len(times),
                    "mean_us": sum(times) / len(times),
                    "most_us": max(times),
                    "share": sum(times) / (span * ctas),
                }
    found["span_us"] = span
    return found


def plot(events: list[Any], title: str, out: Path) -> None:
    """Write a timeline: a panel a rank, a row a CTA, its finishers in the lower third of the row."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    ranks = sorted({e.rank for e in events})
    figure, axes = plt.subplots(len(ranks), 1, figsize=(14, 3.2 * len(ranks) + 1), sharex=True, squeeze=False)
    for axis, rank in zip(axes[:, 0], ranks, strict=True):
        for kind, colour in _COLOURS.items():
            for track, (low, height) in enumerate(((0.0, 0.6), (0.65, 0.3))):
                mine = [e for e in events if (e.rank, e.kind, e.track) == (rank, kind, track)]
                by_cta: dict[int, list[tuple[float, float]]] = {}
                for e in mine:
                    by_cta.setdefault(e.cta, []).append((e.begin_us, e.end_us - e.begin_us))
                for cta, bars in by_cta.items():
                    axis.broken_barh(
                        bars, (cta + low, height), facecolors=colour, edgecolors="white", linewidth=0.1
                    )
        axis.set_ylabel(f"rank {rank}, CTA")
        axis.invert_yaxis()
    axes[-1, 0].set_xlabel("us")
    figure.suptitle(title)
    figure.legend(
        handles=[Patch(color=_COLOURS[k], label=name) for k, name in _KINDS.items()],
        loc="lower right",
        ncol=5,
    )
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


@click.command()
@click.option("--model", type=click.Choice(sorted(SHAPES)), default="flash")
@click.option("--tokens", default=4096, help="Of a rank.")
@click.option("--ranks", default=4, help="Virtual ranks; under torchrun, its processes are the ranks.")
@click.option("--out", type=click.Path(path_type=Path), help="The plot: .png or .svg.")
@click.option("--rows", type=click.Path(path_type=Path), help="A JSON line is appended to this file.")
@click.option("--events", "kept", type=click.Path(path_type=Path), help="The events, as JSON.")
def main(model: str, tokens: int, ranks: int, out: Path | None, rows: Path | None, kept: Path | None) -> None:
    """Plot the waves of the fused expert layer, and time it beside compute and copies alone."""
    is_real = "LOCAL_RANK" in os.environ
    if is_real:
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        ranks = dist.get_world_size()
    row, events = measure((Real if is_real else Virtual)(model, tokens, ranks))
    if is_real:  # each GPU's timer has an origin of its own: ranks begin together
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, events)
        events = [e for mine in everyone for e in mine]
    if not is_real or dist.get_rank() == 0:
        row |= {"kernel": KERNEL, "events": summary(events)}
        click.echo(json.dumps({k: v for k, v in row.items() if k != "events"}))
        for name, value in row["events"].items():
            click.echo(f"  {name}: {value}")
        row |= {"machine": machine.describe(), "commit": machine.commit(), "date": machine.now()}
        if rows:
            with rows.open("a") as file:
                file.write(json.dumps(row, sort_keys=True) + "\n")
        if kept:
            kept.write_text(json.dumps([asdict(e) for e in events]))
        if out:
            which = f"{ranks} {'GPUs' if is_real else 'virtual ranks on one GPU'}"
            plot(events, f"MegaMoE, {model}, {tokens} tokens a rank, {which}: {row['us']:.0f} us", out)
    if is_real:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
