"""Weights into a decoder: each tensor is read, cast and placed once, and every misfit is named."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headrace.checkpoints.upload import InFiles, Upload, Uploader, uploader_for
from headrace.errors import UnsupportedCheckpoint
from headrace.layers.experts import ExpertLinear
from headrace.layers.linear import Embedding, Linear, parameter
from headrace.models.arrangement import Arrangement, NeighbourPairs
from headrace.models.declaration import DecoderConfig
from headrace.models.decoder import DecoderModel
from headrace.models.family import Family
from headrace.models.registry import family_of, read_config
from headrace.quantization.containers import QuantizedCheckpoint
from headrace.quantization.ggml import PackedEmbedding, PackedHead, packed_linear
from headrace.quantization.keep import quantized_experts, quantized_linear
from headrace.quantization.registry import PackedSource, can_keep

__all__ = [
    "InFiles",
    "Progress",
    "Transform",
    "WeightSource",
    "linear_sources",
    "load_decoder",
    "random_weights",
]

Progress = Callable[[int, int], None]  # bytes done, bytes in all (of the loaded model)
Transform = Callable[[str, Linear], nn.Module]  # path and loaded linear -> what replaces it

# Where the decoder's tensors may lie within a checkpoint.
_PREFIXES = ("model.", "", "language_model.model.", "model.language_model.", "transformer.")
_ROOT = "embed_tokens.weight"
_QKV = "layers.{}.attention.qkv"


class WeightSource(Protocol):
    """A checkpoint's tensors by the names of its Hugging Face layout."""

    def names(self) -> Iterable[str]:
        """All tensors."""
        ...

    def load(self, name: str) -> Tensor:
        """One tensor, mapped if possible and in the type it is stored in."""
        ...


def load_decoder(
    config: Mapping[str, Any],
    weights: WeightSource,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: Progress | None = None,
    transform: Transform | None = None,
    keep_packed: bool = False,
) -> DecoderModel:
    """Build the decoder that `config.json` declares and fill it from a checkpoint.

    Memory for a parameter is taken when its first tensor arrives: there are never two copies of the weights.

    Args:
        config: `config.json`, parsed.
        transform: replaces each linear layer as soon as it is loaded (quantization), before the next one
            takes memory. A tied head is not one of them.
        keep_packed: matrices that the checkpoint stores in few bits stay so (quantization/ggml.py, keep.py).

    Raises:
        UnknownArchitecture, UnsupportedCheckpoint: see read_config; or a tensor is missing, has no place, or
            has another shape than the declaration says.
    """
    family, architecture = family_of(config)
    declared = read_config(config)
    model = DecoderModel(declared, dtype=dtype, device="meta")
    loader = _Loader(model, weights, family, architecture, torch.device(device))
    loader.check_names(family.ignored)
    if keep_packed:
        if isinstance(weights, QuantizedCheckpoint):
            loader.keep_quantized(weights)
        else:
            assert isinstance(weights, PackedSource)
            loader.keep_packed(weights)
    loader.fill(progress, transform)
    _finish(model)
    return model


def linear_sources(config: Mapping[str, Any], weights: WeightSource) -> dict[str, tuple[str, ...]]:
    """Path of each linear within the decoder -> the checkpoint's tensors that make up its weight, in order."""
    family, architecture = family_of(config)
    model = DecoderModel(read_config(config), dtype=torch.float32, device="meta")
    loader = _Loader(model, weights, family, architecture, torch.device("meta"))
    return {
        path: loader.sources[f"{path}.weight"]
        for path, module in model.named_modules()
        if isinstance(module, Linear)
    }


