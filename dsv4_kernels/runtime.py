"""Compile, cache, gate on proofs, and launch; choose between GPU, interpreter and reference.

A CUDA tensor runs the compiled kernel. A CPU tensor runs the PyTorch reference, or, under
`backend("interpret")` (environment: DSV4_BACKEND=interpret), the kernel's own tile IR on the CPU.

DSV4_PROOF says what to do with a variant that has no certificate for the CUDA text just compiled:
`warn` (default, once a variant), `require` (raise UnprovedVariantError) or `off`.
"""

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

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
_lock = threading.Lock()


def current_backend() -> str:
    """Return the backend in force: a `backend(...)` block's, else DSV4_BACKEND, else `auto`."""
    name = _state.backend or os.environ.get("DSV4_BACKEND", "auto")
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
        yield
    finally:
        _state.backend = before


def uses_reference(tensor: torch.Tensor) -> bool:
    """Return whether a call on `tensor` runs the PyTorch reference instead of the kernel."""
    name = current_backend()
    return name == "reference" or (name == "auto" and tensor.device.type != "cuda")


def launch(
    make_kernel: Callable[..., Any], kwargs: Mapping[str, Any], args: tuple[torch.Tensor, ...]
) -> None:
    """Run `make_kernel(**kwargs)` on `args` (inputs, then outputs, as the PrimFunc lists them).

    Packed sub-byte operands are uint8 tensors with two elements a byte.

    Raises:
        BackendError: the tensors are neither on a GPU nor to be interpreted.
        UnprovedVariantError: DSV4_PROOF=require and the variant has no certificate.
    """
    if current_backend() == "interpret":
        from verify import interp

        interp.run(make_kernel(**kwargs), *args)
        return
    if args[0].device.type != "cuda":
        raise BackendError(f"requires CUDA tensors for backend='auto', got device={args[0].device}")
    compiled(make_kernel, kwargs)(*args)


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

    from dsv4_kernels.tile import corrections

    with corrections.corrected():
        kernel = tilelang.compile(
            make_kernel(**kwargs),
            target={"kind": "cuda", "arch": "sm_90a"},
            compile_flags=corrections.compile_flags(),
        )
    _gate(make_kernel, kwargs, kernel.get_kernel_source())
    return kernel


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
        f"{make_kernel.__name__}({dict(kwargs)}): no certificate for CUDA text {digest[:12]}; run dsv4-verify"
    )
    if mode == "require":
        raise UnprovedVariantError(message)
    warnings.warn(message, UnprovedVariantWarning, stacklevel=4)
