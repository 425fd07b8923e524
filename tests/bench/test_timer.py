import pytest

from bench.timer import MIN_REPLAYS, WARMUP, summarize, time_call


class FakeDevice:
    """A clock that only the call and the flush advance, and a log of what happened."""

    def __init__(self, method="graph"):
        self.now = 0.0
        self.log = []
        self.method = method

    def prepare(self, call):
        self.log.append("prepare")
        return call, self.method

    def flush_l2(self):
        self.log.append("flush")
        self.now += 1000.0  # must not be part of any figure

    def record(self):
        self.log.append("record")
        return self.now

    def synchronize(self):
        self.log.append("synchronize")

    def elapsed_us(self, start, stop):
        assert self.log[-1] == "synchronize", "read before the device was done"
        return stop - start


def make_call(device, durations):
    remaining = iter(durations)

    def call():
        device.log.append("call")
        device.now += next(remaining)

    return call


def test_warm_up_replays_do_not_count():
    device = FakeDevice()
    timing = time_call(make_call(device, [1e6] * WARMUP + [7.0] * MIN_REPLAYS), device, MIN_REPLAYS)
    assert (timing.us, timing.p20_us, timing.p80_us) == (7.0, 7.0, 7.0)
    assert timing.replays == MIN_REPLAYS
    assert timing.method == "graph"


def test_l2_is_flushed_outside_the_marks_before_every_replay():
    device = FakeDevice()
    time_call(make_call(device, [1.0] * (WARMUP + MIN_REPLAYS)), device, MIN_REPLAYS)
    assert device.log[0] == "prepare"
    assert device.log[1:-1] == ["flush", "record", "call", "record"] * (WARMUP + MIN_REPLAYS)


def test_median_and_percentiles():
    timing = summarize([50.0, 10.0, 40.0, 20.0, 30.0, 1000.0], "graph")
    assert timing.us == pytest.approx(35.0)
    assert timing.p20_us == pytest.approx(20.0)
    assert timing.p80_us == pytest.approx(50.0)


def test_one_sample():
    assert summarize([3.0], "eager").us == 3.0


def test_method_of_an_uncapturable_call_is_kept():
    device = FakeDevice("eager")
    assert time_call(make_call(device, [1.0] * (WARMUP + MIN_REPLAYS)), device, MIN_REPLAYS).method == "eager"


def test_too_few_replays_are_refused():
    with pytest.raises(ValueError, match=f"replays >= {MIN_REPLAYS}, got replays=3"):
        time_call(lambda: None, FakeDevice(), 3)