def random_weights(
    config: DecoderConfig, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> DecoderModel:
    """A decoder with random weights made on the device: right shapes and finite numbers, no sense."""
    model = DecoderModel(config, dtype=dtype, device="meta")
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for name, shell in list(module.named_parameters(recurse=False)):
            full = parameter(*shell.shape, dtype=shell.dtype, device=device)
            if shell.dim() == 1:
                full.data.fill_(0.0 if name == "bias" or config.norm == "rms_plus_one" else 1.0)
            else:
                full.data.normal_(0.0, 0.02, generator=generator)
            setattr(module, name, full)
    _finish(model)
    return model


def _finish(model: DecoderModel) -> None:
    """Let every module derive what follows from its weights; the model itself comes last."""
    for module in list(model.modules())[::-1]:
        finish = getattr(module, "finish", None)
        if finish is not None:
            finish()
    model.eval()


def _parts(module: nn.Module, full: Tensor, count: int) -> Sequence[Tensor]:
    """Where ``count`` tensors of a checkpoint go: the parts of a projection, or all of it in one."""
    if count > 1:
        assert isinstance(module, Linear)
        return tuple(full.split(module.parts))
    if isinstance(module, ExpertLinear):
        full = full.view(module.num_experts, -1, *full.shape[1:])
    return (full,)


def _key(module: str) -> tuple[str, str]:
    """A module's name in WeightNames, and its layer."""
    words = module.split(".")
    return (".".join(["layers", "{}", *words[2:]]), words[1]) if words[0] == "layers" else (module, "")


class _Loader:
    """Moves one checkpoint into one model on the meta device."""

    def __init__(
        self,
        model: DecoderModel,
        weights: WeightSource,
        family: Family,
        architecture: str,
        device: torch.device,
    ) -> None:
        self.model, self.weights, self.family = model, weights, family
        self.architecture, self.device = architecture, device
        self.names = set(weights.names())
        self.prefix = self._find_prefix()
        self.sources = {path: self._sources(path) for path, _ in model.named_parameters()}

    def _find_prefix(self) -> str:
        for prefix in _PREFIXES:
            if prefix + _ROOT in self.names:
                return prefix
        raise UnsupportedCheckpoint(
            f"the checkpoint of {self.architecture} holds no tensor {_ROOT!r} "
            f"(looked for it after {', '.join(map(repr, _PREFIXES))}); the names it has begin with "
            f"{sorted(self.names)[:3]}",
            param=_ROOT,
        )

    def _sources(self, path: str) -> tuple[str, ...]:
        """Tensors that make up one parameter, in order."""
        module, _, parameter_name = path.rpartition(".")
        if module == "head":
            return (self._head(),)
        key, layer = _key(module)
        found = self.model.get_submodule(module)
        count = found.num_experts if isinstance(found, ExpertLinear) else 1
        names = [name.format(layer, expert=i) for i in range(count) for name in self.family.names[key]]
        each = tuple(f"{self.prefix}{name}.{parameter_name}" for name in names)
        if key in self.family.fused and each[0] not in self.names:
            ending = "" if parameter_name == "weight" else f"_{parameter_name}"
            whole = f"{self.prefix}{self.family.fused[key].format(layer)}{ending}"
            if whole in self.names:
                return (whole,)
        return each

    def _head(self) -> str:
        candidates = ("lm_head.weight", self.prefix.removesuffix("model.") + "lm_head.weight")
        return next((name for name in candidates if name in self.names), candidates[0])

    def check_names(self, ignored: tuple[str, ...]) -> None:
        """Refuse missing tensors and tensors without a place, before any is read."""
        wanted = {name: path for path, names in self.sources.items() for name in names}
        missing = sorted(wanted.keys() - self.names)
        if missing:
            shape = list(self.model.get_parameter(wanted[missing[0]]).shape)
            raise UnsupportedCheckpoint(
                f"the checkpoint of {self.architecture} lacks the tensor {missing[0]!r} (part of {shape})"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
                param=missing[0],
            )
        for name in sorted(self.names - wanted.keys()):
            rotary = name.endswith(("rotary_emb.inv_freq", ".masked_bias", ".rotary_emb.cos_cached"))
            spare_head = self.model.head is None and name.endswith("lm_head.weight")
            if not (rotary or spare_head or name.startswith(ignored or ("\0",))):
                shape = list(self.weights.load(name).shape)
                raise UnsupportedCheckpoint(
                    f"the checkpoint holds the tensor {name!r} {shape}, for which {self.architecture} "
                    "has no place; it was made by another model, or config.json is not its own",
                    param=name,
                )

    def keep_packed(self, weights: PackedSource) -> None:
        """Swap every matrix that is stored in blocks; ``fill`` then finds only the others."""
        for path, module in list(self.model.named_modules()):
            sources = self.sources.get(f"{path}.weight", ())
            matrix = isinstance(module, (Linear, Embedding))
            if not matrix or not sources or not all(can_keep(weights.info(name)) for name in sources):
                continue
            shell = self.model.get_parameter(f"{path}.weight")
            self._check_matrices(path, sources, [weights.info(name).shape for name in sources])
            tensors = [weights.load_packed(name) for name in sources]
            if isinstance(module, Linear):
                kept: nn.Module
                if path == "head":
                    kept = PackedHead(tensors[0])
                else:
                    kept = packed_linear(tensors, bias=self._bias(path))
            else:
                kept = PackedEmbedding(tensors[0], scale=module.scale, dtype=shell.dtype)
                if self.model.config.tied and not self.model.config.headless:
                    self.model.head = PackedHead(tensors[0])  # type: ignore[assignment]
            self.model.set_submodule(path, kept)

    def keep_quantized(self, weights: QuantizedCheckpoint) -> None:
        """Swap every linear whose matrices are quantized; ``fill`` then finds only the others."""
        for path, module in list(self.model.named_modules()):
            if not isinstance(module, Linear):
                continue
            names = self.sources[f"{path}.weight"]
            shapes = [weights.info(name).shape for name in names]
            if any(name in weights.modules for name in names):
                self._check_matrices(path, names, shapes)
            bias = self._bias(path)
            dtype = self.model.get_parameter(f"{path}.weight").dtype
            if isinstance(module, ExpertLinear):
                kept = quantized_experts(weights, names, module.num_experts, bias, dtype, self.device)
            else:
                lies = zip(self.arrangements(path, names), shapes)
                orders = [None if lie is None else lie.arranged(torch.arange(n[0])) for lie, n in lies]
                kept = quantized_linear(weights, names, bias, dtype, self.device, orders)
            if kept is not None:
                self.model.set_submodule(path, kept)

    def _check_matrices(self, path: str, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
        """Refuse matrices to be kept packed unless each has the rows of its part (one: of all), and the columns."""
        rows, columns = self.model.get_parameter(f"{path}.weight").shape
        module = self.model.get_submodule(path)
        parts = module.parts if isinstance(module, Linear) and len(names) > 1 else (rows,)
        for name, shape, part in zip(names, shapes, parts, strict=True):
            self._check_shape(name, (math.prod(shape[:-1]), shape[-1]), (part, columns))

    def _bias(self, path: str) -> Tensor | None:
        """A linear's, as a whole."""
        sources = self.sources.get(f"{path}.bias", ())
        if not sources:
            return None
        full = torch.empty_like(self.model.get_parameter(f"{path}.bias"), device="cpu")
        parts = _parts(self.model.get_submodule(path), full, len(sources))
        for name, part, lie in zip(sources, parts, self.arrangements(path, sources), strict=True):
            part.copy_(self._load(name, tuple(part.shape), lie))
        return full

    def fill(self, progress: Progress | None, transform: Transform | None) -> None:
        """Read every tensor once, module by module."""
        sizes = [p.numel() * p.element_size() for p in self.model.parameters()]
        done, total = 0, sum(sizes)

        def placed(size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done, total)

        uploader = uploader_for(self.weights, self.device)
        try:
            for path, module in list(self.model.named_modules()):
                for name, shell in list(module.named_parameters(recurse=False)):
                    full = parameter(*shell.shape, dtype=shell.dtype, device=self.device)
                    sources = self.sources[f"{path}.{name}"]
                    parts = _parts(module, full.data, len(sources))
                    lies = self.arrangements(path, sources)
                    for source, part, lie in zip(sources, parts, lies, strict=True):
                        self._place(source, part, placed, uploader, lie)
                    setattr(module, name, full)
                if transform is not None and isinstance(module, Linear):
                    if uploader is not None:
                        uploader.flush()
                    self.model.set_submodule(path, transform(path, module))
            if uploader is not None:
                uploader.flush()
        finally:
            if uploader is not None:
                uploader.close()

    def arrangements(self, path: str, sources: Sequence[str]) -> Sequence[Arrangement | None]:
        """How each of the tensors lies in the file, where it must be arranged (packed experts are)."""
        key, config = _key(path)[0], self.model.config
        if config.rope_neighbours and key == _QKV:
            pairs = NeighbourPairs(config.head_dim, config.rope.dim)
            return pairs, pairs, None
        packed = isinstance(self.weights, QuantizedCheckpoint) and sources[0] in self.weights.modules
        return [self.family.stacked.get(key) if len(sources) == 1 and not packed else None] * len(sources)

    def _place(
        self,
        name: str,
        destination: Tensor,
        placed: Callable[[int], None],
        uploader: Uploader | None,
        lie: Arrangement | None,
    ) -> None:
        """Copy a tensor, or have it copied, and say how large it was when it is there."""
        size = destination.numel() * destination.element_size()
        region = None
        if uploader is not None and lie is None and isinstance(self.weights, InFiles):
            region = self.weights.region(name)
        if uploader is not None and region is not None:
            self._check_shape(name, region.shape, tuple(destination.shape))
            uploader.add(Upload(region, destination, lambda: placed(size)))
            return
        destination.copy_(self._load(name, tuple(destination.shape), lie))
        placed(size)

    def _load(self, name: str, wanted: tuple[int, ...], lie: Arrangement | None) -> Tensor:
        tensor = self.weights.load(name)
        self._check_shape(name, tuple(tensor.shape), wanted if lie is None else lie.shape(wanted))
        return tensor if lie is None else lie.arranged(tensor.to(self.device))

    def _check_shape(self, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if shape != wanted:
            raise UnsupportedCheckpoint(
                f"tensor {name!r} has shape {list(shape)}; expected {list(wanted)} "
                f"by config.json of {self.architecture}",
                param=name,
            )
