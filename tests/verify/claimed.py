"""Which bytes `verify.access` says that a statement touches, at the executions of a run.

Terms are given the run's launch indices, rounds and data. An address that is not known after that is not
compared: `Claims.open` says which forms that befell.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import z3

from tests.verify.touched import Execution, Log
from verify import externs, host, ir, ops
from verify.access import Access, Memory, TmaCopy, read_memory
from verify.descriptors import DescriptorUse
from verify.encode import Encoder, Scope
from verify.storage import BYTE_BITS, Storages
from verify.symbols import summary
from verify.sync.evaluate import NotEvaluatedError, evaluate
from verify.walk import Site, walk

WARP = 32
_SCALE_D = {"ptx_wgmma_rs": 11, "ptx_wgmma_ss": 12}  # argument: whether the old sum is kept
_MATRIX_LANES = 8  # of ldmatrix and stmatrix give the rows of one matrix


@dataclass
class Reader:
    """What `verify.access` takes of `properties.Context`."""

    function: ir.Function
    host: host.Host
    lowered: ir.Function | None = None
    encoder: Encoder = field(default_factory=Encoder)

    def __post_init__(self) -> None:
        """Walk the function."""
        lowered = self.lowered or ir.Function("", (), {}, ir.Seq(None, ()), {})
        self.extracted = SimpleNamespace(device=self.function, lowered=lowered)
        self.device_sites = walk(self.function, self.encoder, ())
        self.storages = Storages(self)  # type: ignore[arg-type]

    def memory(self) -> Memory:
        """Return every access."""
        return read_memory(self)  # type: ignore[arg-type]


# --------------------------------------------------------------------------- executions
@dataclass
class Rows:
    """The distinct executions of one statement by one thread each.

    Attributes:
        of: execution of the log -> row of each of its threads.
    """

    threads: np.ndarray
    launch: dict[str, np.ndarray]
    rounds: list[np.ndarray]
    of: dict[int, np.ndarray]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.threads)


def rows_of(log: Log) -> dict[int, Rows]:
    """Return the executions by the identity of the statement."""
    by_statement: dict[int, list[tuple[int, Execution]]] = defaultdict(list)
    for number, execution in enumerate(log.executions):
        by_statement[id(execution.statement)].append((number, execution))
    found = {}
    for key, parts in by_statement.items():
        tags = list(parts[0][1].launch)
        columns = [np.stack([e.threads, *(e.launch[t] for t in tags), *e.rounds], axis=1) for _, e in parts]
        points, row = np.unique(np.concatenate(columns), axis=0, return_inverse=True)
        ends = np.cumsum([len(c) for c in columns])[:-1]
        of = dict(zip((number for number, _ in parts), np.split(row.reshape(-1), ends), strict=True))
        launch = {tag: points[:, 1 + k] for k, tag in enumerate(tags)}
        found[key] = Rows(points[:, 0], launch, list(points[:, 1 + len(tags) :].T), of)
    return found


class Evaluated:
    """Terms at the rows of one site."""

    def __init__(self, site: Site, rows: Rows, dims: Mapping[str, int], data: Mapping[str, Any]) -> None:
        """Name the indices; `data`: tensors by the name of their storage variable."""
        self.count, self.data = len(rows), data
        self.values: dict[str, Any] = {name: np.full(self.count, value) for name, value in dims.items()}
        for index in site.scope.launch:
            self.values[index.const.decl().name()] = rows.launch[index.tag]
        for index, column in zip(site.scope.loops, rows.rounds, strict=False):
            self.values[index.const.decl().name()] = column

    def at(self, term: z3.ExprRef | int, lane: tuple[str, int] | None = None) -> np.ndarray:
        """Return `term` at every row, for one lane of a vector.

        Raises:
            NotEvaluatedError: a symbol is not known.
        """
        if isinstance(term, int):
            return np.full(self.count, term)
        values = dict(self.values)
        if lane is not None:
            values[lane[0]] = np.full(self.count, lane[1])
        return np.broadcast_to(np.asarray(self._read(term, values)), (self.count,))

    def _read(self, term: z3.ExprRef, values: dict[str, Any]) -> Any:
        """Evaluate, with what elements of read-only tensors hold."""
        reads = [a for name, a in summary(term).applications if a.num_args() and name.startswith("param!")]
        swaps = []
        for application in reads:
            name = f"read!{application.get_id()}"
            table = self.data[application.decl().name().split("~")[-1]]
            place = np.clip(self._read(application.arg(0), values), 0, len(table) - 1)
            values[name] = table[place]
            made = z3.Bool(name) if z3.is_bool(application) else z3.Int(name)
            swaps.append((application, made))
        return evaluate(z3.substitute(term, *swaps) if swaps else term, values)


# --------------------------------------------------------------------------- claims
@dataclass
class Claim:
    """Bytes that one access touches, at the executions that make it.

    Attributes:
        form: what makes it.
        place: which memory.
        rows, octets: (n,) an execution of the statement, and a byte of the place.
        sure: mode (r, w) -> (n,) whether the byte is said to be touched; else it may be.
    """

    form: str
    place: str
    rows: np.ndarray
    octets: np.ndarray
    sure: dict[str, np.ndarray]


def form_of(site: Site) -> str:
    """Return a name for what makes an access."""
    node = site.node
    if isinstance(node, ir.Call):
        if node.op != "call_extern":
            return node.op
        return "AllReduce" if ops.all_reduce(node) is not None else str(externs.called(node).name)  # type: ignore[union-attr]
    if isinstance(node, ir.Load) and node.buffer.scope == "shared.barrier":
        return "mbarrier"
    return type(node).__name__


class Claims:
    """The accesses of `verify.access` at the executions of a log."""

    def __init__(
        self, reader: Reader, memory: Memory, log: Log, dims: Mapping[str, int], tensors: Mapping[str, Any]
    ) -> None:
        """`tensors`: by the name of the storage variable."""
        self.reader, self.memory, self.log, self.dims = reader, memory, log, dims
        self.data = {name: _integers(t) for name, t in tensors.items()}
        self.rows = rows_of(log)
        self.open: set[str] = set()  # forms of accesses that were not compared
        self.own = {id(s.node): len(s.scope.hypotheses) for s in reader.device_sites if s.node is s.statement}
        self.var = {id(storage): var for var, storage in reader.storages.by_var.items()}

    def of_accesses(self) -> Iterator[tuple[int, Claim]]:
        """Yield the claims with the identity of their statement."""
        for access in self.memory.accesses:
            if access.mode == "pointer" or id(access.site.statement) not in self.rows:
                continue
            yield from self._access(access)
        for copy in self.memory.tma:
            if id(copy.site.statement) in self.rows:
                yield id(copy.site.statement), self._box(copy)

    def _taken(self, site: Site, at: Evaluated, lane: tuple[str, int] | None) -> tuple[np.ndarray, bool]:
        """Return at which rows a part of a statement is evaluated, and whether that is known.

        What holds of the statement itself has to hold wherever it was executed.
        """
        own = self.own[id(site.statement)]
        taken, known = np.ones(at.count, bool), True
        for number, hypothesis in enumerate(site.scope.hypotheses):
            try:
                holds = at.at(hypothesis.term, lane)
            except (NotEvaluatedError, KeyError):
                known = known and number < own
                continue
            assert number >= own or holds.all(), f"{hypothesis.label} does not hold where the statement runs"
            taken = taken & holds
        return taken, known

    def _access(self, access: Access) -> Iterator[tuple[int, Claim]]:
        site, rows = access.site, self.rows[id(access.site.statement)]
        at = Evaluated(site, rows, self.dims, self.data)
        lanes = [i for i in site.scope.indices if i.tag == "lane" and i.const is site.scope.lane]
        form = form_of(site)
        place, base = self.log.places[self.var[id(access.storage)]]
        for lane in [(lanes[0].const.decl().name(), k) for k in range(site.scope.lanes)] if lanes else [None]:
            try:
                taken, known = self._taken(site, at, lane)
                start, count = at.at(access.start, lane), at.at(access.count, lane)
            except NotEvaluatedError:
                self.open.add(form)
                continue
            unit = access.unit_bits
            first, last = start * unit // BYTE_BITS, -(-(start + count) * unit // BYTE_BITS)
            octets = first[:, None] + np.arange(int((last - first).max()))
            row, column = np.nonzero((octets < last[:, None]) & taken[:, None])
            sure = {m: (_sure(access, m, rows) & known)[row] for m in access.mode}
            yield id(site.statement), Claim(form, place, row, octets[row, column] + base, sure)

    def _box(self, copy: TmaCopy) -> Claim:
        """Return what a copy touches of its tensor: the box, less what lies outside."""
        rows = self.rows[id(copy.site.statement)]
        at = Evaluated(copy.site, rows, self.dims, self.data)
        given = copy.descriptor
        bits = given.tensor.dtype.bits
        sizes = [int(at.at(self.reader.encoder.term(d, Scope()))[0]) for d in given.dims]
        strides = [int(at.at(self.reader.encoder.term(s, Scope()))[0]) for s in given.strides]
        address, inside = np.zeros((len(rows), 1), np.int64), np.ones((len(rows), 1), bool)
        for axis, (coordinate, box) in enumerate(zip(copy.coordinates, given.box, strict=True)):
            position = at.at(coordinate)[:, None, None] + np.arange(box)[None, None, :]
            step = bits if axis == 0 else strides[axis] * BYTE_BITS
            address = (address[:, :, None] + position * step).reshape(len(rows), -1)
            within = (position >= 0) & (position < sizes[axis])
            inside = (inside[:, :, None] & within).reshape(len(rows), -1)
        row, element = np.nonzero(inside)
        octets = address[row, element][:, None] // BYTE_BITS + np.arange(max(bits // BYTE_BITS, 1))
        row = np.repeat(row, octets.shape[1])
        modes = "r" if not copy.store else "rw" if copy.reduce else "w"
        sure = {mode: np.ones(len(row), bool) for mode in modes}
        return Claim(f"box of {form_of(copy.site)}", f"global {given.tensor.name}", row, octets.ravel(), sure)

    def operands(self) -> Iterator[tuple[DescriptorUse, np.ndarray]]:
        """Yield each wgmma operand, and its first byte at each row of the statement."""
        for use in self.memory.descriptors:
            rows = self.rows.get(id(use.site.statement))
            if rows is None:
                continue
            at = Evaluated(use.site, rows, self.dims, self.data)
            yield use, at.at(use.start_bytes)


def _sure(access: Access, mode: str, rows: Rows) -> np.ndarray:
    """Return at which rows all of an access is touched; elsewhere it is a bound of what is."""
    node, every = access.site.node, np.ones(len(rows), bool)
    if not isinstance(node, ir.Call):
        return every
    if node.op in ("ptx_ldmatrix", "ptx_stmatrix") and access.storage.kind == "shared":
        return rows.threads % WARP < _MATRIX_LANES * int(node.args[1].value)  # type: ignore[union-attr]
    if access.what == "wgmma accumulators" and mode == "r":  # read where the old sum is kept
        keeps = node.args[_SCALE_D[node.op]]
        return every if isinstance(keeps, ir.Const) and keeps.value else ~every
    if node.op in ("atomic_load_elem_op", "atomic_store_elem_op"):
        return every if mode == ("r" if "load" in node.op else "w") else ~every
    bounds = node.op == "warpgroup_fence_operand" or ops.all_reduce(node) is not None
    return ~every if bounds else every


def _integers(tensor: torch.Tensor) -> Any:
    return tensor.reshape(-1).numpy() if not tensor.dtype.is_floating_point else np.zeros(0, np.int64)
