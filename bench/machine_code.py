"""Loads of shared memory that are still under way when a thread says that it has read, in compiled kernels.

    python -m bench.machine_code KERNEL | KERNEL:VARIANT | FILE.so | FILE.cubin | FOLDER ...

A kernel's name compiles its shipped variants, as `bench.precompile` does; a folder is searched for TileLang's
`executable.so` and for cubins. docs/machine_code.md says what is looked for and why.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from bench.precompile import Compiled, variants_of
from bench.sass import Function, Instruction, MachineCodeError, cubins, disassemble, find_nvdisasm

# What others may take as word that this thread has read; a copy is what would write there.
MBARRIER, EXPECT, BARRIER, COPY = "mbarrier", "expect-tx", "barrier", "copy"
_LOADS = ("LDS", "LDSM", "LD", "ATOMS")
# Results come in the order of issue: a load without a scoreboard of its own has come when a later one has.
_IN_ORDER = ("LDS", "LDSM", "SHFL")
_COPIES = ("UTMALDG", "UBLKCP", "LDGSTS")
_WIDTHS = {"64": 2, "128": 4}  # registers
_HASH_CHARS = 8  # of a folder's name, in a cache of TileLang
_REGISTER = re.compile(r"\bR(\d+)\b")

# A load's index, and scoreboards any of which is zero no sooner than its result has come.
Pending = frozenset[tuple[int, frozenset[int]]]


@dataclass(frozen=True)
class Finding:
    """An arrival with loads under way.

    Attributes:
        kind: MBARRIER, EXPECT, BARRIER or COPY.
        arrival: the instruction.
        loads: those whose results may not have come, in order of addresses.
    """

    kind: str
    arrival: Instruction
    loads: tuple[Instruction, ...]

    def __str__(self) -> str:
        """Say where, and which loads."""
        loads = "".join(f"\n        {load.address:#07x} {load}" for load in self.loads)
        return f"{self.arrival.address:#07x} {self.kind}: {self.arrival}, under way:{loads}"


@dataclass(frozen=True)
class Report:
    """What was found in one kernel.

    Attributes:
        name: the kernel's in the cubin.
        copies: whether copies that the hardware makes by itself write to its shared memory.
        arrivals: how many there are.
        found: those with loads under way.
    """

    name: str
    copies: bool
    arrivals: int
    found: tuple[Finding, ...]


def kind_of(code: Instruction) -> str | None:
    """Return of which kind an arrival is; None: it is none."""
    modifiers = code.opcode.split(".")[1:]
    if code.never:
        return None
    if code.base == "SYNCS" and "ARRIVE" in modifiers:
        # A1T0: one arrival, no bytes. ART0: a register says how many.
        return MBARRIER if {"A1T0", "ART0"} & set(modifiers) else EXPECT
    if code.base == "ARRIVES":
        return MBARRIER
    if code.base in ("BAR", "UCGABAR_ARV"):
        return BARRIER
    return COPY if code.base in _COPIES else None


def pending_loads(function: Function) -> dict[int, Pending]:
    """Return the loads that may be under way when an instruction is issued, for all that can be reached.

    Raises:
        MachineCodeError: an instruction or a target is not known, or a register is used while a load to it is
            under way: then scoreboards are not as this module takes them to be.
    """
    successors = function.successors()
    code = function.instructions
    before: dict[int, Pending] = {0: frozenset()}
    work = [0]
    while work:
        i = work.pop()
        if i == len(code):
            raise MachineCodeError(f"{function.name}: runs past the end")
        after = _issued(code, i, _waited(code[i], before[i]))
        for n in successors[i]:
            known = before.get(n)
            if known is None or not after <= known:
                before[n] = after if known is None else known | after
                work.append(n)
    found = {i: _waited(code[i], pending) for i, pending in before.items()}
    for i, pending in found.items():
        _check_registers(function, i, pending)
    return found


def _waited(code: Instruction, pending: Pending) -> Pending:
    return frozenset(p for p in pending if not p[1] & code.waits) if code.waits else pending


def _issued(code: Sequence[Instruction], i: int, pending: Pending) -> Pending:
    """Return what is under way behind instruction `i`, which has waited."""
    own = code[i]
    if own.never:
        return pending
    if own.write is not None and pending:
        if own.base in _IN_ORDER:
            pending = frozenset(
                (n, by | {own.write} if code[n].write is None and code[n].base in _IN_ORDER else by)
                for n, by in pending
            )
        elif _is_fence(code, i):
            pending = frozenset((n, by | {own.write}) for n, by in pending)
    if own.base in _LOADS and not own.operands.startswith("RZ"):
        pending |= {(i, frozenset() if own.write is None else frozenset({own.write}))}
    return pending


def _is_fence(code: Sequence[Instruction], i: int) -> bool:
    """Return whether this is `fence.proxy.async`: it waits for a MEMBAR that stands right before it."""
    if code[i].opcode != "FENCE.VIEW.ASYNC.S" or code[i].guard or i == 0:
        return False
    before = code[i - 1]
    return before.base == "MEMBAR" and not before.guard and before.read in code[i].waits


def _check_registers(function: Function, i: int, pending: Pending) -> None:
    own = function.instructions[i]
    if own.never or not pending:
        return
    # A load may write again what an earlier one writes: they come in order.
    operands = own.operands.partition(",")[2] if own.base in _IN_ORDER else own.operands
    used = {int(n) for n in _REGISTER.findall(operands)}
    for n, _ in pending:
        load = function.instructions[n]
        if used & _results(load):
            raise MachineCodeError(
                f"{function.name} at {own.address:#x}: {own}: uses a register that the load at "
                f"{load.address:#x} may not have written: {load}"
            )


def _results(load: Instruction) -> set[int]:
    """Return the registers that a load writes."""
    match = _REGISTER.match(load.operands)
    if match is None:
        raise MachineCodeError(f"at {load.address:#x}: {load}: where does it go?")
    *_, last = modifiers = load.opcode.split(".")
    count = int(last) if load.base == "LDSM" and last.isdigit() else 1
    count = max([count, *(_WIDTHS[m] for m in modifiers if m in _WIDTHS)])
    return set(range(int(match[1]), int(match[1]) + count))


def audit(function: Function) -> Report:
    """Look through one kernel.

    Raises:
        MachineCodeError: it holds what is not understood.
    """
    found = []
    arrivals = 0
    code = function.instructions
    for i, pending in sorted(pending_loads(function).items()):
        kind = kind_of(code[i])
        arrivals += kind is not None
        if kind and pending:
            found.append(Finding(kind, code[i], tuple(code[n] for n in sorted({n for n, _ in pending}))))
    copies = any(c.base in _COPIES for c in code)
    return Report(function.name, copies, arrivals, tuple(found))


def audit_cubin(cubin: bytes) -> list[Report]:
    """Look through all kernels of a cubin; needs nvdisasm."""
    return [audit(function) for function in disassemble(cubin) if function.instructions]


def compiled_cubin(work: Compiled) -> bytes:
    """Compile a variant; needs nvcc, no GPU."""
    from dsv4_kernels import runtime
    from dsv4_kernels.registry import get_kernel

    kernel = runtime.compiled(get_kernel(work.kernel).make_kernel, work.variant.kwargs)
    return cubin_of(kernel)


def cubin_of(kernel: object) -> bytes:
    """Return the machine code of what `tilelang.compile` returned."""
    from dsv4_kernels import runtime

    return runtime._cubin(runtime._Launcher(kernel)._module)


def _cubin_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the cubins of a file, or those that differ of all libraries and cubins in a folder."""
    files = sorted([*path.rglob("*.so"), *path.rglob("*.cubin")]) if path.is_dir() else [path]
    seen = set()
    for file in files:
        found = cubins(file.read_bytes())
        if not found and not path.is_dir():
            raise MachineCodeError(f"{path}: no cubin in it")
        for cubin in found:
            if cubin not in seen:
                seen.add(cubin)
                yield file.parent.name[:_HASH_CHARS] if path.is_dir() else file.name, cubin


