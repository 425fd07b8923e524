"""Where wgmma and TMA find their elements, read a second time from the PTX manual: the first must agree.

The manual gives shared-memory operands as canonical layouts: coordinates in mixed radix with a stride for
each digit, in units of 16 bytes and of elements, and a swizzle of address bits on top ("Strides", "Canonical
layouts", "Swizzling modes" of wgmma.mma_async). They are written down here as tables and evaluated digit by
digit. What is held against them: `descriptors` (which bytes), `layouts.swizzle_address`, the formulas of the
interpreter and of refinement (which element is where), and products of the interpreter of elements that these
tables lay out.
"""

import itertools
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import z3

from tests.verify import access_kernels as kernels
from tests.verify.access_kernels import TX, Operand, add, call, load, mul, store, sync
from tests.verify.device import build as b
from verify import ir
from verify.descriptors import Descriptors, DescriptorUse
from verify.encode import Encoder, Scope
from verify.interp import device
from verify.interp.device import wgmma
from verify.interp.device.tma import TensorMap
from verify.layouts import swizzle_address
from verify.properties import init
from verify.refine.instructions import Matrix, k_major, mn_major
from verify.storage import ARENA_ALIGNMENT_BYTES, Storage

BYTE = 8
UNIT = 16  # bytes: T elements of the tables
SPANS = {0: 16, 1: 128, 2: 64, 3: 32}  # layout type of a descriptor -> bytes of a swizzled row
BITS = {16: 0, 32: 1, 64: 2, 128: 3}  # of the address that a swizzle flips
WARPGROUP, WARP = 128, 32


# --------------------------------------------------------------------------- the tables
def digits(value: int, radix: list[int]) -> list[int]:
    """Return `value` in mixed radix, the fastest digit first; the last radix has no bound."""
    found = []
    for base in radix[:-1]:
        found.append(value % base)
        value //= base
    return [*found, value]


def canonical(operand: Operand, size: int, row: int, k: int) -> int:
    """Return the byte of element (row, k) from the operand's start, before the swizzle.

    K-major without swizzle ((8,m),(T,2)):((1T,SBO),(1,LBO)); with 2, 4, 8 units a row
    ((8,m),(T,2k)):((units T,SBO),(1,T)). MN-major without ((T,1,m),(8,k)):((1,T,SBO),(1T,LBO)); with
    ((T,units,m),(8,k)):((1,T,LBO),(units T,SBO)). Shapes:strides in elements, T to 16 bytes.
    """
    t, units = UNIT // size, SPANS[operand.layout] // UNIT
    sbo, lbo = operand.stride // size, operand.leading // size
    if operand.k_major:
        rows, deep = ([8, 0], [units * t, sbo]), ([t, 0], [1, t if operand.layout else lbo])
    else:
        across = sbo if not operand.layout else lbo
        rows = [t, units, 0], [1, t, across]
        deep = [8, 0], [units * t, lbo if not operand.layout else sbo]
    total = 0
    for value, (radix, strides) in ((row, rows), (k, deep)):
        total += sum(d * s for d, s in zip(digits(value, radix), strides, strict=True))
    return total * size


def swizzled(address: int, span: int) -> int:
    """Flip address bits 4 and up by the bits from 7 on, one by one."""
    for number in range(BITS[span]):
        address ^= (address >> 7 + number & 1) << 4 + number
    return address


@cache
def places(operand: Operand, rows: int, k: int, size: int) -> np.ndarray:
    """Return the address of each element (rows, k)."""
    span = SPANS[operand.layout]
    at = [
        swizzled(operand.start + canonical(operand, size, r, c), span) for r in range(rows) for c in range(k)
    ]
    return np.array(at).reshape(rows, k)


# --------------------------------------------------------------------------- operands
SIZES = {"e4m3": 1, "bf16": 2, "tf32": 4}


def all_operands() -> list[tuple[Operand, int]]:
    """Return operands of each layout, direction, width and row count that the hardware has."""
    found = []
    for layout, rows in itertools.product(SPANS, (8, 24, 64, 128)):
        atom = 8 * SPANS[layout]
        for kind in SIZES:
            first = 48 if not layout else min(32, SPANS[layout] - 32)
            for stride in (atom, 3 * atom):
                leading = stride * rows // 8 if not layout else 16
                found.append((Operand(layout, leading, stride, True, 2048 + first, kind), rows))
        for near, far in ((atom, 20 * atom), (20 * atom, atom), (2 * atom, 40 * atom)):
            found.append((Operand(layout, near, far, False, 1024), rows))
    return found


OPERANDS = all_operands()
STORAGE = Storage("tile", "shared", ir.INT32, z3.IntVal(1 << 20), ARENA_ALIGNMENT_BYTES)


