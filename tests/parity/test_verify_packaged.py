"""Planted defects in the packaged real models: every one is found and named, and good set-ups have none."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from headrace.checkpoints.base import Checkpoint
from headrace.checkpoints.resolve import open_checkpoint
from headrace.config.quantization import quantization_type
from headrace.engines.audits import audits
from headrace.layers.eight_bits import EightBitLinear
from headrace.models.encode_eight_bits import EightBits
from headrace.models.encode_model import load_encode_model
from headrace.models.loading import load_decoder
from headrace.quantization.registry import load_time
from headrace.quantization.scaled import ScaledLinear
from headrace.quantization.schemes.fp4 import Fp4Weight
from headrace.quantization.schemes.fp8 import Fp8Weight

pytestmark = [pytest.mark.slow, pytest.mark.models]
CPU = torch.device("cpu")
KINDS = ("scale", "swapped", "missing")


def planted(codes: torch.Tensor, scale: torch.Tensor, kind: str, rng: random.Random) -> None:
    """One defect, in place: a scale off by half or twice, halves swapped, or a block of 64 columns missing."""
    raw, (rows, columns) = codes.view(torch.uint8), codes.shape
    row = rng.randrange(rows)
    if kind == "scale":
        flat = scale.view(torch.uint8) if scale.element_size() == 1 else scale
        at = row % flat.shape[0]
        flat[at] = flat[at] - 8 if scale.element_size() == 1 else flat[at] * rng.choice([0.5, 2.0])
    elif kind == "swapped":
        raw[row] = torch.cat((raw[row, columns // 2 :], raw[row, : columns // 2]))
    else:
        width = 64 * columns // codes.shape[1]
        start = rng.randrange(0, columns - width + 1, width)
        raw[row, start : start + width] = 0


def tensors(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, the module's own memory."""
    if isinstance(module, EightBitLinear):
        return module.codes, module.scale
    assert isinstance(module, ScaledLinear)
    weight = module.quantized
    if isinstance(weight, Fp8Weight):
        return weight.codes, weight.scale
    assert isinstance(weight, Fp4Weight)
    return weight.packed, weight.scale


def check(model: nn.Module, reference: nn.Module, number: int) -> None:
    assert [found.problem for found in audits(model, reference) if found.problem] == []
    rng = random.Random(number)
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, (EightBitLinear, ScaledLinear))]
    chosen = rng.sample(linears, number)
    for i, (_, linear) in enumerate(chosen):
        planted(*tensors(linear), KINDS[i % 3], rng)
    named = {found.name for found in audits(model, reference) if found.problem}
    assert named == {name.removeprefix("backbone.") for name, _ in chosen}


@pytest.mark.parametrize("scheme", ["fp8", "fp4", "mxfp4"])
def test_a_language_model(smollm2: Checkpoint, scheme: str) -> None:
    options = {"dtype": torch.float32, "device": "cpu"}
    reference = load_decoder(smollm2.config, smollm2, **options)
    transform = load_time(quantization_type(scheme), CPU)
    check(load_decoder(smollm2.config, smollm2, transform=transform, **options), reference, 45)


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_an_embedder(minilm_path: Path, form: str) -> None:
    checkpoint = open_checkpoint(minilm_path)
    options = {"dtype": torch.float32, "device": "cpu"}
    reference = load_encode_model(minilm_path, checkpoint, **options)
    how = EightBits(form)  # type: ignore[arg-type]
    check(load_encode_model(minilm_path, checkpoint, eight_bits=how, **options), reference, 18)
