"""Calls of registered device functions (`verify.externs`) that go through pointers."""

from typing import TYPE_CHECKING

import numpy as np

from verify import externs, ir
from verify.externs.ctext import WORD_BYTES
from verify.externs.words import MASK, Arrays
from verify.interp.device import access, flags
from verify.interp.device.async_copy import pointer
from verify.interp.device.block import Group

if TYPE_CHECKING:
    from verify.interp.device.values import Values


def _call(m: "Values", group: Group, call: ir.Call) -> None:
    if flags.fence_of(call):
        m.block.run.flags.fence(m.block, m.active[1])
        return
    extern = externs.called(call)
    if extern is None or extern.is_pure:
        m.evaluate(call)
        return
    _, threads = m.active
    words: dict[str, np.ndarray] = {}
    places, read = {}, {}
    for position, (parameter, argument) in enumerate(
        zip(extern.function.parameters, call.args[1:], strict=True)
    ):
        if not parameter.is_pointer:
            words[parameter.name] = m.lanes_of(m.evaluate(argument)) & MASK
            continue
        mode, size = extern.accesses[position]
        storage, first, _ = pointer(m, argument, size)
        places[parameter.name] = storage, first
        if mode == "r":
            for index in range(size // WORD_BYTES):
                octets = access.read_bytes(m, storage, first + index * WORD_BYTES, WORD_BYTES, threads)
                read[parameter.name, index] = octets.view(np.uint32)[:, 0].astype(np.int64)
    meant = extern.meaning(Arrays(), words, read)
    for (name, index), word in sorted(meant.items()):
        storage, first = places[name]
        rows = np.broadcast_to(np.asarray(word), threads.shape).astype(np.uint32)[:, None]
        octets = np.ascontiguousarray(rows).view(np.uint8)
        access.write_bytes(m, storage, first + index * WORD_BYTES, octets, threads)


EFFECTS = {"call_extern": _call}
