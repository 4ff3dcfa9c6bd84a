"""What fewer bits are known to cost is told before anything is loaded, and nothing is fetched to know it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.cli.main import main
from headrace.config.quantization import TYPES, known_harm
from headrace.config.spec import EngineSpec
from headrace.engines.plan import known_harms, known_refusals
from support.tiny_folder import write_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "llama")


def test_small_models(folder: Path) -> None:
    assert known_harms(EngineSpec(model=str(folder))) == []
    for name, kind in TYPES.items():
        (harm,) = known_harms(EngineSpec(model=str(folder), quantization=name))
        assert harm.startswith(name)
        assert ("nats" in harm) == (not kind.weights.startswith("int"))
        assert known_harm(name, layers=36, hidden=4096, encodes=False) is None


def test_encoders() -> None:
    for name, kind in TYPES.items():
        harm = known_harm(name, layers=24, hidden=1024, encodes=True)
        assert (harm is not None) == kind.weights.startswith("fp8")
    assert "0.994" in str(known_harm("fp8", layers=6, hidden=384, encodes=True))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kv_cache_dtype": "fp8"}, True),
        ({"kv_cache_dtype": "fp4"}, True),
        ({"quantization": "fp4_kv"}, True),
        ({"quantization": "fp8"}, False),
    ],
)
def test_caches_that_keys_with_a_bias_do_not_fit(folder: Path, settings: dict[str, str], told: bool) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    for model in (str(folder), "Qwen/Qwen2.5-7B-Instruct"):
        found = known_refusals(EngineSpec(model=model, **settings))  # type: ignore[arg-type]
        assert any("adds a bias" in sentence for sentence in found) == told
    for model in ("Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B"):
        assert known_refusals(EngineSpec(model=model, **settings)) == []  # type: ignore[arg-type]


def test_config_check_tells(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder.parent / "c.yaml"
    file.write_text(f"model_metadata:\n  headrace:\n    model: {folder}\n    quantization: fp8\n")
    assert main(["config", "check", str(file)]) == 0
    assert "changes the answers of models of this size" in capsys.readouterr().out
    assert main(["config", "check", "--strict", str(file)]) != 0
    capsys.readouterr()
    (folder / "config.json").write_text("{")
    assert main(["config", "check", str(file)]) == 0
    assert "the model cannot be read" in capsys.readouterr().out


def test_config_check_says_what_is_not_served(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder.parent / "c.yaml"
    file.write_text(f"model_metadata:\n  headrace:\n    model: {folder}\n    quantization: int4-g128\n")
    assert main(["config", "check", str(file)]) == 0
    told = capsys.readouterr().out
    assert "scales are for 128 columns" in told
    assert "does not serve it" in told
    assert main(["config", "check", "--strict", str(file)]) != 0
