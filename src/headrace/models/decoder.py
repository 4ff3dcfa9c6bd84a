"""The decoder: one transformer for all families, built from a declaration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from headrace.layers.attention import Attention, CosSin, FullNorm, HeadNorm
from headrace.layers.experts import ExpertLinear, Experts, MixtureOfExperts
from headrace.layers.linear import Embedding, Linear, parameter
from headrace.layers.mlp import MLP, GatedMLP
from headrace.layers.norm import LayerNorm, NoNorm, RMSNorm
from headrace.layers.packed import AttentionBatch, PackedBatch
from headrace.layers.rotary import Rotary
from headrace.layers.rounded import add_normed, normed
from headrace.models.declaration import DecoderConfig, ExpertsConfig, KVLayer

__all__ = ["DecoderLayer", "DecoderModel"]

Norm = RMSNorm | LayerNorm


class _Builder:
    """Makes a decoder's modules with one dtype, on one device."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        self.config, self.dtype, self.device = config, dtype, device

    def linear(self, inputs: int, *parts: int, bias: bool) -> Linear:
        return Linear(inputs, sum(parts), bias=bias, parts=parts, dtype=self.dtype, device=self.device)

    def rms_norm(self, dim: int) -> RMSNorm:
        plus_one = self.config.norm == "rms_plus_one"
        return RMSNorm(dim, self.config.norm_eps, plus_one=plus_one, dtype=self.dtype, device=self.device)

    def norm(self) -> Norm:
        """A norm of the residual stream's width."""
        if self.config.norm in ("layer", "layer_plus_one"):
            return LayerNorm(
                self.config.hidden_size,
                self.config.norm_eps,
                bias=self.config.norm_bias,
                plus_one=self.config.norm == "layer_plus_one",
                dtype=self.dtype,
                device=self.device,
            )
        return self.rms_norm(self.config.hidden_size)

    def attention(self, layer: int) -> Attention:
        config = self.config
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        q, kv = heads * dim, kv_heads * dim
        norm: HeadNorm | FullNorm | None = None
        if config.qk_norm == "head":
            norm = HeadNorm(self.rms_norm(dim), self.rms_norm(dim), heads, kv_heads)
        elif config.qk_norm == "full":
            norm = FullNorm(self.rms_norm(q), self.rms_norm(kv), heads)
        return Attention(
            self.linear(config.hidden_size, q, kv, kv, bias=config.qkv_bias),
            self.linear(q, config.hidden_size, bias=config.output_bias),
            norm=norm,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            layer=layer,
            scale=config.attention_scale,
            window=config.windows[layer],
            soft_cap=config.attention_soft_cap,
            sinks=parameter(heads, dtype=torch.float32, device=self.device) if config.sinks else None,
        )

    def mlp(self, layer: int) -> nn.Module:
        config = self.config
        if config.experts is not None and layer not in config.experts.dense_layers:
            return self.mixture(config.experts)
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        down = self.linear(inner, hidden, bias=bias)
        if config.gated_mlp:
            return GatedMLP(self.linear(hidden, inner, inner, bias=bias), down, config.activation)
        return MLP(self.linear(hidden, inner, bias=bias), down, config.activation)

    def mixture(self, config: ExpertsConfig) -> MixtureOfExperts:
        hidden, inner, shared_size = self.config.hidden_size, config.intermediate_size, config.shared_size
        shared = None
        if shared_size:
            up = self.linear(hidden, shared_size, shared_size, bias=False)
            shared = GatedMLP(up, self.linear(shared_size, hidden, bias=False), self.config.activation)
        return MixtureOfExperts(
            self.linear(hidden, config.num_experts, bias=config.router_bias),
            Experts(self.experts(config, hidden, inner, inner), self.experts(config, inner, hidden)),
            num_experts=config.num_experts,
            experts_per_token=config.experts_per_token,
            activation=config.activation,
            renormalize=config.renormalize,
            shared=shared,
            shared_gate=self.linear(hidden, 1, bias=False) if config.shared_gate else None,
        )

    def experts(self, config: ExpertsConfig, inputs: int, *parts: int) -> ExpertLinear:
        return ExpertLinear(
            inputs,
            *parts,
            num_experts=config.num_experts,
            bias=config.bias,
            dtype=self.dtype,
            device=self.device,
        )


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each with its norms, added to the residual stream."""

    def __init__(self, build: _Builder, layer: int) -> None:
        super().__init__()
        self.residual_multiplier = build.config.residual_multiplier
        self.parallel = build.config.norm_place == "parallel"
        before = build.config.norm_place in ("pre", "sandwich")
        after = build.config.norm_place in ("post", "sandwich")
        self.attention_norm = build.norm() if before or self.parallel else NoNorm()
        self.attention = build.attention(layer)
        self.post_attention_norm = build.norm() if after else None
        self.mlp_norm = build.norm() if before else NoNorm()
        self.mlp = build.mlp(layer)
        self.post_mlp_norm = build.norm() if after else None

    def forward(
        self, x: Tensor, residual: Tensor | None, cos_sin: CosSin | None, batch: AttentionBatch
    ) -> tuple[Tensor, Tensor]:
        """Take the output of the block before, not yet added to ``residual``; return the same of this one.

        So every addition meets the norm that follows it, and both are one kernel. ``residual`` None: x is it.
        """
        first = self.mlp.gate_up if isinstance(self.mlp, GatedMLP) else self.mlp
        readers = (self.attention.qkv, first) if self.parallel else (self.attention.qkv,)
        if residual is None:
            y, residual = normed(self.attention_norm, x, readers), x
        else:
            y, residual = add_normed(self.attention_norm, x, residual, readers)
        if self.parallel:
            return self.attention(y, cos_sin, batch) + self.mlp(y), residual
        x = self.attention(y, cos_sin, batch)
        del y
        if self.post_attention_norm is not None:
            x = self.post_attention_norm(x)
        if self.residual_multiplier != 1.0:
            x = x * self.residual_multiplier
        y, residual = add_normed(self.mlp_norm, x, residual, (first,))
        x = self.mlp(y)
        del y
        if self.post_mlp_norm is not None:
            x = self.post_mlp_norm(x)
        if self.residual_multiplier != 1.0:
            x = x * self.residual_multiplier
        return x, residual


class DecoderModel(nn.Module):
    """A decoder-only transformer over packed batches.

    Args:
        config: the family's declaration.
        dtype: of weights and activations.
        device: ``meta`` builds the shapes without memory; models/loading.py fills them.
    """

    def __init__(self, config: DecoderConfig, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.config = config
        build = _Builder(config, dtype, device)
        self.embed = Embedding(
            config.vocab_size, config.hidden_size, scale=config.embedding_scale, dtype=dtype, device=device
        )
        self.layers = nn.ModuleList(DecoderLayer(build, i) for i in range(config.num_layers))
        self.norm = build.norm()
        self.head: Linear | None = None
        if not config.headless and not config.tied:
            self.head = build.linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope: Rotary | None = None
        self.local_rope: Rotary | None = None

    def finish(self) -> None:
        """Called once, when the weights are there: what follows from them and from their device."""
        device = next(self.parameters()).device
        if self.config.tied and not self.config.headless and self.head is None:
            vocab, hidden = self.embed.weight.shape
            self.head = Linear(hidden, vocab, dtype=self.embed.weight.dtype, device="meta")
            self.head.weight = self.embed.weight
        self.rope = Rotary(self.config.rope, device)
        self.local_rope = Rotary(self.config.local_rope, device) if self.config.local_rope else None

    @property
    def kv_layout(self) -> list[KVLayer]:
        """What each layer's cache holds for a token."""
        return [
            KVLayer(self.config.num_kv_heads, self.config.head_dim, window) for window in self.config.windows
        ]

    @contextlib.contextmanager
    def shortened(self) -> Iterator[int]:
        """Within, only so many of the first layers (the value) that one of each kind is there, but at least two."""
        layers = self.layers
        kinds = [
            (self.config.windows[i], i in self.config.no_rope_layers, _kind(m)) for i, m in enumerate(layers)
        ]
        count = max(2, 1 + max(kinds.index(kind) for kind in kinds))
        self.layers = layers[:count]
        try:
            yield count
        finally:
            self.layers = layers

    @torch.inference_mode()
    def forward(self, batch: PackedBatch) -> Tensor:
        """Hidden states [T, D] after the last norm."""
        assert self.rope is not None, "finish() was not called"
        full = self.rope(batch)
        local = self.local_rope(batch) if self.local_rope is not None else full
        x, residual = self.embed(batch.token_ids), None
        for i, layer in enumerate(self.layers):
            cos_sin = full if self.config.windows[i] is None else local
            x, residual = layer(
                x, residual, None if i in self.config.no_rope_layers else cos_sin, batch.attention
            )
        assert residual is not None
        return self.norm.add(x, residual)[0]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [P, D] -> logits, float32 [P, V]."""
        assert self.head is not None, "an embedder has no language-model head"
        return self.adjust_logits(self.head(hidden).float())

    def adjust_logits(self, logits: Tensor) -> Tensor:
        """Divisor and soft cap of raw logits, float32 [P, V], in place: with a large vocabulary they are gigabytes."""
        if self.config.logits_divisor != 1.0:
            logits.div_(self.config.logits_divisor)
        if self.config.logit_soft_cap is not None:
            logits.div_(self.config.logit_soft_cap).tanh_().mul_(self.config.logit_soft_cap)
        return logits


def _kind(layer: nn.Module) -> str:
    """What tells apart layers that run different code: classes, and shapes and types of tensors."""
    found = []
    for name, module in layer.named_modules():
        held = [*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values()]
        tensors = [(tuple(t.shape), t.dtype) for t in held if isinstance(t, Tensor)]
        found.append((name, type(module).__name__, tensors))
    return str(found)
