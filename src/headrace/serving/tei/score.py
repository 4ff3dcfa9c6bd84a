"""vLLM's POST /score and /v1/score: one text with several, or several with as many."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
from aiohttp import web

from headrace.errors import InvalidRequest
from headrace.llm.encoder import Encoder
from headrace.serving.body import read
from headrace.serving.openai.fields import acts, needed
from headrace.serving.tei.common import check_count, one_pass, truncation
from headrace.serving.tei.schemas import OnePass
from headrace.serving.vectors import array, reply
from headrace.text.encoding import Encoded, Truncate
from headrace.types import EncodeParams, EncodeTask

__all__ = ["ScoreRequest", "score"]


class ScoreRequest(OnePass):
    """POST /score"""

    text_1: str | list[str] = needed("One text, or as many as in `text_2`.")
    text_2: str | list[str] = needed("A text or several.")
    raw_scores: bool = acts(False, "Logits instead of numbers from 0 to 1 (rerankers).")


async def score(request: web.Request) -> web.StreamResponse:
    """How well texts fit each other: a reranker's score of each pair, or the cosine of an embedder's vectors."""
    body = await read(request, ScoreRequest)
    left, right = _sides(body)
    check_count(request, len(right), "text_2")
    async with one_pass(request, body.model, len(right), EncodeTask.SCORE, EncodeTask.EMBED) as (
        call,
        encoder,
    ):
        call.show_prompt({"text_1": left, "text_2": right})
        cut = truncation(encoder, body)
        ranks = EncodeTask.SCORE in encoder.card.tasks
        if ranks:
            encoded = await _pairs(encoder, left, right, cut)
            params = EncodeParams(task=EncodeTask.SCORE, raw_scores=body.raw_scores)
        else:
            encoder.check(EncodeTask.EMBED)
            encoded = await encoder.texts([*left, *right], prompt=None, truncate=cut, param="text_1")
            params = EncodeParams(normalize=True)
        result = await encoder.run(encoded, params, deadline=call.deadline)
        call.record.usage = result.usage
        rows = np.stack([array(output) for output in result.outputs])
        scores = rows[:, 0] if ranks else np.sum(rows[: len(left)] * rows[len(left) :], axis=1)
        tokens = result.usage.prompt_tokens
        return reply(
            request,
            {
                "id": f"score-{uuid.uuid4().hex}",
                "object": "list",
                "created": int(time.time()),
                "model": call.model.name,
                "data": _data(scores.tolist()),
                "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
            },
        )


def _sides(body: ScoreRequest) -> tuple[list[str], list[str]]:
    left = [body.text_1] if isinstance(body.text_1, str) else body.text_1
    right = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    if len(left) not in (1, len(right)):
        raise InvalidRequest(
            f"text_1 holds {len(left)} texts and text_2 {len(right)}; expected one in text_1, or as many in both",
            param="text_1",
        )
    return left, right


async def _pairs(
    encoder: Encoder, left: Sequence[str], right: Sequence[str], cut: Truncate | None
) -> list[Encoded]:
    if len(left) == 1:
        return await encoder.pairs(left[0], right, truncate=cut, param="text_2")
    rows = []
    for one, other in zip(left, right):
        rows += await encoder.pairs(one, [other], truncate=cut, param="text_2")
    return rows


def _data(scores: Sequence[float]) -> list[dict[str, Any]]:
    return [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)]
