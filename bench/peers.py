"""Run peers beside us: optional packages, each in a process of its own, found at run time.

Two peers may ship packages of one name, so each peer runs in one subprocess for all its cases (imports
and compilation are paid once) with its own folder, `$PEERS/<name>`, first on `sys.path`. Whatever goes
wrong there becomes an error string in the row.

As a program (`python -m bench.peers NAME --kernel KERNEL --dims JSON ...`) it prints one JSON object
a line: the index of the dims, the label of the call, and a `PeerResult`. With `--ahead` it compiles alone
(`bench.warm` does so for many shapes side by side).
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from bench.rows import PeerResult

FOLDERS_VARIABLE = "PEERS"
_ERROR_LENGTH = 200  # of an error string in a row

Results = dict[int, dict[str, PeerResult]]


def run_peer(
    name: str,
    kernel: str,
    cases: Sequence[Mapping[str, int]],
    timeout_s: float,
    progress: Callable[[str], None] = lambda text: None,
    command: Sequence[str] = (sys.executable, "-m", "bench.peers"),
) -> Results:
    """Time one peer on every case, in a subprocess.

    Args:
        name: of an adapter.
        kernel: of ours that the cases belong to.
        cases: dims of each.
        timeout_s: for all cases together; what is measured by then is kept.
        progress: called with a line for each result.
        command: what starts the subprocess.

    Returns:
        For each index into `cases`, results by label; an error stands under the peer's own name.
    """
    arguments = [*command, name, "--kernel", kernel]
    for dims in cases:
        arguments += ["--dims", json.dumps(dict(dims))]
    results: Results = {index: {} for index in range(len(cases))}
    timed_out = threading.Event()
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment()
        )

        def stop() -> None:
            timed_out.set()
            process.kill()

        timer = threading.Timer(timeout_s, stop)
        timer.start()
        try:
            for index, label, result in _read(process):
                results[index][label] = result
                progress(f"{label} {dict(cases[index])}: {result.error or f'{result.us:.1f} us'}")
            process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        stderr.seek(0)
        last_words = stderr.read().strip().splitlines()[-1:] or [f"exit {process.returncode}"]
    error = f"timed out after {timeout_s:.0f} s" if timed_out.is_set() else last_words[0]
    if process.returncode != 0:
        for found in results.values():
            if not found:  # cases measured before the end keep their figures
                found[name] = PeerResult(error=error[:_ERROR_LENGTH])
    return results


def _read(process: "subprocess.Popen[str]") -> Iterator[tuple[int, str, PeerResult]]:
    assert process.stdout is not None, "started with a pipe"
    for line in process.stdout:
        data = json.loads(line)
        yield data["index"], data["label"], PeerResult(**data["result"])


def environment() -> dict[str, str]:
    """Return this environment with the project first on the subprocess's path."""
    root = str(Path(__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, inherited] if inherited else [root])}


def measure(name: str, kernel: str, cases: Sequence[Mapping[str, int]], emit: Callable[..., None]) -> None:
    """Time every call of peer `name` on every case; `emit(index, label, result)` as they come.

    Raises:
        KeyError: there is no adapter of that name for that kernel.
    """
    from bench.adapters import ADAPTERS
    from bench.timer import CudaDevice, time_call

    if name not in ADAPTERS or not ADAPTERS[name].supports(kernel):
        raise KeyError(f"no adapter {name!r} for {kernel}")
    device = CudaDevice()
    for index, dims in enumerate(cases):
        try:
            calls = ADAPTERS[name].calls(kernel, dims)
        except Exception as error:  # a peer may fail in any way; it must not take the others along
            emit(index, name, PeerResult(error=_first_line(error)))
            continue
        for call in calls:
            try:
                timing = time_call(call.setup(), device)
            except Exception as error:
                result = PeerResult(note=call.note, casts_input=call.casts_input, error=_first_line(error))
            else:
                spread = timing.p20_us, timing.p80_us
                result = PeerResult(timing.us, *spread, timing.method, call.note, call.casts_input)
            emit(index, call.label, result)


def compile_ahead(name: str, kernel: str, cases: Sequence[Mapping[str, int]]) -> list[str]:
    """Have peer `name` compile what it would on the first call of each case; return what went wrong."""
    from bench.adapters import ADAPTERS

    errors = []
    for dims in cases:
        try:
            for call in ADAPTERS[name].calls(kernel, dims):
                if call.compile_ahead is not None:
                    call.compile_ahead()
                else:
                    call.setup()()
        except Exception as error:  # the others' kernels are still wanted
            errors.append(f"{name} {kernel} {dict(dims)}: {_first_line(error)}")
    return errors


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()[:1]
    return f"{type(error).__name__}: {text[0] if text else ''}"[:_ERROR_LENGTH]


@click.command()
@click.argument("name")
@click.option("--kernel", required=True, help="Kernel of ours that the cases belong to.")
@click.option("--dims", "cases", multiple=True, required=True, help="Dims of a case as JSON; repeatable.")
@click.option("--ahead", is_flag=True, help="Compile and time nothing; prints what went wrong.")
def main(name: str, kernel: str, cases: tuple[str, ...], ahead: bool) -> None:
    """Time peer NAME on the current GPU and print one JSON object a line."""
    # Compilers and libraries print to standard output; it carries results alone here.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folders = os.environ.get(FOLDERS_VARIABLE)
    if folders:
        sys.path.insert(0, str(Path(folders) / name))

    def emit(index: int, label: str, result: PeerResult) -> None:
        data: dict[str, Any] = {"index": index, "label": label, "result": asdict(result)}
        print(json.dumps(data), file=results, flush=True)

    dims = [json.loads(text) for text in cases]
    if ahead:
        print("\n".join(compile_ahead(name, kernel, dims)), file=results, flush=True)
    else:
        measure(name, kernel, dims, emit)


if __name__ == "__main__":
    main()
