"""Record what every kernel gives on this GPU for the small cases, beside the interpreter's results.

MegaMoE's kernels are among them, beside plain PyTorch's results, which the interpreter's have to equal.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
import torch

from bench import megamoe_outputs, outputs
from bench.status import TEST_RESULTS


def records(kernels: tuple[str, ...]) -> Iterator[tuple[str, Callable[[], outputs.Outputs]]]:
    """Yield each case's name and what records it; MegaMoE's kernels go by the name of `mega_moe`."""
    for spec, case in outputs.cases():
        if not kernels or spec.name in kernels:
            yield f"{spec.name} {case.id}", partial(outputs.record, spec, case)
    if not kernels or megamoe_outputs.KERNEL in kernels:
        megamoe_outputs.precompile()
        for case in megamoe_outputs.CASES:
            yield f"{megamoe_outputs.KERNEL} {case.name}", partial(megamoe_outputs.record, case)


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=TEST_RESULTS,
    show_default="tests/results",
    help="Folder of <gpu>.jsonl.",
)
@click.option("--kernel", "kernels", multiple=True, metavar="NAME", help="Only this kernel; repeatable.")
def main(out: Path, kernels: tuple[str, ...]) -> None:
    """Run the small cases on this GPU and write one row each; exits 1 if one fails or differs."""
    if not torch.cuda.is_available():
        raise click.ClickException("requires an NVIDIA GPU")
    path = out / f"{torch.cuda.get_device_name().lower().replace(' ', '-')}.jsonl"
    failed = 0
    for name, record in records(kernels):
        try:
            row = record()
        except Exception as error:  # the other cases are still worth their rows
            failed += 1
            click.echo(f"{name}: {type(error).__name__}: {error}")
            continue
        outputs.write(path, [row])
        failed += not row.passed
        how = "bits" if row.deviation is None else f"{row.deviation:.3f} of the bound"
        click.echo(f"{name} ({row.variant}): {'agrees' if row.passed else 'DIFFERS'}, {how}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
