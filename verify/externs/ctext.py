"""The C++ text of registered device functions, read as straight-line programs over 32-bit words.

    __device__ __forceinline__ unsigned NAME(unsigned a, void* out, const void* in) {
      unsigned x = (a >> 4u) & 0x0F0Fu;
      asm("prmt.b32 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(x), "r"(0x3210u));
      reinterpret_cast<unsigned*>(out)[0] = x;
      return x ^ reinterpret_cast<const unsigned*>(in)[1];
    }

That is all there is: the type `unsigned`, literals with the suffix u, pointers to whole words,
assignments, one instruction an asm statement (see `ptx`), calls of functions registered before. Anything
else raises UnsupportedIR.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from verify.externs.ptx import INSTRUCTIONS, LOP3, lop3
from verify.externs.words import BITS, Words
from verify.ir import UnsupportedIR

WORD_BYTES = 4
_TOKEN = re.compile(
    r"\s+|//[^\n]*|(?P<token>\"[^\"]*\"|0[xX][0-9a-fA-F]+[uU]?|\d+[uU]?|[A-Za-z_]\w*|<<|>>|[-+*&|^~(){}\[\];:,=<>])"
)
_LEVELS = (("|",), ("^",), ("&",), ("<<", ">>"), ("+", "-"), ("*",))
_OPERATIONS = {
    "|": "bitor",
    "^": "bitxor",
    "&": "bitand",
    "<<": "shl",
    ">>": "shr",
    "+": "add",
    "-": "sub",
    "*": "mul",
}
_ASM = re.compile(r"(?P<op>[a-z0-9.]+)\s+(?P<operands>%\d+(\s*,\s*%\d+)*)\s*;?")


@dataclass(frozen=True)
class Parameter:
    """A parameter: a word, or a pointer to words that are read (`const`) or written."""

    name: str
    is_pointer: bool
    is_const: bool = False


@dataclass
class State:
    """A run of a function: variables by name, words read and written by (parameter, word index)."""

    words: Words
    names: dict[str, Any]
    memory: Mapping[tuple[str, int], Any]
    written: dict[tuple[str, int], Any] = field(default_factory=dict)
    in_range: list[Any] = field(default_factory=list)
    result: Any = None


Value = Callable[[State], Any]


@dataclass(frozen=True)
class Function:
    """A parsed function.

    Attributes:
        returns: whether it returns a word.
        steps: its statements, each run on a State.
        reads, writes: words that it touches through each pointer parameter.
    """

    name: str
    parameters: tuple[Parameter, ...]
    returns: bool
    steps: tuple[Callable[[State], None], ...]
    reads: frozenset[tuple[str, int]]
    writes: frozenset[tuple[str, int]]

    def run(self, words: Words, values: Mapping[str, Any], memory: Mapping[tuple[str, int], Any]) -> State:
        """Run on `values` of the word parameters and `memory` of the words behind pointers."""
        state = State(words, dict(values), memory)
        for step in self.steps:
            step(state)
        return state


def parse(text: str, known: Mapping[str, Function]) -> Function:
    """Return the one function that `text` defines; `known` are the functions it may call.

    Raises:
        UnsupportedIR: the text is not of the form above.
    """
    return _Parser(text, known).function()


class _Parser:
    def __init__(self, text: str, known: Mapping[str, Function]) -> None:
        self.tokens: list[str] = []
        position = 0
        while position < len(text):
            found = _TOKEN.match(text, position)
            if found is None:
                raise UnsupportedIR(f"device function text at {text[position : position + 20]!r}")
            if found["token"]:
                self.tokens.append(found["token"])
            position = found.end()
        self.known = known
        self.parameters: dict[str, Parameter] = {}
        self.assigned: set[str] = set()
        self.declared: set[str] = set()
        self.reads: set[tuple[str, int]] = set()
        self.writes: set[tuple[str, int]] = set()

    # ------------------------------------------------------------------ tokens
    def peek(self, ahead: int = 0) -> str:
        return self.tokens[ahead] if ahead < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        if not self.tokens or (wanted and self.tokens[0] not in wanted):
            raise UnsupportedIR(f"device function text: {self.peek()!r} where {wanted or 'more'} is expected")
        return self.tokens.pop(0)

    def name(self) -> str:
        token = self.take()
        if not re.fullmatch(r"[A-Za-z_]\w*", token):
            raise UnsupportedIR(f"device function text: {token!r} as a name")
        return token

    # ------------------------------------------------------------------ functions
    def function(self) -> Function:
        if self.peek() == "static":
            self.take()
        self.take("__device__")
        self.take("__forceinline__")
        returns = self.take("unsigned", "void") == "unsigned"
        name = self.name()
        self.take("(")
        while self.peek() != ")":
            parameter = self._parameter()
            self.parameters[parameter.name] = parameter
            if self.peek() == ",":
                self.take()
        self.take(")")
        self.assigned |= {p.name for p in self.parameters.values() if not p.is_pointer}
        self.declared |= set(self.parameters)
        self.take("{")
        steps: list[Callable[[State], None]] = []
        ended = False
        while self.peek() != "}":
            if ended:
                raise UnsupportedIR(f"{name}: statements after return")
            ended = self.peek() == "return"
            steps += self._statement(returns)
        self.take("}")
        if self.tokens:
            raise UnsupportedIR(f"{name}: more than one definition")
        if returns and not ended:
            raise UnsupportedIR(f"{name}: no return")
        return Function(
            name,
            tuple(self.parameters.values()),
            returns,
            tuple(steps),
            frozenset(self.reads),
            frozenset(self.writes),
        )

    def _parameter(self) -> Parameter:
        is_const = self.peek() == "const"
        if is_const:
            self.take()
        if self.take("unsigned", "void") == "unsigned":
            if is_const:
                raise UnsupportedIR("device function text: const word parameter")
            return Parameter(self.name(), False)
        self.take("*")
        return Parameter(self.name(), True, is_const)

    def _statement(self, returns: bool) -> list[Callable[[State], None]]:
        token = self.peek()
        if token == "return":
            self.take()
            if not returns:
                raise UnsupportedIR("device function text: return of a value from void")
            value = self.expression()
            self.take(";")
            return [lambda state: setattr(state, "result", value(state))]
        if token == "asm":
            return [self._asm()]
        if token == "reinterpret_cast":
            place = self._pointed(write=True)
            self.take("=")
            value = self.expression()
            self.take(";")
            self.writes.add(place)
            return [lambda state: state.written.__setitem__(place, value(state))]
        if token == "unsigned":
            self.take()
            steps = []
            while True:
                name = self.name()
                if name in self.declared:
                    raise UnsupportedIR(f"device function text: {name} is declared twice")
                self.declared.add(name)
                if self.peek() == "=":
                    steps.append(self._assign(name))
                if self.take(",", ";") == ";":
                    return steps
        name = self.name()
        self._require_word(name)
        step = self._assign(name)
        self.take(";")
        return [step]

    def _require_word(self, name: str) -> None:
        if name not in self.declared or (name in self.parameters and self.parameters[name].is_pointer):
            raise UnsupportedIR(f"device function text: {name} is no word variable")

    def _assign(self, name: str) -> Callable[[State], None]:
        self.take("=")
        value = self.expression()
        self.assigned.add(name)
        return lambda state: state.names.__setitem__(name, value(state))

    def _asm(self) -> Callable[[State], None]:
        self.take("asm")
        if self.peek() == "volatile":
            self.take()
        self.take("(")
        text = self.take()
        found = _ASM.fullmatch(text[1:-1].strip()) if text.startswith('"') else None
        if found is None:
            raise UnsupportedIR(f"asm {text}")
        operands = re.findall(r"\d+", found["operands"])
        if operands != [str(i) for i in range(len(operands))]:
            raise UnsupportedIR(f"asm {text}: operands out of order")
        self.take(":")
        self.take('"=r"')
        self.take("(")
        target = self.name()
        self._require_word(target)
        self.take(")")
        self.take(":")
        inputs: list[tuple[str, Value, int | None]] = []
        while True:
            constraint = self.take('"r"', '"n"')
            self.take("(")
            literal = self.number(self.peek())
            inputs.append((constraint, self.expression(), literal))
            self.take(")")
            if self.take(",", ")") == ")":
                break
        self.take(";")
        self.assigned.add(target)
        apply = _instruction(found["op"], inputs, len(operands) - 1)
        return lambda state: state.names.__setitem__(target, apply(state))

    # ------------------------------------------------------------------ expressions
    def expression(self, level: int = 0) -> Value:
        if level == len(_LEVELS):
            return self._unary()
        left = self.expression(level + 1)
        while self.peek() in _LEVELS[level]:
            left = _binary(self.take(), left, self.expression(level + 1))
        return left

    def _unary(self) -> Value:
        token = self.peek()
        if token == "~":
            self.take()
            inner = self._unary()
            return lambda state: state.words.bitxor(inner(state), state.words.const(-1))
        if token == "(":
            self.take()
            inner = self.expression()
            self.take(")")
            return inner
        if token == "reinterpret_cast":
            place = self._pointed(write=False)
            self.reads.add(place)
            return lambda state: state.memory[place]
        literal = self.number(token)
        if literal is not None:
            if token[-1] not in "uU":  # an int: its arithmetic is not modulo 2**32
                raise UnsupportedIR(f"device function text: {token} without the suffix u")
            self.take()
            return lambda state: state.words.const(literal)
        name = self.name()
        if self.peek() == "(":
            return self._call(name)
        if name not in self.assigned:
            raise UnsupportedIR(f"device function text: {name} has no value")
        return lambda state: state.names[name]

    def _call(self, name: str) -> Value:
        function = self.known.get(name)
        if function is None or not function.returns or any(p.is_pointer for p in function.parameters):
            raise UnsupportedIR(f"device function text: call of {name}")
        self.take("(")
        values: list[Value] = []
        while self.peek() != ")":
            values.append(self.expression())
            if self.peek() == ",":
                self.take()
        self.take(")")
        if len(values) != len(function.parameters):
            raise UnsupportedIR(f"device function text: {len(values)} arguments for {name}")

        def run(state: State) -> Any:
            given = {p.name: v(state) for p, v in zip(function.parameters, values, strict=True)}
            inner = function.run(state.words, given, {})
            state.in_range += inner.in_range
            return inner.result

        return run

    def _pointed(self, write: bool) -> tuple[str, int]:
        self.take("reinterpret_cast")
        self.take("<")
        if self.peek() == "const":
            self.take()
            if write:
                raise UnsupportedIR("device function text: store through a const pointer")
        self.take("unsigned")
        self.take("*")
        self.take(">")
        self.take("(")
        name = self.name()
        self.take(")")
        self.take("[")
        index = self.number(self.take())
        self.take("]")
        parameter = self.parameters.get(name)
        if parameter is None or not parameter.is_pointer or index is None:
            raise UnsupportedIR(f"device function text: access through {name}")
        if parameter.is_const == write:  # const is read, the others are written
            raise UnsupportedIR(f"device function text: {name} is {'const' if write else 'not const'}")
        return name, index

    @staticmethod
    def number(token: str) -> int | None:
        """Return the value of an integer literal, None for another token."""
        if not token[:1].isdigit():
            return None
        value = int(token.rstrip("uU"), 0)
        if value >= 1 << BITS:
            raise UnsupportedIR(f"device function text: {token} is no word")
        return value


def _binary(symbol: str, left: Value, right: Value) -> Value:
    operation = _OPERATIONS[symbol]

    def run(state: State) -> Any:
        a, b = left(state), right(state)
        if operation in ("shl", "shr"):  # C++ leaves a shift by 32 and more undefined
            state.in_range.append(state.words.less(b, state.words.const(BITS)))
        return getattr(state.words, operation)(a, b)

    return run


def _instruction(op: str, inputs: list[tuple[str, Value, int | None]], count: int) -> Value:
    if count != len(inputs):
        raise UnsupportedIR(f"asm {op} with {len(inputs)} inputs")
    values = [value for _, value, _ in inputs]
    if op == LOP3:
        constraint, _, table = inputs[-1]
        if count != 4 or constraint != '"n"' or table is None or table > 0xFF:
            raise UnsupportedIR("asm lop3 without an immediate table")
        a, b, c, _ = values
        return lambda state: lop3(state.words, a(state), b(state), c(state), table)
    if op not in INSTRUCTIONS or INSTRUCTIONS[op][0] != count:
        raise UnsupportedIR(f"asm {op} with {count} operands")
    meaning = INSTRUCTIONS[op][1]
    return lambda state: meaning(state.words, *(v(state) for v in values))
