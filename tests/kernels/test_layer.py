"""The whole attention layer of kernels: against the reference, in any portions, with any other requests."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_kernels.attention import compressor_reference, index_reference
from dsv4_kernels.attention import layer_reference as layers
from dsv4_kernels.attention import reference as ops
from tests.compare import bits
from tests.kernels.composed_layer import ComposedLayer, product

RATIOS = (0, 4, 128)


def make_layer(ratio, device="cpu", max_positions=700, **sizes):
    """Return a layer whose weights are small but for the sizes that kernels fix."""
    dims = {"hidden": 32, "num_heads": 64, "q_rank": 16, "num_groups": 8, "group_rank": 8, "index_heads": 8}
    layer = layers.Dims(**{**dims, **sizes}, ratio=ratio)
    return layers.random_layer(layer, 3, max_positions, torch.device(device))


def tokens(layer, count, seed=5):
    device = layer.wkv.device
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(count, layer.dims.hidden, generator=generator, device=device)
    return x.to(torch.bfloat16)


def run(layer, x, cuts=(), slot=1, slots=3):
    """Return the composed layer after one request in portions, and its rows."""
    composed = ComposedLayer(layer, slots, max(len(x) // 4, 1))
    ends = [0, *cuts, len(x)]
    out = [composed.append(x[a:b], [slot], [a], [b - a]) for a, b in itertools.pairwise(ends) if b > a]
    return composed, torch.cat(out)


def same(got, want):
    return all(torch.equal(bits(g), bits(w)) for g, w in zip(got, want, strict=True))


@pytest.fixture
def reference(monkeypatch):
    """Return the reference layer's caches and inputs of attention; softmax over blocks in fp32 steps."""
    monkeypatch.setattr(layers, "pool", compressor_reference.pool)

    def after(layer, x):
        request = layers.Request.new(layer)
        layers.append(layer, x, request)
        return request

    return after


def assert_is_layer(layer, x, composed, out, request, slot=1, rows=()):
    """Caches bit for bit; selection by the reference's scores; rows (all, or some) within the bound."""
    window, entries, keys = composed.cached(slot, len(x))
    kept = min(len(x), layers.WINDOW)
    place = torch.arange(len(x) - kept, len(x), device=x.device) % layers.WINDOW
    assert torch.equal(bits(window), bits(request.window[place]))
    assert torch.equal(bits(entries), bits(request.entries))
    positions = torch.arange(len(x), device=x.device)
    ratio, chosen = layer.dims.ratio, torch.empty((len(x), 0), dtype=torch.int32, device=x.device)
    if layer.indexer:
        seen = index_reference._fp4_rows(keys[:, :64], keys[:, 64:])
        assert torch.equal(seen, request.index_keys.double())
        chosen = torch.stack([composed.selected[slot, t] for t in range(len(x))])
        assert_selected(layer, x, positions, request.index_keys, chosen, composed.topk)
    elif ratio:
        entry = torch.arange(len(entries), device=x.device)
        chosen = torch.where(entry < ((positions + 1) // ratio)[:, None], entry, -1)
    table = layer.table[positions]
    qr = ops.rms_norm(product(x, layer.wq_a), layer.q_norm)
    q = ops.rope(ops.rms_norm(product(qr, layer.wq_b).view(len(x), -1, ops.HEAD_DIM)), table)
    own = ops.quantized_entry(ops.rope(ops.rms_norm(product(x, layer.wkv), layer.kv_norm), table))
    place = positions[:, None] - layers.WINDOW + 1 + torch.arange(layers.WINDOW, device=x.device)
    idx = torch.cat((place.clamp(min=-1), torch.where(chosen >= 0, chosen + len(x), -1)), dim=1).int()
    kv = torch.cat((own, request.entries))
    if len(rows):
        q, idx, table, out = (part[list(rows)] for part in (q, idx, table, out))
    want, lse = ops.sparse_attention(q, idx, kv, layer.sink)
    bound, _ = ops.sparse_attention_tolerance(want, lse, q, idx, kv, layer.sink)
    back = ops.rope(out, table).double()  # two more roundings of the 64 rotated dims, and a pair's sum
    error = (back - want.double()).abs()
    bound[..., -ops.ROPE_DIM :] += bound[..., -ops.ROPE_DIM :].unflatten(-1, (-1, 2)).sum(
        -1
    ).repeat_interleave(2, dim=-1) + 2 * 2.0**-8 * want.double()[..., -ops.ROPE_DIM :].unflatten(
        -1, (-1, 2)
    ).norm(dim=-1).repeat_interleave(2, dim=-1)
    assert (error <= bound).all()


def assert_selected(layer, x, positions, keys, chosen, k):
    """What is chosen scores as well as what is not, by the reference and within the bound of the scores."""
    qr = ops.rms_norm(product(x, layer.wq_a), layer.q_norm)
    want = layers.index_scores(layer, layer.indexer, x, qr, positions, keys)
    heads = layer.dims.index_heads
    q = product(qr, layer.indexer.wq).view(-1, heads, layers.INDEX_DIM)
    q = ops.quantized_fp4(ops.hadamard(ops.rope(q, layer.table[positions]))).double()
    w = product(x, layer.indexer.weights).double().abs() * (layers.INDEX_DIM * heads) ** -0.5
    spread = torch.einsum("sh,shd->sd", w, q.abs()) @ keys.double().abs().T
    bound = (4 * 33 * 2.0**-13 + (heads + 2) * 2.0**-23) * spread
    visible = (positions + 1) // layers.CSA_RATIO
    for t, places in enumerate(chosen):
        valid = places[places >= 0].long()
        count = int(visible[t])
        assert len(valid) == min(k, count)
        assert (valid[1:] > valid[:-1]).all()
        if len(valid) < count:
            is_chosen = torch.zeros(count, dtype=torch.bool, device=x.device)
            is_chosen[valid] = True
            best = (want[t, :count] - bound[t, :count])[~is_chosen].max()
            assert (want[t, :count] + bound[t, :count])[is_chosen].min() >= best


@pytest.mark.parametrize("ratio", RATIOS)
def test_layer_is_the_reference(ratio, reference):
    layer = make_layer(ratio)
    x = tokens(layer, 134)
    composed, out = run(layer, x, (1, 5, 127, 129))
    assert_is_layer(layer, x, composed, out, reference(layer, x), rows=(0, 1, 3, 4, 6, 126, 127, 128, 133))


@settings(max_examples=2)
@given(data=st.data())
def test_caches_do_not_depend_on_portions(data):
    layer = make_layer(data.draw(st.sampled_from(RATIOS)))
    count = data.draw(st.sampled_from((5, 128, 129)))
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=5)))
    x = tokens(layer, count, seed=data.draw(st.integers(0, 99)))
    whole, out = run(layer, x)
    parts, rows = run(layer, x, cuts)
    assert same(parts.cached(1, count), whole.cached(1, count))
    assert torch.equal(rows, out)


