"""What is proved of the fused kernel beside the properties of one CTA: `dsv4-verify --kernel megamoe`.

Suites: the order of tasks (`order`), the symmetric buffer (`buffer`), the barriers (`barriers`), and the
signals that are read off the compiled kernel: with FP4 weights (`protocol`), with FP8 weights for few rows
and for many (`protocol-fp8`, `protocol-wide`, `protocol-ahead`), with FP4 weights that are widened to a
ring (`protocol-widened`), with an FP8 shared expert beside FP4 ones and warps that dispatch
(`protocol-options`). The first three hold for every routing; those follow every interleaving of some
routings. What roles of a CTA do for each other holds for every routing again, of the compiled kernels of all
of these (`roles`, `roles-fp8`, `roles-wide`, `roles-ahead`, `roles-widened`, `roles-options`) and of each
kernel of a layer that `FLASH` and `PRO` name (`roles-flash-fp4-64`, ...); so does what CTAs do to each other
(`signals`, ...), which five of the verifier's properties of the same kernels rest on (`properties`, ...), and
six others as the verifier has them (`machine`, ...). What the plan's kernel puts where does, too (`plan`,
`plan-flash`, `plan-pro`, `plan-odd`); its properties, and those of the inputs' kernel, are `launch_proofs`'.
That the device IR of the small ones and of layers' own computes what their tile IR says, and dispatch copies
the plan's tokens, holds for all data (`refinement`, ..., `refinement-flash-fp4-64`, ...). That a row's bits
are a function of that row's data alone holds of the tile IR of the small ones (`invariance`, ...), and that
the function is the same one of all kernels that a layer with one format of weights may have, on one rank and
on several (`invariance-flash-fp4`, `-fp8`, `-shared`, `invariance-pro-fp4`, ...). docs/megamoe.md says how
they fit together.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import z3

import dsv4_kernels
from dsv4_kernels.gemm.folded_tile import BLOCK_K
from dsv4_kernels.tile import simplifier
from megamoe import (
    barrier,
    copied_proof,
    invariance_proof,
    launch_proofs,
    machine_proof,
    obligations,
    plan_kernel,
    properties_proof,
    protocol,
    refine_proof,
    roles_proof,
    schedule,
    signals_proof,
)
from megamoe.config import (
    CONSUMERS,
    DISPATCH_FIRST,
    DISPATCHERS,
    FINISH_FIRST,
    FINISHERS,
    PIECE_ROWS,
    ROWS_WARP,
    WARP,
    WEIGHTS_WARP,
    Config,
)
from megamoe.fused import make_kernel
from megamoe.happens_before import Role, analyse
from megamoe.instances import (
    AHEAD,
    CONFIG,
    FORMS,
    LAYERS,
    OF_RANKS,
    OPTIONS,
    SMALL,
    layer_kernels,
)
from megamoe.launch_proofs import plan_extracted
from megamoe.lowering import as_launched
from megamoe.plan import Plan, make_plan
from megamoe.protocol import ELECTED
from megamoe.routing import with_shared
from megamoe.schedule import Geometry, Kind
from megamoe.virtual import PASS_CONFIGS
from verify import frontend, ir
from verify.externs.signals import SYSTEM
from verify.extract import Extracted, extract, source_sha256, tile_function
from verify.host import read_host
from verify.interp.device.flags import ACQUIRE, RELEASE
from verify.properties import Claims
from verify.solve import Answer, Obligation
from verify.suites import Suite
from verify.verdict import Verdict

# Tiles of the models' shapes (dispatch parts, linear-1 and linear-2 tiles, experts), and a small one's.
GEOMETRIES = {
    "flash": Geometry(4, 16, 16, 32, 4, 1, 1),
    "pro": Geometry(4, 24, 28, 48, 4, 1, 1),
    "small": Geometry(1, 3, 5, 4, 1, 1, 1),
}
LOCAL = (32, 48)  # routed experts of a rank
CTAS = (1, 66, 132)  # of a rank: one, half of an H100's multiprocessors, all
BLOCKS = (16, 32, 96, 112, 128)  # rows a block
THREADS = (0, 1, 255)  # of the consumers: both that signal to a peer, and one that signals to none
# Of a CTA of the fused kernel: consumers; the warp that fetches weights, its first and its elected lane; that
# of rows, of which the first polls; finishers, one of each warp, of which the first signals.
ROLES = (
    Role(THREADS, CONSUMERS),
    Role((WEIGHTS_WARP, WEIGHTS_WARP + ELECTED), WARP),
    Role((ROWS_WARP, ROWS_WARP + ELECTED), WARP),
    Role((FINISH_FIRST, FINISH_FIRST + WARP), FINISHERS),
)
# With warps that dispatch, of which the first thread polls and signals.
DISPATCHER_ROLES = (*ROLES, Role((DISPATCH_FIRST, DISPATCH_FIRST + WARP), DISPATCHERS))
# With warps that widen, of which an elected thread asks for the codes.
WIDENER_ROLES = (
    *ROLES,
    Role((DISPATCH_FIRST, DISPATCH_FIRST + ELECTED, DISPATCH_FIRST + WARP), DISPATCHERS),
)
COMBINE_COLUMNS = 256  # channels of a linear-2 tile
EXPERT_BLOCKS = ((0, 0, 0), (1, 0, 2), (2, 2, 1))  # blocks of each expert
SEEDS = (0, 1)  # of random routings: without and with masked slots


# --------------------------------------------------------------------------- the compiled kernel
@cache
def _made(config: Config) -> Any:
    frontend.keep()  # all kernels are one function's
    return make_kernel(config)


@cache
def extracted(config: Config = CONFIG) -> Extracted:
    """Return the stages of a kernel, that of CONFIG."""
    with as_launched():
        return extract(_made(config), pass_configs=PASS_CONFIGS)


@cache
def tile_stage(config: Config) -> ir.Function:
    """Return `extracted(config).tile`, without what comes behind it."""
    with as_launched(), simplifier.lowering():
        return tile_function(_made(config))


@cache
def _boxes(config: Config) -> dict[str, protocol.Box]:
    kernel = extracted(config)
    return protocol.boxes(read_host(kernel.host, kernel.device, kernel.tile))


@cache
def _digest(config: Config = CONFIG, *, fused: bool = True, plan: bool = True) -> str:
    makers = [_made] * fused + [plan_kernel.make_kernel] * plan
    kernels = [make(config) for make in makers]
    with as_launched():
        return " ".join(source_sha256(kernel, pass_configs=PASS_CONFIGS) for kernel in kernels)


def plan(topk_idx: torch.Tensor, topk_weights: torch.Tensor, config: Config = CONFIG) -> Plan:
    """Return where the rows of a routing [ranks, tokens, topk] go."""
    return make_plan(
        topk_idx,
        topk_weights,
        geometry=config.geometry,
        block_m=config.block_m,
        pool_blocks=config.pool_blocks,
    )


def random_routing(seed: int) -> torch.Tensor:
    """Return experts of each rank's tokens; with some seeds a third or two of the slots are masked."""
    c = CONFIG
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(c.num_ranks, c.tokens, c.num_ranks * c.num_experts, generator=generator)
    idx = scores.topk(c.topk, dim=-1).indices.int()
    idx[torch.rand(idx.shape, generator=generator) < seed % 3 / 3] = -1
    return idx


