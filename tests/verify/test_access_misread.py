"""Misreadings planted in `verify.access` and `verify.descriptors`: the comparison with runs notices each."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import z3

from tests.verify.test_access_against_interpreter import compare, compared, ran
from verify import access, descriptors
from verify.access import Access

Plant = Callable[[pytest.MonkeyPatch], None]
READER = access._Reader


def _element(change: Callable[[Access], Access]) -> Plant:
    """Change each access of an element after it was read."""
    return _after("_element", change)


def _after(method: str, change: Callable[[Access], Access]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        real = getattr(READER, method)

        def misread(self, *args, **more):
            before = len(self.memory.accesses)
            found = real(self, *args, **more)
            listed = self.memory.accesses
            listed[before:] = [change(a) for a in listed[before:]]
            return found

        patch.setattr(READER, method, misread)

    return plant


def _with(method: str, change: Callable[[list], list]) -> Plant:
    """Call a method with other arguments."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = getattr(READER, method)
        patch.setattr(READER, method, lambda self, *args, **more: real(self, *change(list(args)), **more))

    return plant


def _steps(change: Callable[[list], list]) -> Plant:
    """Change what is known of the atoms of a wgmma operand."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = descriptors._atom_steps
        patch.setattr(descriptors, "_atom_steps", lambda *args: change(real(*args)))

    return plant


def _set(owner: object, name: str, value: object) -> Plant:
    return lambda patch: patch.setattr(owner, name, value)


def _turned(patch: pytest.MonkeyPatch) -> None:
    """Read the coordinates of a box outermost first."""
    real = READER._tma

    def misread(self, site, call, pointer, coordinates, *rest, **more):
        real(self, site, call, pointer, coordinates[::-1], *rest, **more)

    patch.setattr(READER, "_tma", misread)


def _by_first_word(patch: pytest.MonkeyPatch) -> None:
    real = READER._registered

    def misread(self, site, call, extern):
        before = len(self.memory.accesses)
        real(self, site, call, extern)
        del self.memory.accesses[before + 1 :]

    patch.setattr(READER, "_registered", misread)


def _unguarded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(access, "_with_scope", lambda site, scope: site)


MISREADINGS: dict[str, tuple[str, Plant]] = {
    "an element off": ("elements", _element(lambda a: replace(a, start=a.start + 1))),
    "a vector without its last lane": (
        "elements",
        _element(lambda a: replace(a, count=z3.If(a.count > 1, a.count - 1, a.count))),
    ),
    "elements of another size": ("elements", _element(lambda a: replace(a, unit_bits=a.unit_bits // 2))),
    "a code taken for a byte": ("vectors", _element(lambda a: replace(a, unit_bits=max(8, a.unit_bits)))),
    "a read for a write": ("guarded", _element(lambda a: replace(a, mode="r"))),
    "a write that is missing": ("elements", _element(lambda a: replace(a, count=z3.IntVal(0)))),
    "the first lane for all": ("vectors", _element(lambda a: replace(a, start=_first_lane(a)))),
    "cp.async of twice the size": ("copies", _after("_cp_async", lambda a: replace(a, count=a.count * 2))),
    "cp.async without its condition": ("copies", _unguarded),
    "cp.async that reads its target": (
        "copies",
        _after("_cp_async", lambda a: replace(a, mode="rw" if a.storage.kind == "shared" else "r")),
    ),
    "half a row of a matrix": ("matrices", _set(access, "MATRIX_ROW_BITS", 64)),
    "registers of half the size": ("matrices", _set(access, "REGISTER_BITS", 16)),
    "an atomic on one of four": ("atomic_operations", lambda p: _one_of_four(p)),
    "a slot of a workspace further": (
        "reductions",
        _with("_slots", lambda args: [*args[:2], args[2] + 1, *args[3:]]),
    ),
    "the first word of a function": ("functions", _by_first_word),
    "a box turned": ("boxes", _turned),
    "a box of half the bytes": ("boxes", _after("_tma", lambda a: replace(a, count=a.count / 2))),
    "a register of A missing": ("A in registers", _set(access, "A_REGISTERS", 3)),
    "accumulators of 16 bits": (
        "K-major, 128 bytes",
        lambda p: p.setattr(access, "accumulator_registers", lambda dtype, m, n: n // 4),
    ),
    "accumulators of the next row": (
        "tf32",
        _after("_accumulate", lambda a: replace(a, start=a.start + 2)),
    ),
    "eight rows short": ("K-major, 128 bytes", _steps(lambda s: [(s[0][0] - 1, s[0][1]), *s[1:]])),
    "eight rows more": ("K-major, none", _steps(lambda s: [(s[0][0] + 1, s[0][1]), *s[1:]])),
    "half of K": ("K-major, none", _steps(lambda s: s[:1])),
    "leading and stride exchanged": (
        "MN-major, none",
        _steps(lambda s: [(s[0][0], s[1][1]), (s[1][0], s[0][1])]),
    ),
    "an operand a unit off": (
        "K-major, none",
        lambda p: p.setattr(descriptors, "UNIT_BYTES", 8),
    ),
    "another swizzle": (
        "K-major, 64 bytes",
        _set(descriptors, "_SWIZZLE_BYTES", {0: 16, 1: 64, 2: 128, 3: 32}),
    ),
}


def _first_lane(found: Access) -> z3.ArithRef:
    lane = found.site.scope.lane
    return found.start if lane is None else z3.substitute(found.start, (lane, z3.IntVal(0)))


def _one_of_four(patch: pytest.MonkeyPatch) -> None:
    real = READER._atomic

    def misread(self, site, call, count):
        real(self, site, call, 1)

    patch.setattr(READER, "_atomic", misread)


@pytest.mark.parametrize("name", MISREADINGS)
def test_a_misreading_is_noticed(name, monkeypatch):
    case, plant = MISREADINGS[name]
    compared(case)  # as it is nothing is found
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        compare(*ran(case))
