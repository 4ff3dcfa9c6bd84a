"""Checkpoints that `headrace quantize` writes, loaded and run by transformers (with the compressed-tensors library)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headrace.checkpoints.folder import FolderCheckpoint
from headrace.engines.quantize import quantize_checkpoint
from headrace.layers.packed import PackedBatch
from headrace.models.loading import load_decoder
from headrace.quantization.containers import open_quantized
from support.tiny_folder import write_llama

pytest.importorskip("compressed_tensors")
IDS = [3, 7, 200, 11, 45, 45, 99]


@pytest.mark.parametrize("name", ["fp8", "fp8_mlp_only", "fp8_block", "fp4", "mxfp4", "int8", "int4"])
def test_transformers_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    import transformers

    folder = write_llama(
        tmp_path / "llama",
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    out = quantize_checkpoint(FolderCheckpoint(folder), name, tmp_path / "q", shard_bytes=200_000)
    # The library unpacks FP4 into bfloat16 and multiplies with nothing else then.
    dtype = torch.bfloat16 if "fp4" in name else torch.float32
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=dtype).eval()
    with torch.no_grad():
        wanted = theirs(torch.tensor([IDS])).logits[0]
    checkpoint = open_quantized(FolderCheckpoint(out))
    ours = load_decoder(
        checkpoint.config, checkpoint, dtype=torch.float32, device="cpu", keep_packed="fp8" in name
    )
    got = ours.logits(ours(PackedBatch.for_encoding([IDS], causal=True)))
    error = float((got - wanted.float()).norm() / wanted.float().norm())
    # Rounded activations fall differently at near ties, and bfloat16 rounds.
    assert error < (0.03 if "fp" in name else 1e-4), error
