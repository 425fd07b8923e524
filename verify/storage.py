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

    def _view(self, bind: ir.Bind, sizes: dict[str, list[tuple[ir.DType, tuple[ir.Expr, ...]]]]) -> None:
        match bind.value:
            case ir.Call(op="handle_add_byte_offset", args=(base, ir.Const(value=offset))):
                pass
            case _:
                return
        if base is not self.arena_var or len(sizes.get(bind.var.name, ())) != 1:
            return  # stays unknown: any access to it is UNSUPPORTED
        dtype, shape = sizes[bind.var.name][0]
        alignment = ARENA_ALIGNMENT_BYTES
        while int(offset) % alignment:
            alignment //= 2
        self.by_var[bind.var] = Storage(
            bind.var.name, "shared", dtype, self._count(shape), alignment, arena_bytes=int(offset)
        )


def _shared_sizes(lowered: ir.Function) -> dict[str, list[tuple[ir.DType, tuple[ir.Expr, ...]]]]:
    """Return type and physical shape of each shared allocation, by the name of its storage.

    Merging the allocations into one arena keeps names and not sizes; two allocations of one name
    would be ambiguous, so all are returned.
    """
    found: dict[str, list[tuple[ir.DType, tuple[ir.Expr, ...]]]] = {}
    for node in ir.walk(lowered.body):
        if isinstance(node, ir.Block):
            for buffer in node.allocs:
                if buffer.scope == "shared.dyn":
                    found.setdefault(buffer.data.name, []).append((buffer.dtype, buffer.shape))
    return found