def test_token_by_token_is_prefill():
    layer = make_layer(4)
    x = tokens(layer, 14)
    whole, out = run(layer, x)
    steps, rows = run(layer, x, range(1, 14))
    assert same(steps.cached(1, 14), whole.cached(1, 14))
    assert torch.equal(rows, out)


def test_requests_of_one_call_do_not_meet():
    layer = make_layer(4)
    counts, starts = (9, 1, 6), [0, 0, 0]
    x = tokens(layer, sum(counts))
    together = ComposedLayer(layer, 3, 64)
    out = together.append(x, [2, 0, 1], starts, counts)
    for slot, part, rows in zip((2, 0, 1), x.split(counts), out.split(counts), strict=True):
        alone, want = run(layer, part, slot=slot)
        assert torch.equal(rows, want)
        assert same(together.cached(slot, len(part)), alone.cached(slot, len(part)))


@pytest.mark.interpret
@pytest.mark.slow
def test_interpreted_kernels_are_the_layer(reference):
    """Three tokens at once, then two one by one: the first entry is complete in between."""
    layer = make_layer(4)
    x = tokens(layer, 5)
    composed, out = run(layer, x, (3, 4))
    assert_is_layer(layer, x, composed, out, reference(layer, x))


@pytest.mark.interpret
@pytest.mark.slow
def test_interpreted_caches_do_not_depend_on_portions(monkeypatch):
    """Of the kernels that fill caches; attention, which only reads them, is left out."""

    def nothing(self, q, *_):
        return torch.zeros_like(q)

    monkeypatch.setattr(ComposedLayer, "_prefill", nothing)
    monkeypatch.setattr(ComposedLayer, "_decode", nothing)
    monkeypatch.setattr(ComposedLayer, "_select", lambda self, *_: None)
    layer = make_layer(128, num_heads=8)
    x = tokens(layer, 129)
    whole, _ = run(layer, x)
    parts, _ = run(layer, x, (1, 127, 128))
    assert len(whole.cached(1, 129)[1]) == 1
    assert same(parts.cached(1, 129), whole.cached(1, 129))


FLASH = {"hidden": 4096, "q_rank": 1024, "group_rank": 1024, "index_heads": 64}
LONG = 2300  # tokens: more blocks than are selected


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", RATIOS)
def test_gpu_layer_at_the_sizes_of_flash(ratio, reference):
    layer = make_layer(ratio, "cuda", 4096, **FLASH)
    x = tokens(layer, LONG)
    whole, out = run(layer, x)
    assert_is_layer(layer, x, whole, out, reference(layer, x))
    chunks, rows = run(layer, x, (1, 5, 130, 131, 1000, 2048))
    assert same(chunks.cached(1, LONG), whole.cached(1, LONG))
    is_chunk = torch.ones(LONG, dtype=torch.bool)
    is_chunk[[0, 130]] = False  # single tokens are decode: another kernel, within the bound
    assert torch.equal(bits(rows[is_chunk]), bits(out[is_chunk]))
    assert_is_layer(layer, x, chunks, rows, reference(layer, x))


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", RATIOS)
def test_gpu_token_by_token_and_beside_others(ratio, reference):
    layer = make_layer(ratio, "cuda", 4096, **FLASH)
    x = tokens(layer, 300)
    whole, _ = run(layer, x)
    steps, rows = run(layer, x, range(1, 300))
    assert same(steps.cached(1, 300), whole.cached(1, 300))
    assert_is_layer(layer, x, steps, rows, reference(layer, x))
    # The same tokens, each step beside two other requests that are further on.
    others = tokens(layer, 700, seed=8)
    composed = ComposedLayer(layer, 3, 256)
    composed.append(others[:400], [0, 2], [0, 0], [150, 250])
    beside = []
    for t in range(140):
        step = torch.cat((others[400 + t][None], x[t][None], others[550 + t][None]))
        beside.append(composed.append(step, [0, 1, 2], [150 + t, t, 250 + t], [1, 1, 1])[1])
    assert torch.equal(bits(torch.stack(beside)), bits(rows[:140]))
