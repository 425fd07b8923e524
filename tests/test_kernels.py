"""Every registered kernel: in the interpreter on the CPU, and on the GPU, against its reference."""

import inspect
import threading
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_kernels import graphs, replay, runtime
from dsv4_kernels.registry import all_kernels
from tests.compare import as_tuple, bits, call, mismatch

KERNELS = all_kernels()
CASES = [pytest.param(k, c, id=f"{k.name}-{c.id}") for k in KERNELS for c in k.cases if "test" in c.tags]
GPU_CASES = [pytest.param(k, c, id=f"{k.name}-{c.id}") for k in KERNELS for c in k.cases]
CPU = torch.device("cpu")
SEED = 7
MAX_ROWS = 70


@contextmanager
def _launches():
    """Give the makers of the kernels that are launched inside the block."""
    made, launch = [], runtime.launch
    runtime.launch = lambda maker, *rest: made.append(maker) or launch(maker, *rest)
    try:
        yield made
    finally:
        runtime.launch = launch


@pytest.mark.interpret
def test_interpreter_matches_reference(kernel, case):
    inputs = kernel.make_inputs(case.dims, CPU, SEED)
    assert mismatch(kernel, inputs, call(kernel, inputs)) is None


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@settings(max_examples=6)
@given(data=st.data())
def test_interpreter_matches_reference_for_any_rows_and_values(kernel, data):
    case = data.draw(st.sampled_from([c for c in kernel.cases if "test" in c.tags]), label="case")
    dims = dict(case.dims)
    if "m" in dims:
        dims["m"] = data.draw(st.integers(1, dims.pop("max_m", MAX_ROWS)), label="m")
    inputs = kernel.make_inputs(dims, CPU, data.draw(st.integers(0, 2**31 - 1), label="seed"))
    with _launches() as made:
        got = call(kernel, inputs)
    assert kernel.make_kernel in made or not inputs[0].numel()  # and not its reference
    assert mismatch(kernel, inputs, got) is None


def test_every_registered_kernel_runs_under_hypothesis():
    """In CI, which leaves out tests marked `gpu` alone."""
    test = test_interpreter_matches_reference_for_any_rows_and_values
    marks = {mark.name: mark for mark in vars(test)["pytestmark"]}
    assert marks.keys() == {"interpret", "parametrize"}
    assert {k.name for k in marks["parametrize"].args[1]} == {k.name for k in all_kernels()}
    assert all(any("test" in c.tags for c in k.cases) for k in all_kernels())


