"""A checkpoint for one pass: backbone, pooling, modules and heads, put together as its card says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from headrace.checkpoints.base import Checkpoint
from headrace.layers.heads import Chain, Projection, SequenceHead, SpladeHead
from headrace.layers.norm import LayerNorm
from headrace.layers.packed import AttentionBatch, PackedBatch
from headrace.layers.pooling import pool
from headrace.models.encode_card import EncodeCard, read_encode_card
from headrace.models.encode_heads import HeadBuilder, classifier_steps, mlm_steps, token_classifier_steps
from headrace.models.encoder import EncoderModel
from headrace.models.encoder_families import encoder_family, read_encoder_config
from headrace.models.encoder_weights import load_encoder

__all__ = ["EncodeModel", "load_encode_model"]

Backbone = Callable[[PackedBatch], Tensor]


class EncodeModel(nn.Module):
    """Everything that one pass may return.

    Attributes:
        card: what the checkpoint says about itself.
        max_tokens: longest input.
        causal: tokens see only what stands before them.
    """

    def __init__(
        self,
        card: EncodeCard,
        backbone: nn.Module,
        *,
        vocab_size: int,
        hidden_size: int,
        max_tokens: int,
        causal: bool,
    ) -> None:
        super().__init__()
        self.card, self.backbone = card, backbone
        self.vocab_size, self.hidden_size, self.causal = vocab_size, hidden_size, causal
        self.max_tokens = min(max_tokens, card.max_tokens or max_tokens)
        self.pooled_modules = nn.ModuleList()
        self.token_modules = nn.ModuleList()
        self.classifier: SequenceHead | None = None
        self.token_classifier: Chain | None = None
        self.splade: SpladeHead | None = None

    @property
    def dimensions(self) -> int:
        """Size of the pooled vectors; 0 if there are none."""
        sizes = [spec.size_out for spec in self.card.modules if spec.kind == "dense" and not spec.per_token]
        return sizes[-1] if sizes else self.hidden_size * len(self.card.pooling)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Hidden states [T, D]."""
        return self.backbone(batch)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def embed(self, hidden: Tensor, batch: AttentionBatch) -> Tensor:
        """Pooled vectors, float32 [S, D], through all modules but the final normalization."""
        pooled = torch.cat([pool(hidden, batch, mode) for mode in self.card.pooling], dim=-1)
        for module in self.pooled_modules:
            pooled = module(pooled)
        return pooled

    @torch.inference_mode()
    def token_vectors(self, hidden: Tensor) -> Tensor:
        """One vector a token, float32 [T, D], through the modules that a multi-vector checkpoint declares."""
        vectors = hidden.float()
        for module in self.token_modules:
            vectors = module(vectors)
        if any(module.kind == "normalize" and module.per_token for module in self.card.modules):
            vectors = nn.functional.normalize(vectors, dim=-1)
        return vectors

    @torch.inference_mode()
    def classify(self, hidden: Tensor, batch: AttentionBatch) -> Tensor:
        """Logits, float32 [S, labels]."""
        assert self.classifier is not None
        return self.classifier(hidden, batch)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def token_classify(self, hidden: Tensor) -> Tensor:
        """Logits, float32 [T, labels]."""
        assert self.token_classifier is not None
        return self.token_classifier(hidden).float()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def sparse(self, hidden: Tensor, lengths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """For each sequence token ids int64 [k] and their weights float32 [k], all above zero."""
        assert self.splade is not None
        dense = self.splade(hidden, lengths)
        return [((row > 0).nonzero().squeeze(1), row[row > 0]) for row in dense]


def load_encode_model(
    path: Path,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    pooling: str | None = None,
) -> EncodeModel:
    """Read a checkpoint folder.

    Raises MissingFile, UnsupportedCheckpoint or UnknownArchitecture, naming what is at fault.
    """
    card = read_encode_card(path, pooling=pooling)
    family = encoder_family(checkpoint.config)
    config = read_encoder_config(checkpoint.config, family)
    backbone = EncoderModel(config, dtype=dtype, device=device)
    prefix = load_encoder(backbone, family, checkpoint)
    model = EncodeModel(
        card,
        backbone,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_tokens=config.max_tokens,
        causal=False,
    )
    word = prefix + family.names(config)["word"][0]
    build = HeadBuilder(
        checkpoint, prefix=prefix, word=word, norm_eps=config.norm_eps, dtype=dtype, device=device
    )
    _add_heads(model, checkpoint, build)
    return model.eval()


def _add_heads(model: EncodeModel, checkpoint: Checkpoint, build: HeadBuilder) -> None:
    card, config = model.card, checkpoint.config
    for spec in card.modules:
        if spec.kind != "normalize":
            module: Projection | LayerNorm = build.module(spec)
            (model.token_modules if spec.per_token else model.pooled_modules).append(module)
    if card.kind == "classify":
        pooling, steps = classifier_steps(config)
        model.classifier = SequenceHead(pooling, build.chain(steps, len(card.labels)))
    elif card.kind == "token_classify":
        model.token_classifier = build.chain(token_classifier_steps(config), len(card.labels))
    elif card.kind == "splade":
        model.splade = SpladeHead(build.chain(mlm_steps(config)), model.vocab_size, *card.splade)
