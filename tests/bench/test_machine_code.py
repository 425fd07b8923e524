"""Loads under way at arrivals: in machine code written here, and in two kernels that are compiled."""

import re
import struct

import pytest
import tilelang
from click.testing import CliRunner
from tilelang import language as T

from bench import machine_code, sass
from bench.machine_code import BARRIER, COPY, EXPECT, MBARRIER, audit
from bench.sass import MachineCodeError, parse
from dsv4_kernels.tile import corrections, simplifier
from verify.extract import TARGET

ARRIVE = "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4+0x20], RZ"
FENCE = "FENCE.VIEW.ASYNC.S"
STEPS, STAGES, COLUMNS, THREADS = 8, 2, 128, 256
END = ["EXIT", ".L_end:", "BRA `(.L_end)", "NOP"]
LINE = re.compile(r"(?P<text>.*?)(?:  wr(?P<write>\d))?(?:  rd(?P<read>\d))?(?:  wait(?P<waits>\d+))?$")


def text_of(*lines):
    """Return code as nvdisasm prints it, from lines such as `LDS R2, [R3]  wr0  rd1  wait35`, and labels."""
    out = ['\t.section\t.text.k,"ax",@progbits', "k:", ".text.k:"]
    address = 0
    for line in lines:
        if line.endswith(":"):
            out.append(line)
            continue
        m = LINE.match(line)
        waits = sum(1 << int(k) for k in m["waits"] or "")
        control = waits << 11 | int(m["read"] or 7) << 8 | int(m["write"] or 7) << 5 | 1
        out.append(f"        /*{address:04x}*/      {m['text']} ;     /* 0x{0x123:016x} */")
        out.append(f"                               /* 0x{control << 41 | 0x56:016x} */")
        address += 16
    return "\n".join(out)


def found(*lines):
    """Return (kind, registers loaded) of each arrival that is found in a kernel of these lines."""
    (function,) = parse(text_of(*lines, *END))
    return [(f.kind, [load.operands.split(",")[0] for load in f.loads]) for f in audit(function).found]


def test_a_load_that_nobody_waited_for_is_found():
    assert found("LDS.64 R2, [R8]  wr0", ARRIVE) == [(MBARRIER, ["R2"])]


