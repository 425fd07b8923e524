"""Runs one instruction of one group: control flow, divergence, reconvergence."""

from typing import Any

import numpy as np
import torch

from verify import ir, ops
from verify.interp.device import access, effects, errors, flags, warp
from verify.interp.device.block import Block, Group, Join, Wait
from verify.interp.device.code import Instruction
from verify.interp.errors import InterpreterError, UnsupportedOpError


def step(block: Block, group: Group) -> None:
    """Execute the instruction at `group.pc`, or let the group wait.

    Raises:
        DeviceError: the instruction breaks a rule.
        UnsupportedOpError: it has no meaning here.
    """
    if group.wait is not None:
        wait, group.wait = group.wait, None
        block.span = wait.span
        wait.finish()
        return
    if _meets(block, group):
        return
    instruction = block.run.program.code[group.pc]
    block.statement, block.span = instruction.number, instruction.span
    values = block.values
    values.new_wave(group.threads, group.env, None if group.is_whole else group.mask)
    values.instruction = instruction
    try:
        if instruction.is_collective and not _gather(block, group, instruction):
            return
        values.mask = None if group.is_whole else group.mask
        _HANDLERS[instruction.kind](block, group, instruction)
    except errors.DeviceError:
        raise
    except InterpreterError as error:
        raise InterpreterError(str(error), instruction.span) from error
    except ir.UnsupportedIR as error:
        raise UnsupportedOpError(str(error), instruction.span) from error


# --------------------------------------------------------------------------- meeting again
def _meets(block: Block, group: Group) -> bool:
    """Park `group` if this is where it meets others; return whether it waits or was merged."""
    if not group.joins or group.joins[-1].pc != group.pc:
        return False
    join = group.joins.pop()
    join.arrived.append(group)
    group.wait = Wait("join", "the other lanes of its warp", lambda: False, target=join, span=block.span)
    _complete(block, join)
    return True


def _complete(block: Block, join: Join) -> None:
    """Merge the groups at a join once all lanes are there."""
    if not join.arrived:
        return
    there = torch.stack([g.mask for g in join.arrived]).any(0)
    if bool((join.mask & ~there).any()):
        return
    first = join.arrived[0]
    for other in join.arrived[1:]:
        merge(block, first, other)
    first.wait = None


def merge(block: Block, group: Group, other: Group) -> None:
    """Let `group` run the lanes of `other` too; both are at the same instruction."""
    for name in {*group.env, *other.env}:
        mine, theirs = group.env.get(name), other.env.get(name)
        if mine is None:
            group.env[name] = theirs
        elif theirs is not None and mine is not theirs and not _same(mine, theirs):
            lanes = block.values.lanes
            group.env[name] = torch.where(other.mask, lanes.tensor(theirs), lanes.tensor(mine))
    group.mask = group.mask | other.mask
    group.is_whole = bool(group.mask.all())
    block.groups.remove(other)


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a == b and type(a) is type(b)


def release(block: Block, join: Join) -> None:
    """Let the groups at a join go on without the others: lanes need not stay together."""
    for group in join.arrived:
        group.wait = None
    join.mask = torch.zeros_like(join.mask)
    join.arrived = []


def _leave(block: Block, group: Group, joins: list[Join]) -> None:
    """Take the lanes of `group` out of joins that they will not come to."""
    for join in joins:
        join.mask = join.mask & ~group.mask
        _complete(block, join)


def _split(group: Group, block: Block, taken: torch.Tensor) -> Group:
    """Move the lanes where `taken` is false into a new group."""
    other = Group(
        group.wave, group.threads, group.mask & ~taken, dict(group.env), group.pc, list(group.joins)
    )
    group.mask = group.mask & taken
    group.is_whole = other.is_whole = False
    block.groups.append(other)
    return other


