"""Fill an encoder from a checkpoint by its family's table of names."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from headrace.checkpoints.base import Checkpoint
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
    for path, target in _targets(model):
        sources, leaf = _sources(path, names)
        tensors = [_load(checkpoint, known, prefix + source, leaf, target.dtype) for source in sources]
        value = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        if _generic(path)[0].rsplit(".", 1)[0] in family.halves_swapped:
            value = torch.cat(value.chunk(2)[::-1])
        _fill(path, target, value, prefix + sources[0])
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
        _fill(leaf, target, _load(checkpoint, known, source, leaf, target.dtype), source)


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


def _load(checkpoint: Checkpoint, known: set[str], source: str, leaf: str, dtype: torch.dtype) -> Tensor:
    name = f"{source}.{leaf}" if leaf else source
    if name not in known and leaf in _OLD_LEAVES:
        old = f"{source}.{_OLD_LEAVES[leaf]}"
        name = old if old in known else name
    if name not in known:
        raise UnsupportedCheckpoint(
            f"{checkpoint.path} has no tensor {name}, which its config.json calls for"
        )
    return checkpoint.load(name, dtype)


def _fill(path: str, target: nn.Parameter, value: Tensor, source: str) -> None:
    if tuple(value.shape) != tuple(target.shape):
        raise UnsupportedCheckpoint(
            f"{source} has shape {list(value.shape)}; config.json calls for {list(target.shape)} ({path})"
        )
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
