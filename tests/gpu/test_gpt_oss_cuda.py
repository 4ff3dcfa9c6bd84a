"""gpt-oss on a GPU, experts as the released checkpoints pack them: no worse than transformers' own in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpu.test_families_cuda import run, typical
from headrace.checkpoints.folder import FolderCheckpoint
from headrace.config.spec import EngineSpec
from headrace.engines.build import build
from headrace.models.loading import load_decoder
from headrace.quantization.containers import open_quantized
from headrace.quantization.registry import keeps_packed
from parity.decoders import random_prompts
from parity.test_gpt_oss import generated, reference_of, scored
from support.gpt_oss_folder import TINY_GPT_OSS, write_gpt_oss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# The released heads: 64 dimensions, eight query heads to a key head.
SIZES = {"head_dim": 64, "num_attention_heads": 16, "num_key_value_heads": 2, "hidden_size": 128}


@torch.inference_mode()
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "mxfp4"])
def test_logits(packed: bool, tmp_path: Path) -> None:
    tensors = write_gpt_oss(tmp_path, packed=packed, seed=5, **SIZES)
    reference = reference_of(tmp_path, tensors)
    prompts = random_prompts(TINY_GPT_OSS["vocab_size"], [33, 1, 12, 150])
    expected = torch.cat([reference(torch.tensor([ids])).logits[0] for ids in prompts])
    half = reference.to("cuda", torch.bfloat16)
    plain = torch.cat([half(torch.tensor([ids], device="cuda")).logits[0].float().cpu() for ids in prompts])
    allowed = 1.3 * typical(plain, expected) + 1e-3
    checkpoint = open_quantized(FolderCheckpoint(tmp_path))
    model = load_decoder(
        checkpoint.config, checkpoint, dtype=torch.bfloat16, device="cuda",
        keep_packed=packed and keeps_packed(checkpoint, torch.bfloat16, torch.device("cuda")),
    )  # fmt: skip
    for chunk in (256, 64, 7, 1):
        assert typical(run(model, prompts, chunk), expected) < allowed, f"chunks of {chunk}"


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "mxfp4"])
def test_an_engine_over_the_folder(packed: bool, eager: bool, tmp_path: Path) -> None:
    reference = reference_of(tmp_path, write_gpt_oss(tmp_path, packed=packed, seed=8, **SIZES))
    spec = EngineSpec(
        model=str(tmp_path), path=tmp_path, device="cuda", dtype="bfloat16", max_num_seqs=16, eager=eager,
        max_num_batched_tokens=256, kv_cache_bytes=64 << 20, max_model_len=512,
    )  # fmt: skip
    core, _ = build(spec)
    prompts = random_prompts(TINY_GPT_OSS["vocab_size"], [3, 170, 31, 300, 1, 25, 128, 129], seed=2)
    answers = generated(core, prompts, 40)
    found = torch.tensor([score for _, scores in answers for score in scores])
    exact = scored(reference, prompts, answers)
    half = scored(reference.to("cuda", torch.bfloat16), prompts, answers)
    assert (found - exact).abs().median() < 1.3 * (half - exact).abs().median() + 0.01
