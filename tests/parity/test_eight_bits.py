"""Embedders in eight bits: the kernels against their references, whole models against their 16-bit selves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import triton_device
from headrace.errors import UnsupportedCheckpoint
from headrace.kernels.rounding import Format, Rounded, reference
from headrace.kernels.rounding import triton as rounding
from headrace.layers.eight_bits import EightBitLinear, PlainNorm, RoundingNorm
from headrace.layers.linear import Linear
from headrace.layers.packed import PackedBatch
from headrace.models.encode_eight_bits import EightBits, round_to_eight_bits, to_eight_bits
from headrace.models.encoder import EncoderConfig, EncoderModel
from headrace.models.loading import random_weights
from headrace.models.registry import read_config
from triton_device import error, randn

FORMATS: list[Format] = ["fp8", "int8"]


def same(ours: Rounded, theirs: Rounded) -> None:
    """Codes may differ by one step where rounding is a near tie."""
    assert error(ours.scale, theirs.scale) < 1e-3
    if (
        ours.codes.dtype is torch.int8 or triton_device.ON_GPU
    ):  # the interpreter's cast to FP8 goes wrong at times
        assert error(ours.codes.float() * ours.scale, theirs.codes.float() * theirs.scale) < 1e-2
    assert (ours.full is None) == (theirs.full is None)
    if ours.full is not None and theirs.full is not None:
        assert error(ours.full, theirs.full) < 1e-3


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("width", [96, 544])
def test_norms_that_round(width: int, format: Format) -> None:
    x, residual = (randn(3, width, dtype=torch.float16, seed=n, scale=2.0) for n in (0, 1))
    gain, bias = (randn(width, dtype=torch.float16, seed=n) for n in (2, 3))
    same(rounding.rows(x, format), reference.rows(x, format))
    for layer in (True, False):
        for given in (None, residual):
            for keep in (True, False) if given is not None else (False,):
                left, right = (None if given is None else given.clone() for _ in range(2))
                row = bias if layer else None
                options = {"layer": layer, "full": not keep, "keep": keep}
                ours = rounding.norm(x, left, gain, row, 1e-5, format, **options)
                same(ours, reference.norm(x, right, gain, row, 1e-5, format, **options))
                if keep and left is not None and right is not None:
                    assert torch.equal(left, right)


@pytest.mark.parametrize("format", FORMATS)
def test_activations_that_round(format: Format) -> None:
    x, bias = randn(3, 128, dtype=torch.float16, seed=0), randn(128, dtype=torch.float16, seed=1)
    for row in (None, bias):
        same(rounding.activate(x, row, "gelu", format), reference.activate(x, row, "gelu", format))
        same(rounding.gate(x, row, "silu", format), reference.gate(x, row, "silu", format))


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_stays_so(format: Format) -> None:
    """Integers have no NaN: it must not become a number."""
    x = randn(3, 64, dtype=torch.float16, seed=0)
    x[0, 7], x[2, 0] = float("nan"), float("inf")
    weight = reference.rows(randn(32, 64, dtype=torch.float16, seed=1), format)
    for run in (rounding, reference):
        found = run.rows(x, format)
        out = reference.linear(found, weight.codes, weight.scale[:, 0], None, torch.float32)
        assert out.isnan().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("format", FORMATS)
def test_product(format: Format, rows: int) -> None:
    if format == "fp8" and rows > 64 and not triton_device.ON_GPU:
        pytest.skip("PyTorch's own product is on GPUs")
    x = reference.rows(randn(rows, 64, dtype=torch.float16, seed=0), format)
    weight = reference.rows(randn(48, 64, dtype=torch.float16, seed=1), format)
    bias = randn(48, dtype=torch.bfloat16, seed=2)
    for row, name in ((None, None), (bias, None), (bias, "gelu")):
        expected = reference.linear(x, weight.codes, weight.scale[:, 0], row, torch.float32, name)
        ours = rounding.linear(x, weight.codes, weight.scale[:, 0].contiguous(), row, torch.bfloat16, name)
        assert error(ours, expected) < 1e-2


SHAPE = {
    "vocab_size": 97, "hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16,
    "intermediate_size": 96, "max_tokens": 90,
}  # fmt: skip
ENCODERS = {
    "after": EncoderConfig(**SHAPE, positions=90, token_types=2),
    "buckets": EncoderConfig(**SHAPE, distance_bias="buckets", num_buckets=32),
    "gated": EncoderConfig(**SHAPE, gated=True, activation="silu", positions=90),
    "before": EncoderConfig(
        **SHAPE, gated=True, pre_norm=True, first_norm=False, norm_bias=False, up_bias=False, positions=90
    ),
    "rms before": EncoderConfig(
        **SHAPE, gated=True, pre_norm=True, norm="rms", embedding_norm=False, positions=90
    ),
}
QWEN = {
    "architectures": ["Qwen3Model"], "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 90, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "silu",
    "tie_word_embeddings": True,
}  # fmt: skip


def build(name: str) -> torch.nn.Module:
    """Before it is finished, where it is an encoder."""
    if name == "qwen3":
        return random_weights(read_config(QWEN), dtype=torch.float32, device="cpu", seed=4)
    model = EncoderModel(ENCODERS[name], dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(5)
    for path, weight in model.named_parameters():
        gain = weight.dim() == 1 and path.endswith("weight")
        weight.data.normal_(1.0 if gain else 0.0, 0.1, generator=generator)
    return model


def run(model: torch.nn.Module) -> Tensor:
    ids = [[5 + i % 80 for i in range(n)] for n in (17, 1, 40)]
    return model(PackedBatch.for_encoding(ids))  # type: ignore[no-any-return]


def one_by_one(model: torch.nn.Module, format: Format, mlp_only: bool) -> torch.nn.Module:
    """Every linear in eight bits, each rounding its own input."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear) and path.startswith("layers.") and (".mlp." in path or not mlp_only):
            parent = model.get_submodule(path.rsplit(".", 1)[0])
            setattr(parent, path.rsplit(".", 1)[1], to_eight_bits(module, format))
    if isinstance(model, EncoderModel):
        model.finish()
    return model


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", [*ENCODERS, "qwen3"])
def test_models(name: str, format: Format) -> None:
    """Every linear is converted, and the result differs from 32 bits by rounding, not by more."""
    plain, small, part = build(name), build(name), build(name)
    round_to_eight_bits(small, EightBits(format))
    round_to_eight_bits(part, EightBits(format, mlp_only=True))
    for model in (plain, small, part):
        if isinstance(model, EncoderModel):
            model.finish()
    count = {id(m): sum(isinstance(x, EightBitLinear) for x in m.modules()) for m in (small, part)}
    assert list(count.values()) == [12, 6]
    rounding_norms = sum(isinstance(x, RoundingNorm) for x in small.modules())
    assert rounding_norms == {"after": 6, "buckets": 6, "gated": 6, "before": 5}.get(name, 6)
    assert sum(isinstance(x, PlainNorm) for x in small.modules()) == (
        0 if "before" in name or name == "qwen3" else 1
    )
    for model, mlp_only in ((small, False), (part, True)):
        expected = run(one_by_one(build(name), format, mlp_only))
        assert error(run(model), expected) < 1e-3, "where inputs are rounded must not matter"
        cosine = torch.nn.functional.cosine_similarity(expected, run(plain), dim=-1)
        assert cosine.min() > 0.97
        assert not torch.equal(expected, run(plain))


@pytest.mark.parametrize(("format", "width"), [("fp8", 72), ("int8", 80)])
def test_odd_widths_are_refused(format: Format, width: int) -> None:
    shape = EncoderConfig(**{**SHAPE, "intermediate_size": width})
    with pytest.raises(UnsupportedCheckpoint, match=str(width)):
        round_to_eight_bits(EncoderModel(shape, dtype=torch.float32, device="cpu"), EightBits(format))
