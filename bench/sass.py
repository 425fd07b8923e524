"""Machine code of compiled kernels: the cubin out of a file, its instructions, and where each may go next.

`nvdisasm` prints the instructions. Beside each stands the 128-bit word, whose upper bits say what the
hardware waits for: an instruction whose result comes later counts one of six scoreboards up and, once it is
there, down again; another's wait mask holds it back until the named ones are zero.
"""

import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

_ELF = b"\x7fELF"
_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_EM_CUDA = 190
_SHT_NOBITS = 8
_CONTROL_SHIFT = 41  # in the upper 64 bits of an instruction: stall 4 bits, yield 1, then what is read here
_INSTRUCTION_BYTES = 16
_NO_SCOREBOARD = 7
_TIMEOUT_S = 120
_SECTION_LINE = re.compile(r'\s*\.section\s+\.text\.([^",\s]+)')
_LABEL_LINE = re.compile(r"([.$\w@]+):\s*$")
_WORD = r"/\* 0x([0-9a-f]{16}) \*/"
_INSTRUCTION_LINE = re.compile(rf"\s+/\*([0-9a-f]{{4,}})\*/\s+(.*?)\s*;\s+{_WORD}\s*$")
_UPPER_LINE = re.compile(rf"\s+{_WORD}\s*$")
_TEXT = re.compile(r"(?:@(!?U?P(?:\d+|T)) )?([A-Z][\w.]*)(?:\s+(.*))?$")
_TARGET = re.compile(r"`\(([^)]+)\)")
_TABLE = re.compile(r'\(\*"BRANCH_TARGETS ([^"]*)"\*\)')
_IMMEDIATE = re.compile(r"\bR\d+, (?:RZ, RZ, )?0x([0-9a-f]+)$")
_ENDS = ("EXIT", "KILL")
# As in NVIDIA's list of Hopper's instructions, without those of textures and surfaces. One that is not here
# might jump or load: an error.
_STRAIGHT = frozenset(
    """
    FADD FADD32I FCHK FFMA FFMA32I FMNMX FMUL FMUL32I FSEL FSET FSETP FSWZADD MUFU HADD2 HADD2_32I HFMA2
    HFMA2_32I HMMA HMNMX2 HMUL2 HMUL2_32I HSET2 HSETP2 DADD DFMA DMMA DMUL DSETP BMMA BMSK BREV FLO IABS
    IADD IADD3 IADD32I IDP IDP4A IMAD IMMA IMNMX IMUL IMUL32I ISCADD ISCADD32I ISETP LEA LOP LOP3 LOP32I
    POPC SHF SHL SHR VABSDIFF VABSDIFF4 VHMNMX VIADD VIADDMNMX VIMNMX VIMNMX3 F2F F2I I2F I2I I2IP I2FP
    F2IP F2FP FRND MOV MOV32I MOVM PRMT SEL SGXT SHFL PLOP3 PSETP P2R R2P LD LDC LDG LDGDEPBAR LDGSTS
    LDL LDS LDSM ST STG STL STS STSM STAS SYNCS ARRIVES MATCH QSPC ATOM ATOMS ATOMG RED REDG REDAS CCTL
    CCTLL CCTLT ERRBAR MEMBAR FENCE R2UR REDUX S2UR UBMSK UBREV UCLEA UF2FP UFLO UIADD3 UIMAD UISETP
    ULDC ULEA ULOP ULOP3 ULOP32I UMOV UP2UR UPLOP3 UPOPC UPRMT UPSETP UR2UP USEL USGXT USHF USHL USHR
    VOTE VOTEU BGMMA HGMMA IGMMA QGMMA WARPGROUP WARPGROUPSET UBLKCP UBLKPF UBLKRED UTMACCTL
    UTMACMDFLUSH UTMALDG UTMAPF UTMAREDG UTMASTG USETMAXREG UCGABAR_ARV UCGABAR_WAIT UCGABAR_GET
    UCGABAR_SET ACQBULK BMOV BPT BSSY CGAERRBAR ELECT ENDCOLLECTIVE NANOSLEEP PREEXIT WARPSYNC YIELD B2R
    BAR CS2R DEPBAR LEPC NOP PMTRIG S2R R2B
    """.split()  # noqa: SIM905
)
_JUMPS = frozenset({"BRA", "BRX", "BSYNC", "BREAK", "CALL", "RET", *_ENDS})


