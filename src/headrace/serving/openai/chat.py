"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aiohttp import web
from msgspec import UNSET

from headrace.errors import InvalidRequest, PermissionDenied
from headrace.llm import AsyncEngine, Completion, Delta, Generation
from headrace.llm.protocols import Prompt
from headrace.serving.body import read
from headrace.serving.call import open_call
from headrace.serving.constraints import check_tool_choice, constrain
from headrace.serving.exchange import current
from headrace.serving.openai import replies
from headrace.serving.openai.generate import answer, reply_id
from headrace.serving.openai.logprobs import TokenNames
from headrace.serving.openai.replies import ChatChunk, ChatDelta, ChunkChoice
from headrace.serving.openai.sampling import check_stream, num_choices, sampling_params
from headrace.serving.openai.schemas import ChatRequest, Message
from headrace.serving.verify import Verifier
from headrace.types import FinishReason

__all__ = ["chat_completions"]

_RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"}
)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer a conversation."""
    body = await read(request, ChatRequest)
    check_stream(body)
    _, runs = num_choices(body)
    async with open_call(request, body.model, runs) as call:
        engine = call.model.engine
        limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        wanted = await constrain(body, call.state.grammars)
        params = sampling_params(
            body,
            engine,
            logprobs=logprobs,
            max_tokens=getattr(body, limit),
            limit=limit,
            constraint=wanted.spec if wanted else None,
        )
        prompt = await render(body, engine, call.state.options.allow_chat_template)
        call.show_prompt(prompt.text)
        verifier = Verifier(call.state.grammars, wanted)
        return await answer(
            call, engine, body, [prompt], params, lambda run: ChatAnswer(body, engine, run), verifier
        )


async def render(body: ChatRequest, engine: AsyncEngine, allow_template: bool) -> Prompt:
    """The prompt that the model's chat template makes of a request."""
    if body.chat_template is not None and not allow_template:
        raise PermissionDenied(
            "this server does not take chat templates from requests (--allow-chat-template does)",
            param="chat_template",
        )
    return await engine.chat_prompt(
        [_plain(message) for message in body.messages],
        add_special_tokens=bool(body.add_special_tokens),
        cut=body.truncate_prompt_tokens is not None,
        chat_template=body.chat_template,
        tools=_tools(body),
        documents=body.documents,
        continue_final_message=bool(body.continue_final_message),
        add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
        kwargs=_variables(body),
    )


def _variables(body: ChatRequest) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
        if body.reasoning_effort == "none":
            variables["enable_thinking"] = False
    for field in ("chat_template_kwargs", "chat_template_args"):
        given: dict[str, Any] = getattr(body, field) or {}
        for name in given.keys() & _RESERVED:
            raise InvalidRequest(
                f"{field} holds {name!r}, which has a field of its own", param=f"{field}.{name}"
            )
        wrong = next((name for name in given if not name.isidentifier()), None)
        if wrong is not None:
            raise InvalidRequest(f"{field} holds {wrong[:40]!r}, which is no name of a variable", param=field)
        variables |= given
    return variables


def _tools(body: ChatRequest) -> list[dict[str, Any]] | None:
    """Tools for the template: none when the caller forbids calls."""
    old = body.functions is not None or body.function_call is not None
    choice, param = (body.function_call, "function_call") if old else (body.tool_choice, "tool_choice")
    check_tool_choice(choice, param)
    if choice is not None and not (body.tools or body.functions) and choice != "none":
        raise InvalidRequest(f"{param} is given without tools", param=param)
    if choice == "none":
        return None
    if body.functions:
        return [{"type": "function", "function": one.model_dump(exclude_none=True)} for one in body.functions]
    return [tool.model_dump(exclude_none=True) for tool in body.tools or ()] or None


def _plain(message: Message) -> dict[str, Any]:
    return message.model_dump(exclude_none=True, exclude={"annotations", "audio"})


def _text(message: Message) -> str:
    content = message.content
    return "\n".join(part.content for part in content) if isinstance(content, list) else content or ""


