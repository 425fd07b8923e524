"""A kernel that needs no GPU and no compiler, and a device on which every call takes 5 us."""

from dataclasses import replace

import torch

from dsv4_kernels.contract import Contract
from dsv4_kernels.registry import Case, KernelSpec, Variant

DIMS = {"m": 4, "k": 8}


class SteadyDevice:
    def __init__(self):
        self.now = 0.0

    def prepare(self, call):
        return call, "graph"

    def flush_l2(self):
        pass

    def record(self):
        self.now += 5.0
        return self.now

    def synchronize(self):
        pass

    def elapsed_us(self, start, stop):
        return stop - start


def make_inputs(dims, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(dims["m"], dims["k"], generator=generator, device=device),)


def make_spec(**changes):
    variant = Variant("only", {})
    spec = KernelSpec(
        name="double",
        fn=lambda x: x + x,
        reference=lambda x: 2 * x,
        make_inputs=make_inputs,
        make_kernel=lambda: None,
        variants=(variant,),
        select=lambda dims: variant,
        contract=Contract(()),
        cases=(Case("small", DIMS, ("bench",)), Case("odd", DIMS, ("test",))),
        num_bytes=lambda d: d["m"] * d["k"] * 8,
        source="none",
        peers=("torch_eager", "deepgemm"),
    )
    return replace(spec, **changes)
