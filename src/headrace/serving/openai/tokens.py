"""vLLM's form of POST /tokenize, and its POST /detokenize: any model, one prompt or one conversation."""

from __future__ import annotations

import msgspec
from aiohttp import web

from headrace.llm.protocols import Prompt
from headrace.serving.body import read
from headrace.serving.call import Call, open_call
from headrace.serving.openai.chat import render
from headrace.serving.openai.fields import ApiModel, Many, acts, needed
from headrace.serving.openai.schemas import ChatRequest
from headrace.serving.tools import tool_wish
from headrace.serving.vectors import reply

__all__ = ["DetokenizeRequest", "detokenize", "tokenize_chat", "tokenize_prompt"]


class TokenizePromptRequest(ApiModel):
    """POST /tokenize with a prompt."""

    model: str = needed("A model served here.")
    prompt: str = needed("The text.")
    add_special_tokens: bool | None = acts(None, "Add the tokenizer's special tokens (default true).")
    return_token_strs: bool | None = acts(None, "Also the text of each token.")


class TokenizeChatRequest(ChatRequest):
    """POST /tokenize with messages: a chat request, of which the prompt alone is made."""

    return_token_strs: bool | None = acts(None, "Also the text of each token.")


class DetokenizeRequest(ApiModel):
    """POST /detokenize"""

    model: str = needed("A model served here.")
    tokens: Many[int] = needed("Token ids.")


class Tokens(msgspec.Struct):
    """The tokens of one prompt."""

    count: int
    max_model_len: int
    tokens: tuple[int, ...]
    token_strs: list[str] | None = None


async def tokenize_prompt(request: web.Request) -> web.StreamResponse:
    """Tokens of a prompt."""
    body = await read(request, TokenizePromptRequest)
    async with open_call(request, body.model) as call:
        special = body.add_special_tokens is not False
        [prompt] = await call.model.engine.prompts([body.prompt], add_special_tokens=special, cut=True)
        return _tokens(call, prompt, bool(body.return_token_strs))


async def tokenize_chat(request: web.Request) -> web.StreamResponse:
    """Tokens of the prompt that the chat template makes of messages."""
    body = await read(request, TokenizeChatRequest)
    async with open_call(request, body.model) as call:
        allowed = call.state.options.allow_chat_template
        prompt = await render(body, call.model.engine, tool_wish(body), allowed)
        return _tokens(call, prompt, bool(body.return_token_strs))


def _tokens(call: Call, prompt: Prompt, spelled: bool) -> web.Response:
    engine, ids = call.model.engine, prompt.token_ids
    texts = [engine.kit.tokenizer.token_bytes(id).decode("utf-8", "replace") for id in ids]
    return reply(call.request, Tokens(len(ids), engine.max_model_len, tuple(ids), texts if spelled else None))


async def detokenize(request: web.Request) -> web.StreamResponse:
    """The text of token ids, special tokens included."""
    body = await read(request, DetokenizeRequest)
    async with open_call(request, body.model) as call:
        text = await call.model.engine.detokenize(body.tokens)
        return reply(request, {"prompt": text})
