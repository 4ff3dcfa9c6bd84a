"""The encoder: one bidirectional transformer for all families, built from a declaration, never padded."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from headrace.layers.attention import Attention, CosSin
from headrace.layers.biased_attention import BiasedAttention, DistanceBias
from headrace.layers.dense import Dense
from headrace.layers.expert_mlp import ExpertMLP
from headrace.layers.linear import Embedding
from headrace.layers.mlp import GatedMLP
from headrace.layers.norm import LayerNorm, NoNorm, RMSNorm
from headrace.layers.packed import AttentionBatch, PackedBatch
from headrace.layers.rotary import Rotary
from headrace.models.encoder_declaration import EncoderConfig

__all__ = ["EncoderConfig", "EncoderLayer", "EncoderModel"]

Norm = RMSNorm | LayerNorm | NoNorm


class _Builder:
    """Makes an encoder's modules with one dtype, on one device."""

    def __init__(self, config: EncoderConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        self.config, self.dtype, self.device = config, dtype, device

    def dense(self, inputs: int, *parts: int, bias: bool, activation: str | None = None) -> Dense:
        return Dense(
            inputs,
            sum(parts),
            bias=bias,
            parts=parts,
            activation=activation,
            dtype=self.dtype,
            device=self.device,
        )

    def norm(self, exists: bool = True) -> Norm:
        config = self.config
        if not exists:
            return NoNorm()
        if config.norm == "rms":
            return RMSNorm(config.hidden_size, config.norm_eps, dtype=self.dtype, device=self.device)
        return LayerNorm(
            config.hidden_size, config.norm_eps, bias=config.norm_bias, dtype=self.dtype, device=self.device
        )

    def attention(self, layer: int) -> nn.Module:
        config = self.config
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv = self.dense(config.hidden_size, q, kv, kv, bias=config.qkv_bias)
        o = self.dense(q, config.hidden_size, bias=config.output_bias)
        scale = config.head_dim**-0.5
        if config.distance_bias:
            return BiasedAttention(qkv, o, num_heads=config.num_heads, scale=scale)
        return Attention(
            qkv,
            o,
            norm=None,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            layer=layer,
            scale=scale,
            window=config.window(layer),
            soft_cap=None,
        )

    def mlp(self, layer: int) -> nn.Module:
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size
        if layer in config.expert_layers:
            return ExpertMLP(
                hidden,
                inner,
                num_experts=config.experts,
                experts_per_token=config.experts_per_token,
                activation=config.activation,
                dtype=self.dtype,
                device=self.device,
            )
        down = self.dense(inner, hidden, bias=config.down_bias)
        if config.gated:
            gate_up = self.dense(hidden, inner, inner, bias=config.up_bias)
            return GatedMLP(gate_up, down, config.activation)
        up = self.dense(hidden, inner, bias=config.up_bias, activation=config.activation)
        return nn.Sequential(OrderedDict(up=up, down=down))


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each added to its input; norms before (pre) or after the sums (post)."""

    def __init__(self, build: _Builder, layer: int) -> None:
        super().__init__()
        config = build.config
        self.pre_norm = config.pre_norm
        self.attention = build.attention(layer)
        self.attention_norm = build.norm(layer > 0 or config.first_norm)
        self.mlp = build.mlp(layer)
        self.mlp_norm = build.norm()

    def forward(
        self, x: Tensor, residual: Tensor | None, position: CosSin | Tensor | None, batch: AttentionBatch
    ) -> tuple[Tensor, Tensor | None]:
        """One layer, so that every addition meets the norm that follows it, and both are one kernel.

        With norms before the blocks x is the output of the block before, not yet added to ``residual`` (None: x
        is the residual itself), and so is what comes out; with norms after the sums there is no residual.

        Args:
            x, residual: [T, D]; may be overwritten.
            position: cos and sin, or a bias by distance.
        """
        if not self.pre_norm:
            x = self.attention_norm.of_sum(self.attention(x, position, batch), x)
            return self.mlp_norm.of_sum(self.mlp(x), x), None
        if residual is None:
            x, residual = self.attention_norm(x), x
        else:
            x, residual = self.attention_norm.add(x, residual)
        x, residual = self.mlp_norm.add(self.attention(x, position, batch), residual)
        return self.mlp(x), residual


class EncoderModel(nn.Module):
    """An encoder-only transformer over cache-less packed batches.

    Args:
        config: the family's declaration.
        dtype: of weights and activations.
        device: ``meta`` builds the shapes without memory.
    """

    def __init__(self, config: EncoderConfig, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.config = config
        build = _Builder(config, dtype, device)
        self.word = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.position = self._table(config.positions, dtype, device)
        self.token_type = self._table(config.token_types, dtype, device)
        self.embedding_norm = build.norm(config.embedding_norm)
        self.bias: DistanceBias | None = None
        if config.distance_bias:
            reach = config.max_tokens - 1 if config.distance_bias == "alibi" else 128
            self.bias = DistanceBias(
                config.distance_bias, config.num_heads, reach, config.num_buckets, dtype=dtype, device=device
            )
        self.layers = nn.ModuleList(EncoderLayer(build, i) for i in range(config.num_layers))
        self.norm = build.norm(config.pre_norm)
        self.rope: Rotary | None = None
        self.local_rope: Rotary | None = None

    def _table(self, rows: int, dtype: torch.dtype, device: torch.device | str) -> Embedding | None:
        return Embedding(rows, self.config.hidden_size, dtype=dtype, device=device) if rows else None

    def finish(self) -> None:
        """Called once, when the weights are there: what follows from them and from their device."""
        device = self.word.weight.device
        self.rope = Rotary(self.config.rope, device) if self.config.rope else None
        self.local_rope = Rotary(self.config.local_rope, device) if self.config.local_rope else self.rope
        for module in self.modules():
            if isinstance(module, Dense | DistanceBias | ExpertMLP):
                module.finish()

    @torch.inference_mode()
    def forward(self, batch: PackedBatch) -> Tensor:
        """Hidden states [T, D] of the last layer."""
        x = self.embed(batch)
        position: CosSin | Tensor | None = None
        local: CosSin | Tensor | None = None
        if self.rope is not None and self.local_rope is not None:
            position = self.rope(batch)
            local = position if self.local_rope is self.rope else self.local_rope(batch)
        elif self.bias is not None:
            position = self.bias.table
        residual: Tensor | None = None
        for i, layer in enumerate(self.layers):
            cos_sin = position if self.config.window(i) is None else local
            x, residual = layer(x, residual, cos_sin, batch.attention)
        return x if residual is None else self.norm.add(x, residual)[0]

    def embed(self, batch: PackedBatch) -> Tensor:
        """Sum of the word, position and segment tables, normed: [T, D], a fresh tensor."""
        x: Tensor = self.word(batch.token_ids)
        if self.position is not None:
            x += self.position(batch.positions + self.config.position_offset)
        if self.token_type is not None:
            x += (
                self.token_type.weight[0] if batch.token_types is None else self.token_type(batch.token_types)
            )
        return self.embedding_norm(x)  # type: ignore[no-any-return]
