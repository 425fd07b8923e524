"""The kernels that proofs, tests and records speak of: small ones with every part of the code, and layers.

Small ones are lowered in seconds; those of layers are what `config_for` chooses.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from megamoe.config import Config
from megamoe.layer import config_for, one_of

# Two ranks of four CTAs; experts in waves of one, so that both rings can come round.
CONFIG = Config(
    num_ranks=2,
    launch_ranks=2,
    ctas=4,
    tokens=10,
    topk=2,
    hidden=256,
    inter=256,
    num_experts=3,
    wave_experts=1,
    block_m=16,
    dispatch_parts=2,
    num_stages=2,
    max_polls=100_000,
)
# e4m3 weights; that one of these experts is the shared one changes nothing in the fused kernel.
FP8 = replace(CONFIG, fp8=True)
# A shared expert with e4m3 weights beside routed ones with e2m1; warps that dispatch.
OPTIONS = replace(CONFIG, shared=True, topk=3, dispatchers=True)
# e4m3 weights and rows that are the instruction's; products begin at any stage.
WIDE = replace(FP8, wide=True, hidden=512, inter=512, block_m=128, num_stages=3, dispatchers=True)
# In waves of several blocks, where some products wait ahead and others do not.
AHEAD = replace(WIDE, num_experts=5, wave_experts=2)
# e2m1 weights that are widened once, to a ring of four experts; the fifth comes round.
WIDENED = replace(AHEAD, fp8=False, dispatchers=False, widened=True)
# Kernels of a Flash layer: FP4 with few rows a block, with many and widened, FP8 with few and wide, shared.
_MODEL = {"topk": 6, "clamp": 10.0, "multiprocessors": 132}
FLASH_LAYER = {"hidden": 4096, "inter": 2048, "num_experts": 32, **_MODEL}
FLASH = {
    "fp4-64": config_for(64, **FLASH_LAYER),
    "fp4-2048": config_for(2048, **FLASH_LAYER),
    "fp4-4096": config_for(4096, **FLASH_LAYER),
    "fp8-8": config_for(8, fp8=True, **FLASH_LAYER),
    "fp8-4096": config_for(4096, fp8=True, **FLASH_LAYER),
    "shared-64": config_for(64, shared=True, **FLASH_LAYER),
}
# Of a Pro layer: widened too.
PRO_LAYER = {"hidden": 7168, "inter": 3072, "num_experts": 48, **_MODEL}
PRO = {"fp4-4096": config_for(4096, **PRO_LAYER)}
# A number of tokens of each form that a layer's kernel has up to 8192 (block, stages, waves, ...).
_FLASH_TOKENS = (1, 24, 48, 66, 96, 140, 256, 520, 1024, 4096)
_PRO_TOKENS = (1, 64, 100, 140, 256, 520, 1024, 4096)
# Layers whose kernels are compared: arguments of `config_for`, and those numbers of tokens.
FORMS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "flash-fp4": (FLASH_LAYER, _FLASH_TOKENS),
    "flash-fp8": ({**FLASH_LAYER, "fp8": True}, _FLASH_TOKENS),
    "flash-shared": ({**FLASH_LAYER, "shared": True}, _FLASH_TOKENS),
    "pro-fp4": (PRO_LAYER, _PRO_TOKENS),
    "pro-fp8": ({**PRO_LAYER, "fp8": True}, _PRO_TOKENS),
    "pro-shared": ({**PRO_LAYER, "shared": True}, _PRO_TOKENS),
}
# Ranks whose kernels are compared with those of one, and the rank that they are of.
RANKS = {2: 1, 4: 2, 8: 7}
MOST_RANKS = max(RANKS)
# Kernels of the plan: two ranks of one launch; a Flash layer's; that of the last of four ranks (Pro), whose
# threads have many entries; and one that reads its entries one by one.
PLANS = {
    "plan": CONFIG,
    "plan-flash": FLASH["fp4-64"],
    "plan-pro": replace(
        config_for(1024, **PRO_LAYER),
        num_ranks=4,
        launch_ranks=1,
        first_rank=3,
    ),
    "plan-odd": replace(CONFIG, num_ranks=3, launch_ranks=3, tokens=7, topk=3),
}
# Kernels of the inputs: two ranks of one launch, without and with a shared expert; those of layers.
STAGES = {
    "stage": CONFIG,
    "stage-options": OPTIONS,
    "stage-flash-fp4-64": FLASH["fp4-64"],
    "stage-flash-shared-64": FLASH["shared-64"],
    "stage-pro-fp4-4096": PRO["fp4-4096"],
}


def form(config: Config) -> tuple[int | bool, ...]:
    """Return what a kernel's text depends on beside the layer's shape and the number of tokens."""
    c = config
    sizes = c.block_m, c.dispatch_parts, c.num_stages, c.wave_experts, c.combine_parts
    return *sizes, c.dispatchers, c.wide, c.widened


@cache
def layer_kernels(layer: str) -> tuple[Config, ...]:
    """Return the kernels of a layer of FORMS: one of each form, of one rank and of RANKS.

    Of the most ranks there is the one of a process of its own in each form, of fewer in the forms of the
    fewest and of the most tokens; and the one of all ranks together for the fewest.
    """
    arguments, tokens = FORMS[layer]

    def forms(ranks: int, numbers: Sequence[int] = tokens) -> list[Config]:
        configs = [config_for(number, ranks=ranks, **arguments) for number in numbers]
        return list({form(c): c for c in reversed(configs)}.values())

    one = config_for(tokens[0], **arguments)
    of_ranks = []
    for ranks, rank in RANKS.items():
        numbers = tokens if ranks == MOST_RANKS else (tokens[0], tokens[-1])
        of_ranks += [one_of(c, ranks, rank, timeout_s=60.0) for c in forms(ranks, numbers)]
        of_ranks += [replace(one, num_ranks=ranks, launch_ranks=ranks, ctas=one.ctas // ranks)]
    return *forms(1), *of_ranks


# Suffixes of suites that are proved of each fused kernel.
SMALL = {"": CONFIG, "-fp8": FP8, "-wide": WIDE, "-ahead": AHEAD, "-options": OPTIONS, "-widened": WIDENED}
LAYERS = {
    f"-{model}-{form}": config
    for model, configs in (("flash", FLASH), ("pro", PRO))
    for form, config in configs.items()
}
# Of one of eight ranks, a process each: with few rows a block, and with many and warps that dispatch.
OF_RANKS = {
    f"-flash-fp4-{tokens}-of-8": one_of(config_for(tokens, ranks=8, **FLASH_LAYER), 8, 3, timeout_s=60.0)
    for tokens in (64, 1024)
}