def _sources(names: Sequence[str]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield what is to be looked through: its name, and how to get the cubin."""
    for name in names:
        if Path(name).exists():
            yield from ((label, lambda cubin=cubin: cubin) for label, cubin in _cubin_files(Path(name)))
        else:
            yield from ((w.variant.id, lambda w=w: compiled_cubin(w)) for w in _variants(name))


def _variants(name: str) -> list[Compiled]:
    kernel, _, variant = name.partition(":")
    found = [w for w in variants_of([kernel]) if variant in ("", w.variant.id)]
    if not found:
        raise MachineCodeError(f"no such file, folder, kernel or variant: {name}")
    return found


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="KERNEL[:VARIANT]|FILE|FOLDER...")
@click.option("--all", "with_all", is_flag=True, help="Also kernels without copies by the hardware.")
@click.option("--list", "with_list", is_flag=True, help="Each arrival that was found, with its loads.")
def main(names: tuple[str, ...], with_all: bool, with_list: bool) -> None:
    """Report arrivals with loads of shared memory under way. Exits 1 if there are any, 3 on an error."""
    hits = looked = 0
    try:
        find_nvdisasm()
        for label, get in _sources(names):
            for report in audit_cubin(get()):
                looked += 1
                found = report.found if report.copies or with_all else ()
                hits += bool(found)
                kinds = Counter(f.kind for f in found)
                text = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "none"
                click.echo(f"{report.name} {label}: {report.arrivals} arrivals, with loads under way: {text}")
                if with_list:
                    for finding in found:
                        click.echo(f"    {finding}")
    except MachineCodeError as error:
        click.echo(str(error), err=True)
        sys.exit(3)
    click.echo(f"{looked} kernels, {hits} with loads under way at an arrival")
    sys.exit(1 if hits else 0)


if __name__ == "__main__":
    main()
