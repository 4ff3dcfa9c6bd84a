"""Decode steps of quantized models: the fused chain against the reference, and FP8 caches in the kernels."""

from __future__ import annotations

import pytest
import test_graph_runner as graphs
import torch

from headrace.config.quantization import quantization_type
from headrace.kernels.attention import reference
from headrace.layers.linear import Linear
from headrace.layers.packed import AttentionBatch, LayerCache
from headrace.models.decoder import DecoderModel
from headrace.models.decoder_fast import reason_against
from headrace.models.loading import random_weights
from headrace.models.registry import read_config
from headrace.quantization.registry import load_time
from headrace.quantization.scaled import ScaledLinear
from headrace.quantization.tiled import can_tile, tile
from triton_device import DEVICE, DTYPES, ON_GPU, error

SHAPE = {**graphs.TINY, **graphs.CONFIGS["qwen3"], "hidden_size": 64, "intermediate_size": 96}


def build(scheme: str, *, head: bool = False) -> DecoderModel:
    """A quantized model; ``head``: with a head of its own, which is quantized, too."""
    config = read_config({**SHAPE, "tie_word_embeddings": not head})
    model = random_weights(config, dtype=torch.float32, device=DEVICE, seed=3)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 6
    # On a CPU int8 and int4 are other kernels: the portable ones are meant here.
    transform = load_time(quantization_type(scheme), torch.device("meta") if head else DEVICE)
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear) and (head or path != "head"):
            model.set_submodule(path, transform(path, module))
    for module in model.modules():
        if isinstance(module, ScaledLinear) and can_tile(module.held):
            module.held = tile(module.held)  # as on a GPU
    return model


@pytest.mark.parametrize("scheme", ["fp8", "fp8_mlp_only", "nvfp4", "mxfp4"])
def test_tokens_of_the_fused_chain(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(scheme)
    assert any(isinstance(module, ScaledLinear) for module in model.modules())
    assert reason_against(model) is None
    # FP8 activations round a value near a boundary either way, and one other token changes all that follow: two
    # tokens a request, the first of which the chain has no part in.
    rounds = "fp4" not in scheme
    work = (
        graphs.requests(30 if ON_GPU else 12, 2, False)
        if rounds
        else graphs.requests(4, 12 if ON_GPU else 4, False)
    )
    expected = graphs.drain(graphs.build_core(model, graphs=False), work)
    core = graphs.build_core(model, graphs=True)
    got = graphs.drain(core, work)
    assert {name: len(tokens) for name, tokens in expected.items()} == {n: len(t) for n, t in got.items()}
    pairs = [(a, b) for name in expected for a, b in zip(expected[name], got[name])][
        1 if rounds else 0 :: 1 + rounds
    ]
    assert sum(a == b for a, b in pairs) >= (0.8 * len(pairs) if rounds else len(pairs))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_tokens_with_a_quantized_head(scheme: str) -> None:
    """Integers convert a head that is not tied: it has no dense weight for the kernels of heads."""
    model = build(scheme, head=True)
    assert isinstance(model.head, ScaledLinear) and reason_against(model) is None
    work = graphs.requests(30 if ON_GPU else 5, 10 if ON_GPU else 3, False)
    expected = graphs.drain(graphs.build_core(model, graphs=False), work)
    assert graphs.drain(graphs.build_core(model, graphs=True), work) == expected


@pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter rounds to FP8 in another way")
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("takes", [[1, 1, 1], [40, 1, 17]])
def test_fp8_cache(takes: list[int], dtype: torch.dtype) -> None:
    from headrace.kernels.attention import triton as fast

    lens, tables = [300, 20, 17], [list(range(1, 20)), [20, 21], [22, 23]]

    def batch() -> AttentionBatch:
        generator = torch.Generator().manual_seed(5)
        cache = LayerCache(
            *(
                torch.randn(24, 16, 2, 64, generator=generator).to(torch.float8_e4m3fn).to(DEVICE)
                for _ in "kv"
            )
        )
        slots = [t[p // 16] * 16 + p % 16 for t, n, c in zip(tables, lens, takes) for p in range(n - c, n)]
        return AttentionBatch(
            query_starts=torch.tensor([0, *takes], device=DEVICE).cumsum(0).int(),
            seq_lens=torch.tensor(lens, dtype=torch.int32, device=DEVICE),
            block_tables=torch.tensor(
                [t + [0] * (19 - len(t)) for t in tables], dtype=torch.int32, device=DEVICE
            ),
            slots=torch.tensor(slots, device=DEVICE),
            caches=[cache],
            max_query_len=max(takes),
            max_seq_len=max(lens),
        )

    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(sum(takes), h, 64, generator=generator).to(DEVICE, dtype) for h in (4, 2, 2))
    k[0, 0, 0] = 1000.0  # saturates at 448
    a, b = batch(), batch()
    got = fast.attention(q, k, v, a, 0, scale=0.1)
    want = reference.attention(q, k, v, b, 0, scale=0.1)
    assert error(got, want) < 0.02
    for name in ("k", "v"):
        mine, other = (getattr(x.caches[0], name).view(torch.uint8) for x in (a, b))
        assert torch.equal(mine, other)
