"""Kernels of GPU tests, put into the compiler's cache side by side: one after the other they take minutes."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.megamoe_precompile import KINDS, Product, compile_kind, cores, dense_products
from bench.precompile import compile_all
from megamoe.config import Config
from tests.megamoe import layers


@dataclass(frozen=True)
class Kernel:
    """One of a layer's kernels."""

    config: Config
    kind: str

    def compile(self) -> None:
        """Compile it as the layer would."""
        compile_kind(self.kind, self.config)


def kernels(configs: Sequence[Config], kinds: Sequence[str] = KINDS) -> list[Kernel]:
    """Return the kernels of layers, the longest to compile first."""
    return [Kernel(c, kind) for kind in kinds for c in configs]


def products(rows: int, *, fp8: bool = False) -> list[Product]:
    """Return the products of one process with all experts, of up to `rows` rows each."""
    return [p for n, k in layers.SHAPES for p in dense_products(n, k, rows, fp8=fp8)]


def side_by_side(work: Sequence[Kernel | Product]) -> None:
    """Compile."""
    assert not compile_all(list(dict.fromkeys(work)), cores(), echo=lambda line: None)
