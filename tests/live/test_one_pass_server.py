"""Routes for embedders, classifiers and rerankers over a real server and real (tiny random) cores."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from headrace.client import PerformanceClient
from parity.test_entity_spans import LABELS
from support.one_pass import MAKERS, TEXTS, Served
from support.serving import LiveServer


def test_embed_in_all_forms(served: Served) -> None:
    body = {"model": "embedder", "inputs": TEXTS}
    rows = np.array(served.ok("/embed", body), dtype=np.float32)
    assert rows.shape == (3, 32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    plain = np.array(served.ok("/embed", body | {"normalize": False}), dtype=np.float32)
    np.testing.assert_allclose(plain / np.linalg.norm(plain, axis=1, keepdims=True), rows, atol=1e-6)
    connection = served.server
    status, raw, headers = request_bytes(connection, "/embed", body, "application/octet-stream")
    assert (status, headers["x-shape"]) == (200, "3,32")
    np.testing.assert_array_equal(np.frombuffer(raw, "<f4").reshape(3, 32), rows)
    status, packed, _ = request_bytes(connection, "/embed", body, "application/msgpack")
    found = [np.frombuffer(row, "<f4") for row in msgspec.msgpack.decode(packed)]
    np.testing.assert_array_equal(np.stack(found), rows)
    openai = served.ok("/v1/embeddings", {"model": "embedder", "input": TEXTS, "encoding_format": "base64"})
    decoded = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in openai["data"]]
    np.testing.assert_array_equal(np.stack(decoded), rows)
    bulk = PerformanceClient(served.server.url, "none")
    for form in (None, "float", "base64", "bytes"):
        response = bulk.embed(TEXTS, "embedder", form)
        assert response.response_headers[0]["content-type"].startswith(
            "application/octet-stream" if form == "bytes" else "application/json"
        )
        np.testing.assert_array_equal(response.numpy(), rows)
        assert (response.model, response.usage.total_tokens) == ("embedder", openai["usage"]["total_tokens"])
    tokens = served.ok("/tokenize", {"model": "embedder", "inputs": TEXTS})
    assert openai["usage"]["prompt_tokens"] == sum(map(len, tokens))
    status, raw, _ = request_bytes(connection, "/embed", body, "text/html")
    assert status == 400


def request_bytes(server: LiveServer, path: str, body: Any, accept: str) -> tuple[int, bytes, dict[str, str]]:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", path, json.dumps(body), {"Accept": accept})
    reply = connection.getresponse()
    data = reply.read()
    connection.close()
    return reply.status, data, {key.lower(): value for key, value in reply.getheaders()}


def test_prompts_dimensions_and_token_ids(served: Served) -> None:
    base = {"model": "embedder"}
    with_prompt = served.ok("/embed", base | {"inputs": "in Berlin", "prompt_name": "query"})
    np.testing.assert_allclose(
        with_prompt, served.ok("/embed", base | {"inputs": "Tim Cook in Berlin"}), atol=1e-6
    )
    ids = [token["id"] for token in served.ok("/tokenize", base | {"inputs": "in Berlin"})[0]]
    np.testing.assert_allclose(
        served.ok("/embed", base | {"inputs": ids}),
        served.ok("/embed", base | {"inputs": "in Berlin"}),
        atol=1e-6,
    )
    short = np.array(served.ok("/embed", base | {"inputs": "in Berlin", "dimensions": 8}))
    assert short.shape == (1, 8)
    assert np.linalg.norm(short) == pytest.approx(1, abs=1e-6)
    status, reply, _ = served.post("/embed", base | {"inputs": "x", "prompt_name": "qurey"})
    assert status == 400
    assert "did you mean 'query'" in reply["error"]["message"]


def test_similarity_and_embed_all(served: Served) -> None:
    body = {
        "inputs": {"source_sentence": "Tim Cook", "sentences": ["Tim Cook", "Berlin says"]},
        "model": "embedder",
    }
    same, other = served.ok("/similarity", body)
    scored = served.ok(
        "/score",
        {
            "text_1": body["inputs"]["source_sentence"],
            "text_2": body["inputs"]["sentences"],
            "model": "embedder",
        },
    )
    assert [one["score"] for one in scored["data"]] == pytest.approx([same, other], abs=1e-6)
    # Random weights tell texts apart by little, and by how much depends on the trained vocabulary.
    assert other < 0.999999 < same < 1.00001
    (rows,) = served.ok("/embed_all", {"model": "embedder", "inputs": "Tim Cook"})
    mean = np.mean(rows, axis=0)
    np.testing.assert_allclose(
        [mean / np.linalg.norm(mean)],
        served.ok("/embed", {"model": "embedder", "inputs": "Tim Cook"}),
        atol=1e-6,
    )


def test_truncation_keeps_special_tokens_and_takes_the_asked_end(served: Served) -> None:
    long = " ".join(
        f"Apple buys {word}" for word in ["Berlin", "startup", "billion", "Cook", "Tim", "says"] * 6
    )
    status, reply, _ = served.post("/embed", {"model": "embedder", "inputs": ["a", long]})
    assert (status, reply["error"]["param"]) == (413, "inputs[1]")
    status, reply, _ = served.post("/v1/embeddings", {"model": "embedder", "input": ["a", long]})
    assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
    tokens = [token["id"] for token in served.ok("/tokenize", {"model": "embedder", "inputs": long})[0]]
    for direction, kept in (("Right", [*tokens[:39], tokens[-1]]), ("left", [tokens[0], *tokens[-39:]])):
        body = {"model": "embedder", "inputs": long, "truncate": True, "truncation_direction": direction}
        cut = served.ok("/embed", body)
        np.testing.assert_allclose(cut, served.ok("/embed", {"model": "embedder", "inputs": kept}), atol=1e-6)


def test_predict_equals_transformers(served: Served) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served.folders["classifier"])
    inputs: list[list[str]] = [["Apple buys"], ["Tim Cook", "in Berlin"], [""]]
    found = served.ok("/predict", {"inputs": inputs, "model": "classifier"})
    for item, rows in zip(inputs, found):
        with torch.no_grad():
            theirs = (
                served.theirs["classifier"](**tokenizer(*item, return_tensors="pt")).logits[0].softmax(-1)
            )
        assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
        scores = {row["label"]: row["score"] for row in rows}
        np.testing.assert_allclose([scores[label] for label in "abc"], theirs.numpy(), atol=1e-5)
    assert served.ok("/predict", {"inputs": "Apple buys"}) == found[0]  # the only model that classifies so


def test_rerank_in_three_shapes(served: Served) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served.folders["reranker"])
    query, texts = "who is in Berlin", ["Tim Cook", "startup for $1 billion", "Apple", "says says says"]
    with torch.no_grad():
        pairs = tokenizer([query] * 4, texts, padding=True, return_tensors="pt")
        logits = served.theirs["reranker"](**pairs).logits[:, 0]
    expected = dict(enumerate(logits.sigmoid().tolist()))
    ranks = served.ok("/rerank", {"query": query, "texts": texts, "return_text": True})
    assert {rank["index"]: rank["score"] for rank in ranks} == pytest.approx(expected, abs=1e-5)
    assert [rank["score"] for rank in ranks] == sorted((rank["score"] for rank in ranks), reverse=True)
    assert all(rank["text"] == texts[rank["index"]] for rank in ranks)
    order = [rank["index"] for rank in ranks]
    jina = served.ok(
        "/v1/rerank",
        {"model": "reranker", "query": query, "documents": [{"text": t} for t in texts], "top_n": 2},
    )
    assert [item["index"] for item in jina["results"]] == order[:2]
    assert jina["results"][0]["document"] == {"text": texts[order[0]]}
    assert jina["usage"]["total_tokens"] == int(pairs["attention_mask"].sum())
    assert served.ok("/rerank", {"query": query, "documents": texts, "model": "reranker"})["results"]
    cohere = served.ok("/v2/rerank", {"model": "reranker", "query": query, "documents": texts})
    assert [item["index"] for item in cohere["results"]] == order
    scored = served.ok("/v1/score", {"model": "reranker", "text_1": query, "text_2": texts})
    by_index = {rank["index"]: rank["score"] for rank in ranks}
    assert [item["score"] for item in scored["data"]] == [by_index[i] for i in range(len(texts))]
    paired = served.ok("/score", {"model": "reranker", "text_1": [query] * len(texts), "text_2": texts})
    assert paired["data"] == scored["data"] and paired["usage"] == scored["usage"]
    raw = served.ok("/rerank", {"query": query, "texts": texts, "raw_scores": True})
    assert {r["index"]: r["score"] for r in raw} == pytest.approx(dict(enumerate(logits.tolist())), abs=1e-4)


def test_predict_tokens(served: Served) -> None:
    text = "Apple buys a U.K. startup, says Tim Cook"
    pipeline = served.theirs["tagger"]
    for strategy in ("none", "simple", "first", "average", "max"):
        (found,) = served.ok("/predict_tokens", {"inputs": [[text]], "aggregation_strategy": strategy})
        expected = pipeline(text, aggregation_strategy=strategy)
        key = "entity" if strategy == "none" else "entity_group"
        assert [(e["start"], e["end"], *e["results"]) for e in found] == [
            (e["start"], e["end"], e[key]) for e in expected
        ]
        assert all(e["token"] == text[e["start"] : e["end"]] for e in found)
        assert all((e["token_id"] > 0) == (strategy == "none") for e in found)
    (raw,) = served.ok("/predict_tokens", {"inputs": [text], "raw_scores": True})
    assert list(raw[0]["results"]) == LABELS


def test_predict_takes_the_bodies_of_other_routes(served: Served) -> None:
    body = {"model": "embedder", "input": "Tim Cook"}
    assert served.ok("/predict", body) == served.ok("/v1/embeddings", body)
    body = {"query": "x", "texts": ["Tim Cook", "Berlin"]}
    assert served.ok("/predict", body) == served.ok("/rerank", body)
    body = {"model": "tagger", "inputs": "Tim Cook", "aggregation_strategy": "max"}
    assert served.ok("/predict", body) == served.ok("/predict_tokens", body)


def test_the_root_path_does_what_the_model_is_for(served: Served) -> None:
    pairs: list[tuple[dict[str, Any], str]] = [
        ({"model": "embedder", "inputs": TEXTS}, "/embed"),
        ({"model": "embedder", "input": "a"}, "/v1/embeddings"),
        ({"model": "embedder", "inputs": {"source_sentence": "a", "sentences": TEXTS}}, "/similarity"),
        ({"model": "classifier", "inputs": [["a"], ["b"]]}, "/predict"),
        ({"model": "tagger", "inputs": TEXTS[2]}, "/predict_tokens"),
        ({"query": "a", "texts": TEXTS}, "/rerank"),
        ({"query": "a", "documents": TEXTS}, "/v1/rerank"),
    ]
    for body, path in pairs:
        expected = served.ok(path, body)
        assert served.ok("/", body) == served.ok("/invocations", body) == expected, path
    assert served.ok("/embeddings", pairs[1][0]) == served.ok("/v1/embeddings", pairs[1][0])
    for body, status, param in (
        ({"inputs": "a"}, 400, "model"),
        ({"model": "none", "inputs": "a"}, 404, "model"),
        ({"model": ["embedder"], "inputs": "a"}, 400, "model"),
        ({"model": "embedder"}, 400, "inputs"),
    ):
        found, reply, _ = served.post("/", body)
        assert (found, reply["error"]["param"]) == (status, param), reply


def test_openai_embeddings_without_a_model(served: Served) -> None:
    """text-embeddings-inference's users leave it out: the only embedder is meant."""
    named = served.ok("/v1/embeddings", {"model": "embedder", "input": TEXTS})
    assert served.ok("/v1/embeddings", {"input": TEXTS}) == named
    assert served.ok("/v1/embeddings", {"model": None, "input": TEXTS}) == named
    status, reply, _ = served.post("/v1/embeddings", {"model": "", "input": TEXTS})
    assert (status, reply["error"]["param"]) == (404, "model")


