"""HCA prefill: each query attends to its window and to all of its compressed entries, without a list.

Both are rows side by side, so that four numbers say which ones a query sees; it has as many rounds as its own
entries fill. The body, and the order of every sum, is `sparse_prefill`'s (`prefill_tile`): a query has
the bits that it has there with the list of the same rows.
Design and measurements: docs/attention.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import reference
from dsv4_kernels.attention.cache_layout import WINDOW
from dsv4_kernels.attention.prefill_tile import (
    BLOCK_HEADS,
    CHUNK,
    HEAD_DIM,
    PAIR,
    THREADS,
    make_attend_by,
)
from dsv4_kernels.contract import Contract, require_input, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.own_sync import own_sync

NAME = "hca_prefill"
HEADS = (64, 128)  # Flash and Pro
RATIO = 128  # tokens of an entry
RANGES = ("window_end", "window_length", "entry_start", "entry_length")
MAX_LENGTH = reference.MAX_POSITIONS // RATIO  # entries that a query sees
FAR = 1 << 22  # rows; what begins or ends farther away is outside of every pool
CONTRACT = Contract(
    (
        "0 <= m",
        "m <= MAX_TOKENS",
        "0 <= n",
        "n <= MAX_ROWS",
        "0 < num_heads",
        "num_heads % HEAD_GROUP == 0",
        "num_heads <= MAX_HEADS",
    ),
    consts={"MAX_TOKENS": 1 << 20, "MAX_ROWS": 1 << 21, "HEAD_GROUP": 8, "MAX_HEADS": 1 << 10},
)
WINDOW_END, WINDOW_LENGTH, ENTRY_START, ENTRY_LENGTH = range(len(RANGES))


@dataclass(frozen=True)
class Ranges:
    """What says which rows a query sees.

    Attributes:
        entry_length: tensor int32 [m].
        own: the query's numbers in the order of `RANGES`, int32 [4] in registers.
        offset: fragment int32 [64], overwritten.
    """

    entry_length: Any
    own: Any
    offset: Any


def rounds(ranges: Ranges, token: Any) -> Any:
    """Return how many pairs of chunks a query has: its window is one, and its entries begin with the next."""
    return 1 + T.ceildiv(T.max(T.min(ranges.entry_length[token], MAX_LENGTH), 0), PAIR)


@T.macro
def ask(ranges: Ranges, places: Any, token: Any, first: Any):
    """Fill `places` with those of 64 of a query's keys from `first` on; -1 where none is."""
    # Apart from the places: the compiler then leaves what it is added to and compared with as it is written,
    # and a place is one formula of the round, by which the proofs follow it from round to round.
    for i in T.Parallel(CHUNK):
        ranges.offset[i] = first + i - WINDOW  # from an entry's start, or from the window's end
    for i in T.Parallel(CHUNK):
        places[i] = T.if_then_else(
            ranges.offset[i] < 0,
            T.if_then_else(
                ranges.offset[i] + ranges.own[WINDOW_LENGTH] >= 0,
                ranges.offset[i] + ranges.own[WINDOW_END],
                -1,
            ),
            T.if_then_else(
                ranges.offset[i] < ranges.own[ENTRY_LENGTH],
                ranges.offset[i] + ranges.own[ENTRY_START],
                -1,
            ),
        )


