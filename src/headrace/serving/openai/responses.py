"""POST /v1/responses: the same turn as in chat, told as items. GET and DELETE of what is stored."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from headrace.errors import HeadraceError
from headrace.llm import AsyncEngine, Completion, Delta, Generation
from headrace.serving.body import read
from headrace.serving.call import open_call
from headrace.serving.exchange import current
from headrace.serving.openai.chat import Prepared, prepare
from headrace.serving.openai.chat_answer import count_thoughts
from headrace.serving.openai.generate import answer, reply_id
from headrace.serving.openai.replies import encode
from headrace.serving.openai.response_store import ResponseStore, Stored
from headrace.serving.openai.responses_schema import ResponsesRequest, to_chat
from headrace.serving.parsers.events import CallArguments, CallEnd, CallStart, Content, Event, Thought
from headrace.serving.parsers.turn import Turn
from headrace.serving.state import STATE
from headrace.types import FinishReason

__all__ = ["create_response", "delete_response", "get_response"]


async def create_response(request: web.Request) -> web.StreamResponse:
    """Answer, as items."""
    body = await read(request, ResponsesRequest)
    async with open_call(request, body.model) as call:
        store = call.state.responses
        before = []
        if body.previous_response_id is not None:
            before = store.get(body.previous_response_id, "previous_response_id").messages
        chat, messages = to_chat(body, before)
        engine = call.model.engine
        ready = await prepare(chat, call)

        def make(run: Generation) -> ResponseAnswer:
            return ResponseAnswer(body, engine, run, ready, store, messages)

        return await answer(
            call, engine, chat, [ready.prompt], ready.params, make, ready.verifier, ready.plan.visible
        )


async def get_response(request: web.Request) -> web.Response:
    """A stored response."""
    stored = request.app[STATE].responses.get(request.match_info["id"], "id")
    return web.Response(body=stored.reply, content_type="application/json")


async def delete_response(request: web.Request) -> web.Response:
    """Forget a stored response."""
    name = request.match_info["id"]
    request.app[STATE].responses.delete(name)
    return web.json_response({"id": name, "object": "response", "deleted": True})


class _Items:
    """Output items, and the events that tell of them, from a parser's events."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: str = ""  # kind of the last item while it grows

    def take(self, events: Sequence[Event], turn: Turn) -> list[dict[str, Any]]:
        """What to tell of these."""
        told: list[dict[str, Any]] = []
        for event in events:
            match event:
                case Content(text):
                    self._text("message", "response.output_text", text, told)
                case Thought(text):
                    self._text("reasoning", "response.reasoning_text", text, told)
                case CallStart(name):
                    self.close(told)
                    started = sum(item["type"] == "function_call" for item in self.items)
                    item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress"}
                    item |= {"call_id": turn.calls[started].id, "name": name, "arguments": ""}
                    self._begin(item, told)
                case CallArguments(text):
                    self.items[-1]["arguments"] += text
                    told.append(self._about("response.function_call_arguments.delta", delta=text))
                case CallEnd():
                    self.close(told)
        return told

    def _about(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **more}

    def _begin(self, item: dict[str, Any], told: list[dict[str, Any]]) -> None:
        self.items.append(item)
        self._open = str(item["type"])
        shown = {**item, "content": []} if "content" in item else dict(item)
        told.append(
            {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": shown}
        )

    def _text(self, kind: str, event: str, text: str, told: list[dict[str, Any]]) -> None:
        if self._open != kind:
            self.close(told)
            item: dict[str, Any] = {
                "id": f"{kind[:3]}_{uuid.uuid4().hex}",
                "type": kind,
                "status": "in_progress",
            }
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            item |= {"summary": []}
            if kind == "message":
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                del item["summary"]
                item |= {"role": "assistant"}
            self._begin({**item, "content": [part]}, told)
            told.append(self._about("response.content_part.added", content_index=0, part=dict(part)))
        self.items[-1]["content"][0]["text"] += text
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        told.append(self._about(f"{event}.delta", content_index=0, delta=text, **more))

    def close(self, told: list[dict[str, Any]], status: str = "completed") -> None:
        """The item that grows is over."""
        if not self._open:
            return
        item = self.items[-1]
        item["status"] = status
        if self._open == "function_call":
            told.append(
                self._about(
                    "response.function_call_arguments.done", arguments=item["arguments"], name=item["name"]
                )
            )
        else:
            part = item["content"][0]
            event = "output_text" if self._open == "message" else "reasoning_text"
            more: dict[str, Any] = {"logprobs": []} if self._open == "message" else {}
            told.append(self._about(f"response.{event}.done", content_index=0, text=part["text"], **more))
            told.append(self._about("response.content_part.done", content_index=0, part=dict(part)))
        told.append(
            {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": dict(item)}
        )
        self._open = ""


class ResponseAnswer:
    """Writes the reply and events of one request, and stores it."""

    def __init__(
        self,
        body: ResponsesRequest,
        engine: AsyncEngine,
        generation: Generation,
        ready: Prepared,
        store: ResponseStore,
        messages: list[dict[str, Any]],
    ) -> None:
        self._body = body
        self._engine = engine
        self._run = generation
        self._turn = ready.plan.turn()
        self._items = _Items()
        self._store = store
        self._messages = messages
        self._id, self._created = reply_id("resp")
        self._id = self._id.replace("-", "_")
        self._number = 0
        self._reason = FinishReason.STOP

    def turn(self, index: int) -> Turn:
        """See Writer."""
        return self._turn

    def _reply(self, status: str) -> dict[str, Any]:
        body, usage = self._body, self._run.usage
        done = status != "in_progress"
        reply: dict[str, Any] = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": self._items.items if done else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": body.reasoning or {"effort": None, "summary": None},
            "store": body.store is not False,
            "temperature": body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }
        if done:
            thoughts = count_thoughts([self._turn], self._engine)
            reply["usage"] = {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": thoughts},
                "total_tokens": usage.total_tokens,
            }
            if current().warnings:
                reply["warnings"] = list(current().warnings)
        return reply

    def _event(self, event: dict[str, Any]) -> bytes:
        event["sequence_number"] = self._number
        self._number += 1
        return b"event: " + str(event["type"]).encode() + b"\ndata: " + encode(event) + b"\n\n"

    def begin(self) -> bytes:
        """The response as it starts."""
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._event({"type": kind, "response": self._reply("in_progress")}) for kind in kinds)

    def chunks(self, deltas: Sequence[Delta]) -> bytes:
        """Events of what was found."""
        return b"".join(map(self._event, self._feed(deltas)))

    def _feed(self, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        for delta in deltas:
            last = delta.finish_reason is not None
            told += self._items.take(self._turn.feed(delta.text, last), self._turn)
            if last:
                self._reason = delta.finish_reason or FinishReason.STOP
                self._items.close(told, self._ending)
        return told

    @property
    def _ending(self) -> str:
        return "incomplete" if self._reason is FinishReason.LENGTH else "completed"

    def failure(self, error: HeadraceError) -> bytes:
        """See Writer."""
        event = {"type": "error", "message": error.message, "code": error.code, "param": error.param}
        return self._event(event)

    def end(self) -> bytes:
        """The response as it is."""
        return self._event({"type": f"response.{self._ending}", "response": self._finished()})

    def take(self, choices: list[Completion]) -> None:
        """See Answer."""
        done = choices[0]
        self._feed([Delta(0, done.text, finish_reason=done.finish_reason or FinishReason.STOP)])

    def reply(self) -> dict[str, Any]:
        """Everything at once."""
        return self._finished()

    def _finished(self) -> dict[str, Any]:
        reply = self._reply(self._ending)
        if self._body.store is not False:
            self._store.put(self._id, Stored(encode(reply), [*self._messages, *self._said()]))
        return reply

    def _said(self) -> list[dict[str, Any]]:
        """This turn as a chat message."""
        turn = self._turn
        message: dict[str, Any] = {"role": "assistant"}
        if turn.content or not turn.calls:
            message["content"] = turn.content
        if turn.thoughts:
            message["reasoning_content"] = turn.thoughts
        if turn.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in turn.calls
            ]
        return [message]
