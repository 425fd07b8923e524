"""Counterexamples are confirmed by a run, at shapes of any size; invented ones are not."""

from pathlib import Path

import pytest

from dsv4_kernels.contract import Contract
from tests.verify import samples
from tests.verify.device.test_kernels import stages
from verify.extract import extract
from verify.interp import device
from verify.properties import Context
from verify.tasks import load_file
from verify.verdict import Counterexample, Verdict

FOLDER = Path(__file__).parent.parent / "broken"


def refuted(name, property_name):
    """Return a broken kernel's stages and the counterexample of its refutation."""
    module = load_file(FOLDER / f"{name}.py")
    ((kernel, prim_func),) = module.KERNELS.items()
    extracted = extract(prim_func)
    context = Context(extracted, Contract(module.CONTRACTS[kernel]), {})
    result = samples.verdict(context, property_name)
    example = next(f.counterexample for f in result.findings if f.verdict is Verdict.REFUTED)
    return extracted, example


@pytest.mark.parametrize(
    ("name", "property_name", "kind"),
    [
        ("act_quant_shared_overrun", "bounds", device.OutOfBoundsError),
        ("fp4_quant_missing_guard", "bounds", device.OutOfBoundsError),
        ("act_quant_grid_overflow", "overflow", device.LaunchError),
        ("act_quant_tile_overlap", "coverage", device.DataRaceError),
        ("act_quant_lost_tail", "coverage", type(None)),
    ],
)
def test_refutations_are_confirmed(name, property_name, kind):
    extracted, example = refuted(name, property_name)
    found = device.replay(extracted, example, property_name)
    assert found.confirmed, found.note
    assert isinstance(found.fault, kind)
    if kind is device.OutOfBoundsError:
        assert found.exact


def test_an_invented_counterexample_is_not_confirmed():
    extracted = stages("act_quant/b32")
    example = Counterexample({"num_blocks": 2**31 - 256}, {"bx": 33554427}, {"tx": 127}, {}, {})
    for name in ("bounds", "overflow", "race", "alignment"):
        found = device.replay(extracted, example, name)
        assert not found.confirmed
        assert found.fault is None
