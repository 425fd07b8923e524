"""Property banks: the degree of each access, and limits where they are declared."""

import numpy as np
import pytest
from tilelang import language as T

from dsv4_kernels.contract import Contract
from tests.verify import samples
from verify import banks
from verify.tasks import Task, limited
from verify.verdict import Verdict

CONTRACT = Contract(("0 <= m", "m <= 65536"))


def through_shared(columns: int, width: int, guarded: bool = False):
    """A row of `columns` words a lane, written `width` elements at a time."""
    m = T.dynamic("m")

    @T.prim_func
    def through_shared_kernel(x: T.Tensor[(m, 32, width), T.float32], out: T.Tensor[(m, 32), T.float32]):
        with T.Kernel(m, threads=32) as bm:
            tile = T.alloc_shared((32, columns), T.float32)
            tx = T.get_thread_binding()
            for j in T.vectorized(width):
                if guarded:
                    if x[bm, 0, 0] > 0:
                        tile[tx, j] = x[bm, tx, j]
                else:
                    tile[tx, j] = x[bm, tx, j]
            T.sync_threads()
            out[bm, tx] = tile[0, tx]

    return through_shared_kernel


@pytest.mark.parametrize(
    ("columns", "width", "degree"),
    [
        (32, 1, 32),  # all lanes in one bank
        (33, 1, 1),  # padded
        (36, 1, 4),
        (32, 2, 16),  # half a warp a phase
        (34, 2, 1),
        (32, 4, 8),  # a quarter of a warp a phase
        (36, 4, 1),
        (40, 4, 2),
    ],
)
def test_the_degree_of_a_column(columns, width, degree):
    context = samples.context(through_shared(columns, width), CONTRACT)
    found, unknown = banks.Banks(context).conflicts()
    assert not unknown
    assert {c.degree for c in found if c.what.startswith("store")} == {degree}
    assert {c.degree for c in found if c.what.startswith("load")} == {1}
    result = samples.verdict(context, "banks")
    assert result.verdict is Verdict.PROVED  # reported; no limit is declared
    assert any(f"degree {degree}" in note for note in result.notes)


@pytest.mark.parametrize(("limit", "verdict"), [(8, Verdict.PROVED), (7, Verdict.REFUTED)])
def test_a_declared_limit_is_proved_or_refuted(limit, verdict):
    context = samples.context(through_shared(32, 4), limited(CONTRACT, limit))
    result = samples.verdict(context, "banks")
    assert result.verdict is verdict
    if verdict is Verdict.REFUTED:
        (finding,) = result.findings
        assert finding.counterexample.values["degree"] == 8


def test_lanes_that_may_be_idle_do_not_refute():
    context = samples.context(through_shared(32, 1, guarded=True), limited(CONTRACT, 4))
    assert samples.verdict(context, "banks").verdict is Verdict.UNKNOWN


def test_limits_come_from_a_file(tmp_path):
    path = tmp_path / "limits.py"
    path.write_text("KERNELS = {'k': None, 'l': None}\nBANK_LIMITS = {'k': 2}\n")
    contract = Task("limits", "k", str(path)).load().contract
    assert contract == limited(Contract(()), 2)
    assert Task("limits", "l", str(path)).load().contract == Contract(())


def test_degrees_against_counting_one_by_one():
    rng = np.random.default_rng(0)
    for _ in range(200):
        words = int(rng.choice([1, 2, 4]))
        word = rng.integers(0, 256, 64) * words
        active = rng.random(64) < 0.7
        phase = np.arange(64) // (32 // words)
        worst = 1
        for p in set(phase):
            lanes = [t for t in range(64) if phase[t] == p and active[t]]
            touched = {int(word[t]) + w for t in lanes for w in range(words)}
            worst = max([worst, *(sum(t % 32 == b for t in touched) for b in range(32))])
        assert banks._degrees(word, words, phase, active)[0] == worst
