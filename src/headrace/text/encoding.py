"""Texts and pairs of texts for one pass: prompts, special tokens, segments, truncation. Threads may share one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tokenizers

from headrace.errors import ContextLengthExceeded, InvalidRequest, nearest
from headrace.models.encode_card import EncodeCard
from headrace.text.tokenizer import Tokenizer

__all__ = ["Direction", "EncodeText", "Encoded", "Truncate", "longest_first"]

Direction = Literal["right", "left"]


@dataclass(frozen=True, slots=True)
class Truncate:
    """Cut what is too long instead of refusing it.

    Attributes:
        direction: the end that is cut off; None: the one that the tokenizer names.
        limit: tokens to keep, special ones included; None: what the model takes.
    """

    direction: Direction | None = None
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence for the engine.

    Attributes:
        types: segment numbers; empty: all zero.
        offsets: first and last + 1 character of each token in the text, where asked for.
        special: which tokens the tokenizer added, where asked for.
        tokens: as the vocabulary spells them, where asked for.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...] = ()
    offsets: tuple[tuple[int, int], ...] = ()
    special: tuple[bool, ...] = ()
    tokens: tuple[str, ...] = ()


class EncodeText:
    """The text side of an embedder, classifier or reranker.

    Args:
        max_tokens: longest sequence that the engine takes.

    Attributes:
        direction: the end that is cut off when nobody says which.
        joined_words, unknown_id: what `spans.entities` needs to know.
    """

    def __init__(self, tokenizer: Tokenizer, card: EncodeCard, max_tokens: int) -> None:
        self.tokenizer, self.card, self.max_tokens = tokenizer, card, max_tokens
        inputs = tokenizer.sources.tokenizer_config.get("model_input_names")
        # Checkpoints whose tokenizer says that it gives no segments were trained without them.
        self._types = not isinstance(inputs, list) or "token_type_ids" in inputs
        self.direction: Direction = "left" if tokenizer.truncation_side == "left" else "right"
        model = tokenizer.backend.model
        # Tokenizers of this kind mark the pieces that continue a word, so that words are known exactly.
        self.joined_words = bool(getattr(model, "continuing_subword_prefix", None))
        unknown = tokenizer.special_tokens.get("unk_token")
        self.unknown_id = None if unknown is None else tokenizer.token_to_id(unknown)

    def texts(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        truncate: Truncate | None = None,
        add_special_tokens: bool = True,
        details: bool = False,
        param: str = "input",
    ) -> list[Encoded]:
        """Tokenize texts, on all cores.

        Args:
            prompt: name of one of the checkpoint's prompts; None: its default one, if it has any; "": none.
            truncate: None refuses texts that are too long.
            details: offsets, special tokens and spellings too.
            param: field of the API, for errors.
        Raises:
            InvalidRequest: an unknown prompt, text that is no valid Unicode, or a text without tokens.
            ContextLengthExceeded: a text has too many. ``param`` names which.
        """
        whole = self.prepared(texts, prompt)
        encode = self.tokenizer.backend.encode_batch if details else self.tokenizer.backend.encode_batch_fast
        found = self._batch(encode, whole, add_special_tokens, param)
        return self.finished(
            whole,
            found,
            truncate=truncate,
            add_special_tokens=add_special_tokens,
            details=details,
            param=param,
        )

    def prepared(self, texts: Sequence[str], prompt: str | None) -> list[str]:
        """What the tokenizer is given: prompts before, and lower case where the checkpoint says so."""
        before = self.prompt(prompt)
        return [self._prepare(before + text) for text in texts]

    def finished(
        self,
        whole: Sequence[str],
        found: Sequence[tokenizers.Encoding],
        *,
        truncate: Truncate | None,
        add_special_tokens: bool = True,
        details: bool = False,
        param: str = "input",
    ) -> list[Encoded]:
        """Check and cut what the tokenizer made of prepared texts. Raises: see `texts`."""
        out = []
        for place, encoding in enumerate(found):
            limit = self._limit(truncate)
            if len(encoding) > limit:
                name = _place(param, place, len(whole))
                if truncate is None:
                    raise self._too_long(len(encoding), name)
                encoding = self._shorter(
                    whole[place], None, limit, truncate.direction or self.direction, add_special_tokens
                )
            out.append(self._encoded(encoding, details, _place(param, place, len(whole))))
        return out

    def pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        truncate: Truncate | None = None,
        param: str = "texts",
    ) -> list[Encoded]:
        """Two texts in one sequence, as cross-encoders read them. Too long ones lose tokens of the longer text.

        Raises: see `texts`.
        """
        whole = [(self._prepare(first), self._prepare(second)) for first, second in pairs]
        found = self._batch(self.tokenizer.backend.encode_batch_fast, whole, True, param)
        out = []
        for place, encoding in enumerate(found):
            limit = self._limit(truncate)
            if len(encoding) > limit:
                if truncate is None:
                    raise self._too_long(len(encoding), _place(param, place, len(pairs)))
                encoding = self._shorter(*whole[place], limit, truncate.direction or self.direction, True)
            out.append(self._encoded(encoding, False, _place(param, place, len(pairs))))
        return out

    def raw(
        self, texts: Sequence[str], param: str, *, add_special_tokens: bool = False, details: bool = False
    ) -> list[Encoded]:
        """Tokens of texts of any length, none included."""
        encode = self.tokenizer.backend.encode_batch if details else self.tokenizer.backend.encode_batch_fast
        found = self._batch(encode, list(texts), add_special_tokens, param)
        return [_encoded(encoding, details, self._types) for encoding in found]

    def ids(self, ids: Sequence[int], truncate: Truncate | None, param: str) -> Encoded:
        """Token ids from the caller, taken as they are; cut from one end if asked for."""
        limit = self._limit(truncate)
        if len(ids) > limit:
            if truncate is None:
                raise self._too_long(len(ids), param)
            ids = ids[:limit] if (truncate.direction or self.direction) == "right" else ids[-limit:]
        if not ids:
            raise InvalidRequest(f"{param} is empty: it has no tokens", param=param)
        return Encoded(tuple(ids))

    def prompt(self, name: str | None) -> str:
        """The text of one of the checkpoint's prompts."""
        name = self.card.default_prompt if name is None else name
        if not name:
            return ""
        if name not in self.card.prompts:
            known = ", ".join(map(repr, self.card.prompts)) or "none"
            raise InvalidRequest(
                f"prompt_name is {name[:80]!r}; this checkpoint has {known}{nearest(name[:80], self.card.prompts)}",
                param="prompt_name",
            )
        return self.card.prompts[name]

    def _prepare(self, text: str) -> str:
        return text.lower() if self.card.lowercase else text

    def _limit(self, truncate: Truncate | None) -> int:
        if truncate is None or truncate.limit is None:
            return self.max_tokens
        return min(truncate.limit, self.max_tokens)

    def _batch(
        self, encode: Callable[..., list[Any]], texts: list[Any], special: bool, param: str
    ) -> list[tokenizers.Encoding]:
        try:
            return encode(texts, add_special_tokens=special)
        except (TypeError, UnicodeEncodeError):
            self.check_unicode(texts, param)
            raise

    def encodings(self, texts: list[str], add_special_tokens: bool) -> list[tokenizers.Encoding]:
        """Of prepared texts, on all cores, outside Python's lock; raises TypeError for what is no valid Unicode."""
        return self.tokenizer.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    @staticmethod
    def check_unicode(texts: Sequence[Any], param: str) -> None:
        """Raise InvalidRequest naming the text (or pair) that is no valid Unicode, if one is."""
        for place, text in enumerate(texts):
            if not all(_is_unicode(part) for part in ((text,) if isinstance(text, str) else text)):
                name = _place(param, place, len(texts))
                raise InvalidRequest(
                    f"{name} is no valid Unicode: it holds half of a surrogate pair", param=name
                ) from None

    def _shorter(
        self, first: str, second: str | None, limit: int, direction: Direction, special: bool
    ) -> tokenizers.Encoding:
        """The same again, with text tokens cut off so that special tokens stay."""
        backend = self.tokenizer.backend
        # The batch call works outside Python's lock; `encode` would stop every thread while it reads a long text.
        one = backend.encode_batch([first], add_special_tokens=False)[0]
        two = None if second is None else backend.encode_batch([second], add_special_tokens=False)[0]
        room = limit - (backend.num_special_tokens_to_add(two is not None) if special else 0)
        if room < 1:
            raise InvalidRequest(
                f"{limit} tokens leave no room for text beside this tokenizer's special tokens",
                param="truncate",
            )
        keep_one, keep_two = longest_first(len(one), 0 if two is None else len(two), room)
        one.truncate(keep_one, 0, direction)
        if two is not None:
            two.truncate(keep_two, 0, direction)
        return backend.post_process(one, two, special)

    def _encoded(self, encoding: tokenizers.Encoding, details: bool, name: str) -> Encoded:
        if not len(encoding):
            raise InvalidRequest(f"{name} is empty: it has no tokens", param=name)
        return _encoded(encoding, details, self._types)

    def _too_long(self, count: int, name: str) -> ContextLengthExceeded:
        return ContextLengthExceeded(
            f"{name} has {count} tokens and this model takes {self.max_tokens}; shorten it, or ask for it to be cut "
            "(truncate, or truncate_prompt_tokens -1)",
            param=name,
        )


def _encoded(encoding: tokenizers.Encoding, details: bool, with_types: bool) -> Encoded:
    types = encoding.type_ids if with_types else ()
    shown = tuple(types) if any(types) else ()
    if not details:
        return Encoded(tuple(encoding.ids), shown)
    special = tuple(bool(flag) for flag in encoding.special_tokens_mask)
    return Encoded(tuple(encoding.ids), shown, tuple(encoding.offsets), special, tuple(encoding.tokens))


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts stay when the longer one loses tokens until both fit in ``room``."""
    if first + second <= room:
        return first, second
    short, long = min(first, second), max(first, second)
    if short <= room // 2:
        long = room - short
    else:
        short, long = room // 2, room - room // 2
    return (short, long) if first <= second else (long, short)


def _place(param: str, index: int, count: int) -> str:
    return f"{param}[{index}]" if count > 1 else param


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
