"""A loaded embedder in eight bits: weights rounded once, activations where they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from headrace.errors import UnsupportedCheckpoint
from headrace.kernels.rounding import BLOCK, Format
from headrace.layers.attention import Attention
from headrace.layers.dense import Dense
from headrace.layers.eight_bits import EightBitLinear, PlainNorm, RoundingGate, RoundingNorm
from headrace.layers.linear import Linear
from headrace.layers.mlp import GatedMLP
from headrace.layers.norm import LayerNorm, RMSNorm
from headrace.models.decoder import DecoderModel
from headrace.models.encoder import EncoderModel

__all__ = ["EightBits", "round_to_eight_bits", "to_eight_bits"]

_SHRINKING = ("gelu", "gelu_tanh", "relu", "silu", "tanh")  # |f(x)| <= |x|


@dataclass(frozen=True)
class EightBits:
    """Which numbers, and where.

    Attributes:
        mlp_only: attention keeps its 16 bits.
    """

    format: Format
    mlp_only: bool = False

    def transform(self, path: str, linear: Linear) -> nn.Module:
        """Convert a decoder's linear as soon as it is loaded, before the next one takes memory."""
        if path == "head" or (self.mlp_only and ".mlp." not in path):
            return linear
        return to_eight_bits(linear, self.format)


def to_eight_bits(linear: nn.Module, format: Format) -> EightBitLinear:
    """A linear in eight bits; its 16-bit weights can go.

    Raises UnsupportedCheckpoint for widths that no kernel takes.
    """
    if isinstance(linear, EightBitLinear):
        return linear
    assert isinstance(linear, Linear)
    step = BLOCK if format == "int8" else 16
    if linear.in_features % step or linear.out_features % 16:
        raise UnsupportedCheckpoint(
            f"quantization {format} takes matrices of multiples of 16 by {step}; this checkpoint has one of "
            f"{linear.out_features} x {linear.in_features}: leave quantization out",
            param="quantization",
        )
    activation = linear.activation if isinstance(linear, Dense) else None
    return EightBitLinear(linear.weight.data, linear.bias, format, parts=linear.parts, activation=activation)


def round_to_eight_bits(model: nn.Module, how: EightBits) -> None:
    """Convert the linears of every layer of an encoder or decoder, before an encoder's are packed.

    Embeddings, norms, heads, poolers and layers of experts stay in 16 bits.
    """
    assert isinstance(model, (EncoderModel, DecoderModel))
    layers: list[Any] = list(model.layers)
    format = how.format
    for layer in layers:
        _convert(layer, format, how.mlp_only)
    if isinstance(model, EncoderModel) and not model.config.pre_norm:
        _norms_after(model, layers, format)
        before = [model.embedding_norm, *(layer.mlp_norm for layer in layers)]
        norms = [(norm, layer.attention_norm) for norm, layer in zip(before, layers)]
    else:
        for layer in layers:
            layer.attention_norm = _norm_before(layer.attention_norm, layer.attention.qkv, format)
            layer.mlp_norm = _norm_before(layer.mlp_norm, _first(layer.mlp), format)
        norms = [(layer.attention_norm, layer.mlp_norm) for layer in layers]
    if format == "fp8":
        for layer, (first, second) in zip(layers, norms, strict=True):
            _bound(layer, first, second)


def _bound(layer: Any, before_attention: nn.Module, before_mlp: nn.Module) -> None:
    """Find how large values and activations can become, so that they are rounded where they are made."""
    attention, up = layer.attention, _first(layer.mlp)
    qkv = attention.qkv
    if (
        isinstance(qkv, EightBitLinear)
        and isinstance(before_attention, RoundingNorm)
        and type(attention) is Attention
    ):
        values = slice(sum(qkv.parts[:2]), None)
        attention.bound = qkv.bound_of(before_attention.norm, values)
    if (
        isinstance(up, EightBitLinear)
        and isinstance(before_mlp, RoundingNorm)
        and up.rounds
        and up.activation in _SHRINKING
    ):
        up.bound = up.bound_of(before_mlp.norm)


def _convert(layer: Any, format: Format, mlp_only: bool) -> None:
    attention, mlp = layer.attention, layer.mlp
    if not mlp_only:
        attention.qkv, attention.o = to_eight_bits(attention.qkv, format), to_eight_bits(attention.o, format)
    if isinstance(mlp, GatedMLP):
        gate: Any = RoundingGate(mlp.activation, format)
        mlp.gate_up, mlp.down, mlp.gate = (
            to_eight_bits(mlp.gate_up, format),
            to_eight_bits(mlp.down, format),
            gate,
        )
    elif isinstance(mlp, nn.Sequential):
        up, down = (
            to_eight_bits(mlp.get_submodule("up"), format),
            to_eight_bits(mlp.get_submodule("down"), format),
        )
        up.rounds = True
        mlp.up, mlp.down = up, down


def _first(mlp: nn.Module) -> nn.Module | None:
    """What reads a block's input."""
    return next((child for name, child in mlp.named_children() if name in ("gate_up", "up")), None)


def _norm_before(norm: nn.Module, reader: nn.Module | None, format: Format) -> nn.Module:
    """A norm that rounds, if it is one and what reads it takes eight bits."""
    if isinstance(norm, (LayerNorm, RMSNorm)) and isinstance(reader, EightBitLinear):
        return RoundingNorm(norm, format, full=False)
    return norm


def _norms_after(model: EncoderModel, layers: list[Any], format: Format) -> None:
    """Norms after the sums: each is read by the next block, and added to what that gives."""

    def norm_after(norm: nn.Module, reader: nn.Module | None) -> Any:
        assert isinstance(norm, (LayerNorm, RMSNorm))
        rounds = isinstance(reader, EightBitLinear)
        return RoundingNorm(norm, format, full=True) if rounds else PlainNorm(norm)

    following = [layer.attention.qkv for layer in layers[1:]] + [None]
    if isinstance(model.embedding_norm, (LayerNorm, RMSNorm)) and isinstance(
        layers[0].attention.qkv, EightBitLinear
    ):
        rounding: Any = RoundingNorm(model.embedding_norm, format, full=True)
        model.embedding_norm = rounding
    for layer, reader in zip(layers, following):
        layer.attention_norm = norm_after(layer.attention_norm, _first(layer.mlp))
        layer.mlp_norm = norm_after(layer.mlp_norm, reader)
