"""CPU kernels against their references, on random odd shapes."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from headrace.kernels.activation import cpu as activation_cpu
from headrace.kernels.activation import reference as activation_reference
from headrace.kernels.attention import cpu as attention_cpu
from headrace.kernels.attention import reference as attention_reference
from headrace.kernels.norm import cpu as norm_cpu
from headrace.kernels.norm import reference as norm_reference
from headrace.kernels.rotary import cpu as rotary_cpu
from headrace.kernels.rotary import reference as rotary_reference
from headrace.layers.packed import AttentionBatch, LayerCache

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
DTYPES = list(TOLERANCE)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[ours.dtype], atol=TOLERANCE[ours.dtype])


def make_batch(
    rng: random.Random, lens: list[tuple[int, int]], block: int, scattered: bool
) -> AttentionBatch:
    """(new tokens, all tokens) of each sequence, in a pool of scattered or consecutive blocks."""
    counts = [-(-total // block) for _, total in lens]
    ids = list(range(sum(counts) + 2))
    if scattered:
        rng.shuffle(ids)
    blocks = [[ids.pop(0) for _ in range(count)] for count in counts]
    width = max(counts)
    slots = [
        b[p // block] * block + p % block
        for b, (new, total) in zip(blocks, lens)
        for p in range(total - new, total)
    ]
    new = [n for n, _ in lens]
    return AttentionBatch(
        query_starts=torch.tensor([0, *new]).cumsum(0).int(),
        seq_lens=torch.tensor([total for _, total in lens], dtype=torch.int32),
        block_tables=torch.tensor([b + [0] * (width - len(b)) for b in blocks], dtype=torch.int32),
        slots=torch.tensor(slots),
        max_query_len=max(new),
        max_seq_len=max(total for _, total in lens),
        host_query_lens=new if rng.random() < 0.7 else None,
        host_seq_lens=[total for _, total in lens],
        host_blocks=blocks,
    )


LENGTHS = {
    "decode": [(1, 9), (1, 1), (1, 30), (1, 250), (1, 31), (1, 400)],
    "decode-one": [(1, 37)],
    "prefill": [(13, 13), (13, 13), (1, 1), (40, 40)],
    "between": [(5, 5), (1, 40), (5, 5), (5, 5), (1, 1), (1, 300), (1, 1)],
    "long": [(150, 150), (100, 333), (65, 65), (65, 65), (1, 70)],
    "chunks": [(7, 19), (1, 200), (5, 5), (3, 90), (1, 20)],
}


@pytest.mark.parametrize("lengths", list(LENGTHS))
@pytest.mark.parametrize("scattered", [False, True], ids=["consecutive", "scattered"])
@pytest.mark.parametrize("window", [None, 1, 11, 1000])
@pytest.mark.parametrize(("soft_cap", "sinks"), [(None, False), (2.0, False), (None, True), (2.0, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paged_attention(
    lengths: str,
    scattered: bool,
    window: int | None,
    soft_cap: float | None,
    sinks: bool,
    dtype: torch.dtype,
) -> None:
    rng = random.Random(f"{lengths}{scattered}{window}{soft_cap}")
    torch.manual_seed(rng.randrange(1000))
    kv_heads, group, dim = rng.choice([(1, 1, 8), (3, 3, 16), (2, 5, 24), (7, 1, 10)])
    block = rng.choice([1, 4, 16])
    batch = make_batch(rng, LENGTHS[lengths], block, scattered)
    assert batch.slots is not None
    tokens = batch.slots.shape[0]
    heads = kv_heads * (group + 2)
    qkv = torch.randn(tokens, heads, dim).to(dtype)
    q, k, v = qkv.split([kv_heads * group, kv_heads, kv_heads], dim=1)
    sink = 3 * torch.randn(q.shape[1]) if sinks else None
    results = []
    caches = fill_caches(batch, LENGTHS[lengths], block, kv_heads, dim, dtype)
    for implementation in (attention_cpu.attention, attention_reference.attention):
        batch.caches = [LayerCache(caches.k.clone(), caches.v.clone())]
        batch.plan = None
        results.append(
            implementation(q, k, v, batch, 0, scale=0.3, window=window, soft_cap=soft_cap, sinks=sink)
        )
        results.append(batch.caches[0].k.nan_to_num(7.0))
    assert results[0].is_contiguous()
    close(results[0], results[2])
    assert torch.equal(results[1], results[3])


def fill_caches(
    batch: AttentionBatch,
    lens: list[tuple[int, int]],
    block: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
) -> LayerCache:
    """Random keys of the past; NaN everywhere else."""
    assert batch.host_blocks is not None
    last = max(max(b) for b in batch.host_blocks)
    k, v = (torch.full((last + 3, block, kv_heads, dim), torch.nan, dtype=dtype) for _ in "kv")
    for blocks, (new, total) in zip(batch.host_blocks, lens):
        for position in range(total - new):
            for cache in (k, v):
                cache[blocks[position // block], position % block] = torch.randn(kv_heads, dim).to(dtype)
    return LayerCache(k, v)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3, 70])
@pytest.mark.parametrize("soft_cap", [None, 1.5])
def test_attention_without_a_cache(causal: bool, window: int | None, soft_cap: float | None) -> None:
    lens = [5, 5, 1, 17, 17, 17, 2, 64, 64, 130, 130]
    batch = AttentionBatch(
        query_starts=torch.tensor([0, *lens]).cumsum(0).int(),
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        causal=causal,
        max_query_len=130,
        max_seq_len=130,
    )
    torch.manual_seed(0)
    q, k, v = torch.randn(sum(lens), 15, 12).split([9, 3, 3], dim=1)
    ours, theirs = (
        module.attention(q, k, v, batch, 0, scale=0.5, window=window, soft_cap=soft_cap)
        for module in (attention_cpu, attention_reference)
    )
    close(ours, theirs)


def test_neighbours_do_not_change_a_result() -> None:
    """A sequence alone and among others differs by rounding only."""
    rng = random.Random(3)
    lens = [(1, rng.randrange(1, 300)) for _ in range(12)] + [(6, 20), (1, 50)]
    batch = make_batch(rng, lens, 4, scattered=True)
    torch.manual_seed(1)
    caches = fill_caches(batch, lens, 4, 2, 8, torch.float32)
    q, k, v = (torch.randn(sum(n for n, _ in lens), heads, 8) for heads in (6, 2, 2))
    batch.caches = [LayerCache(caches.k.clone(), caches.v.clone())]
    together = attention_cpu.attention(q, k, v, batch, 0, scale=0.3)
    assert batch.host_blocks is not None
    row = 0
    for i, (new, total) in enumerate(lens):
        alone = AttentionBatch(
            query_starts=torch.tensor([0, new], dtype=torch.int32),
            seq_lens=torch.tensor([total], dtype=torch.int32),
            block_tables=torch.tensor([batch.host_blocks[i]], dtype=torch.int32),
            slots=batch.slots[row : row + new],  # type: ignore[index]
            caches=[LayerCache(caches.k.clone(), caches.v.clone())],
        )
        rows = slice(row, row + new)
        close(attention_cpu.attention(q[rows], k[rows], v[rows], alone, 0, scale=0.3), together[rows])
        row += new


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 576), (5, 33), (3, 4, 7)])
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(shape).mul(3).to(dtype) for _ in range(2))
    for weight in (torch.randn(shape[-1]).to(dtype), torch.randn(shape[-1])):
        close(norm_cpu.rms_norm(x, weight, 1e-5), norm_reference.rms_norm(x, weight, 1e-5))
        ours = norm_cpu.add_rms_norm(x, residual.clone(), weight, 1e-5)
        theirs = norm_reference.add_rms_norm(x, residual.clone(), weight, 1e-5)
        close(ours[0], theirs[0])
        close(ours[1], theirs[1])
    weight, bias = torch.randn(2, shape[-1]).to(dtype)
    close(norm_cpu.layer_norm(x, weight, bias, 1e-5), norm_reference.layer_norm(x, weight, bias, 1e-5))
    close(norm_cpu.layer_norm(x, weight, None, 1e-5), norm_reference.layer_norm(x, weight, None, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "rotated"), [(8, 8), (12, 6), (64, 64)])
def test_rotary(dim: int, rotated: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    angles = torch.randn(5, rotated // 2)
    cos = torch.cat((angles.cos(), angles.cos()), -1)[:, None]
    sin = torch.cat((-angles.sin(), angles.sin()), -1)[:, None]
    heads = torch.randn(5, 9, dim).to(dtype)[:, :7]  # a view, like the fused projection
    weight = torch.randn(7, dim).to(dtype)
    close(rotary_cpu.rope(heads.clone(), cos, sin), rotary_reference.rope(heads, cos, sin))
    for angle in ((cos, sin), (None, None)):
        ours = rotary_cpu.qk_norm_rope(heads.clone(), weight, 1e-6, *angle)
        close(ours, rotary_reference.qk_norm_rope(heads, weight, 1e-6, *angle))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul", "gelu_tanh_mul"])
def test_gates(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2 * 21).mul(3).to(dtype)
    close(getattr(activation_cpu, name)(x.clone()), getattr(activation_reference, name)(x))


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_activations(name: str) -> None:
    x = torch.randn(3, 7)
    close(activation_cpu.activate(x.clone(), name), activation_reference.activate(x, name))


@pytest.mark.parametrize(("soft_cap", "sinks"), [(None, False), (3.0, False), (None, True)])
@pytest.mark.parametrize("window", [None, 40, 5000])
def test_long_prompts(window: int | None, soft_cap: float | None, sinks: bool) -> None:
    lens = [1100, 3]
    starts = torch.tensor([0, *lens]).cumsum(0).int()
    batch = AttentionBatch(
        starts, torch.tensor(lens, dtype=torch.int32), max_query_len=1100, max_seq_len=1100
    )
    torch.manual_seed(0)
    q, k, v = torch.randn(sum(lens), 4, 8).split([2, 1, 1], dim=1)
    sink = torch.tensor([2.0, -1.0]) if sinks else None
    ours, theirs = (
        module.attention(q, k, v, batch, 0, scale=0.5, window=window, soft_cap=soft_cap, sinks=sink)
        for module in (attention_cpu, attention_reference)
    )
    close(ours, theirs)


@pytest.mark.parametrize(("scattered", "window"), [(False, None), (True, None), (False, 900)])
def test_a_chunk_behind_many_keys(scattered: bool, window: int | None) -> None:
    rng, lens = random.Random(0), [(1, 5), (300, 2400)]
    batch = make_batch(rng, lens, 16, scattered)
    torch.manual_seed(0)
    q, k, v = torch.randn(301, 4, 8).split([2, 1, 1], dim=1)
    caches = fill_caches(batch, lens, 16, 1, 8, torch.float32)
    results = []
    for module in (attention_cpu, attention_reference):
        batch.caches, batch.plan = [LayerCache(caches.k.clone(), caches.v.clone())], None
        results.append(module.attention(q, k, v, batch, 0, scale=0.5, window=window))
    close(*results)
