"""Memory that ranks share: how parts are mapped, their sizes, and what is refused. Without a GPU."""

import ctypes
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megamoe import symmetric
from megamoe.layer import FusedLayer, config_for, one_of
from megamoe.symmetric import KEPT_BYTES, PART_BYTES, SharedRegions, SymmetricMemoryError
from tests.megamoe import layers

START = 1 << 40
CPU = torch.device("cpu")
SHAPES: dict[str, dict[str, Any]] = {  # of one rank of eight
    "flash": {"hidden": 4096, "inter": 2048, "num_experts": 32},
    "pro": {"hidden": 7168, "inter": 3072, "num_experts": 48},
}


class Driver:
    """Notes what is called; `fails` names a call that returns an error."""

    def __init__(self, fails=""):
        self.calls, self.fails = [], fails

    def __getattr__(self, name):
        def call(*args):
            values = [getattr(a, "value", None) if not hasattr(a, "_obj") else "out" for a in args]
            if name == "cuGetErrorString":
                args[1]._obj.value = b"no such luck"
                return 0
            self.calls.append((name, *values))
            if name == "cuMemAddressReserve":
                args[0]._obj.value = START
            if name == "cuMemRetainAllocationHandle":
                args[0]._obj.value = args[1].value + 1
            return 801 if name == self.fails else 0

        return call


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    monkeypatch.setattr(symmetric, "_driver", lambda: found)
    return found


def test_parts_lie_side_by_side_and_are_unmapped(driver):
    handles = [symmetric._handle_of(pointer) for pointer in (100, 200, 300)]
    assert [h.value for h in handles] == [101, 201, 301]
    found = symmetric._Range(handles, PART_BYTES, torch.device("cuda", 1))
    places = [START + n * PART_BYTES for n in range(3)]
    maps = [c for c in driver.calls if c[0] == "cuMemMap"]
    assert [(c[1], c[2], c[4]) for c in maps] == [
        (p, PART_BYTES, h.value) for p, h in zip(places, handles, strict=True)
    ]
    assert [c[1] for c in driver.calls if c[0] == "cuMemRelease"] == [101, 201, 301]
    assert [c[1] for c in driver.calls if c[0] == "cuMemSetAccess"] == places
    found.close()
    assert [c[1] for c in driver.calls if c[0] == "cuMemUnmap"] == places
    assert driver.calls[-1] == ("cuMemAddressFree", START, 3 * PART_BYTES)


def test_a_call_that_fails_is_named(driver):
    driver.fails = "cuMemMap"
    with pytest.raises(SymmetricMemoryError, match="cuMemMap failed with 801: no such luck"):
        symmetric._Range([ctypes.c_ulonglong(1)], PART_BYTES, torch.device("cuda", 0))


def test_tensor_at_is_the_memory_itself():
    there = torch.zeros(64, dtype=torch.uint8)
    found = symmetric.tensor_at(there.data_ptr(), 64, CPU)
    found[3] = 5
    assert there.tolist()[3] == 5


@pytest.mark.parametrize("model", sorted(SHAPES))
@pytest.mark.parametrize("tokens", [1, 8, 512, 8192])
def test_parts_fill_pages_and_leave_room(model, tokens):
    alone = config_for(tokens, topk=6, clamp=10.0, multiprocessors=132, ranks=4, **SHAPES[model])
    c = one_of(alone, 4, 3, 60.0)
    parts = {  # rows, bytes a row, rows used
        "x": (c.x_rows, c.hidden, c.tokens),
        "x_scale": (c.scale_rows, c.hidden // 128, c.tokens),
        "combine": (c.combine_rows, 2 * c.hidden, c.topk * c.tokens),
        "signals": (c.signal_words, 4, c.num_ranks),
    }
    for rows, row_bytes, used in parts.values():
        assert rows * row_bytes % PART_BYTES == 0
        assert (rows - used) * row_bytes >= KEPT_BYTES
    assert alone.x_rows == alone.tokens
    assert replace(c, share_bytes=1, kept_bytes=0).combine_rows == c.topk * c.tokens


def test_refuses():
    with pytest.raises(ValueError, match="requires a CUDA device for several ranks, got cpu"):
        SharedRegions({"x": PART_BYTES}, None, CPU)
    with pytest.raises(ValueError, match="requires parts of 2097152 bytes each, got x=5"):
        SharedRegions({"x": 5}, None, torch.device("cuda", 0))
    experts = SimpleNamespace()
    with pytest.raises(ValueError, match="requires 0 < timeout_s <= 120, got timeout_s=121"):
        FusedLayer(experts, topk=layers.TOPK, max_tokens=8, timeout_s=121)  # type: ignore[arg-type]
