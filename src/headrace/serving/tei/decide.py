"""POST /v1/systemone: typed questions about a state, answered with probabilities in one batch of passes"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from aiohttp import web

from headrace.errors import InvalidRequest, Unprocessable
from headrace.llm.encoder import Encoder
from headrace.serving.body import read
from headrace.serving.tei.common import check_count, one_pass, truncation
from headrace.serving.tei.schemas import Question, SystemOneRequest
from headrace.serving.vectors import array, reply
from headrace.text import decide
from headrace.text.encoding import Encoded, Truncate
from headrace.types import EncodeOutput, EncodeParams, EncodeTask

__all__ = ["system_one"]

MAX_OPTIONS = 255


async def system_one(request: web.Request) -> web.StreamResponse:
    """Judge every option of every question; all of them run in the same batches."""
    body = await read(request, SystemOneRequest)
    asked = {name: _candidates(name, question) for name, question in body.questions.items()}
    check_count(request, sum(map(len, asked.values())), "questions")
    state = decide.as_text(body.state)
    flat = [candidate for found in asked.values() for candidate in found]
    async with one_pass(request, body.model, len(flat), EncodeTask.SCORE, EncodeTask.CLASSIFY) as (
        call,
        encoder,
    ):
        call.show_prompt({"state": body.state, "questions": sorted(asked)})
        judge = _Judge(encoder)
        encoded = await judge.encode(state, flat, truncation(encoder, body))
        result = await encoder.run(encoded, judge.params, deadline=call.deadline)
        call.record.usage = result.usage
        logits = iter([judge.logits(output) for output in result.outputs])
        answers = {
            name: _answer(body.questions[name], [next(logits) for _ in found])
            for name, found in asked.items()
        }
        usage = {"input_tokens": result.usage.prompt_tokens, "output_tokens": 0}
        return reply(request, {"model": call.model.name, "answers": answers, "usage": usage})


def _candidates(name: str, question: Question) -> list[decide.Candidate]:
    """What is judged for one question; raises InvalidRequest where criteria and type do not fit."""
    where, criteria = f"questions.{name[:80]}.criteria", question.criteria
    if question.type == "score" and not (isinstance(criteria, list) and 1 <= len(criteria) <= MAX_OPTIONS):
        raise InvalidRequest(
            f"{where} of a score is a list of 1 to {MAX_OPTIONS} levels, from low to high", param=where
        )
    if question.type == "choice" and not (isinstance(criteria, dict) and 1 <= len(criteria) <= MAX_OPTIONS):
        raise InvalidRequest(
            f"{where} of a choice is an object of 1 to {MAX_OPTIONS} options, each a description or null",
            param=where,
        )
    words = criteria if criteria is not None and question.type == "noul" else {}
    if not isinstance(words, dict) or not set(words) <= {"true", "false"}:
        raise InvalidRequest(f'{where} of a noul has at most "true" and "false", each a text', param=where)
    return decide.candidates(question.type, question.instructions, criteria)


def _answer(question: Question, logits: Sequence[Sequence[float]]) -> dict[str, Any]:
    """One question's answer. ``logits``: of each option, for it and, where the model says so, against it."""
    ours = [pair[0] for pair in logits]
    if question.type == "noul":
        return decide.noul(ours if len(ours) == 2 else list(logits[0]))
    if question.type == "choice":
        assert isinstance(question.criteria, dict)
        return decide.choice(list(question.criteria), ours)
    assert isinstance(question.criteria, list)
    return decide.score(question.criteria, ours)


class _Judge:
    """How a model that was trained to compare two texts judges an option.

    Rerankers say how well the state answers the question with the option as its query. Classifiers of entailment say
    whether it follows from the state (Yin et al. 2019).
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        labels = [label.lower() for label in encoder.card.labels]
        self.entailed = next((i for i, label in enumerate(labels) if label.startswith("entail")), None)
        self.against = next((i for i, label in enumerate(labels) if label.startswith("contradict")), None)
        ranks = EncodeTask.SCORE in encoder.card.tasks
        if not ranks and (self.entailed is None or encoder.client.ready.engine == "embed"):
            raise Unprocessable(
                f"model {encoder.client.spec.name!r} ({encoder.card.architecture}) cannot judge options: "
                "/v1/systemone needs a reranker, or a classifier with a label named entailment",
                param="model",
            )
        self.ranks = ranks
        self.params = EncodeParams(task=EncodeTask.SCORE if ranks else EncodeTask.CLASSIFY, raw_scores=True)

    async def encode(
        self, state: str, options: Sequence[decide.Candidate], cut: Truncate | None
    ) -> list[Encoded]:
        """A sequence for each option; where it is too long the state loses tokens, and the option none."""
        encoder = self.encoder
        found: list[Encoded] = []
        if self.ranks and encoder.template is not None:
            for option in options:
                found += await encoder.pairs(
                    option.text, [state], truncate=cut, instruction=option.instruction, param="state"
                )
            return found
        if self.ranks:
            for option in options:
                found += await encoder.pairs(option.together, [state], truncate=cut, param="state")
            return found
        pairs = [(state, option.together) for option in options]
        size = sum(len(state) + len(second) for _, second in pairs)
        return await encoder.offload(size, lambda: encoder.text.pairs(pairs, truncate=cut, param="state"))

    def logits(self, output: EncodeOutput) -> list[float]:
        """For the option, and against it if the model says."""
        values = np.asarray(array(output), dtype=np.float64)
        if self.ranks:
            return [float(values[0])]
        assert self.entailed is not None
        both = (self.entailed,) if self.against is None else (self.entailed, self.against)
        return [float(values[i]) for i in both]