@pytest.mark.parametrize(
    "lines",
    [
        ["LDS.64 R2, [R8]  wr0", "FADD R4, R2, R3  wait0", ARRIVE],
        ["LDS.64 R2, [R8]  wr0", f"{ARRIVE}  wait0"],
        ["LDS.64 R2, [R8]  wr0", "@P0 FADD R4, R2, R3  wait0", ARRIVE],  # waits whatever the guard
        ["LDS.64 R2, [R8]  wr0", "@!PT LDS RZ, [RZ]  wait0", ARRIVE],
        ["LDS R2, [R8]", "LDS R3, [R8+0x4]  wr1", "FADD R4, R2, R3  wait1", ARRIVE],  # they come in order
        ["LDS R2, [R8]", "SHFL.BFLY PT, R5, R6, 0x1, 0x1f  wr2", "FADD R4, R2, R5  wait2", ARRIVE],
        ["LDS R2, [R8]", "@P0 LDS R3, [R8+0x4]  wr1", "FADD R4, R2, R2  wait1", ARRIVE],
        ["@!PT LDS R2, [RZ]  wr0", ARRIVE],
        ["LDG.E R2, desc[UR4][R8.64]  wr0", ARRIVE],
        ["LDS R2, [R8]  wr0", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R9  wr1"],
    ],
)
def test_a_load_that_has_come_is_not(lines):
    assert found(*lines) == []


@pytest.mark.parametrize(
    "lines",
    [
        ["LDS R2, [R8]  wr0", "FADD R4, R5, R6  wait1", ARRIVE],
        ["LDS R2, [R8]", ARRIVE],
        ["LDS R3, [R8+0x4]  wr1", "LDS R2, [R8]", "FADD R4, R3, R5  wait1", ARRIVE],  # an earlier one's
        ["LDS R2, [R8]", "LDG.E R3, desc[UR4][R8.64]  wr1", "FADD R4, R3, R5  wait1", ARRIVE],  # out of order
        ["LDS R2, [R8]  wr0  rd1", "IADD3 R8, R8, 0x10, RZ  wait1", ARRIVE],  # its address was read, no more
        ["@P0 LDS R2, [R8]  wr0", ARRIVE],
        ["LDS R2, [R8]  wr0", f"@P0 {ARRIVE}"],
        ["LD.E R2, desc[UR4][R8.64]  wr0", ARRIVE],  # may be of shared memory
        ["LDSM.16.M88.2 R2, [R8]  wr0", ARRIVE],
        ["LDS R2, [R8]  wr0", "DEPBAR.LE SB0, 0x0", ARRIVE],  # of copies only: not counted
        ["LDS R2, [R8]  wr0", "MEMBAR.ALL.GPU", ARRIVE],
    ],
)
def test_a_load_that_may_not_have_come_is(lines):
    assert found(*lines) == [(MBARRIER, ["R2"])]


def test_every_load_under_way_is_named():
    lines = ["LDS R2, [R8]", "LDS R3, [R8]  wr1", "LDS R4, [R8]  wr2", "LDS R5, [R8]  wr3", "NOP  wait2"]
    assert found(*lines, ARRIVE) == [(MBARRIER, ["R3", "R5"])]


@pytest.mark.parametrize(
    ("arrival", "kind"),
    [
        (ARRIVE, MBARRIER),
        ("SYNCS.ARRIVE.TRANS64.RED.A1T0 RZ, [R9+URZ], RZ", MBARRIER),
        ("SYNCS.ARRIVE.TRANS64 RZ, [UR4], R7", EXPECT),
        ("ARRIVES.LDGSTSBAR.64.ARVCNT [UR4]", MBARRIER),
        ("BAR.ARV 0x1, 0x100", BARRIER),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", BARRIER),
        ("UTMALDG.2D [UR8], [UR4], desc[UR6]", COPY),
        ("UBLKCP.S.G [UR8], [UR4], UR6", COPY),
        ("SYNCS.EXCH.64 URZ, [UR4], UR6", None),
        ("WARPSYNC.ALL", None),
        (f"@!PT {ARRIVE}", None),
    ],
)
def test_kinds_of_arrivals(arrival, kind):
    assert found("LDS R2, [R8]  wr0", arrival) == ([(kind, ["R2"])] if kind else [])


def test_a_proxy_fence_is_waited_for_as_a_load_is():
    fenced = ["LDS R2, [R8]  wr0", "MEMBAR.ALL.CTA  rd1", f"{FENCE}  wr2  wait1"]
    assert found(*fenced, f"{ARRIVE}  wait2") == []
    assert found(*fenced, ARRIVE) == [(MBARRIER, ["R2"])]
    # Without the MEMBAR, without waiting for it, or for some threads only, it says nothing of loads.
    assert found(fenced[0], f"{FENCE}  wr2", f"{ARRIVE}  wait2")
    assert found(*fenced[:2], f"{FENCE}  wr2", f"{ARRIVE}  wait2")
    assert found(*fenced[:2], f"@P0 {FENCE}  wr2  wait1", f"{ARRIVE}  wait2")


def test_a_load_is_under_way_over_a_back_edge():
    loop = [".L_top:", ARRIVE, "LDS R2, [R8]  wr0", "@P0 BRA `(.L_top)"]
    assert found(*loop) == [(MBARRIER, ["R2"])]
    assert found(*loop[:3], "@P0 BRA `(.L_top)  wait0") == []


def test_a_wait_in_one_branch_is_not_enough():
    def branches(one, other):
        return found(
            "LDS R2, [R8]  wr0",
            "BSSY B0, `(.L_join)",
            "@P0 BRA `(.L_other)",
            f"FADD R4, R5, R6{one}",
            "BRA `(.L_meet)",
            ".L_other:",
            f"FADD R4, R5, R7{other}",
            ".L_meet:",
            "BSYNC B0",
            ".L_join:",
            ARRIVE,
        )

    assert branches("  wait0", "") == branches("", "  wait0") == [(MBARRIER, ["R2"])]
    assert branches("  wait0", "  wait0") == []


def test_a_region_ends_where_its_own_begin_says():
    """Of two regions of one register, what is under way in the first is not at the second's end."""
    lines = [
        "BSSY B0, `(.L_a)",
        "LDS R2, [R8]  wr0",
        "BSYNC B0",
        ".L_a:",
        "FADD R4, R2, R3  wait0",
        "BSSY B0, `(.L_b)",
        "@P0 BRA `(.L_skip)",
        "FADD R4, R5, R6",
        ".L_skip:",
        "BSYNC B0",
        ".L_b:",
        ARRIVE,
    ]
    assert found(*lines) == []


def test_what_a_call_leaves_under_way_is_seen_behind_it():
    def call(wait):
        return found(
            "MOV R20, 0x20",
            "CALL.REL.NOINC `($sub)",
            ARRIVE,
            "EXIT",
            "$sub:",
            "LDS R2, [R8]  wr0",
            f"RET.REL.NODEC R20 `(k){wait}",
        )

    assert call("") == [(MBARRIER, ["R2"])]
    assert call("  wait0") == []


def test_a_table_of_targets_is_followed():
    lines = [
        "LDS R2, [R8]  wr0",
        'BRX R4 -0x10 (*"BRANCH_TARGETS .L_a,.L_b"*)',
        ".L_a:",
        f"{ARRIVE}  wait0",
        "EXIT",
        ".L_b:",
        ARRIVE,
    ]
    assert found(*lines) == [(MBARRIER, ["R2"])]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["LDX R2, [R8]"], "unknown instruction"),
        (["BRA `(.L_nowhere)"], "no such label"),
        (["BRX R4 -0x10"], "where to"),
        (["CALL.REL.NOINC `(.L_end)"], "no return address"),
        (["CALL.ABS.NOINC R4"], "where to"),
        (["BMOV.32 B0, R4"], "convergence barrier"),
        (["LDS R2, [R8]  wr0", "FADD R4, R2, R3"], "uses a register"),
        (["LDS.64 R2, [R8]  wr0", "MOV R3, RZ"], "uses a register"),
        (["LDS R2, [R8]  wr0  rd1", "lds"], "not understood"),
    ],
)
def test_what_is_not_understood_is_an_error(lines, message):
    with pytest.raises(MachineCodeError, match=message):
        found(*lines)


