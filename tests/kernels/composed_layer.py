"""V4's attention layer composed of this library's kernels, with paged caches: what the layer's tests run.

Projections and the inverse RoPE are the reference's. Several tokens of a request attend by `sparse_prefill`,
of HCA by `hca_prefill`, single tokens of any number of requests by `sparse_decode`.
"""

from dataclasses import dataclass, field

import torch

from dsv4_kernels.attention import layer_reference as layers
from dsv4_kernels.attention import reference as ops
from dsv4_kernels.attention.cache import cache_read, cache_write
from dsv4_kernels.attention.cache_layout import PAGE_ROWS, page_bytes
from dsv4_kernels.attention.compressor import compressor
from dsv4_kernels.attention.compressor_state import plan, state_rows, state_write
from dsv4_kernels.attention.hadamard_quant import hadamard_fp4
from dsv4_kernels.attention.hca_prefill import hca_prefill, ranges_of
from dsv4_kernels.attention.index_cache import FP4, index_cache_read
from dsv4_kernels.attention.index_cache import page_bytes as index_page_bytes
from dsv4_kernels.attention.index_key_write import index_key_write
from dsv4_kernels.attention.index_logits_fp4 import PART_PAGES, index_logits_fp4
from dsv4_kernels.attention.kv_entry import kv_entry
from dsv4_kernels.attention.q_norm_rope import q_norm_rope
from dsv4_kernels.attention.sparse_decode import sparse_decode
from dsv4_kernels.attention.sparse_prefill import sparse_prefill
from dsv4_kernels.attention.topk import topk

WINDOW = layers.WINDOW
STALE = 7  # bytes of caches before anything is written


def product(x, w):
    return (x.double() @ w.double()).to(torch.bfloat16)


def wide(x, w):
    return (x.double() @ w.double()).float()


