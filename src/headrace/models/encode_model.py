"""A checkpoint for one pass: backbone, pooling, modules and heads, put together as its card says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from headrace.checkpoints.base import Checkpoint
from headrace.errors import UnsupportedCheckpoint
from headrace.kernels.pooling import segment_pool
from headrace.layers.dense import Dense
from headrace.layers.heads import Chain, SequenceHead, SpladeHead, UnitLength, lexical_weights
from headrace.layers.packed import AttentionBatch, PackedBatch
from headrace.layers.pooling import pool
from headrace.models.decoder import DecoderModel
from headrace.models.encode_backbone import Backbone, load_backbone
from headrace.models.encode_card import EncodeCard, read_encode_card
from headrace.models.encode_eight_bits import EightBits
from headrace.models.encode_heads import HeadBuilder, classifier_steps, mlm_steps, token_classifier_steps
from headrace.models.encoder import EncoderModel
from headrace.models.loading import Transform

__all__ = ["EncodeModel", "load_encode_model"]


class EncodeModel(nn.Module):
    """Everything that one pass may return.

    Attributes:
        card: what the checkpoint says about itself.
        max_tokens: longest input.
        causal: tokens see only what stands before them.
        pad_id: classifiers of causal models look at the last token that is not this one.
        unused_ids: special tokens, which BGE-M3's sparse vectors leave out.
    """

    def __init__(self, card: EncodeCard, backbone: Backbone) -> None:
        super().__init__()
        self.card, self.backbone = card, backbone.module
        self.vocab_size, self.hidden_size = backbone.vocab_size, backbone.hidden_size
        self.causal = backbone.causal
        self.max_tokens = min(backbone.max_tokens, card.max_tokens or backbone.max_tokens)
        self.pad_id: int | None = None
        self.unused_ids: tuple[int, ...] = ()
        self.pooled_modules = nn.ModuleList()
        self.token_modules = nn.ModuleList()
        self.classifier: SequenceHead | None = None
        self.token_classifier: Chain | None = None
        self.splade: SpladeHead | None = None
        self.token_weight: Dense | None = None
        self.token_vector: Dense | None = None
        self.answers: AnswerLogits | None = None

    @property
    def token_types(self) -> int:
        """Segments that the model tells apart; 0 or 1: none."""
        return self.backbone.config.token_types if isinstance(self.backbone, EncoderModel) else 0

    @property
    def decoder(self) -> bool:
        """Whether the backbone is of a decoder family, causal or not."""
        return isinstance(self.backbone, DecoderModel)

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
        if self.token_vector is not None:
            return nn.functional.normalize(self.token_vector(vectors), dim=-1)
        for module in self.token_modules:
            vectors = module(vectors)
        if self.card.tokens_normalized:
            vectors = nn.functional.normalize(vectors, dim=-1)
        return vectors

    @torch.inference_mode()
    def classify(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Logits, float32 [S, labels]."""
        if self.answers is not None:
            return self.answers(hidden, batch.attention)  # type: ignore[no-any-return]
        assert self.classifier is not None
        return self.classifier(hidden, batch.attention, self._not_padding(batch))  # type: ignore[no-any-return]

    def _not_padding(self, batch: PackedBatch) -> Tensor:
        """Last token of each sequence that is not the padding token: where causal classifiers look."""
        place = torch.arange(batch.num_tokens, device=batch.token_ids.device)
        if self.pad_id is not None:
            place = place.masked_fill(batch.token_ids == self.pad_id, 0)
        # Row numbers fit float32's integers (batches have far less than 2^24 tokens).
        starts = batch.attention.query_starts
        last = segment_pool(place.float()[:, None], starts, "max").squeeze(1).long()
        # Empty sequences (padding of a batch) begin behind the last row.
        return torch.maximum(last, starts[:-1].long()).clamp(max=batch.num_tokens - 1)

    @torch.inference_mode()
    def token_classify(self, hidden: Tensor) -> Tensor:
        """Logits, float32 [T, labels]."""
        assert self.token_classifier is not None
        return self.token_classifier(hidden).float()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def sparse(
        self, hidden: Tensor, batch: PackedBatch, lengths: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """For each sequence token ids int64 [k], ascending, and their weights float32 [k], all above zero."""
        if self.token_weight is not None:
            weights = self.token_weight(hidden.float()).squeeze(1).relu()
            parts = zip(weights.split(list(lengths)), batch.token_ids.split(list(lengths)))
            return [lexical_weights(part, ids, self.unused_ids) for part, ids in parts]
        assert self.splade is not None
        dense = self.splade(hidden, lengths)
        return [((row > 0).nonzero().squeeze(1), row[row > 0]) for row in dense]


class AnswerLogits(nn.Module):
    """Log-odds of the answer yes at the last token of a generative reranker: logit(yes) - logit(no).

    Keeps two rows of the decoder's head and drops the rest of it.
    """

    def __init__(self, decoder: DecoderModel, yes: int, no: int | None) -> None:
        super().__init__()
        assert decoder.head is not None
        rows = [yes] if no is None else [yes, no]
        self.weight = nn.Parameter(decoder.head.weight[rows].clone(), requires_grad=False)
        self.divisor, self.soft_cap = decoder.config.logits_divisor, decoder.config.logit_soft_cap
        decoder.head = None

    def forward(self, hidden: Tensor, batch: AttentionBatch) -> Tensor:
        """hidden [T, D] -> float32 [S, 1]."""
        logits = pool(hidden, batch, "last") @ self.weight.float().T / self.divisor
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits if logits.shape[1] == 1 else logits[:, :1] - logits[:, 1:]


def load_encode_model(
    path: Path,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    pooling: str | None = None,
    yes_no: tuple[int, int | None] | None = None,
    transform: Transform | None = None,
    eight_bits: EightBits | None = None,
) -> EncodeModel:
    """Read a checkpoint folder.

    Args:
        yes_no: token ids of a generative reranker's answers, where the checkpoint does not say.
        transform: replaces each linear of a causal embedder's decoder as it is loaded (quantization).
        eight_bits: weights and activations of all layers are rounded.

    Raises MissingFile, UnsupportedCheckpoint or UnknownArchitecture, naming what is at fault.
    """
    card = read_encode_card(path, pooling=pooling)
    if card.yes_no is None and yes_no is not None:
        card = replace(card, yes_no=yes_no)
    backbone = load_backbone(
        checkpoint,
        dtype=dtype,
        device=device,
        head=card.kind == "yes_no",
        transform=transform,
        eight_bits=eight_bits,
    )
    model = EncodeModel(card, backbone)
    model.pad_id = checkpoint.config.get("pad_token_id")
    build = HeadBuilder(
        checkpoint,
        prefix=backbone.prefix,
        word=backbone.word,
        norm_eps=backbone.norm_eps,
        dtype=dtype,
        device=device,
    )
    _add_heads(model, checkpoint, build)
    return model.eval()


def _add_heads(model: EncodeModel, checkpoint: Checkpoint, build: HeadBuilder) -> None:
    card, config = model.card, checkpoint.config
    _add_modules(model, build)
    if card.kind == "classify":
        pooling, steps = classifier_steps(config, two_layers="score.0.weight" in build.known)
        model.classifier = SequenceHead(pooling, build.chain(steps, len(card.labels)))
    elif card.kind == "token_classify":
        steps = token_classifier_steps(config, causal=model.decoder)
        model.token_classifier = build.chain(steps, len(card.labels))
    elif card.kind == "m3":
        model.token_weight = build.beside("sparse_linear", 1)
        model.token_vector = build.beside("colbert_linear")
        special = (config.get(f"{name}_token_id") for name in ("bos", "eos", "pad", "unk"))
        # XLM-RoBERTa's unknown token has id 3, which config.json does not say.
        model.unused_ids = (*(id for id in special if isinstance(id, int)), 3)
    elif card.kind == "yes_no":
        assert isinstance(model.backbone, DecoderModel)
        if card.yes_no is None:
            raise UnsupportedCheckpoint(
                "the token ids of the answers yes and no are not known", param="pooling"
            )
        model.answers = AnswerLogits(model.backbone, *card.yes_no)
    elif card.kind == "splade":
        model.splade = SpladeHead(build.chain(mlm_steps(config)), model.vocab_size, *card.splade)


def _add_modules(model: EncodeModel, build: HeadBuilder) -> None:
    """What follows pooling, or works on every token, in order; a last normalization is left to the request."""
    for per_token, modules in ((False, model.pooled_modules), (True, model.token_modules)):
        specs = [spec for spec in model.card.modules if spec.per_token == per_token]
        size = model.hidden_size * (1 if per_token else max(len(model.card.pooling), 1))
        for place, spec in enumerate(specs):
            if spec.kind != "normalize":
                if spec.folder and spec.size_in != size:
                    raise UnsupportedCheckpoint(
                        f"{spec.folder}/config.json takes vectors of {spec.size_in}; those before it have {size}"
                    )
                modules.append(build.module(spec))
                size = spec.size_out
            elif place < len(specs) - 1:
                modules.append(UnitLength())
