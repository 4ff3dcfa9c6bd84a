"""Hugging Face folders: whole, sharded, incomplete, damaged, pickled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headrace.checkpoints.folder import FolderCheckpoint
from headrace.errors import HeadraceError, MissingFile, UnsupportedCheckpoint


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "a.weight": torch.randn(5, 3, generator=generator),
        "b.weight": torch.randn(7, generator=generator).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


def shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    parts = {
        "model-00001-of-00002.safetensors": ["a.weight"],
        "model-00002-of-00002.safetensors": ["b.weight", "empty"],
    }
    for file, names in parts.items():
        save_file({name: tensors()[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("sharded", [False, True])
def test_names_shapes_and_values(folder: Path, sharded: bool) -> None:
    if sharded:
        shard(folder)
    checkpoint = FolderCheckpoint(folder)
    assert sorted(checkpoint.names()) == ["a.weight", "b.weight", "empty"]
    assert checkpoint.info("a.weight").shape == (5, 3)
    assert checkpoint.info("b.weight").dtype == "BF16"
    assert checkpoint.info("b.weight").nbytes == 14
    for name, value in tensors().items():
        assert torch.equal(checkpoint.load(name), value)
    assert checkpoint.load("a.weight", torch.float16).dtype == torch.float16
    assert checkpoint.config == {"architectures": ["LlamaForCausalLM"]}
    assert checkpoint.generation_config == {}


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingFile, match=r"1 of 2 shards: model-00002-of-00002\.safetensors"):
        FolderCheckpoint(folder)


def test_an_index_cannot_point_outside(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(UnsupportedCheckpoint, match=r"\.\./model\.safetensors"):
        FolderCheckpoint(folder)


def test_pickles_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedCheckpoint, match=r"pytorch_model\.bin.*save_pretrained"):
        FolderCheckpoint(folder)


def test_nothing_at_all(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(MissingFile, match=r"no config\.json.*notes\.txt"):
        FolderCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MissingFile, match=r"no model\.safetensors"):
        FolderCheckpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": NaN', "\xff"])
def test_a_damaged_config_is_an_error(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UnsupportedCheckpoint, match=r"config\.json"):
        FolderCheckpoint(folder)


def test_every_truncation_is_an_error(folder: Path) -> None:
    file = folder / "model.safetensors"
    sound = file.read_bytes()
    for size in range(len(sound)):
        file.write_bytes(sound[:size])
        with pytest.raises(HeadraceError):
            FolderCheckpoint(folder)


def test_fingerprint_sees_config_and_weights(folder: Path) -> None:
    first = FolderCheckpoint(folder).fingerprint
    assert FolderCheckpoint(folder).fingerprint == first
    (folder / "config.json").write_text('{"architectures": ["MistralForCausalLM"]}')
    second = FolderCheckpoint(folder).fingerprint
    save_file({name: value + 1 for name, value in tensors().items()}, folder / "model.safetensors")
    assert len({first, second, FolderCheckpoint(folder).fingerprint}) == 3
