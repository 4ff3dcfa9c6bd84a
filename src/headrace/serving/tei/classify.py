"""POST /classify: labels of texts, in the shapes of Infinity and of vLLM"""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec
from aiohttp import web

from headrace.serving.body import read
from headrace.serving.tei.common import check_count, one_pass, truncation
from headrace.serving.tei.predict import labelled
from headrace.serving.tei.schemas import ClassifyRequest
from headrace.serving.vectors import Array, array, reply
from headrace.types import EncodeParams, EncodeTask

__all__ = ["classify"]


class Class(msgspec.Struct):
    """vLLM's answer for one text: the best label and all probabilities, in the order of the checkpoint's labels."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


async def classify(request: web.Request) -> web.StreamResponse:
    """Infinity's clients say ``raw_scores``, and get every label of a text, best first; vLLM's get one with numbers."""
    body = await read(request, ClassifyRequest)
    texts = [body.input] if isinstance(body.input, str) else body.input
    check_count(request, len(texts), "input")
    params = EncodeParams(task=EncodeTask.CLASSIFY, raw_scores=bool(body.raw_scores))
    async with one_pass(request, body.model, len(texts), EncodeTask.CLASSIFY) as (call, encoder):
        encoder.check(EncodeTask.CLASSIFY)
        call.show_prompt(body.input)
        encoded = await encoder.texts(texts, truncate=truncation(encoder, body), param="input")
        result = await encoder.run(encoded, params, deadline=call.deadline)
        call.record.usage = result.usage
        rows = [array(output) for output in result.outputs]
        labels = encoder.card.labels
        infinity = body.raw_scores is not None
        data: list[Any] = (
            [labelled(row, labels) for row in rows]
            if infinity
            else [_class(index, row, labels) for index, row in enumerate(rows)]
        )
        tokens = result.usage.prompt_tokens
        return reply(
            request,
            {
                "id": f"classify-{uuid.uuid4().hex}",
                "object": "classify" if infinity else "list",
                "created": int(time.time()),
                "model": call.model.name,
                "data": data,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            },
        )


def _class(index: int, scores: Array, labels: tuple[str, ...]) -> Class:
    return Class(index, labels[int(scores.argmax())], scores.tolist(), len(labels))
