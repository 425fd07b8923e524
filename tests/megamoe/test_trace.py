"""What a traced launch notes is read back as it was, also where the timer's low word comes round."""

from dataclasses import replace

from megamoe import trace
from megamoe.config import EVENT_WORDS, TRACKS
from megamoe.instances import CONFIG
from megamoe.schedule import Kind

KEPT = 3
C = replace(CONFIG, launch_ranks=1, trace=KEPT)
LAST = (1 << 31) - 1  # of the timer's low word, as a signed one


def note(words, cta, track, number, what, begin, end):
    at = 1 + ((cta * TRACKS + track) * KEPT + number) * EVENT_WORDS
    words[at : at + EVENT_WORDS] = [what, begin, end]


def test_events_are_read_back():
    words = [0] * C.status_words
    words[1 + C.ctas * TRACKS * KEPT * EVENT_WORDS :] = range(100, 100 + C.ctas)
    note(words, 1, 0, 0, trace.code(Kind.DISPATCH.value, 5, 1), LAST - 1999, LAST - 999)
    note(
        words,
        1,
        1,
        2,
        trace.code(Kind.LINEAR2.value, 70_000, 27),
        LAST + 1 - (1 << 32),
        LAST + 3001 - (1 << 32),
    )
    note(words, 3, 0, 0, trace.code(trace.COMBINE, 0, 0), LAST + 2001 - (1 << 32), LAST + 4001 - (1 << 32))
    found = trace.events(C, [words], 6)
    assert found == [
        trace.Event(6, 1, 101, 0, Kind.DISPATCH, 5, 1, 0.0, 1.0),
        trace.Event(6, 1, 101, 1, Kind.LINEAR2, 70_000, 27, 2.0, 5.0),
        trace.Event(6, 3, 103, 0, trace.COMBINE, 0, 0, 4.0, 6.0),
    ]


def test_without_a_trace_there_is_the_watchdog_word_alone():
    assert CONFIG.status_words == 1
    assert trace.events(C, [[0] * C.status_words]) == []
