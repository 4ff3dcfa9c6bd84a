"""gpt-oss from files, as they are released and in plain weights, equals transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from headrace.checkpoints.folder import FolderCheckpoint
from headrace.config.spec import EngineSpec
from headrace.engines.build import build
from headrace.engines.verify import verify
from headrace.models.loading import load_decoder
from headrace.quantization.containers import open_quantized
from headrace.quantization.experts import ScaledExperts
from headrace.types import Request, SamplingParams
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


def generated(core: Any, prompts: list[list[int]], count: int) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens of each prompt, ``count`` of them, and their log-probabilities."""
    sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, logprobs=1)
    core.add(Request(id=str(i), token_ids=tuple(ids), sampling=sampling) for i, ids in enumerate(prompts))
    found: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
    while core.has_work():
        for output in core.step():
            assert not output.error, output
            tokens, scores = found[int(output.request_id)]
            tokens.extend(output.token_ids)
            scores.extend(each.logprob for each in output.logprobs)
    return found


@torch.inference_mode()
def scored(
    reference: Any, prompts: list[list[int]], answers: list[tuple[list[int], list[float]]]
) -> torch.Tensor:
    """What transformers says of the same tokens, float32 on the CPU."""
    rows = []
    for ids, (tokens, _) in zip(prompts, answers):
        whole = torch.tensor([ids + tokens], device=reference.device)
        scores = reference(whole).logits[0, len(ids) - 1 : -1].float().log_softmax(-1)
        rows.append(scores.gather(1, whole[0, len(ids) :, None])[:, 0].cpu())
    return torch.cat(rows)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "mxfp4"])
def test_an_engine_over_the_folder(packed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As `headrace serve FOLDER` builds it: requests in company, cut into chunks, and decoded step by step."""
    reference = reference_of(tmp_path, write_gpt_oss(tmp_path, packed=packed, seed=8))
    spec = EngineSpec(
        model=str(tmp_path), path=tmp_path, device="cpu", dtype="float32", max_num_seqs=4,
        max_num_batched_tokens=40, kv_cache_bytes=4 << 20, max_model_len=300,
    )  # fmt: skip
    core, ready = build(spec)
    assert ready.engine == "moe"
    assert ("mxfp4 are dequantized" in caplog.text) == packed  # told, as CPUs have no kernel for them
    prompts = random_prompts(TINY_GPT_OSS["vocab_size"], [3, 70, 31, 12, 1, 25], seed=2)
    answers = generated(core, prompts, 20)
    found = torch.tensor([score for _, scores in answers for score in scores])
    torch.testing.assert_close(found, scored(reference, prompts, answers), rtol=2e-4, atol=2e-4)


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
    if packed:  # as they stay on a GPU
        kept = load_decoder(
            checkpoint.config, checkpoint, dtype=torch.float32, device="cpu", keep_packed=True
        )
        assert isinstance(kept.layers[0].mlp.experts.gate_up, ScaledExperts)
        assert max_difference(our_logits(kept, prompts, None), expected) < TOLERANCE


def plain_copy(folder: Path, tensors: dict[str, torch.Tensor], out: Path) -> Path:
    """The same model in 32 bits, decoded by transformers."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    state = reference_of(folder, tensors).state_dict()
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in state.items()}, out / "model.safetensors")
    return out


@pytest.mark.parametrize("defect", ["", "scale", "blocks"])
def test_verify_sees_defects_in_packed_experts(
    defect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    packed = tmp_path / "packed"
    tensors = write_gpt_oss(packed, packed=True, seed=4)
    plain = plain_copy(packed, tensors, tmp_path / "plain")
    if defect:
        name = f"model.layers.1.mlp.experts.gate_up_proj_{'scales' if defect == 'scale' else 'blocks'}"
        wrong = tensors[name].clone()
        if defect == "scale":
            wrong[2, 7, 1] += 2
        else:  # two rows of gates in each other's place
            wrong[3, [10, 14]] = wrong[3, [14, 10]]
        save_file({**tensors, name: wrong}, packed / "model.safetensors")
    prompts = random_prompts(TINY_GPT_OSS["vocab_size"], [50, 30], seed=1)
    report = verify(
        EngineSpec(model=str(packed), path=packed, device="cpu", dtype="float32"),
        lambda _: prompts,
        reference=EngineSpec(model=str(plain), path=plain, device="cpu", dtype="float32"),
    )
    assert bool(report.problems) == bool(defect), report.problems
    if defect:
        assert any("layers.1.mlp.experts.gate_up" in problem for problem in report.problems)
