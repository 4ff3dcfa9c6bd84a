"""Log-probabilities in the shapes of both APIs, with the text and bytes of each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace.llm.protocols import Tokenizer
from headrace.serving.openai.replies import ChatLogprobs, TextLogprobs, TokenEntry
from headrace.types import TokenLogprobs

__all__ = ["TokenNames"]


class TokenNames:
    """Names tokens for one request.

    A token that is no whole characters is named ``bytes:\\xf0\\x9f``, as OpenAI does; with ``as_ids`` every
    token is named ``token_id:42``.
    """

    def __init__(self, tokenizer: Tokenizer, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def name(self, token: int) -> tuple[str, bytes]:
        """Text and bytes of a token."""
        data = self._tokenizer.token_bytes(token)
        if self._as_ids:
            return f"token_id:{token}", data
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data

    def _entry(self, token: int, logprob: float) -> TokenEntry:
        name, data = self.name(token)
        return TokenEntry(name, logprob, list(data))

    def chat(self, entries: Sequence[TokenLogprobs], top: int) -> ChatLogprobs:
        """The newer shape: one object a token."""
        content = []
        for entry in entries:
            one = self._entry(entry.token_id, entry.logprob)
            one.top_logprobs = [self._entry(*candidate) for candidate in entry.top[:top]]
            content.append(one)
        return ChatLogprobs(content)

    def text(self, entries: Sequence[TokenLogprobs], top: int, offset: int) -> TextLogprobs:
        """The older shape: parallel lists. ``offset`` is where in the text the first token begins."""
        reply = TextLogprobs([], [], [] if top else None, [])
        for entry in entries:
            offset = self._add(reply, entry.token_id, entry.logprob, offset)
            if reply.top_logprobs is not None:
                found = {self.name(token)[0]: logprob for token, logprob in entry.top[:top]}
                found.setdefault(self.name(entry.token_id)[0], entry.logprob)
                reply.top_logprobs.append(found)
        return reply

    def echoed(self, prompt: Sequence[int], entries: Sequence[TokenLogprobs], top: int) -> TextLogprobs:
        """The prompt's tokens in the older shape; the first has no log-probability."""
        reply = TextLogprobs([], [], [None] if top else None, [])
        offset = self._add(reply, prompt[0], None, 0)
        rest = self.text(entries, top, offset)
        return joined(reply, rest)

    def _add(self, reply: TextLogprobs, token: int, logprob: float | None, offset: int) -> int:
        name, data = self.name(token)
        reply.tokens.append(name)
        reply.token_logprobs.append(logprob)
        reply.text_offset.append(offset)
        return offset + len(data.decode("utf-8", "ignore"))

    def prompt(self, entries: Sequence[TokenLogprobs]) -> list[Any]:
        """``prompt_logprobs``: null for the first token, then {token id: {logprob, rank, decoded_token}}."""
        rows: list[Any] = [None]
        for entry in entries:
            row = {
                str(token): {"logprob": logprob, "rank": rank, "decoded_token": self.name(token)[0]}
                for rank, (token, logprob) in enumerate(entry.top, 1)
            }
            own = {
                "logprob": entry.logprob,
                "rank": entry.rank,
                "decoded_token": self.name(entry.token_id)[0],
            }
            rows.append(row | {str(entry.token_id): own})
        return rows


def joined(first: TextLogprobs, second: TextLogprobs) -> TextLogprobs:
    """Two stretches of the older shape, one after the other."""
    top = None
    if first.top_logprobs is not None and second.top_logprobs is not None:
        top = first.top_logprobs + second.top_logprobs
    return TextLogprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        top,
        first.text_offset + second.text_offset,
    )
