"""Products on the GPU: rows of batches up to 8192 over 20 calls, and what a call allocates."""

import pytest
import torch

from dsv4_kernels.registry import all_kernels
from tests.compare import as_tuple, bits

PRODUCTS = [k for k in all_kernels() if k.make_kernel.__module__.startswith("dsv4_kernels.gemm.")]
LARGEST = 8192
REPEATS = 20
COUNTS = (1, 16, 17, 64, 100, 128, 129, 256, 257, 1024, 1536, 2304, 3000, 4096, 8191, 8192)
ASKED = "requested_bytes.all."  # what the allocator hands out beyond that depends on the blocks that it holds
SEED = 11


def _ends(cases):
    return cases[:1] if len(cases) == 1 else [cases[0], cases[-1]]


def _chosen(tensor, rows):
    """Return these rows; torch has no gather for every type of one byte."""
    return tensor.view(torch.uint8)[rows].view(tensor.dtype) if tensor.element_size() == 1 else tensor[rows]


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


@pytest.mark.parametrize("kernel", [k for k in PRODUCTS if k.row_invariant], ids=lambda k: k.name)
def test_the_batches_take_every_form(kernel):
    """A form that no batch of the test below takes would never have its rows' bits asked."""
    shapes = [c.dims for c in kernel.cases if {"gpu", "bench"} & set(c.tags)]
    taken = {kernel.select({**dims, "m": count}).id for dims in shapes for count in COUNTS}
    assert {v.id for v in kernel.variants} <= taken


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "case"), list(_dense()))
def test_gpu_rows_of_batches_up_to_8192(kernel, case, gpu_record):
    """20 calls of each size, any rows of the largest batch in any order, among other neighbours: its bits."""
    inputs = kernel.make_inputs({**case.dims, "m": LARGEST}, torch.device("cuda"), SEED)
    full = tuple(bits(t) for t in as_tuple(kernel.fn(*inputs)))
    cut = [isinstance(i, torch.Tensor) and p < 2 and i.shape[0] == LARGEST for p, i in enumerate(inputs)]
    generator = torch.Generator().manual_seed(SEED)
    for count in COUNTS:
        same = True
        for _ in range(REPEATS):
            rows = torch.randperm(LARGEST, generator=generator)[:count].cuda()
            part = [_chosen(i, rows) if c else i for c, i in zip(cut, inputs, strict=True)]
            got = as_tuple(kernel.fn(*part))
            same = same and all(torch.equal(bits(g), f[rows]) for g, f in zip(got, full, strict=True))
        name = f"rows of 8192 in any order {case.id} m={count}"
        gpu_record(kernel, kernel.select({**case.dims, "m": count}), name, same)
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
