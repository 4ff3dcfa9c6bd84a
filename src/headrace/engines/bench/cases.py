"""One generation case through a core: token ids in, fixed output lengths, every step timed."""

from __future__ import annotations

import gc
import itertools
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from headrace.engines.generate import GenerateCore
from headrace.errors import ConfigError, EngineError
from headrace.scheduling.plan import StepPlan
from headrace.types import Request, SamplingParams

__all__ = ["Case", "Measurement", "StepTime", "make_requests", "measure", "parse_case"]


class Case(NamedTuple):
    """``requests`` at once, each ``inputs`` tokens in and ``outputs`` tokens out."""

    requests: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.requests}x{self.inputs}/{self.outputs}"


def parse_case(text: str) -> Case:
    """``64x512/128``: 64 requests of 512 tokens in and 128 out. Raises ConfigError."""
    try:
        count, lengths = text.split("x")
        inputs, outputs = lengths.split("/")
        case = Case(int(count), int(inputs), int(outputs))
    except ValueError:
        case = Case(0, 0, 0)
    if min(case) < 1:
        raise ConfigError(f"case {text!r}; expected REQUESTSxINPUT/OUTPUT, such as 64x512/128", param="case")
    return case


class StepTime(NamedTuple):
    """One step: wall seconds, tokens computed, sequences in it, whether it held parts of prompts, how often it ran.

    ``device``: seconds that the device had it, by its own clock; None where that is not measured.
    """

    seconds: float
    tokens: int
    sequences: int
    prefill: bool
    repeats: int = 1
    device: float | None = None


