"""REFUTED, shown by running it: a script for each counterexample, run by the device interpreter."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from verify import extract, ir
from verify.confirm import Confirmation, confirm
from verify.properties import Context
from verify.tasks import Task
from verify.verdict import Counterexample, VariantReport, Verdict

_SCRIPT = '''"""{title}

Runs the counterexample in the interpreter; exit status 0 where it shows the fault, 1 where it does not.
"""

import sys

from verify.replay import replay

# {comment}
confirmed, note = replay(
    kernel={kernel!r},
    variant={variant!r},
    file={file!r},
    prop={prop!r},
    shape={shape!r},
    block={block!r},
    thread={thread!r},
    loops={loops!r},
    values={values!r},
    message={message!r},
    dims={dims!r},
)
sys.stdout.write(note + "\\n")
sys.exit(0 if confirmed else 1)
'''


@dataclass(frozen=True)
class Replayed:
    """A REFUTED finding and what running it showed.

    Attributes:
        script: that runs it again.
        confirmed: the fault shows, and is of a kind that the property is about.
        by_run: in a run of the kernel; else in an evaluation of the claim.
        note: one line for people.
    """

    prop: str
    script: Path
    confirmed: bool
    by_run: bool
    note: str


def write(report: VariantReport, task: Task, folder: Path) -> list[Replayed]:
    """Write and run a script for each REFUTED finding of a report."""
    done = []
    folder.mkdir(parents=True, exist_ok=True)
    for result in report.properties:
        refuted = [f for f in result.findings if f.verdict is Verdict.REFUTED]
        for number, finding in enumerate(refuted):
            found = finding.counterexample or Counterexample({}, {}, {}, {}, {})
            arguments = {
                "kernel": task.kernel,
                "variant": task.variant,
                "file": str(Path(task.file).resolve()) if task.file else None,
                "dims": dict(task.dims),
                "prop": result.name,
                "shape": dict(found.shape) or dict(report.witness),
                "block": dict(found.block),
                "thread": dict(found.thread),
                "loops": dict(found.loops),
                "values": dict(found.values),
                "message": finding.message,
            }
            name = "-".join((task.kernel, task.variant, result.name, str(number)))
            script = folder / (re.sub(r"[^\w.-]", "_", name) + ".py")
            title = f"{task.kernel}/{task.variant}: REFUTED {result.name}."
            comment = " ".join(finding.message.split())
            script.write_text(_SCRIPT.format(title=title, comment=comment, **arguments))
            shown = confirmed(task, replace(found, shape=arguments["shape"]), result.name, finding.message)
            done.append(Replayed(result.name, script, shown.confirmed, shown.by_run, shown.note))
    return done


def replay_report(refuted: tuple[Task, VariantReport], folder: str) -> list[Replayed]:
    """Write and run the replay scripts of one report."""
    task, report = refuted
    return write(report, task, Path(folder))


def replay(
    *,
    kernel: str,
    variant: str,
    file: str | None,
    prop: str,
    shape: Mapping[str, int],
    block: Mapping[str, int],
    thread: Mapping[str, int],
    loops: Mapping[str, int],
    values: Mapping[str, Any],
    message: str = "",
    dims: Mapping[str, int] | None = None,
) -> tuple[bool, str]:
    """Run a kernel as a counterexample says; return whether the fault shows, and a line for people.

    Args:
        kernel: registered name, or the file's.
        variant: its id, or the name in the file's KERNELS.
        file: that defines the kernel; None for a registered one.
        prop: the property that is REFUTED; a fault of another kind does not confirm it.
        shape: value of each dim.
        block: launch indices by name.
        thread: likewise.
        loops: loop counters by name.
        values: what the property adds.
        message: of the finding.
        dims: of a registered kernel, which the library does not ship; none of the others.
    """
    task = Task(kernel, variant, file, dims=tuple(sorted((dims or {}).items())))
    found = Counterexample(shape, block, thread, loops, values)
    result = confirmed(task, found, prop, message)
    return result.confirmed, result.note


def confirmed(task: Task, found: Counterexample | None, prop: str, message: str) -> Confirmation:
    """Lower what a task names and confirm a finding on it."""
    loaded = task.load()
    try:
        with task.compiler():
            extracted = extract.extract(loaded.prim_func, pass_configs=loaded.pass_configs)
    except ir.UnsupportedIR as error:
        return Confirmation(False, False, f"not run: {error}")
    context = Context(extracted, loaded.contract, loaded.dims, dispatch=task.dispatch())
    return confirm(context, found, prop, message)


def figure(done: Sequence[Replayed]) -> str:
    """Return how many findings are confirmed, and how, as one line."""
    count, runs = sum(d.confirmed for d in done), sum(d.by_run for d in done)
    share = f" ({100 * count / len(done):.1f} %)" if done else ""
    ways = f"{runs} by runs, {count - runs} by evaluation"
    return f"replay: {count} of {len(done)} REFUTED are confirmed{share}: {ways}"