def full_routing() -> torch.Tensor:
    """Return the routing that needs most blocks, all of rank 0: both rings come round."""
    pairs = [(0, 1)] * 14 + [(0, 2)] * 3 + [(1, 2)] * 3
    return torch.tensor(pairs, dtype=torch.int32).view(CONFIG.num_ranks, CONFIG.tokens, CONFIG.topk)


def ahead_routing() -> torch.Tensor:
    """Return a routing of AHEAD to all experts of rank 0, a block each: both rings come round."""
    pairs = [(0, 1)] * 8 + [(2, 3)] * 6 + [(4, 0)] * 4 + [(1, 4)] * 2
    return torch.tensor(pairs, dtype=torch.int32).view(AHEAD.num_ranks, AHEAD.tokens, AHEAD.topk)


def shared_routing() -> torch.Tensor:
    """Return a routing of OPTIONS: most go to both routed experts of rank 0, whose rings come round."""
    c = OPTIONS
    pairs = [(0, 1)] * 9 + [(0, -1)] + [(1, 0)] * 7 + [(2, 1), (1, 3), (-1, -1)]
    idx = torch.tensor(pairs, dtype=torch.int32).view(c.num_ranks, c.tokens, -1)
    return with_shared(idx, torch.ones(idx.shape), c.num_experts - 1)[0]