def test_code_that_runs_past_the_end_is_an_error():
    with pytest.raises(MachineCodeError, match="past the end"):
        audit(parse(text_of("NOP"))[0])


def test_scoreboards_are_decoded():
    (function,) = parse(text_of("@!P3 LDS.64 R2, [R8+UR4]  wr3  rd1  wait05", *END))
    code = function.instructions[0]
    assert (code.guard, code.opcode, code.operands) == ("!P3", "LDS.64", "R2, [R8+UR4]")
    assert (code.write, code.read, code.waits) == (3, 1, {0, 5})


def test_scoreboards_of_real_code_are_decoded():
    load = sass._instruction(0, "LDG.E.CONSTANT R12, desc[UR6][R8.64]", 0x0000A2000C1E9900)
    assert (load.write, load.read, load.waits) == (2, 0, frozenset())
    thread = sass._instruction(0, "S2R R9, SR_TID.X", 0x000E620000002100)
    assert (thread.write, thread.read, thread.waits) == (1, None, frozenset())
    use = sass._instruction(0, "LOP3.LUT P1, RZ, R9, 0xffffffe0, RZ, 0xc0, !PT", 0x002FC8000782C0FF)
    assert (use.write, use.read, use.waits) == (None, None, {1})


def elf(machine, size=256):
    """Return a file with that machine number and no more than a header and one empty section."""
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF", 2, machine, 1, 0, 0, 64, 0, 64, 56, 0, 64, 1, 0)
    return (header + bytes(64)).ljust(size, b"\0")[: max(size, 128)]


