"""Small device functions that make every form of access to memory that `verify.access` reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.verify.device import build as b
from tests.verify.device.build import BX, TX, add, buffer, call, const, load, mul, op, pointer, store, sync
from verify import externs, host, ir
from verify.externs.registry import SOURCE_ATTRIBUTE

THREADS = 128
WORDS = 4 * THREADS  # elements of most buffers
MATRIX_BYTES = 512  # that four 8x8 matrices of 16 bits take
LANES = 4


@dataclass
class Case:
    """A kernel, and the tensors it is run on."""

    kernel: b.Kernel
    tensors: list[torch.Tensor]


def tensor(name: str, kind: str = "int32", count: int = WORDS) -> ir.Buffer:
    return buffer(name, kind, count, "global")


def shared(kind: str = "int32", count: int = WORDS, name: str = "tile") -> ir.Buffer:
    return buffer(name, kind, count, "shared.dyn")


def local(kind: str = "int32", count: int = 8, name: str = "regs") -> ir.Buffer:
    return buffer(name, kind, count, "local")


def words(count: int = WORDS) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


def case(
    body: Sequence[ir.Stmt], *tensors: tuple[ir.Buffer, torch.Tensor], allocs: Any = (), **more: Any
) -> Case:
    options = {"blocks": 1, "threads": THREADS, **more}
    kernel = b.Kernel(tensors=[t for t, _ in tensors], allocs=allocs, body=body, **options)
    return Case(kernel, [value for _, value in tensors])


def evaluated(node: ir.Expr) -> ir.Stmt:
    return ir.Eval(b.span(), node)


# --------------------------------------------------------------------------- elements
def elements() -> Case:
    """Scalars and vectors, of all widths, in all memories; addresses with all that an index is made of."""
    x, out, narrow = tensor("x"), tensor("out", count=2 * WORDS), tensor("narrow", "uint8")
    tile, regs, small = shared(), local(count=16), buffer("one", "int32", 1, "local.var")
    k = ir.Var(b.I32, "k")
    named = ir.Var(b.I32, "named")
    far = ir.Buffer("far", x.dtype, x.shape, (), "global", x.data, const(5))
    body = [
        *[store(regs, n, n) for n in range(16)],
        store(tile, mul(TX, 4), load(x, mul(TX, 4), 4), 4),
        store(small, 0, op("bitxor", TX, 3)),
        ir.Bind(b.span(), named, add(mul(op("floordiv", TX, 8), 8), op("floormod", mul(TX, 3), 8))),
        b.loop(k, 3, store(regs, add(k, 1), load(far, op("bitxor", add(named, mul(k, 16)), 2)))),
        store(narrow, add(mul(TX, 2), 1), ir.Const(b.U8, 7)),
        store(out, add(TX, mul(BX, WORDS)), load(x, load(small, 0))),
        b.when(
            op("lt", TX, 70),
            store(out, add(add(TX, THREADS), mul(BX, WORDS)), load(regs, 2)),
            other=[store(out, add(add(TX, 2 * THREADS), mul(BX, WORDS)), load(regs, op("bitand", TX, 7)))],
        ),
    ]
    tensors = (x, words()), (out, words(2 * WORDS)), (narrow, torch.zeros(WORDS, dtype=torch.uint8))
    return case(body, *tensors, allocs=[tile, regs, small], blocks=2)


def vectors() -> Case:
    """Vectors whose lanes have addresses of their own, and parts of bytes."""
    x, out, codes = tensor("x"), tensor("out"), tensor("codes", "float4_e2m1fn")
    regs, packed = local(count=16), local("float4_e2m1fn", 16, "packed")
    apart = ir.Ramp(ir.DType("int32", LANES), op("floordiv", TX, 2), const(37))
    wide = ir.Load(ir.DType("int32", LANES), x, (apart,))
    code = ir.Const(ir.DType("float4_e2m1fn"), 1.0)
    body = [
        store(regs, 0, wide, LANES),
        store(out, mul(TX, 4), load(regs, 0, 4), 4),
        *[store(packed, n, code) for n in range(4)],
        b.when(op("lt", TX, 32), store(codes, mul(TX, 16), load(packed, 2))),
        b.when(op("lt", TX, 16), store(codes, add(mul(TX, 32), 3), load(codes, add(mul(TX, 32), 2)))),
        store(packed, 4, load(codes, mul(TX, 2), 2), 2),
    ]
    tensors = (x, words()), (out, words()), (codes, torch.zeros(WORDS // 2, dtype=torch.int8))
    return case(body, *tensors, allocs=[regs, packed])


def guarded() -> Case:
    """Reads that are only made where a condition holds: of a choice, of `and` and `or`, in a loop."""
    x, rows, out = tensor("x"), tensor("rows", count=THREADS), tensor("out")
    small = buffer("round", "int32", 1, "local.var")
    low = op("lt", TX, 50)
    chosen = ir.Select(b.I32, low, load(x, add(TX, 9)), load(x, add(mul(TX, 2), 1)), True)
    both = op("and", op("ge", TX, 64), op("eq", load(x, add(TX, 200)), 3))
    either = op("or", op("ge", TX, 96), op("eq", load(x, add(TX, 300)), 3))
    indirect = load(x, load(rows, op("bitxor", TX, 1)))
    count = ir.While(
        b.span(),
        op("lt", load(small, 0), op("bitand", TX, 3)),
        ir.Seq(
            None,
            (
                store(out, add(mul(TX, 4), load(small, 0)), load(x, add(TX, load(small, 0)))),
                store(small, 0, add(load(small, 0), 1)),
            ),
        ),
    )
    body = [
        store(out, mul(TX, 4), chosen),
        b.when(both, store(out, add(mul(TX, 4), 1), 1)),
        b.when(either, store(out, add(mul(TX, 4), 2), 1)),
        store(out, add(mul(TX, 4), 3), indirect),
        store(small, 0, const(0)),
        count,
    ]
    places = (torch.arange(THREADS, dtype=torch.int32) * 7) % WORDS
    return case(body, (x, words()), (rows, places), (out, words()), allocs=[small])


# --------------------------------------------------------------------------- operations
def atomic_operations() -> Case:
    """All of them, through both kinds of pointers."""
    total, real, half = tensor("total"), tensor("real", "float32"), tensor("half", "float16")
    regs, halves = local("float32", 4, "added"), local("float16", 2, "pair")
    at, one = lambda n: add(TX, n), const(1.0, "float32")
    body: list[ir.Stmt] = [
        *[store(regs, n, one) for n in range(4)],
        *[store(halves, n, const(1.0, "float16")) for n in range(2)],
    ]
    for number, name in enumerate(("max", "min", "max_ret", "min_ret", "or", "add", "add_ret")):
        where = pointer(total, at(3 * number), 1, "rw")
        if number % 2:
            where = ir.Call(ir.HANDLE, "address_of", (load(total, at(3 * number)),))
        body.append(evaluated(b.value_of(f"atomic_{name}_elem_op", "int32", where, TX)))
    body.append(evaluated(b.value_of("atomic_store_elem_op", "int32", pointer(total, at(33), 1, "w"), 1, 0)))
    body.append(evaluated(b.value_of("atomic_load_elem_op", "int32", pointer(total, at(40), 1, "r"), 0)))
    for ret in ("", "_ret"):
        four = pointer(real, mul(TX, 4), 4, "rw"), pointer(regs, 0, 4)
        body.append(evaluated(b.value_of(f"atomic_addx4{ret}_elem_op", "float32", *four)))
        two = pointer(half, add(mul(TX, 2), 64), 2, "rw"), pointer(halves, 0, 2)
        body.append(evaluated(b.value_of(f"atomic_addx2{ret}_elem_op", "float16", *two)))
    tensors = (
        (total, words()),
        (real, torch.zeros(WORDS)),
        (half, torch.zeros(WORDS, dtype=torch.float16)),
    )
    return case(body, *tensors, allocs=[regs, halves])


def copies() -> Case:
    """cp.async of each size, and with a condition."""
    x, tile = tensor("x", count=2 * WORDS), shared(count=2 * WORDS)
    keep = op("lt", op("floormod", TX, 5), 3)
    body = [
        call("ptx_cp_async", pointer(tile, TX, 1, "w"), pointer(x, add(TX, 3), 1), 1),
        call("ptx_cp_async", pointer(tile, add(mul(TX, 2), 128), 2, "w"), pointer(x, mul(TX, 2), 2), 2),
        call("ptx_cp_async", pointer(tile, add(mul(TX, 4), 384), 4, "w"), pointer(x, mul(TX, 4), 4), 4, keep),
        call("ptx_commit_group"),
        call("ptx_wait_group", 0),
    ]
    return case(body, (x, words(2 * WORDS)), allocs=[tile])


def matrices() -> Case:
    """ldmatrix and stmatrix of one, two and four matrices."""
    tile, regs = shared("uint16", 4 * MATRIX_BYTES), local("uint32", 8)
    body: list[ir.Stmt] = [store(tile, add(TX, k * THREADS), ir.Const(tile.dtype, 1)) for k in range(16)]
    body.append(sync())
    warp, lane = op("floordiv", TX, 32), op("bitand", TX, 31)
    row = add(mul(warp, MATRIX_BYTES // 2), mul(op("bitxor", lane, 5), 8))
    for number, trans in ((1, False), (2, True), (4, False)):
        source, target = pointer(tile, row, 8), pointer(regs, 4 - number, number, "w")
        body.append(call("ptx_ldmatrix", const(trans, "bool"), number, source, target))
    body.append(sync())
    for number, trans in ((1, True), (2, False), (4, False)):
        values = [load(regs, k) if number == 4 else const(k, "uint32") for k in range(number)]
        body.append(call("ptx_stmatrix", const(trans, "bool"), number, pointer(tile, row, 8, "w"), *values))
    return case(body, allocs=[tile, regs])


def reductions() -> Case:
    """Over a warp, over the block, and over the second of two groups of threads."""
    out = tensor("out")
    space, other = shared("int32", THREADS + 16, "space"), buffer("other", "int32", 64, "shared")
    body = []

    def reduced(threads: int, offset: int, *workspace: ir.Expr) -> ir.Expr:
        text = f"tl::AllReduce<tl::SumOp, {threads}, 1, {offset}, tl::NamedBarrier<{threads}>>::run"
        if not offset:
            text = f"tl::AllReduce<tl::MaxOp, {threads}, 1, 0>::run"
        return ir.Call(b.I32, "call_extern", (ir.Str(ir.DType("string"), text), TX, *workspace))

    body.append(store(out, TX, reduced(32, 0)))
    body.append(store(out, add(TX, THREADS), reduced(THREADS, 0, pointer(space, 16, THREADS, "rw"))))
    body.append(sync())
    late = store(out, add(TX, 2 * THREADS), reduced(64, 64, pointer(other, 0, 64, "rw")))
    body.append(b.when(op("ge", TX, 64), late))
    return case(body, (out, words()), allocs=[space, other])


def functions() -> Case:
    """The registered functions that go through pointers."""
    out, regs = tensor("out", "uint8", 16 * THREADS), local("uint8", 16)
    names = [e.name for e in externs.everything() if e.accesses]
    body = []
    for number, extern in enumerate(e for e in externs.everything() if e.accesses):
        pointers = iter(range(len(extern.accesses)))
        args = []
        for parameter in extern.function.parameters:
            if not parameter.is_pointer:
                args.append(ir.Const(ir.DType("uint32"), 0x12345678))
                continue
            part = next(pointers)
            place = pointer(regs, 8 * part, 8, "w") if number % 2 else None
            args.append(place or pointer(out, add(mul(TX, 16), 8 * part), 8, "w"))
        body.append(call("call_extern", extern.name, *args))
    made = case(body, (out, torch.zeros(16 * THREADS, dtype=torch.uint8)), allocs=[regs])
    function = made.kernel.function
    text = ir.Str(ir.DType("string"), externs.source(*names))
    function.body = ir.Attr(None, SOURCE_ATTRIBUTE, None, text, function.body)
    return made


# --------------------------------------------------------------------------- TMA
ROWS, COLUMNS, DEEP = 20, 72, 3
BOX = 64, 16, 1
BOX_BYTES = 2 * BOX[0] * BOX[1]


def descriptor(name: str, of: ir.Buffer, box: tuple[int, ...], swizzle: int, bits: int, code: int) -> Any:
    dims = (COLUMNS, ROWS, DEEP)[: len(box)]
    strides = (bits // 8, COLUMNS * bits // 8, ROWS * COLUMNS * bits // 8)[: len(box)]
    return host.Descriptor(
        name,
        code,
        of,
        tuple(const(d) for d in dims),
        tuple(const(s) for s in strides),
        box,
        (1,) * len(box),
        0,
        swizzle,
        0,
        0,
    )


def boxes() -> Case:
    """Loads of boxes that reach over the edges, a store, and one that adds."""
    x = tensor("x", "bfloat16", DEEP * ROWS * COLUMNS)
    plane = tensor("plane", "float32", ROWS * COLUMNS)
    tile, bars = shared("bfloat16", 4 * BOX_BYTES), buffer("bars", "uint64", 2, "shared.barrier")
    sums = shared("float32", 16 * 16, "sums")
    maps = [ir.Var(ir.HANDLE, f"map{k}") for k in range(4)]
    given = {
        maps[0]: descriptor("swizzled", x, BOX, 3, 16, 9),
        maps[1]: descriptor("narrow", x, (32, 8, 2), 2, 16, 9),
        maps[2]: descriptor("flat", plane, (16, 16), 0, 32, 7),
        maps[3]: descriptor("back", x, (16, 8, 1), 1, 16, 9),
    }
    bar = load(bars, 1)
    first = op("eq", TX, 0)
    k = ir.Var(b.I32, "k")

    def loaded(number: int, to: ir.Expr, *at: Any) -> ir.Stmt:
        return call("tma_load", maps[number], bar, to, *at, 0)

    def stored(number: int, source: ir.Expr, adds: int, *at: Any) -> ir.Stmt:
        return call("tma_store", maps[number], source, *at, adds, 0)

    half = BOX_BYTES // 2
    body = [
        b.when(first, call("ptx_init_barrier_thread_count", bar, 1)),
        call("ptx_fence_barrier_init"),
        sync(),
        b.when(
            first,
            call("ptx_arrive_barrier_expect_tx", bar, 2 * BOX_BYTES + 2 * 32 * 8 * 2 + 16 * 16 * 4),
            b.loop(k, 2, loaded(0, pointer(tile, mul(k, half), half, "w"), mul(k, 64), 7, add(k, 1))),
            loaded(1, pointer(tile, 2 * half, 512, "w"), -8, 15, 1),
            loaded(2, pointer(sums, 0, 256, "w"), 60, -3),
        ),
        call("mbarrier_wait_parity", bar, 0),
        sync(),
        b.when(
            first,
            stored(3, pointer(tile, 0, 128), 0, 64, 17, 0),
            stored(2, pointer(sums, 0, 256), 1, 63, 9),
            call("tma_store_arrive"),
            call("tma_store_wait", 0),
        ),
    ]
    values = torch.zeros(DEEP * ROWS * COLUMNS, dtype=torch.bfloat16), torch.zeros(ROWS * COLUMNS)
    made = case(body, (x, values[0]), (plane, values[1]), allocs=[tile, sums, bars], maps=given)
    return made


# --------------------------------------------------------------------------- wgmma
@dataclass(frozen=True)
class Operand:
    """Where a wgmma operand lies: bytes of leading and stride offsets, layout type, direction."""

    layout: int
    leading: int
    stride: int
    k_major: bool
    start: int = 0
    kind: str = "bf16"


CORE, ATOM = 128, {0: 128, 1: 1024, 2: 512, 3: 256}  # bytes of 8 rows, by layout type
ARENA_BYTES = 1 << 16


def product(a: Operand | None, right: Operand, n: int, scale: int = 1, offset: int = 0) -> Case:
    """One wgmma of a warpgroup; `a` None: from registers; `offset`: units of 16 bytes at its use."""
    kind = right.kind
    k = 32 * 8 // {"bf16": 16, "e4m3": 8, "tf32": 32}[kind]
    tile = shared("int32", ARENA_BYTES // 4)
    acc, regs = local("float32", n // 2 + 4, "acc"), local("uint8", 32, "frag")
    marks = [buffer(f"desc_{x}", "uint64", 1, "local.descriptor.wgmma") for x in "ab"]
    step = ir.Var(b.I32, "step")
    whole = b.loop(step, ARENA_BYTES // 4 // (4 * THREADS), store(
        tile, mul(add(TX, mul(step, THREADS)), 4), ir.Broadcast(ir.DType("int32", 4), const(0)), 4
    ))  # fmt: skip
    body: list[ir.Stmt] = [whole]
    body += [store(acc, n_, const(0.0, "float32")) for n_ in range(n // 2 + 4)]
    body += [store(regs, n_, ir.Const(b.U8, 0)) for n_ in range(32)]
    for given, mark in zip((a, right), marks, strict=True):
        if given is None:
            continue
        fields = given.layout, given.leading // 16, given.stride // 16
        half = given.start // 32 * 16
        at = pointer(tile, half // 4, 1)
        body.append(call("initialize_wgmma_descriptor", load(mark, 0), at, *fields))
        body.append(call("increase_descriptor_offset", load(mark, 0), given.start - half))
    body += [call("fence_proxy_async"), sync(), call("warpgroup_arrive")]
    body.append(call("warpgroup_fence_operand", "float32", acc.data, 0, n // 2))
    shape, rest = f"m64n{n}k{k}", (const(bool(scale), "bool"), 1, 1)
    flags = [const(o.k_major, "bool") for o in (a, right) if o is not None]
    second = right_args(marks[1], offset)
    if a is None:
        types = (kind, kind, "fp32")
        body.append(call("ptx_wgmma_rs", shape, *flags, *types, regs.data, 16, *second, acc.data, 4, *rest))
    else:
        types = (kind, kind, "fp32")
        left = right_args(marks[0], 0)
        body.append(call("ptx_wgmma_ss", shape, *flags, *types, *left, *second, acc.data, 4, *rest))
    body += [call("warpgroup_commit_batch"), call("warpgroup_wait", 0)]
    return case(body, allocs=[tile, acc, regs, *marks])


def right_args(mark: ir.Buffer, offset: int) -> tuple[ir.Expr, ir.Expr]:
    return mark.data, const(offset)
