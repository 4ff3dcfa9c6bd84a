"""gpt-oss from files, as they are released and in plain weights, equals transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from headrace.checkpoints.folder import FolderCheckpoint
from headrace.models.loading import load_decoder
from headrace.quantization.containers import open_quantized
from parity.decoders import Pair, max_difference, our_logits, random_prompts, reference_logits
from support.gpt_oss_folder import TINY_GPT_OSS, write_gpt_oss

TOLERANCE = 2e-4


def reference_of(folder: Path, tensors: dict[str, torch.Tensor]) -> hf.GptOssForCausalLM:
    """transformers' model with these tensors, packed ones decoded by transformers."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**config, attn_implementation="eager")).eval()
    plain = {name: value for name, value in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    for blocks in (name for name in tensors if name.endswith("_blocks")):
        base = blocks.removesuffix("_blocks")
        plain[base] = convert_moe_packed_tensors(
            tensors[blocks], tensors[f"{base}_scales"], dtype=torch.float32
        )
    model.load_state_dict(plain)
    return model


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "mxfp4"])
@pytest.mark.parametrize("large", [1.0, 4.0], ids=["", "clamped"])
def test_logits_equal_transformers(packed: bool, large: float, tmp_path: Path) -> None:
    tensors = write_gpt_oss(tmp_path, packed=packed, large=large, seed=3)
    reference = reference_of(tmp_path, tensors)
    met: list[float] = []
    gate = type(reference.model.layers[0].mlp.experts)._apply_gate
    for layer in reference.model.layers:
        experts = layer.mlp.experts
        experts._apply_gate = lambda x, e=experts: met.append(float(x.abs().max())) or gate(e, x)
    checkpoint = open_quantized(FolderCheckpoint(tmp_path))
    model = load_decoder(checkpoint.config, checkpoint, dtype=torch.float32, device="cpu")
    prompts = random_prompts(TINY_GPT_OSS["vocab_size"], [45, 1, 12, 33], seed=1)
    expected = reference_logits(Pair(reference, model), prompts)
    assert (max(met) > 7) or large == 1.0, "no gate met its limit"
    assert float(torch.cat(expected).std()) > 0.05
    for chunk in (None, 64, 7, 1):
        assert max_difference(our_logits(model, prompts, chunk), expected) < TOLERANCE, chunk
