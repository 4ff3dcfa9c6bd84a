"""Embedders in eight bits: the kernels against their references, whole models against their 16-bit selves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import triton_device
from headrace.errors import UnsupportedCheckpoint
from headrace.kernels.attention import triton as attention
from headrace.kernels.rounding import Bound, Format, Rounded, reference, values, within
from headrace.kernels.rounding import triton as rounding
from headrace.layers.attention import Attention
from headrace.layers.eight_bits import EightBitLinear, PlainNorm, RoundingNorm
from headrace.layers.linear import Linear
from headrace.layers.packed import AttentionBatch, PackedBatch
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


def test_results_with_one_scale() -> None:
    """Rounded as they are written: by a product with its activation, and by attention."""
    x = reference.rows(randn(70, 64, dtype=torch.float16, seed=0), "fp8")
    weight = reference.rows(randn(48, 64, dtype=torch.float16, seed=1), "fp8")
    bias, scale = randn(48, dtype=torch.float16, seed=2), weight.scale[:, 0].contiguous()
    bound = Bound.of(300.0, x.codes.device)
    for count in (70, 3):  # two ways
        part = Rounded(x.codes[:count], x.scale[:count])
        if not triton_device.ON_GPU and count > 64:
            continue  # the interpreter has no descriptors of FP8
        ours = rounding.linear(part, weight.codes, scale, bias, torch.float16, "gelu", "fp8", bound)
        theirs = reference.linear(part, weight.codes, scale, bias, torch.float16, "gelu", "fp8", bound)
        assert isinstance(ours, Rounded) and isinstance(theirs, Rounded)
        assert ours.scale.shape == (1, 1)
        if triton_device.ON_GPU:  # the interpreter's cast to FP8 goes wrong at times
            assert error(values(ours), values(theirs)) < 5e-2  # a few near ties of few numbers
            part = Rounded(part.codes, part.scale.clone())
            part.scale[1] = float("nan")
            bad = rounding.linear(part, weight.codes, scale, bias, torch.float16, "gelu", "fp8", bound)
            assert isinstance(bad, Rounded)
            assert (
                values(bad).isnan().any(1).nonzero().flatten().tolist() == [1]
                and values(bad)[1].isnan().all()
            )
        down = reference.rows(randn(32, 48, dtype=torch.float16, seed=3), "fp8")
        weights = down.codes, down.scale[:, 0].contiguous(), None, torch.float16
        assert error(rounding.linear(theirs, *weights), reference.linear(theirs, *weights)) < 1e-2


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("lengths", "dim"), [([17, 1, 43], 32), ([400, 200, 513] * 9, 64)])
def test_attention_that_rounds(lengths: list[int], dim: int, causal: bool) -> None:
    """Also where warps are specialized."""
    if sum(lengths) > 1000 and not triton_device.ON_GPU:
        pytest.skip("long texts are for GPUs")
    q, k, v = randn(sum(lengths), 3 * 4, dim, dtype=torch.float16, seed=0).split(4, 1)
    lens = torch.tensor(lengths, dtype=torch.int32, device=q.device)
    starts = torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
    batch = AttentionBatch(query_starts=starts, seq_lens=lens, causal=causal)
    bound = Bound.of(20.0, q.device)
    ours = attention.rounded_attention(q, k, v, batch, bound, scale=0.2)
    plain = attention.attention(q, k, v, batch, 0, scale=0.2).flatten(1)
    assert ours.codes.shape == plain.shape and torch.equal(ours.scale, bound.scale)
    if triton_device.ON_GPU:  # the interpreter's cast to FP8 goes wrong at times
        assert error(values(ours), values(within(plain, bound))) < 1e-2
        first, second = lengths[:2]
        v[first + second + 5, 1, 3], v[0, 0, 0] = float("nan"), float("inf")
        again = attention.rounded_attention(q, k, v, batch, bound, scale=0.2).codes.float()
        bad = again.isnan().any(1)
        assert bad[0] and not bad[first : first + second].any() and bad[first + second + 5]


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
        bounded = run(model)
        expected = run(one_by_one(build(name), format, mlp_only))
        forget_bounds(model)
        assert error(run(model), expected) < 1e-3, "where inputs are rounded must not matter"
        assert torch.equal(bounded, run(model)) == (not bounds(name, format, mlp_only))
        for found in (expected, bounded):
            cosine = torch.nn.functional.cosine_similarity(found, run(plain), dim=-1)
            assert cosine.min() > 0.97
            assert not torch.equal(found, run(plain))


def bounds(name: str, format: Format, mlp_only: bool) -> bool:
    """Whether any result has one scale for all rows."""
    values = not mlp_only and name != "buckets"  # attention with a bias does not round
    return format == "fp8" and (values or name in ("after", "buckets"))


def forget_bounds(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (Attention, EightBitLinear)):
            module.bound = None


@pytest.mark.parametrize("name", ["after", "before", "rms before", "qwen3"])
def test_no_number_is_beyond_its_bound(name: str) -> None:
    """Of any input: the norms' gains and biases are large here, and so are the inputs of the first norm."""
    model = build(name)
    generator = torch.Generator().manual_seed(6)
    for path, weight in model.named_parameters():
        if "norm" in path:
            weight.data.normal_(0.0, 3.0, generator=generator)
        elif path.startswith("layers."):
            weight.data.mul_(4.0)
    round_to_eight_bits(model, EightBits("fp8"))
    if isinstance(model, EncoderModel):
        model.finish()
    seen: list[tuple[float, float]] = []
    for module in list(model.modules()):
        if isinstance(module, Attention) and module.bound is not None:
            rows = slice(sum(module.qkv.parts[:2]), None)
            watch(module.qkv, rows, module.bound.limit, seen)
        if isinstance(module, EightBitLinear) and module.bound is not None:
            watch(module, slice(None), module.bound.limit, seen)
            module.rounds = False
    run(model)
    assert len(seen) == (6 if name == "after" else 2 if name == "before" else 3)
    for largest, limit in seen:
        assert largest <= limit
        assert largest > limit / 40, "a bound so far away would cost precision"


def watch(module: torch.nn.Module, rows: slice, limit: float, seen: list[tuple[float, float]]) -> None:
    """Note the largest number that these columns of a result hold, and what was said of it."""

    def note(_: torch.nn.Module, __: object, out: Tensor) -> None:
        seen.append((float(out[:, rows].abs().max()), limit))

    module.register_forward_hook(note)


@pytest.mark.parametrize(("format", "width"), [("fp8", 72), ("int8", 80)])
def test_odd_widths_are_refused(format: Format, width: int) -> None:
    shape = EncoderConfig(**{**SHAPE, "intermediate_size": width})
    with pytest.raises(UnsupportedCheckpoint, match=str(width)):
        round_to_eight_bits(EncoderModel(shape, dtype=torch.float32, device="cpu"), EightBits(format))
