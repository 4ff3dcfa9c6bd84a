"""Causal embedders in fewer bits: vectors stay near; other encoders and caches are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace.checkpoints.folder import FolderCheckpoint
from headrace.config.quantization import quantization_type
from headrace.config.spec import EngineSpec
from headrace.engines.encode_build import build_encode
from headrace.errors import ConfigError, UnsupportedCheckpoint
from headrace.layers.eight_bits import EightBitLinear
from headrace.layers.packed import PackedBatch
from headrace.models.encode_backbone import load_backbone
from headrace.quantization.registry import load_time
from headrace.quantization.scaled import ScaledLinear
from support.tiny_folder import write_llama

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_llama(
        tmp_path_factory.mktemp("m") / "e", hidden_size=64, intermediate_size=128, num_attention_heads=4
    )
    config = json.loads((path / "config.json").read_text())
    config["architectures"] = ["LlamaModel"]
    (path / "config.json").write_text(json.dumps(config))
    tensors = {n.removeprefix("model."): t for n, t in load_file(path / "model.safetensors").items()}
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize(("scheme", "least"), [("fp8", 0.99), ("int8", 0.999), ("fp4", 0.9)])
def test_vectors_stay_near(folder: Path, scheme: str, least: float) -> None:
    if scheme == "int8" and not torch.cpu._is_vnni_supported():
        pytest.skip("int8 is refused on a CPU without VNNI instructions")
    checkpoint = FolderCheckpoint(folder)
    spec = EngineSpec(model="m", path=folder, quantization=scheme, pooling="last", device="cpu")
    core, _ = build_encode(spec, checkpoint, CPU, torch.float32)
    model = core.runner.model
    kept = EightBitLinear if scheme == "int8" else ScaledLinear
    assert len([m for m in model.modules() if isinstance(m, kept)]) == 8
    plain = load_backbone(checkpoint, dtype=torch.float32, device=CPU, head=False).module
    batch = PackedBatch.for_encoding([[5, 7, 9, 11, 200]], causal=True)
    mine, other = model.hidden(batch)[-1], plain(batch)[-1]
    cosine = torch.nn.functional.cosine_similarity(mine.float(), other.float(), dim=0)
    assert least < float(cosine) < 1 - 1e-7


def test_what_is_refused(folder: Path) -> None:
    checkpoint = FolderCheckpoint(folder)
    spec = EngineSpec(model="m", path=folder, quantization="fp8_kv", pooling="last")
    with pytest.raises(ConfigError, match="use 'fp8'"):
        build_encode(spec, checkpoint, CPU, torch.float32)
    bert = FolderCheckpoint(folder)
    bert.config = {"model_type": "bert", "architectures": ["BertModel"]}
    transform = load_time(quantization_type("fp8"), CPU)
    with pytest.raises(UnsupportedCheckpoint, match="leave quantization out"):
        load_backbone(bert, dtype=torch.float32, device=CPU, head=False, transform=transform)
