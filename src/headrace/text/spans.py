"""From token labels to entities: the aggregation strategies of transformers' token classification.

``none`` labels each token; ``simple`` joins neighbours of one entity; ``first``, ``average`` and ``max`` first give
every word one label: that of its first token, of the mean of its tokens' scores, or of its surest token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from headrace.text.encoding import Encoded

__all__ = ["STRATEGIES", "Entity", "Strategy", "entities"]

Strategy = Literal["none", "simple", "first", "average", "max"]
STRATEGIES: tuple[Strategy, ...] = ("none", "simple", "first", "average", "max")
Scores = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Entity:
    """A labelled piece of a text.

    Attributes:
        label: the entity without ``B-`` and ``I-``, or with it for ``none``.
        start, end: characters of the text.
        rows: places of its tokens in the sequence.
    """

    label: str
    score: float
    start: int
    end: int
    rows: tuple[int, ...]


def entities(
    text: str,
    encoded: Encoded,
    scores: Scores,
    labels: Sequence[str],
    strategy: Strategy,
    *,
    joined_words: bool,
    unknown: int | None = None,
) -> list[Entity]:
    """What a text's token scores say.

    Args:
        encoded: with offsets and special tokens.
        scores: [tokens, labels].
        joined_words: the tokenizer marks pieces that continue a word (WordPiece, and BPE that says so). Others
            are taken to begin a word after a space.
        unknown: id of the unknown token.
    Returns:
        in order of the text; labels ``O`` are left out.
    """
    rows = [i for i, special in enumerate(encoded.special) if not special]
    if strategy in ("none", "simple"):
        found = [_labelled(scores[i], labels, encoded.offsets[i], (i,)) for i in rows]
    else:
        words = _words(text, encoded, rows, joined_words, unknown)
        found = [_word(encoded, scores, labels, word, strategy) for word in words]
    if strategy != "none":
        found = [_join(group) for group in _groups(found)]
    return [entity for entity in found if entity.label != "O"]


def _labelled(scores: Scores, labels: Sequence[str], span: tuple[int, int], rows: tuple[int, ...]) -> Entity:
    best = int(scores.argmax())
    return Entity(labels[best], float(scores[best]), *span, rows)


def _words(
    text: str, encoded: Encoded, rows: list[int], joined_words: bool, unknown: int | None
) -> list[list[int]]:
    """Tokens of each word; an unknown token is a word of its own."""
    words: list[list[int]] = []
    for i in rows:
        start, end = encoded.offsets[i]
        if joined_words:
            continues = len(encoded.tokens[i]) != end - start
        else:
            continues = start > 0 and " " not in text[start - 1 : start + 1]
        if words and continues and encoded.ids[i] != unknown:
            words[-1].append(i)
        else:
            words.append([i])
    return words


def _word(encoded: Encoded, scores: Scores, labels: Sequence[str], rows: list[int], strategy: str) -> Entity:
    span = encoded.offsets[rows[0]][0], encoded.offsets[rows[-1]][1]
    if strategy == "first":
        row: Any = scores[rows[0]]
    elif strategy == "max":
        row = scores[max(rows, key=lambda i: scores[i].max())]
    else:
        row = scores[rows].mean(axis=0)
    return _labelled(row, labels, span, tuple(rows))


def _tag(label: str) -> tuple[bool, str]:
    """Whether a label begins an entity, and which. Labels without B- or I- always continue."""
    if label.startswith(("B-", "I-")):
        return label[0] == "B", label[2:]
    return False, label


def _groups(pieces: list[Entity]) -> list[list[Entity]]:
    groups: list[list[Entity]] = []
    for piece in pieces:
        begins, entity = _tag(piece.label)
        if groups and not begins and entity == _tag(groups[-1][-1].label)[1]:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def _join(group: list[Entity]) -> Entity:
    label = group[0].label.split("-", 1)[-1]
    score = float(np.mean([entity.score for entity in group], dtype=np.float32))
    rows = tuple(row for entity in group for row in entity.rows)
    return Entity(label, score, group[0].start, group[-1].end, rows)
