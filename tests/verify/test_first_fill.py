"""Roles that hand a shared buffer over: none reads it before it is filled, in whatever order they wait."""

from typing import Any

import pytest
from tilelang import language as T

from tests.verify.samples import ROWS
from verify import extract
from verify.properties import Context
from verify.properties.init import PROPERTY as INIT
from verify.properties.race import PROPERTY as RACE
from verify.solve import Prover
from verify.verdict import Verdict

HALF = 128
OWN_SYNC = {"tl.disable_thread_storage_sync": True}


def once(writes_first: bool, is_choice: bool) -> Any:
    """Half the block fills a tile and half reads it; who goes second waits for who goes first."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, HALF), T.float32], out: T.Tensor[(m, HALF), T.float32]):
        with T.Kernel(m, threads=2 * HALF) as bx:
            tx = T.get_thread_binding(0)
            tile = T.alloc_shared((HALF,), T.float32)
            done = T.alloc_barrier([HALF])
            if is_choice:
                if tx < HALF:
                    if not writes_first:
                        T.barrier_wait(done[0], 0)
                    tile[tx] = x[bx, tx]
                    if writes_first:
                        T.barrier_arrive(done[0])
                else:
                    if writes_first:
                        T.barrier_wait(done[0], 0)
                    out[bx, tx - HALF] = tile[tx - HALF]
                    if not writes_first:
                        T.barrier_arrive(done[0])
            else:
                if tx < HALF:
                    if not writes_first:
                        T.barrier_wait(done[0], 0)
                    tile[tx] = x[bx, tx]
                    if writes_first:
                        T.barrier_arrive(done[0])
                if tx >= HALF:
                    if writes_first:
                        T.barrier_wait(done[0], 0)
                    out[bx, tx - HALF] = tile[tx - HALF]
                    if not writes_first:
                        T.barrier_arrive(done[0])

    return kernel


def ring(writes_first: bool, stages: int, readers: int) -> Any:
    """A producer and one or two consumers of a ring; who does not go first waits in the first round too."""
    m = T.dynamic("m")
    late = int(writes_first)

    @T.prim_func
    def kernel(x: T.Tensor[(m, HALF), T.float32], out: T.Tensor[(readers, m, HALF), T.float32]):
        with T.Kernel(1, threads=(1 + readers) * HALF):
            tx = T.get_thread_binding(0)
            tile = T.alloc_shared((stages, HALF), T.float32)
            full = T.alloc_barrier([HALF] * stages)
            empty = T.alloc_barrier([HALF * readers] * stages)
            if tx < HALF:
                for k in T.serial(m):
                    T.barrier_wait(empty[k % stages], (k // stages + late) % 2)
                    tile[k % stages, tx] = x[k, tx]
                    T.barrier_arrive(full[k % stages])
            else:
                if readers == 1:
                    for k in T.serial(m):
                        T.barrier_wait(full[k % stages], (k // stages + 1 - late) % 2)
                        out[0, k, tx - HALF] = tile[k % stages, tx - HALF]
                        T.barrier_arrive(empty[k % stages])
                else:
                    if tx < 2 * HALF:
                        for k in T.serial(m):
                            T.barrier_wait(full[k % stages], (k // stages + 1 - late) % 2)
                            out[0, k, tx - HALF] = tile[k % stages, tx - HALF]
                            T.barrier_arrive(empty[k % stages])
                    else:
                        for k in T.serial(m):
                            T.barrier_wait(full[k % stages], (k // stages + 1 - late) % 2)
                            out[1, k, tx - 2 * HALF] = tile[k % stages, tx - 2 * HALF]
                            T.barrier_arrive(empty[k % stages])

    return kernel


def verdicts(prim_func: Any) -> list[Verdict]:
    context = Context(extract.extract(prim_func, pass_configs=OWN_SYNC), ROWS, {})
    found = []
    for claims in (RACE.claims(context), INIT.claims(context)):
        answers = [*claims.answers, *Prover(recheck=False).prove(claims.obligations)]
        assert not claims.unknown
        assert not claims.unsupported
        is_refuted = any(a.verdict is Verdict.REFUTED for a in answers)
        assert is_refuted or all(a.verdict is Verdict.PROVED for a in answers)
        found.append(Verdict.REFUTED if is_refuted else Verdict.PROVED)
    return found


KERNELS = {
    **{f"once, {'arms' if c else 'in turn'}": (once, (c,)) for c in (True, False)},
    **{f"ring of {s}, {r} readers": (ring, (s, r)) for s in (1, 2) for r in (1, 2)},
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_buffer_that_is_filled_first_is_proved(name):
    make, rest = KERNELS[name]
    assert verdicts(make(True, *rest)) == [Verdict.PROVED, Verdict.PROVED]


@pytest.mark.parametrize("name", KERNELS)
def test_a_buffer_that_is_read_before_it_is_filled_is_refuted(name):
    make, rest = KERNELS[name]
    assert Verdict.REFUTED in verdicts(make(False, *rest))
