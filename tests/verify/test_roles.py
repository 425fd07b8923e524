"""Kernels by roles (`T.ws`), in one loop and split into a loop for each role: what is proved, what is not."""

import pytest
from tilelang import language as T

from dsv4_kernels.tile.own_sync import own_sync
from dsv4_kernels.tile.roles import split_roles
from tests.verify import edits, samples
from verify import ir
from verify.properties import Context
from verify.properties.batch_invariance import BatchInvariance
from verify.refine.inline import rewrite
from verify.signature.dispatch import Dispatch
from verify.verdict import Verdict

ROUNDS, ROWS, COLUMNS, SLOTS = 3, 64, 128, 2
ROLE, REGISTERS = 256, (72, 184)  # threads of a role; registers


def make_kernel(
    first: str = "load", parity: int = 0, waits_for_left: bool = True, full_of: int = 0, split: bool = True
):
    """Half of the threads load rows into a ring of two slots, the others add them up.

    Args:
        first: which role's statements come first in a round.
        parity: added to that of the wait for rows.
        waits_for_left: rows are loaded where the others have been read.
        full_of: which slot after its own the loading role says is full.
        split: each role has a loop.
    """
    m = T.dynamic("m")

    @T.macro
    def load(x, ring, full, left, b, c):
        with T.ws(0, 1):
            if waits_for_left:
                T.mbarrier_wait_parity(left[c % SLOTS], (c // SLOTS + 1) % 2)
            for i, j in T.Parallel(ROWS, COLUMNS):
                ring[c % SLOTS, i, j] = x[b, c, i, j]
            T.mbarrier_arrive(full[(c + full_of) % SLOTS])

    @T.macro
    def add(ring, acc, full, left, c):
        with T.ws(2, 3):
            T.mbarrier_wait_parity(full[c % SLOTS], (c // SLOTS + parity) % 2)
            for i, j in T.Parallel(ROWS, COLUMNS):
                acc[i, j] = acc[i, j] + ring[c % SLOTS, i, j]
            T.mbarrier_arrive(left[c % SLOTS])

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, ROUNDS, ROWS, COLUMNS), T.float32], out: T.Tensor[(m, ROWS, COLUMNS), T.float32]
    ):
        with T.Kernel(m, threads=2 * ROLE) as b:
            ring = T.alloc_shared((SLOTS, ROWS, COLUMNS), T.float32)
            acc = T.alloc_fragment((ROWS, COLUMNS), T.float32)
            full = T.alloc_barrier([ROLE] * SLOTS)
            left = T.alloc_barrier([ROLE] * SLOTS)
            with T.ws(2, 3):
                T.clear(acc)
            for c in T.serial(ROUNDS):
                if first == "load":
                    load(x, ring, full, left, b, c)
                    add(ring, acc, full, left, c)
                else:
                    add(ring, acc, full, left, c)
                    load(x, ring, full, left, b, c)
            with T.ws(2, 3):
                for i, j in T.Parallel(ROWS, COLUMNS):
                    out[b, i, j] = acc[i, j]

    asked = own_sync(kernel)
    return split_roles(asked, ROLE, *REGISTERS) if split else asked


def context(extracted):
    return Context(extracted, samples.ROWS, {}, dispatch=Dispatch(batch_dims=("m",)))


def result_of(name, edit=None, **options):
    kernel = make_kernel(**options)
    extracted = samples.extracted(kernel) if edit is None else edits.edited(kernel, edit)
    return samples.verdict(context(extracted), name)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("name", ["mbarrier", "race", "init", "refinement", "coverage", "determinism"])
def test_roles_are_proved(name, split):
    result = result_of(name, split=split)
    assert result.verdict is Verdict.PROVED, result.findings


def test_both_forms_have_one_signature():
    digests = set()
    for split in (True, False):
        claims = BatchInvariance().claims(context(samples.extracted(make_kernel(split=split))))
        assert not claims.unsupported
        assert not claims.unknown
        digests.add(claims.facts["signature"])
    assert len(digests) == 1


def loads_ring(node):
    return isinstance(node, ir.Store) and any(
        isinstance(e, ir.Load) and e.buffer.name == "ring" for e in ir.walk(node.value)
    )


def named(expr, name):
    return next(v for v in ir.walk(expr) if isinstance(v, ir.Var) and v.name == name)


def shifted(node):
    """Rows are stored one element farther than the statement says."""
    if isinstance(node, ir.Store) and node.buffer.name == "ring":
        return ir.Store(node.span, node.buffer, (farther(node.indices[0]),), node.value)
    return None


def farther(index):
    assert isinstance(index, ir.Ramp), "four elements are stored at once"
    return ir.Ramp(index.dtype, samples.plus(index.base, 1), index.stride)


def other_slot(node):
    """The role that adds reads the other slot of the ring."""
    if not loads_ring(node):
        return None
    counter = named(node.value, "c")
    value = rewrite(node.value, lambda e: samples.plus(counter, 1) if e is counter else None)
    return ir.Store(node.span, node.buffer, node.indices, value)


def by_half(node):
    """Only one of the two warpgroups of a role adds."""
    if not loads_ring(node):
        return None
    thread = named(node.value, "tx")
    first = ir.BinOp(ir.BOOL, "lt", thread, ir.Const(thread.dtype, ROLE + ROLE // 2))
    return ir.If(node.span, first, node, None)


@pytest.mark.parametrize("edit", [shifted, other_slot, by_half])
@pytest.mark.parametrize("split", [True, False])
def test_a_device_program_that_does_something_else_is_refuted(edit, split):
    result = result_of("refinement", edit, split=split)
    assert result.verdict is Verdict.REFUTED, result.findings


@pytest.mark.parametrize("number", [0, 1])
def test_a_wait_that_the_compiler_lost_is_not_proved(number):
    result = result_of("refinement", edits.dropped("mbarrier_wait_parity", number))
    assert result.verdict is not Verdict.PROVED


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(
    "options", [{"waits_for_left": False}, {"parity": 1}, {"full_of": 1}], ids=["no-wait", "parity", "other"]
)
def test_roles_that_do_not_wait_as_they_should_are_refuted(options, split):
    found = [result_of(name, split=split, **options) for name in ("race", "mbarrier")]
    assert any(r.verdict is Verdict.REFUTED for r in found), [r.findings for r in found]


@pytest.mark.parametrize("split", [True, False])
def test_rounds_in_which_the_later_role_stands_first_are_not_followed(split):
    """Rows are added in the round after: the device's order of both roles is another one than the text's."""
    result = result_of("refinement", first="add", split=split)
    assert result.verdict is Verdict.UNSUPPORTED
    assert any("before what ends the wait" in f.message for f in result.findings)
