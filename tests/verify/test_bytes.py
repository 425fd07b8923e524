"""Bytes that threads touch, compared with a plain list of them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from verify.sync import bytes as listed

THREADS = 3


@st.composite
def touched(draw):
    unit = draw(st.sampled_from([1, 2, 4, 8]))
    size = draw(st.integers(0, 6))
    starts = draw(st.lists(st.integers(0, 12), min_size=size, max_size=size))
    threads = draw(st.lists(st.integers(0, THREADS - 1), min_size=size, max_size=size))
    width = unit * draw(st.integers(1, 3))
    start = unit * np.array(starts, dtype=np.int64)
    return listed._Touched(start, np.array(threads, dtype=np.int64), width, True)


def plain(these):
    pairs = zip(these.start.tolist(), these.thread.tolist(), strict=True)
    return [(start + byte, thread) for start, thread in pairs for byte in range(these.width)]


@given(touched(), touched())
@settings(max_examples=300, deadline=None)
def test_two_accesses_have_bytes_in_common_as_lists_of_bytes_have(mine, theirs):
    unit = listed._unit(mine, theirs)
    common = {byte for byte, _ in plain(mine)} & {byte for byte, _ in plain(theirs)}
    found = listed._have_one_in_common(mine.places(unit), np.sort(theirs.places(unit)))
    assert found == bool(common)
    for other in (mine, theirs):
        pairs = ((t, v) for b, t in plain(mine) for c, v in plain(other) if b == c)
        assert listed._by_one_thread(mine, other) == all(t == v for t, v in pairs)
