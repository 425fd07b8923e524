"""MegaMoE's compiled kernels for the verifier's properties: `dsv4-verify megamoe/kernels.py`.

`fused` and `stage` are kernels of `instances.CONFIG`: two ranks of four CTAs, small enough to be lowered in
seconds, with every part of the code; `fused-fp8`, `fused-wide` and `fused-widened` are those of `FP8`, `WIDE`
and `WIDENED` there, and `fused-options` and `stage-options` are those of `OPTIONS`. `plan` is that of a
Flash layer for 64 tokens on one rank. What the contracts say of the plan's tensors is what `plan_kernel`
writes there. What the verifier leaves open of these kernels here, suites prove of the same CUDA text;
docs/megamoe.md has the verdicts.
"""

from megamoe import (
    contracts,
    fused,
    plan_kernel,
    plan_machine,
    plan_properties,
    stage_kernel,
    stage_proof,
)
from megamoe.instances import CONFIG, FP8, OPTIONS, PLANS, WIDE, WIDENED
from megamoe.lowering import as_launched
from megamoe.virtual import PASS_CONFIGS as COMPILED_WITH

SIGNALS = {  # what orders the CTAs of each: claims about the same text
    "fused": "megamoe/protocol:signals",
    "fused-fp8": "megamoe/protocol-fp8:signals",
    "fused-wide": "megamoe/protocol-wide:signals",
    "fused-widened": "megamoe/protocol-widened:signals",
    "fused-options": "megamoe/protocol-options:signals",
}


_FUSED = {
    "fused": CONFIG,
    "fused-fp8": FP8,
    "fused-wide": WIDE,
    "fused-widened": WIDENED,
    "fused-options": OPTIONS,
}
KERNELS = {
    **{name: fused.make_kernel(config) for name, config in _FUSED.items()},
    "plan": plan_kernel.make_kernel(PLANS["plan-flash"]),
    "stage": stage_kernel.make_kernel(CONFIG),
    "stage-options": stage_kernel.make_kernel(OPTIONS),
}
COMPILERS = dict.fromkeys(KERNELS, as_launched)
PASS_CONFIGS = dict.fromkeys(KERNELS, COMPILED_WITH)
CONTRACTS = {
    **{name: contracts.clauses(c) for name, c in _FUSED.items()},
    "plan": plan_machine.CLAUSES,
    "stage": stage_proof.clauses(CONFIG),
    "stage-options": stage_proof.clauses(OPTIONS),
}
BANK_LIMITS = {name: limit for name, c in _FUSED.items() if (limit := contracts.bank_limit(c)) is not None}
# Words that outlive a launch.
IN_PLACE = {
    **dict.fromkeys(_FUSED, contracts.IN_PLACE),
    "plan": plan_properties.LASTING,
    **dict.fromkeys(("stage", "stage-options"), stage_proof.PARTS),
}
EXCHANGED = {name: dict.fromkeys(contracts.EXCHANGED, claim) for name, claim in SIGNALS.items()}
