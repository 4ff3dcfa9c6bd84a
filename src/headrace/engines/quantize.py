"""Write a quantized copy of a checkpoint: shard by shard, resumable, in the form that others read too."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.checkpoints.base import Checkpoint
from headrace.checkpoints.folder import FolderCheckpoint
from headrace.checkpoints.gguf import GGUFCheckpoint
from headrace.config.plan.refusals import GROUP_COLUMNS
from headrace.config.plan.weights import classify
from headrace.config.quantization import QuantizationType, quantization_type
from headrace.engines.calibration import Calibration, Inputs
from headrace.errors import ConfigError, UnsupportedCheckpoint
from headrace.kernels.quantized_linear.formats import FP8_MAX
from headrace.quantization.writing import WRITABLE, packed_tensors, quantization_config, round_weight
from headrace.text.tokenizer import Tokenizer

__all__ = ["Progress", "quantize_checkpoint", "uses_calibration"]

Progress = Callable[[str, int, int], None]  # what, done, in all

_SHARD_BYTES = 2 << 30  # of unquantized weights
_MARK = ".headrace-quantize.json"  # in an unfinished folder: what it is to become
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot",
    ".tflite", ".mlmodel", ".npz",
)  # fmt: skip
_HEADS = ("sparse_linear.safetensors", "colbert_linear.safetensors")  # of BGE-M3, beside the checkpoint
_TABLE = "model.safetensors.index.json"
_CALIBRATED = ("nvfp4", "mxfp4", "int4", "int4-g64", "int4-g128")


def quantize_checkpoint(
    checkpoint: Checkpoint,
    name: str,
    out: Path,
    *,
    calibration: Calibration | None = None,
    static: bool = False,
    progress: Progress | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> Path:
    """Write ``checkpoint`` quantized as ``name`` into the folder ``out``; an interrupted run goes on where it was.

    Args:
        checkpoint: a Hugging Face folder with 16- or 32-bit weights, or a GGUF file, whose blocks are dequantized
            first (and what they lost stays lost).
        calibration: scales and rounding are then fitted to what each matrix meets.
        static: FP8 activations get the scale of the largest input that calibration met, instead of their own.

    Raises ConfigError, UnsupportedCheckpoint; also when ``out`` holds something else.
    """
    if not isinstance(checkpoint, (FolderCheckpoint, GGUFCheckpoint)):
        raise UnsupportedCheckpoint(
            f"{checkpoint.path}: quantize reads Hugging Face folders with 16- or 32-bit safetensors, and GGUF files; "
            "this is neither"
        )
    kind = quantization_type(name)
    if kind.weights not in WRITABLE:
        raise ConfigError(
            f"type {name!r} cannot be written; expected one of {', '.join(WRITABLE)}", param="type"
        )
    if static and (kind.weights != "fp8" or calibration is None):
        raise ConfigError(
            f"static activation scales are for the fp8 types and need calibration; the type is {name!r}",
            param="static",
        )
    mark: dict[str, Any] = {
        "checkpoint": checkpoint.fingerprint,
        "type": name,
        "calibration": f"gram {calibration.fingerprint}" if calibration else "",
    }
    if static:
        mark["static"] = True
    _refuse_fused(checkpoint)
    chosen = [tensor for tensor in checkpoint.names() if converts(tensor, checkpoint, kind)]
    if not chosen:
        raise UnsupportedCheckpoint(f"{checkpoint.path} holds no matrix that {name!r} converts")
    _refuse_widths(checkpoint, name, kind, chosen)
    _open_folder(out, mark)
    groups = list(_shards(checkpoint, shard_bytes))
    where: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file = out / f"model-{number:05}-of-{len(groups):05}.safetensors"
        if not file.exists():
            convert = set(names) & set(chosen)
            inputs = calibration(convert) if calibration and convert else {}
            _write_shard(checkpoint, names, convert, kind, inputs, static, file)
        where |= dict.fromkeys(_names_in(file), file.name)
        if progress is not None:
            progress("shards", number, len(groups))
    _finish(checkpoint, out, kind, chosen, where, static)
    return out


def converts(name: str, checkpoint: Checkpoint, kind: QuantizationType) -> bool:
    """Whether this tensor is a linear's matrix that the type rounds."""
    info = checkpoint.info(name)
    if len(info.shape) != 2 or not name.endswith(".weight"):
        return False
    if isinstance(checkpoint, FolderCheckpoint) and info.dtype not in ("F32", "F16", "BF16"):
        return False
    group = classify(name)
    if name.endswith((".gate.weight", ".router.weight", ".shared_expert_gate.weight")):
        return False
    return group == "mlp" or group == "experts" or (group == "attention" and kind.layers == "all")


def _refuse_fused(checkpoint: Checkpoint) -> None:
    """Experts that lie in one tensor are no matrices that the format has a place for."""
    for name in checkpoint.names():
        if classify(name) == "experts" and len(checkpoint.info(name).shape) == 3:
            raise UnsupportedCheckpoint(
                f"tensor {name!r} holds the matrices of all experts; quantize reads those with a tensor for each "
                "(experts.0.gate_proj.weight). Save it so with transformers, or quantize while loading",
                param=name,
            )


def _refuse_widths(checkpoint: Checkpoint, name: str, kind: QuantizationType, chosen: Sequence[str]) -> None:
    for tensor in chosen:
        columns, group = checkpoint.info(tensor).shape[1], GROUP_COLUMNS.get(kind.weights, 1)
        if columns % group:
            raise UnsupportedCheckpoint(
                f"type {name!r} has scales for {group} columns each, and {tensor} has {columns}; take a type with "
                "smaller groups or with a scale a row (fp8, int8)",
                param="type",
            )


