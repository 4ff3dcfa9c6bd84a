"""POST /v1/completions"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from aiohttp import web
from msgspec import UNSET

from headrace.errors import HeadraceError, InvalidRequest
from headrace.llm import AsyncEngine, Completion, Delta, Generation
from headrace.llm.protocols import Prompt
from headrace.serving.body import read
from headrace.serving.call import open_call
from headrace.serving.constraints import constrain
from headrace.serving.errors import error_event
from headrace.serving.exchange import current
from headrace.serving.openai import replies
from headrace.serving.openai.generate import answer, reply_id
from headrace.serving.openai.logprobs import TokenNames, joined
from headrace.serving.openai.replies import TextChoice, TextLogprobs, TextReply
from headrace.serving.openai.sampling import check_stream, num_choices, sampling_params
from headrace.serving.openai.schemas import MAX_INPUTS, CompletionRequest
from headrace.serving.parsers.turn import Turn
from headrace.serving.verify import Verifier
from headrace.types import ConstraintSpec, SamplingParams

__all__ = ["completions", "inputs_of"]

DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def completions(request: web.Request) -> web.StreamResponse:
    """Continue texts."""
    body = await read(request, CompletionRequest)
    check_stream(body)
    inputs = inputs_of(body.prompt)
    if body.stream and body.echo and body.logprobs is not None:
        raise InvalidRequest("echo with logprobs cannot be streamed; set stream to false", param="echo")
    _, runs = num_choices(body)
    if runs * len(inputs) > MAX_INPUTS:
        raise InvalidRequest(
            f"{len(inputs)} prompts with {runs} choices each are {runs * len(inputs)} sequences; "
            f"expected at most {MAX_INPUTS} in one request",
            param="n" if body.best_of is None else "best_of",
        )
    async with open_call(request, body.model, runs * len(inputs)) as call:
        engine = call.model.engine
        wanted = await constrain(body, call.state.grammars)
        params = _params(body, engine, wanted.spec if wanted else None)
        prompts = await engine.prompts(
            inputs,
            add_special_tokens=body.add_special_tokens is not False,
            cut=body.truncate_prompt_tokens is not None,
        )
        if body.echo:
            prompts = [_with_text(prompt, engine) for prompt in prompts]
        call.show_prompt(body.prompt)
        verifier = None if body.max_tokens == 0 else Verifier(call.state.grammars, wanted)
        return await answer(
            call, engine, body, prompts, params, lambda run: TextAnswer(body, engine, run), verifier
        )


def inputs_of(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One prompt or several, as a list."""
    if isinstance(given, str):
        return [given]
    return [given] if isinstance(given[0], int) else list(given)


def _params(
    body: CompletionRequest, engine: AsyncEngine, constraint: ConstraintSpec | None
) -> SamplingParams:
    """``max_tokens: 0`` (only with echo) runs one token, which the answer then leaves out."""
    params = sampling_params(
        body, engine, logprobs=body.logprobs, max_tokens=_limit(body, engine), constraint=constraint
    )
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        return msgspec.structs.replace(params, prompt_logprobs=body.logprobs)
    return params


def _limit(body: CompletionRequest, engine: AsyncEngine) -> int:
    if body.max_tokens is not None:
        return max(1, body.max_tokens)
    return engine.client.spec.default_max_tokens or DEFAULT_MAX_TOKENS


def _with_text(prompt: Prompt, engine: AsyncEngine) -> Prompt:
    if prompt.text is not None:
        return prompt
    return Prompt(prompt.token_ids, engine.kit.tokenizer.decode(prompt.token_ids, False))


