"""An engine core that plays a script instead of a model: for tests, demos and front-end benchmarks. No torch.

    engine = ScriptedEngine(script=lambda request: [Step((72, 105)), Step((33,), delay=0.1)])

It keeps the contract of EngineClient: bounded output, abort when an iterator is left, health by state. What
it gives is what it was told to give, so it says nothing about any model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Literal

import msgspec

from headrace.config.spec import EngineSpec
from headrace.engines.client import Health
from headrace.errors import EngineDead, EngineError
from headrace.messages import CoreStats, Ready, Submit, encode
from headrace.types import EncodeOutput, FinishReason, Output, Request, SamplingParams, TokenLogprobs

__all__ = ["ScriptedEngine", "Step", "echo"]


class Step(msgspec.Struct, frozen=True):
    """What happens next to a sequence.

    Attributes:
        tokens: ids given out together.
        delay: seconds to wait first; 0 only yields to the event loop.
        stop: this step's last token is a stop token: the sequence ends with reason ``stop``.
        error: the engine fails the sequence with this message; ``code`` says as which kind of error.
        dies: the whole engine dies with this message.
    """

    tokens: tuple[int, ...] = ()
    delay: float = 0.0
    stop: bool = False
    error: str = ""
    code: str = ""
    dies: str = ""


Script = Callable[[Request], Iterable[Step]]


def echo(request: Request) -> Iterable[Step]:
    """Gives the prompt back, a token a step, for ever."""
    while True:
        for token in request.token_ids:
            yield Step((token,))


class ScriptedEngine:
    """An EngineClient whose answers come from a script.

    Args:
        script: called once a request for its steps; a script that ends early ends with reason ``stop``.
        vector: called once a request for its embedding (float32 as little-endian bytes, and the shape).
        encode_delay: seconds that one single pass takes.

    Attributes:
        requests: everything submitted, in order.
        aborted: ids of sequences whose iterators were left, or that were aborted by id.
    """

    def __init__(
        self,
        script: Script = echo,
        *,
        spec: EngineSpec | None = None,
        ready: Ready | None = None,
        vector: Callable[[Request], tuple[bytes, tuple[int, ...]]] | None = None,
        encode_delay: float = 0.0,
    ) -> None:
        self.spec = spec or EngineSpec(model="scripted")
        self.ready = ready or Ready("dense", max_model_len=4096, max_num_seqs=16, vocab_size=512)
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.state: Literal["starting", "ok", "draining", "stalled", "dead"] = "ok"
        self.reason = ""
        self._script = script
        self._vector = vector or _unit_vector
        self._encode_delay = encode_delay
        self._live: dict[str, asyncio.Event] = {}
        self._counts = {"steps": 0, "prompt_tokens": 0, "output_tokens": 0, "aborted_tokens": 0}

    @property
    def num_unfinished(self) -> int:
        return len(self._live)

    @property
    def stats(self) -> CoreStats:
        running = min(self.num_unfinished, self.ready.max_num_seqs)
        return CoreStats(num_running=running, num_waiting=self.num_unfinished - running, **self._counts)

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Play the script for this request; leaving the iterator early counts as an abort."""
        params = self._submit(request).sampling
        assert params is not None, "generate() takes requests with sampling parameters"
        gone = self._live[request.id]
        given, done = 0, False
        try:
            for step in self._script(request):
                await self._wait(step, gone)
                if gone.is_set() or self._too_late(request):
                    done = True
                    yield Output(request.id, finish_reason=FinishReason.ABORT)
                    return
                output = self._output(request, params, step, given)
                given += len(output.token_ids)
                done = output.finish_reason is not None
                yield output
                if done:
                    return
            done = True
            yield Output(request.id, finish_reason=FinishReason.STOP)
        finally:
            del self._live[request.id]
            if not done:
                self.aborted.append(request.id)
                self._counts["aborted_tokens"] += given

    def _submit(self, request: Request) -> Request:
        if self.state == "dead":
            raise EngineDead(self.reason or "the engine is dead")
        if request.id in self._live:
            raise EngineError(f"request id {request.id!r} is already live")
        encode(Submit((request,)))  # raises here what would not cross a process border
        self.requests.append(request)
        self._live[request.id] = asyncio.Event()
        self._counts["prompt_tokens"] += len(request.token_ids)
        return request

    async def _wait(self, step: Step, gone: asyncio.Event) -> None:
        if step.delay > 0:
            try:
                async with asyncio.timeout(step.delay):
                    await gone.wait()
            except TimeoutError:
                pass
        else:
            await asyncio.sleep(0)
        if step.dies:
            self.state, self.reason = "dead", step.dies
        if self.state == "dead":
            raise EngineDead(self.reason)

    def _too_late(self, request: Request) -> bool:
        return request.deadline is not None and time.monotonic() >= request.deadline

    def _output(self, request: Request, params: SamplingParams, step: Step, given: int) -> Output:
        if step.error:
            failed = FinishReason.ERROR
            return Output(request.id, finish_reason=failed, error=step.error, error_code=step.code)
        self._counts["steps"] += 1
        room = (params.max_tokens or self.ready.max_model_len - len(request.token_ids)) - given
        tokens = step.tokens[:room]
        stops = step.stop and len(tokens) == len(step.tokens)
        stop_token = tokens[-1] if stops and tokens else None
        for place, token in enumerate(tokens):
            if token in params.stop_token_ids and given + place >= params.min_tokens:
                tokens, stop_token, stops = tokens[: place + 1], token, True
                break
        self._counts["output_tokens"] += len(tokens)
        reason = FinishReason.STOP if stops else FinishReason.LENGTH if len(tokens) == room else None
        first = given == 0
        return Output(
            request.id,
            tokens,
            reason,
            logprobs=_logprobs(tokens, params.logprobs),
            stop_token=stop_token,
            prompt_logprobs=_logprobs(request.token_ids[1:], params.prompt_logprobs) if first else (),
        )

    async def encode(self, request: Request) -> EncodeOutput:
        """The scripted vector of this request."""
        self._submit(request)
        done = False
        try:
            await asyncio.sleep(self._encode_delay)
            if self.state == "dead":
                raise EngineDead(self.reason)
            done = True
            data, shape = self._vector(request)
            return EncodeOutput(request.id, data, shape)
        finally:
            del self._live[request.id]
            if not done:
                self.aborted.append(request.id)

    async def encode_all(self, requests: Sequence[Request]) -> list[EncodeOutput]:
        """The scripted vectors of several requests, in parallel."""
        tasks = [asyncio.ensure_future(self.encode(request)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    def abort(self, request_ids: Sequence[str]) -> None:
        """End these sequences at their next step; unknown ids are ignored."""
        for request_id in request_ids:
            if request_id in self._live:
                self._live[request_id].set()
                self.aborted.append(request_id)

    def health(self) -> Health:
        return Health(self.state, self.reason)

    async def close(self, drain: bool = True) -> None:
        """Abort what runs, or wait for it with ``drain``; then be dead."""
        while drain and self._live:
            await asyncio.sleep(0.005)
        self.abort(list(self._live))
        self.state, self.reason = "dead", "closed"


def _logprobs(tokens: Sequence[int], top: int | None) -> tuple[TokenLogprobs, ...]:
    """Made-up but well-formed: the token first, then the ids that follow it."""
    if top is None:
        return ()
    return tuple(
        TokenLogprobs(token, -0.25, 1, tuple((token + k, -0.25 - k) for k in range(top))) for token in tokens
    )


def _unit_vector(request: Request) -> tuple[bytes, tuple[int, ...]]:
    """A vector that depends on the tokens: eight values of length one."""
    import struct

    values = [1.0 + sum(request.token_ids[k::8]) for k in range(8)]
    norm = sum(value * value for value in values) ** 0.5
    return struct.pack("<8f", *(value / norm for value in values)), (8,)
