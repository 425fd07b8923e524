"""Calls as they went before: what a call did is noted once and done again, without asking again.

The first call with a *signature* (type, dtype, shape and device of each tensor, all contiguous, and every
other argument) runs the operator's own function and the compiler's host function, with all their checks. If
all that it did was to allocate, to take views and to launch, and every operation of the call is seen, then it
is noted. A later call with that signature allocates alike and hands the same launches to the driver, with its
own addresses. What both functions check follows from the signature, but for the alignment of addresses, which
is checked at every call. A call that does not go as noted runs the function and gets its errors.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4_kernels import driver
from dsv4_kernels.contract import ALIGNMENT_BYTES
from dsv4_kernels.written_out import Part, write_out

DEVICE_TYPE = "cuda"
MAX_SIGNATURES = 4096  # kept of an operator; with one more, all are noted anew
MAX_ATTEMPTS = 4  # to note the calls of a signature
_aten = torch.ops.aten
_ALLOCATIONS = frozenset({_aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default})
_VIEWS = frozenset(  # whose bytes lie within their input's
    {
        _aten._reshape_alias.default,
        _aten.alias.default,
        _aten.detach.default,
        _aten.select.int,
        _aten.slice.Tensor,
        _aten.squeeze.dim,
        _aten.unsqueeze.default,
        _aten.view.default,
        _aten.view.dtype,
    }
)
_guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)  # of torch.compile, in C++
_TENSORS = (torch.Tensor, torch.nn.Parameter)  # their subclasses may mean other memory, or none

Source = tuple[int, int]  # which tensor of a call, in order of arguments and allocations, and bytes into it
num_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack  # dispatch modes in force in this thread
MakeDirect = Callable[[Sequence[Sequence[int]], Sequence[Source], int], driver.DirectLaunch]


class CannotReplayError(Exception):
    """What this call did cannot be done again from what is known of it."""


class _State(threading.local):
    """Of a thread: the recording in progress, and whether calls run their own functions for now."""

    recording: "_Recording | None" = None
    is_disabled: bool = False


class Blocks:
    """Blocks in which calls of some thread go another way than usual.

    While there are none, which one number tells, no call asks what its own thread is in.

    Attributes:
        count: of blocks that any thread is in.
    """

    count: int = 0
    _lock = threading.Lock()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be in one."""
        with self._lock:
            self.count += 1
        try:
            yield
        finally:
            with self._lock:
                self.count -= 1


state, blocks = _State(), Blocks()


@contextmanager
def disabled() -> Iterator[None]:
    """Run each call's own function inside the block, in this thread: nothing is noted or done again."""
    before, state.is_disabled = state.is_disabled, True
    try:
        with blocks.entered():
            yield
    finally:
        state.is_disabled = before


def note_launch(make_direct: MakeDirect, args: Sequence[torch.Tensor]) -> None:
    """Tell the recording in progress, if there is one, of a launch.

    Args:
        make_direct: (shapes of `args`, where each lies, device) -> the launch by addresses; may raise
            CannotReplayError.
        args: of the launch.
    """
    if state.recording is not None:
        state.recording.launches.append((make_direct, tuple(args)))


class _Recording(TorchDispatchMode):
    """The operations and launches of one call."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[MakeDirect, tuple[torch.Tensor, ...]]] = []
        self.allocated: list[torch.Tensor] = []
        self.other: Any = None  # the first operation that is neither an allocation nor a view

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and result.is_contiguous():
            self.allocated.append(result)
        elif func not in _VIEWS:
            self.other = self.other or func
        return result

    def __enter__(self) -> "_Recording":
        state.recording = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        state.recording = None


class _Span(NamedTuple):
    """Where a tensor's bytes are."""

    storage: int
    first: int
    end: int


def _span(tensor: torch.Tensor) -> _Span:
    first = tensor.data_ptr()
    num_bytes = tensor.numel() * tensor.element_size()
    return _Span(tensor.untyped_storage()._cdata, first, first + num_bytes)


def _source(spans: Sequence[_Span], tensor: torch.Tensor) -> Source:
    """Return which of the call's tensors, at `spans`, the launch's `tensor` is a view of."""
    part = _span(tensor)
    found = [
        i
        for i, s in enumerate(spans)
        if s.storage == part.storage and s.first < part.end and part.first < s.end
    ]
    if len(found) != 1 or not tensor.is_contiguous():
        raise CannotReplayError(
            "a launch on no elements, on strided ones, or on memory that two tensors share"
        )
    span = spans[found[0]]
    if part.first < span.first or part.end > span.end:
        raise CannotReplayError("a view reaches beyond its tensor")
    return found[0], part.first - span.first


Addresses = tuple[int, ...]


