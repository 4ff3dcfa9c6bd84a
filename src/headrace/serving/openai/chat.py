"""POST /v1/chat/completions"""

from __future__ import annotations

import re
from typing import Any

import msgspec
from aiohttp import web

from headrace.errors import InvalidRequest, PermissionDenied, Unprocessable
from headrace.llm import AsyncEngine
from headrace.llm.protocols import Prompt
from headrace.serving.body import read
from headrace.serving.call import Call, open_call
from headrace.serving.constraints import constrain
from headrace.serving.exchange import current
from headrace.serving.grammars import GrammarChecker
from headrace.serving.openai.chat_answer import ChatAnswer
from headrace.serving.openai.generate import answer
from headrace.serving.openai.sampling import check_stream, num_choices, sampling_params
from headrace.serving.openai.schemas import ChatRequest, Message
from headrace.serving.parsers.choose import thinking_of
from headrace.serving.tools import ToolWish, describe, schemas_of, tool_wish
from headrace.serving.turns import TurnPlan, plan_turn
from headrace.serving.verify import Verifier
from headrace.types import ConstraintSpec, SamplingParams

__all__ = ["Prepared", "chat_completions", "message_text", "prepare", "render"]

_RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"}
)


class Prepared(msgspec.Struct, frozen=True):
    """A conversation ready to run."""

    prompt: Prompt
    params: SamplingParams
    plan: TurnPlan
    verifier: Verifier


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer a conversation."""
    body = await read(request, ChatRequest)
    check_stream(body)
    _, runs = num_choices(body)
    async with open_call(request, body.model, runs) as call:
        engine = call.model.engine
        ready = await prepare(body, call)
        return await answer(
            call,
            engine,
            body,
            [ready.prompt],
            ready.params,
            lambda run: ChatAnswer(body, engine, run, ready.plan),
            ready.verifier,
            ready.plan.visible,
        )


async def prepare(body: ChatRequest, call: Call) -> Prepared:
    """Check everything, render the prompt, and decide what the turn may hold."""
    engine, grammars = call.model.engine, call.state.grammars
    format = call.model.format
    wish = tool_wish(body)
    if wish.mode != "none" and format.tools is None and format.channels is None:
        raise Unprocessable("this server was started with tool_call_parser 'none'", param="tools")
    arguments = await schemas_of(wish, grammars)
    wanted = await constrain(body, grammars)
    if wanted is not None and wish.mode == "forced":
        wanted = None  # a turn of calls has no content
    prompt = await render(body, engine, wish, call.state.options.allow_chat_template)
    call.show_prompt(prompt.text)
    continued = message_text(body.messages[-1]) if body.continue_final_message else None
    thinking = thinking_of(format, prompt.text or "", continued)
    plan = plan_turn(format, thinking, wish, arguments, wanted, engine, budget=body.thinking_token_budget)
    constraint = await _judged(plan, grammars)
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    params = sampling_params(
        body,
        engine,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        max_tokens=getattr(body, limit),
        limit=limit,
        constraint=constraint,
    )
    return Prepared(prompt, params, plan, Verifier(grammars, wanted, plan))


async def _judged(plan: TurnPlan, grammars: GrammarChecker) -> ConstraintSpec | None:
    """What the engine gets, found to compile; raises InvalidRequest naming the tool whose schema does not."""
    spec = plan.spec
    if spec is not None and spec.judged is None:
        try:
            return await grammars.check(spec, "tools")
        except InvalidRequest:
            await _check_each(plan, grammars)
            raise
    if not plan.enforced:
        await _check_each(plan, grammars)
    return spec


async def _check_each(plan: TurnPlan, grammars: GrammarChecker) -> None:
    for one in plan.arguments.values():
        await grammars.check(one.spec, one.param)


async def render(body: ChatRequest, engine: AsyncEngine, wish: ToolWish, allow_template: bool) -> Prompt:
    """The prompt that the model's chat template makes of a request.

    A template that knows no tools gets them in words.
    """
    if body.chat_template is not None and not allow_template:
        raise PermissionDenied(
            "this server does not take chat templates from requests (--allow-chat-template does)",
            param="chat_template",
        )
    messages = [_plain(message) for message in body.messages]
    template, variables = body.chat_template or engine.kit.template, _variables(body)
    current().warnings += _unread(template, body, variables)
    tools = wish.for_template()
    if "tools" not in template:
        called = any(message.get("tool_calls") or message["role"] == "tool" for message in messages)
        messages = describe(messages, tools or []) if tools or called else messages
        tools = None
    return await engine.chat_prompt(
        messages,
        add_special_tokens=bool(body.add_special_tokens),
        cut=body.truncate_prompt_tokens is not None,
        chat_template=body.chat_template,
        tools=tools,
        documents=body.documents,
        continue_final_message=bool(body.continue_final_message),
        add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
        kwargs=variables,
    )


_TEMPLATE_FIELDS = ("reasoning_effort", "verbosity")  # of a request, that only a template can act on


def _unread(template: str, body: ChatRequest, variables: dict[str, Any]) -> tuple[str, ...]:
    """What was given for the template and has no effect, since the template never names it."""
    given = {"documents": "documents"} if body.documents else {}
    for name, value in variables.items():
        if name == "enable_thinking" and value is False:
            continue  # a template that knows no thinking does as asked
        asked = name in _TEMPLATE_FIELDS and getattr(body, name) is not None
        if name != "reasoning_effort" or not asked or body.reasoning_effort != "none":
            given[name] = name if asked else f"chat_template_kwargs.{name}"
    return tuple(
        f"{field} has no effect: this model's chat template does not read {name!r}"
        for name, field in given.items()
        if re.search(rf"\b{name}\b", template) is None
    )


def _variables(body: ChatRequest) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
        if body.reasoning_effort == "none":
            variables["enable_thinking"] = False
    if body.verbosity is not None:
        variables["verbosity"] = body.verbosity
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


def _plain(message: Message) -> dict[str, Any]:
    return message.model_dump(exclude_none=True, exclude={"annotations", "audio"})


def message_text(message: Message) -> str:
    """Content of a message as one text."""
    content = message.content
    return "\n".join(part.content for part in content) if isinstance(content, list) else content or ""
