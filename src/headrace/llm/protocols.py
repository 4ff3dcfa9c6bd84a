"""What the Python API asks of the text room: small protocols, so that tests can bring their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

__all__ = ["Detokenizer", "Messages", "Prompt", "TextKit", "Tokenizer"]

Messages = Sequence[Mapping[str, Any]]


class Tokenizer(Protocol):
    """Text to ids and back. All methods are safe to call from several threads."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this token stands for; of a special token its name."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text unless asked for."""
        ...

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, written as the vocabulary spells it."""
        ...


class Detokenizer(Protocol):
    """Ids to text as they come: never half a character, and joined deltas equal the whole text."""

    def push(self, token_ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class TextKit(Protocol):
    """Tokenizer, template and detokenizers of one model. All methods are safe to call from several threads."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def render(
        self,
        messages: Messages,
        *,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that the model's chat template (or the one given) makes of messages.

        Args:
            kwargs: further variables of the template.

        Raises InvalidRequest when the template refuses, Unprocessable when there is none.
        """
        ...

    @property
    def template(self) -> str:
        """Source of the chat templates, all in one; empty when there is none."""
        ...

    @property
    def architecture(self) -> str:
        """First of ``architectures`` in config.json; may be empty."""
        ...

    def detokenizer(
        self, *, skip_special_tokens: bool, continuing: bool, visible: frozenset[int] = frozenset()
    ) -> Detokenizer:
        """For one sequence.

        Args:
            continuing: its text goes on the prompt's, so its start is kept as it is.
            visible: special tokens that are shown all the same.
        """
        ...


class Prompt(msgspec.Struct, frozen=True):
    """A prompt as the core takes it.

    Attributes:
        text: what it says, where known (for ``echo``).
        continuing: the answer goes on the prompt's text, and is no turn of its own as in a chat.
        param: the API field that it came from, for errors.
    """

    token_ids: tuple[int, ...]
    text: str | None = None
    continuing: bool = True
    param: str = "prompt"