def rows_and_columns(width: int, rows: int, columns: int) -> Callable[[int], int]:
    """Return which tile of rows x columns an element of rows of `width` belongs to."""
    return lambda at: at // width // rows * (width // columns) + at % width // columns


def slots_of(config: Config) -> dict[str, Callable[[int], int]]:
    """Return, for each tensor whose accesses are followed, which slot an element belongs to."""
    c, part = config, config.part_rows

    return {
        "x_ring": rows_and_columns(c.hidden, part, c.hidden),
        "x_ring_scale": lambda at: (
            at // (c.block_m * (c.hidden // 128)) * c.dispatch_parts + at % c.block_m // part
        ),
        "h_ring": rows_and_columns(c.inter, c.block_m, 128),
        "h_ring_scale": lambda at: at // c.block_m,
        "wide_ring": lambda at: at // (PIECE_ROWS * BLOCK_K),
        "combine": rows_and_columns(c.hidden, 1, COMBINE_COLUMNS),
        **{name: lambda at: at for name in ("dispatched", "l1_done", "l2_done", "widened")},
    }


SLOTS = slots_of(CONFIG)


def roles_of(config: Config) -> tuple[Role, ...]:
    """Return the roles of a CTA's threads."""
    if config.widened:
        return WIDENER_ROLES
    return DISPATCHER_ROLES if config.dispatchers else ROLES


def traces(
    function: ir.Function, idx: torch.Tensor, config: Config = CONFIG
) -> dict[int, list[list[list[protocol.Event]]]]:
    """Return the traces of the threads of ROLES, role by role, of every block on a routing."""
    c, slots = config, slots_of(config)
    found = plan(idx, torch.ones(idx.shape), c)
    tensors = {
        "firsts": found.firsts,
        "block_expert": found.block_expert,
        "row_source": found.row_source,
        "row_target": found.row_target,
        "topk_idx": idx,
        "epochs": torch.zeros(c.num_ranks, 1),
    }
    flat = {name: tensor.int().flatten().tolist() for name, tensor in tensors.items()}
    return {
        block: [
            [protocol.trace(function, block, thread, flat, slots, _boxes(c)) for thread in role.threads]
            for role in roles_of(c)
        ]
        for block in range(c.num_ranks * c.ctas)
    }


def signalled(
    function: ir.Function, block: int, tensors: Mapping[str, Sequence[int]]
) -> tuple[list[tuple[Kind, int]], ...]:
    """Return the tasks, as (kind, word), that a CTA's consumers, dispatchers and finishers say are done."""
    words = {"dispatched": Kind.DISPATCH, "l1_done": Kind.LINEAR1, "l2_done": Kind.LINEAR2}
    return tuple(
        [
            (words[e.word[0]], e.word[1])
            for e in protocol.trace(function, block, thread, tensors, {})
            if e.kind == "add" and e.word[0] in words
        ]
        for thread in (0, DISPATCH_FIRST, FINISH_FIRST)
    )


def problems(function: ir.Function, idx: torch.Tensor, config: Config = CONFIG) -> list[str]:
    """Return what is wrong with the signals of a kernel on a routing."""
    counts = protocol.mbarriers(function)
    return [p.what for p in analyse(traces(function, idx, config), config.ctas, roles_of(config), counts)]


