"""``quality`` of a configuration: what `serve` asks of a kept measurement, and what counts as one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from headrace.checkpoints.folder import FolderCheckpoint
from headrace.config.spec import EngineSpec
from headrace.engines.quality import MIN_TOKENS, Measured, check_quality, load_measured, save_measured
from headrace.engines.quantize import quantize_checkpoint
from headrace.engines.verify import Limits, verify
from headrace.errors import ConfigError
from headrace.quantization.containers import open_quantized
from support.tiny_folder import GROUPED, write_llama

pytestmark = pytest.mark.usefixtures("home")
RNG = random.Random(0)
TEXTS = [[RNG.randrange(300) for _ in range(n)] for n in (40, 33, 7)]
ENOUGH = [[RNG.randrange(300) for _ in range(n)] for n in (260, MIN_TOKENS - 260)]
# The tiny model is random, so its distributions are harsher on rounding than any trained one's.
LOOSE = Limits(max_kl=0.5, min_top1=0.3, max_perplexity_ratio=2.0)


def test_quality_gate(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving asks for the measurement that verify kept."""
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    checkpoint = FolderCheckpoint(folder)
    spec = EngineSpec(model=str(folder), path=folder, quantization="fp8", dtype="float32", device="cpu")

    def gate(**changes: object) -> str | None:
        asked = msgspec.structs.replace(spec, **changes)
        changed = bool(asked.quantization)
        return check_quality(asked, checkpoint, torch.float32, torch.float32, changed=changed)

    assert gate() is None
    assert "nobody has measured" in (gate(quality="warn") or "")
    with pytest.raises(ConfigError, match="headrace verify"):
        gate(quality="refuse")
    report = verify(spec, lambda _: ENOUGH, limits=LOOSE)
    assert gate(quality="refuse", max_kl=report.mean_kl * 1.01) is None
    with pytest.raises(ConfigError, match="max_kl"):
        gate(quality="refuse", max_kl=report.mean_kl * 0.99)
    with pytest.raises(ConfigError, match="nobody has measured"):  # another set-up
        gate(quality="refuse", quantization="fp4")
    assert gate(quality="refuse", quantization="") is None
    spoilt = Measured(setup="", tokens=MIN_TOKENS, mean_kl=0.0, defects=("w: a block is missing",))
    save_measured(spec, checkpoint, torch.float32, torch.float32, spoilt)
    with pytest.raises(ConfigError, match="block is missing"):
        gate(quality="refuse")


def test_too_few_tokens_are_no_proof(folder: Path) -> None:
    """Told by verify, and by the server with what was measured, what is needed and what to run."""
    checkpoint = FolderCheckpoint(folder)
    spec = EngineSpec(model=str(folder), path=folder, quantization="fp8", dtype="float32", device="cpu")

    def gate(**changes: object) -> str | None:
        asked = msgspec.structs.replace(spec, **{"max_kl": LOOSE.max_kl, **changes})
        return check_quality(asked, checkpoint, torch.float32, torch.float32, changed=True)

    few = verify(spec, lambda _: [ENOUGH[0], ENOUGH[1][:-1]], limits=LOOSE)
    assert few.passed
    (note,) = few.notes
    assert f"measured on {MIN_TOKENS - 1} tokens, and quality takes at least {MIN_TOKENS}" in note
    told = gate(quality="warn") or ""
    assert f"it was measured on {MIN_TOKENS - 1} tokens, and quality takes at least {MIN_TOKENS}" in told
    assert f"run: headrace verify {folder} --device cpu --dtype float32 --quantization fp8" in told
    with pytest.raises(ConfigError, match=f"{MIN_TOKENS - 1} tokens.* {MIN_TOKENS} .*headrace verify"):
        gate(quality="refuse")
    assert gate() is None
    assert "and max_kl is" in (gate(quality="warn", max_kl=few.mean_kl * 1e-3) or "")  # worse than too few

    enough = verify(spec, lambda _: ENOUGH, limits=LOOSE)
    assert not enough.notes
    assert gate(quality="refuse") is None
    verify(spec, lambda _: TEXTS, limits=LOOSE)  # does not replace what counts
    assert gate(quality="refuse") is None
    kept = load_measured(spec, checkpoint, torch.float32, torch.float32)
    assert kept is not None
    assert (kept.tokens, kept.mean_kl) == (MIN_TOKENS, enough.mean_kl)


def test_a_quantized_checkpoint_is_no_proof_of_itself(folder: Path, tmp_path: Path) -> None:
    """Its weights dequantized agree with themselves: that says nothing of what they lost, and is not kept."""
    out = quantize_checkpoint(FolderCheckpoint(folder), "fp4", tmp_path / "q")
    spec = EngineSpec(model=str(out), path=out, dtype="float32", device="cpu")
    own = verify(spec, lambda _: TEXTS, limits=LOOSE)
    assert own.mean_kl < 1e-6
    assert "16-bit model with --reference" in own.notes[0]
    assert not (tmp_path / "home").exists()
    checkpoint = open_quantized(FolderCheckpoint(out))

    def gate() -> str | None:
        strict = msgspec.structs.replace(spec, quality="refuse", max_kl=LOOSE.max_kl)
        return check_quality(strict, checkpoint, torch.float32, torch.float32, changed=True)

    with pytest.raises(ConfigError, match="--reference"):
        gate()
    original = verify(
        spec, lambda _: ENOUGH, limits=LOOSE, reference=EngineSpec(model=str(folder), path=folder)
    )
    assert original.mean_kl > 1e-3
    assert not original.notes
    assert gate() is None


def test_a_result_that_cannot_be_kept_is_shown_all_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "file"))
    spec = EngineSpec(model=str(folder), path=folder, quantization="fp8", dtype="float32", device="cpu")
    assert verify(spec, lambda _: TEXTS, limits=LOOSE).tokens > 0
    assert "not kept" in caplog.text


def test_serving_refuses_before_it_loads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from headrace.engines import build, generate_build

    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    (folder / "tokenizer.json").unlink(missing_ok=True)
    spec = EngineSpec(model=str(folder), path=folder, quantization="fp8", dtype="float32", device="cpu")

    def loads(*_: object) -> None:
        raise RuntimeError("weights are read")

    monkeypatch.setattr(generate_build, "load_weights", loads)
    with pytest.raises(ConfigError, match="nobody has measured it here; run: headrace verify"):
        build.build(msgspec.structs.replace(spec, quality="refuse"))
    for quality in ("warn", "off"):
        caplog.clear()
        with pytest.raises(RuntimeError, match="weights are read"):
            build.build(msgspec.structs.replace(spec, quality=quality))
        assert ("nobody has measured" in caplog.text) == (quality == "warn")
        assert "models of this size" in caplog.text


def test_an_fp8_cache_is_refused_where_it_is_known_to_harm(tmp_path: Path) -> None:
    other = write_llama(tmp_path / "q", **GROUPED)
    config = json.loads((other / "config.json").read_text())
    config["architectures"] = ["Qwen2ForCausalLM"]
    (other / "config.json").write_text(json.dumps(config))
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Tensor] = load_file(other / "model.safetensors")
    for name in [n for n in tensors if "q_proj" in n or "k_proj" in n or "v_proj" in n]:
        tensors[name.replace("weight", "bias")] = torch.zeros(tensors[name].shape[0])
    save_file(tensors, other / "model.safetensors")
    for changes in ({"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "fp4"}, {"quantization": "fp8_kv"}):
        spec = EngineSpec(model=str(other), path=other, device="cpu", **changes)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="bias to q, k and v"):
            verify(spec, lambda _: TEXTS)
