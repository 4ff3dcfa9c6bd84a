"""Fill an encoder from a checkpoint by its family's table of names."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from headrace.checkpoints.base import Checkpoint
from headrace.checkpoints.upload import InFiles, Upload, Uploader, uploader_for
from headrace.errors import MissingFile, UnsupportedCheckpoint
from headrace.models.encoder import EncoderConfig, EncoderModel
from headrace.models.encoder_family import EncoderFamily, Names

__all__ = ["find_prefix", "load_encoder", "load_module", "random_encoder"]

# LayerNorm parameters in the oldest BERT checkpoints.
_OLD_LEAVES = {"weight": "gamma", "bias": "beta"}


def load_encoder(
    model: EncoderModel,
    family: EncoderFamily,
    checkpoint: Checkpoint,
    convert: Callable[[EncoderModel], None] | None = None,
) -> str:
    """Read every weight of ``model`` and finish it; returns the prefix of the names.

    Args:
        convert: changes the loaded model before its weights are packed (quantization).

    Raises:
        UnsupportedCheckpoint: a weight is missing or has another shape; the message names it.
    """
    names = family.names(model.config)
    known = set(checkpoint.names())
    prefix = find_prefix(names["word"][0] + ".weight", known, checkpoint)
    uploader = uploader_for(checkpoint, next(model.parameters()).device)
    try:
        for path, target in _targets(model):
            sources, leaf = _sources(path, names)
            found = [_name(checkpoint, known, prefix + source, leaf) for source in sources]
            swapped = _generic(path)[0].rsplit(".", 1)[0] in family.halves_swapped
            if swapped or uploader is None or not _upload(uploader, checkpoint, found, path, target):
                _read(checkpoint, found, path, target, swapped)
        if uploader is not None:
            uploader.flush()
    finally:
        if uploader is not None:
            uploader.close()
    if convert is not None:
        convert(model)
    model.finish()
    return prefix


def find_prefix(name: str, known: Iterable[str], checkpoint: Checkpoint) -> str:
    """What stands before ``name`` in this checkpoint."""
    found = sorted(known_name[: -len(name)] for known_name in known if known_name.endswith(name))
    if not found:
        raise MissingFile(f"{checkpoint.path} holds no tensor named {name} (with or without a prefix)")
    return found[0]


def load_module(module: nn.Module, checkpoint: Checkpoint, source: str) -> None:
    """Fill one small module (a head's layer) from ``source.weight`` and ``source.bias``."""
    known = set(checkpoint.names())
    for leaf, target in module.named_parameters(recurse=False):
        value = checkpoint.load(_name(checkpoint, known, source, leaf), target.dtype)
        _fill(leaf, target, value, source)


def _targets(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def _generic(path: str) -> tuple[str, str]:
    """``layers.3.mlp.up.weight`` -> (``layers.{i}.mlp.up.weight``, ``3``)."""
    words = path.split(".")
    if words[0] != "layers":
        return path, ""
    return ".".join(["layers", "{i}", *words[2:]]), words[1]


def _sources(path: str, names: Names) -> tuple[list[str], str]:
    """Checkpoint modules that make up one of our parameters, and its leaf name ("" for whole tensors)."""
    generic, index = _generic(path)
    module, leaf = generic.rsplit(".", 1)
    whole = f"{module}|{leaf}"
    if whole in names:
        return [source.replace("{i}", index) for source in names[whole]], ""
    assert module in names, f"the family's table has no {module}"
    return [source.replace("{i}", index) for source in names[module]], leaf


def _read(checkpoint: Checkpoint, names: list[str], path: str, target: nn.Parameter, swapped: bool) -> None:
    tensors = [checkpoint.load(name, target.dtype) for name in names]
    value = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    if swapped:
        value = torch.cat(value.chunk(2)[::-1])
    _fill(path, target, value, names[0])


def _upload(
    uploader: Uploader, checkpoint: Checkpoint, names: list[str], path: str, target: nn.Parameter
) -> bool:
    """Have tensors read, one below the other; False for those that only the checkpoint can read."""
    if not isinstance(checkpoint, InFiles):
        return False
    regions = [region for name in names if (region := checkpoint.region(name)) is not None]
    if len(regions) < len(names) or any(not region.shape for region in regions):
        return False
    rows = [region.shape[0] for region in regions]
    for region in regions:
        _check((sum(rows), *region.shape[1:]), target, names[0], path)
    for region, part in zip(regions, target.data.split(rows)):
        uploader.add(Upload(region, part, lambda: None))
    return True


def _name(checkpoint: Checkpoint, known: set[str], source: str, leaf: str) -> str:
    name = f"{source}.{leaf}" if leaf else source
    if name not in known and leaf in _OLD_LEAVES:
        old = f"{source}.{_OLD_LEAVES[leaf]}"
        name = old if old in known else name
    if name not in known:
        raise UnsupportedCheckpoint(
            f"{checkpoint.path} has no tensor {name}, which its config.json calls for"
        )
    return name


def _check(shape: tuple[int, ...], target: nn.Parameter, source: str, path: str) -> None:
    if shape != tuple(target.shape):
        raise UnsupportedCheckpoint(
            f"{source} has shape {list(shape)}; config.json calls for {list(target.shape)} ({path})"
        )


def _fill(path: str, target: nn.Parameter, value: Tensor, source: str) -> None:
    _check(tuple(value.shape), target, source, path)
    target.data.copy_(value)


def random_encoder(
    config: EncoderConfig, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> EncoderModel:
    """An encoder with random weights made on the device: right shapes and finite numbers, no sense."""
    model = EncoderModel(config, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        gain = parameter.dim() == 1 and name.endswith("weight")
        parameter.data.normal_(1.0 if gain else 0.0, 0.02, generator=generator)
    model.finish()
    return model.eval()