def uses_calibration(name: str) -> bool:
    """Whether this type is made with the help of data if nobody says otherwise."""
    return quantization_type(name).weights in _CALIBRATED


def _open_folder(out: Path, mark: Mapping[str, Any]) -> None:
    """Make ``out``, or check that it is an earlier run of the same."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give an empty or new folder", param="out")
    if out.exists() and any(out.iterdir()):
        if not (out / _MARK).is_file():
            raise ConfigError(f"{out} holds something else already; give an empty or new folder", param="out")
        try:
            before = json.loads((out / _MARK).read_text("utf-8"))
        except ValueError:  # killed as it was written: nothing else is there yet
            before = "no JSON"
        if before != mark:
            raise ConfigError(
                f"{out} holds an unfinished run of something else ({before}); delete it or give another folder",
                param="out",
            )
        for left in (
            *out.glob(".tmp*"),
            *out.glob("*.part"),
        ):  # what a killed run was writing, safetensors' own, too
            left.unlink()
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).write_text(json.dumps(mark), "utf-8")


def _shards(checkpoint: Checkpoint, limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name in checkpoint.names():
        nbytes = checkpoint.info(name).nbytes
        if names and size + nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def _write_shard(
    checkpoint: Checkpoint,
    names: Sequence[str],
    chosen: set[str],
    kind: QuantizationType,
    inputs: Mapping[str, Inputs],
    static: bool,
    file: Path,
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name in names:
        tensor = checkpoint.load(name)
        if isinstance(checkpoint, GGUFCheckpoint) and tensor.dtype is torch.float32:
            tensor = tensor.bfloat16()
        if name not in chosen:
            tensors[name] = tensor.contiguous()
            continue
        base = name.removesuffix(".weight")
        met = inputs.get(name)
        if met is None or not met.rows:  # an expert that no text led to
            packed = round_weight(tensor, kind.weights)
        else:
            packed = met.compensation.round(tensor, kind.weights).to(torch.device("cpu"))
        tensors |= {key: value.contiguous() for key, value in packed_tensors(base, packed).items()}
        if static:
            tensors[f"{base}.input_scale"] = torch.tensor([_input_scale(name, met)])
        if kind.kv_cache == "fp8" and base.endswith(".k_proj"):
            attention = base.removesuffix(".k_proj")
            tensors |= {f"{attention}.k_scale": torch.ones(1), f"{attention}.v_scale": torch.ones(1)}
    part = file.with_suffix(".part")
    try:
        save_file(tensors, part, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, mostly
        raise ConfigError(
            f"{part} cannot be written: {error}. Make room and give the same command again: it goes on here",
            param="out",
        ) from None
    part.chmod((file.parent / _MARK).stat().st_mode)  # the library leaves it to its owner alone
    part.rename(file)  # a shard is there whole or not at all


def _input_scale(name: str, met: Inputs | None) -> float:
    if met is None or not met.peak > 0 or not math.isfinite(met.peak):
        raise ConfigError(f"calibration says nothing of the input of {name}: give other texts", param="data")
    return met.peak / FP8_MAX


def _names_in(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as handle:
        return list(handle.keys())


def _module_folders(path: Path) -> list[str]:
    """Of a sentence-transformers model: pooling and what comes after it, each in a folder of its own."""
    file = path / "modules.json"
    modules = json.loads(file.read_text("utf-8")) if file.is_file() else []
    names = [str(module.get("path") or "") for module in modules if isinstance(module, dict)]
    return [name for name in names if name and Path(name).name == name and (path / name).is_dir()]


def _is_of_weights(name: str) -> bool:
    """Weights in any form, what names their files, and what is written anew; an adapter's settings have no weights."""
    if name in _HEADS:
        return False
    return (
        name.endswith((*_WEIGHTS, ".index.json"))
        or name in ("config.json", "adapter_config.json", _MARK)
        or name.startswith("pytorch_model")
    )


def _copy_text(checkpoint: FolderCheckpoint | GGUFCheckpoint, out: Path) -> None:
    """Tokenizer, templates and generation settings: the files beside the weights, or what the GGUF file says."""
    if isinstance(checkpoint, FolderCheckpoint):
        for entry in sorted(checkpoint.path.iterdir()):
            if entry.is_file() and not _is_of_weights(entry.name):
                shutil.copyfile(entry, out / entry.name)
        for folder in _module_folders(checkpoint.path):
            shutil.copytree(checkpoint.path / folder, out / folder, dirs_exist_ok=True)
        return
    tokenizer = Tokenizer.from_path(checkpoint.path)
    tokenizer.backend.save(str(out / "tokenizer.json"))
    settings: dict[str, Any] = dict(tokenizer.special_tokens)
    if "default" in tokenizer.sources.templates:
        settings["chat_template"] = tokenizer.sources.templates["default"]
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")
    (out / "generation_config.json").write_text(json.dumps(checkpoint.generation_config, indent=2), "utf-8")


def _finish(
    checkpoint: FolderCheckpoint | GGUFCheckpoint,
    out: Path,
    kind: QuantizationType,
    chosen: Sequence[str],
    where: Mapping[str, str],
    static: bool,
) -> None:
    _copy_text(checkpoint, out)
    size = sum(file.stat().st_size for file in out.glob("model-*.safetensors"))
    table = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    (out / _TABLE).write_text(json.dumps(table, indent=1), "utf-8")
    matrices = (name for name in checkpoint.names() if name.endswith(".weight"))
    left = [
        name.removesuffix(".weight")
        for name in matrices
        if name not in chosen and len(checkpoint.info(name).shape) == 2 and classify(name) != "embedding"
    ]
    ignored = sorted({*left, "lm_head"})
    config = {**checkpoint.config, "quantization_config": quantization_config(kind, ignored, static=static)}
    (out / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    (out / _MARK).unlink()