class Noted:
    """How to do again what calls of a signature do.

    Attributes:
        device: index.
        run: (addresses of the call's tensors) -> result.
        check: whether tensors are as those of the latest call that `remember` was told of, where it is known:
            asked of torch at once, and of the signature alone.
    """

    def __init__(self, device: int, run: Callable[[Addresses], Any]) -> None:
        """Nothing is remembered yet."""
        self.device, self.run = device, run
        self.check: Callable[..., bool] | None = None


def _note(
    recording: _Recording, tensors: Sequence[torch.Tensor], kept: Sequence[torch.Tensor], result: Any
) -> Noted:
    """Return how to do again what the `recording` of a call on `tensors` with that `result` did.

    Args:
        recording: of the call.
        tensors: its arguments.
        kept: other tensors that it may use, the same for all calls.
        result: of the call.

    Raises:
        CannotReplayError: it cannot be done again.
    """
    device, allocated = tensors[0].device, recording.allocated
    if recording.other is not None or any(t.device != device for t in (*tensors, *kept, *allocated)):
        raise CannotReplayError(f"runs {recording.other}, or on several devices")
    index = tensors[0].get_device()
    spans = [_span(t) for t in (*tensors, *kept, *allocated)]
    launches = [
        make_direct([t.shape for t in args], [_source(spans, t) for t in args], index)
        for make_direct, args in recording.launches
    ]
    allocations = [(tuple(t.shape), t.stride(), t.dtype) for t in allocated]
    returned = _returns(kept, allocated, result)
    return Noted(index, write_out(device, index, len(tensors), kept, allocations, launches, returned))


def _returns(
    kept: Sequence[torch.Tensor], allocated: Sequence[torch.Tensor], result: Any
) -> list[Part] | Part | None:
    """Return how each tensor of a call's result is made."""
    if isinstance(result, tuple):
        return [_part(kept, allocated, part) for part in result]
    return None if result is None else _part(kept, allocated, result)


def _part(kept: Sequence[torch.Tensor], allocated: Sequence[torch.Tensor], part: Any) -> Part:
    if type(part) is not torch.Tensor:
        raise CannotReplayError(f"returns {type(part)}")
    storage, facts = part.untyped_storage()._cdata, (part.shape, part.stride(), part.storage_offset())
    for kind, tensors in (("t", allocated), ("k", kept)):
        for i, whole in enumerate(tensors):
            if whole.untyped_storage()._cdata == storage and whole.dtype == part.dtype:
                is_whole = facts == (whole.shape, whole.stride(), whole.storage_offset())
                return Part(f"{kind}{i}", None if is_whole and kind == "t" else facts)
    raise CannotReplayError("returns what it did not allocate")


class _Notes:
    """What was noted of the calls of an operator's function."""

    def __init__(
        self, function: Callable[..., Any], tensors: Sequence[int], kept: Sequence[torch.Tensor]
    ) -> None:
        self._kept = kept
        self.noted: dict[Any, Noted] = {}
        # By addresses and the arguments that are no tensors: whether tensors at them are as noted, on which
        # device, what to do, and the addresses to do it with.
        self.recent: dict[Any, tuple[Callable[..., bool], int, Callable[[Addresses], Any], Addresses]] = {}
        self._function = function
        self._tensors = tensors
        self._attempts: dict[Any, int] = {}

    def forget(self) -> None:
        """Note everything anew."""
        for known in (self.noted, self.recent, self._attempts):
            known.clear()

    def remember(self, place: Any, addresses: Addresses, noted: Noted, *tensors: torch.Tensor) -> None:
        """Know a call at its `place`: a shorter way to what was `noted` of it.

        Args:
            place: addresses and the arguments that are no tensors.
            addresses: of `tensors`.
            noted: of the call.
            tensors: its arguments.
        """
        check = noted.check
        if check is None or not check(*tensors):  # what tensors of a signature still may differ in: inference
            if _guards is None:
                return
            check = noted.check = _guards.TensorGuards(
                *tensors,
                dynamic_dims_sizes=[list(t.shape) for t in tensors],
                dynamic_dims_strides=[list(t.stride()) for t in tensors],
            ).check
        if len(self.recent) >= MAX_SIGNATURES:
            self.recent.clear()
        self.recent[place] = check, noted.device, noted.run, addresses

    def first(self, key: Any, *args: Any) -> Any:
        """Call the function on `args`, of whose signature `key` nothing is noted yet, and note the call."""
        tensors = [args[i] for i in self._tensors]
        attempts = self._attempts.get(key, 0)
        if attempts >= MAX_ATTEMPTS or any(
            type(t) not in _TENSORS or t.device.type != DEVICE_TYPE for t in tensors
        ):
            return self._function(*args)
        with disabled(), _Recording() as recording:
            result = self._function(*args)
        if len(self._attempts) >= MAX_SIGNATURES:
            self.forget()
        self._attempts[key] = attempts + 1
        with suppress(CannotReplayError):
            self.noted[key] = _note(recording, tensors, self._kept, result)
        return result


