"""Typed questions about a state, as the pairs of texts that a reranker or an entailment classifier judges.

The wire format is the public System One API: ``noul`` (is it so?), ``choice`` (which one?) and ``score`` (which
level, from low to high?). Each option is judged by itself, and a question's probabilities are the softmax over its
options: the model's own numbers, calibrated as well as the model is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Candidate", "as_text", "candidates", "choice", "noul", "score"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One option of a question.

    Attributes:
        instruction: the question, for rerankers whose prompt has a place for it.
        text: the option.
    """

    instruction: str
    text: str

    @property
    def together(self) -> str:
        """Both as one text, for models without such a place."""
        return f"{self.instruction} {self.text}" if self.instruction != self.text else self.text


def as_text(value: Any) -> str:
    """A text as it is, anything else as compact JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _softmax(logits: Sequence[float]) -> list[float]:
    """Probabilities of options that exclude each other."""
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def _confidence(probabilities: Sequence[float]) -> float:
    """How far the largest stands above an even split: 0 when all are alike, 1 when one holds everything."""
    even = 1 / len(probabilities)
    return 1.0 if len(probabilities) == 1 else max((max(probabilities) - even) / (1 - even), 0.0)


def choice(names: Sequence[str], logits: Sequence[float]) -> dict[str, Any]:
    """The answer to a choice: the most probable option and the probability of each."""
    probabilities = _softmax(logits)
    best = max(range(len(names)), key=probabilities.__getitem__)
    return {
        "type": "choice",
        "choice": names[best],
        "probabilities": dict(zip(names, probabilities)),
        "confidence": _confidence(probabilities),
    }


def score(levels: Sequence[str], logits: Sequence[float]) -> dict[str, Any]:
    """The answer to a score: the mean level, counted from 0 and weighted by probability."""
    probabilities = _softmax(logits)
    return {
        "type": "score",
        "score": sum(level * p for level, p in enumerate(probabilities)),
        "legend": {str(level): text for level, text in enumerate(levels)},
        "probabilities": {str(level): p for level, p in enumerate(probabilities)},
        "confidence": _confidence(probabilities),
    }


def noul(logits: Sequence[float]) -> dict[str, Any]:
    """The answer to a yes-or-no question: the probability of yes, from the logit of yes (and of no, where judged)."""
    yes = _softmax(logits)[0] if len(logits) == 2 else 0.5 * (1 + math.tanh(0.5 * logits[0]))
    return {"type": "noul", "noul": yes}


def _option(name: str, description: str | None) -> str:
    """An option by its name and what it means."""
    return f"{name}: {description}" if description else name


def candidates(
    kind: str, instructions: str, criteria: Mapping[str, str | None] | Sequence[str] | None
) -> list[Candidate]:
    """What is judged for one question, in the order of its options; ``noul``: yes, then no if it is described."""
    if kind == "noul":
        described = criteria if isinstance(criteria, Mapping) else {}
        yes, no = described.get("true") or instructions, described.get("false")
        return [Candidate(instructions, text) for text in (yes, no) if text]
    if isinstance(criteria, Mapping):
        return [Candidate(instructions, _option(name, text)) for name, text in criteria.items()]
    return [Candidate(instructions, text) for text in criteria or ()]
