"""The properties, one file each, and what they are given.

A property turns a kernel into obligations; it does not solve them. What it cannot express it
reports as unsupported or unknown, which fails the property.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import z3

from dsv4_kernels.contract import Contract
from verify import ir, symbols
from verify.access import Memory, read_memory
from verify.encode import Encoder, Hypothesis, every_element, of_every_element, of_every_pair
from verify.extract import Extracted
from verify.host import Host, read_host
from verify.ranges import Range, limits
from verify.refine.run import Refinement, refinement_of
from verify.signature.dispatch import Dispatch
from verify.solve import Answer, Obligation, Prover
from verify.storage import Storages
from verify.sync.phases import Phases
from verify.walk import Site, walk


@dataclass(frozen=True)
class Issue:
    """A statement that a property cannot handle, and why."""

    span: ir.Span | None
    message: str


@dataclass
class Claims:
    """What a property asks to be proved of one kernel.

    Attributes:
        answers: obligations that the property had to decide itself to know what to ask for.
        unsupported: operations without a meaning; the verdict is UNSUPPORTED.
        unknown: things it could not decide; the verdict is UNKNOWN.
        assumptions: ledger entries.
        notes: facts for the report.
        spent: provers behind `answers`, for what they spent.
        facts: values by name that other variants' proofs are compared with.
        rests: what claims of suites (`Dispatch.exchanged`) are taken to prove: claim -> tensors.
    """

    obligations: list[Obligation] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    unsupported: list[Issue] = field(default_factory=list)
    unknown: list[Issue] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    spent: list[Prover] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    rests: dict[str, set[str]] = field(default_factory=dict)


class Property(Protocol):
    """One property of kernels.

    Attributes:
        name: as in reports and certificates.
        depends: properties that must be PROVED for this one's verdict to mean anything.
    """

    name: str
    depends: tuple[str, ...]

    def claims(self, context: "Context") -> Claims:
        """Return what has to be proved of the kernel.

        Raises:
            UnsupportedIR: the property cannot handle this kernel at all.
        """
        ...


@dataclass
class Context:
    """One variant of one kernel, as the properties see it.

    Attributes:
        contract: preconditions on the dims.
        dims: those that the variant fixes.
        encoder: names and terms, shared by all stages and properties.
        dispatch: batch dims, and what else the dispatcher may choose.
    """

    extracted: Extracted
    contract: Contract
    dims: Mapping[str, int]
    encoder: Encoder = field(default_factory=Encoder)
    dispatch: Dispatch = field(default_factory=Dispatch)

    def __post_init__(self) -> None:
        """Let go of what was kept of the last kernel's terms."""
        symbols.forget()

    @cached_property
    def hypotheses(self) -> tuple[Hypothesis, ...]:
        """The contract's clauses over symbolic dims, and the machine range of each dim."""
        device = self.extracted.device
        params = [p for p in device.params if p.dtype.is_int]
        names = self.contract.names() | {p.name for p in params}
        tensors = {b.name: b for b in self.extracted.tile.buffers.values() if b.name in names}
        env = {
            name: self.dims[name] if name in self.dims else self.encoder.dim(name)
            for name in names - set(tensors)
        }
        clauses = tuple(
            Hypothesis(clause, "contract", term if isinstance(term, z3.ExprRef) else z3.BoolVal(term))
            for clause, term in self.contract.terms(env, only=lambda used: not used & set(tensors))
            if term is not True
        )
        clauses += tuple(c for tensor in tensors.values() for c in self._of_data(tensor, set(tensors), env))
        ranges = tuple(
            Hypothesis(
                f"0 <= {p.name} <= {p.dtype.int_range[1]} (a shape held in {p.dtype})",
                "shape",
                z3.And(self.encoder.dim(p.name) >= 0, self.encoder.dim(p.name) <= p.dtype.int_range[1]),
            )
            for p in params
        )
        return clauses + ranges

    def _of_data(
        self, tensor: ir.Buffer, tensors: set[str], env: Mapping[str, int | z3.ArithRef]
    ) -> Iterator[Hypothesis]:
        """Yield the clauses on every element of `tensor`, under each name that a stage gives it.

        Raises:
            UnsupportedIR: the tensor is not of integers, or a clause speaks of two tensors.
        """
        if not tensor.dtype.is_int:
            raise ir.UnsupportedIR(f"contract on the data of {tensor.name}, which is {tensor.dtype}")
        stages = (self.extracted.device, self.extracted.tile)
        names = {tensor.name, tensor.data.name}
        names |= {p.name for p in stages[0].params if self.host.tensors.get(p) is tensor}
        for symbol in every_element(sorted(names), tensor.dtype).values():
            if tensor.name in self.contract.distinct:
                yield of_every_pair(
                    f"{self.contract.distinct[tensor.name]} (the caller's promise, no launch checks it)",
                    symbol,
                )
            own = self.contract.terms({**env, tensor.name: symbol}, only=lambda used: tensor.name in used)
            for clause, term in own:
                if self.contract.names_of(clause) & tensors != {tensor.name}:
                    raise ir.UnsupportedIR(f"contract on the data of two tensors: {clause}")
                label = (
                    f"{clause} (every element of {tensor.name}; the caller's promise, no launch checks it)"
                )
                for name in names:
                    known, labels = self.encoder.promised.get(name, (Range(), frozenset[str]()))
                    found = limits(term, symbol)
                    if found != Range():
                        self.encoder.promised[name] = (known & found, labels | {label})
                yield of_every_element(label, term)

    @cached_property
    def host(self) -> Host:
        """The launch: tensors behind device parameters, descriptors, extents."""
        return read_host(self.extracted.host, self.extracted.device, self.extracted.tile)

    @cached_property
    def storages(self) -> Storages:
        """The memory behind each pointer of the device IR."""
        return Storages(self)

    @cached_property
    def memory(self) -> Memory:
        """Every access of the device IR to memory."""
        return read_memory(self)

    @cached_property
    def phases(self) -> Phases:
        """The phases of the mbarriers of the device IR."""
        return Phases(self)

    @cached_property
    def refinement(self) -> Refinement:
        """The comparison of the tile IR with the device IR."""
        return refinement_of(self.extracted, self.host, self.hypotheses)

    @cached_property
    def device_sites(self) -> list[Site]:
        """Every site of the device IR."""
        return self.sites(self.extracted.device)

    def sites(self, function: ir.Function) -> list[Site]:
        """Return every site of a stage under the contract."""
        return walk(function, self.encoder, self.hypotheses)


def all_properties() -> tuple[Property, ...]:
    """Return every property: each module of this package that defines PROPERTY, dependencies first."""
    modules = (importlib.import_module(f"{__name__}.{i.name}") for i in pkgutil.iter_modules(__path__))
    pending = {p.name: p for m in modules if (p := getattr(m, "PROPERTY", None)) is not None}
    ordered: dict[str, Property] = {}
    while pending:
        ready = [n for n, p in pending.items() if not any(d in pending for d in p.depends)]
        if not ready:
            raise RuntimeError(f"properties depend on each other: {sorted(pending)}")
        for name in sorted(ready):
            ordered[name] = pending.pop(name)
    return tuple(ordered.values())
