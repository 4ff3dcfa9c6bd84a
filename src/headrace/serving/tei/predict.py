"""POST /predict and /predict_tokens"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from aiohttp import web

from headrace.errors import InvalidRequest
from headrace.llm.encoder import Encoder
from headrace.serving.body import read
from headrace.serving.tei.common import check_count, one_pass, truncation
from headrace.serving.tei.schemas import (
    PredictParameters,
    PredictRequest,
    PredictTokensRequest,
    TokenParameters,
)
from headrace.serving.vectors import Array, array, reply
from headrace.text.encoding import Encoded, Truncate
from headrace.text.spans import Entity, Strategy, entities
from headrace.types import EncodeParams, EncodeTask

__all__ = ["Label", "labelled", "predict", "predict_tokens"]


class Label(msgspec.Struct):
    """One label of a text."""

    label: str
    score: float


class TokenLabel(msgspec.Struct):
    """One labelled token or entity; ``start`` and ``end`` are characters."""

    token: str
    token_id: int
    start: int
    end: int
    results: dict[str, float]


async def predict(request: web.Request) -> web.StreamResponse:
    """Labels of texts or pairs of texts, most likely first."""
    body = await read(request, PredictRequest)
    inputs, single = _sequences(body.inputs)
    check_count(request, len(inputs), "inputs")
    asked = body.parameters or PredictParameters()
    raw = body.raw_scores or asked.function_to_apply is not None
    params = EncodeParams(task=EncodeTask.CLASSIFY, raw_scores=raw)
    async with one_pass(request, body.model, len(inputs), EncodeTask.CLASSIFY) as (call, encoder):
        encoder.check(EncodeTask.CLASSIFY)
        call.show_prompt(body.inputs)
        encoded = await _encode(encoder, inputs, truncation(encoder, body))
        result = await encoder.run(encoded, params, deadline=call.deadline)
        call.record.usage = result.usage
        scores = [_applied(array(output), asked.function_to_apply) for output in result.outputs]
        rows = [labelled(row, encoder.card.labels)[: asked.top_k] for row in scores]
        return reply(request, rows[0] if single and body.parameters is None else rows)


def _applied(logits: Array, function: str | None) -> Array:
    if function == "sigmoid":
        scores: Array = np.multiply(0.5, 1 + np.tanh(0.5 * logits), dtype=np.float32)  # does not overflow
        return scores
    return _softmax(logits) if function == "softmax" else logits


def _softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    scores: Array = np.divide(shifted, shifted.sum(-1, keepdims=True), dtype=np.float32)
    return scores


def labelled(scores: Array, labels: tuple[str, ...]) -> list[Label]:
    """Every label with its score, best first."""
    order = np.argsort(-scores, kind="stable").tolist()
    return [Label(labels[i], float(scores[i])) for i in order]


def _sequences(inputs: str | list[str | list[str]]) -> tuple[list[list[str]], bool]:
    """What `inputs` means: texts and pairs as lists, and whether it was only one, outside any list.

    A list of one or two strings is one text or one pair; batches are lists of lists.
    """
    if isinstance(inputs, str):
        return [[inputs]], True
    if not inputs:
        return [], False
    if isinstance(inputs[0], str):
        flat = [item for item in inputs if isinstance(item, str)]
        if len(flat) != len(inputs) or len(flat) > 2:
            raise InvalidRequest(
                'inputs is a text, a pair ["a", "b"], or a list of lists [["a"], ["b", "c"]]; to classify several '
                "texts wrap each in a list",
                param="inputs",
            )
        return [flat], True
    found = []
    for place, item in enumerate(inputs):
        if isinstance(item, str) or not 1 <= len(item) <= 2:
            raise InvalidRequest(
                f"inputs[{place}] must be a list of one or two texts", param=f"inputs[{place}]"
            )
        found.append(item)
    return found, False


async def _encode(encoder: Encoder, inputs: list[list[str]], cut: Truncate | None) -> list[Encoded]:
    """Texts and pairs, each group tokenized together, in their order."""
    singles = [i for i, item in enumerate(inputs) if len(item) == 1]
    doubles = [i for i, item in enumerate(inputs) if len(item) == 2]
    size = sum(len(text) for item in inputs for text in item)

    def work() -> dict[int, Encoded]:
        text = encoder.text
        found: dict[int, Encoded] = {}
        texts = text.texts([inputs[i][0] for i in singles], truncate=cut, param="inputs") if singles else []
        found.update(zip(singles, texts))
        pairs = [(inputs[i][0], inputs[i][1]) for i in doubles]
        found.update(zip(doubles, text.pairs(pairs, truncate=cut, param="inputs") if pairs else []))
        return found

    found = await encoder.offload(size, work)
    return [found[i] for i in range(len(inputs))]


async def predict_tokens(request: web.Request) -> web.StreamResponse:
    """Labelled tokens or entities of texts, with their places in characters."""
    body = await read(request, PredictTokensRequest)
    strategy = body.aggregation_strategy or (body.parameters or TokenParameters()).aggregation_strategy
    texts = _texts(body.inputs)
    check_count(request, len(texts), "inputs")
    async with one_pass(request, body.model, len(texts), EncodeTask.TOKEN_CLASSIFY) as (call, encoder):
        encoder.check(EncodeTask.TOKEN_CLASSIFY)
        call.show_prompt(body.inputs)
        cut = truncation(encoder, body)
        encoded = await encoder.texts(texts, truncate=cut, details=True, param="inputs")
        # Entities are found by probabilities, and raw scores are shown beside them: so logits leave the engine.
        params = EncodeParams(task=EncodeTask.TOKEN_CLASSIFY, raw_scores=True)
        result = await encoder.run(encoded, params, deadline=call.deadline)
        call.record.usage = result.usage
        rows = [
            _entities(encoder, body, strategy or "none", text, one, array(output))
            for text, one, output in zip(texts, encoded, result.outputs)
        ]
        return reply(request, rows[0] if isinstance(body.inputs, str) else rows)


def _texts(inputs: str | list[str | list[str]]) -> list[str]:
    if isinstance(inputs, str):
        return [inputs]
    texts = []
    for place, item in enumerate(inputs):
        if not isinstance(item, str) and len(item) != 1:
            raise InvalidRequest(
                f"inputs[{place}] must be a text or a list of one text", param=f"inputs[{place}]"
            )
        texts.append(item if isinstance(item, str) else item[0])
    return texts


def _entities(
    encoder: Encoder,
    body: PredictTokensRequest,
    strategy: Strategy,
    text: str,
    encoded: Encoded,
    logits: Array,
) -> list[TokenLabel] | list[dict[str, Any]]:
    side = encoder.text
    whole = side.prompt(None) + text
    found = entities(
        whole,
        encoded,
        _softmax(logits),
        encoder.card.labels,
        strategy,
        joined_words=side.joined_words,
        unknown=side.unknown_id,
    )
    if body.parameters is not None:
        return [_as_pipeline(whole, strategy, entity) for entity in found]
    return [_shown(body, strategy, encoder, whole, encoded, logits, entity) for entity in found]


def _as_pipeline(text: str, strategy: Strategy, entity: Entity) -> dict[str, Any]:
    """In the words of transformers' pipeline, as Hugging Face's clients read it; ``word`` is spelled as in the text."""
    named = {"entity": entity.label, "index": entity.rows[0]}
    if strategy != "none":
        named = {"entity_group": entity.label}
    places = {"start": entity.start, "end": entity.end}
    return {**named, "score": entity.score, "word": text[entity.start : entity.end], **places}


def _shown(
    body: PredictTokensRequest,
    strategy: Strategy,
    encoder: Encoder,
    text: str,
    encoded: Encoded,
    logits: Array,
    entity: Entity,
) -> TokenLabel:
    results: dict[str, Any] = {entity.label: entity.score}
    if body.raw_scores:
        mean = logits[list(entity.rows)].mean(0)
        results = dict(zip(encoder.card.labels, mean.tolist()))
    token_id = encoded.ids[entity.rows[0]] if strategy == "none" else 0
    return TokenLabel(text[entity.start : entity.end], token_id, entity.start, entity.end, results)
