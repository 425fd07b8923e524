"""Which elements of an output a statement writes: what tells two ways to compute it apart.

Where statements compute a tensor in several ways, another variant has to have the same ways, and each of them
of the same elements.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from verify.refine.evaluate import Cond
from verify.refine.sym import Atom, Sym
from verify.signature import finite
from verify.signature.terms import show_sym

MAX_ELEMENTS = 1 << 22  # of a row, that are looked at one by one

# Of each element of a row whether it is written; or, of too many, the condition as text.
Region = np.ndarray | str


def region_of(cond: Cond, axes: Sequence[Sym]) -> Region:
    """Return for which elements along `axes`, symbols from 0 on, `cond` holds."""
    atoms: list[Atom] = [next(iter(axis.atoms())) for axis in axes]
    highs = [a.high for a in atoms]
    own = finite.variables(cond)
    shape = tuple(-1 if high is None else high + 1 for high in highs)
    size = int(np.prod(shape, dtype=np.int64))
    if own is None or not set(own) <= set(atoms) or min(shape, default=1) < 0 or size > MAX_ELEMENTS:
        return _text(cond)
    points = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij", sparse=True)
    return np.broadcast_to(finite.truth(cond, dict(zip(atoms, points, strict=True))), shape)


def digest_of(name: str, dtype: object, ways: Iterable[tuple[str, Region]]) -> str:
    """Return the hash of an output: of the ways in which it is computed, and of which elements each is.

    Args:
        name: of the tensor.
        dtype: its type.
        ways: of each statement the hash of its term, and what it writes.
    """
    found: dict[str, list[Region]] = {}
    for digest, region in ways:
        found.setdefault(digest, []).append(region)
    texts = sorted(found)
    if len(found) > 1:  # the only way is of all elements: each is written (`coverage`)
        texts = sorted(f"{digest} of {_joined(regions)}" for digest, regions in found.items())
    return hashlib.sha256(f"{name}:{dtype}:{','.join(texts)}".encode()).hexdigest()


def _joined(regions: Sequence[Region]) -> str:
    masks = [r for r in regions if isinstance(r, np.ndarray)]
    texts = sorted({r for r in regions if isinstance(r, str)})
    if masks:
        mask = np.packbits(np.any(masks, axis=0))
        texts.append(hashlib.sha256(mask.tobytes()).hexdigest())
    return " or ".join(texts)


def _text(cond: Cond) -> str:
    parts = []
    for literal in cond.literals.values():
        value = literal.value
        shown = show_sym(value) if isinstance(value, Sym) else " or ".join(sorted(map(_text, value)))
        parts.append(f"({literal.kind} {shown})")
    return f"{bool(np.all(cond.mask))} {' and '.join(sorted(parts))}"