# A call of an operator, written out for its arguments: this is most of what it costs the host. Of a tensor,
# `type` is of the key since nothing is noted of other subclasses. An argument that is no tensor, a tensor
# without memory of its own and an unhashable argument raise here, and again in the function, which says more.
_FACTS = "{0}.dtype, {0}.shape, {0}.get_device()"
# Whether torch compiles or exports: what `torch.compiler.is_compiling` asks, without its two Python calls.
# Dynamo, which reads this text, takes the function for true; others set the flag.
_TRACED = "is_compiling()"
if hasattr(torch.compiler, "_is_compiling_flag"):
    _TRACED = "is_dynamo_compiling() or compiler._is_compiling_flag"
_DIRECT = """
def {name}({params}):
    run = key = None
    try:
        if {contiguous} and may_replay():
            at = {places}, = {addresses},
            if not ({bits}) & {low_bits}:
                key = ({key},)
                noted = get(key)
                if noted is not None:
                    key = None
                    if noted.device == current_device():
                        run = noted.run
    except (AttributeError, RuntimeError, TypeError):
        key = None
    if run is not None:
        return run(at)
    if key is not None:
        return first(key, {args})
    return function({args})
"""
_CALL = """
def {name}({params}):
    if {traced} or num_modes():
        return dispatched({args})
    run = key = None
    try:
        place = ({addresses}, {others})
        again = recent(place)
        if again is not None and again[0]({tensors}) and again[1] == current_device() and may_replay():
            run, at = again[2], again[3]
        elif is_grad_enabled() and ({grad}):
            key = dispatched
        elif {contiguous} and may_replay():
            at = {places}, = place[:{num_tensors}]
            if not ({bits}) & {low_bits}:
                key = ({key},)
                noted = get(key)
                if noted is not None:
                    key = None
                    if noted.device == current_device():
                        remember(place, at, noted, {tensors})
                        run = noted.run
    except (AttributeError, RuntimeError, TypeError):
        run = key = None
    if run is not None:
        return run(at)
    if key is dispatched:
        return dispatched({args})
    if key is not None:
        return first(key, {args})
    return function({args})
"""


def replayed(
    name: str,
    function: Callable[..., Any],
    may_replay: Callable[[], bool],
    make_dispatched: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    kept: Sequence[torch.Tensor] = (),
) -> Callable[..., Any]:
    """Return `function` behind what is noted of its calls, and behind the choice to ask torch's dispatcher.

    The dispatcher is asked where torch has to see the call: while it compiles, in a dispatch mode, and for a
    tensor that needs a gradient.

    Args:
        name: an identifier of its own: torch.compile tells functions apart by it.
        function: its annotations say which arguments are tensors.
        may_replay: whether calls of now may go as noted.
        make_dispatched: (the function behind what is noted of it) -> what asks the dispatcher and ends there;
            None: nothing does.
        kept: tensors besides the arguments that calls use, the same ones for all calls; none of them, nor its
            memory, may change for another.
    """
    params = inspect.signature(function).parameters
    tensors = [n for n, p in params.items() if p.annotation is torch.Tensor]
    places = [f"a{i}" for i in range(len(tensors))]
    text = {
        "name": name,
        "args": ", ".join(params),
        "params": ", ".join(n if p.default is p.empty else f"{n}=defaults[{n!r}]" for n, p in params.items()),
        "contiguous": " and ".join(f"{n}.is_contiguous()" for n in tensors),
        "addresses": ", ".join(f"{n}.data_ptr()" for n in tensors),
        "places": ", ".join(places),
        "tensors": ", ".join(tensors),
        "others": " ".join(f"type({n}), {n}," for n in params if n not in tensors),
        "bits": " | ".join(places),
        "num_tensors": len(tensors),
        "traced": _TRACED,
        "low_bits": ALIGNMENT_BYTES - 1,
        "key": ", ".join(f"type({n}), " + (_FACTS.format(n) if n in tensors else n) for n in params),
        "grad": " or ".join(f"{n}.requires_grad" for n in tensors),
    }
    notes = _Notes(function, [list(params).index(n) for n in tensors], kept)
    scope: dict[str, Any] = {
        "defaults": {n: p.default for n, p in params.items()},
        "function": function,
        "get": notes.noted.get,
        "recent": notes.recent.get,
        "remember": notes.remember,
        "first": notes.first,
        "may_replay": may_replay,
        "num_modes": num_modes,
        "current_device": driver.current_device,
        "is_compiling": torch.compiler.is_compiling,
        "is_dynamo_compiling": torch.compiler.is_dynamo_compiling,
        "compiler": torch.compiler,
        "is_grad_enabled": torch.is_grad_enabled,
    }
    exec(_DIRECT.format(**text), scope)
    if make_dispatched is None:
        return wraps(function)(scope[name])
    scope["dispatched"] = make_dispatched(wraps(function)(scope[name]))
    exec(_CALL.format(**text), scope)
    return wraps(function)(scope[name])
