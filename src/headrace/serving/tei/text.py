"""POST /tokenize and /decode, GET /info"""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from headrace import __version__
from headrace.errors import InvalidRequest
from headrace.llm.encoder import Encoder
from headrace.serving.body import read
from headrace.serving.state import STATE, Model
from headrace.serving.tei.common import check_count, one_pass
from headrace.serving.tei.schemas import DecodeRequest, TokenizeRequest
from headrace.serving.vectors import reply
from headrace.text.encoding import Encoded

__all__ = ["decode", "info", "tokenize"]


_POOLING: dict[str, str] = {"last": "last_token"}  # text-embeddings-inference's word


class Token(msgspec.Struct):
    """One token; ``start`` and ``stop`` are characters, null for tokens that were added."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


async def tokenize(request: web.Request) -> web.StreamResponse:
    """Tokens of texts."""
    body = await read(request, TokenizeRequest)
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    check_count(request, len(texts), "inputs")
    async with one_pass(request, body.model, 1) as (_, encoder):
        before = encoder.text.prompt(body.prompt_name)
        whole = [before + text for text in texts]
        special = body.add_special_tokens
        found = await encoder.offload(
            sum(map(len, whole)),
            lambda: encoder.text.raw(whole, "inputs", add_special_tokens=special, details=True),
        )
        rows = [_tokens(text, encoded) for text, encoded in zip(whole, found)]
        return reply(request, rows)


def _tokens(text: str, encoded: Encoded) -> list[Token]:
    rows = []
    for id, special, (start, stop), spelled in zip(
        encoded.ids, encoded.special, encoded.offsets, encoded.tokens
    ):
        place = (None, None) if special else (start, stop)
        rows.append(Token(id, spelled if special else text[start:stop], special, *place))
    return rows


async def decode(request: web.Request) -> web.StreamResponse:
    """Texts of token ids."""
    body = await read(request, DecodeRequest)
    rows = [part if isinstance(part, list) else [part] for part in body.ids]
    if body.ids and isinstance(body.ids[0], int):
        rows = [[i for part in rows for i in part]]
    check_count(request, len(rows), "ids")
    async with one_pass(request, body.model, 1) as (_, encoder):
        _check_ids(rows, encoder)
        text = encoder.text.tokenizer
        size = sum(map(len, rows))
        shown = await encoder.offload(
            size,
            lambda: [text.backend.decode(row, skip_special_tokens=body.skip_special_tokens) for row in rows],
        )
        return reply(request, shown)


def _check_ids(rows: list[list[int]], encoder: Encoder) -> None:
    vocab = encoder.client.ready.vocab_size
    for place, row in enumerate(rows):
        if any(id >= vocab for id in row):
            raise InvalidRequest(
                f"ids[{place}] holds a token id outside the vocabulary; expected 0 to {vocab - 1}",
                param=f"ids[{place}]",
            )


async def info(request: web.Request) -> web.StreamResponse:
    """The model behind these routes: its kind, limits and labels."""
    state = request.app[STATE]
    name = request.query.get("model")
    models = [state.models.find(name)] if name else state.models.all
    shown = [_info(model, state.options.max_inputs) for model in models]
    return reply(request, shown[0] if len(shown) == 1 else shown)


def _info(model: Model, max_inputs: int) -> dict[str, Any]:
    engine = model.engine
    client = engine.client
    facts: dict[str, Any] = {
        "model_id": model.name,
        "model_sha": model.spec.revision,
        "model_dtype": client.ready.summary.get("dtype"),
        "max_concurrent_requests": model.limit,
        "max_input_length": client.ready.max_model_len,
        "max_batch_tokens": client.ready.summary.get("max_num_batched_tokens"),
        "max_batch_requests": client.ready.max_num_seqs,
        "max_client_batch_size": max_inputs,
        "version": __version__,
    }
    if engine.embeds:
        encoder = engine.encoder
        facts["auto_truncate"] = encoder.auto_truncate is not None
        facts["tasks"] = [task.value for task in encoder.card.tasks]
        facts["model_type"] = _model_type(encoder)
        facts["prompts"] = sorted(encoder.card.prompts)
        facts["dimensions"] = client.ready.summary.get("dimensions")
    return facts


def _model_type(encoder: Encoder) -> dict[str, Any]:
    """As text-embeddings-inference tells it."""
    card = encoder.card
    ids = {str(i): label for i, label in enumerate(card.labels)}
    labels = {"id2label": ids, "label2id": {label: int(i) for i, label in ids.items()}}
    if card.kind == "classify" and len(card.labels) > 1:
        return {"classifier": labels}
    if card.kind in ("classify", "yes_no"):
        return {"reranker": labels}
    if card.kind == "token_classify":
        return {"token_classifier": labels}
    names = [_POOLING.get(mode, mode) for mode in card.pooling] if card.kind == "embed" else [card.kind]
    return {"embedding": {"pooling": "+".join(names)}}
