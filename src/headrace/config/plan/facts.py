"""What is known of a checkpoint without reading weights, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

__all__ = ["DTYPE_BYTES", "Facts", "Quantized", "Tensor"]

DTYPE_BYTES: dict[str, float] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F4": 0.5,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


class Tensor(msgspec.Struct, frozen=True):
    """One tensor of the file.

    Attributes:
        dtype: safetensors' name or ggml's block type.
        nbytes: on disk.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Quantized(msgspec.Struct, frozen=True):
    """How the checkpoint itself is quantized.

    Attributes:
        method: ``fp8``, ``nvfp4``, ``mxfp4``, ``awq``, ``gptq``, ``gguf``...; "" when it is not.
        kv: format of the KV cache that it asks for; "" when it says nothing.
        source: the file that says so.
        bits: of a packed integer, 4 or 8; 0 when it is none.
        group: columns that share a scale, by the settings; 0 when they say nothing.
        reordered: whether columns are in groups by another order than theirs (GPTQ's ``desc_act``).
        kv_problem: why the cache that it asks for is not had; "" when it is, or nothing is asked for.
        strangers: sentences about settings that no reader knows.
    """

    method: str = ""
    kv: str = ""
    source: str = ""
    bits: int = 0
    group: int = 0
    reordered: bool = False
    kv_problem: str = ""
    strangers: tuple[str, ...] = ()


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint's headers.

    Attributes:
        where: folder or file, for messages.
        config: config.json, or what a GGUF file says in its words.
        tensors: by their Hugging Face names; empty when only config.json is there.
        files: names relative to the folder.
        container: ``safetensors``, ``gguf``, or ``config`` when there are no weights.
        modules: classes of modules.json; empty when there is none.
        pooling: 1_Pooling/config.json; empty when there is none.
        max_tokens: of an input, by sentence_bert_config.json or the tokenizer; 0 when they say nothing.
        chat_template: whether one is there.
        pieces: the tokenizer is known to have pieces with scores (SentencePiece), and no merges.
    """

    where: str
    config: dict[str, Any]
    tensors: dict[str, Tensor] = {}
    files: frozenset[str] = frozenset()
    container: str = "safetensors"
    modules: tuple[str, ...] = ()
    pooling: dict[str, Any] = {}
    max_tokens: int = 0
    chat_template: bool = False
    pieces: bool = False
    quantized: Quantized = Quantized()

    @property
    def architecture(self) -> str:
        """The first of ``architectures``; "" when none is named."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""

    @property
    def has_pooling(self) -> bool:
        """sentence-transformers' files are there."""
        return bool(self.modules) or bool(self.pooling)

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of config.json."""
        for name in ("text_config", "llm_config", "language_config"):
            inner = self.config.get(name)
            if isinstance(inner, dict):
                return {**inner, "tie_word_embeddings": self._tied(inner)}
        return self.config

    def _tied(self, inner: Mapping[str, Any]) -> Any:
        outer = self.config.get("tie_word_embeddings")
        return inner.get("tie_word_embeddings") if outer is None else outer
