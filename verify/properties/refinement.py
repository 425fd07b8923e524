"""refinement: the device IR reads and writes what the tile IR says, address by address.

For every statement and tile operation of the tile program, at every point (element, thread, lane,
loop iteration, block, shape): the device statement writes the place where the layout and the
pipeline stage put that element, nothing else, every place that holds it, under the same condition;
and each operand is read from the place of the operand that the author wrote, combined by the same
operations. Addresses of the tile level are mathematical integers; those of the device IR are the
expressions that are compiled, so a constant that the compiler wrapped shows (tilelang #2560), and
intermediate values are covered by `overflow`.

Points of the finite coordinates are enumerated exactly; blocks, serial loops and shapes stay
symbolic and are settled by normal form or by the solvers.
"""

import time
from collections.abc import Sequence

from verify.encode import Hypothesis
from verify.extract import Extracted
from verify.refine.run import refine
from verify.solve import Answer, Prover
from verify.verdict import Counterexample, Finding, PropertyResult, Verdict, worst

NAME = "refinement"
DEPENDS = ("overflow", "races", "barriers")

_ALWAYS = (
    "steps of one block happen in program order, and a consumer reads a stage after the producer filled it in "
    "the same iteration (properties races and barriers)",
    "casts, arithmetic and intrinsics mean the same at both levels",
)
_BY_USE = {
    "tma": "TMA moves the box of its descriptor, swizzled as PTX documents; dynamic shared memory is 1024-byte aligned",
    "wgmma": "wgmma reads registers and shared-memory descriptors, and holds D, as PTX documents",
    "reduce": "tl::AllReduce<op, threads, scale, offset> combines threads t ^ (scale * k), k < threads / scale",
}


def check(extracted: Extracted, clauses: Sequence[Hypothesis], prover: Prover) -> PropertyResult:
    """Return the verdict on one compiled kernel.

    Args:
        extracted: the kernel at every stage.
        clauses: the contract, over Z3 integers named like the shape parameters.
        prover: decides what normal forms leave open.
    """
    started, queries, rlimit = time.perf_counter(), prover.queries, prover.rlimit_used
    decided = dict(prover.decided)
    found = refine(extracted, clauses)
    answers = prover.prove(found.obligations)
    findings = [Finding(Verdict.UNSUPPORTED, span, reason) for span, reason in found.unsupported]
    findings += _findings(answers)
    contract = {c.label for c in clauses}
    return PropertyResult(
        NAME,
        worst(f.verdict for f in findings),
        depends=DEPENDS,
        findings=findings,
        obligations=found.compared + len(answers),
        queries=prover.queries - queries,
        solvers={k: v - decided.get(k, 0) for k, v in prover.decided.items() if v > decided.get(k, 0)},
        rlimit=prover.rlimit_used - rlimit,
        seconds=time.perf_counter() - started,
        assumptions=[*_ALWAYS, *(_BY_USE[u] for u in sorted(found.uses))],
        used=sorted({label for a in answers for label in a.core} & contract),
        notes=[f"{found.steps} statements; {found.compared} addresses and operands enumerated, {len(answers)} by solver"],
    )


def _findings(answers: Sequence[Answer]) -> list[Finding]:
    """Return one finding per claim: the first point where it fails, else where it is open."""
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        if answer.verdict is not Verdict.PROVED:
            groups.setdefault(answer.obligation.what, []).append(answer)
    return [_finding(next((a for a in g if a.verdict is Verdict.REFUTED), g[0])) for g in groups.values()]


def _finding(answer: Answer) -> Finding:
    obligation = answer.obligation
    values = dict(answer.shown)
    threads = {k: int(v) for k, v in values.items() if k.startswith("threadIdx") and isinstance(v, int)}
    loops = {k: int(v) for k, v in values.items() if _is_loop(k) and isinstance(v, int)}
    rest = {k: v for k, v in values.items() if k not in threads and k not in loops}
    names = [n for n in answer.model if not n.startswith("h")]
    block = {n: answer.model[n] for n in names if n in ("bx", "by", "bz")}
    shape = {n: answer.model[n] for n in names if n not in block}
    tile = ", ".join(f"{k.removeprefix('tile ')}={v}" for k, v in rest.items() if k.startswith("tile "))
    where = f" at tile index ({tile})" if tile else ""
    difference = _difference(rest)
    message = f"{obligation.what}{where}{difference}" + (f": {answer.reason}" if answer.reason else "")
    example = Counterexample(shape, block, threads, loops, rest) if answer.verdict is Verdict.REFUTED else None
    return Finding(answer.verdict, obligation.span, message, example)


def _is_loop(name: str) -> bool:
    return name.startswith(("device ", "box ")) or name == "lane"


def _difference(values: dict[str, int | str]) -> str:
    for suffix in (" address", ""):
        expected, actual = values.get(f"expected{suffix}"), values.get(f"actual{suffix}")
        if expected is not None and actual is not None:
            return f": expected{suffix} {expected}, actual{suffix} {actual}"
    return ""
