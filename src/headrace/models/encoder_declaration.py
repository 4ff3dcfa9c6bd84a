"""What an encoder family declares: every choice in which the families differ, and nothing else. No torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from headrace.layers.rope_config import RopeConfig

__all__ = ["EncoderConfig"]


class EncoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One encoder-only transformer: every choice in which the families differ, and nothing else.

    Attributes:
        max_tokens: longest sequence.
        positions: rows of the table of absolute positions; 0: none.
        position_offset: row of the first position (RoBERTa starts after its padding row).
        token_types: rows of the table of segments; 0: none.
        distance_bias: ``alibi`` slopes, or learned relative ``buckets``, added to attention scores.
        num_buckets: of the learned bias.
        rope, local_rope: rotary embedding of full-attention layers, and of windowed ones where it differs.
        windows: for each layer how far a token sees (distance below it), None for everything.
        norm: ``layer`` or ``rms``; ``norm_bias``: layer norms have a bias.
        pre_norm: norms stand before each block and at the end, else after each residual sum.
        first_norm: the first layer's attention norm exists.
        embedding_norm: the embeddings are normed.
        gated: ``down(act(gate) * up)`` instead of ``down(act(up))``.
        experts, experts_per_token: of the layers in ``expert_layers`` (Nomic's mixture).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_tokens: int
    positions: int = 0
    position_offset: int = 0
    token_types: int = 0
    distance_bias: Literal["", "alibi", "buckets"] = ""
    num_buckets: int = 0
    rope: RopeConfig | None = None
    local_rope: RopeConfig | None = None
    windows: tuple[int | None, ...] = ()
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-12
    norm_bias: bool = True
    pre_norm: bool = False
    first_norm: bool = True
    embedding_norm: bool = True
    qkv_bias: bool = True
    output_bias: bool = True
    gated: bool = False
    activation: str = "gelu"
    up_bias: bool = True
    down_bias: bool = True
    experts: int = 0
    experts_per_token: int = 0
    expert_layers: frozenset[int] = frozenset()

    def window(self, layer: int) -> int | None:
        """How far tokens of this layer see."""
        return self.windows[layer] if self.windows else None