def make_kernel(num_heads: int) -> Any:
    """Return the PrimFunc for `num_heads` heads; counts of queries and rows stay symbolic."""
    m, n = T.dynamic("m"), T.dynamic("n")
    attend, groups = make_attend_by(n, rounds, ask), -(-num_heads // BLOCK_HEADS)

    @T.prim_func
    def hca_prefill_kernel(
        q: T.Tensor[(m, num_heads, HEAD_DIM), T.bfloat16],
        window_end: T.Tensor[(m,), T.int32],
        window_length: T.Tensor[(m,), T.int32],
        entry_start: T.Tensor[(m,), T.int32],
        entry_length: T.Tensor[(m,), T.int32],
        kv: T.Tensor[(n, HEAD_DIM), T.bfloat16],
        sink: T.Tensor[(num_heads,), T.float32],
        out: T.Tensor[(m, num_heads, HEAD_DIM), T.bfloat16],
        lse: T.Tensor[(m, num_heads), T.float32],
    ):
        # A query's heads are neighbours in the grid: they take the same rows at the same time.
        with T.Kernel(m * groups, threads=THREADS) as block:
            token, bh = block // groups, block % groups  # pyright: ignore[reportOperatorIssue]
            out_tile = T.alloc_shared((BLOCK_HEADS, HEAD_DIM), T.bfloat16)
            own = T.alloc_local((len(RANGES),), T.int32)
            offset = T.alloc_fragment((CHUNK,), T.int32)
            # Sums of these fit, whatever the tensors hold, and rows are masked as they would be.
            own[WINDOW_END] = T.max(T.min(window_end[token], FAR), -FAR)
            own[WINDOW_LENGTH] = T.max(T.min(window_length[token], WINDOW), 0)
            own[ENTRY_START] = T.max(T.min(entry_start[token], FAR), -FAR)
            own[ENTRY_LENGTH] = entry_length[token]
            attend(q, Ranges(entry_length, own, offset), kv, sink, lse, token, bh, out_tile)
            # Not by TMA: of what a descriptor's store writes the proofs do not know that it is no length.
            for i, j in T.Parallel(BLOCK_HEADS, HEAD_DIM):
                out[token, bh * BLOCK_HEADS + i, j] = out_tile[i, j]

    return own_sync(hca_prefill_kernel)


def _empty_outputs(q: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


@operator(NAME, _empty_outputs)
def hca_prefill(
    q: torch.Tensor,
    window_end: torch.Tensor,
    window_length: torch.Tensor,
    entry_start: torch.Tensor,
    entry_length: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend each query to the rows of its window and to those of its entries; K and V are the same row.

    Logits are q . k / sqrt(512); weights are exp(logit) over the sum of all exp(logit) and exp(sink). A
    query's bits are those of `sparse_prefill` with the list of its rows: 128 places of the window, masked at
    their begin where it is shorter, then the entries.

    Args:
        q: [m, num_heads, 512] bf16, of any requests, num_heads a multiple of 8; m = 0 is allowed.
        window_end: [m] int32: the row behind the last one of the query's window.
        window_length: [m] int32: rows of the window, all before `window_end`; 128 at most count.
        entry_start: [m] int32: the first row of the query's entries.
        entry_length: [m] int32: its entries, of which 8192 at most count (2**20 tokens). Of a query at
            position p there are (p + 1) // 128.
        kv: [n, 512] bf16, windows and entries of all requests, each side by side; n = 0 is allowed. A row
            outside 0..n-1 is masked; a length below 0 is one of 0.
        sink: [num_heads] fp32, a logit without a value that joins the denominator; -inf: none.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        out: [m, num_heads, 512] bf16, not yet rotated back; zeros where nothing is attended.
        lse: [m, num_heads] fp32, natural, without the sink; +inf where nothing is attended.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    ranges = (window_end, window_length, entry_start, entry_length)
    require_tensor(NAME, "q", q, dtype=torch.bfloat16, ndim=3)
    require_tensor(NAME, "kv", kv, dtype=torch.bfloat16, ndim=2, device=q.device)
    (m, num_heads, _), n = q.shape, kv.shape[0]
    CONTRACT.check(NAME, m=m, n=n, num_heads=num_heads)
    require_shape(NAME, "q", q, (m, num_heads, HEAD_DIM))
    require_shape(NAME, "kv", kv, (n, HEAD_DIM))
    for name, tensor in zip(RANGES, ranges, strict=True):
        require_input(NAME, name, tensor, (m,), dtype=torch.int32, device=q.device)
    require_input(NAME, "sink", sink, (num_heads,), dtype=torch.float32, device=q.device)
    if runtime.uses_reference(q):
        return reference.range_attention(q, *ranges, kv, sink)
    out, lse = _empty_outputs(q)
    if m:
        runtime.launch(make_kernel, _variant(num_heads).kwargs, (q, *ranges, kv, sink, out, lse))
    return out, lse


def ranges_of(
    start: int, count: int, row: int, entry_row: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `hca_prefill` takes between q and kv, for tokens of a request that follow each other.

    Args:
        start: tokens of the request before these.
        count: of these.
        row: of the first of these; theirs are side by side, and those of the 127 tokens before end there.
        entry_row: of the request's first entry.
        device: of the tensors.

    Returns:
        window_end, window_length, entry_start, entry_length: [count] int32 each. Those of several requests
        are concatenated.
    """
    place = torch.arange(count, dtype=torch.int32, device=device)
    seen = place + start + 1
    return place + row + 1, seen.clamp(max=WINDOW), torch.full_like(place, entry_row), seen // RATIO


@cache
def _variant(num_heads: int) -> Variant:
    return Variant(f"h{num_heads}", {"num_heads": num_heads})


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Return the last tokens of a request, or queries of any ranges, of which one is empty.

    The pool of the former: 128 rows of the tokens before, these tokens', and all entries.
    """
    generator = torch.Generator(device).manual_seed(seed)
    m, n, num_heads, entries = dims["m"], dims["n"], dims["num_heads"], dims["entries"]

    def up_to(most: int) -> torch.Tensor:
        return torch.randint(0, most + 1, (m,), generator=generator, device=device, dtype=torch.int32)

    q = torch.randn((m, num_heads, HEAD_DIM), generator=generator, device=device)
    kv = torch.randn((n, HEAD_DIM), generator=generator, device=device)
    if dims["ragged"]:
        ranges = up_to(n + 5), up_to(WINDOW), up_to(n + 5), up_to(entries)
        if m > 1:
            ranges[1][m // 2] = ranges[3][m // 2] = 0
    else:
        ranges = ranges_of(entries * RATIO - m, m, WINDOW, WINDOW + m, device)
    sink = torch.randn(num_heads, generator=generator, device=device)
    return q.to(torch.bfloat16), *ranges, kv.to(torch.bfloat16), sink


def _case(case_id: str, m: int, num_heads: int, entries: int, n: int, *tags: str) -> Case:
    dims = {"m": m, "num_heads": num_heads, "entries": entries, "n": n, "ragged": int("bench" not in tags)}
    return Case(case_id, dims, tags or ("test",))


def _keys(dims: Mapping[str, int]) -> int:
    """Return how many keys all queries see together, of ragged ones at most."""
    m, entries = dims["m"], dims["entries"]
    if dims["ragged"]:
        return m * (WINDOW + entries)
    positions = range(entries * RATIO - m, entries * RATIO)
    return sum(min(p + 1, WINDOW) + (p + 1) // RATIO for p in positions)


_TOKENS = 4096
_CONTEXTS = ((512, "64k"), (1024, "128k"), (8192, "1m"))  # entries
SPEC = KernelSpec(
    name=NAME,
    fn=hca_prefill,
    reference=reference.range_attention,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(h) for h in HEADS),
    select=lambda dims: _variant(dims["num_heads"]),
    contract=CONTRACT,
    cases=(
        _case("empty", 0, 64, 5, 5),
        _case("one-row", 1, 64, 1, 3),
        _case("no-rows", 2, 64, 70, 0),
        _case("ragged", 3, 64, 200, 300, "test", "gpu"),
        _case("pro", 2, 128, 128, 129, "test", "gpu"),
        _case("shard", 2, 16, 130, 129, "test", "gpu"),
        *(
            _case(f"h{h}-4096-of-{name}", _TOKENS, h, entries, WINDOW + _TOKENS + entries, "gpu", "bench")
            for h in HEADS
            for entries, name in _CONTEXTS
        ),
    ),
    tolerance=reference.range_attention_tolerance,
    num_bytes=lambda d: (
        d["m"] * (d["num_heads"] * (HEAD_DIM * 4 + 4) + len(RANGES) * 4) + d["n"] * HEAD_DIM * 2
    ),
    num_flops=lambda d: d["num_heads"] * _keys(d) * HEAD_DIM * 4,
    peers=("listed", "flashmla"),
    row_invariant=False,  # queries come with their ranges: tests/kernels/test_hca_prefill.py
    shared_rows={"entry_length": 1},  # a round's number is the row's own
    source="DeepSeek-V4 report 2.3.2; FlashMLA's conventions for queries without a key",
    small={"m": 1, "n": 2000, "entries": 600, "num_heads": 64, "ragged": 1},
)
