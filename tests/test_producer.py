"""One loading warp: which producers are narrowed to it, which are left alone, and what stays as it was."""

import re
from functools import cache

import pytest
from tilelang import language as T
from tilelang import tvm
from tvm import tirx

from dsv4_kernels.tile import producer, trees
from dsv4_kernels.tile.wgmma import corrected
from tests.verify import barrier_kernels as kernels
from verify import corpus, extract
from verify.tasks import load_file

LOADING = "if (((int)threadIdx.x) < 32) {"
PRODUCER = "if (((int)threadIdx.x) < 128) {"


@cache
def plain():
    """A plain pipeline, as the compiler specialises it."""
    (prim_func,) = load_file(corpus.FOLDER / "idle_warps_bad.py").KERNELS.values()
    return prim_func


@cache
def gathering(rows=64, columns=64, steps=6):
    """A pipeline whose producer loads one operand by TMA, and gathers the other thread by thread."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        a: T.Tensor[(m, steps * columns), T.bfloat16],
        index: T.Tensor[(steps, rows), T.int32],
        b: T.Tensor[(m, columns), T.bfloat16],
        out: T.Tensor[(m, rows), T.float32],
    ):
        with T.Kernel(T.ceildiv(m, rows), threads=128) as block:
            a_tile = T.alloc_shared((rows, columns), T.bfloat16)
            b_tile = T.alloc_shared((rows, columns), T.bfloat16)
            acc = T.alloc_fragment((rows, rows), T.float32)
            T.clear(acc)
            for k in T.Pipelined(steps, num_stages=2):
                T.copy(a[block * rows, k * columns], a_tile)
                for i, j in T.Parallel(rows, columns):
                    b_tile[i, j] = b[index[k, i], j]
                T.gemm(a_tile, b_tile, acc, transpose_B=True)
            T.copy(acc, out[block * rows, 0])

    return kernel


def text_of(prim_func):
    return extract.extract(prim_func).cuda_text


def test_only_the_loading_warp_enters_the_loop():
    stock, narrowed = text_of(plain()), text_of(producer.one_warp(plain()))
    assert LOADING not in stock
    at = narrowed.index(PRODUCER)
    inside = narrowed[at : narrowed.index("} else {", at)]
    # The registers are a whole warpgroup's: all four warps give theirs back first.
    assert inside.index("warpgroup_reg_dealloc") < inside.index(LOADING) < inside.index(".wait(")
    without = re.sub(r"\s+", "", narrowed.replace(LOADING, ""))
    same = re.sub(r"\s+", "", stock)
    assert len(without) == len(same) + 1  # but for the brace that closes it, the text is the compiler's


def test_this_librarys_own_lowerings_have_it():
    with corrected():
        assert LOADING in text_of(plain())


def test_it_is_followed_over_the_rounds_of_a_persistent_kernel():
    assert LOADING in text_of(kernels.persistent())
    assert LOADING not in text_of(kernels.persistent(narrow=False))


def test_a_producer_whose_threads_copy_is_left_alone():
    stock = text_of(gathering())
    assert PRODUCER in stock
    assert text_of(producer.one_warp(gathering())) == stock


# --------------------------------------------------------------------------- on the IR itself
@cache
def device_function():
    """Return the device function of the plain pipeline as the pass finds it."""
    found = []

    def keep(prim_func):
        found.append(prim_func)
        return prim_func

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(producer, "narrow", keep)
        text_of(producer.one_warp(plain()))
    return next(f for f in found if producer._SCOPE in str(f.script()))


def edited(change):
    """Return the device function with its specialised part replaced by `change(that part)`."""

    def visit(node):
        if isinstance(node, tirx.AttrStmt) and node.attr_key == producer._SCOPE:
            return change(node)
        return None

    function = device_function()
    body = tirx.stmt_functor.ir_transform(function.body, None, visit, ["tirx.AttrStmt"])
    return function.with_body(body)


def is_narrowed(function):
    return not producer.narrow(function).same_as(function)


def store_to_global():
    stores = [n.buffer for n in trees.nodes(device_function().body, tirx.BufferStore)]
    out = next(buffer for buffer in stores if buffer.scope() == "global")
    return tirx.BufferStore(out, tirx.FloatImm("float32", 0), [tirx.IntImm("int32", 0)])


def block_barrier():
    sync = tvm.ir.Op.get("tirx.tvm_storage_sync")
    return tirx.Evaluate(tirx.Call("int32", sync, [tirx.StringImm("shared")]))


def test_the_function_is_narrowed_as_it_is():
    assert is_narrowed(edited(lambda scope: scope))


def test_accesses_after_it_have_to_be_behind_a_barrier():
    store, barrier = store_to_global(), block_barrier()
    assert not is_narrowed(edited(lambda scope: tirx.SeqStmt([scope, store])))
    assert is_narrowed(edited(lambda scope: tirx.SeqStmt([scope, barrier, store])))


def test_in_a_loop_the_next_round_counts_too():
    store, count = store_to_global(), tirx.IntImm("int32", 3)

    def looped(parts):
        var = tirx.Var("round", "int32")
        return tirx.For(var, tirx.IntImm("int32", 0), count, tirx.ForKind.SERIAL, tirx.SeqStmt(parts))

    assert is_narrowed(edited(lambda scope: looped([scope, block_barrier()])))
    assert not is_narrowed(edited(lambda scope: looped([store, scope])))
    assert is_narrowed(edited(lambda scope: looped([store, scope, block_barrier()])))


@pytest.mark.parametrize("what", ["store", "barrier"])
def test_a_producer_that_does_more_than_wait_is_left_alone(what):
    extra = store_to_global() if what == "store" else block_barrier()

    def change(scope):
        branches = scope.body
        then = tirx.SeqStmt([*producer._flat(branches.then_case), extra])
        body = tirx.IfThenElse(branches.condition, then, branches.else_case)
        return tirx.AttrStmt(scope.node, scope.attr_key, scope.value, body)

    assert not is_narrowed(edited(change))
