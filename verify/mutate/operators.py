"""Every mutation operator there is."""

from verify.mutate import control, memory, sync, value
from verify.mutate.mutant import Operator

OPERATORS: tuple[Operator, ...] = (
    *control.OPERATORS,
    *memory.OPERATORS,
    *sync.OPERATORS,
    *value.OPERATORS,
)


def get(name: str) -> Operator:
    """Return the operator called `name`."""
    return next(o for o in OPERATORS if o.name == name)
