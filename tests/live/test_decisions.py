"""/v1/systemone over a real server with tiny rerankers and an entailment classifier; default routes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.config.spec import EngineSpec
from headrace.serving.state import Model
from support.one_pass import make_bert, make_embedder, start_engine
from support.serving import LiveServer, live

STATE = {"from": "Tim Cook", "text": "Apple buys a startup in Berlin"}
SHOWN = '{"from":"Tim Cook","text":"Apple buys a startup in Berlin"}'
QUESTIONS: dict[str, Any] = {
    "place": {"type": "choice", "instructions": "Where?", "criteria": {"Berlin": "a city", "Paris": None, "UK": None}},
    "size": {"type": "score", "instructions": "How large?", "criteria": ["small", "middle", "large"]},
    "is it so": {"type": "noul", "instructions": "Is it about Apple?"},
    "either": {"type": "noul", "instructions": "Money?", "criteria": {"true": "says billion", "false": "says none"}},
}  # fmt: skip
OPTIONS = [
    "Where? Berlin: a city", "Where? Paris", "Where? UK", "How large? small", "How large? middle", "How large? large",
    "Is it about Apple?", "Money? says billion", "Money? says none",
]  # fmt: skip


def make_entailment(folder: Path) -> Any:
    labels = {0: "CONTRADICTION", 1: "neutral", 2: "ENTAILMENT"}
    return make_bert(folder, "ForSequenceClassification", num_labels=3, id2label=labels)


MAKERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "reranker": (
        lambda f: make_bert(f, "ForSequenceClassification", num_labels=1, id2label={0: "score"}),
        {"default_route": "/v1/systemone"},
    ),
    "entailment": (make_entailment, {"default_route": "/predict"}),
    "embedder": (make_embedder, {"default_route": "/v1/embeddings"}),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    models = []
    for name, (make, fields) in MAKERS.items():
        folder = tmp_path_factory.mktemp(name)
        make(folder)
        models.append(Model(EngineSpec(model=name, path=folder, num_threads=1, **fields)))
    with live(*models, max_inputs=9) as server:
        for model in models:
            model.loaded = server.call(start_engine(model.spec))
        yield server


def ask(server: LiveServer, model: str, path: str = "/v1/systemone", **changes: Any) -> Any:
    body = {"model": model, "state": STATE, "questions": QUESTIONS, **changes}
    status, reply, _ = server.post(path, body)
    return reply if status == 200 else (status, json.dumps(reply))


def softmax(values: list[float]) -> np.ndarray:
    weights = np.exp(np.array(values) - max(values))
    return weights / weights.sum()


def check(answers: Any, logits: list[float], against: list[float] | None) -> None:
    """Every answer follows from the logits of OPTIONS."""
    place, size = softmax(logits[:3]), softmax(logits[3:6])
    found = answers["place"]
    assert list(found["probabilities"]) == ["Berlin", "Paris", "UK"]
    np.testing.assert_allclose(list(found["probabilities"].values()), place, atol=1e-5)
    assert found["choice"] == ["Berlin", "Paris", "UK"][int(place.argmax())]
    assert found["confidence"] == pytest.approx((place.max() - 1 / 3) * 1.5, abs=1e-5)
    found = answers["size"]
    np.testing.assert_allclose([found["probabilities"][str(i)] for i in range(3)], size, atol=1e-5)
    assert found["score"] == pytest.approx(size[1] + 2 * size[2], abs=1e-5)
    assert found["legend"] == {"0": "small", "1": "middle", "2": "large"}
    yes = 1 / (1 + np.exp(-logits[6])) if against is None else softmax([logits[6], against[6]])[0]
    assert answers["is it so"] == {"type": "noul", "noul": pytest.approx(yes, abs=1e-5)}
    assert answers["either"]["noul"] == pytest.approx(softmax(logits[7:])[0], abs=1e-5)


def test_a_reranker_judges_each_option(server: LiveServer) -> None:
    reply = ask(server, "reranker")
    scores, tokens = [], 0
    for option in OPTIONS:
        body = {"model": "reranker", "query": option, "texts": [SHOWN], "raw_scores": True}
        _, ranks, _ = server.post("/rerank", body)
        scores.append(ranks[0]["score"])
        _, usage, _ = server.post("/v1/rerank", {"model": "reranker", "query": option, "documents": [SHOWN]})
        tokens += usage["usage"]["total_tokens"]
    check(reply["answers"], scores, None)
    assert (reply["model"], list(reply["answers"])) == ("reranker", list(QUESTIONS))
    assert reply["usage"] == {"input_tokens": tokens, "output_tokens": 0}


def test_an_entailment_classifier_judges_each_option(server: LiveServer) -> None:
    reply = ask(server, "entailment")
    body = {"model": "entailment", "inputs": [[SHOWN, option] for option in OPTIONS], "raw_scores": True}
    _, rows, _ = server.post("/predict", body)
    logits = [{one["label"]: one["score"] for one in row} for row in rows]
    check(reply["answers"], [one["ENTAILMENT"] for one in logits], [one["CONTRADICTION"] for one in logits])


def one(kind: str, **fields: Any) -> dict[str, Any]:
    return {"questions": {"a": {"type": kind, "instructions": "x", **fields}}}


@pytest.mark.parametrize(
    ("model", "changes", "status", "says"),
    [
        ("embedder", {}, 422, "needs a reranker"),
        ("reranker", {"questions": {}}, 400, "questions"),
        ("reranker", one("choice", criteria=["a"]), 400, "options"),
        ("reranker", one("score", criteria={"a": None}), 400, "levels"),
        ("reranker", one("noul", criteria={"yes": "b"}), 400, "noul"),
        ("reranker", one("box"), 400, "type"),
        ("reranker", one("score", criteria=["l"] * 10), 413, "max-inputs"),
        ("reranker", {"state": 3}, 400, "state"),
        ("reranker", {"state": "word " * 300, "truncate": False}, 413, "tokens"),
    ],
)  # fmt: skip
def test_refusals(server: LiveServer, model: str, changes: Any, status: int, says: str) -> None:
    found = ask(server, model, **changes)
    assert isinstance(found, tuple), found
    assert found[0] == status
    assert says in found[1]


def test_predict_goes_where_the_operator_says(server: LiveServer) -> None:
    assert ask(server, "reranker", "/predict") == ask(server, "reranker")
    _, reply, _ = server.post("/predict", {"model": "embedder", "input": ["a"]})
    assert reply["data"][0]["object"] == "embedding"
    # Without its default route this body would be answered as one of /v1/embeddings.
    status, reply, _ = server.post("/predict", {"model": "entailment", "input": ["a"]})
    assert status == 400
    assert "inputs" in json.dumps(reply)
