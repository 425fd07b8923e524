"""A noted call, written out: a function of its tensors' addresses that allocates and launches.

Every number of the call is in the function's text or a name of its scope; there is no loop over tensors. What
the driver reads is memory (a *frame*) that keeps what was written: a call with the addresses of the frame's
last one writes the stream and its outputs' addresses alone. An output is an allocation of its own, as in the
call that was noted: parts of one allocation would share its storage, and its lifetime.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import CodeType
from typing import Any, NamedTuple

import torch

from dsv4_kernels import driver
from dsv4_kernels.graphs import Graphs

_guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)  # of torch.compile, in C++
_is_deterministic: Callable[[], bool] = getattr(
    torch._C, "_get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled
)
Allocator = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]


class Part(NamedTuple):
    """A returned tensor.

    Attributes:
        tensor: the name of what it is or is a view of: see `write_out`.
        view: arguments of `as_strided`; None: the whole.
    """

    tensor: str
    view: tuple[Any, ...] | None


def _filled(device: torch.device) -> Allocator:
    """Return `torch.empty_strided` on `device`, which is the current one; half as dear as `torch.empty`."""

    def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    return empty


def _plain(device: torch.device) -> Allocator:
    """Return what compiled graphs allocate with, half as dear again; it fills nothing with NaN."""
    return getattr(_guards, f"_empty_strided_{device.type}", None) or _filled(device)


def write_out(
    device: torch.device,
    index: int,
    num_tensors: int,
    kept: Sequence[torch.Tensor],
    allocations: Sequence[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]],
    launches: Sequence[driver.DirectLaunch],
    result: list[Part] | Part | None,
) -> Callable[[tuple[int, ...]], Any]:
    """Return the function of a call: (addresses of its tensors) -> its result; several threads may call it.

    It raises what allocating raises, and DriverError where the driver refuses.

    Args:
        device: of all tensors; the current one whenever the function is called.
        index: of the device.
        num_tensors: arguments of the call that are tensors.
        kept: other tensors that it uses, the same for all calls: `k0` and so on.
        allocations: shape, strides and dtype of what it allocates: `t0` and so on.
        launches: relative to the addresses of arguments, kept and allocated tensors, in this order.
        result: of the call; a list where it returns a tuple.
    """
    text = _Text(num_tensors, [t.data_ptr() for t in kept])
    for launch in launches:
        text.launch(launch)
    body = []
    if allocations:
        body.append("empty = filled if is_deterministic() else plain")
        body += [f"t{i} = empty(*s{i})" for i in range(len(allocations))]
        body += [f"p{i} = t{i}.data_ptr()" for i in range(len(allocations)) if f"p{i}" in text.used]
    parts = [] if result is None else [result] if isinstance(result, Part) else result
    made = [p.tensor if p.view is None else f"{p.tensor}.as_strided(*r{i})" for i, p in enumerate(parts)]
    returned = f"({''.join(f'{part}, ' for part in made)})" if isinstance(result, list) else "".join(made)
    if launches:
        body += [
            f"stream = current_stream({index})",
            *text.by_graph(f"return {returned}"),
            *text.by_kernels(),
        ]
    body.append(f"return {returned}")
    graphs = Graphs(launches, len(text.outputs))
    scope = {
        **text.scope,
        "plain": _plain(device),
        "filled": _filled(device),
        "is_deterministic": _is_deterministic,
        "current_stream": driver.current_stream,
        "is_capturing": driver.is_capturing,
        "graphs": graphs.made.get,
        "called": graphs.called,
        **{f"k{i}": tensor for i, tensor in enumerate(kept)},
        **{f"s{i}": facts for i, facts in enumerate(allocations)},
        **{f"r{i}": part.view for i, part in enumerate(parts)},
    }
    exec(_compiled("\n    ".join(["def run(addresses):", *body])), scope)
    return scope["run"]


@lru_cache(maxsize=1024)
def _compiled(text: str) -> CodeType:
    return compile(text, "<noted call>", "exec")


class _Text:
    """The lines that write what the driver reads, and launch.

    `a0` and so on are addresses of arguments and of what is kept, `p0` and so on of what is allocated. A
    frame is a list: the arguments' addresses it was last written for; of each launch its words, what launches
    it or, in a graph's frame, what sets its parameters, and the address that each descriptor was last written
    for. A graph's frame goes on with what launches, the graph, and the outputs' addresses it was last written
    for.
    """

    def __init__(self, num_tensors: int, kept: Sequence[int]) -> None:
        frames: list[Any] = []  # not in use: a call takes one, so that no two threads write the same
        self.scope: dict[str, Any] = {"pop": frames.pop, "push": frames.append}
        self.scope |= {f"a{num_tensors + i}": address for i, address in enumerate(kept)}
        self.used: set[str] = set()
        self._arguments = "".join(f"a{i}, " for i in range(num_tensors))
        self._first_made = num_tensors + len(kept)
        self._fields, self._new = ["at"], ["None"]
        self._of_inputs: list[str] = []
        self._of_outputs: list[str] = []
        self._num_launches = 0

    @property
    def outputs(self) -> list[str]:
        """The addresses of what is allocated that launches use."""
        return sorted(name for name in self.used if name.startswith("p"))

    def launch(self, launch: driver.DirectLaunch) -> None:
        """Add a launch."""
        n, self._num_launches = self._num_launches, self._num_launches + 1
        words = f"w{n}"
        self.scope |= {f"frame{n}": launch.frame, f"failed{n}": launch.failed}
        self._fields += [words, f"c{n}"]
        self._new.append(f"*frame{n}()")
        for place, source, offset, describe in launch.written:
            made = source - self._first_made
            name, lines = (f"a{source}", self._of_inputs) if made < 0 else (f"p{made}", self._of_outputs)
            self.used.add(name)
            value = f"{name} + {offset}" if offset else name
            if describe is None:
                lines.append(f"{words}[{place}] = {value}")
                continue
            field = len(self._fields)
            self.scope[f"describe{field}"] = describe
            self._fields.append(f"m{field}")
            self._new.append("None")
            lines += [
                f"if m{field} != {name}:",
                f"    {words}[{place}:{place + driver.MAP_WORDS}] = describe{field}({value})",
                f"    frame[{field}] = {name}",
            ]

    def _written_inputs(self) -> list[str]:
        return [
            "if at is not addresses:",
            f"    {self._arguments} = addresses",
            *[f"    {line}" for line in self._of_inputs],
            "    frame[0] = addresses",
        ]

    def by_graph(self, returned: str) -> list[str]:
        """Return the lines that launch a graph, where the stream has one that no other call has."""
        first, outputs = len(self._fields) + 2, self.outputs
        fields = [*self._fields, "launch", "graph", *[f"q{name}" for name in outputs]]
        changed = ["at is not addresses", *[f"q{name} != {name}" for name in outputs]]
        calls = [f"c{n}()" for n in range(self._num_launches)]
        return [
            "made = graphs(stream)",
            "frame = None",
            "if made and (not stream or not is_capturing()):",  # the legacy stream is never captured
            "    try:",
            "        frame = made.pop()",
            "    except IndexError:",
            "        pass",
            "if frame is not None:",
            f"    {', '.join(fields)} = frame",
            f"    if {' or '.join(changed)}:",
            *[f"        {line}" for line in self._written_inputs()],
            *[f"        {line}" for line in self._of_outputs],
            *[f"        frame[{first + i}] = {name}" for i, name in enumerate(outputs)],
            f"        result = {' or '.join([*calls, 'launch()'])}",
            "    else:",
            "        result = launch()",
            "    if not result:",
            "        made.append(frame)",
            f"        {returned}",
            f"    if result == {driver.INVALID_CONTEXT}:",
            "        frame[0] = None",  # what was written may not have been set
            "        made.append(frame)",
        ]

    def by_kernels(self) -> list[str]:
        """Return the lines that launch one kernel after the other."""
        launched: list[str] = []
        for n in range(self._num_launches):
            launched += [f"result = c{n}()", "if result:", f"    failed{n}(result, c{n})"]
        return [
            "try:",
            "    frame = pop()",
            "except IndexError:",
            f"    frame = [{', '.join(self._new)}]",
            f"{', '.join(self._fields)} = frame",
            *self._written_inputs(),
            *[f"w{n}[{driver.STREAM_WORD}] = stream" for n in range(self._num_launches)],
            *self._of_outputs,
            *launched,
            "push(frame)",
            "if made is None:",
            "    called(stream)",
        ]
