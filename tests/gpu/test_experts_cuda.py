"""Models with experts in every type on a GPU: the numbers of the CPU's reference, and graphs equal to plain steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu.test_deterministic_cuda import SIZES, make_core, run
from headrace.config.quantization import TYPES, quantization_type
from headrace.layers.linear import Linear
from headrace.layers.packed import PackedBatch
from headrace.models.decoder import DecoderModel
from headrace.models.loading import random_weights
from headrace.models.registry import read_config
from headrace.quantization.experts import ScaledExperts
from headrace.quantization.registry import load_time
from headrace.quantization.scaled import ScaledLinear
from headrace.types import Request, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIG: dict[str, Any] = {
    **SIZES,
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_hidden_layers": 2,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 256,
    "tie_word_embeddings": False,
}
CUDA = torch.device("cuda")


def build(scheme: str, dtype: torch.dtype) -> DecoderModel:
    model = random_weights(read_config(CONFIG), dtype=dtype, device="cuda")
    generator = torch.Generator(device="cuda").manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
    if scheme:
        transform = load_time(quantization_type(scheme), CUDA)
        for path, module in list(model.named_modules()):
            if isinstance(module, Linear):
                model.set_submodule(path, transform(path, module))
    return model


def dense(model: DecoderModel) -> DecoderModel:
    """The same weights dequantized, in float32."""
    found = random_weights(read_config(CONFIG), dtype=torch.float32, device="cuda")
    own = {name: value.float() for name, value in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, ScaledLinear):
            own[f"{path}.weight"] = module.dequantize()
            if module.bias is not None:
                own[f"{path}.bias"] = module.bias.float()
    for name, value in found.named_parameters():
        value.data.copy_(own[name])
    return found


def logits(model: DecoderModel, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, SIZES["vocab_size"], (tokens,), generator=generator).tolist()
    return model.logits(model(PackedBatch.for_encoding([ids], device=CUDA, causal=True)))


@pytest.mark.parametrize("scheme", ["", *TYPES])
def test_numbers_of_the_dequantized_model(scheme: str) -> None:
    """Weights alone are the same numbers; FP8 activations cost what they cost, other experts chosen included."""
    model = build(scheme, torch.float32)
    experts = model.layers[1].mlp.experts.down
    assert isinstance(experts, ScaledExperts) == bool(scheme)
    plain = dense(model)
    allowed = 0.5 if "fp8" in scheme and quantization_type(scheme).activations else 2e-3
    for tokens in (1, 7, 100, 700):
        wanted = logits(plain, tokens)
        assert (logits(model, tokens) - wanted).norm() < allowed * wanted.norm(), tokens


@pytest.mark.parametrize("scheme", ["", "fp8", "fp4", "int8"])
def test_graphs(scheme: str) -> None:
    """Steps of a graph are those without. Fewer at a time take other tiles, which near ties may turn."""
    model = build(scheme, torch.bfloat16)
    requests = [
        Request(
            id=str(i),
            token_ids=tuple(range(5, 9 + 13 * i)),
            sampling=SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.0),
        )
        for i in range(20)
    ]
    plain = run(make_core(model, eager=True), requests)
    assert same(plain, run(make_core(model), requests)) == 1
    fewer = run(make_core(model, rows=3), requests)
    if scheme != "fp8":  # whose activations' rounding turns more: see the next test
        assert same(plain, fewer) >= 0.9
    assert same(run(make_core(model, eager=True, rows=3), requests), fewer) == 1


def same(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Share of equal tokens among the first two of each answer."""
    equal = [a == b for i in one for a, b in zip(one[i][0][:2], other[i][0][:2])]
    return sum(equal) / len(equal)


def test_company_costs_less_than_rounding() -> None:
    """FP8 activations near a boundary of two codes turn with a sum's order, and experts with them.

    What that changes is within what rounding to FP8 changes anyway.
    """
    model = build("fp8", torch.bfloat16)
    plain = dense(model)
    prompts = [list(range(5, 9 + 13 * i)) for i in range(20)]

    def ends(model: DecoderModel, prompts: list[list[int]]) -> torch.Tensor:
        found = model.logits(model(PackedBatch.for_encoding(prompts, device=CUDA, causal=True))).float()
        return found[torch.tensor([len(p) for p in prompts], device=CUDA).cumsum(0) - 1]

    alone = torch.cat([ends(model, [prompt]) for prompt in prompts])
    exact = torch.cat([ends(plain, [prompt]) for prompt in prompts])
    company, rounding = (ends(model, prompts) - alone).norm(), (alone - exact).norm()
    assert company < 0.8 * rounding
