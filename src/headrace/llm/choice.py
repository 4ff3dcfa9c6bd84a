"""One sequence on its way out: ids to text, stop strings, and what to tell the caller of each step."""

from __future__ import annotations

import time
from dataclasses import dataclass

from headrace.errors import EngineError, RequestTimeout, from_code
from headrace.llm.protocols import Detokenizer
from headrace.text.stopping import StopMatcher
from headrace.types import FinishReason, Output, Request, SamplingParams, TokenLogprobs

__all__ = ["Choice", "Delta"]


@dataclass(slots=True)
class Delta:
    """What one step adds to one choice.

    Attributes:
        text: new text; empty while a character or a possible stop string is incomplete.
        logprobs: one entry a token of ``token_ids`` if asked for.
        stop_reason: the stop string or stop token id that ended the choice.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Choice:
    """One of the ``n`` answers to one prompt.

    Attributes:
        index: place among the choices of the whole call.
        num_tokens: tokens sampled so far, including those that gave no text.
    """

    index: int
    request: Request
    detokenizer: Detokenizer
    stops: StopMatcher | None = None
    num_tokens: int = 0
    num_cached: int = 0
    finished: bool = False
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    stop_reason: int | str | None = None

    @property
    def params(self) -> SamplingParams:
        assert self.request.sampling is not None
        return self.request.sampling

    def feed(self, output: Output) -> Delta | None:
        """Take what a step produced; None when there is nothing to tell yet.

        Raises EngineError when the engine failed the sequence and RequestTimeout when its deadline passed.
        """
        reason = output.finish_reason
        if reason is FinishReason.ERROR:
            message = output.error or "the engine failed this request"
            raise from_code(output.error_code, message, output.error_param or None)
        if output.num_cached_tokens:
            self.num_cached = output.num_cached_tokens
        if output.prompt_logprobs:
            self.prompt_logprobs = output.prompt_logprobs
        if self.stops is None and reason is None:  # the way of nearly every token
            self.num_tokens += len(output.token_ids)
            text = self.detokenizer.push(output.token_ids)
            if not text and not output.token_ids:
                return None
            return Delta(self.index, text, output.token_ids, output.logprobs)
        delta = self._feed_stops(output) if self.stops is not None else self._feed_last(output)
        if reason is FinishReason.ABORT and not self.finished:
            self._raise_aborted()
        if reason is not None and not self.finished:
            self._finish(delta, reason, output.stop_token)
        return delta if delta.token_ids or delta.text or delta.finish_reason else None

    def _visible(self, output: Output) -> int:
        """How many of the output's tokens become text: a stop token does not, unless asked for."""
        hidden = output.stop_token is not None and not self.params.include_stop_str_in_output
        return len(output.token_ids) - (1 if hidden and output.token_ids else 0)

    def _feed_last(self, output: Output) -> Delta:
        self.num_tokens += len(output.token_ids)
        text = self.detokenizer.push(output.token_ids[: self._visible(output)])
        return Delta(self.index, text, output.token_ids, output.logprobs)

    def _feed_stops(self, output: Output) -> Delta:
        """Token by token, so that nothing after a stop string counts."""
        assert self.stops is not None
        visible = self._visible(output)
        pieces: list[str] = []
        for place, token in enumerate(output.token_ids):
            self.num_tokens += 1
            text = self.detokenizer.push((token,)) if place < visible else ""
            pieces.append(self.stops.push(text, armed=self.num_tokens > self.params.min_tokens))
            if self.stops.matched is not None:
                self.finished = True
                self.stop_reason = self.stops.matched
                used = place + 1
                return Delta(
                    self.index,
                    "".join(pieces),
                    output.token_ids[:used],
                    output.logprobs[:used],
                    FinishReason.STOP,
                    self.stop_reason,
                )
        return Delta(self.index, "".join(pieces), output.token_ids, output.logprobs)

    def _finish(self, delta: Delta, reason: FinishReason, stop_token: int | None) -> None:
        rest = self.detokenizer.finish()
        if self.stops is not None:
            rest = self.stops.push(rest) + self.stops.finish()
            if self.stops.matched is not None:
                reason, self.stop_reason = FinishReason.STOP, self.stops.matched
        self.finished = True
        if self.stop_reason is None and stop_token in self.params.stop_token_ids:
            self.stop_reason = stop_token
        delta.text += rest
        delta.finish_reason = reason
        delta.stop_reason = self.stop_reason

    def _raise_aborted(self) -> None:
        deadline = self.request.deadline
        if deadline is not None and time.monotonic() >= deadline:
            raise RequestTimeout("the request's deadline passed before it was finished")
        raise EngineError("the engine aborted this request; it may be shutting down", code="aborted")
