"""The transformer under the heads: an encoder family, or a decoder without its language-model head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from headrace.checkpoints.base import Checkpoint
from headrace.checkpoints.upload import InFiles, Region
from headrace.errors import UnsupportedCheckpoint
from headrace.models.encode_choice import decoder_fields, is_causal_family
from headrace.models.encode_eight_bits import EightBits, round_to_eight_bits
from headrace.models.encoder import EncoderModel
from headrace.models.encoder_families import encoder_family, read_encoder_config
from headrace.models.encoder_weights import find_prefix, load_encoder
from headrace.models.loading import Transform, load_decoder

__all__ = ["Backbone", "load_backbone"]

# Tensors of heads, which the decoder itself has no place for.
_HEADS = ("score.", "classifier.", "lm_head.", "dropout.", "linear.weight")


@dataclass
class Backbone:
    """A loaded transformer.

    Attributes:
        prefix: what stands before its tensors' names in the checkpoint.
        word: the full name of its word table, without ``.weight``.
        norm_eps: of its norms.
    """

    module: nn.Module
    vocab_size: int
    hidden_size: int
    max_tokens: int
    causal: bool
    prefix: str
    word: str
    norm_eps: float


def load_backbone(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    head: bool,
    transform: Transform | None = None,
    eight_bits: EightBits | None = None,
) -> Backbone:
    """Read a checkpoint's transformer.

    Args:
        head: keep a decoder's language-model head (for yes/no logits).
        transform: replaces each linear of a decoder as it is loaded (quantization).
        eight_bits: weights and activations of all layers are rounded.
    Raises: UnknownArchitecture, UnsupportedCheckpoint.
    """
    if is_causal_family(checkpoint.config):
        found = _decoder(checkpoint, dtype, device, head, eight_bits.transform if eight_bits else transform)
        if eight_bits is not None:
            round_to_eight_bits(found.module, eight_bits)
        return found
    if transform is not None:
        raise UnsupportedCheckpoint(
            f"{(checkpoint.config.get('architectures') or ['?'])[0]} keeps its weights in 16 or 32 bits, or with its "
            "activations in 8: formats of weights alone save little here and are not built; leave quantization out, "
            "or name fp8 (on a GPU) or int8",
            param="quantization",
        )
    family = encoder_family(checkpoint.config)
    config = read_encoder_config(checkpoint.config, family)
    model = EncoderModel(config, dtype=dtype, device=device)
    convert = None if eight_bits is None else partial(round_to_eight_bits, how=eight_bits)
    prefix = load_encoder(model, family, checkpoint, convert)
    return Backbone(
        model,
        config.vocab_size,
        config.hidden_size,
        config.max_tokens,
        False,
        prefix,
        prefix + family.names(config)["word"][0],
        config.norm_eps,
    )


class _WithoutHeads:
    """A checkpoint's tensors but those of task heads."""

    def __init__(self, checkpoint: Checkpoint, keep: tuple[str, ...]) -> None:
        self.checkpoint = checkpoint
        dropped = tuple(name for name in _HEADS if name not in keep)
        self._names = [name for name in checkpoint.names() if not name.startswith(dropped)]

    def names(self) -> list[str]:
        return self._names

    def load(self, name: str) -> Tensor:
        return self.checkpoint.load(name)

    def region(self, name: str) -> Region | None:
        return self.checkpoint.region(name) if isinstance(self.checkpoint, InFiles) else None


def _decoder(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str,
    head: bool,
    transform: Transform | None,
) -> Backbone:
    config, bidirectional = decoder_fields(checkpoint.config, head=head)
    source = _WithoutHeads(checkpoint, ("lm_head.",) if head else ())
    model = load_decoder(config, source, dtype=dtype, device=device, transform=transform)
    known = source.names()
    prefix = find_prefix("embed_tokens.weight", known, checkpoint)
    return Backbone(
        model,
        model.config.vocab_size,
        model.config.hidden_size,
        model.config.max_position_embeddings,
        model.config.causal and not bidirectional,
        prefix,
        prefix + "embed_tokens",
        model.config.norm_eps,
    )
