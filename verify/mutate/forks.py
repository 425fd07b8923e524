"""One instance's mutants in several processes, which share its lowering and what is proved of the kernel.

Preparing an instance costs as much as tens of its mutants: it is done once, in a process that then forks.
"""

import gc
import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from verify.mutate.kill import BaselineError
from verify.mutate.run import Options, Work, finish, prepared


@dataclass(frozen=True)
class Shared:
    """The work of one instance, and how many processes it gets."""

    work: Work
    width: int


def run_instance(shared: Shared, options: Options) -> str:
    """Check, run and replay each item in turn, and keep what is found.

    Returns:
        Why not all could be: the kernel itself is not PROVED, or a process ended.
    """
    work = shared.work
    if options.is_over:
        return ""
    begun = multiprocessing.get_context("fork").Value("i", 0)
    try:
        if shared.width == 1:
            _take(work, options, begun)
            return ""
        prepared(work.instance, options.replay).prove()
    except BaselineError as error:
        return str(error)
    return _forked(shared, options, begun)


def _forked(shared: Shared, options: Options, begun: Any) -> str:
    context = multiprocessing.get_context("fork")
    torch.set_num_threads(1)  # threads do not survive a fork
    gc.freeze()  # or a collection would copy every page
    children = [
        context.Process(target=_take, args=(shared.work, options, begun)) for _ in range(shared.width)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    gc.unfreeze()
    ended = [c.exitcode for c in children if c.exitcode]
    return f"{shared.work.instance}: processes ended with {ended}" if ended else ""


def _take(work: Work, options: Options, begun: Any) -> None:
    """Take the next item until there is none, or no time."""
    while not options.is_over:
        with begun.get_lock():
            number = begun.value
            begun.value += 1
        if number >= len(work.items):
            return
        finish(work, work.items[number], options)


def shared(work: Sequence[Work], seconds: Mapping[str, float], processes: int) -> list[Shared]:
    """Return each piece with its part of the processes, one at least: the longest first.

    Args:
        work: one piece for each instance.
        seconds: what a mutant of a kernel takes; as much as of the others where it is not known.
        processes: all there are.
    """
    usual = sum(seconds.values()) / len(seconds) if seconds else 1.0
    costs = {w.instance: len(w.items) * seconds.get(w.kernel, usual) for w in work}
    whole = sum(costs.values())
    ordered = sorted(work, key=lambda w: -costs[w.instance])
    return [Shared(w, max(1, round(processes * costs[w.instance] / whole))) for w in ordered]
