"""Compile, cache, gate on proofs, and launch; choose between GPU, interpreter and reference.

A CUDA tensor runs the compiled kernel. A CPU tensor runs the PyTorch reference, or, under
`backend("interpret")` (environment: DSV4_BACKEND=interpret), the kernel's own tile IR on the CPU.

DSV4_PROOF says what to do with a variant that has no certificate for the CUDA text just compiled:
`warn` (default, once a variant), `require` (raise UnprovedVariantError) or `off`. Certificates are the
library's, and those that `dsv4-verify --dims ... --write` left for dims of the user's own.
"""

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from dsv4_kernels import data_checks, driver, host_text, replay

BACKENDS = ("auto", "interpret", "reference")
PROOF_MODES = ("warn", "require", "off")


class BackendError(ValueError):
    """A backend was asked for that does not exist or cannot run these tensors."""


class UnprovedVariantError(RuntimeError):
    """DSV4_PROOF=require and no certificate covers the compiled kernel."""


class UnprovedVariantWarning(UserWarning):
    """A kernel runs whose compiled text no certificate covers."""


class _State(threading.local):
    backend: str | None = None


_state = _State()
_compiled: dict[tuple[Any, ...], Any] = {}
_launchers: dict[tuple[Any, ...], "_Launcher"] = {}
_lock = threading.Lock()
_blocks = replay.blocks
# What os.environ encodes a name for at every look, and decodes its value: host cost.
_environment: Any = getattr(os.environ, "_data", os.environ)
_BACKEND_NAME: Any = "DSV4_BACKEND" if _environment is os.environ else os.environ.encodekey("DSV4_BACKEND")


