"""The quotient of silu has the bits of IEEE division, for every bf16 value."""

import pytest
import torch

from megamoe import quotient

BITS = 16
LARGEST = 2.0**126  # a clamp is below it
TINY = 2.0**-26  # of a value below it, 1 + exp(-value) is 2, however the exponential is rounded
OPS = quotient.TorchOps()


def values():
    every = torch.arange(1 << BITS, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    return every[~(every > LARGEST)]


def found(low, divisor, rounds=quotient.ROUNDS):
    scaled = quotient.bounded(OPS, divisor * quotient.scale(OPS, low))
    near = quotient.guess(OPS, scaled)
    for _ in range(rounds):
        near = quotient.closer(OPS, scaled, near)
    return quotient.quotient(OPS, low, scaled, near)


def differing(low, divisor, rounds=quotient.ROUNDS):
    got, want = found(low, divisor, rounds), low / divisor
    return (got.view(torch.int32) != want.view(torch.int32)) & ~(got.isnan() & want.isnan())


@pytest.mark.parametrize("ulps", [-2, -1, 0, 1, 2])
def test_every_value(ulps):
    low = values()
    exact = torch.exp(-low.double()).float()
    moved = (exact.view(torch.int32) + ulps).view(torch.float32)
    is_moved = exact.isfinite() & (exact > torch.finfo(torch.float32).tiny) & (low.abs() > TINY)
    exponential = torch.where(is_moved, moved, exact)
    assert not differing(low, 1 + exponential).any()


def test_fewer_rounds_do_not_do():
    low = values()
    assert differing(low, 1 + torch.exp(-low), quotient.ROUNDS - 1).any()
