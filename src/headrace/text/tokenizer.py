"""Text to token ids and back. Imports neither torch nor transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from headrace.errors import UnsupportedCheckpoint
from headrace.text.detokenizer import Detokenizer
from headrace.text.gguf_vocabulary import build_tokenizer
from headrace.text.pieces import Pieces
from headrace.text.sources import TextSources, read_sources

__all__ = ["Tokenizer"]

_LOCKED_CHARS = 4096  # of texts up to which the batch call's own cost would be felt
_BERT_CLASS = re.compile(r"(Bert|DistilBert|MPNet|Electra|MobileBert|LayoutLM)Tokenizer(Fast)?")
_BERT_TYPES = ("bert", "distilbert", "mpnet", "electra")  # whose class is one of these
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class Tokenizer:
    """A model's tokenizer, safe to use from several threads.

    Attributes:
        sources: the files and metadata it was made from.
        backend: the `tokenizers` object, for whoever needs the whole vocabulary (grammars).
        special_tokens: role (``bos_token``, ``eos_token``...) -> text, as chat templates see them.
        bos_id, pad_id: or None.
        eos_ids: every id that ends a generation, the tokenizer's own first.
        truncation_side: the end that is cut off, ``left`` or ``right``.
    """

    def __init__(self, backend: tokenizers.Tokenizer, sources: TextSources) -> None:
        self.backend = backend
        self.sources = sources
        self.truncation_side = _truncation_side(backend, sources)
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = _special_tokens(sources)
        self.bos_id = self._role("bos")
        self.pad_id = self._role("pad")
        self.eos_ids = self._eos_ids()
        self._first: dict[int, bytes] = {}
        self._later: dict[int, bytes] = {}

    @classmethod
    def from_path(cls, path: Path) -> Tokenizer:
        """The tokenizer of a folder or of a GGUF file.

        Raises MissingFile when there is none, UnsupportedCheckpoint when it is damaged or of an unknown kind.
        """
        return cls.from_sources(read_sources(path))

    @classmethod
    def from_sources(cls, sources: TextSources) -> Tokenizer:
        file = sources.tokenizer_file
        if file is None:
            assert sources.gguf is not None, "sources come from a folder or from a GGUF file"
            return cls(build_tokenizer(sources.gguf.metadata, sources.path), sources)
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise UnsupportedCheckpoint(f"{file} is not a tokenizer.json that can be read: {error}") from None
        _apply_settings(backend, sources.tokenizer_config)
        _apply_bert_settings(backend, sources)
        return cls(backend, sources)

    # -- to ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of one text; ``add_special_tokens`` puts the model's start and end around it.

        Special tokens written out in the text become those tokens in either case. Long texts are worked on
        outside Python's lock, which ``backend.encode`` holds: a megabyte would stop every thread for seconds.
        """
        if len(text) > _LOCKED_CHARS:
            return self.encode_batch([text], add_special_tokens)[0]
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Ids of many texts, worked on by all cores outside Python's lock."""
        batch = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in batch]

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Ids and segment numbers of two texts for a cross-encoder, special tokens included."""
        encoding = self.backend.encode(first, second)
        return list(encoding.ids), list(encoding.type_ids)

    # -- to text

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence: exactly what a Detokenizer gives for it piece by piece."""
        stream = Detokenizer(self, skip_special_tokens=skip_special_tokens)
        return stream.push(ids) + stream.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that the token adds in the middle of a text; empty for ids outside the vocabulary."""
        found = self._later.get(token_id)
        if found is None:
            token = self.backend.id_to_token(token_id)
            found = self._later[token_id] = b"" if token is None else self.pieces.later(token)
        return found

    def first_token_bytes(self, token_id: int) -> bytes:
        """Bytes that the token gives at the start of a text (some decoders drop a space there)."""
        found = self._first.get(token_id)
        if found is None:
            token = self.backend.id_to_token(token_id)
            found = self._first[token_id] = b"" if token is None else self.pieces.first(token)
        return found

    @cached_property
    def pieces(self) -> Pieces:
        return Pieces(self._settings["decoder"])

    # -- vocabulary

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that ``skip_special_tokens`` leaves out."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self.backend.token_to_id(token)
        return found

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (``Ġthe``, ``▁the``)."""
        found: str | None = self.backend.id_to_token(token_id)
        return found

    # -- set-up

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """The decoder as tokenizer.json would have it, without writing out the vocabulary."""
        decoder = self.backend.decoder
        return {"decoder": None if decoder is None else json.loads(decoder.__getstate__())}

    def _role(self, role: str) -> int | None:
        text = self.special_tokens.get(f"{role}_token")
        return None if text is None else self.token_to_id(text)

    def _eos_ids(self) -> tuple[int, ...]:
        """From the tokenizer, generation_config.json and config.json: the union, in this order."""
        found = [self._role("eos")]
        for settings in (self.sources.generation_config, self.sources.config):
            value = settings.get("eos_token_id")
            found += value if isinstance(value, list) else [value]
        return tuple(dict.fromkeys(i for i in found if isinstance(i, int) and not isinstance(i, bool)))


