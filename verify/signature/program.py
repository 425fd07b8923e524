"""The steps of a tile program as a tree of loops."""

from dataclasses import dataclass, field
from functools import cached_property

from verify import ir
from verify.refine.sym import Sym
from verify.refine.tile import Loop, Step, TileProgram
from verify.signature.terms import Term


@dataclass(eq=False)
class Body:
    """Steps and loops in order.

    Attributes:
        written: storages that something in it writes.
    """

    items: list["Step | LoopBody"] = field(default_factory=list)
    written: set[ir.Var] = field(default_factory=set)


@dataclass(eq=False)
class LoopBody(Body):
    """A loop; `loop` is its counter and range."""

    loop: Loop | None = None


@dataclass(eq=False)
class Frame:
    """Any one iteration of a loop whose iterations are alike, or that in which the output's statement writes.

    Attributes:
        counter: the symbol of the loop's counter; where the output's statement writes, what the element says.
        depth: of loops whose iterations are alike, from 1; 0 around the output's statement.
        states: what an iteration takes over from the one before: buffer, element, value before the
            loop, and the term that stands for it.
    """

    counter: Sym
    depth: int
    states: list[tuple[ir.Buffer, tuple[Sym, ...], Term, Term]] = field(default_factory=list)

    @property
    def is_own(self) -> bool:
        """Whether the loop is one around the output's own statement."""
        return self.depth == 0


@dataclass(frozen=True)
class Place:
    """A point of a run: before item `index` of `body`, in one iteration of each loop around it.

    Attributes:
        value: of the loop's counter where `body` is a loop, or the frame of any iteration.
    """

    body: Body
    index: int
    outer: "Place | None" = None
    value: int | Frame = 0

    @cached_property
    def key(self) -> tuple:
        """Hashable identity of the point."""
        value = id(self.value) if isinstance(self.value, Frame) else self.value
        return (id(self.body), self.index, value, self.outer.key if self.outer else ())

    @cached_property
    def depth(self) -> int:
        """Loops around the point whose iterations are alike."""
        here = self.outer.depth if self.outer is not None else 0
        return here + isinstance(self.value, Frame)


def tree(program: TileProgram) -> Body:
    """Return the program's steps, nested."""
    root = Body()
    stack: list[Body] = [root]
    loops: list[Loop] = []
    for step in program.steps:
        common = 0
        while common < min(len(loops), len(step.loops)) and loops[common] is step.loops[common]:
            common += 1
        del stack[common + 1 :], loops[common:]
        for loop in step.loops[common:]:
            body = LoopBody(loop=loop)
            stack[-1].items.append(body)
            stack.append(body)
            loops.append(loop)
        stack[-1].items.append(step)
        for body in stack:
            body.written.add(step.dst.data)
    return root
