"""The bytes that `verify.access` lists are those that a run touches, statement by statement.

A claim is exact unless it is said here or in `claimed._sure` to be a bound: what is surely touched is
touched, what is touched is listed. Forms are taken from the source, so that a new one fails until compared.
"""

import ast
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from tests.verify import access_kernels as kernels
from tests.verify.access_kernels import TX, Case, Operand, load, pointer, store
from tests.verify.claimed import Claims, Reader
from tests.verify.device.build import value_of
from tests.verify.touched import Log, Touch, watching
from verify import access, externs, host, ir
from verify.encode import Encoder
from verify.interp import device

WARPGROUP = 128
CASES = (
    kernels.elements,
    kernels.vectors,
    kernels.guarded,
    kernels.atomic_operations,
    kernels.copies,
    kernels.matrices,
    kernels.reductions,
    kernels.functions,
    kernels.boxes,
)
WHOLE = Operand(1, 16, 1024, True)
GAPS = "gaps in both directions"  # the atoms of a part are taken with what is between them
OPERANDS = {
    "K-major, 128 bytes": (WHOLE, Operand(1, 16, 1024, True, 16384 + 64), 24),
    "K-major, 64 bytes": (Operand(2, 16, 512, True, 32), Operand(2, 16, 1536, True, 16384), 16),
    "K-major, 32 bytes": (Operand(3, 16, 256, True), Operand(3, 16, 256, True, 16384, "e4m3"), 40),
    "K-major, none": (Operand(0, 128, 256, True), Operand(0, 1024, 128, True, 16384 + 48), 16),
    "MN-major, 128 bytes": (Operand(1, 8192, 1024, False), Operand(1, 4096, 1024, False, 16384), 128),
    "MN-major, 64 bytes": (Operand(2, 4096, 512, False), Operand(2, 512, 4096, False, 16384), 64),
    "MN-major, 32 bytes": (Operand(3, 256, 1024, False), Operand(3, 4096, 256, False, 16384), 48),
    "MN-major, none": (Operand(0, 1024, 128, False), Operand(0, 128, 1024, False, 16384), 32),
    "A in registers": (None, Operand(1, 16, 1024, True, 16384), 256),
    "tf32": (Operand(1, 16, 1024, True, 0, "tf32"), Operand(1, 16, 1024, True, 8192 + 64, "tf32"), 8),
    GAPS: (Operand(1, 8192, 1024, False), Operand(1, 4096, 2048, False, 16384), 128),
}
NAMES = (*(c.__name__ for c in CASES), *OPERANDS)


# --------------------------------------------------------------------------- one kernel
@cache
def ran(name: str) -> tuple[Case, Log]:
    """Run a case once."""
    case = getattr(kernels, name)() if name not in OPERANDS else product(name)
    checks = device.Checks(races=False)
    with watching(case.kernel.function) as log:
        case.kernel.run(*case.tensors, policy="late", wave_threads=WARPGROUP, checks=checks)
    return case, log


def product(name: str) -> Case:
    left, right, n = OPERANDS[name]
    return kernels.product(left, right, n, offset=2 if right.layout == 1 and right.k_major else 0)


def claims(case: Case, log: Log) -> Claims:
    """Read a case's accesses."""
    built = case.kernel
    launch = host.Host({b.data: b for b in built.buffers}, dict(built.maps), {}, {}, ())
    reader = Reader(built.function, launch)
    tensors = {b.data.name: value for b, value in zip(built.buffers, case.tensors, strict=True)}
    memory = reader.memory()
    assert memory.unsupported == []
    return Claims(reader, memory, log, {}, tensors)


def compare(case: Case, log: Log, is_exact: bool = True) -> set[str]:
    """Return the forms of which bytes were compared; raise where they are not those of the run.

    `is_exact`: of wgmma operands no more than the atoms that are read is listed.
    """
    listed = claims(case, log)
    sure, may, forms = (defaultdict(list) for _ in range(3))
    for statement, claim in listed.of_accesses():
        codes = (claim.rows << 32) + claim.octets
        for mode, certain in claim.sure.items():
            sure[statement, claim.place, mode].append(codes[certain])
            may[statement, claim.place, mode].append(codes)
            forms[statement, claim.place, mode].append(claim.form)
    seen = defaultdict(list)
    for touch in log.touches:
        statement = id(log.executions[touch.execution].statement)
        if not touch.operand:
            row = _rows(listed, log, touch)
            seen[statement, touch.place, touch.mode].append(((row[:, None] << 32) + touch.octets).ravel())
    compared: set[str] = set()
    for key in seen.keys() | sure.keys():
        touched, certain, possible = (_joined(d, key) for d in (seen, sure, may))
        missing, more = np.setdiff1d(certain, touched), np.setdiff1d(touched, possible)
        assert not len(missing), _says(listed, key, missing, "is said to touch, and does not,")
        assert not len(more), _says(listed, key, more, "touches, and is not said to touch,")
        compared |= set(forms.get(key, ())) if len(touched) else set()
    assert not listed.open, f"not compared: {listed.open}"
    for name, said, whole in operands(listed, log):
        assert np.isin(whole, said).all(), f"wgmma {name}: {len(np.setdiff1d(whole, said))} bytes are missing"
        compared.add(f"operand {name}")
        if is_exact:
            assert len(said) == len(whole), f"wgmma {name}: {len(said) - len(whole)} bytes too many"
    return compared


