"""Compile the fused expert layer's kernels into TileLang's disk cache, several at a time.

    python -m bench.megamoe_precompile --ranks 4 --model flash --tokens 8192 [--weights fp8] [--ring] [-j 16]
    python -m bench.megamoe_precompile --ranks 4 --tokens 4096 --virtual --timeline [--no-layer]

Each rank of several has kernels of its own (its number is a constant of them), and one for every size of the
layer's buckets. Processes that torchrun starts would each compile theirs, one after the other, while the rest
wait; what they find in the cache they load. `--products`: those of the layer without fusion, too.
"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import click

from bench.megamoe import RING_FROM, SHAPES, TOKENS, TOPK, WEIGHTS, ring_changes
from bench.megamoe import config as config_of
from bench.megamoe_timeline import COPIES, TRACED
from bench.megamoe_unfused import TILES
from bench.precompile import Compiled, Work, compile_all

_TIMEOUT_S = 20.0  # of the watchdog, as bench.megamoe_ranks has it
_MULTIPROCESSORS = 132  # of an H100 or H200, where there is no GPU to ask
KINDS = ("fused", "plan", "stage")  # a layer's kernels, the longest to compile first
_PLAIN = ("",)
_FORMS: dict[str, Callable[[], dict[str, Any]]] = {
    "": dict,
    "ring": ring_changes,
    "copies": lambda: dict(COPIES),
    "traced": lambda: dict(TRACED),
}
_EACH_ROW, _TILE_STEP = 1088, 64  # products differ by tiles of so many rows from here on
_SPREAD = (0.9, 1.1)  # rows of a rank, of those that an even routing sends it


@dataclass(frozen=True)
class Job:
    """One kernel of the layer.

    Attributes:
        kind: fused, plan or stage.
        model: of SHAPES.
        size: most tokens of a rank.
        ranks: how many there are.
        rank: whose kernel; None: that of all ranks in one launch.
        form: of _FORMS.
        fp8: weights are e4m3.
    """

    kind: str
    model: str
    size: int
    ranks: int
    rank: int | None
    form: str = ""
    fp8: bool = False

    def __str__(self) -> str:
        """Say which."""
        of = "all" if self.rank is None else self.rank
        weights = "fp8" if self.fp8 else "fp4"
        text = f"{self.kind} {self.model} {weights} {self.size} rank {of} of {self.ranks}"
        return f"{text} {self.form}".strip()

    def compile(self) -> None:
        """Compile it as `FusedLayer` would; of all ranks in one launch, as `bench.megamoe_timeline`."""
        from bench.megamoe_timeline import virtual_config
        from megamoe.layer import one_of

        if self.rank is None:
            config = virtual_config(self.model, self.size, self.ranks, _MULTIPROCESSORS)
        else:
            config = config_of(self.model, self.size, _MULTIPROCESSORS, fp8=self.fp8, ranks=self.ranks)
        if self.rank is not None and self.ranks > 1:
            config = one_of(config, self.ranks, self.rank, _TIMEOUT_S)
        compile_kind(self.kind, replace(config, **_FORMS[self.form]()))


def compile_kind(kind: str, config: Any) -> None:
    """Compile one of a layer's kernels (of KINDS) as the layer would."""
    from megamoe import fused, plan_kernel, stage_kernel
    from megamoe.virtual import compile_kernel

    compile_kernel(config, {"fused": fused, "plan": plan_kernel, "stage": stage_kernel}[kind].make_kernel)


@dataclass(frozen=True)
class Product:
    """One kernel that the layer without fusion takes: of a registered kernel, the variant of these dims."""

    kernel: str
    dims: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        """Say which."""
        return f"{self.kernel} {' '.join(f'{name}={value}' for name, value in self.dims)}"

    def compile(self) -> None:
        """Compile it as a call of the public function would."""
        from dsv4_kernels.registry import get_kernel

        Compiled(self.kernel, get_kernel(self.kernel).select(dict(self.dims))).compile()


def sizes(tokens: tuple[int, ...]) -> list[int]:
    """Return most tokens of the kernels that a layer for the largest of `tokens` takes for them."""
    from megamoe.layer import bucket

    return sorted({bucket(t, max(tokens)) for t in tokens})


def products(
    model: str, tokens: tuple[int, ...], ranks: int, *, fp8: bool, grouped: bool = True
) -> list[Product]:
    """Return the kernels that the unfused layer takes, whatever the routing, and those of the unfused chain.

    Args:
        model: of SHAPES.
        tokens: of a rank, of each call.
        ranks: that send rows to an expert.
        fp8: weights are e4m3.
        grouped: with the chain's, for even routing.
    """
    s = SHAPES[model]
    found = [Product("act_quant", (("m", 1), ("k", s["hidden"]), ("block_k", 128)))]
    most = ranks * max(tokens)
    for n, k in ((2 * s["inter"], s["hidden"]), (s["hidden"], s["inter"])):
        found += dense_products(n, k, most, fp8=fp8)
        if grouped:
            found += _grouped(n, k, s["experts"], tokens, fp8=fp8)
    return list(dict.fromkeys(found))


