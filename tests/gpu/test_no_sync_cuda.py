"""A step asks the device nothing: preparing, running and sampling only launch, whatever a request wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from gpu.test_deterministic_cuda import VOCAB, build_model, make_core, run
from headrace.execution.constraints.table import PendingMasks
from headrace.scheduling.plan import StepPlan
from headrace.types import Request, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"top_p": 0.8},
    {"top_k": 9, "top_p": 0.7, "min_p": 0.01},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"temperature": 0.0, "logit_bias": {5: 2.0}, "bad_words": ((3,),), "logprobs": 4},
    {"min_tokens": 5, "stop_token_ids": (7,), "logprobs": 0},
    {"prompt_logprobs": 2},
]


@contextmanager
def no_questions() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with no_questions():
            return method(*args)

    return call


def test_a_question_is_noticed() -> None:
    with no_questions(), pytest.raises(RuntimeError):
        torch.ones(3, device="cuda").sum().item()


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "plain"])
@pytest.mark.parametrize("masked", [False, True], ids=["free", "masked"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe"])
def test_steps(family: str, eager: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core(build_model(family, torch.bfloat16), eager=eager, rows=16, step_tokens=128)
    kinds = KINDS
    if masked:

        def begin(plan: StepPlan, *, ahead: bool) -> PendingMasks | None:
            count, words = len(plan.sampling), -(-VOCAB // 32)
            if not count:
                return None
            host = torch.full((count * (words + 1),), -2, dtype=torch.int32).pin_memory()
            host[count * words :] = torch.arange(count)
            return PendingMasks(host, count, words, torch.device("cuda"), None)

        monkeypatch.setattr(core.constraints, "begin", begin)
        # Rows that want no more than a draw are not masked: their graph ends in tokens.
        kinds = [{"logprobs": 0, **kind} for kind in KINDS]

    def requests() -> list[Request]:
        return [
            Request(
                id=str(i),
                token_ids=tuple(range(5, 25 + 9 * i)),
                sampling=SamplingParams(max_tokens=12, ignore_eos=True, seed=i, **kind),
            )
            for i, kind in enumerate(kinds)
        ]

    expected = run(core, requests())  # compiles and captures
    run(core, requests())  # the same for the smaller steps behind a warm prefix cache
    for name in ("prepare", "run", "sample"):
        monkeypatch.setattr(core.runner, name, guarded(getattr(core.runner, name)))
    again = run(core, requests())
    assert {id: tokens for id, (tokens, _) in again.items()} == {
        id: tokens for id, (tokens, _) in expected.items()
    }
    if masked:
        assert not any(token % 32 == 0 for tokens, _ in again.values() for token in tokens)
