"""What a file of `models/encoders` holds, and the reading that BERT's descendants share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headrace.models.encoder_declaration import EncoderConfig
from headrace.models.reading import ConfigReader

__all__ = ["EncoderFamily", "Names", "common_fields"]

Names = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class EncoderFamily:
    """One family.

    A table of names maps our modules to the checkpoint's, whose ``.weight`` and ``.bias`` follow; several sources
    are stacked by rows (query, key, value), ``{i}`` is the layer, and ``module|leaf`` names a whole tensor. The
    prefix (``bert.``, ``model.``, ...) is found by looking where the word table lies.

    Attributes:
        model_types: values of ``model_type`` in `config.json`.
        read: `config.json` to the declaration.
        names: the table; a callable where it depends on the declaration.
        halves_swapped: modules whose two stacked halves lie in the other order in the checkpoint.
    """

    model_types: tuple[str, ...]
    read: Callable[[ConfigReader], EncoderConfig]
    names: Callable[[EncoderConfig], Names]
    halves_swapped: frozenset[str] = frozenset()


def common_fields(read: ConfigReader, **other: Any) -> dict[str, Any]:
    """Fields that BERT's descendants spell alike."""
    heads, hidden = read.integer("num_attention_heads"), read.integer("hidden_size")
    if hidden % heads:
        raise read.refuse("num_attention_heads", heads, f"a divisor of hidden_size {hidden}")
    return {
        "vocab_size": read.integer("vocab_size"),
        "hidden_size": hidden,
        "num_layers": read.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "intermediate_size": read.integer("intermediate_size"),
        **other,
    }