def unmet(function: ir.Function, config: Config = CONFIG) -> list[str]:
    """Return where a thread of the plan's kernel reads a routing before its rank has met the others.

    Every CTA tells each peer, waits for each, and reads what they wrote behind a barrier of its own.
    """
    c, wrong = config, []
    slots = {name: lambda at: at for name in ("topk_idx", "topk_weights")}
    epochs = [6 + 2 * rank for rank in range(c.launch_ranks)]
    threads = sorted({*range(c.num_ranks), *THREADS})  # all that signal to a peer, and one that does not
    for rank, expert, thread in product(range(c.launch_ranks), range(c.num_experts), threads):
        events = protocol.trace(function, (expert, rank), thread, {"epochs": epochs}, slots)
        number = c.first_rank + rank
        to, own = thread * c.signal_words + number, number * c.signal_words + thread
        next_epoch = epochs[rank] + 1
        meeting = [
            protocol.Event("store", ("signals", to), next_epoch, RELEASE, SYSTEM),
            protocol.Event("wait", ("signals", own), next_epoch, ACQUIRE, SYSTEM),
        ]
        place = f"thread {thread} of expert {expert}, rank {rank}"
        if [e for e in events if e.kind in ("store", "wait")] != (meeting if thread < c.num_ranks else []):
            wrong.append(f"{place}: does not meet the peer at system scope")
        kinds = [e.kind for e in events]
        behind = kinds[kinds.index("wait") :] if "wait" in kinds else kinds
        if "read" in kinds[: len(kinds) - len(behind)] or "sync" not in behind[: _first(behind, "read")]:
            wrong.append(f"{place}: reads a routing before its CTA has met the peers")
    return wrong


def _first(kinds: Sequence[str], kind: str) -> int:
    return kinds.index(kind) if kind in kinds else len(kinds)


@cache
def roles_claimed(config: Config) -> Mapping[str, Claims]:
    """Return what has to be proved of the roles of a CTA of a kernel."""
    kernel = extracted(config)
    copies = roles_proof.boxes(read_host(kernel.host, kernel.device, kernel.tile))
    return roles_proof.claims(kernel.device, copies, roles_proof.roles_of(config))


@cache
def signals_claimed(config: Config) -> Mapping[str, Claims]:
    """Return what has to be proved of the signals between CTAs of a kernel."""
    kernel = extracted(config)
    copies = roles_proof.boxes(read_host(kernel.host, kernel.device, kernel.tile))
    return signals_proof.claims(kernel.device, copies, config)


@cache
def properties_claimed(config: Config, roles: str, signals: str) -> Mapping[str, Claims]:
    """Return what has to be proved of the verifier's properties of a kernel; the suites are its own."""
    kernel = extracted(config)
    copies = roles_proof.boxes(read_host(kernel.host, kernel.device, kernel.tile))
    missing = properties_proof.missing_of(kernel.cuda_sha256, {"roles": roles, "signals": signals})
    return properties_proof.claims(kernel.device, copies, config, missing)


@cache
def machine_claimed(config: Config, properties: str) -> Mapping[str, Claims]:
    """Return what the verifier's own properties say of a kernel; the suite is its own."""
    return machine_proof.claims(extracted(config), config, properties)


# --------------------------------------------------------------------------- claims
def _of(*makers: Callable[[], Iterator[Obligation]]) -> Claims:
    return Claims(obligations=[o for make in makers for o in make()])


def _decided(facts: Mapping[str, Sequence[str]]) -> Claims:
    """Return claims that were decided without a solver: what was checked, and what is wrong with it."""
    answers = []
    for what, wrong in facts.items():
        verdict = Verdict.REFUTED if wrong else Verdict.PROVED
        goal = Obligation(what, None, (), z3.BoolVal(not wrong))
        answers.append(Answer(goal, verdict, "; ".join(wrong)))
    return Claims(answers=answers)


def _interleavings() -> Claims:
    facts = {}
    for ranks, barriers in barrier.ranks_and_rounds():
        found = barrier.explore(ranks, barriers)
        facts[f"{barriers} barriers of {ranks} ranks, {found.states} states"] = _wrong(found)
    for ctas in (1, 2, 3, 4):
        found = barrier.grid_interleavings(ctas, 4)
        facts[f"4 grid barriers of {ctas} CTAs, {found.states} states"] = _wrong(found)
    return _decided(facts)


def _wrong(found: barrier.Outcome) -> list[str]:
    return ["passed early"] * found.early + ["stuck"] * found.stuck


def _routings() -> dict[str, torch.Tensor]:
    routings = {f"routing of seed {seed}": random_routing(seed) for seed in SEEDS}
    return {**routings, **_most_blocks()}


def _most_blocks() -> dict[str, torch.Tensor]:
    return {"the routing that needs most blocks": full_routing()}


def _to_each_expert() -> dict[str, torch.Tensor]:
    return {"a routing to each expert of a rank": ahead_routing()}


def _with_shared() -> dict[str, torch.Tensor]:
    return {"a routing with a shared expert": shared_routing()}


