"""determinism of kernels whose blocks wait for each other: counters, locks, waits that are given up."""

import pytest
from tilelang import language as T

from dsv4_kernels.contract import Contract
from verify.engine import check
from verify.extract import extract
from verify.properties.determinism import PROPERTY
from verify.signature.dispatch import Dispatch
from verify.verdict import Verdict, worst

BLOCKS, THREADS, LIMIT = 8, 128, 1000


def counted(how: str = "at least"):
    """All blocks add to a counter and wait until it has a value."""
    step = -1 if how == "falls" else 1

    @T.prim_func
    def kernel(
        count: T.Tensor[(1,), T.int32], x: T.Tensor[(BLOCKS,), T.float32], out: T.Tensor[(BLOCKS,), T.float32]
    ):
        with T.Kernel(BLOCKS, threads=THREADS) as bm:
            seen = T.alloc_local((1,), T.int32)
            seen[0] = 0
            if T.get_thread_binding() == 0:
                if how == "is stored":
                    T.atomic_store(count[0], bm, memory_order="release")
                elif how == "is set":
                    count[0] = bm
                elif how == "is two sums":
                    T.atomic_add(count[0], bm, memory_order="release")
                else:
                    T.atomic_add(count[0], step, memory_order="release")
                if how == "exactly":
                    while T.atomic_load(count[0], memory_order="acquire") != BLOCKS:
                        seen[0] = seen[0] + 1
                elif how == "at most":
                    while T.atomic_load(count[0], memory_order="acquire") > BLOCKS:
                        seen[0] = seen[0] + 1
                elif how == "even":
                    while T.atomic_load(count[0], memory_order="acquire") % 2 < 1:
                        seen[0] = seen[0] + 1
                elif how == "turned":
                    while BLOCKS - T.atomic_load(count[0], memory_order="acquire") < 1:
                        seen[0] = seen[0] + 1
                else:
                    while T.atomic_load(count[0], memory_order="acquire") < BLOCKS:
                        seen[0] = seen[0] + 1
                out[bm] = x[bm]
                if how == "polls are kept":
                    out[bm] = T.cast(seen[0], "float32")

    return kernel


def locked(how: str):
    """A lock: blocks take turns as they come, so the result depends on who was first."""

    @T.prim_func
    def kernel(
        ticket: T.Tensor[(1,), T.int32],
        serving: T.Tensor[(1,), T.int32],
        total: T.Tensor[(1,), T.float32],
    ):
        with T.Kernel(BLOCKS, threads=THREADS) as bm:
            mine = T.alloc_local((1,), T.int32)
            seen = T.alloc_local((1,), T.int32)
            seen[0] = 0
            if T.get_thread_binding() == 0:
                mine[0] = T.atomic_add(ticket[0], 1, return_prev=True, memory_order="relaxed")
                if how == "ticket":
                    while T.atomic_load(serving[0], memory_order="acquire") < mine[0]:
                        seen[0] = seen[0] + 1
                elif how == "looked at":
                    mine[0] = 0
                    while T.atomic_load(serving[0], memory_order="acquire") < mine[0]:
                        mine[0] = T.atomic_load(serving[0], memory_order="relaxed")
                elif how == "by turns":
                    while mine[0] > 0:
                        mine[0] = mine[0] - T.atomic_load(serving[0], memory_order="acquire")
                else:
                    while T.atomic_add(serving[0], 1, return_prev=True, memory_order="acquire") < 1:
                        seen[0] = seen[0] + 1
                total[0] = total[0] * T.float32(0.5) + T.cast(bm, "float32")  # pyright: ignore[reportCallIssue]
                T.atomic_add(serving[0], 1, memory_order="release")

    return kernel


def watched(how: str = "said"):
    """A wait that ends after so many polls, and says so in a word of its own."""
    least = LIMIT + 1 if how == "said too late" else LIMIT
    code = 0 if how == "said by 0" else 3

    @T.prim_func
    def kernel(
        count: T.Tensor[(1,), T.int32],
        status: T.Tensor[(1,), T.int32],
        x: T.Tensor[(BLOCKS,), T.float32],
        out: T.Tensor[(BLOCKS,), T.float32],
    ):
        with T.Kernel(BLOCKS, threads=THREADS) as bm:
            polls = T.alloc_local((1,), T.int32)
            if T.get_thread_binding() == 0:
                T.atomic_add(count[0], 1, memory_order="release")
                polls[0] = 0
                while (T.atomic_load(count[0], memory_order="acquire") < BLOCKS) and (polls[0] < LIMIT):
                    polls[0] = T.if_then_else(
                        T.atomic_load(status[0], memory_order="relaxed") == 0, polls[0] + 1, LIMIT
                    )
                if how == "reset":
                    polls[0] = 0
                if how != "unsaid":  # noqa: SIM102
                    if polls[0] >= least:
                        T.atomic_max(status[0], code)
                if how == "said by others":
                    T.atomic_max(status[0], 1)
                if how == "written":
                    status[0] = 0
                if how == "leaves":  # noqa: SIM102
                    if polls[0] >= LIMIT:
                        T.thread_return()
                out[bm] = x[bm]

    return kernel


