"""What a long run shows: on a terminal, after a while, how many blocks are done and the line that runs."""

import sys
import time
from pathlib import Path
from typing import Any

from verify import ir

_QUIET_S = 2.0  # runs shorter than this show nothing
_REFRESH_S = 0.1


class Progress:
    """A progress bar over the blocks of one launch; silent where stderr is no terminal."""

    def __init__(self, total: int) -> None:
        """Count `total` blocks."""
        self._total = total
        self._done = 0
        self._next = time.monotonic() + _QUIET_S if sys.stderr.isatty() else float("inf")
        self._bar: Any = None
        self._task: Any = None

    def advance(self, blocks: int) -> None:
        """Note that more blocks are done."""
        self._done += blocks

    def tick(self, span: ir.Span | None) -> None:
        """Show where the run is, unless it was shown a moment ago."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _REFRESH_S
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("interpreting"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            where = TextColumn("{task.description}")
            self._bar = Progress(*columns, where, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total)
        line = f"{Path(span.path).name}:{span.line}" if span else ""  # a whole path leaves the count no room
        self._bar.update(self._task, completed=self._done, description=line)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