@dataclass(slots=True)
class Measurement:
    """What a case took.

    Attributes:
        seconds: from the first request to the last token.
        first: seconds to each request's first token.
        gaps: seconds between tokens of one request.
        steps: in order, without the time to fill the overlapped loop.
        fill: seconds until the overlapped loop waited for its first step.
        host: milliseconds a step by part of the loop, all parts but ``wait`` computed by the host.
    """

    case: Case
    seconds: float
    first: list[float]
    gaps: list[float]
    steps: list[StepTime]
    host: dict[str, float] = field(default_factory=dict)
    fill: float = 0.0

    @property
    def output_tokens_s(self) -> float:
        return self.case.requests * self.case.outputs / self.seconds

    def decode_ms(self) -> float | None:
        """Median of steps that only decode every request."""
        times = [
            s.seconds / s.repeats for s in self.steps if not s.prefill and s.sequences == self.case.requests
        ]
        return statistics.median(times) * 1e3 if times else None

    def busy(self, *, prefill: bool) -> float | None:
        """Share of the wall time of steps with or without prompts in which the device had a step, if it was measured.

        Between the steps it waits for the host; what lies between a step's kernels counts as busy.
        """
        steps = [step for step in self.steps if step.prefill == prefill and step.device is not None]
        wall = sum(step.seconds for step in steps)
        if steps and steps[0] is self.steps[0]:
            wall += self.fill
        return sum(step.device or 0.0 for step in steps) / wall if wall else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: seconds, milliseconds where the name says so, and tokens a second."""
        prefill = [s for s in self.steps if s.prefill]
        decode = self.decode_ms()
        busy = {"prefill": self.busy(prefill=True), "decode": self.busy(prefill=False)}
        return {
            "case": str(self.case),
            "seconds": round(self.seconds, 4),
            "output_tok_s": round(self.output_tokens_s, 1),
            "total_tok_s": round(
                self.case.requests * (self.case.inputs + self.case.outputs) / self.seconds, 1
            ),
            "first_token_ms": _spread(self.first),
            "between_tokens_ms": _spread(self.gaps),
            "steps": len(self.steps),
            "prefill_steps": len(prefill),
            "prefill_seconds": round(sum(s.seconds for s in prefill), 4),
            "decode_step_ms": None if decode is None else round(decode, 3),
            "device_busy": {k: None if share is None else round(share, 4) for k, share in busy.items()},
            "host_ms": {name: round(value, 4) for name, value in self.host.items()},
        }


def _spread(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    ordered = sorted(seconds)
    ranks = {"p50": 0.5, "p99": 0.99}
    at = {name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in ranks.items()}
    return {name: round(value * 1e3, 3) for name, value in {**at, "max": ordered[-1]}.items()}


def make_requests(case: Case, vocab: int, seed: int, **sampling: Any) -> list[Request]:
    """Prompts of random tokens; outputs do not end early."""
    rng = random.Random(seed)
    params = SamplingParams(**{"temperature": 0.0, **sampling}, max_tokens=case.outputs, ignore_eos=True)
    return [
        Request(
            id=f"{seed}-{i}",
            token_ids=tuple(rng.randrange(vocab) for _ in range(case.inputs)),
            sampling=params,
        )
        for i in range(case.requests)
    ]


class _Clock:
    """Seconds by part of a core's loop, while it is open: its methods are timed where they hang."""

    def __init__(self, core: GenerateCore) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.plans: list[StepPlan | None] = []
        self.device: list[float | None] = []  # seconds of each step that was waited for
        self._undo: list[tuple[object, str]] = []
        runner = core.runner
        for name, owner, method in (
            ("schedule", core.scheduler, "schedule"),
            ("pack", runner, "prepare"),
            ("launch", runner, "run"),
            ("sample", runner, "sample"),
            ("wait", core, "_wait"),
            ("settle", core, "_settle"),
        ):
            self._time(name, owner, method)

    def _time(self, name: str, owner: object, method: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = inner(*args, **options)
            self.seconds[name] += time.perf_counter() - began
            if name == "schedule":
                self.plans.append(result)
            if name == "wait":
                found = getattr(result, "device_ms", None)
                self.device.append(None if found is None else found / 1e3)
            return result

        setattr(owner, method, timed)
        self._undo.append((owner, method))

    def close(self) -> None:
        for owner, method in self._undo:
            delattr(owner, method)

    def parts(self, total: float, steps: int) -> dict[str, float]:
        """Milliseconds a step. ``other`` is what no part covers: the loop itself and whoever calls it."""
        found = dict(self.seconds)
        found["other"] = total - sum(found.values())
        wait = found.pop("wait", 0.0)
        host = {name: seconds * 1e3 / steps for name, seconds in found.items()}
        return {"total": sum(host.values()), **host, "wait": wait * 1e3 / steps}


def measure(
    core: GenerateCore,
    case: Case,
    vocab: int,
    *,
    seed: int = 0,
    on_step: Callable[[StepPlan | None], None] | None = None,
    **sampling: Any,
) -> Measurement:
    """Run a case to its end.

    Args:
        on_step: called before each step with the plan of the one before.
    Raises:
        EngineError: a request failed, or tokens are missing.
    """
    requests = make_requests(case, vocab, seed, **sampling)
    if core.runner.device.type == "cuda":
        torch.cuda.synchronize(core.runner.device)
    clock = _Clock(core)
    times: list[float] = []
    seen: dict[str, list[float]] = defaultdict(list)
    gc.freeze()  # as CoreLoop does
    try:
        began = last = time.perf_counter()
        core.add(requests)
        while core.has_work():
            if on_step is not None:
                on_step(clock.plans[-1] if clock.plans else None)
            outputs = core.step()
            now = time.perf_counter()
            times.append(now - last)
            last = now
            for output in outputs:
                if output.error:
                    raise EngineError(f"request {output.request_id}: {output.error}")
                seen[output.request_id] += [now] * len(output.token_ids)
        seconds = time.perf_counter() - began
    finally:
        gc.unfreeze()
        clock.close()
    tokens = sum(map(len, seen.values()))
    if tokens != case.requests * case.outputs:
        raise EngineError(f"{tokens} tokens came out, expected {case.requests * case.outputs}")
    return Measurement(
        case, seconds,
        first=[at[0] - began for at in seen.values()],
        gaps=[later - earlier for at in seen.values() for earlier, later in itertools.pairwise(at)],
        steps=_step_times(times, clock, core.overlap),
        host=clock.parts(seconds, max(1, len(times))),
        fill=times[0] if core.overlap and times else 0.0,
    )  # fmt: skip


def _step_times(times: list[float], clock: _Clock, overlap: bool) -> list[StepTime]:
    """The overlapped loop waits for the plan before the one that it launches."""
    waited = times[1:] if overlap else times
    planned = [(seconds, plan) for seconds, plan in zip(waited, clock.plans) if plan is not None]
    return [
        StepTime(
            seconds,
            plan.num_tokens,
            len(plan.chunks),
            plan.num_tokens > len(plan.chunks),
            plan.repeats,
            device,
        )
        for (seconds, plan), device in zip(planned, clock.device)
    ]
