"""Work that is done once for an object: of a kernel by each of its suites, of a term by each question."""

from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, TypeVar

Maker = TypeVar("Maker", bound=Callable[..., Any])

MOST_KERNELS = 64  # results of one function that are kept; a suite asks of a kernel or two
MOST_TERMS = 1 << 14


def of_a_kernel(make: Maker) -> Maker:
    """Keep what a function returns of a function's IR, its only argument, for as long as it is asked for.

    What it returns must not be changed.
    """
    return _kept(make, id, MOST_KERNELS)


def of_a_term(make: Maker) -> Maker:
    """Keep what a function returns of a term, its first argument; those behind it are hashable."""
    return _kept(make, lambda term: (id(term.ctx), term.get_id()), MOST_TERMS)


def _kept(make: Callable[..., Any], number: Callable[[Any], Hashable], most: int) -> Any:
    known: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    @wraps(make)
    def found(of: Any, *more: Any) -> Any:
        key = (number(of), *more)
        if key not in known:
            result = make(of, *more)
            while len(known) >= most:
                del known[next(iter(known))]
            known[key] = of, result  # with the object: its number is nobody else's as long as it lives
        return known[key][1]

    return found
