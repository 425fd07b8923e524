"""Decode from a paged cache, alone and beside others: on the GPU, else the kernels' IR on the CPU."""

import click
import torch

import dsv4_kernels
from dsv4_kernels.attention.cache import cache_read, cache_write
from dsv4_kernels.attention.cache_layout import PAGE_ROWS, page_bytes
from dsv4_kernels.attention.kv_entry import kv_entry
from dsv4_kernels.attention.q_norm_rope import q_norm_rope
from dsv4_kernels.attention.reference import HEAD_DIM, rope_table
from dsv4_kernels.attention.sparse_decode import sparse_decode

WINDOW = 128
NUM_TOKENS = 100
THETA = 10000.0


def main() -> None:
    """Print how far decode is from exact attention to the same rows, and whether bits depend on the batch."""
    on_gpu = torch.cuda.is_available()
    device, backend = ("cuda", "auto") if on_gpu else ("cpu", "interpret")
    torch.manual_seed(0)
    m, num_heads, num_selected = (64, 64, 512) if on_gpu else (2, 8, 64)
    table = rope_table(NUM_TOKENS, THETA, False, device)
    tokens = torch.arange(NUM_TOKENS, dtype=torch.int32, device=device)
    kv = torch.randn(NUM_TOKENS, HEAD_DIM, device=device).to(torch.bfloat16)
    q = torch.randn(m, num_heads, HEAD_DIM, device=device).to(torch.bfloat16)
    norm = torch.ones(HEAD_DIM, dtype=torch.bfloat16, device=device)
    sink = torch.zeros(num_heads, device=device)
    num_pages = -(-NUM_TOKENS // PAGE_ROWS)
    cache = torch.zeros(num_pages, page_bytes(PAGE_ROWS), dtype=torch.uint8, device=device)
    window = torch.full((m, WINDOW), -1, dtype=torch.int32, device=device)
    window[:, :NUM_TOKENS] = tokens  # no compressed entries yet: the other list is masked
    selected = torch.full((m, num_selected), -1, dtype=torch.int32, device=device)
    lengths = torch.full((m,), WINDOW, dtype=torch.int32, device=device), torch.zeros_like(selected[:, 0])
    with dsv4_kernels.backend(backend):
        cache_write(cache, tokens, *kv_entry(kv, tokens, norm, table))
        q = q_norm_rope(q, torch.full((m,), NUM_TOKENS - 1, dtype=torch.int32, device=device), table)
        out, _ = sparse_decode(q, cache, window, lengths[0], cache, selected, lengths[1], sink)
        last = [t[-1:].clone() for t in (q, window, lengths[0], selected, lengths[1])]
        alone, _ = sparse_decode(last[0], cache, *last[1:3], cache, *last[3:], sink)
        rows = cache_read(cache, tokens).double()
    logits = torch.einsum("mhd,nd->mhn", q.double(), rows) * HEAD_DIM**-0.5
    weights = torch.cat((logits, sink.double().expand(m, num_heads)[..., None]), dim=-1).softmax(dim=-1)
    exact = weights[..., :-1] @ rows
    click.echo(f"{m} queries of {num_heads} heads, {NUM_TOKENS} tokens on {device} ({backend})")
    click.echo(f"against exact attention to the same rows: {float((out - exact).norm() / exact.norm()):.2e}")
    click.echo(f"a query alone has its bits: {torch.equal(alone, out[-1:])}")


if __name__ == "__main__":
    main()
