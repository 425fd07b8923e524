"""`dsv4-verify --mutate`: the kill rate over the kernels."""

import json

from rich.console import Console

from verify.mutate import table
from verify.mutate.instances import instances
from verify.mutate.operators import OPERATORS
from verify.mutate.run import Outcome, Work, run_work, to_json
from verify.report import progress
from verify.tasks import TaskError, Workers
from verify.verdict import EXIT_PROVED, EXIT_REFUTED

_SHARES = 4  # of an instance for each process: small enough that all end together
_WIDTH = 160  # of the table, where the output is no terminal


def measure(
    pool: Workers,
    kernels: tuple[str, ...],
    variants: tuple[str, ...],
    operators: tuple[str, ...],
    sample: int | None,
    as_json: bool,
) -> int:
    """Mutate, kill, print; return the exit status: 0 where the goals are met, else 1.

    Raises:
        TaskError: a name selects nothing.
    """
    names = [o.name for o in OPERATORS]
    chosen = [
        i
        for i in instances()
        if (not kernels or i.spec.name in kernels) and (not variants or i.variant in variants)
    ]
    if not chosen:
        raise TaskError("nothing to mutate: " + ", ".join(i.id for i in instances()))
    if unknown := set(operators) - set(names):
        raise TaskError(f"no operator called {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    shares = _SHARES if pool.jobs > 1 else 1
    work = [
        Work(i.id, operators or tuple(names), sample, share, shares)
        for i in chosen
        for share in range(shares)
    ]
    outcomes: list[Outcome] = []
    with progress(Console(stderr=True), len(work), "mutating") as advance:
        for found in pool.map(run_work, work, None):
            outcomes += found
            advance()
    if as_json:
        print(json.dumps({"percent": table.rate(outcomes), "mutants": to_json(outcomes)}, indent=2))  # noqa: T201
    else:
        console = Console(highlight=False)
        console.width = max(console.width, _WIDTH)
        console.print(f"{len(chosen)} kernels, {len(operators or names)} operators, z3 alone")
        table.print_table(console, outcomes)
    return EXIT_PROVED if table.is_met(outcomes) else EXIT_REFUTED