def dependent(how: str):
    """What an atomic returns decides what another one adds, whether threads leave, or meet."""

    @T.prim_func
    def kernel(
        count: T.Tensor[(1,), T.int32], total: T.Tensor[(1,), T.int32], out: T.Tensor[(BLOCKS,), T.int32]
    ):
        with T.Kernel(BLOCKS, threads=THREADS) as bm:
            first = T.alloc_local((1,), T.int32)
            second = T.alloc_local((1,), T.int32)
            if how == "found":
                T.atomic_add(count[0], 1, memory_order="relaxed")
                first[0] = T.atomic_load(count[0], memory_order="relaxed")
            else:
                first[0] = T.atomic_add(count[0], 1, return_prev=True, memory_order="relaxed")
            if how == "added":
                second[0] = T.atomic_add(
                    total[0], first[0] * first[0], return_prev=True, memory_order="relaxed"
                )
            if how == "leaves":  # noqa: SIM102
                if first[0] == 0:
                    T.thread_return()
            if how == "found":
                out[bm] = first[0]
            else:
                out[bm] = bm

    return kernel


def result(kernel, exchanged=None):
    dispatch = Dispatch(exchanged=exchanged or {})
    report = check(
        "test", "test", extract(kernel), Contract(()), {}, properties=[PROPERTY], dispatch=dispatch
    )
    found = report.properties[0]
    found.findings = [f for f in found.findings if not f.message.startswith("rests on overflow")]
    found.verdict = worst(f.verdict for f in found.findings)
    return found


@pytest.mark.parametrize("how", ["at least"])
def test_waits_for_a_counter_that_grows_are_proved(how):
    found = result(counted(how))
    assert found.verdict is Verdict.PROVED, found.findings
    assert any("count: a counter that only grows" in note for note in found.notes)
    assert any("count does not pass the end of its type" in a for a in found.assumptions)


@pytest.mark.parametrize(
    ("how", "verdict_is", "message"),
    [
        ("falls", Verdict.UNKNOWN, "count does not only grow by atomic adds"),
        ("is two sums", Verdict.UNKNOWN, "count does not only grow by atomic adds"),
        ("is stored", Verdict.REFUTED, "atomic store and store meet"),
        ("is set", Verdict.UNKNOWN, "count does not only grow by atomic adds"),
        ("exactly", Verdict.UNKNOWN, "it does not wait for count to be at least something"),
        ("at most", Verdict.UNKNOWN, "it does not wait for count to be at least something"),
        ("even", Verdict.UNKNOWN, "it does not wait for count to be at least something"),
        ("turned", Verdict.UNKNOWN, "it does not wait for count to be at least something"),
        ("polls are kept", Verdict.REFUTED, "what is written to out depends on the value that atomic load"),
    ],
)
def test_other_waits_are_not(how, verdict_is, message):
    found = result(counted(how))
    assert found.verdict is verdict_is
    assert any(message in f.message for f in found.findings), found.findings


@pytest.mark.parametrize("how", ["ticket", "looked at", "by turns", "taken"])
def test_locks_are_not(how):
    assert result(locked(how)).verdict is not Verdict.PROVED


def test_a_wait_that_is_given_up_says_so():
    found = result(watched())
    assert found.verdict is Verdict.PROVED, found.findings
    assert any("of launches that leave status at 0" in a for a in found.assumptions)


@pytest.mark.parametrize(
    "how",
    ["unsaid", "reset", "said too late", "said by 0", "said by others", "written", "leaves"],
)
def test_a_wait_that_is_given_up_otherwise_is_not_proved(how):
    assert result(watched(how)).verdict is not Verdict.PROVED


@pytest.mark.parametrize("how", ["added", "leaves", "found"])
def test_what_atomics_return_is_followed(how):
    assert result(dependent(how)).verdict is Verdict.REFUTED


def test_a_claim_may_stand_for_a_wait():
    found = result(counted("exactly"), {"count": "kernel/suite:claim"})
    assert found.verdict is Verdict.UNKNOWN
    assert "rests on kernel/suite:claim: there is no such claim" in found.findings[0].message
    assert result(counted("polls are kept"), {"count": "kernel/suite:claim"}).verdict is Verdict.REFUTED
