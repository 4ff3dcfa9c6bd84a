"""/v1/files and /v1/batches with the openai package, and across a restart of the server."""

from __future__ import annotations

import io
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from headrace.engines.scripted import Step
from headrace.serving.files import FileStore
from headrace.types import Request
from support.serving import LiveServer, live, says, scripted_model


def lines(count: int, **more: Any) -> bytes:
    rows = [
        {
            "custom_id": f"r-{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": [{"role": "user", "content": str(i)}], **more},
        }
        for i in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def client(server: LiveServer, key: str = "k") -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)


def upload(user: openai.OpenAI, data: bytes) -> Any:
    return user.files.create(file=("in.jsonl", io.BytesIO(data)), purpose="batch")


def begin(user: openai.OpenAI, data: bytes) -> Any:
    return user.batches.create(
        input_file_id=upload(user, data).id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"a": "b"},
    )


def wait(user: openai.OpenAI, batch: Any, *statuses: str) -> Any:
    deadline = time.monotonic() + 60
    while batch.status not in statuses:
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)
        batch = user.batches.retrieve(batch.id)
    return batch


def test_a_batch_from_upload_to_results(tmp_path: Path) -> None:
    with live(data_dir=str(tmp_path)) as server:
        user = client(server)
        data = lines(30) + lines(1).replace(b'"r-0"', b'"bad"').replace(b'"m"', b'"absent"')
        batch = begin(user, data)
        assert (batch.object, batch.metadata, batch.completion_window) == ("batch", {"a": "b"}, "24h")
        assert batch.expires_at == batch.created_at + 24 * 3600
        batch = wait(user, batch, "completed", "failed")
        assert batch.status == "completed"
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (31, 30, 1)
        rows = [json.loads(row) for row in user.files.content(batch.output_file_id).text.splitlines()]
        assert sorted(row["custom_id"] for row in rows) == sorted(f"r-{i}" for i in range(30))
        assert {row["response"]["body"]["choices"][0]["message"]["content"] for row in rows} == {"Hello!"}
        (failed,) = user.files.content(batch.error_file_id).text.splitlines()
        assert json.loads(failed)["custom_id"] == "bad"
        assert json.loads(failed)["response"]["status_code"] == 404
        assert [one.id for one in user.batches.list()] == [batch.id]
        names = {one.id: one.purpose for one in user.files.list()}
        assert names == {
            batch.input_file_id: "batch",
            batch.output_file_id: "batch_output",
            batch.error_file_id: "batch_output",
        }
        assert user.files.content(batch.input_file_id).content == data
        assert user.files.delete(batch.input_file_id).deleted
        with pytest.raises(openai.NotFoundError):
            user.files.retrieve(batch.input_file_id)


def test_a_bad_file_fails_with_its_line(tmp_path: Path) -> None:
    with live(data_dir=str(tmp_path)) as server:
        user = client(server)
        batch = wait(user, begin(user, lines(2) + lines(1)), "completed", "failed")
        assert batch.status == "failed"
        (error,) = batch.errors.data
        assert (error.line, error.param) == (3, "custom_id")
        assert error.message == "custom_id is 'r-0', as in line 1"
        batch = wait(user, begin(user, lines(1).replace(b"/v1/chat", b"/v1/other")), "completed", "failed")
        assert batch.errors.data[0].line == 1
        batch = wait(user, begin(user, b"\r\n"), "completed", "failed")
        assert batch.errors.data[0].message == f"{batch.input_file_id} holds no requests"
        assert str(tmp_path) not in str(batch.errors)


def test_cancel_keeps_what_is_answered(tmp_path: Path) -> None:
    with live(scripted_model(says("Hello!", delay=0.05), max_num_seqs=4), data_dir=str(tmp_path)) as server:
        user = client(server)
        batch = begin(user, lines(200))
        deadline = time.monotonic() + 60
        while not user.batches.retrieve(batch.id).request_counts.completed:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        batch = wait(user, user.batches.cancel(batch.id), "cancelled")
        answered = user.files.content(batch.output_file_id).text.splitlines()
        assert 0 < len(answered) == batch.request_counts.completed < 200
        with pytest.raises(openai.BadRequestError):
            user.batches.cancel(batch.id)


