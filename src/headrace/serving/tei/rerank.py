"""POST /rerank (text-embeddings-inference), /v1/rerank (Jina) and /v2/rerank (Cohere)"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from headrace.serving.body import read
from headrace.serving.tei.common import check_count, one_pass, truncation
from headrace.serving.tei.schemas import CohereRerankRequest, JinaRerankRequest, OnePass, RerankRequest
from headrace.serving.vectors import array, reply
from headrace.types import EncodeParams, EncodeTask, Usage

__all__ = ["rerank", "rerank_cohere", "rerank_jina"]


class Rank(msgspec.Struct):
    """The score of one text; the list is sorted, best first."""

    index: int
    score: float
    text: str | UnsetType = UNSET


class Relevance(msgspec.Struct):
    """The same in the words of Jina and Cohere."""

    index: int
    relevance_score: float
    document: dict[str, str] | UnsetType = UNSET


async def rerank(request: web.Request) -> web.StreamResponse:
    """Texts by how well they answer a query, best first."""
    body = await read(request, RerankRequest)
    scores, _, _ = await _scores(
        request, body, body.query, body.texts, "texts", body.instruction, raw=body.raw_scores
    )
    ranks = [Rank(i, scores[i], body.texts[i] if body.return_text else UNSET) for i in _order(scores, None)]
    return reply(request, ranks)


async def rerank_jina(request: web.Request) -> web.StreamResponse:
    """Documents by how well they answer a query, best first, in Jina's shape."""
    body = await read(request, JinaRerankRequest)
    texts = [item if isinstance(item, str) else item.text for item in body.documents]
    scores, usage, name = await _scores(
        request, body, body.query, texts, "documents", body.instruction, raw=body.raw_scores
    )
    shown = body.return_documents is not False
    results = [
        Relevance(i, scores[i], {"text": texts[i]} if shown else UNSET) for i in _order(scores, body.top_n)
    ]
    tokens = {"total_tokens": usage.prompt_tokens, "prompt_tokens": usage.prompt_tokens}
    kind = "rerank" if request.path == "/rerank" else "list"  # Infinity's word, and Jina's
    return reply(request, {"model": name, "object": kind, "usage": tokens, "results": results})


async def rerank_cohere(request: web.Request) -> web.StreamResponse:
    """Documents by how well they answer a query, best first, in Cohere's shape."""
    body = await read(request, CohereRerankRequest)
    scores, usage, _ = await _scores(
        request,
        body,
        body.query,
        body.documents,
        "documents",
        limit=body.max_tokens_per_doc,
        priority=body.priority or 0,
    )
    results = [Relevance(i, scores[i]) for i in _order(scores, body.top_n)]
    meta = {"api_version": {"version": "2"}, "tokens": {"input_tokens": usage.prompt_tokens}}
    return reply(request, {"id": str(uuid.uuid4()), "results": results, "meta": meta})


async def _scores(
    request: web.Request,
    body: OnePass,
    query: str,
    texts: Sequence[str],
    param: str,
    instruction: str | None = None,
    *,
    raw: bool = False,
    limit: int | None = None,
    priority: int = 0,
) -> tuple[list[float], Usage, str]:
    """A score for each text, what it cost, and the model's name."""
    check_count(request, len(texts), param)
    params = EncodeParams(task=EncodeTask.SCORE, raw_scores=raw)
    async with one_pass(request, body.model, len(texts), EncodeTask.SCORE) as (call, encoder):
        encoder.check(EncodeTask.SCORE)
        shown: Any = {"query": query, param: list(texts)}
        call.show_prompt(shown)
        cut = truncation(encoder, body, limit)
        encoded = await encoder.pairs(query, texts, truncate=cut, instruction=instruction, param=param)
        result = await encoder.run(encoded, params, priority=priority, deadline=call.deadline)
        call.record.usage = result.usage
        return [float(array(output)[0]) for output in result.outputs], result.usage, call.model.name


def _order(scores: list[float], top: int | None) -> list[int]:
    """Best first; equal scores in the order of the texts."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:top]
