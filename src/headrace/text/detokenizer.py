"""Token ids to text while they arrive."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.text.tokenizer import Tokenizer

__all__ = ["Detokenizer"]


class Detokenizer:
    """Text of one sequence, given out as soon as it is certain; constant work a token.

    All that ``push`` and ``finish`` return, joined, is the text of the whole sequence, however the ids were
    split over calls. Only bytes of an unfinished character are held back.

    Args:
        skip_special_tokens: leave special tokens out of the text.
        continuing: the ids go on an existing text, so the rules for the start of a text (SentencePiece's
            leading space) do not apply. Completions want this, a chat's reply does not.
        visible: special tokens that stay in the text all the same.
    """

    __slots__ = ("_bytes", "_decoder", "_first_bytes", "_known", "_skip", "_started", "_strip", "_to_strip")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        continuing: bool = False,
        visible: frozenset[int] = frozenset(),
    ) -> None:
        pieces = tokenizer.pieces
        self._bytes = tokenizer.token_bytes
        self._first_bytes = tokenizer.first_token_bytes
        self._known = tokenizer.id_to_token
        self._skip = tokenizer.special_ids - visible if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(pieces.errors)
        self._started = continuing
        self._strip = pieces.strip
        self._to_strip = 0 if continuing else pieces.strip_count

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that these ids make certain; ids outside the vocabulary add nothing."""
        data = bytearray()
        for token_id in token_ids:
            if token_id in self._skip:
                continue
            if self._started:
                data += self._bytes(token_id)
            elif self._known(token_id) is not None:
                data += self._first_bytes(token_id)
                self._started = True
        return self._stripped(self._decoder.decode(bytes(data)))

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that never became whole."""
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._to_strip and text:
            if not text.startswith(self._strip):
                self._to_strip = 0
                break
            text = text[len(self._strip) :]
            self._to_strip -= 1
        return text
