"""Heads of the families as data: which layers follow the hidden states, and what checkpoints call them.

A step is ``linear NAME``, ``norm NAME`` or an activation. Names after ``~`` take the backbone's prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from headrace.checkpoints.base import Checkpoint
from headrace.errors import MissingFile, UnsupportedCheckpoint
from headrace.layers.dense import Dense
from headrace.layers.heads import Activation, Chain, Projection
from headrace.layers.norm import LayerNorm
from headrace.models.encode_card import ModuleSpec
from headrace.models.encoder_weights import load_module
from headrace.models.reading import ACTIVATION_NAMES

__all__ = ["HeadBuilder", "classifier_steps", "mlm_steps", "token_classifier_steps"]

_ROBERTA_LIKE = ("roberta", "xlm-roberta", "camembert", "mpnet")


def classifier_steps(config: Mapping[str, Any], *, two_layers: bool = False) -> tuple[str, list[str]]:
    """Pooling and steps of ``*ForSequenceClassification`` and ``*ForRewardModel``."""
    kind = config.get("model_type")
    if kind in _ROBERTA_LIKE:
        return "cls", ["linear classifier.dense", "tanh", "linear classifier.out_proj"]
    if kind == "distilbert":
        return "cls", ["linear pre_classifier", "relu", "linear classifier"]
    if kind == "modernbert":
        pooling = str(config.get("classifier_pooling", "cls"))
        return pooling, [*_modernbert_head(config), "linear classifier"]
    if kind == "eurobert":
        # The authors' files say clf_pooling, transformers says classifier_pooling.
        word = str(config.get("classifier_pooling") or config.get("clf_pooling") or "late")
        pooling = {"bos": "cls", "mean": "mean", "late": "late_mean"}.get(word, "")
        if not pooling:
            raise UnsupportedCheckpoint(f"classifier_pooling is {word!r}; expected bos, mean or late")
        return pooling, ["linear dense", "gelu", "linear classifier"]
    if kind in ("bert", "gte", "new", "nomic_bert"):
        return "cls", ["linear ~pooler.dense", "tanh", "linear classifier"]
    # Causal models. Reward models of two layers keep them in a Sequential.
    return "last_real", ["linear score.0", "relu", "linear score.2"] if two_layers else ["linear score"]


def token_classifier_steps(config: Mapping[str, Any], *, causal: bool = False) -> list[str]:
    """Steps of ``*ForTokenClassification``."""
    if config.get("model_type") == "modernbert":
        return [*_modernbert_head(config), "linear classifier"]
    return ["linear score" if causal else "linear classifier"]


def mlm_steps(config: Mapping[str, Any]) -> list[str]:
    """Steps of ``*ForMaskedLM``; the last one is the tied vocabulary map."""
    kind = config.get("model_type")
    act = ACTIVATION_NAMES.get(str(config.get("hidden_act", "gelu")), "gelu")
    if kind in _ROBERTA_LIKE:
        return [
            "linear lm_head.dense",
            "gelu",
            "norm lm_head.layer_norm",
            "vocab lm_head.decoder lm_head.bias",
        ]
    if kind == "distilbert":
        act = ACTIVATION_NAMES.get(str(config.get("activation", "gelu")), "gelu")
        return [
            "linear vocab_transform",
            act,
            "norm vocab_layer_norm",
            "vocab vocab_projector vocab_projector.bias",
        ]
    if kind == "modernbert":
        return [*_modernbert_head(config), "vocab decoder decoder.bias"]
    if kind in ("gte", "new"):
        return [
            "linear lm_head.dense",
            act,
            "norm lm_head.norm",
            "vocab lm_head.decoder lm_head.decoder.bias",
        ]
    if kind in ("bert", "nomic_bert"):
        head, norm = "cls.predictions.", "LayerNorm" if kind == "bert" else "layer_norm"
        transform = [f"linear {head}transform.dense", act, f"norm {head}transform.{norm}"]
        return [*transform, f"vocab {head}decoder {head}bias"]
    raise UnsupportedCheckpoint(f"no masked-LM head is declared for model_type {kind!r}")


def _modernbert_head(config: Mapping[str, Any]) -> list[str]:
    act = ACTIVATION_NAMES.get(str(config.get("classifier_activation", "gelu")), "gelu")
    return ["linear head.dense", act, "norm head.norm"]


class HeadBuilder:
    """Makes and fills the layers of a head.

    Args:
        prefix: of the backbone's names in this checkpoint.
        word: the word table's name without ``.weight``, for vocabulary maps that are tied to it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        prefix: str,
        word: str,
        norm_eps: float,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.checkpoint, self.prefix, self.word = checkpoint, prefix, word
        self.norm_eps, self.dtype, self.device = norm_eps, dtype, device
        self.known = set(checkpoint.names())

    def chain(self, steps: list[str], outputs: int | None = None) -> Chain:
        """Build the steps; ``outputs`` is what the last linear map must have (one for each label)."""
        layers: list[Dense | Activation | LayerNorm | Projection] = []
        for step in steps:
            kind, *names = step.split()
            names = [self.prefix + name[1:] if name.startswith("~") else name for name in names]
            if kind == "linear":
                layers.append(self.linear(names[0]))
            elif kind == "norm":
                layers.append(self.norm(names[0]))
            elif kind == "vocab":
                layers.append(self.vocabulary(*names))
            else:
                layers.append(Activation(kind))
        last = layers[-1]
        if outputs is not None and isinstance(last, Dense) and last.out_features != outputs:
            raise UnsupportedCheckpoint(
                f"id2label names {outputs} labels; {steps[-1].split()[1]} has {last.out_features} outputs",
                param="id2label",
            )
        return Chain(*layers)

    def linear(self, name: str, dtype: torch.dtype | None = None) -> Dense:
        """A linear map whose sizes and bias are those of the checkpoint."""
        size_out, size_in = self._shape(name)
        bias = f"{name}.bias" in self.known
        layer = Dense(size_in, size_out, bias=bias, dtype=dtype or self.dtype, device=self.device)
        load_module(layer, self.checkpoint, name)
        layer.finish()
        return layer

    def norm(self, name: str) -> LayerNorm:
        size = self._shape(name)[0]
        bias = f"{name}.bias" in self.known or f"{name}.beta" in self.known
        layer = LayerNorm(size, self.norm_eps, bias=bias, dtype=self.dtype, device=self.device)
        load_module(layer, self.checkpoint, name)
        return layer

    def vocabulary(self, name: str, bias: str) -> Dense:
        """The map to the vocabulary: its own weight if the checkpoint has one, else the word table."""
        source = f"{name}.weight" if f"{name}.weight" in self.known else f"{self.word}.weight"
        weight = self.checkpoint.load(source, self.dtype)
        # Two spellings of one bias: beside the decoder, or the decoder's own.
        found = next((b for b in (bias, f"{name}.bias") if b in self.known), None)
        layer = Dense(
            weight.shape[1], weight.shape[0], bias=found is not None, dtype=self.dtype, device=self.device
        )
        layer.weight.data.copy_(weight)
        if found is not None and layer.bias is not None:
            layer.bias.data.copy_(self.checkpoint.load(found, self.dtype))
        layer.finish()
        return layer

    def module(self, spec: ModuleSpec) -> Projection | LayerNorm:
        """A sentence-transformers module from its own folder, or ColBERT's ``linear`` beside the backbone."""
        if not spec.folder:
            return Projection(self.linear("linear", torch.float32), spec.activation, None, False)
        file = self.checkpoint.path / spec.folder / "model.safetensors"
        tensors = _small_safetensors(file)
        if spec.kind == "layer_norm":
            norm = LayerNorm(spec.size_in, 1e-5, dtype=torch.float32, device=self.device)
            norm.weight.data.copy_(tensors["norm.weight"])
            assert norm.bias is not None
            norm.bias.data.copy_(tensors["norm.bias"])
            return norm
        linear = self._dense(file, tensors, "linear.", spec.size_in, spec.size_out, spec.bias)
        residual = None
        if spec.residual and spec.size_in != spec.size_out:
            residual = self._dense(file, tensors, "residual.", spec.size_in, spec.size_out, False)
        return Projection(linear, spec.activation, residual, spec.residual)

    def beside(self, stem: str, outputs: int | None = None) -> Dense:
        """BGE-M3's ``sparse_linear`` or ``colbert_linear``, a file of its own with ``weight`` and ``bias``."""
        file = self.checkpoint.path / f"{stem}.safetensors"
        pickled = file.with_suffix(".pt")
        if not file.exists() and pickled.exists():
            raise UnsupportedCheckpoint(
                f"{pickled} is a pickle, which may run code when it is read, so it is refused. Convert it once, "
                f"where you trust it: safetensors.torch.save_file(torch.load('{pickled.name}', "
                f"weights_only=True), '{file.name}'); or serve the dense vectors alone with --pooling cls"
            )
        tensors = _small_safetensors(file)
        if "weight" not in tensors:
            raise UnsupportedCheckpoint(f"{file} holds {sorted(tensors)}; expected weight and bias")
        size_out, size_in = tensors["weight"].shape
        if outputs is not None and size_out != outputs:
            raise UnsupportedCheckpoint(f"{file}: weight has {size_out} rows; expected {outputs}")
        return self._dense(file, tensors, "", size_in, size_out, "bias" in tensors)

    def _dense(
        self, file: Path, tensors: dict[str, torch.Tensor], name: str, inputs: int, outputs: int, bias: bool
    ) -> Dense:
        """Modules after pooling stay in float32: they are small, and vectors leave in float32."""
        layer = Dense(inputs, outputs, bias=bias, dtype=torch.float32, device=self.device)
        for leaf, target in layer.named_parameters():
            value = tensors.get(name + leaf)
            if value is None or value.shape != target.shape:
                got = "missing" if value is None else f"{list(value.shape)}"
                raise UnsupportedCheckpoint(f"{file}: {name}{leaf} is {got}; expected {list(target.shape)}")
            target.data.copy_(value)
        layer.finish()
        return layer

    def _shape(self, name: str) -> tuple[int, ...]:
        for leaf in ("weight", "gamma"):
            if f"{name}.{leaf}" in self.known:
                return self.checkpoint.info(f"{name}.{leaf}").shape
        raise UnsupportedCheckpoint(
            f"{self.checkpoint.path} has no tensor {name}.weight, which its architecture calls for"
        )


def _small_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of one file; pickled weights are refused."""
    if not file.exists():
        pickled = file.with_name("pytorch_model.bin")
        if pickled.exists():
            raise UnsupportedCheckpoint(
                f"{pickled} is a pickle, which may run code when it is read, so it is refused: save the "
                f"module as {file.name} (sentence-transformers does with save_pretrained)"
            )
        raise MissingFile(f"{file} is missing; modules.json names its folder")
    from safetensors.torch import load_file

    return load_file(file)