def _rows(listed: Claims, log: Log, touch: Touch) -> np.ndarray:
    """Return the executions of the statement that the threads of a touch are."""
    execution = log.executions[touch.execution]
    rows = listed.rows[id(execution.statement)].of[touch.execution]
    return rows[np.searchsorted(execution.threads, touch.threads)]


def _joined(parts: dict, key: tuple) -> np.ndarray:
    return np.unique(np.concatenate(parts[key])) if parts.get(key) else np.zeros(0, np.int64)


def _says(listed: Claims, key: tuple, codes: np.ndarray, what: str) -> str:
    statement, place, mode = key
    row, octet = int(codes[0]) >> 32, int(codes[0]) & 0xFFFFFFFF
    rows = listed.rows[statement]
    site = next(s for s in listed.reader.device_sites if id(s.node) == statement)
    thread, rounds = int(rows.threads[row]), [int(r[row]) for r in rows.rounds]
    where = f"byte {octet} of {place} ({mode}); {len(codes)} in all"
    return f"{site.span}: thread {thread} in rounds {rounds} {what} {where}"


# --------------------------------------------------------------------------- wgmma operands
def operands(listed: Claims, log: Log) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield what is listed of each wgmma operand, and the whole swizzle atoms that a warpgroup reads."""
    read = defaultdict(list)
    for touch in log.touches:
        if touch.operand:
            statement = id(log.executions[touch.execution].statement)
            thread = int(listed.rows[statement].threads[_rows(listed, log, touch)[0]])
            read[statement, touch.operand, thread // WARPGROUP].append(touch.octets.ravel())
    for use, starts in listed.operands():
        base = listed.log.places[listed.var[id(use.base.storage)]][1]
        statement, unit = id(use.site.statement), use.atom_bytes if use.swizzle else 1
        groups = listed.rows[statement].threads // WARPGROUP
        for group, start in np.unique(np.stack([groups, starts], axis=1), axis=0).tolist():
            first = start // unit * unit + base
            count, step = use.parts
            spans = [first + part * step + np.arange(use.part_bytes) for part in range(count)]
            atoms = np.unique(np.concatenate(read[statement, use.name, group]) // unit)
            yield (
                use.name,
                np.unique(np.concatenate(spans)),
                (atoms[:, None] * unit + np.arange(unit)).ravel(),
            )


# --------------------------------------------------------------------------- all forms
@cache
def compared(name: str) -> frozenset[str]:
    return frozenset(compare(*ran(name), is_exact=name != GAPS))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_listed_is_what_is_touched(name):
    assert compared(name)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_interpreter_says_is_what_its_memory_sees(name):
    """Nothing is read or written that the log does not hold, so the comparison is with all of a run."""
    _, log = ran(name)
    said, done = log.said(), log.done()
    for execution, place, mode in said.keys() | done.keys():
        mine, theirs = (d.get((execution, place, mode), set()) for d in (said, done))
        statement = log.executions[execution].statement
        partly = said.get(
            (execution, place, "w"), set()
        )  # of a byte that is written in part the rest is read
        assert theirs <= mine | partly
        call = statement.value if isinstance(statement, ir.Eval) else None
        clipped = isinstance(call, ir.Call) and call.op == "tma_store"  # a box is read whole, stored in part
        assert mine <= theirs or clipped


# Operations whose pointers stand for no access: addresses alone, and a fence that is an empty instruction.
WITHOUT_BYTES = {"initialize_wgmma_descriptor", "increase_descriptor_offset", "warpgroup_fence_operand"}
NODES = {
    "Store",
    "Load",
    "AccessPtr",
    "Region",
    "Call",
    "Bind",
}  # an access_ptr and a Region have no form alone


def test_every_form_is_compared():
    reader = access._Reader(SimpleNamespace(encoder=Encoder()))  # type: ignore[arg-type]
    forms = set(reader.handlers) - {"call_extern"} - WITHOUT_BYTES
    forms |= {"AllReduce", *(e.name for e in externs.everything() if e.accesses)}
    forms |= {"Store", "Load", "mbarrier", "operand A", "operand B", "box of tma_load", "box of tma_store"}
    assert set().union(*(compared(name) for name in NAMES)) == forms


def test_no_node_is_read_that_is_not_listed_here():
    source = ast.parse(textwrap.dedent(inspect.getsource(access._Reader.site)))
    classes = {
        n.cls.attr
        for n in ast.walk(source)
        if isinstance(n, ast.MatchClass) and isinstance(n.cls, ast.Attribute)
    }
    assert classes == NODES


def test_memory_of_vectors_is_unsupported():
    """The bits of its type are those of a lane: what an element takes is not known."""
    pairs = kernels.tensor("pairs")
    pairs.dtype = ir.DType("int32", 2)
    target = pointer(pairs, TX, 1, "rw")
    body = [
        store(pairs, TX, load(pairs, 0)),
        kernels.evaluated(value_of("atomic_or_elem_op", "int32", target, 1)),
    ]
    function = kernels.case(body, (pairs, kernels.words())).kernel.function
    launch = host.Host({pairs.data: pairs}, {}, {}, {}, ())
    memory = Reader(function, launch).memory()
    assert {type(site.node) for site, _ in memory.unsupported} == {ir.Store, ir.Load, ir.Call, ir.AccessPtr}
    assert memory.accesses == []
