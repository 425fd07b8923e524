"""Products on the GPU: rows of batches up to 8192 over 20 calls, and what a call allocates."""

import pytest
import torch

from dsv4_kernels.registry import all_kernels
from tests.compare import as_tuple, bits

PRODUCTS = [k for k in all_kernels() if k.make_kernel.__module__.startswith("dsv4_kernels.gemm.")]
LARGEST = 8192
REPEATS = 20
COUNTS = (1, 16, 17, 64, 100, 128, 129, 256, 257, 1024, 3000, 4096, 8191, 8192)
ASKED = "requested_bytes.all."  # what the allocator hands out beyond that depends on the blocks that it holds
SEED = 11


def _ends(cases):
    return cases[:1] if len(cases) == 1 else [cases[0], cases[-1]]


def _dense():
    """Each product whose batch is the first dim of its first two operands, at each shape of weights."""
    for kernel in PRODUCTS:
        if kernel.row_invariant:
            shapes = {}
            for case in kernel.cases:
                if "bench" in case.tags:
                    shapes.setdefault(tuple(v for n, v in case.dims.items() if n != "m"), case)
            # Two shapes tell: the first, and the last one.
            for case in _ends(list(shapes.values())):
                yield pytest.param(kernel, case, id=f"{kernel.name}-{case.id}")


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "case"), list(_dense()))
def test_gpu_rows_of_batches_up_to_8192(kernel, case, gpu_record):
    """20 calls of each size at random places, random neighbours: the bits of the largest batch."""
    inputs = kernel.make_inputs({**case.dims, "m": LARGEST}, torch.device("cuda"), SEED)
    full = tuple(bits(t) for t in as_tuple(kernel.fn(*inputs)))
    cut = [isinstance(i, torch.Tensor) and p < 2 and i.shape[0] == LARGEST for p, i in enumerate(inputs)]
    generator = torch.Generator().manual_seed(SEED)
    for count in COUNTS:
        same = True
        for _ in range(REPEATS):
            first = int(torch.randint(0, LARGEST - count + 1, (), generator=generator))
            rows = slice(first, first + count)
            part = [i[rows].clone() if c else i for c, i in zip(cut, inputs, strict=True)]
            got = as_tuple(kernel.fn(*part))
            same = same and all(torch.equal(bits(g), f[rows]) for g, f in zip(got, full, strict=True))
        gpu_record(
            kernel, kernel.select({**case.dims, "m": count}), f"rows of 8192 {case.id} m={count}", same
        )
        assert same, f"{count} rows"


def _benched():
    for kernel in PRODUCTS:
        for case in _ends([c for c in kernel.cases if "bench" in c.tags]):
            yield pytest.param(kernel, case, id=f"{kernel.name}-{case.id}")


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "case"), list(_benched()))
def test_gpu_allocates_its_outputs_and_the_stated_workspace(kernel, case, gpu_record):
    inputs = kernel.make_inputs(case.dims, torch.device("cuda"), SEED)
    kernel.fn(*inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()[ASKED + "current"]
    torch.cuda.reset_peak_memory_stats()
    outputs = as_tuple(kernel.fn(*inputs))
    torch.cuda.synchronize()
    beyond = torch.cuda.memory_stats()[ASKED + "peak"] - before - sum(t.nbytes for t in outputs)
    stated = kernel.workspace_bytes(case.dims)
    gpu_record(kernel, kernel.select(case.dims), f"allocates {case.id}", beyond == stated)
    assert beyond == stated