_ROUTINGS = {
    "": _routings,
    "-fp8": _most_blocks,
    "-wide": _most_blocks,
    "-ahead": _to_each_expert,
    "-widened": _to_each_expert,
    "-options": _with_shared,
}


def signals_followed(form: str, device: ir.Function | None = None) -> Claims:
    """Return the claim that a small kernel's signals order its CTAs on some routings.

    Args:
        form: of SMALL.
        device: its device IR, if it is not the kernel as it is.
    """
    config, followed = SMALL[form], _ROUTINGS[form]()
    function = extracted(config).device if device is None else device
    claims = _decided({name: problems(function, idx, config) for name, idx in followed.items()})
    claims.assumptions.append(
        f"protocol: of {config.num_ranks} ranks of {config.ctas} CTAs and {len(followed)} routings, each in "
        "every interleaving; that other routings signal alike is not proved of the compiled kernel, only "
        "that its schedule admits them (suite `order`)"
    )
    threads = ", ".join(str(thread) for role in roles_of(config) for thread in role.threads)
    claims.assumptions.append(f"protocol: slots are followed for the threads {threads} of each CTA")
    return claims


def _tasks(config: Config) -> Claims:
    """Signals of every CTA come in the order, and on the words, that `schedule` says."""
    c, g = config, config.geometry
    facts: dict[str, list[str]] = {}
    most = -(-c.num_ranks * c.tokens // c.block_m)  # blocks of an expert
    for some in EXPERT_BLOCKS:
        blocks = tuple(min(count, most) for count in some)
        experts = [expert for expert, count in enumerate(blocks) for _ in range(count)]
        firsts = schedule.wave_firsts(g, blocks)
        of_dispatchers = firsts[2] if c.dispatchers else c.pool_blocks  # the first block that they dispatch
        flat = {
            "firsts": firsts * c.num_ranks,
            "block_expert": (experts + [0] * (c.pool_blocks - len(experts))) * c.num_ranks,
            "epochs": [0] * c.num_ranks,
        }
        wrong = facts.setdefault(f"experts with {blocks} blocks", [])
        for block in range(c.num_ranks * c.ctas):
            rank, cta = divmod(block, c.ctas)
            wanted: tuple[list[tuple[Kind, int]], ...] = [], [], []
            for task in schedule.tasks(g, firsts, cta, c.ctas):
                role = 2 if task.kind is not Kind.DISPATCH else int(task.block >= of_dispatchers)
                wanted[role].append((task.kind, rank * c.pool_blocks + task.block))
            if signalled(extracted(c).device, block, flat) != wanted:
                wrong.append(f"CTA {cta} of rank {rank} signals other tasks")
    return _decided(facts)


def meeting(config: Config = CONFIG, device: ir.Function | None = None) -> Claims:
    """Return the claim that a plan's kernel reads routings once its ranks have met.

    Args:
        config: of the kernel.
        device: its device IR, if it is not the kernel as it is.
    """
    wrong = unmet(plan_extracted(config).device if device is None else device, config)
    return _decided({"routings are read once the ranks have met": wrong})


def _suite(claims: Mapping[str, Callable[[], Claims]]) -> Suite:
    # All of the package: the claims are about functions that import each other.
    return Suite("megamoe", claims, tuple(Path(__file__).parent.glob("*.py")))


def _protocol(form: str, **more: Callable[[], Claims]) -> Suite:
    config = SMALL[form]
    claims = {"signals": partial(signals_followed, form), "tasks": partial(_tasks, config), **more}
    return replace(
        _suite(claims), compiled=partial(_digest, config), text=lambda: extracted(config).cuda_sha256
    )


def _claimed(
    config: Config, names: Sequence[str], claimed: Callable[[Config], Mapping[str, Claims]]
) -> Suite:
    claims = {name: lambda name=name: claimed(config)[name] for name in names}
    return replace(
        _suite(claims),
        compiled=partial(_digest, config, plan=False),
        text=lambda: extracted(config).cuda_sha256,
    )


@cache
def refinement_claimed(config: Config) -> Mapping[str, Claims]:
    """Return what has to be proved of a kernel's device IR beside its tile IR, and of what that copies."""
    kernel = extracted(config)
    return {**refine_proof.claims(kernel), **copied_proof.claims(kernel.tile, config)}


@cache
def invariance_claimed(config: Config) -> Mapping[str, Claims]:
    """Return what has to be proved of a kernel's values."""
    return invariance_proof.claims(extracted(config).tile, config)


def _one_signature(configs: Sequence[Config]) -> Claims:
    def named(c: Config) -> str:
        ranks = "" if c.num_ranks == 1 else f", {c.launch_ranks} of {c.num_ranks} ranks"
        return f"{c.tokens} tokens, blocks of {c.block_m}{ranks}"

    kernels = {named(c): (lambda c=c: (tile_stage(c), c)) for c in configs}
    if len(kernels) != len(configs):
        raise ValueError("two kernels of one name")
    return invariance_proof.one_signature(kernels)


@cache
def _parts_digest() -> str:
    """Return a hash over the files of the library that the fused kernel takes parts from."""
    library = Path(dsv4_kernels.__file__).parent
    found = hashlib.sha256()
    for path in sorted(path for part in ("gemm", "quant", "tile") for path in (library / part).glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def _layer_digest(layer: str) -> str:
    # What all kernels of a layer follow from, in place of the text of each: to make a hundred takes longer
    # than all other certificates. One of them tells the compiler.
    configs = layer_kernels(layer)
    told = hashlib.sha256(repr(configs).encode()).hexdigest()
    return f"{told} {_parts_digest()} {_digest(configs[0], plan=False)}"


_OF_FORMS = (
    ("roles", roles_proof.names, roles_claimed),
    ("signals", signals_proof.names, signals_claimed),
)
SUITES = {
    "order": _suite(
        {
            **{
                f"{what}-{name}": partial(_of, partial(make, geometry))
                for name, geometry in GEOMETRIES.items()
                for what, make in (
                    ("tasks", obligations.order),
                    ("waits", obligations.waits),
                    ("ahead", obligations.ahead),
                )
            },
            **{f"shares-{ctas}": partial(_of, partial(obligations.shares, ctas)) for ctas in CTAS},
            **{f"rings-{rows}": partial(_of, partial(obligations.ring_sizes, rows)) for rows in BLOCKS},
            **{f"numbers-{local}": partial(_of, partial(obligations.numbers, local)) for local in LOCAL},
            "steps": partial(_of, obligations.steps),
        }
    ),
    "buffer": _suite(
        {
            "regions": partial(_of, obligations.regions),
            "slots": partial(_of, obligations.slots),
            **{f"pool-{rows}": partial(_of, partial(obligations.pool, rows)) for rows in BLOCKS},
        }
    ),
    "barriers": _suite(
        {
            "grid-barrier": partial(_of, barrier.grid_barrier),
            "rank-barrier": partial(_of, barrier.rank_barrier),
            "interleavings": _interleavings,
        }
    ),
    "protocol": _protocol("", meeting=meeting),
    **{f"protocol{form}": _protocol(form) for form in _ROUTINGS if form},
    **{
        f"{what}{form}": _claimed(config, names(config), claimed)
        for what, names, claimed in _OF_FORMS
        for form, config in {**SMALL, **LAYERS}.items()
    },
    **{
        f"properties{form}": _claimed(
            config,
            properties_proof.CLAIMS,
            partial(properties_claimed, roles=f"roles{form}", signals=f"signals{form}"),
        )
        for form, config in {**SMALL, **LAYERS}.items()
    },
    **{
        f"machine{form}": _claimed(
            config, machine_proof.names(config), partial(machine_claimed, properties=f"properties{form}")
        )
        for form, config in {**SMALL, **LAYERS}.items()
    },
    **{
        f"refinement{form}": _claimed(
            config, (*refine_proof.CLAIMS, *copied_proof.CLAIMS), refinement_claimed
        )
        for form, config in {**SMALL, **LAYERS, **OF_RANKS}.items()
    },
    **{
        f"invariance{form}": _claimed(config, invariance_proof.CLAIMS, invariance_claimed)
        for form, config in SMALL.items()
    },
    **{
        f"invariance-{layer}": replace(
            _suite({"one-signature": lambda layer=layer: _one_signature(layer_kernels(layer))}),
            compiled=partial(_layer_digest, layer),
        )
        for layer in FORMS
    },
    **launch_proofs.suites(meeting),
}
