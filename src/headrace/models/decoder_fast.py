"""The decode step of a DecoderModel in few kernels, equal to its plain forward.

Up to STREAM_ROWS sequences a layer is five kernels: [norm, qkv] [norm of heads, rotary, cache write, attention]
[o, residual] [norm, gate and up, activation] [down, residual], each of which may start while the one before it ends.
For one sequence (where nothing faster is known), and up to SMALL_ROWS of quantized layers or on GPUs without a copy
engine, the norm is taken in the loop of the product that follows it; else by the product before it
(kernels/linear/triton_stream.py). Above, the products are cuBLAS's and the rest is fused around them. Imported on GPUs
only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.kernels import rounding
from headrace.kernels.activation.triton import gelu_mul, gelu_tanh_mul, silu_mul
from headrace.kernels.attention.triton_decode import DecodeWorkspace, QKNormRope, decode_attention
from headrace.kernels.linear import GATES, MAX_ROWS
from headrace.kernels.linear.triton import argmax_linear, small_linear
from headrace.kernels.linear.triton_stream import (
    Stream,
    add_linear,
    begin_stream,
    stream_argmax,
    stream_covers,
    stream_linear,
    stream_takes_one_row,
)
from headrace.kernels.norm.triton import add_rms_norm, rms_norm
from headrace.kernels.rounding import Rounded
from headrace.kernels.step.triton import reduce_best
from headrace.layers.attention import HeadNorm
from headrace.layers.experts import ExpertLinear, MixtureOfExperts
from headrace.layers.linear import Linear
from headrace.layers.mlp import GatedMLP
from headrace.layers.norm import RMSNorm
from headrace.layers.packed import AttentionBatch, LayerCache, PackedBatch
from headrace.layers.rotary import Rotary
from headrace.layers.rounded import takes_rounded
from headrace.models.decoder import DecoderLayer, DecoderModel
from headrace.quantization import device as scaled_kernels
from headrace.quantization.experts import ScaledExperts
from headrace.quantization.scaled import ScaledLinear

__all__ = ["DecodeBatch", "FastDecoder", "reason_against"]

SMALL_ROWS = MAX_ROWS
STREAM_ROWS = 64
_GATE_MUL = {"silu": silu_mul, "gelu": gelu_mul, "gelu_tanh": gelu_tanh_mul}


def reason_against(model: DecoderModel) -> str | None:
    """Why this model must take the plain forward, or None if the fast step covers it."""
    config = model.config
    checks = {
        "norm": config.norm in ("rms", "rms_plus_one") and config.norm_place == "pre",
        "qk_norm": config.qk_norm in ("none", "head"),
        "gated_mlp": config.gated_mlp and config.activation in GATES,
        "residual_multiplier": config.residual_multiplier == 1.0,
        "rope": not any(r is not None and r.length_dependent for r in (config.rope, config.local_rope)),
        "head": model.head is not None,
        "linear layers": all(_covered(m) for m in model.modules() if hasattr(m, "in_features")),
    }
    return next((name for name, fine in checks.items() if not fine), None)


def _covered(module: nn.Module) -> bool:
    if isinstance(module, (Linear, ScaledExperts)):
        return type(module) in (Linear, ExpertLinear, ScaledExperts)
    return isinstance(module, ScaledLinear) and scaled_kernels.has_kernel(module)


def _linear(
    x: Tensor,
    linear: Linear | ScaledLinear,
    *,
    norm: tuple[Tensor, float] | None = None,
    gate: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear of few rows with what stands around it, whatever its weights are."""
    if isinstance(linear, ScaledLinear):
        return scaled_kernels.fused(linear, x, norm=norm, gate=gate, residual=residual)
    return small_linear(x, linear.weight, norm=norm, bias=linear.bias, gate=gate, residual=residual)


@dataclass(slots=True)
class DecodeBatch:
    """One new token for each of B sequences, all on the device.

    Attributes:
        embedded: [B, D], overwritten.
        seq_lens: int32 [B], keys including the new ones.
        rows: int32 [B], each sequence's row of ``tables`` int32 [R, W].
        workspace: of at least B sequences.
        long: attention is cut for long sequences (is_long).
    """

    embedded: Tensor
    seq_lens: Tensor
    rows: Tensor
    tables: Tensor
    caches: list[LayerCache]
    workspace: DecodeWorkspace
    long: bool


@dataclass(slots=True)
class _Layer:
    """A layer's weights, looked up once. Gains are (weight, eps). Where a mixture is, gate_up and down are not."""

    attention_norm: tuple[Tensor, float]
    qkv: Linear | ScaledLinear
    heads: QKNormRope
    o: Linear | ScaledLinear
    mlp_norm: tuple[Tensor, float]
    gate_up: Linear | ScaledLinear | None
    down: Linear | ScaledLinear | None
    mixture: MixtureOfExperts | None
    scale: float
    window: int | None
    sinks: Tensor | None


