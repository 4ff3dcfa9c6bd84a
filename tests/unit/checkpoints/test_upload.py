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
