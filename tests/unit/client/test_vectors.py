"""The block of memory that vectors are put into: every mixture of forms gives the rows that came."""

from __future__ import annotations

import base64
import gc
import json
import random
import struct
import weakref
from typing import Any

import msgspec
import numpy as np
import pytest

from headrace.client import BadReply, PerformanceClient, RequestProcessingPreference
from headrace.client.http1 import Reply
from headrace.client.operation import Job
from headrace.client.vectors import Vectors
from support.scripted_server import ScriptedServer, embeddings

JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json"
PACKED = b"HTTP/1.1 200 OK\r\ncontent-type: application/msgpack"


def reply(rows: list[tuple[int, Any]], head: bytes = JSON, **more: Any) -> Reply:
    data = [{"object": "embedding", "index": i, "embedding": e} | more for i, e in rows]
    usage = {"prompt_tokens": len(rows), "total_tokens": 2 * len(rows)}
    body = {"object": "list", "data": data, "model": "m", "usage": usage}
    encode = msgspec.msgpack.encode if head == PACKED else msgspec.json.encode
    return Reply(200, head, encode(body))


def float32(values: list[float]) -> list[float]:
    return list(struct.unpack(f"<{len(values)}f", struct.pack(f"<{len(values)}f", *values)))


@pytest.mark.parametrize("seed", range(12))
def test_any_mixture_of_forms(seed: int) -> None:
    """Requests of random sizes finish in random order, in one form or in mixed ones, of one width or of several."""
    rng = random.Random(seed)
    widths = [rng.randrange(0, 9)] if seed % 3 else [3, 4]
    forms = ["numbers", "text", "bytes"] if seed % 2 else [rng.choice(["numbers", "text", "bytes"])]
    sizes = [rng.randrange(1, 5) for _ in range(rng.randrange(1, 8))]
    offset = rng.randrange(0, 100)
    truth: list[list[float]] = []
    jobs = []
    for n, size in enumerate(sizes):
        form = rng.choice(forms)
        values = [float32([rng.gauss(0, 1) for _ in range(rng.choice(widths))]) for _ in range(size)]
        jobs.append((Job(n, "/", b"", offset + len(truth), size), form, values))
        truth += values
    vectors = Vectors(len(truth), offset)
    expected: list[Any] = list(truth)
    for job, form, values in rng.sample(jobs, len(jobs)):
        sent: list[Any] = values
        if form != "numbers":
            sent = [struct.pack(f"<{len(v)}f", *v) for v in values]
        if form == "text":
            sent = [base64.b64encode(piece).decode() for piece in sent]
            expected[job.offset - offset : job.offset - offset + job.items] = sent
        rows = rng.sample(list(enumerate(sent)), job.items)
        got = vectors.take(job, reply(rows, PACKED if form == "bytes" else JSON))
        assert got.body == b""
    rows = vectors.rows()
    assert [row.index for row in rows] == list(range(offset, offset + len(truth)))
    assert [row.embedding for row in rows] == expected
    assert (vectors.usage.prompt_tokens, vectors.usage.total_tokens) == (len(truth), 2 * len(truth))
    if len({len(values) for values in truth}) > 1:
        with pytest.raises(ValueError, match="same dimension"):
            vectors.numpy()
    else:
        assert vectors.numpy().shape == (len(truth), len(truth[0]))
        assert vectors.numpy().tolist() == truth
        again = Vectors(len(truth) + 1)
        again.take(Job(0, "/", b"", 0, 1), reply([(0, truth[0])]))
        again.merge(1, vectors)
        assert [row.embedding for row in again.rows()] == [truth[0], *expected]
        assert again.numpy().tolist() == [truth[0], *truth]


def test_numbers_lie_in_one_block_that_outlives_the_response() -> None:
    count, width = 700, 1024  # 2.9 MB: in huge pages where there are any
    table = np.random.default_rng(0).standard_normal((count, width)).astype(np.float32)
    vectors = Vectors(count)
    for i in reversed(range(count)):
        vectors.take(Job(i, "/", b"", i, 1), reply([(0, table[i].tolist())]))
    array = vectors.numpy()
    assert np.shares_memory(array, vectors.numpy())
    assert array.flags.writeable
    del vectors
    gc.collect()
    np.testing.assert_array_equal(array, table)


@pytest.mark.parametrize("text", ["not base64!", "é", "AAA=", "AAAAA===", "AA==", ""])
def test_texts_are_given_back_as_they_came(text: str) -> None:
    good = base64.b64encode(struct.pack("<2f", 1, 2)).decode()
    vectors = Vectors(2)
    vectors.take(Job(0, "/", b"", 0, 2), reply([(0, good), (1, text)]))
    assert [row.embedding for row in vectors.rows()] == [good, text]
    with pytest.raises(ValueError, match="index 1"):
        vectors.numpy()


def test_other_names_of_objects_are_kept() -> None:
    vectors = Vectors(2, 5)
    vectors.take(Job(0, "/", b"", 5, 2), reply([(0, [1.0]), (1, [2.0])], object="vector"))
    assert [(row.index, row.object) for row in vectors.rows()] == [(5, "vector"), (6, "vector")]


@pytest.mark.parametrize("value", [[1e39], [[1.0]], ["1"], {"a": 1}, None, True, b"abc", ["x", 1.0]])
def test_what_is_no_vector(value: Any) -> None:
    for head in (JSON, PACKED):
        if isinstance(value, bytes) and head == JSON:
            continue
        with pytest.raises(BadReply):
            Vectors(1).take(Job(0, "/", b"", 0, 1), reply([(0, value)], head))


def test_raw_floats_carry_model_and_usage_in_a_header() -> None:
    about = {"model": "modèle", "usage": {"prompt_tokens": 3, "total_tokens": 3}}
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\nmetadata: "
    for ascii in (True, False):
        vectors = Vectors(2)
        raw = Reply(
            200, head + json.dumps(about, ensure_ascii=ascii).encode(), struct.pack("<4f", 1, 2, 3, 4)
        )
        vectors.take(Job(0, "/", b"", 0, 2), raw)
        assert vectors.numpy().tolist() == [[1, 2], [3, 4]]
        assert (vectors.model, vectors.usage.total_tokens) == ("modèle", 3)
    for broken in (
        b"{",
        b"[]",
        b'{"usage": null}',
        b'{"usage":{"prompt_tokens":1,"total_tokens":1},"data":[3]}',
    ):
        with pytest.raises(BadReply):
            Vectors(1).take(Job(0, "/", b"", 0, 1), Reply(200, head + broken, b"\0" * 8))


def test_streamed_parts_are_freed_without_the_collector() -> None:
    """No cycles: the memory of a long stream does not wait for the garbage collector."""
    wanted = RequestProcessingPreference(batch_size=2, max_concurrent_requests=2)
    parts = []
    with ScriptedServer(embeddings) as server:
        gc.collect()
        gc.disable()
        try:
            client = PerformanceClient(server.url, "k")
            for part in client.embed_stream(["x"] * 400, "m", preference=wanted):
                parts.append(weakref.ref(part))
                part.numpy()
            del part
            alive = sum(ref() is not None for ref in parts)
        finally:
            gc.enable()
    assert len(parts) == 200
    assert alive < 10