class FastDecoder:
    """Runs decode steps of a model that `reason_against` has nothing against.

    Args:
        model: finished, on a GPU.
        max_model_len: positions that the rotary tables are made for.
    """

    def __init__(self, model: DecoderModel, max_model_len: int) -> None:
        self.model = model
        config = self.config = model.config
        assert model.rope is not None and model.head is not None
        self.head: Tensor | None = (
            model.head.weight if isinstance(model.head, Linear) else None
        )  # None: packed
        assert isinstance(model.norm, RMSNorm)
        self.final_norm = (model.norm.weight, model.norm.eps)
        self.device = device = model.embed.weight.device
        full = _rope_table(model.rope, max_model_len, device)
        local = full if model.local_rope is None else _rope_table(model.local_rope, max_model_len, device)
        self.layers: list[_Layer] = []
        for i, layer in enumerate(model.layers):
            assert isinstance(layer, DecoderLayer)
            tables = full if config.windows[i] is None else local
            self.layers.append(_read_layer(layer, None if i in config.no_rope_layers else tables))
        head = self.head
        covered = head is not None and stream_covers(head) and all(_streams(layer) for layer in self.layers)
        self.stream_rows = STREAM_ROWS if covered else 0
        self.one_row_streams = covered and all(
            stream_takes_one_row(weight, gated)
            for weight, gated in [(head, False), *(w for layer in self.layers for w in _weights(layer))]
            if weight is not None
        )

    def workspace(self, num_seqs: int) -> DecodeWorkspace:
        """Scratch for steps of up to ``num_seqs`` sequences."""
        c = self.config
        return DecodeWorkspace.allocate(num_seqs, c.num_heads, c.num_kv_heads, c.head_dim, self.device)

    def tokens(self, batch: DecodeBatch, last_tokens: Tensor) -> Tensor:
        """The most likely next tokens, int64 [B] (-1: not finite), also written to last_tokens[rows]."""
        if self.head is None:
            return reduce_best(self.logits(batch), None, last_tokens=last_tokens, rows=batch.rows)
        if self._takes_stream(batch):
            return stream_argmax(
                self._stream(batch),
                self.head,
                eps=self.final_norm[1],
                last_tokens=last_tokens,
                rows=batch.rows,
            )
        if batch.embedded.shape[0] <= SMALL_ROWS:
            x = self._small(batch)
            return argmax_linear(x, self.head, norm=self.final_norm, last_tokens=last_tokens, rows=batch.rows)
        logits = F.linear(self._large(batch), self.head)
        return reduce_best(logits, None, last_tokens=last_tokens, rows=batch.rows)

    def logits(self, batch: DecodeBatch) -> Tensor:
        """float32 [B, V], as DecoderModel.logits."""
        small = batch.embedded.shape[0] <= SMALL_ROWS
        if self.head is None:
            return self.model.logits(
                rms_norm(self._small(batch), *self.final_norm) if small else self._large(batch)
            )
        if self._takes_stream(batch):
            logits = stream_linear(
                self._stream(batch), self.head, eps=self.final_norm[1], out_dtype=torch.float32
            )
            return self.model.adjust_logits(logits)
        if small:
            logits = small_linear(
                self._small(batch), self.head, norm=self.final_norm, out_dtype=torch.float32
            )
            return self.model.adjust_logits(logits)
        return self.model.logits(self._large(batch))

    def _attend(self, qkv: Tensor, layer: _Layer, index: int, batch: DecodeBatch) -> Tensor:
        c = self.config
        heads = qkv.view(qkv.shape[0], c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        q, k, v = heads.split([c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        cache = batch.caches[index]
        out = decode_attention(
            q, cache.k, cache.v, batch.tables, batch.seq_lens, batch.workspace,
            scale=layer.scale, window=layer.window, soft_cap=c.attention_soft_cap, sinks=layer.sinks,
            rows=batch.rows, new_k=k, new_v=v, fused=layer.heads, long=batch.long,
        )  # fmt: skip
        return out.flatten(1)

    def _takes_stream(self, batch: DecodeBatch) -> bool:
        return (0 if self.one_row_streams else 1) < batch.embedded.shape[0] <= self.stream_rows

    def _stream(self, batch: DecodeBatch) -> Stream:
        """The residual stream before the last norm."""
        stream = begin_stream(batch.embedded, self.layers[0].attention_norm[0])
        for i, layer in enumerate(self.layers):
            qkv, o, gate_up, down = layer.qkv, layer.o, layer.gate_up, layer.down
            assert isinstance(qkv, Linear) and isinstance(o, Linear)
            assert isinstance(gate_up, Linear) and isinstance(down, Linear)
            heads = stream_linear(stream, qkv.weight, eps=layer.attention_norm[1], bias=qkv.bias)
            out = self._attend(heads, layer, i, batch)
            stream = add_linear(out, o.weight, stream, layer.mlp_norm[0], bias=o.bias)
            inner = stream_linear(
                stream, gate_up.weight, eps=layer.mlp_norm[1], bias=gate_up.bias, gate=self.config.activation
            )
            following = self.layers[i + 1].attention_norm if i + 1 < len(self.layers) else self.final_norm
            stream = add_linear(inner, down.weight, stream, following[0], bias=down.bias)
        return stream

    def _small(self, batch: DecodeBatch) -> Tensor:
        """Residual stream before the last norm, [B, D]."""
        x = batch.embedded
        for i, layer in enumerate(self.layers):
            qkv = _linear(x, layer.qkv, norm=layer.attention_norm)
            out = self._attend(qkv, layer, i, batch)
            x = self._feed_forward(_linear(out, layer.o, residual=x), layer)
        return x

    def _feed_forward(self, x: Tensor, layer: _Layer) -> Tensor:
        """The residual stream after the layer's MLP or mixture."""
        if layer.mixture is not None:
            return layer.mixture(rms_norm(x, *layer.mlp_norm), residual=x)  # type: ignore[no-any-return]
        assert layer.gate_up is not None and layer.down is not None
        inner = _linear(x, layer.gate_up, norm=layer.mlp_norm, gate=self.config.activation)
        return _linear(inner, layer.down, residual=x)

    def _large(self, batch: DecodeBatch) -> Tensor:
        """Hidden states after the last norm, [B, D]."""
        gate_mul = _GATE_MUL[self.config.activation]
        residual = batch.embedded
        x: Tensor | Rounded = rms_norm(residual, *self.layers[0].attention_norm)
        for i, layer in enumerate(self.layers):
            out = layer.o(self._attend(layer.qkv(x), layer, i, batch))
            x = _add_norm(out, residual, layer.mlp_norm, layer.gate_up)
            del out
            if layer.mixture is not None:
                out = layer.mixture(x)
            else:
                assert layer.gate_up is not None and layer.down is not None
                wide = layer.gate_up(x)
                rounds = takes_rounded(layer.down, wide)
                x = rounding.gate(wide, None, self.config.activation, "fp8") if rounds else gate_mul(wide)
                del wide
                out = layer.down(x)
            last = i + 1 == len(self.layers)
            following = self.final_norm if last else self.layers[i + 1].attention_norm
            x = _add_norm(out, residual, following, None if last else self.layers[i + 1].qkv)
            del out
        assert isinstance(x, Tensor)
        return x


def _add_norm(
    x: Tensor, residual: Tensor, norm: tuple[Tensor, float], reader: nn.Module | None
) -> Tensor | Rounded:
    """norm(residual + x) for ``reader``, of the sum that ``residual`` becomes."""
    if reader is not None and takes_rounded(reader, x):
        gain, eps = norm
        return rounding.norm(x, residual, gain, None, eps, "fp8", layer=False, keep=True)
    return add_rms_norm(x, residual, *norm)[0]


def _weights(layer: _Layer) -> list[tuple[Tensor, bool]]:
    """The weights of a layer that is not quantized, and whether they end in a gate."""
    linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
    return [(linear.weight, linear is layer.gate_up) for linear in linears if isinstance(linear, Linear)]


def _streams(layer: _Layer) -> bool:
    linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
    return all(isinstance(linear, Linear) and stream_covers(linear.weight) for linear in linears)


def _read_layer(layer: DecoderLayer, tables: tuple[Tensor, Tensor] | None) -> _Layer:
    attention, mlp = layer.attention, layer.mlp
    assert isinstance(mlp, (GatedMLP, MixtureOfExperts))
    assert isinstance(layer.attention_norm, RMSNorm) and isinstance(layer.mlp_norm, RMSNorm)
    norm = attention.qk_norm
    weight, eps = None, 0.0
    if norm is not None:
        assert isinstance(norm, HeadNorm)
        weight, eps = norm.stacked, norm.q.eps
    mixture = mlp if isinstance(mlp, MixtureOfExperts) else None
    linears = (attention.qkv, attention.o, *((mlp.gate_up, mlp.down) if isinstance(mlp, GatedMLP) else ()))
    qkv, o, *rest = (m for m in linears if isinstance(m, (Linear, ScaledLinear)))
    gate_up, down = rest if rest else (None, None)
    return _Layer(
        attention_norm=(layer.attention_norm.weight, layer.attention_norm.eps),
        qkv=qkv,
        heads=QKNormRope(weight, eps, *(tables or (None, None))),
        o=o,
        mlp_norm=(layer.mlp_norm.weight, layer.mlp_norm.eps),
        gate_up=gate_up,
        down=down,
        mixture=mixture,
        scale=attention.scale,
        window=attention.window,
        sinks=attention.sinks,
    )


def _rope_table(rotary: Rotary, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin by position, each float32 [length, R]."""
    positions = torch.arange(length, dtype=torch.int64, device=device)
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    cos, sin = rotary(PackedBatch(positions, positions, AttentionBatch(nothing, nothing)))
    return cos[:, 0].contiguous(), sin[:, 0].contiguous()