def _gather(block: Block, group: Group, instruction: Instruction) -> bool:
    """Bring all lanes of each warp together for a warp-wide operation; return whether they are."""
    alive = ~block.exited[group.threads]
    missing = alive & ~group.mask.numpy()
    warps = np.unique(group.active // ops.WARP_THREADS)
    mates = missing & np.isin(group.threads // ops.WARP_THREADS, warps)
    if not mates.any():
        return True
    for other in [g for g in block.groups if g.wave == group.wave and g is not group]:
        if other.pc == group.pc and other.wait is not None and other.wait.kind == "warp":
            other.wait = None
            merge(block, group, other)
    if (
        group.is_whole
        or not (alive & ~group.mask.numpy() & np.isin(group.threads // ops.WARP_THREADS, warps)).any()
    ):
        return True
    group.wait = Wait(
        "warp", "all lanes of its warp for a warp-wide operation", lambda: False, span=instruction.span
    )
    return False


# --------------------------------------------------------------------------- control flow
def _exec(block: Block, group: Group, ins: Instruction) -> None:
    values = block.values
    match ins.stmt:
        case ir.Store(buffer=buffer, indices=indices, value=value):
            access.store(values, buffer, indices, value)
        case ir.Bind(var=var, value=value):
            watched = block.run.checks.names and var.dtype.is_int
            group.env[var] = values.address(value) if watched else values.evaluate(value)
        case ir.Alloc(buffer=buffer):
            _begin(block, buffer)
        case ir.Eval(value=ir.Call() as call):
            group.pc += 1  # a wait resumes after it
            group.wait = effects.run(values, group, call)
            if group.wait is not None:
                group.wait.span = ins.span
                if group.wait.is_ready():
                    wait, group.wait = group.wait, None
                    wait.finish()
            return
        case ir.Eval(value=value):
            values.evaluate(value)
    group.pc += 1


def _begin(block: Block, buffer: ir.Buffer) -> None:
    """An allocation's lifetime begins: it has no contents."""
    storage = block.storage(buffer.data)
    if storage.registers is not None:
        storage.registers.written[block.values.active[1]] = False


def _branch(block: Block, group: Group, ins: Instruction) -> None:
    assert ins.expr is not None, "a branch has a condition"
    _diverge(block, group, ins, block.values._truth(ins.expr), group.pc + 1, ins.target)


def _diverge(block: Block, group: Group, ins: Instruction, cond: Any, taken_pc: int, other_pc: int) -> None:
    """Send lanes where `cond` holds to `taken_pc`, others to `other_pc`."""
    if not isinstance(cond, torch.Tensor):
        group.pc = taken_pc if cond else other_pc
        return
    taken = cond.expand(len(group.threads)) & group.mask
    if bool((taken == group.mask).all()):
        group.pc = taken_pc
    elif not bool(taken.any()):
        group.pc = other_pc
    else:
        if not (group.joins and group.joins[-1].pc == ins.join):
            group.joins.append(Join(ins.join, group.mask.clone()))
        other = _split(group, block, taken)
        group.pc, other.pc = taken_pc, other_pc


def _jump(block: Block, group: Group, ins: Instruction) -> None:
    group.pc = ins.target


def _start(block: Block, group: Group, ins: Instruction) -> None:
    if ins.target >= 0:  # a loop with breaks: all meet at its end
        group.joins.append(Join(ins.join, group.mask.clone()))
    if isinstance(ins.stmt, ir.For):
        values = block.values
        start, extent = values.evaluate(ins.stmt.start), values.evaluate(ins.stmt.extent)
        group.env[ins.stmt.var] = start
        group.env[ins.stmt] = start + extent  # type: ignore[operator]
    group.pc += 1


def _test(block: Block, group: Group, ins: Instruction) -> None:
    if isinstance(ins.stmt, ir.For):
        if not isinstance(ins.expr, ir.Const):  # as compiled: read in each round
            group.env[ins.stmt] = block.values.evaluate(ins.expr)  # type: ignore[index]
        cond = group.env[ins.stmt.var] < group.env[ins.stmt]
    else:
        assert isinstance(ins.stmt, ir.While), "a loop is For or While"
        if block.run.shares_clocks and (wait := flags.spins(block, group, ins)) is not None:
            group.wait = wait
            return
        cond = block.values._truth(ins.stmt.cond)
    _diverge(block, group, ins, cond, group.pc + 1, ins.target)


def _next(block: Block, group: Group, ins: Instruction) -> None:
    if isinstance(ins.stmt, ir.For):
        group.env[ins.stmt.var] = group.env[ins.stmt.var] + 1
    group.pc = ins.target


def _break(block: Block, group: Group, ins: Instruction) -> None:
    skipped = []
    while group.joins and group.joins[-1].pc < ins.target:
        skipped.append(group.joins.pop())
    group.pc = ins.target
    _leave(block, group, skipped)


def _exit(block: Block, group: Group, ins: Instruction) -> None:
    block.exited[group.active] = True
    if block.exited.all():
        block.cluster.leave(block)
    group.is_done = True
    block.groups.remove(group)
    joins, group.joins = group.joins, []
    _leave(block, group, joins)
    for other in block.groups:  # lanes that wait for the warp may be complete now
        if other.wave == group.wave and other.wait is not None and other.wait.kind == "warp":
            other.wait = None


def _reduce(block: Block, group: Group, ins: Instruction) -> None:
    group.wait = warp.reduction_level(block.values, group, ins)
    group.pc += 1
    if group.wait is not None:
        group.wait.span = ins.span


_HANDLERS = {
    "exec": _exec,
    "branch": _branch,
    "jump": _jump,
    "start": _start,
    "test": _test,
    "next": _next,
    "break": _break,
    "exit": _exit,
    "reduce": _reduce,
}
