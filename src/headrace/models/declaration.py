"""What a decoder family declares: every choice in which the families differ, and nothing else."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from headrace.layers.rope_config import RopeConfig

__all__ = ["DecoderConfig", "ExpertsConfig", "KVLayer"]


class KVLayer(NamedTuple):
    """What one layer keeps for each token: ``num_kv_heads`` keys and values of ``head_dim`` numbers.

    ``sliding_window``: only this many of the last tokens are ever read; None: all.
    """

    num_kv_heads: int
    head_dim: int
    sliding_window: int | None


class ExpertsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The mixture that stands where dense models have an MLP (layers/experts.py).

    Attributes:
        num_experts, experts_per_token: how many there are in a layer, and how many a token meets.
        intermediate_size: of one expert.
        renormalize: the chosen experts' weights add up to 1 (a softmax over their logits alone); else they are their
            shares of the softmax over all.
        router_bias, bias: whether the router and the experts' projections have one.
        activation: a gate of kernels.experts.EXPERT_GATES.
        dense_layers: layers with a plain MLP of DecoderConfig.intermediate_size instead.
        shared_size: intermediate size of the expert that every token meets; 0: there is none.
        shared_gate: its output is multiplied by the sigmoid of a projection to one number.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    renormalize: bool
    router_bias: bool = False
    bias: bool = False
    activation: str = "silu"
    dense_layers: frozenset[int] = frozenset()
    shared_size: int = 0
    shared_gate: bool = False


class DecoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder-only transformer.

    Attributes:
        max_position_embeddings: the checkpoint's context, in tokens.
        norm: ``rms``, ``rms_plus_one`` (Gemma: the checkpoint stores weight - 1), ``layer`` or ``layer_plus_one``
            (Nemotron).
        norm_place: ``pre`` (before each block), ``post`` (on each block's output, OLMo 2) or ``sandwich``
            (both, Gemma 2 and 3), or ``parallel``: one before both blocks, which add to the stream together (Cohere).
        norm_bias: of norm ``layer``.
        qk_norm: none, one for each ``head``, or one over the ``full`` width.
        rope, local_rope: rotary embedding of full-attention layers, and of sliding ones where it differs.
        rope_neighbours: the checkpoint's rotary embedding turns neighbouring dimensions of a head, not its halves;
            models/loading.py puts rows of queries and keys in the order that this decoder turns.
        no_rope_layers: layers without rotary embedding (SmolLM 3).
        windows: sliding window of each layer, None for full attention.
        attention_scale: factor of q . k.
        attention_soft_cap, logit_soft_cap: ``cap * tanh(x / cap)`` on scores and logits (Gemma 2).
        sinks: a learned score for each query head joins the softmax and has no value (gpt-oss).
        embedding_scale, residual_multiplier: factors of the embeddings and of each block's output.
        logits_divisor: logits are divided by it.
        experts: None for models with an MLP in every layer.
        tied: the head is the embedding table.
        causal: False for embedders that let every token see all others.
        headless: the checkpoint has no language-model head (an embedder).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rope: RopeConfig
    windows: tuple[int | None, ...]
    attention_scale: float
    local_rope: RopeConfig | None = None
    rope_neighbours: bool = False
    no_rope_layers: frozenset[int] = frozenset()
    norm: Literal["rms", "rms_plus_one", "layer", "layer_plus_one"] = "rms"
    norm_place: Literal["pre", "post", "sandwich", "parallel"] = "pre"
    norm_bias: bool = True
    norm_eps: float = 1e-6
    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    gated_mlp: bool = True
    attention_soft_cap: float | None = None
    sinks: bool = False
    logit_soft_cap: float | None = None
    embedding_scale: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    experts: ExpertsConfig | None = None
    tied: bool = False
    causal: bool = True
    headless: bool = False

    @property
    def rope_boundary(self) -> int | None:
        """Length up to which all sequences share their rotary frequencies; None: at any length.

        Beyond it cached keys depend on the length that PackedBatch.rope_lens names, so a cached prefix may
        only be shared by sequences on the same side of it (and, for ``dynamic``, of the same length).
        """
        ropes = [rope for rope in (self.rope, self.local_rope) if rope is not None and rope.length_dependent]
        return min((rope.original_length for rope in ropes), default=None)