class MachineCodeError(RuntimeError):
    """Machine code cannot be had, or holds what is not understood."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: in bytes from its section's begin.
        guard: the predicate under which it takes effect, such as P0 or !UP1; "": always.
        opcode: with modifiers, such as LDS.64.
        operands: the text behind it.
        write: the scoreboard that counts its result, if one does.
        read: that which counts its operands, if one does.
        waits: scoreboards that must be zero before it is issued, whatever its guard.
    """

    address: int
    guard: str
    opcode: str
    operands: str
    write: int | None = None
    read: int | None = None
    waits: frozenset[int] = frozenset()

    def __str__(self) -> str:
        """Return its text."""
        return f"{f'@{self.guard} ' if self.guard else ''}{self.opcode} {self.operands}".strip()

    @cached_property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".", 1)[0]

    @property
    def never(self) -> bool:
        """Whether its guard is never true: what it waits for counts, what it does not do."""
        return self.guard in ("!PT", "!UPT")


@dataclass
class Function:
    """One section of code: a kernel, and what it calls.

    Attributes:
        name: the kernel's.
        instructions: in order of addresses.
        labels: the index of the instruction behind each.
    """

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def successors(self) -> list[tuple[int, ...]]:
        """Return, for each instruction, the indices of all that may be next: more than are, if need be.

        Of an instruction that runs past the end, as padding does, one is the number of instructions.

        Raises:
            MachineCodeError: an instruction or a target is not known.
        """
        returns = self._returns()
        found = [self._next(i, returns) for i in range(len(self.instructions))]
        ends = self._regions(found)
        return [tuple(sorted(n | ends.get(i, set()))) for i, n in enumerate(found)]

    def _next(self, i: int, returns: set[int]) -> set[int]:
        """Return what may follow an instruction; of BSYNC, without where its region ends."""
        code = self.instructions[i]
        base = code.base
        if base not in _STRAIGHT and base not in _JUMPS:
            raise MachineCodeError(f"{self._at(code)}: unknown instruction")
        if code.never or base not in _JUMPS:
            # WARPSYNC.COLLECTIVE names where it may go on, BSSY where BSYNC does.
            return {i + 1} if code.never or base == "BSSY" else {i + 1} | self._targets(code)
        found = {"BRX": self._table, "RET": lambda _: returns}.get(base, self._targets)(code)
        if base in ("BRA", "BRX", "CALL", "RET") and not found:
            raise MachineCodeError(f"{self._at(code)}: where to?")
        ends = base in ("BRX", "RET", *_ENDS) or (code.opcode == "BRA" and code.operands.startswith("`"))
        return found if ends and not code.guard else found | {i + 1}

    def _regions(self, following: list[set[int]]) -> dict[int, set[int]]:
        """Return where each BSYNC may go on: where those BSSY say that come before it on some path."""
        if any(code.base == "BMOV" and code.operands.startswith("B") for code in self.instructions):
            raise MachineCodeError(f"{self.name}: a convergence barrier is loaded from a register")
        found: dict[int, set[int]] = defaultdict(set)
        open_regions: dict[int, frozenset[tuple[str, int]]] = {0: frozenset()}
        work = [0]
        while work:
            i = work.pop()
            if i == len(following):
                continue
            code, state = self.instructions[i], open_regions[i]
            register = code.operands.split(",")[0]
            if code.base == "BSSY":
                (end,) = self._targets(code)
                kept = state if code.guard else {r for r in state if r[0] != register}
                state = frozenset({*kept, (register, end)})
            elif code.base == "BSYNC":
                found[i] |= {end for name, end in state if name == register}
            for n in following[i] | found.get(i, set()):
                if n not in open_regions or not state <= open_regions[n]:
                    open_regions[n] = open_regions.get(n, frozenset()) | state
                    work.append(n)
        return found

    def _at(self, code: Instruction) -> str:
        return f"{self.name} at {code.address:#x}: {code}"

    def _label(self, code: Instruction, label: str) -> int:
        if label not in self.labels:
            raise MachineCodeError(f"{self._at(code)}: no such label in this section: {label}")
        return self.labels[label]

    def _targets(self, code: Instruction) -> set[int]:
        """Return what its operands name."""
        return {self._label(code, label) for label in _TARGET.findall(code.operands)}

    def _table(self, code: Instruction) -> set[int]:
        table = _TABLE.search(code.operands)
        if table is None:
            raise MachineCodeError(f"{self._at(code)}: where to?")
        return {self._label(code, label.strip()) for label in table[1].split(",")}

    def _returns(self) -> set[int]:
        """Return where calls go on: behind them, and at addresses that registers are set to before them."""
        index = {code.address: i for i, code in enumerate(self.instructions)}
        found = set()
        for i, code in enumerate(self.instructions):
            if code.base != "CALL":
                continue
            if not code.opcode.startswith("CALL.REL") or not _TARGET.search(code.operands):
                raise MachineCodeError(f"{self._at(code)}: where to?")
            set_before = set()
            for before in reversed(self.instructions[:i]):
                if before.base in _JUMPS:
                    break
                value = _IMMEDIATE.search(before.operands) if before.base in ("MOV", "IMAD") else None
                if value and int(value[1], 16) in index:
                    set_before.add(index[int(value[1], 16)])
            if not set_before:
                raise MachineCodeError(f"{self._at(code)}: no return address")
            found |= {i + 1} | set_before
        return found


