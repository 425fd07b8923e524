"""PyTorch reference of V4's attention layer: window alone, CSA (m = 4) and HCA (m' = 128), with caches.

Tokens of one request are appended in any portions: all at once (prefill), in chunks, or one by one
(decode). Whole portions are computed by the report's formulas, single tokens by the state machine of
decode, so that the two check each other. Projections are bf16 products, rounded once.

Where sources leave a choice: the window has 128 places in prefill too (places before the first token are
masked), so the order of keys is that of decode for short prompts as well; state is reset for a new
request; the indexer has its Hadamard transform; equal scores go to the lower place.
"""

import math
from dataclasses import dataclass, field

import torch

from dsv4_kernels.attention import reference as ops

WINDOW = 128
CSA_RATIO, HCA_RATIO = 4, 128
INDEX_DIM = 128


@dataclass(frozen=True)
class Dims:
    """Sizes of a layer; `ratio` is 0 (window alone), 4 (CSA) or 128 (HCA)."""

    hidden: int
    num_heads: int
    q_rank: int
    num_groups: int
    group_rank: int
    ratio: int
    index_heads: int = 64
    index_topk: int = 512


@dataclass
class CompressorState:
    """Rows that wait for their block, fp32.

    With overlap, the first `ratio` rows are the block before and the others the block in progress;
    channels are series b (for the next block), then a. Scores of rows that are not there are -inf.
    """

    kv: torch.Tensor
    score: torch.Tensor

    @classmethod
    def new(cls, ratio: int, dim: int, has_overlap: bool, device: torch.device) -> "CompressorState":
        """Return the state of a request without tokens."""
        shape = ((1 + has_overlap) * ratio, (1 + has_overlap) * dim)
        return cls(torch.zeros(shape, device=device), torch.full(shape, -math.inf, device=device))


