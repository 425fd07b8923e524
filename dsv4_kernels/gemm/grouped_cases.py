"""Shapes for tests and benchmarks of the grouped products: how many rows each expert has.

Dims: `rows` that count, `m` with padding, `num_experts`, `alignment` and `spread` (EVEN, UNEVEN, ONE).
"""

from collections.abc import Mapping

import torch

from dsv4_kernels.gemm.grouped_layout import alignment_for, contiguous_layout
from dsv4_kernels.registry import Case

# (n, k, experts) of a rank of eight: gate and up together, down; Flash, Pro.
SHAPES = ((4096, 4096, 32), (4096, 2048, 32), (6144, 7168, 48), (7168, 3072, 48))
EVEN, UNEVEN, ONE = 1, 2, 3  # equal shares; every other expert empty, the rest growing; all in one
_NAMES = {EVEN: "even", UNEVEN: "uneven", ONE: "one"}
_TOP_K = 6
_TOKENS = (8, 64, 512, 1024, 4096, 8192)  # of a batch whose routed pairs a rank's experts share


def counts_of(dims: Mapping[str, int]) -> list[int]:
    """Return the rows of each expert."""
    rows, experts = dims["rows"], dims["num_experts"]
    if dims["spread"] == EVEN:
        return [rows // experts + (e < rows % experts) for e in range(experts)]
    if dims["spread"] == ONE:
        return [rows if e == experts - 1 else 0 for e in range(experts)]
    shares = [e % 2 * (e + 1) for e in range(experts)]
    counts = [rows * share // max(sum(shares), 1) for share in shares]
    counts[-1] += rows - sum(counts)
    return counts


def experts_of(dims: Mapping[str, int], m: int, device: torch.device) -> torch.Tensor:
    """Return the [m] int32 expert of each row."""
    counts = torch.tensor(counts_of(dims), device=device)
    return contiguous_layout(counts, dims["alignment"], m)[0]


def busy_experts(dims: Mapping[str, int]) -> int:
    """Return how many experts have rows: whose weights have to be read."""
    return sum(count > 0 for count in counts_of(dims))


def _case(name: str, shape: tuple[int, int, int], rows: int, alignment: int, spread: int, *tags: str) -> Case:
    dims = dict(zip(("n", "k", "num_experts"), shape, strict=True))
    dims |= {"alignment": alignment, "rows": rows, "spread": spread}
    dims["m"] = sum(-(-count // alignment) * alignment for count in counts_of(dims))
    return Case(name, dims, tags)


def cases_of(
    shapes: tuple[tuple[int, int, int], ...], step_k: int, tiles: tuple[int, ...] = (128,)
) -> tuple[Case, ...]:
    """Return small cases for tests, and those of a rank's experts.

    Args:
        shapes: (n, k, experts) that ship.
        step_k: what k has to be a multiple of.
        tiles: heights of the tiles for many rows.
    """
    small = (128, step_k, 3)
    tests = [
        _case("no-rows", small, 0, 16, EVEN, "test"),
        _case("one-row", small, 1, 16, EVEN, "test"),
        _case("even", small, 50, 16, EVEN, "test"),
        _case("uneven", (256, 2 * step_k, 4), 90, 64, UNEVEN, "test"),
        _case("one-expert", small, 140, 128, ONE, "test"),
        _case("wide", (256, step_k, 2), 130, 128, EVEN, "test"),
        _case("middle", (256, step_k, 2), 100, 96, EVEN, "test"),
        _case("tall", (128, 2 * step_k, 2), 270, 256, EVEN, "test"),
    ]
    shipped = []
    for n, k, num_experts in shapes:
        for tokens in _TOKENS:
            rows = tokens * _TOP_K
            name = f"t{tokens}-n{n}-k{k}"
            alignment = alignment_for(-(-rows // num_experts), tiles)
            shipped.append(_case(name, (n, k, num_experts), rows, alignment, EVEN, "gpu", "bench"))
        rows = 512 * _TOP_K
        alignment = alignment_for(-(-rows // (num_experts // 2)), tiles)  # half of the experts have rows
        for spread in (UNEVEN, ONE):
            name = f"t512-n{n}-k{k}-{_NAMES[spread]}"
            shipped.append(_case(name, (n, k, num_experts), rows, alignment, spread, "gpu", "bench"))
        shipped.append(_case(f"rows64-n{n}-k{k}", (n, k, num_experts), 48 * num_experts, 64, EVEN, "gpu"))
    return (*tests, *shipped)
