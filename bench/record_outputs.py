"""Record what every kernel gives on this GPU for the small cases, beside the interpreter's results."""

import sys
from pathlib import Path

import click
import torch

from bench import outputs
from bench.status import TEST_RESULTS


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
    for spec, case in outputs.cases():
        if kernels and spec.name not in kernels:
            continue
        try:
            row = outputs.record(spec, case)
        except Exception as error:  # the other cases are still worth their rows
            failed += 1
            click.echo(f"{spec.name} {case.id}: {type(error).__name__}: {error}")
            continue
        outputs.write(path, [row])
        failed += not row.passed
        how = "bits" if row.deviation is None else f"{row.deviation:.3f} of the bound"
        click.echo(f"{spec.name} {case.id} ({row.variant}): {'agrees' if row.passed else 'DIFFERS'}, {how}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