def test_limits_and_cuts_of_openai_embeddings(served: Served) -> None:
    """The same as on the other routes: --max-inputs is 64 here, and this embedder does not cut by itself."""
    status, reply, _ = served.post("/v1/embeddings", {"model": "embedder", "input": ["a"] * 65})
    assert (status, reply["error"]["param"]) == (413, "input")
    assert len(served.ok("/v1/embeddings", {"model": "embedder", "input": ["a"] * 64})["data"]) == 64
    long = " ".join(["Apple", "buys", "a", "startup", "in", "Berlin"] * 20)
    ask = {"model": "embedder", "input": long}
    for refused in ({}, {"truncate": False}):
        status, reply, _ = served.post("/v1/embeddings", ask | refused)
        assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
    vectors = {}
    for direction in ("Left", "Right", None):
        how = {"truncate": True} | ({"truncation_direction": direction} if direction else {})
        (expected,) = served.ok("/embed", {"model": "embedder", "inputs": long} | how)
        vectors[direction] = served.ok("/v1/embeddings", ask | how)["data"][0]["embedding"]
        np.testing.assert_allclose(vectors[direction], expected, atol=1e-6)
    assert vectors[None] == vectors["Right"] != vectors["Left"]
    short = served.ok("/v1/embeddings", ask | {"truncate_prompt_tokens": 9, "truncation_direction": "Left"})
    assert short["usage"]["prompt_tokens"] == 9
    status, reply, _ = served.post("/v1/embeddings", ask | {"truncate": False, "truncate_prompt_tokens": 9})
    assert (status, reply["error"]["param"]) == (400, "truncate")


