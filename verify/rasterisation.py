"""Blocks in panels (`T.use_swizzle`): each block of the launch takes the place of one block, each place once.

The generated code begins with `const dim3 blockIdx = tl::rasterization2DRow<width>()`: block number
b = x + y * X of a grid of X x Y goes to a panel of `width` rows, and in it column by column, every other
panel backwards. All else of the kernel speaks of the place. So the other properties, which hold for all
places, hold for all blocks once places and blocks are one to one. That is shown by an inverse, for all X, Y:

    place (column c, row p * width + r), r < width; s = min(width, Y - p * width) rows in the panel p;
    block p * width * X + k * s + r with k = c, or X - 1 - c where p is odd.

What the code divides gives back p, k and r: quotient and remainder are unique. X and Y change places for
columns. The code computes in 32 bits without a sign, where no sum may wrap.
"""

import z3

from verify import ir
from verify.encode import Encoder, Hypothesis, Scope
from verify.solve import Obligation

KEY = "threadblock_swizzle_pattern"
ORDERS = {
    "rasterization2DRow": ("blockIdx.x", "blockIdx.y"),
    "rasterization2DColumn": ("blockIdx.y", "blockIdx.x"),
}
_WORD = 1 << 32  # values of an unsigned int


def outside_uses(node: ir.Attr, body: ir.Stmt) -> bool:
    """Return whether `body` uses a launch index of blocks outside of the annotation `node`."""
    launches = {n.var for n in ir.walk(body) if isinstance(n, ir.Launch) and n.tag.startswith("blockIdx")}
    used = sum(n in launches for n in ir.walk(body) if isinstance(n, ir.Var))
    return used != sum(n in launches for n in ir.walk(node.body) if isinstance(n, ir.Var))


def obligations(
    node: ir.Attr, extents: dict[str, ir.Expr], encoder: Encoder, contract: tuple[Hypothesis, ...]
) -> list[Obligation]:
    """Return what has to hold for blocks and places to be one to one.

    Args:
        node: the annotation.
        extents: of the launch, by tag.
        encoder: of the kernel's terms.
        contract: what holds of its dims.

    Raises:
        UnsupportedIR: an order that is not known.
    """
    match node.value:
        case ir.Call(op="tvm_tuple", args=(ir.Str(value=name), ir.Const(value=number))) if name in ORDERS:
            width = int(number)
        case _:
            raise ir.UnsupportedIR("rasterisation of blocks in an unknown order")
    along, across = (
        encoder.term(extents[tag], Scope()) if tag in extents else z3.IntVal(1) for tag in ORDERS[name]
    )
    launched = tuple(Hypothesis(f"{n} blocks", "launch", t >= 1) for n, t in (("x", along), ("y", across)))
    fits = Obligation(
        "the numbers of blocks in panels do not wrap around",
        node.span,
        (*contract, *launched),
        along * across + width * along <= _WORD,
        {"blocks": along * across, "panel": width * along},
    )
    return [fits, *_one_to_one(node.span, encoder, width)]


def _one_to_one(span: ir.Span | None, encoder: Encoder, width: int) -> list[Obligation]:
    """Return the steps of the inverse, for any grid: see above."""
    names = "X", "Y", "panel", "in_panel", "turned", "rows", "number", "panels", "divisor", "quotient", "rest"
    x, y, p, r, k, s, o, panels, d, q, rest = (encoder.constant(name) for name in names)

    def step(what: str, given: list[z3.BoolRef], goal: z3.BoolRef) -> Obligation:
        hypotheses = tuple(Hypothesis(str(term), "launch", term) for term in given)
        return Obligation(f"blocks in panels: {what}", span, hypotheses, goal)

    grid = [x >= 1, y >= 1]
    inside = [k >= 0, k < x, r >= 0, r < s, s <= width, o == k * s + r]
    is_last = (p + 1) * width >= y
    last = z3.And((panels - 1) * width < y, y <= panels * width)
    return [
        # a = k * d + r, 0 <= r < d, of `a / d` and `a % d`: panel, place in it, rows of the last panel.
        step(
            "quotient and remainder are unique",
            [d >= 1, k >= 0, r >= 0, r < d, q >= 0, rest >= 0, rest < d, k * d + r == q * d + rest],
            z3.And(q == k, rest == r),
        ),
        step("a place lies in its panel", [*grid, *inside], z3.And(o >= 0, o < x * s, o < width * x)),
        # `total_panel`, the quotient of X * Y by width * X rounded up, is that of Y by width:
        step("rows are compared as blocks are", grid, (d * x < y * x) == (d < y)),
        step("which panel is the last", [*grid, p >= 0, last], (p + 1 < panels) == z3.Not(is_last)),
        step(
            "rows of a panel",
            [*grid, p >= 0, r >= 0, r < width, p * width + r < y, s == z3.If(is_last, y - p * width, width)],
            z3.And(r < s, s >= 1, s <= width, p * width + s <= y),
        ),
        step(
            "a place has a block of the launch",
            [*grid, s >= 1, p >= 0, o >= 0, o < x * s, p * width + s <= y],
            z3.And(p * (width * x) + o >= 0, p * (width * x) + o < x * y),
        ),
        step(
            "turned back",
            [*grid, k >= 0, k < x],
            z3.And(x - 1 - k >= 0, x - 1 - k < x, x - 1 - (x - 1 - k) == k),
        ),
    ]