def current_backend() -> str:
    """Return the backend in force: a `backend(...)` block's, else DSV4_BACKEND, else `auto`."""
    name = _state.backend
    if name is None:
        name = os.environ["DSV4_BACKEND"] if _BACKEND_NAME in _environment else "auto"
    if name not in BACKENDS:
        raise BackendError(f"requires backend in {BACKENDS}, got backend={name!r}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the kernels on `name` (`auto`, `interpret`, `reference`) inside the block, in this thread.

    Raises:
        BackendError: no such backend.
    """
    if name not in BACKENDS:
        raise BackendError(f"requires backend in {BACKENDS}, got backend={name!r}")
    before, _state.backend = _state.backend, name
    try:
        with _blocks.entered():
            yield
    finally:
        _state.backend = before


def uses_reference(tensor: torch.Tensor) -> bool:
    """Return whether a call on `tensor` runs the PyTorch reference instead of the kernel."""
    name = current_backend()
    return name == "reference" or (name == "auto" and tensor.device.type != replay.DEVICE_TYPE)


def replays() -> bool:
    """Return whether a call may go as an earlier one like it went, of a kernel on the GPU: see `replay`."""
    if not _blocks.count and _BACKEND_NAME not in _environment:
        return True
    if replay.state.is_disabled or data_checks.is_on():
        return False
    return (_state.backend is None and _BACKEND_NAME not in _environment) or current_backend() == "auto"


def launch(
    make_kernel: Callable[..., Any], kwargs: Mapping[str, Any], args: tuple[torch.Tensor, ...]
) -> None:
    """Run `make_kernel(**kwargs)` on `args` (inputs, then outputs, as the PrimFunc lists them).

    Packed sub-byte operands are uint8 tensors with two elements a byte.

    Raises:
        BackendError: the tensors are neither on a GPU nor to be interpreted.
        UnprovedVariantError: DSV4_PROOF=require and the variant has no certificate.
        ContractError: inside `check_data`, of elements.
    """
    if data_checks.is_on() and not data_checks.before_launch(make_kernel, kwargs, args):
        return
    if current_backend() == "interpret":
        from verify import interp

        interp.run(make_kernel(**kwargs), *args)
        return
    if args[0].device.type != replay.DEVICE_TYPE:
        raise BackendError(f"requires CUDA tensors for backend='auto', got device={args[0].device}")
    launcher = _launchers.get((make_kernel, *kwargs.items())) or _launcher(make_kernel, kwargs)
    launcher(args)


class _Launcher:
    """A compiled kernel: called through the compiler's host function, or directly (`direct`)."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        executable = kernel.adapter.get_exportable_executable()
        self._module = executable.jit() if hasattr(executable, "jit") else executable
        self._main = self._module["main"]
        self._direct: tuple[host_text.HostText, driver.Functions] | None = None

    def __call__(self, args: tuple[torch.Tensor, ...]) -> None:
        self._main(*args)
        replay.note_launch(self.direct, args)

    def direct(
        self, shapes: Sequence[Sequence[int]], sources: Sequence[replay.Source], device: int
    ) -> driver.DirectLaunch:
        """Return the launch but for addresses; CannotReplayError: the host function is not understood."""
        try:
            if self._direct is None:
                host = host_text.read_host(
                    self._kernel.adapter.get_host_source(), self._kernel.adapter.get_device_source()
                )
                self._direct = host, driver.Functions(_cubin(self._module))
            host, functions = self._direct
            return driver.DirectLaunch(host.launch(shapes), functions, device, sources)
        except (host_text.UnreadableHostError, OSError) as error:
            raise replay.CannotReplayError(str(error)) from error


def _cubin(module: Any) -> bytes:
    """Return the machine code in the compiler's module."""
    for part in module.imports:
        if part.kind == "cuda":
            try:
                text = part.inspect_source("cubin")
            except UnicodeDecodeError as error:  # the compiler hands bytes out as text
                return bytes(error.object)
            if text:
                return text.encode()
    raise replay.CannotReplayError("no cubin in the compiled module")


def _launcher(make_kernel: Callable[..., Any], kwargs: Mapping[str, Any]) -> _Launcher:
    kernel = compiled(make_kernel, kwargs)
    return _launchers.setdefault((make_kernel, *kwargs.items()), _Launcher(kernel))


def compiled(make_kernel: Callable[..., Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the compiled kernel of a variant: built and checked against the certificates once."""
    key = (make_kernel, *kwargs.items())
    kernel = _compiled.get(key)
    if kernel is None:
        with _lock:
            kernel = _compiled.get(key)
            if kernel is None:
                kernel = _compiled[key] = _compile(make_kernel, kwargs)
    return kernel


def _compile(make_kernel: Callable[..., Any], kwargs: Mapping[str, Any]) -> Any:
    import tilelang

    from dsv4_kernels.tile import corrections, simplifier

    with corrections.corrected(), simplifier.lowering():
        kernel = tilelang.compile(
            make_kernel(**kwargs),
            target={"kind": "cuda", "arch": "sm_90a"},
            compile_flags=corrections.compile_flags(),
        )
    _gate(make_kernel, kwargs, kernel.get_kernel_source())
    return kernel


def _proving(make_kernel: Callable[..., Any], kwargs: Mapping[str, Any]) -> str:
    """Return the command that proves a kernel: that of its dims, where it is a registered one's."""
    from dsv4_kernels.registry import Variant, all_kernels

    for spec in all_kernels():
        if spec.make_kernel is make_kernel:
            dims = spec.fixed_dims(Variant("", kwargs))
            of = f" --dims {','.join(f'{n}={v}' for n, v in dims.items())}" if dims else ""
            return f"dsv4-verify --kernel {spec.name}{of} --write"
    return "dsv4-verify"


def _gate(make_kernel: Callable[..., Any], kwargs: Mapping[str, Any], cuda_text: str) -> None:
    mode = os.environ.get("DSV4_PROOF", "warn")
    if mode not in PROOF_MODES:
        raise ValueError(f"requires DSV4_PROOF in {PROOF_MODES}, got DSV4_PROOF={mode!r}")
    if mode == "off":
        return
    from verify import certificates

    digest = certificates.cuda_sha256(cuda_text)
    if certificates.is_proved(digest):
        return
    message = (
        f"{make_kernel.__name__}({dict(kwargs)}): no certificate for CUDA text {digest[:12]}; "
        f"run {_proving(make_kernel, kwargs)}"
    )
    if mode == "require":
        raise UnprovedVariantError(message)
    warnings.warn(message, UnprovedVariantWarning, stacklevel=4)
