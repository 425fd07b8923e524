"""Processor time of this process that went to one thing, for reports."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Stopwatch:
    """Adds up the time of blocks.

    Attributes:
        seconds: of the processor, so far.
    """

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the block's time."""
        started = time.process_time()
        try:
            yield
        finally:
            self.seconds += time.process_time() - started


SECOND = Stopwatch()  # the second solver: reading, deciding and the cores