class TextAnswer:
    """Writes replies and chunks of one completion request."""

    def __init__(self, body: CompletionRequest, engine: AsyncEngine, generation: Generation) -> None:
        self._body = body
        self._run = generation
        self._id, self._created = reply_id("cmpl")
        self._names = TokenNames(engine.kit.tokenizer, bool(body.return_tokens_as_token_ids))
        self._tokenizer = engine.kit.tokenizer
        options = body.stream_options
        self._usage_end = bool(options and options.include_usage)
        self._usage_each = bool(options and options.continuous_usage_stats)
        self._offsets = [0] * len(generation.choices)
        self._done: list[Completion] = []
        self._turns = [Turn(None) for _ in generation.choices]

    def _echo(self, prompt: int) -> str:
        """The prompt's text, after any truncation."""
        given = self._run.prompts[prompt]
        return given.text if given.text is not None else self._tokenizer.decode(given.token_ids, False)

    def _chunk(self, choices: list[TextChoice]) -> TextReply:
        chunk = TextReply(self._id, self._created, self._body.model, choices)
        if self._usage_each:
            chunk.usage = replies.usage_reply(self._run.usage)
        elif self._usage_end:
            chunk.usage = None
        return chunk

    def begin(self) -> bytes:
        """The prompts, with ``echo``."""
        if not self._body.echo:
            return b""
        each = self._run.choices_per_prompt
        choices = [TextChoice(one.index, self._echo(one.index // each)) for one in self._run.choices]
        return b"".join(replies.event(self._chunk([choice])) for choice in choices)

    def chunks(self, deltas: Sequence[Delta]) -> bytes:
        """One event a delta that tells something."""
        body = self._body
        always = body.logprobs is not None or body.return_token_ids
        drop = body.max_tokens == 0
        events = []
        for delta in deltas:
            self._turns[delta.index].feed(delta.text)
            if not (delta.text or delta.finish_reason or always):
                continue
            text = "" if drop else delta.text
            choice = TextChoice(delta.index, text, replies.finish(delta.finish_reason))
            if delta.finish_reason is not None:
                choice.stop_reason = delta.stop_reason
            if body.logprobs is not None and delta.logprobs and not drop:
                choice.logprobs = self._names.text(delta.logprobs, body.logprobs, self._offsets[delta.index])
                self._offsets[delta.index] += len(text)
            if body.return_token_ids:
                choice.token_ids = delta.token_ids
            events.append(replies.event(self._chunk([choice])))
        return b"".join(events)

    def failure(self, error: HeadraceError) -> bytes:
        """See Writer."""
        return error_event(error)

    def end(self) -> bytes:
        """Usage if asked for, and the end."""
        usage = replies.usage_reply(self._run.usage) if self._usage_end else None
        return replies.ending(self._chunk([]), usage, current().warnings)

    def turn(self, index: int) -> Turn:
        """See Writer."""
        return self._turns[index]

    def take(self, choices: list[Completion]) -> None:
        """See Answer."""
        self._done = choices
        for done in choices:
            self._turns[done.index].feed(done.text)

    def reply(self) -> TextReply:
        """Everything at once."""
        choices = self._done
        per_prompt = len(choices) // len(self._run.prompts)
        rows = [self._choice(choice, choice.index // per_prompt) for choice in choices]
        reply = TextReply(
            self._id, self._created, self._body.model, rows, replies.usage_reply(self._run.usage)
        )
        reply.warnings = current().warnings or UNSET
        return reply

    def _choice(self, done: Completion, place: int) -> TextChoice:
        body = self._body
        text = "" if body.max_tokens == 0 else done.text
        start = self._echo(place) if body.echo else ""
        choice = TextChoice(done.index, start + text, replies.finish(done.finish_reason) or "stop")
        choice.stop_reason = done.stop_reason
        choice.logprobs = self._logprobs(done, place, len(start))
        if body.return_token_ids:
            choice.token_ids = done.token_ids
            choice.prompt_token_ids = self._run.prompts[place].token_ids
        if body.prompt_logprobs is not None:
            choice.prompt_logprobs = self._names.prompt(self._run.prompt_logprobs(place))
        return choice

    def _logprobs(self, done: Completion, place: int, offset: int) -> TextLogprobs | None:
        top = self._body.logprobs
        if top is None:
            return None
        entries = [] if self._body.max_tokens == 0 else done.logprobs
        own = self._names.text(entries, top, offset)
        if not self._body.echo:
            return own
        prompt = self._run.prompts[place].token_ids
        return joined(self._names.echoed(prompt, self._run.prompt_logprobs(place), top), own)
