"""Suites of the kernels that are launched before the fused one: that of the inputs, and the plan's.

Of the inputs' kernel all properties are the verifier's own (`stage`, `stage-options`, and those of layers).
Of the plan's, `plan*` say what it puts where; properties that follow data rest on these (`properties-plan*`),
the others are the verifier's own (`machine-plan*`, `refinement-plan*`).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from megamoe import (
    plan_kernel,
    plan_machine,
    plan_proof,
    plan_properties,
    properties_proof,
    refine_plan,
    stage_kernel,
    stage_proof,
)
from megamoe.config import Config
from megamoe.instances import CONFIG, PLANS, STAGES
from megamoe.lowering import as_launched
from megamoe.plan_guide import PlanGuide
from megamoe.virtual import PASS_CONFIGS
from verify.extract import Extracted, extract, source_sha256
from verify.properties import Claims
from verify.suites import Suite


def _extract(kernel: Any) -> Extracted:
    with as_launched():
        return extract(kernel, pass_configs=PASS_CONFIGS)


@cache
def plan_extracted(config: Config = CONFIG) -> Extracted:
    """Return the stages of the plan's kernel, that of CONFIG."""
    return _extract(plan_kernel.make_kernel(config))


@cache
def stage_extracted(config: Config = CONFIG) -> Extracted:
    """Return the stages of the inputs' kernel, that of CONFIG."""
    return _extract(stage_kernel.make_kernel(config))


@cache
def _digest(make: Callable[[Config], Any], config: Config) -> str:
    kernel = make(config)
    with as_launched():
        return source_sha256(kernel, pass_configs=PASS_CONFIGS)


# --------------------------------------------------------------------------- claims
@cache
def plan_claimed(config: Config) -> Mapping[str, Claims]:
    """Return what has to be proved of the plan's kernel."""
    return plan_proof.claims(plan_extracted(config).device, PlanGuide(config))


@cache
def _of_data(config: Config, plan: str) -> Mapping[str, Claims]:
    kernel = plan_extracted(config)
    missing = properties_proof.missing_of(kernel.cuda_sha256, {"plan": plan})
    return plan_properties.claims(kernel.device, PlanGuide(config), missing)


@cache
def _of_machine(config: Config, plan: str) -> Mapping[str, Claims]:
    return plan_machine.claims(plan_extracted(config), config, plan, f"properties-{plan}")


@cache
def _refined(config: Config) -> Mapping[str, Claims]:
    return refine_plan.claims(plan_extracted(config))


@cache
def _staged(config: Config, suite: str) -> Mapping[str, Claims]:
    return stage_proof.claims(stage_extracted(config), config, suite)


# --------------------------------------------------------------------------- suites
def _suite(
    names: Sequence[str],
    claimed: Callable[[], Mapping[str, Claims]],
    make: Callable[[Config], Any],
    extracted: Callable[[Config], Extracted],
    config: Config,
    more: Mapping[str, Callable[[], Claims]] | None = None,
) -> Suite:
    claims = {name: lambda name=name: claimed()[name] for name in names}
    return Suite(
        "megamoe",
        {**claims, **(more or {})},
        # All of the package: the claims are about functions that import each other.
        tuple(Path(__file__).parent.glob("*.py")),
        compiled=partial(_digest, make, config),
        text=lambda: extracted(config).cuda_sha256,
    )


def suites(meeting: Callable[[Config], Claims]) -> dict[str, Suite]:
    """Return the suites by name.

    Args:
        meeting: what has to be proved of a plan's kernel whose ranks meet first.
    """
    of_plan = partial(_suite, make=plan_kernel.make_kernel, extracted=plan_extracted)
    of_stage = partial(_suite, make=stage_kernel.make_kernel, extracted=stage_extracted)
    found: dict[str, Suite] = {}
    for name, config in PLANS.items():
        more = {"meeting": partial(meeting, config)} if config.num_ranks > 1 else None
        for suite, names, claimed, others in (
            (name, plan_proof.CLAIMS, partial(plan_claimed, config), more),
            (f"properties-{name}", plan_properties.CLAIMS, partial(_of_data, config, name), None),
            (f"machine-{name}", plan_machine.CLAIMS, partial(_of_machine, config, name), None),
            (f"refinement-{name}", refine_plan.CLAIMS, partial(_refined, config), None),
        ):
            found[suite] = of_plan(names, claimed, config=config, more=others)
    for name, config in STAGES.items():
        found[name] = of_stage(stage_proof.CLAIMS, partial(_staged, config, name), config=config)
    return found
