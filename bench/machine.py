"""Where and with what a row was measured."""

import os
import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

COMMIT_VARIABLE = "DSV4_COMMIT"  # for a copy of the tree without its git directory
UNKNOWN = "unknown"
_ROOT = Path(__file__).parents[1]


def has_gpu() -> bool:
    """Return whether torch can run on an NVIDIA GPU here."""
    import torch

    return torch.cuda.is_available() and torch.version.cuda is not None


def describe() -> dict[str, str]:
    """Return GPU, driver and the versions that decide what is compiled and how fast it runs."""
    import torch

    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or UNKNOWN,
        "nvcc": _nvcc_version(),
        "tilelang": version("tilelang"),
        "python": platform.python_version(),
    }


def slug(gpu: str) -> str:
    """Return a file name's stem for a GPU's name: `NVIDIA H200` becomes `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def commit() -> str:
    """Return the commit of this tree, marked `-dirty` if tracked files differ from it."""
    named = os.environ.get(COMMIT_VARIABLE)
    if named:
        return named
    head = _output("git", "-C", str(_ROOT), "rev-parse", "HEAD")
    if head == UNKNOWN:
        return head
    changed = _output("git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if changed not in ("", UNKNOWN) else head


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _nvcc_version() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    text = _output(shutil.which("nvcc") or f"{home}/bin/nvcc", "--version")
    match = re.search(r"release [\d.]+, V([\d.]+)", text)
    return match.group(1) if match else UNKNOWN


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return UNKNOWN
    return done.stdout.strip() if done.returncode == 0 else UNKNOWN
