"""A Hugging Face folder: config.json and safetensors, in one file or in shards."""

from __future__ import annotations

import json
import math
import struct
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.checkpoints.base import TensorInfo, fingerprint_files
from headrace.checkpoints.upload import Region
from headrace.errors import MissingFile, UnsupportedCheckpoint, nearest

if TYPE_CHECKING:
    import torch

__all__ = ["FolderCheckpoint", "read_json"]

_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # the safetensors library's own limit
_MAX_JSON = 64 << 20


class FolderCheckpoint:
    """Implements Checkpoint over a folder. Opening it reads JSON and the shards' headers, no tensor data.

    Raises MissingFile when config.json or a shard is missing, UnsupportedCheckpoint when there are only
    pickled weights or a header is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation_config: dict[str, Any] = read_json(generation) if generation.is_file() else {}
        self._files = _weight_files(path)
        self._where: dict[str, tuple[Path, TensorInfo]] = {}
        self._offsets: dict[str, int] = {}
        for file in self._files:
            for name, (info, offset) in _read_header(file).items():
                if name in self._where:
                    raise UnsupportedCheckpoint(
                        f"tensor {name!r} is in two files, {self._where[name][0]} and {file}"
                    )
                self._where[name], self._offsets[name] = (file, info), offset
        self._handles: dict[Path, Any] = {}

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_files([self.path / "config.json", *self._files])

    def names(self) -> list[str]:
        return list(self._where)

    def info(self, name: str) -> TensorInfo:
        return self._find(name)[1]

    def load(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor: torch.Tensor = self._handle(self._find(name)[0]).get_tensor(name)
        return tensor if dtype is None else tensor.to(dtype)

    def region(self, name: str) -> Region | None:
        """Where a tensor's data lies, for those who read it themselves; None unless it is of a plain float type."""
        import torch

        file, info = self._find(name)
        self._handle(file)  # the library checks all offsets of the file
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(info.dtype)
        if dtype is None or math.prod(info.shape) * dtype.itemsize != info.nbytes:
            return None
        return Region(file, self._offsets[name], info.nbytes, dtype, info.shape)

    def _handle(self, file: Path) -> Any:
        from safetensors import safe_open

        if file not in self._handles:
            self._handles[file] = safe_open(str(file), framework="pt")
        return self._handles[file]

    def _find(self, name: str) -> tuple[Path, TensorInfo]:
        found = self._where.get(name)
        if found is None:
            raise MissingFile(f"{self.path} holds no tensor {name!r}{nearest(name, self._where)}")
        return found


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises MissingFile, or UnsupportedCheckpoint when it is no JSON object."""
    try:
        if file.stat().st_size > _MAX_JSON:
            raise UnsupportedCheckpoint(f"{file} is over {_MAX_JSON >> 20} MiB, too much for settings")
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = sorted(entry.name for entry in file.parent.iterdir())[:12] if file.parent.is_dir() else []
        raise MissingFile(
            f"there is no {file.name} in {file.parent}; it holds {', '.join(beside) or 'nothing'}. "
            "Give a Hugging Face model folder or a .gguf file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UnsupportedCheckpoint(f"{file} is no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UnsupportedCheckpoint(f"{file} holds a JSON {type(value).__name__}; an object is needed")
    return value


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model, and nothing that merely lies beside them."""
    index = folder / _INDEX
    if index.is_file():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise UnsupportedCheckpoint(f"{index} has no usable weight_map")
        names = sorted(set(table.values()))
        if bad := [name for name in names if Path(name).name != name]:
            raise UnsupportedCheckpoint(f"{index} names the shard {bad[0]!r}, no file of this folder")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise MissingFile(
                f"{folder} lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:5])}; "
                "the download is incomplete, run it again"
            )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others
    raise _no_weights(folder, others)


def _no_weights(folder: Path, others: list[Path]) -> MissingFile | UnsupportedCheckpoint:
    if others:
        listed = ", ".join(file.name for file in others[:5])
        return MissingFile(f"{folder} holds {listed}, but no {_INDEX} that says what belongs together")
    pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(kind))
    if pickles:
        return UnsupportedCheckpoint(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}). Pickles can run code when read "
            "and are refused; convert them where you trust them: "
            "`AutoModel.from_pretrained(FOLDER).save_pretrained(OUT)` of transformers writes safetensors"
        )
    return MissingFile(f"{folder} holds no model.safetensors and no {_INDEX}")


def _read_header(file: Path) -> dict[str, tuple[TensorInfo, int]]:
    """Names, shapes, types and places of one safetensors file (https://huggingface.co/docs/safetensors), checked."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, _MAX_HEADER):
            raise UnsupportedCheckpoint(f"{file} is truncated or not a safetensors file; download it again")
        text = handle.read(length)
    try:
        table = json.loads(text)
        table.pop("__metadata__", None)
        data = 8 + length
        infos = {
            name: (_tensor_info(entry), data + entry["data_offsets"][0]) for name, entry in table.items()
        }
        end = max((entry["data_offsets"][1] for entry in table.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise UnsupportedCheckpoint(f"{file} has a damaged safetensors header; download it again") from None
    if end > size - 8 - length:
        raise UnsupportedCheckpoint(
            f"{file} is truncated at {size} bytes of {end + 8 + length}; download it again"
        )
    return infos


def _tensor_info(entry: dict[str, Any]) -> TensorInfo:
    shape = tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)) or end < start:
        raise ValueError("negative size")
    if end - start > 0 and math.prod(shape) == 0:
        raise ValueError("bytes of an empty tensor")
    return TensorInfo(shape, str(entry["dtype"]), end - start)
