"""Atomics between GPUs: what their text says, and how calls of them are translated."""

import pytest
import torch
from tilelang import language as T

from verify import ir
from verify.externs import check_calls, signals
from verify.extract import extract
from verify.interp import device
from verify.ir import UnsupportedIR


@T.prim_func
def _handshake(words: T.Tensor[(2,), T.int32], out: T.Tensor[(1,), T.int32]):
    with T.Kernel(1, threads=32):
        T.import_source(signals.source())
        T.annotate_restrict_buffers(words)
        if T.get_thread_binding() == 0:
            signals.store_release(words[1], 7)
            out[0] = signals.load_acquire(words[0]) + 1


def test_text_says_operation_order_and_scope():
    load, store = signals.SIGNALS["dsv4_load_acquire_sys"], signals.SIGNALS["dsv4_store_release_sys"]
    assert (load.op, load.order, load.scope) == ("atomic_load_elem_op", 2, signals.SYSTEM)
    assert (store.op, store.order, store.scope) == ("atomic_store_elem_op", 3, signals.SYSTEM)
    assert signals.parse(load.text.replace("sys.global", "gpu.global")).scope == signals.DEVICE


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("acquire", "weak"),
        ("sys.global", "cta.global"),
        ("s32", "s16"),
        (' : "memory"', ""),
        ("value;", "0;"),
    ],
)
def test_other_texts_are_refused(old, new):
    text = signals.SIGNALS["dsv4_load_acquire_sys"].text
    changed = text.replace(old, new)
    assert changed != text
    with pytest.raises(UnsupportedIR, match="a signal's text"):
        signals.parse(changed)


def test_calls_are_atomics_with_a_scope():
    found = extract(_handshake)
    calls = [n for n in ir.walk(found.device.body) if isinstance(n, ir.Call) and n.op.startswith("atomic")]
    assert {c.op: signals.scope_of(c.args, c.op) for c in calls} == {
        "atomic_load_elem_op": signals.SYSTEM,
        "atomic_store_elem_op": signals.SYSTEM,
    }
    assert check_calls(found.device) == ()

    words, out = torch.tensor([4, 0], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    device.run(found, words, out)
    assert (words.tolist(), out.item()) == ([4, 7], 5)
