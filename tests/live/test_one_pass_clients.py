"""What other projects' clients send to embedders, classifiers and rerankers."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.config.spec import EngineSpec
from headrace.serving.state import Model
from support.one_pass import TEXTS, Served, start_engine
from support.serving import live


def test_classify_in_the_shapes_of_infinity_and_vllm(served: Served) -> None:
    expected = served.ok("/predict", {"model": "classifier", "inputs": [[text] for text in TEXTS]})
    body = {"model": "classifier", "input": TEXTS}
    infinity = served.ok("/classify", body | {"raw_scores": False})
    assert (infinity["object"], infinity["data"]) == ("classify", expected)
    raw = served.ok("/classify", body | {"raw_scores": True})["data"][0]
    assert raw == served.ok("/predict", {"model": "classifier", "inputs": TEXTS[0], "raw_scores": True})
    vllm = served.ok("/classify", body)
    assert vllm["object"] == "list"
    for index, (row, labels) in enumerate(zip(vllm["data"], expected, strict=True)):
        by_name = {one["label"]: one["score"] for one in labels}
        assert row == {
            "index": index,
            "label": labels[0]["label"],
            "probs": [by_name[name] for name in "abc"],
            "num_classes": 3,
        }
    tokens = served.ok("/v1/embeddings", {"model": "embedder", "input": TEXTS})["usage"]
    assert vllm["usage"] == infinity["usage"] == tokens
    for bad, param in (({"input": []}, "input"), ({"input": [1]}, "input[0]"), ({}, "input")):
        status, reply, _ = served.post("/classify", {"model": "classifier"} | bad)
        assert (status, reply["error"]["param"]) == (400, param)


def test_what_infinitys_client_sends(served: Served) -> None:
    """It says every field of a request, and knows the replies by their object."""
    sent = {"model": "embedder", "input": TEXTS, "dimensions": 0, "modality": "text"}
    assert served.ok("/embeddings", sent) == served.ok("/embeddings", {"model": "embedder", "input": TEXTS})
    status, reply, _ = served.post("/embeddings", {"model": "embedder", "input": "a", "dimensions": 0})
    assert (status, reply["error"]["param"]) == (400, "dimensions")
    ask = {
        "model": "reranker",
        "query": "a",
        "documents": TEXTS,
        "return_documents": False,
        "raw_scores": True,
    }
    found = served.ok("/rerank", ask)
    scores = served.ok("/rerank", {"query": "a", "texts": TEXTS, "raw_scores": True})
    assert found["object"] == "rerank"
    assert [(one["index"], one["relevance_score"]) for one in found["results"]] == [
        (one["index"], one["score"]) for one in scores
    ]


def test_hugging_face_clients_reach_a_server_of_one_model(served: Served) -> None:
    """They post to the root path, without a model."""
    from huggingface_hub import InferenceClient

    model = Model(EngineSpec(model="embedder", path=served.folders["embedder"], num_threads=1))
    with live(model) as server:
        model.loaded = server.call(start_engine(model.spec))
        client = InferenceClient(model=server.url)
        expected = served.ok("/embed", {"model": "embedder", "inputs": TEXTS[0]})
        np.testing.assert_allclose(client.feature_extraction(TEXTS[0], truncate=True), expected, atol=1e-6)
        alike = served.ok(
            "/similarity", {"model": "embedder", "inputs": {"source_sentence": "a", "sentences": TEXTS}}
        )
        assert client.sentence_similarity("a", other_sentences=TEXTS) == pytest.approx(alike)


def test_hugging_face_clients_classify_and_find_entities(served: Served) -> None:
    """They send ``parameters``, and read what transformers' pipelines give."""
    from huggingface_hub import InferenceClient

    ask = {"model": "classifier", "inputs": TEXTS[0]}
    whole = served.ok("/predict", ask)
    assert served.ok("/predict", ask | {"parameters": {}}) == [whole]
    assert served.ok("/predict", ask | {"parameters": {"top_k": 2}}) == [whole[:2]]
    logits = {row["label"]: row["score"] for row in served.ok("/predict", ask | {"raw_scores": True})}
    for function, numbers in (
        ("none", logits),
        ("sigmoid", {k: 1 / (1 + np.exp(-v)) for k, v in logits.items()}),
        ("softmax", {row["label"]: row["score"] for row in whole}),
    ):
        (rows,) = served.ok("/predict", ask | {"parameters": {"function_to_apply": function}})
        assert {row["label"]: row["score"] for row in rows} == pytest.approx(numbers, abs=1e-6)
    for wrong in ({"top_k": 0}, {"function_to_apply": "tanh"}, {"stride": 2}):
        status, reply, _ = served.post("/predict", ask | {"parameters": wrong})
        assert (status, reply["error"]["param"]) == (400, f"parameters.{next(iter(wrong))}")

    for name, kind in (("classifier", "text"), ("tagger", "token")):
        model = Model(EngineSpec(model=name, path=served.folders[name], num_threads=1))
        with live(model) as server:
            model.loaded = server.call(start_engine(model.spec))
            client = InferenceClient(model=server.url)
            if kind == "text":
                found = client.text_classification(TEXTS[0], top_k=2)
                assert [(row.label, row.score) for row in found] == [
                    (r["label"], pytest.approx(r["score"])) for r in whole[:2]
                ]
                continue
            for strategy in (None, "simple", "max"):
                theirs = served.theirs[name](TEXTS[2], aggregation_strategy=strategy or "none")
                ours = client.token_classification(TEXTS[2], aggregation_strategy=strategy)
                field = "entity_group" if strategy else "entity"
                assert [(getattr(row, field), row.start, row.end) for row in ours] == [
                    (row[field], row["start"], row["end"]) for row in theirs
                ]
                assert [row.score for row in ours] == pytest.approx(
                    [row["score"] for row in theirs], abs=1e-3
                )