def parse(text: str) -> list[Function]:
    """Read what `nvdisasm -hex -c` prints.

    Raises:
        MachineCodeError: a line is not understood, or there is no code.
    """
    functions: list[Function] = []
    lower: tuple[int, str, str] | None = None
    for line in text.splitlines():
        if section := _SECTION_LINE.match(line):
            functions.append(Function(section[1]))
        elif match := _INSTRUCTION_LINE.match(line):
            if not functions or lower:
                raise MachineCodeError(f"out of place: {line.strip()}")
            lower = int(match[1], 16), match[2], match[3]
        elif match := _UPPER_LINE.match(line):
            if lower is None:
                raise MachineCodeError(f"out of place: {line.strip()}")
            functions[-1].instructions.append(_instruction(lower[0], lower[1], int(match[1], 16)))
            lower = None
        elif match := _LABEL_LINE.match(line):
            if functions:
                functions[-1].labels[match[1]] = len(functions[-1].instructions)
        elif "/*0" in line or "/* 0x" in line:
            raise MachineCodeError(f"not understood: {line.strip()}")
    if not any(f.instructions for f in functions):
        raise MachineCodeError("no code")
    for function in functions:
        addresses = [code.address for code in function.instructions]
        if addresses != list(range(0, len(addresses) * _INSTRUCTION_BYTES, _INSTRUCTION_BYTES)):
            raise MachineCodeError(f"{function.name}: a gap between instructions")
    return functions


def _instruction(address: int, text: str, upper: int) -> Instruction:
    match = _TEXT.match(text)
    if match is None:
        raise MachineCodeError(f"not understood: {text}")
    control = upper >> _CONTROL_SHIFT
    write, read, waits = control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
    return Instruction(
        address,
        match[1] if match[1] and match[1] not in ("PT", "UPT") else "",
        match[2],
        match[3] or "",
        None if write == _NO_SCOREBOARD else write,
        None if read == _NO_SCOREBOARD else read,
        frozenset(k for k in range(6) if waits >> k & 1),
    )


def cubins(data: bytes) -> list[bytes]:
    """Return the cubins in a file's bytes: the file itself is one, or a library that holds some."""
    found = []
    at = data.find(_ELF)
    while at >= 0:
        size = _cubin_size(data, at)
        if size:
            found.append(data[at : at + size])
        at = data.find(_ELF, at + max(size, 1))
    return found


def _cubin_size(data: bytes, at: int) -> int:
    """Return the bytes of the cubin that begins there, 0 if what does is no cubin."""
    if len(data) < at + _ELF_HEADER.size:
        return 0
    header = _ELF_HEADER.unpack_from(data, at)
    machine, segments_at, sections_at, segment_bytes, segments, entry_bytes, sections = (
        header[i] for i in (2, 5, 6, 9, 10, 11, 12)
    )
    if machine != _EM_CUDA or entry_bytes != _SECTION.size:
        return 0
    end = max(segments_at + segments * segment_bytes, sections_at + sections * entry_bytes)
    if at + end > len(data):
        return 0
    for i in range(sections):
        section = _SECTION.unpack_from(data, at + sections_at + i * entry_bytes)
        if section[1] != _SHT_NOBITS:
            end = max(end, section[4] + section[5])
    return end if at + end <= len(data) else 0


def find_nvdisasm() -> Path:
    """Return NVIDIA's disassembler: on PATH, in CUDA_HOME, or of the package nvidia-cuda-nvdisasm.

    Raises:
        MachineCodeError: there is none.
    """
    home = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    places = [home / "bin", *(b for p in sys.path if p for b in sorted(Path(p).glob("nvidia/*/bin")))]
    for place in (None, *places):
        tool = shutil.which("nvdisasm", path=place and str(place))
        if tool:
            return Path(tool)
    raise MachineCodeError(
        "requires nvdisasm on PATH, in CUDA_HOME/bin, or by `pip install nvidia-cuda-nvdisasm`, got none"
    )


def disassemble(cubin: bytes) -> list[Function]:
    """Return the code of a cubin.

    Raises:
        MachineCodeError: there is no disassembler, it fails, or its text is not understood.
    """
    tool = find_nvdisasm()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(
            [tool, "-hex", "-c", path], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    if done.returncode:
        raise MachineCodeError(f"nvdisasm: {done.stderr.strip() or done.returncode}")
    return parse(done.stdout)
