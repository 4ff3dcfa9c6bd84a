"""A checkpoint's headers as the facts that planning and selection read. No torch, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headrace.checkpoints.base import Checkpoint
from headrace.checkpoints.hub import TOKEN_SECRET, cached_snapshot, headers
from headrace.checkpoints.quantization_rules import cache_problem, check_settings, wanted_cache
from headrace.checkpoints.quantization_settings import SIDE_FILE, quantization_settings
from headrace.checkpoints.resolve import open_checkpoint
from headrace.config.plan.facts import Facts, Quantized, Tensor
from headrace.errors import UnsupportedCheckpoint
from headrace.models.encode_card import stated_max_tokens

__all__ = ["inspect", "inspect_hub"]

_MAX_FILES = 2000
_MAX_JSON = 16 << 20


def inspect(path: Path) -> Facts:
    """Read headers of a folder or GGUF file.

    A folder with config.json and no weights at all gives facts without tensors; anything else that
    ``open_checkpoint`` refuses is refused here too.
    """
    if path.is_dir() and (path / "config.json").is_file() and not _has_weights(path):
        return _folder(path, _json(path / "config.json"), {}, "config")
    checkpoint = open_checkpoint(path)
    tensors = {}
    for name in checkpoint.names():
        info = checkpoint.info(name)
        tensors[name] = Tensor(tuple(info.shape), info.dtype, info.nbytes)
    if checkpoint.path.is_dir():
        return _folder(checkpoint.path, checkpoint.config, tensors, "safetensors")
    return _gguf(checkpoint, tensors)


def inspect_hub(model: str, revision: str | None = None, secret: str = TOKEN_SECRET) -> Facts:
    """Headers of a hub repository: of its cached copy, else fetched without the weights.

    Raises MissingFile or UnsupportedCheckpoint as the hub says.
    """
    cached = cached_snapshot(model, revision)
    if cached is not None:
        return inspect(cached)
    folder, files, found = headers(model, revision, secret)
    if not (folder / "config.json").is_file():
        raise UnsupportedCheckpoint(
            f"the hub repository {model!r} has no config.json; give a repository in Hugging Face's format"
        )
    tensors = {name: Tensor(info.shape, info.dtype, info.nbytes) for name, info in found.items()}
    container = "safetensors" if tensors else "config"
    return _folder(folder, _json(folder / "config.json"), tensors, container, files)


def _has_weights(path: Path) -> bool:
    endings = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
    return any(entry.name.endswith(endings) for entry in path.iterdir())


def _gguf(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> Facts:
    header: Any = getattr(checkpoint, "header", None)
    metadata = {} if header is None else header.metadata
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    main = max(sizes, key=lambda kind: sizes[kind]) if sizes else ""
    packed = main not in ("F32", "F16", "BF16", "")
    return Facts(
        where=str(checkpoint.path),
        config=checkpoint.config,
        tensors=tensors,
        container="gguf",
        chat_template=bool(metadata.get("tokenizer.chat_template")),
        pieces=metadata.get("tokenizer.ggml.model") == "llama",
        quantized=Quantized(method="gguf", source=main) if packed else Quantized(),
    )


def _folder(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    container: str,
    names: frozenset[str] = frozenset(),
) -> Facts:
    """Args: names: of all files, where only some lie in ``path``."""
    files = names or _files(path)
    modules = _json(path / "modules.json", list) if "modules.json" in files else []
    pooling = _json(path / "1_Pooling/config.json") if "1_Pooling/config.json" in files else {}
    return Facts(
        where=str(path),
        config=config,
        tensors=tensors,
        files=files,
        container=container,
        modules=tuple(str(entry.get("type", "")) for entry in modules if isinstance(entry, dict)),
        pooling=pooling,
        max_tokens=_max_tokens(path, files, config),
        chat_template=_has_template(path, files),
        quantized=_quantized(path, config, files),
    )


def _files(path: Path) -> frozenset[str]:
    found = []
    for entry in sorted(path.rglob("*"))[:_MAX_FILES]:
        if entry.is_file():
            found.append(entry.relative_to(path).as_posix())
    return frozenset(found)


def _max_tokens(path: Path, files: frozenset[str], config: dict[str, Any]) -> int:
    names = config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else ""
    return stated_max_tokens(lambda name: _json(path / name) if name in files else {}, architecture) or 0


def _has_template(path: Path, files: frozenset[str]) -> bool:
    if "chat_template.jinja" in files or "chat_template.json" in files:
        return True
    if "tokenizer_config.json" not in files:
        return False
    return bool(_json(path / "tokenizer_config.json").get("chat_template"))


def _quantized(path: Path, config: dict[str, Any], files: frozenset[str]) -> Quantized:
    """From config.json or hf_quant_config.json (ModelOpt). Raises UnsupportedCheckpoint for what is not read."""
    side = (lambda: _json(path / SIDE_FILE)) if SIDE_FILE in files else None
    found = quantization_settings(config, side)
    if found is None:
        return Quantized()
    strangers = check_settings(found)
    cache = "fp8" if wanted_cache(found) == "fp8" else ""
    own = found.values
    named = found.method
    if own.get("config_groups") == {} or (named.startswith("modelopt") and not own.get("quant_algo")):
        return Quantized(
            kv=cache,
            kv_problem=cache_problem(found),
            source=found.source,
        )
    if found.method.startswith("modelopt") or found.method == "compressed-tensors":
        named = str(own.get("quant_algo") or own.get("format") or found.method).lower()
    if named == "bitsandbytes" and (own.get("load_in_8bit") or own.get("_load_in_8bit")):
        named = "int8"
    bits, group, reordered = _packing(own, found.method)
    if named == "pack-quantized" and bits == 8:
        named = "int8"
    return Quantized(
        method=_short(named),
        kv=cache,
        kv_problem=cache_problem(found),
        strangers=strangers,
        source=found.source,
        bits=bits if bits in (4, 8) else 0,
        group=group,
        reordered=reordered,
    )


def _packing(own: dict[str, Any], method: str) -> tuple[int, int, bool]:
    """Bits of packed integers, columns that share a scale, and whether columns are reordered; 0: not said."""
    weights = _first_weights(own) if method == "compressed-tensors" else own
    bits = weights.get("num_bits", weights.get("bits", weights.get("w_bit")))
    group = weights.get("group_size", weights.get("q_group_size"))
    reordered = bool(own.get("desc_act")) or weights.get("actorder") in ("group", "dynamic")
    return bits if isinstance(bits, int) else 0, group if isinstance(group, int) else 0, reordered


def _first_weights(settings: dict[str, Any]) -> dict[str, Any]:
    """``weights`` of the first group of a compressed-tensors block."""
    groups = settings.get("config_groups")
    first: Any = next(iter(groups.values()), {}) if isinstance(groups, dict) else {}
    weights = first.get("weights") if isinstance(first, dict) else None
    return weights if isinstance(weights, dict) else {}


def _short(name: str) -> str:
    for word in (
        "nvfp4",
        "mxfp4",
        "mxfp8",
        "fp8",
        "float-quantized",
        "awq",
        "gptq",
        "int8",
        "w8a16",
        "int4",
        "pack-quantized",
        "int-quantized",
    ):
        if word in name:
            return {
                "float-quantized": "fp8",
                "pack-quantized": "int4",
                "int-quantized": "int8",
                "w8a16": "int8",
            }.get(word, word)
    return name


def _json(file: Path, kind: type = dict) -> Any:
    try:
        if file.stat().st_size > _MAX_JSON:
            raise UnsupportedCheckpoint(f"{file} is over {_MAX_JSON >> 20} MiB, too much for settings")
        value = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedCheckpoint(f"{file} is no valid JSON: {error}") from None
    if not isinstance(value, kind):
        raise UnsupportedCheckpoint(f"{file} holds a JSON {type(value).__name__}; expected {kind.__name__}")
    return value