def _special_tokens(sources: TextSources) -> dict[str, str]:
    """Roles and texts from special_tokens_map.json, then tokenizer_config.json, then GGUF metadata."""
    found: dict[str, str] = {}
    if sources.tokenizer_file is None and sources.gguf is not None:
        metadata = sources.gguf.metadata
        tokens = metadata.get("tokenizer.ggml.tokens", [])
        spelled = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # llama.cpp spells it so
        for role in _NAMED:
            index = metadata.get(f"tokenizer.ggml.{spelled.get(role, role)}_token_id")
            if isinstance(index, int) and 0 <= index < len(tokens):
                found[f"{role}_token"] = tokens[index]
    for settings in (sources.special_tokens_map, sources.tokenizer_config):
        for role in _NAMED:
            value = settings.get(f"{role}_token")
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[f"{role}_token"] = text
    return found


def _apply_bert_settings(backend: tokenizers.Tokenizer, sources: TextSources) -> None:
    """What tokenizer_config.json says of letters, for classes of BERT's kind: there it wins over tokenizer.json.

    So has transformers it, and sentence-transformers by it. Where the files differ, texts would be other tokens.
    """
    settings, normalizer = sources.tokenizer_config, backend.normalizer
    if not isinstance(normalizer, tokenizers.normalizers.BertNormalizer):
        return
    name = settings.get("tokenizer_class")
    if name is None and sources.config.get("model_type") not in _BERT_TYPES:
        return
    if name is not None and not _BERT_CLASS.fullmatch(str(name)):
        return
    backend.normalizer = tokenizers.normalizers.BertNormalizer(
        clean_text=normalizer.clean_text,
        handle_chinese_chars=settings.get("tokenize_chinese_chars") is not False,
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case") is not False,
    )


def _truncation_side(backend: tokenizers.Tokenizer, sources: TextSources) -> str:
    """As transformers reads it: of tokenizer_config.json, else of the section in tokenizer.json."""
    stated = sources.tokenizer_config.get("truncation_side")
    if stated is None and backend.truncation is not None:
        stated = backend.truncation["direction"]
    return "left" if stated == "left" else "right"


def _apply_settings(backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
    """Added tokens that tokenizer_config.json lists and tokenizer.json lacks."""
    listed = settings.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        return
    missing = []
    for entry in listed.values():
        text = entry.get("content") if isinstance(entry, dict) else None
        if isinstance(text, str) and backend.token_to_id(text) is None:
            flags = {key: bool(entry[key]) for key in ("lstrip", "rstrip", "single_word") if key in entry}
            special = bool(entry.get("special"))
            token = tokenizers.AddedToken(
                text, normalized=bool(entry.get("normalized", not special)), special=special, **flags
            )
            missing.append(token)
    backend.add_tokens(missing)
