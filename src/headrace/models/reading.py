"""Reading `config.json`: nothing that changes the arithmetic is passed over in silence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from headrace.errors import UnsupportedCheckpoint, nearest

__all__ = ["ACTIVATION_NAMES", "ConfigReader"]

# hidden_act as checkpoints spell it -> kernels.activation.
ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_UNGATED = {**ACTIVATION_NAMES, "relu": "relu", "relu2": "relu2"}

# Fields that do not touch a forward pass at inference (training, tokens, bookkeeping).
_HARMLESS_NAMES = """
    architectures model_type _name_or_path name_or_path transformers_version torch_dtype dtype use_cache
    initializer_range attention_dropout embd_pdrop resid_pdrop embedding_dropout hidden_dropout attn_dropout
    attention_probs_dropout_prob hidden_dropout_prob bos_token_id eos_token_id pad_token_id sep_token_id
    pretraining_tp auto_map cache_implementation _attn_implementation attn_implementation
    _attn_implementation_autoset is_llama_config max_position_embeddings output_attentions
    output_hidden_states use_flash_attn num_labels id2label label2id task_specific_params
    chunk_size_feed_forward decoder_start_token_id problem_type classifier_dropout unsloth_fixed
    unsloth_version
"""
_HARMLESS = frozenset(_HARMLESS_NAMES.split())

# A field that no family reads is refused when its name speaks of arithmetic; other strangers are bookkeeping.
_ARITHMETIC = re.compile(
    r"rope|rotary|attn|attention|norm|scal|bias|window|cap|expert|moe|act|head|layer|emb|logit|multiplier|"
    r"residual|qk|mlp|mup|width|factor|dim|size|rank|latent|sparse|quant|interleave|parallel|clip|gate|conv|"
    r"ssm|mamba|local|global|sink|kv|key|query|value|vision|audio"
)


class ConfigReader:
    """A `config.json` that remembers which fields were read.

    Args:
        config: the parsed file (or its text part).
        architecture: for messages.
        defaults: what the family assumes for fields that the file leaves out.
    """

    def __init__(
        self, config: Mapping[str, Any], architecture: str, defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.architecture = architecture
        self._config = {**(defaults or {}), **config}
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """Any value; None where it is absent or null and no default is given."""
        self._read.add(name)
        value = self._config.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer field; refused when absent without a default, or too small."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.refuse(name, value, f"an integer of at least {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refuse(name, value, "a finite number")
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.number(name, default)
        if value <= 0:
            raise self.refuse(name, value, "a number above 0")
        return value

    def plain_theta(self, where: str, rope: Any, default: float) -> float:
        """Base of a rotary embedding that nothing stretches.

        Args:
            where: names ``rope`` in messages.
            rope: ``rope_parameters``, or the part of it for one type of layer; None: it says nothing.
        """
        if rope is None:
            return default
        if not isinstance(rope, Mapping):
            raise self.refuse(where, rope, "an object")
        for name, value in rope.items():
            fine = name == "rope_theta" or value is None or (name == "partial_rotary_factor" and value == 1)
            if not fine and (name not in ("rope_type", "type") or value != "default"):
                raise self.refuse(f"{where}.{name}", value, "a plain rotary embedding (rope_type default)")
        theta = rope.get("rope_theta") or default
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < math.inf:
            raise self.refuse(f"{where}.rope_theta", theta, "a number above 0")
        return float(theta)

    def optional_number(self, name: str) -> float | None:
        """A finite number, or None where absent or null."""
        return None if self.get(name) is None else self.number(name)

    def flag(self, name: str, default: bool = False) -> bool:
        """A boolean field."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, value, "true or false")
        return value

    def activation(self, *names: str, default: str, gated: bool = True) -> str:
        """The activation under the first of these fields that is set; ``gated``: one that can be a gate."""
        known = ACTIVATION_NAMES if gated else _UNGATED
        values = [(name, self.get(name)) for name in names]
        name, value = next(((n, v) for n, v in values if v is not None), (names[0], default))
        if not isinstance(value, str) or value not in known:
            raise self.refuse(name, value, f"one of {sorted(known)}")
        return known[value]

    def only(self, name: str, allowed: Iterable[Any]) -> None:
        """Refuse a field that is set to anything but these values."""
        value = self.get(name)
        if value is not None and value not in (allowed := list(allowed)):
            raise self.refuse(name, value, f"one of {allowed}" if allowed else "none")

    def refuse(self, name: str, value: Any, expected: str) -> UnsupportedCheckpoint:
        """The error for a field; raise it."""
        got = "missing" if value is None else repr(value)
        return UnsupportedCheckpoint(
            f"config.json of {self.architecture}: {name} is {got}; expected {expected}", param=name
        )

    def finish(self) -> None:
        """Refuse what was not read and could change the arithmetic (null, false, 0, 1, "" and [] cannot)."""
        for name, value in self._config.items():
            if name in self._read or name in _HARMLESS or not _ARITHMETIC.search(name.lower()):
                continue
            if value is None or value is False or (value in (0, 1, 1.0, "", [], {}) and value is not True):
                continue
            hint = nearest(name, self._read)
            raise UnsupportedCheckpoint(
                f"config.json of {self.architecture}: {name} is {value!r}, a field that this family "
                f"does not know{hint or '; it may change what the model computes'}",
                param=name,
            )
