"""Which memory a pointer of the device IR points into, and how large it is."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import z3

from verify import ir
from verify.encode import Scope

if TYPE_CHECKING:
    from verify.properties import Context

TORCH_ALIGNMENT_BYTES = 16  # least that the vector accesses rely on; the host entry points check it
ARENA_ALIGNMENT_BYTES = 1024  # of buf_dyn_shmem in the CUDA text
BARRIER_ALIGNMENT_BYTES = 16  # of the mbarrier array in the CUDA text
LOCAL_ALIGNMENT_BYTES = 16  # registers; see the ledger entry of properties/alignment.py
BYTE_BITS = 8

Kind = Literal["global", "shared", "barrier", "local"]
_Size = tuple[ir.DType, tuple[ir.Expr, ...]]


@dataclass(frozen=True)
class Storage:
    """One allocation.

    Attributes:
        element: type that pointer arithmetic in the CUDA text counts in.
        elements: number of them.
        tensor: the tile IR's buffer, for global memory.
        arena_bytes: where in the dynamic shared arena it starts, for its views.
        alignment_bytes: that the address of element 0 is known to have.
    """

    name: str
    kind: Kind
    element: ir.DType
    elements: z3.ArithRef
    alignment_bytes: int
    tensor: ir.Buffer | None = None
    arena_bytes: int | None = None


class Storages:
    """Resolves storage variables of the device IR of one kernel."""

    def __init__(self, context: "Context") -> None:
        """Collect parameters, allocations and views."""
        self.by_var: dict[ir.Var, Storage] = {}
        self.arena: Storage | None = None
        self.arena_var: ir.Var | None = None
        self._context = context
        for param, tensor in context.host.tensors.items():
            count = self._count(tensor.shape)
            self.by_var[param] = Storage(
                tensor.name, "global", tensor.dtype, count, TORCH_ALIGNMENT_BYTES, tensor=tensor
            )
        body = context.extracted.device.body
        for node in ir.walk(body):
            if isinstance(node, ir.Alloc):
                self._alloc(node.buffer)
        sizes = _shared_sizes(context.extracted.lowered)
        for node in ir.walk(body):
            if isinstance(node, ir.Bind):
                self._view(node, sizes)

    def of(self, data: ir.Var) -> Storage:
        """Return the storage behind `data`.

        Raises:
            UnsupportedIR: it is no parameter, allocation or view that we know.
        """
        storage = self.by_var.get(data)
        if storage is None:
            raise ir.UnsupportedIR(f"storage of {data.name} is not known")
        return storage

    def _count(self, shape: tuple[ir.Expr, ...]) -> z3.ArithRef:
        total = z3.IntVal(1)
        for extent in shape:
            total = total * self._context.encoder.term(extent, Scope())
        return z3.simplify(total)

    def _alloc(self, buffer: ir.Buffer) -> None:
        scope = buffer.scope
        if scope == "shared.barrier":
            kind, alignment = "barrier", BARRIER_ALIGNMENT_BYTES
        elif scope in ("shared", "shared.dyn"):
            kind, alignment = "shared", max(1, buffer.dtype.bits // BYTE_BITS)
            if scope == "shared.dyn":
                alignment = ARENA_ALIGNMENT_BYTES
        elif scope.startswith("local"):
            kind, alignment = "local", LOCAL_ALIGNMENT_BYTES
        else:
            return
        storage = Storage(buffer.name, kind, buffer.dtype, self._count(buffer.shape), alignment)  # type: ignore[arg-type]
        self.by_var[buffer.data] = storage
        if scope == "shared.dyn":
            self.arena, self.arena_var = storage, buffer.data

    def _view(self, bind: ir.Bind, sizes: dict[str, list[_Size]]) -> None:
        match bind.value:
            case ir.Call(op="handle_add_byte_offset", args=(base, ir.Const(value=offset))):
                pass
            case _:
                return
        known = sizes.get(bind.var.name, ())
        if base is not self.arena_var or not known or any(not _alike(known[0], k) for k in known):
            return  # stays unknown: any access to it is UNSUPPORTED
        dtype, shape = known[0]
        alignment = ARENA_ALIGNMENT_BYTES
        while int(offset) % alignment:
            alignment //= 2
        self.by_var[bind.var] = Storage(
            bind.var.name, "shared", dtype, self._count(shape), alignment, arena_bytes=int(offset)
        )


def _alike(one: _Size, other: _Size) -> bool:
    """Return whether two allocations have the same type and the same constant shape."""
    shapes = [[getattr(extent, "value", None) for extent in shape] for _, shape in (one, other)]
    return one is other or (one[0] == other[0] and shapes[0] == shapes[1] and None not in shapes[0])


def _shared_sizes(lowered: ir.Function) -> dict[str, list[_Size]]:
    """Return type and physical shape of each shared allocation, by the name of its storage.

    Merging the allocations into one arena keeps names and not sizes; allocations of one name (reductions'
    workspaces) are ambiguous unless all are alike, so all are returned.
    """
    found: dict[str, list[_Size]] = {}
    for node in ir.walk(lowered.body):
        if isinstance(node, ir.Block):
            for buffer in node.allocs:
                if buffer.scope == "shared.dyn":
                    found.setdefault(buffer.data.name, []).append((buffer.dtype, buffer.shape))
    return found
