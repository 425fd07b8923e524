"""The text of a registered function means what is registered, for all inputs: two solvers, bit-vectors."""

from functools import cache

import z3

from verify.bitvectors import Question
from verify.externs.registry import Extern, everything, find
from verify.externs.words import BITS, BitVectors
from verify.ir import UnsupportedIR

_BYTE_BITS = 8


def questions(extern: Extern) -> list[Question]:
    """Return what has to be valid for `extern`: its results are its meaning's, its shifts are defined.

    Raises:
        UnsupportedIR: text and meaning do not write the same words.
    """
    words = BitVectors()
    function = extern.function
    values = {n: words.variable(n) for n in extern.word_parameters}
    memory = {place: words.variable(f"{place[0]}[{place[1]}]") for place in sorted(function.reads)}
    state = function.run(words, values, memory)
    meant = extern.meaning(words, values, memory)
    pairs = {}
    if function.returns:
        pairs["result"] = (state.result, meant)
    else:
        if set(meant) != set(state.written):
            raise UnsupportedIR(f"{extern.name}: text and meaning write different words")
        pairs = {f"{name}[{i}]": (state.written[name, i], meant[name, i]) for name, i in sorted(meant)}
    given = [] if extern.requires is None else [extern.requires(words, values)]
    found = []
    for what, (got, want) in pairs.items():
        for low in range(0, BITS, _BYTE_BITS):  # byte by byte: cvc5 takes a minute for a whole word
            part = z3.Extract(low + _BYTE_BITS - 1, low, got) == z3.Extract(low + _BYTE_BITS - 1, low, want)
            found.append(Question(f"{extern.name}: byte {low // _BYTE_BITS} of {what}", given, part))
    if state.in_range:
        found.append(Question(f"{extern.name}: shifts below 32", given, z3.And(*state.in_range)))
    return found


@cache
def proved(name: str) -> tuple[tuple[str, str], ...]:
    """Return (question, counterexample) for what does not hold of the function `name`: empty if proved."""
    extern = find(name)
    if extern is None:
        raise UnsupportedIR(f"external function {name}")
    failed = []
    for question in questions(extern):
        answer = question.decide()
        if not answer.is_valid:
            failed.append((question.what, answer.reason))
    return tuple(failed)


def prove_all() -> dict[str, tuple[tuple[str, str], ...]]:
    """Return what fails, by function, over the whole registry."""
    return {e.name: proved(e.name) for e in everything()}