class ChatAnswer:
    """Writes replies and chunks of one chat request."""

    def __init__(self, body: ChatRequest, engine: AsyncEngine, generation: Generation) -> None:
        self._body = body
        self._run = generation
        self._id, self._created = reply_id("chatcmpl")
        self._names = TokenNames(engine.kit.tokenizer, bool(body.return_tokens_as_token_ids))
        self._top = body.top_logprobs or 0
        options = body.stream_options
        self._usage_end = bool(options and options.include_usage)
        self._usage_each = bool(options and options.continuous_usage_stats)
        self._tier = UNSET if body.service_tier is None else "default"
        self._prefix = ""
        self._contents: list[list[str]] = [[] for _ in generation.choices]
        last = body.messages[-1]
        if body.echo and last.role == "assistant":
            self._prefix = _text(last)

    def _chunk(self, choices: list[ChunkChoice]) -> ChatChunk:
        chunk = ChatChunk(self._id, self._created, self._body.model, choices, service_tier=self._tier)
        if self._usage_each:
            chunk.usage = replies.usage_reply(self._run.usage)
        elif self._usage_end:
            chunk.usage = None
        return chunk

    def begin(self) -> bytes:
        """Who speaks."""
        events = []
        for choice in self._run.choices:
            chunk = self._chunk([ChunkChoice(choice.index, ChatDelta(self._prefix, "assistant", None))])
            if self._body.return_token_ids:
                chunk.prompt_token_ids = self._run.prompts[0].token_ids
            events.append(replies.event(chunk))
        return b"".join(events)

    def chunks(self, deltas: Sequence[Delta]) -> bytes:
        """One event a delta that tells something."""
        body = self._body
        always = body.logprobs or body.return_token_ids
        events = []
        for delta in deltas:
            self._contents[delta.index].append(delta.text)
            if not (delta.text or delta.finish_reason or always):
                continue
            text = delta.text if delta.text or delta.finish_reason is None else UNSET
            choice = ChunkChoice(delta.index, ChatDelta(text), replies.finish(delta.finish_reason))
            if delta.finish_reason is not None:
                choice.stop_reason = delta.stop_reason
            if body.logprobs and delta.logprobs:
                choice.logprobs = self._names.chat(delta.logprobs, self._top)
            if body.return_token_ids:
                choice.token_ids = delta.token_ids
            events.append(replies.event(self._chunk([choice])))
        return b"".join(events)

    def content(self, index: int) -> str:
        """See Writer."""
        return "".join(self._contents[index])

    def end(self) -> bytes:
        """Usage if asked for, and the end."""
        warnings = current().warnings
        if not self._usage_end and not warnings:
            return replies.DONE
        chunk = self._chunk([])
        chunk.warnings = warnings or UNSET
        if self._usage_end:
            chunk.usage = replies.usage_reply(self._run.usage)
        return replies.event(chunk) + replies.DONE

    def reply(self, choices: list[Completion]) -> replies.ChatReply:
        """Everything at once."""
        reply = replies.ChatReply(
            self._id,
            self._created,
            self._body.model,
            [self._choice(choice) for choice in choices],
            replies.usage_reply(self._run.usage),
            service_tier=self._tier,
        )
        if current().warnings:
            reply.warnings = current().warnings
        if self._body.return_token_ids:
            reply.prompt_token_ids = self._run.prompts[0].token_ids
        if self._body.prompt_logprobs is not None:
            reply.prompt_logprobs = self._names.prompt(self._run.prompt_logprobs(0))
        return reply

    def _choice(self, done: Completion) -> replies.ChatChoice:
        self._contents[done.index] = [done.text]
        reason = done.finish_reason or FinishReason.STOP
        message = replies.ChatMessage("assistant", self._prefix + done.text)
        choice = replies.ChatChoice(done.index, message, replies.finish(reason), stop_reason=done.stop_reason)
        if self._body.logprobs:
            choice.logprobs = self._names.chat(done.logprobs, self._top)
        if self._body.return_token_ids:
            choice.token_ids = done.token_ids
        return choice
