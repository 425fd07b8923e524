"""The launch read from the compiler's host text: as the kernel says, and nothing that is not understood."""

from functools import cache

import pytest
import tilelang
from tilelang import tvm

from dsv4_kernels.gemm import fp8_gemm
from dsv4_kernels.host_text import Address, TensorMap, UnreadableHostError, read_host
from dsv4_kernels.registry import get_kernel
from dsv4_kernels.tile import corrections

TARGET = {"kind": "cuda", "arch": "sm_90a"}
# CUtensorMapDataType and the swizzle of 128 bytes, as cuda.h numbers them.
UINT8, SWIZZLE_128B = 0, 3


@cache
def _texts(kernel, *kwargs):
    make = fp8_gemm.make_kernel if kernel == "fp8_gemm" else get_kernel(kernel).make_kernel
    with corrections.corrected(), tvm.target.Target(TARGET):
        lowered = tilelang.lower(make(**dict(kwargs)), target=TARGET, enable_host_codegen=True)
    assert lowered.rt_mod is not None
    return lowered.rt_mod.inspect_source(), lowered.kernel_source


def _product():
    config = fp8_gemm.Config(16, 64, 2, weights_first=True, warpgroups=1)
    return _texts("fp8_gemm", ("n", 256), ("k", 1024), ("scale", "e8m0"), ("config", config))


@pytest.mark.parametrize("m", [1, 16, 17, 8192])
def test_a_product_with_descriptors(m):
    n, k = 256, 1024
    launch = read_host(*_product()).launch([(m, k), (m, k // 128), (n, k), (n // 128, k // 128), (m, n)])
    assert launch.function == "fp8_gemm_kernel_kernel"
    assert launch.grid == (-(-m // 16), n // 64, 1)
    assert launch.block == (2 * 128, 1, 1)  # a warpgroup that multiplies, one that loads
    stage_bytes = (16 + 64) * 512
    assert launch.shared_bytes >= 2 * stage_bytes

    def tile(argument, rows, box):
        return TensorMap(argument, UINT8, (k, rows), (k,), (128, box), (1, 1), (0, SWIZZLE_128B, 2, 0))

    x, x_scale, w, w_scale, out = range(5)
    wanted = (Address(out), tile(w, n, 64), Address(w_scale), tile(x, m, 16), Address(x_scale), m)
    assert launch.params == wanted


def test_two_dims_and_views_of_one_tensor():
    kernel = get_kernel("cache_read")
    host = read_host(*_texts("cache_read", *kernel.variants[0].kwargs.items()))
    pages, m, page_bytes = 7, 300, 37440
    views = [(pages, page_bytes), (pages, page_bytes // 2), (pages, page_bytes // 4)]
    launch = host.launch([*views, (m,), (m, 64, 8)])
    values, halves, words, places, out = map(Address, range(5))
    assert launch.params == (halves, out, places, values, words, m, pages)
    rows = 4  # a block
    assert launch.grid == (-(-m // rows), 1, 1)
    assert launch.block == (rows * 64, 1, 1)
    assert launch.shared_bytes == 0


def _replaced(old, new, place=0):
    texts = list(_product())
    assert old in texts[place]
    texts[place] = texts[place].replace(old, new)
    return texts


@pytest.mark.parametrize(
    "texts",
    [
        pytest.param(lambda: _replaced("int32_t __tvm_ffi_fp8", "int32_t other"), id="no host function"),
        pytest.param(
            lambda: _replaced("if (TVMFFIFunctionCall(fp8", "for (;;) if (TVMFFIFunctionCall(fp8"), id="loop"
        ),
        pytest.param(
            lambda: _replaced("  if (TVMFFIFunctionCall(fp8", "if (m > 3) {\n  if (TVMFFIFunctionCall(fp8"),
            id="under a condition",
        ),
        pytest.param(
            lambda: _replaced(
                "if (x_desc == NULL) {", "if (m == 0) {\n return 0;\n }\n if (x_desc == NULL) {"
            ),
            id="returns before",
        ),
        pytest.param(
            lambda: _replaced(
                "__tvm_tensormap_create_tiled_packed,", "__tvm_tensormap_create_im2col_packed,"
            ),
            id="another descriptor",
        ),
        pytest.param(lambda: _replaced("((int64_t)256)", "((int64_t)128)"), id="threads"),
        pytest.param(lambda: _replaced(".v_ptr) = w_scale;", ".v_ptr) = x_scale;"), id="another tensor"),
        pytest.param(lambda: _replaced("((int64_t)((m + 15) >> 4))", "((int64_t)f(m))"), id="a function"),
        pytest.param(lambda: _replaced("int m)", "int m, int n)", 1), id="another parameter"),
        pytest.param(lambda: _replaced("__launch_bounds__", "__bounds__", 1), id="no bounds"),
        pytest.param(lambda: _replaced("__syncthreads()", "cooperative_groups::sync()", 1), id="cooperative"),
    ],
)
def test_what_is_not_understood(texts):
    with pytest.raises(UnreadableHostError):
        read_host(*texts())


def test_a_number_of_something_else_than_shapes():
    host = read_host(*_replaced("((int64_t)((m + 15) >> 4))", "((int64_t)dev_id)"))
    with pytest.raises(UnreadableHostError, match="dev_id"):
        host.launch([(1, 1024), (1, 8), (256, 1024), (2, 8), (1, 256)])