def dense_products(n: int, k: int, most: int, *, fp8: bool) -> list[Product]:
    """Return one expert's product by n x k weights of each variant for up to `most` rows."""
    from dsv4_kernels.gemm import fold
    from dsv4_kernels.registry import get_kernel

    found: list[Product] = []
    if not fp8 and fold.is_widened(most, n, k):
        found.append(Product("fp4_widen", (("n", n), ("k", k))))
    seen = set()
    many = (m for start in range(_EACH_ROW, most, _TILE_STEP) for m in (start, start + 1))
    for m in (*range(1, min(most, _EACH_ROW) + 1), *many, most):
        name = "fp8_gemm" if fp8 else "fp8_fp4_gemm_" + ("widened" if fold.is_widened(m, n, k) else "folded")
        dims = {"m": m, "n": n, "k": k} | ({"f32_scales": 0} if fp8 else {})
        key = name, get_kernel(name).select(dims).id
        if key not in seen:
            seen.add(key)
            found.append(Product(name, tuple(dims.items())))
    return found


def _grouped(n: int, k: int, experts: int, tokens: tuple[int, ...], *, fp8: bool) -> list[Product]:
    """Return a grouped product of each alignment that the chain takes for about so many tokens a rank."""
    from dsv4_kernels.gemm.grouped_layout import alignment_for

    low, high = _SPREAD
    found = {
        alignment_for(rows // experts, TILES[fp8])
        for t in tokens
        for rows in range(int(low * t * TOPK), int(high * t * TOPK) + 1)
    }
    dims = {"n": n, "k": k, "num_experts": experts}
    name = "grouped_fp8_gemm" if fp8 else "grouped_fp8_fp4_gemm"
    return [Product(name, tuple({**dims, "alignment": alignment}.items())) for alignment in sorted(found)]


def jobs(
    models: tuple[str, ...],
    tokens: tuple[int, ...],
    ranks: int,
    *,
    fp8: bool,
    ring: bool = False,
    virtual: bool = False,
    timeline: bool = False,
) -> Iterator[Job]:
    """Yield the layers' kernels, the longest to compile first."""
    for kind in KINDS[: 2 if virtual else 3]:
        for model in models:
            for size in sizes(tokens):
                forms = _PLAIN + ("ring",) * (ring and size >= RING_FROM)
                forms += ("copies", "traced") * (timeline and kind == "fused")
                for rank in [None] if virtual else range(ranks):
                    yield from (Job(kind, model, size, ranks, rank, form, fp8) for form in forms)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(sorted(SHAPES)), default=("flash",))
@click.option("--tokens", "tokens", multiple=True, type=int, default=TOKENS, help="Of a rank.")
@click.option("--ranks", default=1, help="A process each.")
@click.option("--weights", type=click.Choice(WEIGHTS), default="fp4", help="Of the routed experts.")
@click.option("--ring", is_flag=True, help=f"From {RING_FROM} tokens on, kernels with a ring too.")
@click.option("--virtual", is_flag=True, help="All ranks in one launch, as bench.megamoe_timeline has them.")
@click.option("--timeline", is_flag=True, help="Its kernels: copies alone, and traced.")
@click.option("--products", "with_products", is_flag=True, help="Of the layer without fusion, too.")
@click.option("--layer/--no-layer", "with_layer", default=True, help="The fused layer's kernels.")
@click.option("-j", "workers", default=cores(), help="Processes, 1 GB each.")
def main(
    models: tuple[str, ...],
    tokens: tuple[int, ...],
    ranks: int,
    weights: str,
    ring: bool,
    virtual: bool,
    timeline: bool,
    with_products: bool,
    with_layer: bool,
    workers: int,
) -> None:
    """Compile all kernels of these layers; needs nvcc. Exits 1 if one does not compile."""
    fp8 = weights == "fp8"
    work: list[Work] = []
    if with_layer:
        work += jobs(models, tokens, ranks, fp8=fp8, ring=ring, virtual=virtual, timeline=timeline)
    if with_products:
        work += [p for model in models for p in products(model, tokens, ranks, fp8=fp8)]
    sys.exit(1 if compile_all(list(dict.fromkeys(work)), workers) else 0)


if __name__ == "__main__":
    main()
