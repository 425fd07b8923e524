"""The encoder and the evaluator agree on every integer expression of real kernels, at random points."""

from functools import cache

import numpy as np
import torch
import z3
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.verify.device import ring
from tests.verify.device.test_kernels import stages
from verify import ir
from verify.encode import Encoder
from verify.interp.device.values import Values
from verify.mutate.instances import instances
from verify.walk import Site, walk

LANES = 8
STRIDE = 6  # kernels are lowered for this alone, and neighbours in the registry have expressions of one kind


@cache
def kernels():
    """Return the last variant of every sixth kernel, and a ring."""
    ids = {instance.spec.name: instance.id for instance in instances()}
    return (ring.ring(), *(stages(i) for i in list(ids.values())[::STRIDE]))


@cache
def sites(number):
    """Return the sites of a kernel's integer expressions that read no memory and call nothing."""
    function = kernels()[number].device
    found: list[Site] = []
    for site in walk(function, Encoder(), ()):
        node = site.node
        if isinstance(node, ir.Expr) and node.dtype.is_int and not isinstance(node, (ir.Const, ir.Var)):
            inner = list(ir.walk(node))
            free = _free(site, function)
            plain = not any(
                isinstance(n, (ir.Load, ir.Call, ir.AccessPtr, ir.Region))
                or (isinstance(n, ir.Var) and n not in free)  # bound to what memory held
                for n in inner
            )
            if plain and all(n.dtype.is_int for n in inner if isinstance(n, ir.Expr)):
                found.append(site)
    return function, found


def _free(site, function):
    """Return the variables in force: launch indices, counters, shape parameters."""
    indices = [index.var for index in site.scope.indices if index.tag != "lane"]
    return dict.fromkeys([*indices, *(p for p in function.params if p.dtype.is_int)])


def _values(site, function, draw):
    return {var: draw() for var in _free(site, function)}


@settings(max_examples=60)
@given(st.data())
def test_terms_are_what_the_evaluator_computes(data):
    function, found = sites(data.draw(st.integers(0, len(kernels()) - 1)))
    site = found[data.draw(st.integers(0, len(found) - 1))]
    encoder = Encoder()
    points = _values(site, function, lambda: data.draw(st.integers(0, 1 << 12)))
    terms = {v: z3.Int(f"{v.name}#{k}") for k, v in enumerate(points)}
    lane = z3.Int("lane#")
    env = {v: terms[v] for v in points}
    scope = type(site.scope)(env=env, lane=lane, lanes=site.node.dtype.lanes)
    try:
        term = encoder.term(site.node, scope)
    except ir.UnsupportedIR:
        return
    values = Values.__new__(Values)
    Values.__init__(values, None)  # type: ignore[arg-type]
    values.new_wave(np.arange(LANES), {}, None)
    spread = {v: torch.arange(LANES) + value for v, value in points.items()}
    values.env = dict(spread)
    got = values.lanes.tensor(values.evaluate(site.node))
    got = got.expand(site.node.dtype.lanes, LANES) if site.node.dtype.lanes > 1 else got.expand(LANES)
    for k in range(LANES):
        for element in range(site.node.dtype.lanes):
            where = [(terms[v], z3.IntVal(int(value[k]))) for v, value in spread.items()]
            answer = z3.simplify(z3.substitute(term, *where, (lane, z3.IntVal(element))))
            want = z3.is_true(answer) if z3.is_bool(answer) else answer.as_long()
            mine = got[element, k] if site.node.dtype.lanes > 1 else got[k]
            low, high = site.node.dtype.int_range
            if z3.is_bool(answer) or low <= want <= high:  # the encoder's integers do not wrap
                assert int(mine) == int(want), (site.node, points)


def test_there_is_something_to_compare():
    operators = set()
    for number in range(len(kernels())):
        _, found = sites(number)
        operators |= {site.node.op for site in found if isinstance(site.node, ir.BinOp)}
    assert {"add", "mul", "floordiv", "floormod", "lt"} <= operators