def test_cubins_are_cut_out_of_a_library():
    host, cubin = elf(62), elf(190, 128)
    assert sass.cubins(host + b"x" + cubin + b"tail" + cubin) == [cubin, cubin]
    assert sass.cubins(cubin) == [cubin]
    assert sass.cubins(host) == sass.cubins(b"") == []


def test_a_missing_disassembler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(MachineCodeError, match="requires nvdisasm"):
        sass.find_nvdisasm()
    tool = tmp_path / "nvidia" / "cu13" / "bin" / "nvdisasm"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert sass.find_nvdisasm() == tool


def ring_kernel(*, fenced):
    """Rows through a ring: half of the threads have them copied, the others read them and free the stage."""

    @T.prim_func
    def kernel(x: T.Tensor[(STEPS, COLUMNS), T.float32], out: T.Tensor[(COLUMNS,), T.float32]):
        with T.Kernel(1, threads=THREADS):
            ring = T.alloc_shared((STAGES, COLUMNS), T.float32)
            total = T.alloc_local((1,), T.float32)
            full = T.alloc_barrier([THREADS - COLUMNS] * STAGES)
            empty = T.alloc_barrier([COLUMNS] * STAGES)
            tx = T.get_thread_binding()
            if tx >= COLUMNS:
                for k in T.serial(STEPS):
                    T.mbarrier_wait_parity(empty[k % STAGES], (k // STAGES % 2) ^ 1)
                    T.tma_copy(x[k, :], ring[k % STAGES, :], barrier=full[k % STAGES])
                    T.mbarrier_arrive(full[k % STAGES])
            else:
                total[0] = 0
                for k in T.serial(STEPS):
                    T.mbarrier_wait_parity(full[k % STAGES], k // STAGES % 2)
                    total[0] += ring[k % STAGES, tx]
                    if fenced:
                        T.fence_proxy_async()
                    T.mbarrier_arrive(empty[k % STAGES])
                out[tx] = total[0]

    return kernel


@pytest.mark.parametrize("fenced", [False, True])
def test_a_compiled_ring(audited, fenced):
    """The compiler adds up behind the arrival what was read before it, unless a fence stands between."""
    with corrections.corrected(), simplifier.lowering():
        kernel = tilelang.compile(
            ring_kernel(fenced=fenced), target=TARGET, compile_flags=corrections.compile_flags()
        )
    report = audited(kernel)
    assert report.arrivals >= 2 * STEPS
    assert [f.kind for f in report.found] == ([] if fenced else [MBARRIER] * STEPS)
    assert all(load.base == "LDS" for f in report.found for load in f.loads)


def run(*args):
    return CliRunner().invoke(machine_code.main, [str(a) for a in args])


def test_the_command_says_where(monkeypatch, tmp_path):
    code = text_of("LDS R2, [R8]  wr0", ARRIVE, "UTMALDG.2D [UR8], [UR4], desc[UR6]  wait0", *END)
    monkeypatch.setattr(machine_code, "find_nvdisasm", lambda: None)
    monkeypatch.setattr(machine_code, "disassemble", lambda cubin: parse(code))
    file = tmp_path / "executable.so"
    file.write_bytes(elf(190, 128))
    result = run("--list", file)
    assert result.exit_code == 1
    assert "k executable.so: 2 arrivals, with loads under way: 1 mbarrier" in result.output
    assert f"0x00010 mbarrier: {ARRIVE}, under way:\n        0x00000 LDS R2, [R8]" in result.output
    code = code.replace("UTMALDG.2D [UR8], [UR4], desc[UR6]", "NOP")  # nothing is copied by itself
    assert run(tmp_path).exit_code == 0
    assert run("--all", tmp_path).exit_code == 1
    file.write_bytes(b"")
    assert run(file).exit_code == 3
