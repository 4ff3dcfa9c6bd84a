"""POST /v1/messages: the same turn as in chat, told as blocks."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from headrace.errors import HeadraceError
from headrace.llm import Completion, Delta, Generation
from headrace.serving.anthropic.schemas import MessagesRequest, to_chat
from headrace.serving.body import read
from headrace.serving.call import open_call
from headrace.serving.errors import anthropic_body
from headrace.serving.exchange import current
from headrace.serving.openai.chat import prepare
from headrace.serving.openai.generate import answer
from headrace.serving.openai.replies import encode
from headrace.serving.parsers.events import CallArguments, CallEnd, CallStart, Content, Event, Thought
from headrace.serving.parsers.turn import Turn
from headrace.serving.turns import TurnPlan
from headrace.types import FinishReason

__all__ = ["messages"]


async def messages(request: web.Request) -> web.StreamResponse:
    """Answer a conversation in Anthropic's shape."""
    body = await read(request, MessagesRequest)
    async with open_call(request, body.model) as call:
        chat = to_chat(body)
        ready = await prepare(chat, call)

        def make(run: Generation) -> MessageAnswer:
            return MessageAnswer(body, run, ready.plan)

        engine = call.model.engine
        return await answer(
            call, engine, chat, [ready.prompt], ready.params, make, ready.verifier, ready.plan.visible
        )


class MessageAnswer:
    """Writes the reply and events of one request."""

    def __init__(self, body: MessagesRequest, generation: Generation, plan: TurnPlan) -> None:
        self._body = body
        self._run = generation
        self._turn = plan.turn()
        self._id = f"msg_{uuid.uuid4().hex}"
        self._open = ""  # kind of the block that grows
        self._blocks = 0
        self._calls = 0
        self._done: Delta | Completion | None = None

    def turn(self, index: int) -> Turn:
        """See Writer."""
        return self._turn

    def _message(self) -> dict[str, Any]:
        usage = self._run.usage
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._body.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {
                "input_tokens": usage.prompt_tokens - usage.cached_tokens,
                "cache_read_input_tokens": usage.cached_tokens,
                "cache_creation_input_tokens": 0,
                "output_tokens": usage.completion_tokens,
            },
        }

    def _ending(self) -> dict[str, Any]:
        """Why it ended."""
        done = self._done
        assert done is not None
        stopped = done.stop_reason if isinstance(done.stop_reason, str) else None
        if done.finish_reason is FinishReason.LENGTH:
            reason = "max_tokens"
        elif stopped is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if self._turn.calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": stopped}

    # --- whole -----------------------------------------------------------------------------------

    def take(self, choices: list[Completion]) -> None:
        """See Answer."""
        self._done = choices[0]
        self._turn.feed(choices[0].text, last=True)

    def reply(self) -> dict[str, Any]:
        """Everything at once."""
        turn = self._turn
        blocks: list[dict[str, Any]] = []
        if turn.thoughts:
            blocks.append({"type": "thinking", "thinking": turn.thoughts, "signature": ""})
        if turn.content:
            blocks.append({"type": "text", "text": turn.content})
        for call in turn.calls:
            given = json.loads(call.arguments) if call.whole else {}
            blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": given})
        told = self._message() | {"content": blocks} | self._ending()
        return told | ({"warnings": list(current().warnings)} if current().warnings else {})

    # --- streamed --------------------------------------------------------------------------------

    def begin(self) -> bytes:
        """The message as it starts."""
        return _event({"type": "message_start", "message": self._message()})

    def chunks(self, deltas: Sequence[Delta]) -> bytes:
        """Events of what was found."""
        told: list[dict[str, Any]] = []
        for delta in deltas:
            last = delta.finish_reason is not None
            for event in self._turn.feed(delta.text, last):
                self._tell(event, told)
            if last:
                self._done = delta
                self._close(told)
        return b"".join(map(_event, told))

    def _tell(self, event: Event, told: list[dict[str, Any]]) -> None:
        match event:
            case Content(text):
                self._begin_block({"type": "text", "text": ""}, told)
                self._delta({"type": "text_delta", "text": text}, told)
            case Thought(text):
                self._begin_block({"type": "thinking", "thinking": "", "signature": ""}, told)
                self._delta({"type": "thinking_delta", "thinking": text}, told)
            case CallStart(name):
                call = self._turn.calls[self._calls]
                self._calls += 1
                self._close(told)
                self._begin_block({"type": "tool_use", "id": call.id, "name": name, "input": {}}, told)
            case CallArguments(text):
                self._delta({"type": "input_json_delta", "partial_json": text}, told)
            case CallEnd():
                self._close(told)

    def _begin_block(self, block: dict[str, Any], told: list[dict[str, Any]]) -> None:
        """A new block, unless one of this kind grows."""
        if self._open == block["type"]:
            return
        self._close(told)
        self._open = str(block["type"])
        told.append({"type": "content_block_start", "index": self._blocks, "content_block": block})

    def _delta(self, delta: dict[str, Any], told: list[dict[str, Any]]) -> None:
        told.append({"type": "content_block_delta", "index": self._blocks, "delta": delta})

    def _close(self, told: list[dict[str, Any]]) -> None:
        if self._open:
            told.append({"type": "content_block_stop", "index": self._blocks})
            self._blocks += 1
            self._open = ""

    def failure(self, error: HeadraceError) -> bytes:
        """See Writer."""
        return anthropic_body(error, event=True)

    def end(self) -> bytes:
        """Why it ended, and usage."""
        told: dict[str, Any] = {"type": "message_delta", "delta": self._ending()}
        told["usage"] = self._message()["usage"]
        if current().warnings:
            told["warnings"] = list(current().warnings)
        return _event(told) + _event({"type": "message_stop"})


def _event(event: dict[str, Any]) -> bytes:
    return b"event: " + str(event["type"]).encode() + b"\ndata: " + encode(event) + b"\n\n"