def test_tokenize_decode_info(served: Served) -> None:
    (tokens,) = served.ok("/tokenize", {"model": "embedder", "inputs": "Apple buys"})
    assert tokens[0]["special"]
    assert tokens[0]["start"] is None
    assert "".join(t["text"] for t in tokens if not t["special"]) == "Applebuys"
    ids = [token["id"] for token in tokens]
    assert served.ok("/decode", {"model": "embedder", "ids": ids}) == ["apple buys"]
    assert (
        "[CLS]" in served.ok("/decode", {"model": "embedder", "ids": [ids], "skip_special_tokens": False})[0]
    )
    status, facts, _ = served.server.request("GET", "/info?model=reranker")
    assert status == 200
    assert facts["model_type"] == {"reranker": {"id2label": {"0": "score"}, "label2id": {"score": 0}}}
    assert facts["max_client_batch_size"] == 64
    status, all_facts, _ = served.server.request("GET", "/info")
    assert [one["model_id"] for one in all_facts] == list(MAKERS)
    assert all_facts[0]["model_type"] == {"embedding": {"pooling": "mean"}}


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("/embed", {"inputs": "x", "model": "reranker"}, 422, "it serves /rerank, /predict"),
        ("/rerank", {"query": "x", "texts": ["y"], "model": "embedder"}, 422, "it serves /v1/embeddings"),
        ("/embed_sparse", {"inputs": "x"}, 404, "none of the models"),
        ("/rerank", {"query": "x", "texts": []}, 400, "empty list"),
        ("/embed", {"inputs": []}, 400, "empty list"),
        ("/embed", {"inputs": ["x"] * 65, "model": "embedder"}, 413, "the limit is 64"),
        ("/embed", {"inputs": ["x", 5], "model": "embedder"}, 400, "inputs"),
        ("/embed", {"inputs": [5, 400], "model": "embedder"}, 400, "vocabulary"),
        ("/embed", {"inputs": "x", "model": "embedder", "dimensions": 33}, 400, "vectors of 32"),
        ("/embed", {"inputs": "x", "truncation_direction": "Up"}, 400, "truncation_direction"),
        ("/embed", {"input": "x"}, 400, "did you mean 'inputs'"),
        ("/predict", {"inputs": ["a", "b", "c"]}, 400, "wrap each in a list"),
        ("/predict", {"inputs": [["a", "b", "c"]]}, 400, "inputs[0]"),
        ("/predict_tokens", {"inputs": [["a", "b"]]}, 400, "inputs[0]"),
        ("/predict_tokens", {"inputs": "a", "aggregation_strategy": "mean"}, 400, "aggregation_strategy"),
        ("/rerank", {"query": "x", "texts": ["y"], "instruction": "z"}, 400, "no instruction"),
        ("/decode", {"ids": [-1], "model": "embedder"}, 400, "token ids"),
        ("/v1/rerank", {"query": "x", "documents": ["y"], "top_n": 0}, 400, "top_n"),
    ],
)
def test_what_cannot_be_done_is_a_clear_4xx(
    served: Served, path: str, body: Any, status: int, word: str
) -> None:
    found, reply, _ = served.post(path, body)
    assert (found, word in reply["error"]["message"]) == (status, True), reply


