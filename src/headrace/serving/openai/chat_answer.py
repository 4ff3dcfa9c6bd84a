"""Replies and chunks of chat completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import UNSET

from headrace.errors import HeadraceError
from headrace.llm import AsyncEngine, Completion, Delta, Generation
from headrace.serving.errors import error_event
from headrace.serving.exchange import current
from headrace.serving.openai import replies
from headrace.serving.openai.generate import reply_id
from headrace.serving.openai.logprobs import TokenNames
from headrace.serving.openai.replies import CallReply, ChatChunk, ChatDelta, ChunkChoice, FunctionReply
from headrace.serving.openai.schemas import ChatRequest
from headrace.serving.parsers.events import CallArguments, CallStart, Content, Event, Thought
from headrace.serving.parsers.turn import Turn
from headrace.serving.turns import TurnPlan
from headrace.types import FinishReason

__all__ = ["ChatAnswer", "count_thoughts"]


class ChatAnswer:
    """Writes replies and chunks of one chat request."""

    def __init__(
        self, body: ChatRequest, engine: AsyncEngine, generation: Generation, plan: TurnPlan
    ) -> None:
        self._body = body
        self._run = generation
        self._engine = engine
        self._turns = [plan.turn() for _ in generation.choices]
        self._id, self._created = reply_id("chatcmpl")
        self._names = TokenNames(engine.kit.tokenizer, bool(body.return_tokens_as_token_ids))
        self._top = body.top_logprobs or 0
        options = body.stream_options
        self._usage_end = bool(options and options.include_usage)
        self._usage_each = bool(options and options.continuous_usage_stats)
        self._thinking = 0  # tokens of deltas that brought thoughts: for usage on the way
        self._tier = UNSET if body.service_tier is None else "default"
        self._done: list[Completion] = []
        self._prefix = ""
        last = body.messages[-1]
        if body.echo and last.role == "assistant":
            content = last.content
            parts = content if isinstance(content, list) else []
            self._prefix = "\n".join(part.content for part in parts) if parts else str(content or "")

    def turn(self, index: int) -> Turn:
        """See Writer."""
        return self._turns[index]

    def _usage(self) -> replies.UsageReply:
        return replies.usage_reply(self._run.usage, count_thoughts(self._turns, self._engine))

    def _chunk(self, choices: list[ChunkChoice]) -> ChatChunk:
        chunk = ChatChunk(self._id, self._created, self._body.model, choices, service_tier=self._tier)
        if self._usage_each:
            chunk.usage = replies.usage_reply(self._run.usage, self._thinking)
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
        """An event for everything that the parser finds in a delta; facts of the tokens go with the first."""
        body = self._body
        always = body.logprobs or body.return_token_ids
        events = []
        for delta in deltas:
            found = self._turns[delta.index].feed(delta.text, delta.finish_reason is not None)
            self._thinking += len(delta.token_ids) if any(isinstance(one, Thought) for one in found) else 0
            pieces = list(self._pieces(delta.index, found))
            if not (pieces or delta.finish_reason or always):
                continue
            choices = [ChunkChoice(delta.index, piece) for piece in pieces]
            if not choices:
                empty = ChatDelta(UNSET if delta.finish_reason is not None else "")
                choices = [ChunkChoice(delta.index, empty)]
            if body.logprobs and delta.logprobs:
                choices[0].logprobs = self._names.chat(delta.logprobs, self._top)
            if body.return_token_ids:
                choices[0].token_ids = delta.token_ids
            if delta.finish_reason is not None:
                choices[-1].finish_reason = self._reason(delta.index, delta.finish_reason)
                choices[-1].stop_reason = delta.stop_reason
            events += [replies.event(self._chunk([choice])) for choice in choices]
        return b"".join(events)

    def _pieces(self, index: int, events: Sequence[Event]) -> Iterator[ChatDelta]:
        """Deltas of what was found; all events of one call before the next."""
        calls = self._turns[index].calls
        number = len(calls) - sum(isinstance(event, CallStart) for event in events) - 1
        for event in events:
            match event:
                case Content(text):
                    yield ChatDelta(text)
                case Thought(text):
                    if self._body.include_reasoning is not False:
                        yield ChatDelta(reasoning_content=text)
                case CallStart(name):
                    number += 1
                    function = FunctionReply("", name)
                    yield ChatDelta(tool_calls=[CallReply(function, calls[number].id, "function", number)])
                case CallArguments(text):
                    yield ChatDelta(tool_calls=[CallReply(FunctionReply(text), index=number)])

    def _reason(self, index: int, reason: FinishReason) -> str | None:
        if reason is FinishReason.STOP and self._turns[index].calls:
            return "tool_calls"
        return replies.finish(reason)

    def failure(self, error: HeadraceError) -> bytes:
        """See Writer."""
        return error_event(error)

    def end(self) -> bytes:
        """Usage if asked for, and the end."""
        return replies.ending(self._chunk([]), self._usage() if self._usage_end else None, current().warnings)

    def take(self, choices: list[Completion]) -> None:
        """See Answer."""
        self._done = choices
        for done in choices:
            self._turns[done.index].feed(done.text, last=True)

    def reply(self) -> replies.ChatReply:
        """Everything at once."""
        rows = [self._choice(choice) for choice in self._done]
        reply = replies.ChatReply(
            self._id, self._created, self._body.model, rows, self._usage(), service_tier=self._tier
        )
        reply.warnings = current().warnings or UNSET
        if self._body.return_token_ids:
            reply.prompt_token_ids = self._run.prompts[0].token_ids
        if self._body.prompt_logprobs is not None:
            reply.prompt_logprobs = self._names.prompt(self._run.prompt_logprobs(0))
        return reply

    def _choice(self, done: Completion) -> replies.ChatChoice:
        turn = self._turns[done.index]
        reason = self._reason(done.index, done.finish_reason or FinishReason.STOP)
        message = replies.ChatMessage("assistant", self._prefix + turn.content)
        if turn.calls:
            message.content = message.content or None
            message.tool_calls = [
                CallReply(FunctionReply(call.arguments, call.name), call.id, "function")
                for call in turn.calls
            ]
        if turn.thoughts and self._body.include_reasoning is not False:
            message.reasoning_content = turn.thoughts
        choice = replies.ChatChoice(done.index, message, reason, stop_reason=done.stop_reason)
        if self._body.logprobs:
            choice.logprobs = self._names.chat(done.logprobs, self._top)
        if self._body.return_token_ids:
            choice.token_ids = done.token_ids
        return choice


def count_thoughts(turns: Sequence[Turn], engine: AsyncEngine) -> int:
    """Tokens of all thoughts, counted on their text."""
    return sum(len(engine.kit.tokenizer.encode(turn.thoughts, False)) for turn in turns if turn.thoughts)