@dataclass(frozen=True)
class Compressor:
    """Weights of one compressor.

    Attributes:
        wkv, wgate: [hidden, dim] bf16, or [hidden, 2 * dim] with overlap.
        ape: fp32 [ratio, dim or 2 * dim], added to the scores by place in the block.
        norm: [dim] bf16.
    """

    wkv: torch.Tensor
    wgate: torch.Tensor
    ape: torch.Tensor
    norm: torch.Tensor
    ratio: int
    has_overlap: bool

    @property
    def dim(self) -> int:
        """Channels of an entry."""
        return self.norm.shape[0]

    def new_state(self) -> CompressorState:
        """Return the state of a request without tokens."""
        return CompressorState.new(self.ratio, self.dim, self.has_overlap, self.norm.device)

    def rows(self, x: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return fp32 values and biased scores of tokens `x` [s, hidden] from position `start`."""
        place = (start + torch.arange(x.shape[0], device=x.device)) % self.ratio
        kv = (x.double() @ self.wkv.double()).float()
        return kv, (x.double() @ self.wgate.double()).float() + self.ape[place]

    def append(self, x: torch.Tensor, start: int, state: CompressorState) -> torch.Tensor:
        """Return bf16 [blocks that end in these tokens, dim], before the norm; `state` moves on."""
        if x.shape[0] == 1:
            return self._append_one(*self.rows(x, start), start, state)
        m, pending = self.ratio, start % self.ratio
        kv, score = self.rows(x, start)
        lead = m if self.has_overlap else 0
        kv = torch.cat((state.kv[: lead + pending], kv))
        score = torch.cat((state.score[: lead + pending], score))
        blocks = (kv.shape[0] - lead) // m
        kept = blocks * m
        if self.has_overlap:
            kv_rows, score_rows = (self._overlapping(part[: lead + kept]) for part in (kv, score))
        else:
            kv_rows, score_rows = kv[:kept].view(-1, m, self.dim), score[:kept].view(-1, m, self.dim)
        entries = pool(kv_rows, score_rows)
        left = kv.shape[0] - kept
        state.kv[:left], state.score[:left] = kv[kept:].clone(), score[kept:].clone()
        state.kv[left:], state.score[left:] = 0, -math.inf
        return entries

    def _overlapping(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [blocks, 2 * ratio, dim] of rows [ratio + blocks * ratio, 2 * dim].

        Of each two blocks in a row: series b (the first channels) of the first, series a of the second.
        """
        m, c = self.ratio, self.dim
        before, current = rows[:-m].view(-1, m, 2 * c), rows[m:].view(-1, m, 2 * c)
        return torch.cat((before[..., :c], current[..., c:]), dim=1)

    def _append_one(
        self, kv: torch.Tensor, score: torch.Tensor, position: int, state: CompressorState
    ) -> torch.Tensor:
        m, c = self.ratio, self.dim
        row = position % m + (m if self.has_overlap else 0)
        state.kv[row], state.score[row] = kv[0], score[0]
        if (position + 1) % m:
            return kv.new_empty((0, c), dtype=torch.bfloat16)
        if not self.has_overlap:
            entry = pool(state.kv[None], state.score[None])
            state.kv.zero_()
            state.score.fill_(-math.inf)
            return entry
        both = [torch.cat((part[:m, :c], part[m:, c:]))[None] for part in (state.kv, state.score)]
        entry = pool(*both)
        state.kv[:m], state.score[:m] = state.kv[m:].clone(), state.score[m:].clone()
        state.kv[m:], state.score[m:] = 0, -math.inf
        return entry


def pool(kv: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """Return bf16 [blocks, c]: rows of kv [blocks, rows, c] weighted by each channel's softmax over rows."""
    return (torch.softmax(score.double(), dim=1) * kv.double()).sum(1).to(torch.bfloat16)


@dataclass(frozen=True)
class Indexer:
    """Weights of the lightning indexer: wq [q_rank, heads * 128], weights [hidden, heads], bf16."""

    wq: torch.Tensor
    weights: torch.Tensor
    compressor: Compressor


@dataclass(frozen=True)
class Layer:
    """Weights of a layer, bf16 but for the sink (fp32 [num_heads]).

    wq_a [hidden, q_rank], wq_b [q_rank, num_heads * 512], wkv [hidden, 512], q_norm, kv_norm;
    wo_a [num_groups, num_heads / num_groups * 512, group_rank], wo_b [num_groups * group_rank, hidden].
    """

    dims: Dims
    wq_a: torch.Tensor
    q_norm: torch.Tensor
    wq_b: torch.Tensor
    wkv: torch.Tensor
    kv_norm: torch.Tensor
    sink: torch.Tensor
    wo_a: torch.Tensor
    wo_b: torch.Tensor
    table: torch.Tensor  # of ops.rope_table
    compressor: Compressor | None = None
    indexer: Indexer | None = None


@dataclass
class Request:
    """Caches of one request; entries are bf16, as attention sees them.

    Attributes:
        length: tokens so far.
        window: [128, 512], slot = position mod 128.
        entries: [length // ratio, 512].
        index_keys: [length // 4, 128], CSA alone.
    """

    window: torch.Tensor
    entries: torch.Tensor
    index_keys: torch.Tensor
    length: int = 0
    state: CompressorState | None = None
    index_state: CompressorState | None = None
    selected: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def new(cls, layer: Layer) -> "Request":
        """Return a request without tokens."""
        like = layer.wkv
        return cls(
            like.new_zeros((WINDOW, ops.HEAD_DIM)),
            like.new_zeros((0, ops.HEAD_DIM)),
            like.new_zeros((0, INDEX_DIM)),
            state=layer.compressor.new_state() if layer.compressor else None,
            index_state=layer.indexer.compressor.new_state() if layer.indexer else None,
        )


def _product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x.double() @ w.double()).to(torch.bfloat16)


def _compress(
    compressor: Compressor, table: torch.Tensor, x: torch.Tensor, start: int, state: CompressorState
) -> torch.Tensor:
    """Return normed and rotated entries; a block's position is that of its first token."""
    entries = ops.rms_norm(compressor.append(x, start, state), compressor.norm)
    first = (start // compressor.ratio + torch.arange(len(entries), device=x.device)) * compressor.ratio
    return ops.rope(entries, table[first])


def index_scores(
    layer: Layer,
    indexer: Indexer,
    x: torch.Tensor,
    qr: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
) -> torch.Tensor:
    """Return fp32 [s, blocks]: sum over heads of w * relu(q . k), -inf where a block is not complete yet."""
    heads = indexer.weights.shape[-1]
    q = _product(qr, indexer.wq).view(-1, heads, INDEX_DIM)
    q = ops.quantized_fp4(ops.hadamard(ops.rope(q, layer.table[positions])))
    w = _product(x, indexer.weights).double() * INDEX_DIM**-0.5 * heads**-0.5
    scores = torch.einsum("sh,shn->sn", w, torch.einsum("shd,nd->shn", q.double(), keys.double()).relu())
    is_visible = torch.arange(keys.shape[0], device=x.device) < ((positions + 1) // CSA_RATIO)[:, None]
    return scores.float().masked_fill(~is_visible, -math.inf)


def append(layer: Layer, x: torch.Tensor, request: Request) -> torch.Tensor:
    """Run tokens `x` [s, hidden] bf16 that follow those in `request`; return bf16 [s, hidden]."""
    dims, start, s = layer.dims, request.length, x.shape[0]
    positions = start + torch.arange(s, device=x.device)
    cos_sin = layer.table[positions]
    qr = ops.rms_norm(_product(x, layer.wq_a), layer.q_norm)
    q = _product(qr, layer.wq_b).view(s, dims.num_heads, ops.HEAD_DIM)
    q = ops.rope(ops.rms_norm(q), cos_sin)
    fresh = ops.quantized_entry(ops.rope(ops.rms_norm(_product(x, layer.wkv), layer.kv_norm), cos_sin))

    selected = torch.empty((s, 0), dtype=torch.int32, device=x.device)
    if layer.compressor is not None and request.state is not None:
        entries = _compress(layer.compressor, layer.table, x, start, request.state)
        request.entries = torch.cat((request.entries, ops.quantized_entry(entries)))
        blocks = torch.arange(len(request.entries), dtype=torch.int32, device=x.device)
        selected = torch.where(blocks < ((positions + 1) // layer.compressor.ratio)[:, None], blocks, -1)
    if layer.indexer is not None and request.index_state is not None:
        keys = _compress(layer.indexer.compressor, layer.table, x, start, request.index_state)
        request.index_keys = torch.cat((request.index_keys, ops.quantized_fp4(ops.hadamard(keys))))
        scores = index_scores(layer, layer.indexer, x, qr, positions, request.index_keys)
        selected = ops.topk(scores, dims.index_topk)
        request.selected.append(selected)

    # Keys: the window as it was before these tokens (oldest first), these tokens, compressed entries.
    before = request.window.roll(-(start % WINDOW), dims=0)
    keys = torch.cat((before, fresh, request.entries))
    window = positions[:, None] - start + 1 + torch.arange(WINDOW, device=x.device)
    window = torch.where(window + start >= WINDOW, window, -1)  # places before the first token
    compressed = torch.where(selected >= 0, selected + WINDOW + s, -1)
    idx = torch.cat((window, compressed), dim=-1).to(torch.int32)
    out, _ = ops.sparse_attention(q, idx, keys, layer.sink)
    out = ops.rope(out, cos_sin, inverse=True)

    kept = min(s, WINDOW)
    request.window[(positions[-kept:]) % WINDOW] = fresh[-kept:]
    request.length += s
    grouped = out.view(s, dims.num_groups, -1)
    low = torch.einsum("sgi,gir->sgr", grouped.double(), layer.wo_a.double()).to(torch.bfloat16)
    return _product(low.flatten(1), layer.wo_b)


def random_layer(dims: Dims, seed: int, max_positions: int, device: torch.device | None = None) -> Layer:
    """Return a layer with random weights of about unit gain."""
    generator = torch.Generator(device or "cpu").manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device) * scale

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return normal(rows, columns, scale=rows**-0.5).to(torch.bfloat16)

    def norm(dim: int) -> torch.Tensor:
        return (1 + normal(dim, scale=0.1)).to(torch.bfloat16)

    def compressor(ratio: int, dim: int) -> Compressor:
        has_overlap = ratio == CSA_RATIO
        width = (1 + has_overlap) * dim
        kv, gate = matrix(dims.hidden, width), matrix(dims.hidden, width)
        return Compressor(kv, gate, normal(ratio, width), norm(dim), ratio, has_overlap)

    group_dim = dims.num_heads // dims.num_groups * ops.HEAD_DIM
    is_compressed, is_csa = dims.ratio > 0, dims.ratio == CSA_RATIO
    indexer = Indexer(
        matrix(dims.q_rank, dims.index_heads * INDEX_DIM),
        matrix(dims.hidden, dims.index_heads),
        compressor(CSA_RATIO, INDEX_DIM),
    )
    return Layer(
        dims,
        wq_a=matrix(dims.hidden, dims.q_rank),
        q_norm=norm(dims.q_rank),
        wq_b=matrix(dims.q_rank, dims.num_heads * ops.HEAD_DIM),
        wkv=matrix(dims.hidden, ops.HEAD_DIM),
        kv_norm=norm(ops.HEAD_DIM),
        sink=normal(dims.num_heads),
        wo_a=torch.stack([matrix(group_dim, dims.group_rank) for _ in range(dims.num_groups)]),
        wo_b=matrix(dims.num_groups * dims.group_rank, dims.hidden),
        table=ops.rope_table(max_positions, 160000.0 if is_compressed else 10000.0, is_compressed, device),
        compressor=compressor(dims.ratio, ops.HEAD_DIM) if is_compressed else None,
        indexer=indexer if is_csa else None,
    )