def test_a_batch_goes_on_after_a_restart(tmp_path: Path) -> None:
    """Every line is answered once, by the first server or by the second."""
    number = itertools.count()

    def eight(request: Request) -> Iterator[Step]:
        return says("one")(request) if next(number) < 8 else says("one", delay=0.03, eos=False)(request)

    first = scripted_model(eight, max_num_seqs=4)
    with live(first, data_dir=str(tmp_path), drain_seconds=0.2) as server:
        user = client(server)
        batch = begin(user, lines(60))
        deadline = time.monotonic() + 60
        while user.batches.retrieve(batch.id).request_counts.completed < 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    with live(scripted_model(says("two")), data_dir=str(tmp_path)) as server:
        user = client(server)
        batch = wait(user, user.batches.retrieve(batch.id), "completed", "failed")
        rows = [json.loads(row) for row in user.files.content(batch.output_file_id).text.splitlines()]
    assert sorted(row["custom_id"] for row in rows) == sorted(f"r-{i}" for i in range(60))
    said = [row["response"]["body"]["choices"][0]["message"]["content"] for row in rows]
    assert set(said) == {"one", "two"}


def test_keys_do_not_see_each_other(tmp_path: Path) -> None:
    with live(data_dir=str(tmp_path), api_keys=("A", "B")) as server:
        one, two = client(server, "A"), client(server, "B")
        batch = wait(one, begin(one, lines(2)), "completed", "failed")
        assert batch.request_counts.completed == 2
        assert list(two.files.list()) == [] == list(two.batches.list())
        for call in (
            lambda: two.files.content(batch.output_file_id),
            lambda: two.files.delete(batch.input_file_id),
            lambda: two.batches.retrieve(batch.id),
            lambda: two.batches.cancel(batch.id),
            lambda: two.batches.create(
                input_file_id=batch.input_file_id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            ),
        ):
            with pytest.raises(openai.NotFoundError):
                call()


def test_refusals(tmp_path: Path) -> None:
    with live() as server:
        status, body, _ = server.request("GET", "/v1/files")
        assert (status, body["error"]["code"]) == (404, "no_data_dir")
    with live(data_dir=str(tmp_path)) as server:
        user = client(server)
        good = upload(user, lines(1)).id
        base = {"input_file_id": good, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        for change, param in (
            ({"endpoint": "/v1/models"}, "endpoint"),
            ({"completion_window": "1h"}, "completion_window"),
            ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
            ({"extra": 1}, "extra"),
        ):
            status, body, _ = server.post("/v1/batches", base | change)
            assert (status, body["error"]["param"]) == (400, param)
        for name in ("file-../../etc/passwd", "x", "file-" + "0" * 24, "%2e%2e%2fbatches"):
            assert server.request("GET", f"/v1/files/{name}/content")[0] == 404
            assert server.post("/v1/batches", base | {"input_file_id": name})[0] in (400, 404)
        with pytest.raises(openai.BadRequestError):
            user.files.create(file=("x", io.BytesIO(b"x")), purpose="fine-tune")
        assert server.request("POST", "/v1/files", b"{}", {"content-type": "application/json"})[0] == 400
        broken = {"content-type": "multipart/form-data; boundary=b"}
        assert server.request("POST", "/v1/files", b"--b\r\nnonsense", broken)[0] == 400
        server.state.batches.files.max_file_bytes = 100  # type: ignore[union-attr]
        with pytest.raises(openai.APIStatusError) as caught:
            upload(user, b"x" * 101)
        assert caught.value.status_code == 413
        assert server.request("GET", "/v1/files?limit=x")[0] == 400
        assert len(list(user.files.list())) == 1
        assert not list(tmp_path.rglob("*.part"))


def test_the_store_is_bounded(tmp_path: Path) -> None:
    from headrace.errors import PayloadTooLarge

    store = FileStore(tmp_path, max_files=2, max_bytes=1000)
    for _ in range(2):
        part = store.new_path()
        part.write_bytes(b"x" * 10)
        store.add(part, "f", "batch", "")
    with pytest.raises(PayloadTooLarge):
        store.room()
    again = FileStore(tmp_path, max_files=3, max_bytes=15)
    assert {one.id for one in again.all("")} == {one.id for one in store.all("")}
    with pytest.raises(PayloadTooLarge):
        again.room()
