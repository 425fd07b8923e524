"""State of the compressor: which rows make an entry, and rows kept for the tokens to come (report 3.5.1).

A request's state is a ring of an entry's rows, token t at row t modulo their number: nothing is shifted when
a block is complete, and nothing is cleared for a new request, as rows before its first token do not count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import compressor_reference
from dsv4_kernels.contract import Contract, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

NAME = "state_write"
VECTOR = 4  # floats a thread moves at once
OVERLAPPING = 4  # tokens of a block whose rows are of two series
LAST, FRESH, POSITION, SLOT = range(4)  # columns of `blocks`
NO_BLOCK = (-1, 0, -1, -1)


def state_rows(ratio: int) -> int:
    """Return the rows of a request's state: those of one entry; token t is row t modulo their number."""
    return 2 * ratio if ratio == OVERLAPPING else ratio


def plan(
    starts: Sequence[int], lengths: Sequence[int], slots: Sequence[int], ratio: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which blocks the tokens of several requests complete, and which rows stay for later.

    Args:
        starts: position of each request's first token in this call.
        lengths: tokens of each, which follow each other in `kv`.
        slots: place of each in the states.
        ratio: tokens of a block.

    Returns:
        blocks: [m, 4] int32 for `compressor`, requests in order, blocks ascending.
        places: [num_tokens] int32 for `state_write`, -1 for a token that no later block needs.
    """
    rows, first = state_rows(ratio), 0
    blocks, places = [torch.empty((0, 4), dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for start, length, slot in zip(starts, lengths, slots, strict=True):
        end = start + length
        position = torch.arange(start // ratio + 1, end // ratio + 1) * ratio - 1
        token = position - start
        columns = (first + token, (token + 1).clamp(max=rows), position, torch.full_like(position, slot))
        blocks.append(torch.stack(columns, dim=1))
        position = torch.arange(start, end)
        places.append(torch.where(position >= end - rows, slot * rows + position % rows, -1))
        first += length
    return torch.cat(blocks).to(torch.int32), torch.cat(places).to(torch.int32)


def decode_plan(
    positions: torch.Tensor, slots: torch.Tensor, ratio: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `plan` for a step of decode on the device of `positions`, without waiting for it.

    Args:
        positions: [b, s] int32, ascending by one in each request; s at most `ratio`, so that each completes
            at most one block.
        slots: [b] int32.
        ratio: tokens of a block.

    Returns:
        blocks: [b, 4] int32; of a request that completes none (-1, 0, -1, -1).
        places: [b * s] int32.
    """
    (b, s), rows = positions.shape, state_rows(ratio)
    is_last = (positions + 1) % ratio == 0
    token = is_last.int().argmax(dim=1)
    position = positions.gather(1, token[:, None])[:, 0]
    first = torch.arange(b, device=positions.device) * s
    blocks = torch.stack((first + token, token + 1, position, slots), dim=1)
    nothing = torch.tensor(NO_BLOCK, device=positions.device)
    blocks = torch.where(is_last.any(dim=1)[:, None], blocks, nothing)
    return blocks.to(torch.int32), (slots[:, None] * rows + positions % rows).flatten().to(torch.int32)


@dataclass(frozen=True)
class Config:
    """Threads of a block, which moves a token's row."""

    threads: int


CONTRACT = Contract(
    ("0 <= m", "m <= MAX_TOKENS", "0 < num_places", "num_places <= MAX_PLACES", "distinct(places)"),
    consts={"MAX_TOKENS": 2**31 - 256, "MAX_PLACES": 1 << 27},
    tensors=frozenset({"places"}),
)


def make_kernel(width: int, config: Config) -> Any:
    """Return the PrimFunc for rows of `width` channels; tokens and places stay symbolic."""
    m, num_places = T.dynamic("m"), T.dynamic("num_places")

    @T.prim_func
    def state_write_kernel(
        kv_state: T.Tensor[(num_places, width), T.float32],
        score_state: T.Tensor[(num_places, width), T.float32],
        places: T.Tensor[(m,), T.int32],
        kv: T.Tensor[(m, width), T.float32],
        score: T.Tensor[(m, width), T.float32],
    ):
        with T.Kernel(m, threads=config.threads) as token:
            for d in T.Parallel(width):
                kv_state[places[token], d] = kv[token, d]
            for d in T.Parallel(width):
                score_state[places[token], d] = score[token, d]

    return state_write_kernel


def state_write(
    kv_state: torch.Tensor,
    score_state: torch.Tensor,
    places: torch.Tensor,
    kv: torch.Tensor,
    score: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the rows that later blocks need, in place: after `compressor`, which reads the rows they replace.

    Args:
        kv_state: [num_slots, rows, width] fp32, of all requests; width 1024 (m = 4) or 512.
        score_state: likewise, scores before the bias.
        places: [num_tokens] int32, slot * rows + position modulo rows, see `plan`; one outside the state is
            skipped, the others are distinct (not checked: they stay on the device).
        kv: [num_tokens, width] fp32; num_tokens = 0 is allowed.
        score: as kv.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        Both states.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    _write(kv_state, score_state, places, kv, score)
    return kv_state, score_state


_STATES = ("kv_state", "score_state")


@operator(NAME, lambda kv_state, score_state, places, kv, score: None, writes=_STATES)
def _write(
    kv_state: torch.Tensor,
    score_state: torch.Tensor,
    places: torch.Tensor,
    kv: torch.Tensor,
    score: torch.Tensor,
) -> None:
    require_tensor(NAME, "kv_state", kv_state, dtype=torch.float32, ndim=3)
    require_tensor(NAME, "score_state", score_state, dtype=torch.float32, ndim=3, device=kv_state.device)
    require_tensor(NAME, "places", places, dtype=torch.int32, ndim=1, device=kv_state.device)
    require_tensor(NAME, "kv", kv, dtype=torch.float32, ndim=2, device=kv_state.device)
    require_tensor(NAME, "score", score, dtype=torch.float32, ndim=2, device=kv_state.device)
    (num_slots, rows, width), m = kv_state.shape, places.shape[0]
    CONTRACT.check(NAME, m=m, num_places=num_slots * rows)
    require_shape(NAME, "score_state", score_state, (num_slots, rows, width))
    require_shape(NAME, "kv", kv, (m, width))
    require_shape(NAME, "score", score, (m, width))
    if runtime.uses_reference(kv):
        states = compressor_reference.state_write(kv_state, score_state, places, kv, score)
        kv_state.copy_(states[0])
        score_state.copy_(states[1])
    elif m:
        flat = (kv_state.flatten(0, 1), score_state.flatten(0, 1))
        runtime.launch(make_kernel, _variant(width).kwargs, (*flat, places, kv, score))


@cache
def _variant(width: int) -> Variant:
    return Variant(f"w{width}", {"width": width, "config": Config(width // VECTOR)})


WIDTHS = (1024, 512, 256)  # channels: m = 4, m' = 128, the indexer's


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    m, num_places, width = dims["m"], dims["num_places"], dims["width"]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    chosen = torch.randperm(max(num_places, m), generator=generator, device=device)[:m]
    kind = torch.randint(0, 8, (m,), generator=generator, device=device)
    states = normal(1, num_places, width), normal(1, num_places, width)
    places = torch.where(kind == 0, -1 - chosen, chosen).to(torch.int32)
    return *states, places, normal(m, width), normal(m, width)


def _case(case_id: str, m: int, num_places: int, width: int, *tags: str) -> Case:
    return Case(case_id, {"m": m, "num_places": num_places, "width": width}, tags or ("test",))


SPEC = KernelSpec(
    name=NAME,
    fn=state_write,
    reference=compressor_reference.state_write,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(width) for width in WIDTHS),
    select=lambda dims: _variant(dims["width"]),
    contract=CONTRACT,
    cases=(
        _case("empty", 0, 8, 512),
        _case("one-row", 1, 8, 512),
        _case("beyond", 70, 64, 256),
        *(_case(f"m{m}-w{w}", m, 1 << 13, w, "gpu", "bench") for w in WIDTHS for m in (64, 4096)),
    ),
    num_bytes=lambda d: d["m"] * (4 * 4 * d["width"] + 4),
    row_invariant=False,
    batch_dims=(),  # its outputs are the states, which have no row for each token
    in_place=("kv_state", "score_state"),
    source="DeepSeek-V4 report 3.5.1; reference model's compressor",
    small={"m": 3, "num_places": 8},
)