@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_cpu_tensors_run_the_reference(kernel, case):
    inputs = kernel.make_inputs(case.dims, CPU, SEED)
    for got, want in zip(as_tuple(call(kernel, inputs)), as_tuple(kernel.reference(*inputs)), strict=True):
        assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_variants_are_those_the_dispatcher_chooses(kernel):
    shipped = {v.id: v for v in kernel.variants}
    assert len(shipped) == len(kernel.variants)
    for case in kernel.cases:
        if "bench" in case.tags:
            assert shipped[kernel.select(case.dims).id] == kernel.select(case.dims)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_torch_compile_takes_every_kernel_whole(kernel):
    """One process compiles all of them: no kernel uses up another's recompilations."""
    inputs = kernel.make_inputs(next(c for c in kernel.cases if "test" in c.tags).dims, CPU, SEED)
    traced = as_tuple(torch.compile(kernel.fn, fullgraph=True, backend="eager")(*inputs))
    for got, want in zip(traced, as_tuple(kernel.reference(*inputs)), strict=True):
        assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_torch_library_schema(kernel):
    """What torch.compile traces: the fake output agrees with the real one in shape, dtype and strides."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = next(c for c in kernel.cases if c.id == "one-row" or c.id.startswith(("one-row", "m1-")))
    inputs = kernel.make_inputs(case.dims, CPU, SEED)
    real = as_tuple(kernel.fn(*inputs))
    op = getattr(torch.ops.dsv4, kernel.name).default
    if kernel.in_place:  # it returns nothing, and says what it writes
        written = {a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        assert written == set(kernel.in_place)
        assert not op._schema.returns
        return
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(i) if isinstance(i, torch.Tensor) else i for i in inputs]
        fake = as_tuple(op(*fakes))
    for f, r in zip(fake, real, strict=True):
        assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "case"), GPU_CASES)
def test_gpu_matches_reference(kernel, case, gpu_record):
    inputs = kernel.make_inputs(case.dims, torch.device("cuda"), SEED)
    wrong = mismatch(kernel, inputs, call(kernel, inputs))
    if inputs[0].numel():  # else nothing is launched
        gpu_record(kernel, kernel.select(case.dims), f"reference {case.id}", wrong is None)
    assert wrong is None


# Row counts on both sides of every tile height and every dispatch limit.
BATCHES = (
    *(1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 300, 511, 1000, 1024, 2048, 4096),
)


def _rows(tensor, first, count):
    return tensor[first : first + count].clone() if tensor.shape[0] == BATCHES[-1] else tensor


def _invariance_params():
    for kernel in KERNELS:
        if kernel.row_invariant:
            seen = {}
            for case in kernel.cases:
                if case.dims["m"] == BATCHES[-1]:
                    seen.setdefault(tuple(v for n, v in case.dims.items() if n != "m"), case)
            yield from (pytest.param(kernel, c, id=f"{kernel.name}-{c.id}") for c in seen.values())


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "case"), list(_invariance_params()))
def test_gpu_rows_do_not_depend_on_the_batch(kernel, case, gpu_record):
    """Any batch size, any position, repeated: the bits of a row are those it has in the largest batch."""
    inputs = kernel.make_inputs(case.dims, torch.device("cuda"), SEED)
    # Weights share the row count in square shapes: only the first two operands and positions are cut.
    names = list(inspect.signature(kernel.fn).parameters)
    cut = [
        isinstance(i, torch.Tensor) and (place < 2 or names[place] == "positions")
        for place, i in enumerate(inputs)
    ]
    full = as_tuple(kernel.fn(*inputs))
    generator = torch.Generator().manual_seed(SEED)
    for count in BATCHES:
        for repeat in range(3):
            first = int(torch.randint(0, BATCHES[-1] - count + 1, (), generator=generator))
            part = [_rows(i, first, count) if c else i for c, i in zip(cut, inputs, strict=True)]
            got = as_tuple(kernel.fn(*part))
            same = all(
                torch.equal(bits(g), bits(f[first : first + count])) for g, f in zip(got, full, strict=True)
            )
            if repeat == 0 or not same:
                gpu_record(
                    kernel, kernel.select({**case.dims, "m": count}), f"rows {case.id} m={count}", same
                )
            assert same, f"{count} rows from {first}"


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_gpu_graph_and_compile(kernel, gpu_record):
    """A CUDA graph replays, and torch.compile(fullgraph=True) gives, the bits of the eager call."""
    case = next(c for c in kernel.cases if "bench" in c.tags)
    inputs = kernel.make_inputs(case.dims, torch.device("cuda"), SEED)
    want = as_tuple(kernel.fn(*inputs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = as_tuple(kernel.fn(*inputs))
    graph.replay()
    traced = as_tuple(torch.compile(kernel.fn, fullgraph=True)(*inputs))
    for how, found in (("graph", captured), ("compiled", traced)):
        same = all(torch.equal(bits(w), bits(f)) for w, f in zip(want, found, strict=True))
        gpu_record(kernel, kernel.select(case.dims), f"{how} {case.id}", same)
        assert same, how


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_gpu_calls_go_as_noted(kernel, monkeypatch, gpu_record):
    """A later call launches by itself, on its own tensors and stream, and gives the bits of a checked one."""
    case = next(c for c in kernel.cases if "bench" in c.tags)
    inputs = kernel.make_inputs(case.dims, torch.device("cuda"), SEED)
    with replay.disabled():
        want = as_tuple(kernel.fn(*inputs))
    kernel.fn(*inputs)
    checked, same = [], True
    with monkeypatch.context() as patched:
        patched.setattr(runtime._Launcher, "__call__", lambda self, args: checked.append(args))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                got = as_tuple(kernel.fn(*inputs))
                same = same and all(torch.equal(bits(w), bits(g)) for w, g in zip(want, got, strict=True))
        torch.cuda.current_stream().wait_stream(stream)
    gpu_record(kernel, kernel.select(case.dims), f"noted {case.id}", same and not checked)
    assert same
    assert not checked


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_gpu_calls_by_graphs(kernel, monkeypatch):
    """Calls that the driver launches as graphs give the bits of checked ones.

    On other tensors in turn, with outputs that live on, in a thread's own stream, and captured after that.
    """
    made, graph_type = [], graphs.Graph
    monkeypatch.setattr(graphs, "CALLS_BEFORE", 1)
    monkeypatch.setattr(graphs, "Graph", lambda *args: made.append(graph_type(*args)) or made[-1])
    case = next(c for c in kernel.cases if "bench" in c.tags)
    sets = [kernel.make_inputs(case.dims, torch.device("cuda"), seed) for seed in (SEED, SEED + 1)]
    with replay.disabled():
        wants = [as_tuple(kernel.fn(*inputs)) for inputs in sets]
    wants = [[w.clone() for w in want] for want in wants]
    same, stream, graph = [], torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()

    def run():
        with torch.cuda.stream(stream):
            for _ in range(3):
                for i, got in [(i, as_tuple(kernel.fn(*sets[i]))) for i in (0, 0, 1, 0, 1, 1)]:
                    same.extend(torch.equal(bits(w), bits(g)) for w, g in zip(wants[i], got, strict=True))

    for _ in range(2):
        run()
        stream.synchronize()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert same
    assert all(same)
    assert made
    with torch.cuda.graph(graph, stream=stream):
        captured = as_tuple(kernel.fn(*sets[0]))
    run()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(bits(w), bits(c)) for w, c in zip(wants[0], captured, strict=True))
    assert all(same)


def test_the_environment_names_a_backend(monkeypatch):
    """DSV4_BACKEND does what `backend` does, which comes first where both are given."""
    kernel = next(k for k in KERNELS if k.name == "act_quant")
    inputs = kernel.make_inputs(next(c for c in kernel.cases if c.id.startswith("one-row")).dims, CPU, SEED)
    launched = []
    launch = runtime.launch
    monkeypatch.setattr(runtime, "launch", lambda *args: launched.append(args) or launch(*args))
    for name, runs in (("interpret", 1), ("reference", 0)):
        launched.clear()
        monkeypatch.setenv("DSV4_BACKEND", name)
        assert mismatch(kernel, inputs, call(kernel, inputs)) is None
        assert len(launched) == runs
        with runtime.backend("reference"):
            call(kernel, inputs)
        assert len(launched) == runs
    monkeypatch.setenv("DSV4_BACKEND", "no_such")
    with pytest.raises(runtime.BackendError, match="requires backend in"):
        call(kernel, inputs)
