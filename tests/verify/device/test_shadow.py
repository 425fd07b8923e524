"""The shadow memory against a plain record of every access."""

import numpy as np
import pytest

from verify.interp.device.clocks import Clocks
from verify.interp.device.shadow import Actor, Shadow

BYTES, THREADS, STEPS = 1500, 4, 400
WHOLE = np.arange(THREADS)


class Record:
    """Of each byte: its last write and the reads since, as (agent, clock)."""

    def __init__(self) -> None:
        self.writes: dict[int, tuple[int, int]] = {}
        self.reads: dict[int, set[tuple[int, int]]] = {}

    def races(self, at: np.ndarray, agents: np.ndarray, clocks: Clocks, is_write: bool) -> bool:
        found = False
        for row, agent in zip(at, agents, strict=True):
            for byte in row.tolist():
                before = {self.writes[byte]} if byte in self.writes else set()
                before |= self.reads.get(byte, set()) if is_write else set()
                found |= any(clocks.known[agent, other] < clock for other, clock in before)
        return found

    def enter(self, at: np.ndarray, agents: np.ndarray, clocks: Clocks, is_write: bool) -> None:
        for row, agent in zip(at, agents, strict=True):
            mark = int(agent), int(clocks.known[agent, agent])
            for byte in row.tolist():
                if is_write:
                    self.writes[byte], self.reads[byte] = mark, set()
                else:
                    self.reads.setdefault(byte, set()).add(mark)


@pytest.mark.parametrize("seed", range(6))
def test_races_are_those_of_a_record_of_every_access(seed):
    rng = np.random.default_rng(seed)
    clocks, record = Clocks(THREADS), Record()
    shadow = Shadow(BYTES, clocks)
    outcomes = set()
    for step in range(STEPS):
        if rng.random() < 0.3:
            first, second = rng.permutation(THREADS)[:2]
            clocks.acquire(np.array([second]), clocks.release(np.array([first])))
            continue
        agents = np.sort(rng.permutation(THREADS)[: rng.integers(1, THREADS + 1)])
        starts = rng.permutation(BYTES // 8)[: len(agents)] * 8
        at, is_write = starts[:, None] + np.arange(4), bool(rng.random() < 0.4)
        actor = Actor(agents, clocks.own(agents), clocks.known[agents], None, 0, 0, step)
        wanted = record.races(at, agents, clocks, is_write)
        found = shadow.write(at, actor) if is_write else shadow.read(at, actor)
        assert (found is not None) == wanted
        outcomes.add((is_write, wanted))
        record.enter(at, agents, clocks, is_write)
        if wanted:  # where a run would end: all threads meet, and go on
            clocks.acquire(WHOLE, clocks.release(WHOLE))
    assert outcomes == {(False, False), (False, True), (True, False), (True, True)}


def test_a_read_of_a_neighbour_is_no_race_with_a_write():
    clocks = Clocks(2)
    shadow = Shadow(64, clocks)
    one, two = (np.array([t]) for t in range(2))

    def actor(who: np.ndarray) -> Actor:
        return Actor(who, clocks.own(who), clocks.known[who], None, 0, 0, 0)

    assert shadow.read(np.array([[0, 1]]), actor(one)) is None
    assert shadow.write(np.array([[2, 3]]), actor(two)) is None
    conflict = shadow.write(np.array([[1]]), actor(two))
    assert conflict is not None
    assert (conflict.kind, conflict.component) == ("read", 0)