def number_of(operand: Operand) -> int:
    return 32 // SIZES[operand.kind]


@pytest.mark.parametrize("layout", SPANS)
def test_formulas_place_each_element_as_the_tables_do(layout):
    compared = 0
    for operand, rows in OPERANDS:
        if operand.layout != layout:
            continue
        size, k = SIZES[operand.kind], number_of(operand)
        want = places(operand, rows, k, size)
        span = SPANS[layout] if layout else 0
        mine = wgmma.Matrix(operand.start, operand.leading, operand.stride, span)
        assert np.array_equal(mine.addresses(rows, k, size, operand.k_major), want), operand
        given = Matrix(None, None, span, operand.leading, operand.stride)  # type: ignore[arg-type]
        row, column = np.indices((rows, k))
        formula = k_major if operand.k_major else mn_major
        address = operand.start + formula(given, row, column, size * BYTE)
        assert np.array_equal(swizzle_address(address, span), want), operand
        compared += want.size
    assert compared > 10_000


def listed(operand: Operand, rows: int) -> DescriptorUse:
    """Return what is said of an operand B whose descriptor was moved once after it was made."""
    site = SimpleNamespace(scope=Scope())
    half, target, number = (
        operand.start // 32 * 16,
        ir.Var(ir.HANDLE, "desc"),
        lambda v: ir.Const(ir.INT32, v),
    )
    base = SimpleNamespace(start=z3.IntVal(half // 4), unit_bits=32, storage=STORAGE)
    known = Descriptors(Encoder())
    fields = [number(v) for v in (operand.layout, operand.leading // UNIT, operand.stride // UNIT)]
    known.initialize(site, target, base, 0, fields)  # type: ignore[arg-type]
    known.increase(site, target, z3.IntVal(operand.start - half - UNIT))  # type: ignore[arg-type]
    kind, major = ir.Str(ir.DType("string"), operand.kind), ir.Const(ir.BOOL, operand.k_major)
    k = number_of(operand)
    return known.read(site, target, z3.IntVal(1), kind, major, rows, k, "B")  # type: ignore[arg-type]


def test_the_bytes_that_are_listed_hold_every_element():
    """With the start rounded down to an atom, as those who use it do; and mostly no atom more."""
    exact = 0
    for operand, rows in OPERANDS:
        use = listed(operand, rows)
        size, k = SIZES[operand.kind], number_of(operand)
        octets = (places(operand, rows, k, size)[..., None] + np.arange(size)).ravel()
        start = z3.simplify(use.start_bytes).as_long()
        assert start == operand.start
        first = start // use.atom_bytes * use.atom_bytes if use.swizzle else start
        count, step = use.parts
        said = np.concatenate([first + p * step + np.arange(use.part_bytes) for p in range(count)])
        assert np.isin(octets, said).all(), operand
        assert octets.max() < first + use.extent_bytes
        unit = use.atom_bytes if use.swizzle else 1
        exact += len(said) == len(np.unique(octets // unit)) * unit
    assert exact > len(OPERANDS) // 2


def test_init_looks_at_the_bytes_that_are_read():
    """Without a swizzle nothing is permuted, and an operand may start between multiples of 128 bytes."""
    for operand, rows in OPERANDS:
        use = listed(operand, rows)
        (read,) = init._uses(None, use.base.storage, [use])  # type: ignore[arg-type]
        assert read.unit_bits == BYTE  # what it counts in
        first = z3.simplify(read.start).as_long()
        size, k = SIZES[operand.kind], number_of(operand)
        octets = places(operand, rows, k, size)[..., None] + np.arange(size)
        assert first <= octets.min(), operand
        assert octets.max() < first + read.count, operand


# --------------------------------------------------------------------------- TMA
@pytest.mark.parametrize("span", [0, 32, 64, 128])
def test_a_box_lies_in_shared_memory_as_the_driver_says(span):
    """Row by row; the 16-byte chunks of a line are exchanged, of a narrower span among fewer of them."""
    row_bytes, rows = span or 48, 24
    box = TensorMap("box", None, BYTE, (), (), (row_bytes, rows), span)  # type: ignore[arg-type]
    start = 4096
    want = []
    for row, byte in itertools.product(range(rows), range(row_bytes)):
        line, chunks = (row * row_bytes) // 128, max(span // UNIT, 1)
        chunk = byte // UNIT ^ (line % chunks if span else 0)
        want.append(start + row * row_bytes + chunk * UNIT + byte % UNIT)
    assert box.shared_bytes(start).tolist() == want


# --------------------------------------------------------------------------- products
PRODUCTS = {
    "K-major, 128 bytes": (Operand(1, 16, 1024, True, 32), Operand(1, 16, 2048, True, 16384 + 64), 24),
    "K-major, none": (Operand(0, 1024, 128, True), Operand(0, 128, 256, True, 16384 + 48), 16),
    "MN-major, 64 bytes": (Operand(2, 4096, 512, False), Operand(2, 1024, 4096, False, 16384), 64),
    "MN-major, none": (Operand(0, 1024, 128, False), Operand(0, 128, 2048, False, 16384), 32),
    "A in registers": (None, Operand(3, 256, 1024, False, 16384), 32),
    "e4m3": (Operand(2, 16, 512, True, 32, "e4m3"), Operand(3, 16, 256, True, 16384, "e4m3"), 8),
}


def laid_out(matrix: torch.Tensor, operand: Operand, arena: np.ndarray) -> None:
    """Write a matrix (rows, k) where an operand lies."""
    size = SIZES[operand.kind]
    at = places(operand, *matrix.shape, size)[..., None] + np.arange(size)
    arena[at] = matrix.contiguous().view(torch.uint8).reshape(*matrix.shape, size).numpy()


def fragment(matrix: torch.Tensor) -> np.ndarray:
    """Return the bytes of A that each thread holds, (128, 16): register r of a thread holds row
    thread / 4 % 8 + 8 (r % 2) of its warp's 16, K bytes 4 (thread % 4) + 16 (r / 2) and three more.
    """
    octets = matrix.contiguous().view(torch.uint8).reshape(64, 32).numpy()
    held = np.zeros((WARPGROUP, 16), np.uint8)
    for thread, register, byte in itertools.product(range(WARPGROUP), range(4), range(4)):
        row = thread // WARP * 16 + thread % WARP // 4 + 8 * (register % 2)
        held[thread, 4 * register + byte] = octets[row, thread % 4 * 4 + 16 * (register // 2) + byte]
    return held


def sums(out: torch.Tensor, n: int) -> torch.Tensor:
    """Return the product from what threads hold: D fragment, two columns of a row next to each other."""
    made = torch.zeros(64, n)
    for thread, pair, half, side in itertools.product(range(WARPGROUP), range(n // 8), range(2), range(2)):
        row = thread // WARP * 16 + thread % WARP // 4 + 8 * half
        made[row, pair * 8 + thread % 4 * 2 + side] = out[thread, pair * 4 + half * 2 + side]
    return made


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_elements_laid_out_by_the_tables(name):
    left, right, n = PRODUCTS[name]
    kind = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}[right.kind]
    generator = torch.Generator().manual_seed(0)
    k = number_of(right)
    a, w = (torch.randint(-3, 4, (r, k), generator=generator).to(kind) for r in (64, n))
    arena = np.full(kernels.ARENA_BYTES, 0x7F, np.uint8)
    laid_out(w, right, arena)
    held = np.zeros((WARPGROUP, 16), np.uint8)
    if left is None:
        held = fragment(a)
    else:
        laid_out(a, left, arena)
    out = torch.zeros(WARPGROUP, n // 2)
    made = kernels.product(left, right, n, scale=0)
    run_with(made, torch.from_numpy(arena).view(torch.int32), torch.from_numpy(held), out)
    assert torch.equal(sums(out, n), a.float() @ w.float().t())


def run_with(case: kernels.Case, arena: torch.Tensor, held: torch.Tensor, out: torch.Tensor) -> None:
    """Run a product with what shared memory and the registers of A hold to begin with."""
    function = case.kernel.function
    x, fragments = kernels.tensor("x", count=arena.numel()), kernels.tensor("a", "uint8", held.numel())
    result = kernels.tensor("out", "float32", out.numel())
    buffers = {s.buffer.name: s.buffer for s in ir.walk(function.body) if isinstance(s, ir.Alloc)}
    step = ir.Var(b.I32, "step")
    place = mul(add(TX, mul(step, WARPGROUP)), 4)
    count = out.shape[1]
    body = [s for s in ir.walk(function.body) if isinstance(s, (ir.Eval))]
    filled = b.loop(
        step,
        arena.numel() // (4 * WARPGROUP),
        store(buffers["tile"], place, load(x, place, 4), 4),
    )
    regs = [store(buffers["frag"], 16 + j, load(fragments, add(mul(TX, 16), j))) for j in range(16)]
    back = [store(result, add(mul(TX, count), j), load(buffers["acc"], 4 + j)) for j in range(count)]
    kernel = b.Kernel(
        threads=WARPGROUP,
        tensors=[x, fragments, result],
        allocs=list(buffers.values()),
        body=[filled, *regs, call("fence_proxy_async"), sync(), *body, *back],
    )
    checks = device.Checks(races=False)
    kernel.run(arena, held.reshape(-1), out, wave_threads=WARPGROUP, policy="late", checks=checks)