STRANGE: list[Any] = [
    "",
    "\x00\x01\x7f",
    "\u202e\ufeff🙂👨‍👩‍👧",
    "a" * 100_000,
    " " * 5000,
    "\ud800",
    ["a", None],
    [["a"], "b"],
    [[[]]],
    {"a": 1},
    True,
    1e400,
    [1.5],
    [2**70],
    [["x", "y"], ["z"]],
    ["x"] * 10_000,
    -5,
]


@pytest.mark.parametrize(
    "path", ["/embed", "/embed_all", "/predict", "/predict_tokens", "/tokenize", "/decode", "/rerank"]
)
def test_strange_inputs_give_a_result_or_a_clear_4xx(served: Served, path: str) -> None:
    model = {"/predict": "classifier", "/predict_tokens": "tagger", "/rerank": "reranker"}.get(
        path, "embedder"
    )
    for value in STRANGE:
        body = {"ids" if path == "/decode" else "inputs": value, "model": model}
        if path == "/rerank":
            body = {"query": value, "texts": value, "model": model}
        bodies = [body] if path in ("/tokenize", "/decode") else [body, body | {"truncate": True}]
        for one in bodies:
            status, reply, _ = served.post(path, json.dumps(one).encode())
            assert status == 200 or (400 <= status < 500 and reply["error"]["message"]), (path, value, reply)
    assert served.ok("/embed", {"model": "embedder", "inputs": "still here"})
