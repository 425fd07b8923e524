"""That all CTAs of a launch are resident together, which deadlock freedom rests on, off compiled kernels.

A launch is cooperative: the driver refuses what does not fit, and `VirtualRanks` compares CTAs with
multiprocessors. Here it follows from the compiled kernel that as many CTAs as it counts on fit one
multiprocessor of an H100 or H200: their registers, threads, and shared memory, static and dynamic.
"""

import re

import pytest

from megamoe import instances
from megamoe.config import CONSUMERS, PRODUCERS, THREADS
from megamoe.proofs import extracted

SM_REGISTERS, SM_THREADS = 1 << 16, 2048
SM_SHARED_BYTES = 228 << 10
RESERVED_BYTES = 1 << 10  # of shared memory, for each CTA
MULTIPROCESSORS = 132
KERNELS = instances.SMALL | instances.LAYERS | instances.OF_RANKS
ITEM_BYTES = {"uint64_t": 8}
BOUNDS = re.compile(r"__launch_bounds__\((\d+), (\d+)\)")
STATIC = re.compile(r"^ *__shared__ __align__\((\d+)\) (\w+) \w+\[(\d+)\];$", re.MULTILINE)


def shared_bytes(kernel):
    """Return the shared memory of a CTA; the driver reserves some more."""
    end = 0
    for alignment, item, count in STATIC.findall(kernel.cuda_text):
        end += -end % int(alignment) + ITEM_BYTES[item] * int(count)
    assert (
        kernel.cuda_text.count("__shared__ ") == len(STATIC.findall(kernel.cuda_text)) + 1
    )  # and the dynamic
    return end + kernel.device.attrs["dyn_shared_memory_buf"].value


@pytest.mark.parametrize("name", KERNELS)
def test_ctas_that_share_a_multiprocessor_fit_it(name):
    c, kernel = KERNELS[name], extracted(KERNELS[name])
    ((threads, least_ctas),) = set(BOUNDS.findall(kernel.cuda_text))
    assert (int(threads), int(least_ctas)) == (THREADS, c.ctas_per_sm)  # to which nvcc holds registers down
    assert c.ctas_per_sm * THREADS * c.launch_registers <= SM_REGISTERS
    consumer, producer = c.registers
    assert CONSUMERS * consumer + PRODUCERS * producer <= THREADS * c.launch_registers
    assert c.ctas_per_sm * THREADS <= SM_THREADS
    assert c.ctas_per_sm * (shared_bytes(kernel) + RESERVED_BYTES) <= SM_SHARED_BYTES


@pytest.mark.parametrize("name", KERNELS)
def test_a_launch_is_cooperative_and_has_the_ctas_that_meet(name):
    c, attributes = KERNELS[name], extracted(KERNELS[name]).device.attrs
    assert attributes["use_cooperative_groups"].value == 1
    assert attributes["thread_extent"]["blockIdx.x"].value == c.launch_ranks * c.ctas
    assert c.launch_ranks * c.ctas <= c.ctas_per_sm * MULTIPROCESSORS
