"""What each token contributes to a text, as bytes, for the decoders that tokenizers of served models use.

A text is then the tokens' bytes one after another, read as UTF-8. That makes decoding incremental by nature:
a token's bytes do not depend on its neighbours, only on whether it is the first.
"""

from __future__ import annotations

import codecs
from typing import Any

from headrace.errors import UnsupportedCheckpoint

__all__ = ["Pieces"]

# SentencePiece gives one U+FFFD for every byte that belongs to no character, byte-level BPE one for every
# longest malformed sequence.
_EACH_BYTE = "headrace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "�" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)

_CLEANUPS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


class Pieces:
    """Token text to bytes by the rules of a tokenizer.json's ``decoder``.

    Attributes:
        errors: how malformed UTF-8 is replaced (name of a codecs error handler).
        strip: characters to remove at the start of a text, at most ``strip_count`` of them.

    Raises UnsupportedCheckpoint for a decoder whose output cannot be given token by token.
    """

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        self.errors = "replace"
        self.strip = ""
        self.strip_count = 0
        self._replacements: list[tuple[str, str]] = []
        self._kind = "plain" if decoder is None else ""
        self._fallback = False
        self._prefix = "##"
        self._cleanup = False
        self._drop_first = ""
        fused = False
        for step in _steps(decoder):
            fused = self._read(step, fused) or fused

    def _read(self, step: dict[str, Any], fused: bool) -> bool:
        """Take in one step of the decoder. True when it joins all tokens into one text."""
        kind = step.get("type")
        if kind == "ByteLevel":
            self._kind = "bytes"
        elif kind == "Replace" and "String" in step.get("pattern", {}) and not fused:
            self._replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "ByteFallback":
            self._fallback = True
            self.errors = _EACH_BYTE
        elif kind == "Metaspace" and not fused:
            self._replacements.append((step["replacement"], " "))
            first = step.get("prepend_scheme", "always") != "never"
            self._drop_first = step["replacement"] if first else ""
        elif kind == "WordPiece":
            self._kind = "words"
            self._prefix = step.get("prefix", "##")
            self._cleanup = bool(step.get("cleanup", True))
        elif kind == "Strip" and fused and step.get("stop", 0) == 0:
            self.strip, self.strip_count = step["content"], int(step["start"])
        elif kind == "Strip" and not step.get("start") and not step.get("stop"):
            pass
        elif kind != "Fuse":
            raise UnsupportedCheckpoint(
                f"the tokenizer's decoder has a step {kind!r} whose output cannot be streamed there; "
                "known are ByteLevel, Replace, ByteFallback, Metaspace, WordPiece, Fuse, Strip at the start"
            )
        return bool(kind == "Fuse")

    def first(self, token: str) -> bytes:
        """Bytes of a token that starts a text."""
        if self._kind == "words":
            return self._clean(token).encode()
        if self._drop_first:
            return self.later(token.replace(self._drop_first, ""))
        return token.encode() if self._kind == "plain" else self.later(token)

    def later(self, token: str) -> bytes:
        """Bytes of a token that follows others."""
        if self._kind == "plain":
            return f" {token}".encode()
        if self._kind == "words":
            continued = token.startswith(self._prefix)
            return self._clean(token[len(self._prefix) :] if continued else f" {token}").encode()
        for old, new in self._replacements:
            token = token.replace(old, new)
        if self._kind == "bytes":
            known = [_ALPHABET.get(char) for char in token]
            return token.encode() if None in known else bytes(byte for byte in known if byte is not None)
        if self._fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                return token.encode()
        return token.encode()

    def _clean(self, text: str) -> str:
        """The clean-up of English punctuation that WordPiece decoders apply."""
        if self._cleanup:
            for old, new in _CLEANUPS:
                text = text.replace(old, new)
        return text


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder.get("type") == "Sequence" else [decoder]
