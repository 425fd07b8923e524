"""A timeline of the fused kernel: what each CTA did when, noted by an instrumented build (`Config.trace`).

Tracks of a CTA: its consumers (dispatch, products, the last barrier, combine) and its finishers. An event is
three words behind the watchdog's in the rank's status: what, begin and end, by the GPU's nanosecond timer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilelang import language as T

from megamoe.config import EVENT_WORDS, TRACKS, Config

BARRIER, COMBINE = 4, 5  # what is noted beside the kinds of tasks
_KIND_SHIFT, _BLOCK_SHIFT = 28, 8
_BLOCKS, _TILES = (1 << (_KIND_SHIFT - _BLOCK_SHIFT)) - 1, (1 << _BLOCK_SHIFT) - 1
_WORD = 1 << 32
SOURCE = """static __device__ __forceinline__ int dsv4_now() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now) : : "memory");
  return (int)now;
}
static __device__ __forceinline__ int dsv4_multiprocessor() {
  unsigned int number;
  asm volatile("mov.u32 %0, %smid;" : "=r"(number));
  return (int)number;
}
"""


def code(kind: Any, block: Any, tile: Any) -> Any:
    """Return the word that says what an event is."""
    return (kind << _KIND_SHIFT) + (block << _BLOCK_SHIFT) + tile


@T.macro
def begin(thread: int, noted: Any):
    """Thread `thread` remembers the time: noted[1]."""
    if T.get_thread_binding() == thread:
        noted[1] = T.call_extern("int32", "dsv4_now")  # pyright: ignore[reportAttributeAccessIssue]


@T.macro
def end(c: Config, status: Any, rank: Any, cta: Any, track: int, thread: int, what: Any, noted: Any):
    """Thread `thread` notes an event that began at noted[1], behind the noted[0] before."""
    if (T.get_thread_binding() == thread) and (noted[0] < c.trace):
        at = 1 + ((cta * TRACKS + track) * c.trace + noted[0]) * EVENT_WORDS
        status[rank, at] = what
        status[rank, at + 1] = noted[1]
        status[rank, at + 2] = T.call_extern("int32", "dsv4_now")  # pyright: ignore[reportAttributeAccessIssue]
        noted[0] = noted[0] + 1


@T.macro
def place(c: Config, status: Any, rank: Any, cta: Any):
    """Note the multiprocessor of a CTA."""
    if T.get_thread_binding() == 0:
        status[rank, 1 + c.ctas * TRACKS * c.trace * EVENT_WORDS + cta] = T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
            "int32", "dsv4_multiprocessor"
        )


@dataclass(frozen=True)
class Event:
    """Something that a CTA did.

    Attributes:
        rank, cta, multiprocessor: where.
        track: 0 consumers, 1 finishers.
        kind: `schedule.Kind`, BARRIER or COMBINE.
        block, tile: of a task.
        begin_us, end_us: from the launch's first event on.
    """

    rank: int
    cta: int
    multiprocessor: int
    track: int
    kind: int
    block: int
    tile: int
    begin_us: float
    end_us: float


def events(config: Config, status: Sequence[Sequence[int]], first_rank: int = 0) -> list[Event]:
    """Return what a launch noted; `status` are the words of each of its ranks, zero before the launch."""
    c, found = config, []
    for rank, words in enumerate(status, first_rank):
        places = words[1 + c.ctas * TRACKS * c.trace * EVENT_WORDS :]
        for cta in range(c.ctas):
            for track in range(TRACKS):
                start = 1 + (cta * TRACKS + track) * c.trace * EVENT_WORDS
                for at in range(start, start + c.trace * EVENT_WORDS, EVENT_WORDS):
                    what, since, until = words[at : at + EVENT_WORDS]
                    if what:
                        found.append((rank, cta, places[cta], track, what, since, until))
    if not found:
        return []
    origin = found[0][5]
    # The timer's low word comes round: times are differences.
    signed = [((since - origin + _WORD // 2) % _WORD - _WORD // 2) for *_, since, _ in found]
    least = min(signed)
    made = []
    for (rank, cta, place_, track, what, since, until), at in zip(found, signed, strict=True):
        begin_us = (at - least) / 1e3
        made.append(
            Event(
                rank, cta, place_, track, what >> _KIND_SHIFT,
                what >> _BLOCK_SHIFT & _BLOCKS, what & _TILES,
                begin_us, begin_us + (until - since) % _WORD / 1e3,
            )
        )  # fmt: skip
    return made