@dataclass
class ComposedLayer:
    """Caches of `slots` requests of at most `blocks` compressed entries each; new states are nan."""

    layer: layers.Layer
    slots: int
    blocks: int
    topk: int = 512
    selected: dict = field(default_factory=dict)  # (slot, position) -> places

    def __post_init__(self):
        device, ratio = self.layer.wkv.device, self.layer.dims.ratio
        rows = PAGE_ROWS * PART_PAGES
        self.blocks = -(-self.blocks // rows) * rows
        pages = self.slots * self.blocks // PAGE_ROWS

        def bytes_(*shape):
            return torch.full(shape, STALE, dtype=torch.uint8, device=device)

        def states(width):
            shape = (self.slots, state_rows(ratio), width)
            return torch.full(shape, torch.nan, device=device), torch.full(shape, torch.nan, device=device)

        self.window = bytes_(self.slots * WINDOW // PAGE_ROWS, page_bytes(PAGE_ROWS))
        self.entries = bytes_(pages, page_bytes(PAGE_ROWS))
        self.index_keys = bytes_(pages, index_page_bytes(FP4))
        if self.layer.compressor:
            self.state = states(self.layer.compressor.wkv.shape[1])
        if self.layer.indexer:
            self.index_state = states(self.layer.indexer.compressor.wkv.shape[1])

    def append(self, x, slots, starts, lengths):
        """Run tokens of requests that follow each other in `x`; return attention's rows, before wo_a."""
        layer, table, device = self.layer, self.layer.table, x.device
        position = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]).to(
            device
        )
        slot = torch.cat([torch.full((n,), r) for r, n in zip(slots, lengths, strict=True)]).to(device)
        positions = position.int()
        qr = ops.rms_norm(product(x, layer.wq_a), layer.q_norm)
        q = product(qr, layer.wq_b).view(len(x), layer.dims.num_heads, ops.HEAD_DIM)
        q = q_norm_rope(q, positions, table)
        parts = kv_entry(product(x, layer.wkv), positions, layer.kv_norm, table)
        chosen = self._compressed(x, qr, positions, slot.int(), (starts, lengths, slots))
        is_decode = all(n == 1 for n in lengths)
        rows = None if is_decode else self._window_rows(parts, slots)
        # Of a long portion only the last 128 tokens stay.
        end = torch.tensor([s + n for s, n in zip(starts, lengths, strict=True)], device=device)
        last = end.repeat_interleave(torch.tensor(lengths, device=device))
        ring = torch.where(position >= last - WINDOW, slot * WINDOW + position % WINDOW, -1).int()
        cache_write(self.window, ring, *parts)
        if is_decode:
            out = self._decode(q, slot, position, chosen)
        else:
            out = self._prefill(q, rows, (slots, starts, lengths), chosen)
        return ops.rope(out, table[position], inverse=True)

    def _compressed(self, x, qr, positions, slot, requests):
        """Append to compressed caches; return [m, k] places among the request's entries, -1 where none."""
        layer, ratio = self.layer, self.layer.dims.ratio
        own = layer.compressor
        if own is None:
            return torch.full((len(x), 64), -1, dtype=torch.int32, device=x.device)
        starts, lengths, slots = requests
        blocks, places = (t.to(x.device) for t in plan(starts, lengths, slots, ratio))
        first = torch.where(blocks[:, 2] >= 0, blocks[:, 2] // ratio, -1)
        target = torch.where(first >= 0, blocks[:, 3] * self.blocks + first, -1).int()
        kv, score = wide(x, own.wkv), wide(x, own.wgate)
        if len(blocks):
            parts = compressor(
                kv, score, self.state[0], self.state[1], blocks, own.ape, own.norm, layer.table
            )
            cache_write(self.entries, target, *parts)
        state_write(self.state[0], self.state[1], places, kv, score)
        if layer.indexer is None:
            width = -(-max(int(positions.max() + 1) // ratio, 1) // PAGE_ROWS) * PAGE_ROWS
            entry = torch.arange(width, device=x.device).expand(len(x), -1)
            return torch.where(entry < ((positions + 1) // ratio)[:, None], entry, -1).int()
        own = layer.indexer.compressor
        kv, score = wide(x, own.wkv), wide(x, own.wgate)
        if len(blocks):
            rows = kv, score, *self.index_state, blocks, own.ape, own.norm
            index_key_write(self.index_keys, target, *rows, layer.table)
        state_write(self.index_state[0], self.index_state[1], places, kv, score)
        return self._select(layer.indexer, x, qr, positions, slot)

    def _select(self, indexer, x, qr, positions, slot):
        layer, heads = self.layer, self.layer.dims.index_heads
        q = product(qr, indexer.wq).view(len(x), heads, layers.INDEX_DIM)
        q, q_scale = hadamard_fp4(q, positions, layer.table)
        weights = (product(x, indexer.weights).double() * (layers.INDEX_DIM * heads) ** -0.5).float()
        pages = self.blocks // PAGE_ROWS
        table = (slot[:, None] * pages + torch.arange(pages, device=x.device)).int()
        lengths = (positions + 1) // layers.CSA_RATIO
        scores = index_logits_fp4(q, q_scale, weights, self.index_keys, table, lengths)
        chosen = topk(scores, lengths, self.topk)
        for row, (s, t) in enumerate(zip(slot.tolist(), positions.tolist(), strict=True)):
            self.selected[s, t] = chosen[row]
        return chosen

    def _decode(self, q, slot, position, chosen):
        place = position[:, None] - WINDOW + 1 + torch.arange(WINDOW, device=q.device)
        window = torch.where(place >= 0, slot[:, None] * WINDOW + place % WINDOW, -1).int()
        entry = torch.where(chosen >= 0, slot[:, None] * self.blocks + chosen, -1).int()
        full = torch.full_like(slot, WINDOW).int(), torch.full_like(slot, chosen.shape[1]).int()
        return sparse_decode(q, self.window, window, full[0], self.entries, entry, full[1], self.layer.sink)[
            0
        ]

    def _window_rows(self, parts, slots):
        """Return the rings of the slots as they are before these tokens, and the tokens' own rows."""
        ring = torch.cat([torch.arange(r * WINDOW, (r + 1) * WINDOW) for r in slots]).int()
        before = cache_read(self.window, ring.to(self.window.device)).view(len(slots), WINDOW, -1)
        count = len(parts[0])
        scratch = torch.zeros_like(self.window[:1]).repeat(-(-count // PAGE_ROWS), 1)
        places = torch.arange(count, dtype=torch.int32, device=scratch.device)
        return before, cache_read(cache_write(scratch, places, *parts), places)

    def _prefill(self, q, rows, requests, chosen):
        before, fresh = rows
        found, first = [], 0
        for i, (slot, start, n) in enumerate(zip(*requests, strict=True)):
            entry_count = (start + n) // self.layer.dims.ratio if self.layer.dims.ratio else 0
            places = torch.arange(entry_count, device=q.device, dtype=torch.int32) + slot * self.blocks
            own = before[i].roll(-(start % WINDOW), dims=0)
            keys = torch.cat((own, fresh[first : first + n], cache_read(self.entries, places)))
            rows_q = q[first : first + n].contiguous()
            if self.layer.dims.ratio == layers.HCA_RATIO:
                ranges = ranges_of(start, n, WINDOW, WINDOW + n, q.device)
                found.append(hca_prefill(rows_q, *ranges, keys, self.layer.sink)[0])
                first += n
                continue
            step = torch.arange(n, device=q.device)[:, None] + 1 + torch.arange(WINDOW, device=q.device)
            window = torch.where(step + start >= WINDOW, step, -1)
            part = chosen[first : first + n]
            idx = torch.cat((window, torch.where(part >= 0, part + WINDOW + n, -1)), dim=1).int()
            found.append(sparse_prefill(rows_q, idx.contiguous(), keys, self.layer.sink)[0])
            first += n
        return torch.cat(found)

    def cached(self, slot, length):
        """Return a request's caches after `length` tokens: window, entries, bytes of the indexer's keys."""
        device, ratio = self.window.device, self.layer.dims.ratio
        ring = torch.arange(max(length - WINDOW, 0), length, device=device) % WINDOW + slot * WINDOW
        count = length // ratio if ratio else 0
        entry = torch.arange(count, device=device, dtype=torch.int32) + slot * self.blocks
        codes, scale = index_cache_read(self.index_keys, entry)
        keys = torch.cat((codes, scale.view(torch.uint8)), dim=1)
        return cache_read(self.window, ring.int()), cache_read(self.entries, entry), keys
