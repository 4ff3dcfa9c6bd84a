"""Weights read by threads arrive whole, in any type, and what is wrong with a file is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headrace.checkpoints import upload
from headrace.checkpoints.folder import FolderCheckpoint
from headrace.checkpoints.upload import Region, Upload, Uploader
from headrace.errors import UnsupportedCheckpoint
from headrace.models import encoder_weights, loading
from headrace.models.encode_backbone import load_backbone
from headrace.models.loading import load_decoder
from parity.encoders import make
from support.tiny_folder import write_llama

CPU = torch.device("cpu")


def folder_of(path: Path, tensors: dict[str, torch.Tensor]) -> FolderCheckpoint:
    (path / "config.json").write_text("{}")
    save_file(tensors, path / "model.safetensors")
    return FolderCheckpoint(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece", [64, 1 << 20])
def test_all_tensors_arrive(
    dtype: torch.dtype, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "_PIECE", piece)
    monkeypatch.setattr(upload, "_PIECES", 3)
    generator = torch.Generator().manual_seed(1)
    shapes = [(1,), (7, 13), (300, 3), (64,), (2, 5, 11)]
    tensors = {f"t{i}": torch.randn(*shape, generator=generator).to(dtype) for i, shape in enumerate(shapes)}
    checkpoint = folder_of(tmp_path, tensors)
    found = {
        name: torch.full(tensor.shape, torch.nan, dtype=torch.bfloat16 if name == "t1" else dtype)
        for name, tensor in tensors.items()
    }
    done: list[str] = []
    uploader = Uploader(CPU)
    for name, destination in found.items():
        region = checkpoint.region(name)
        assert region is not None
        assert region.shape == tuple(destination.shape)
        uploader.add(Upload(region, destination, lambda name=name: done.append(name)))  # type: ignore[misc]
    uploader.flush()
    uploader.close()
    assert done == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name


def test_a_file_that_shrinks_is_named(tmp_path: Path) -> None:
    file = tmp_path / "short"
    file.write_bytes(bytes(100))
    uploader = Uploader(CPU)
    region = Region(file, 60, 80, torch.float32, (20,))
    uploader.add(Upload(region, torch.zeros(20), lambda: pytest.fail("it is not whole")))
    with pytest.raises(UnsupportedCheckpoint, match=r"short ended at 100 bytes"):
        uploader.flush()
    uploader.close()


def test_other_types_are_left_to_the_library(tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, {"i": torch.arange(5), "f": torch.zeros(3)})
    assert checkpoint.region("i") is None
    assert checkpoint.region("f") is not None


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_models_are_the_same(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused projections lie one below the other, whoever reads them."""
    pytest.importorskip("transformers")
    if family == "bert":
        make(tmp_path, "bert")
    else:
        write_llama(tmp_path)

    def load() -> dict[str, torch.Tensor]:
        checkpoint = FolderCheckpoint(tmp_path)
        if family == "bert":
            model: torch.nn.Module = load_backbone(
                checkpoint, dtype=torch.bfloat16, device="cpu", head=False
            ).module
        else:
            model = load_decoder(checkpoint.config, checkpoint, dtype=torch.bfloat16, device="cpu")
        return dict(model.named_parameters())

    expected = load()
    used: list[Uploader] = []

    def always(weights: object, device: torch.device) -> Uploader:
        used.append(Uploader(device))
        return used[-1]

    for module in (encoder_weights, loading):
        monkeypatch.setattr(module, "uploader_for", always)
    found = load()
    assert len(used) == 1
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
