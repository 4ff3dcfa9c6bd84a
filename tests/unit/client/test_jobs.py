"""Batch files: every line answered exactly once, whatever happens; tables and the command line."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.cli import client as command
from headrace.client import InvalidArgument, PerformanceClient
from headrace.client.jobs import BatchCounts, errors_path
from headrace.client.ledger import IdSet, Ledger, scan
from headrace.client.progress import Progress
from headrace.client.tables import open_writer, read_column
from support.scripted_server import Recorded, Reply, ScriptedServer, embeddings


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_input(path: Path, count: int) -> None:
    rows = [
        {
            "custom_id": f"r-{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": [{"role": "user", "content": str(i)}]},
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer(request: Recorded, delay: float = 0.0) -> Reply:
    said = request.json["messages"][0]["content"]
    body = {
        "choices": [{"index": 0, "message": {"content": said}}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    }
    return Reply(json.dumps(body, indent=1).encode(), delay=delay, headers={"x-request-id": f"id-{said}"})


def check_complete(output: Path, count: int) -> None:
    rows = lines(output)
    assert sorted(row["custom_id"] for row in rows) == sorted(f"r-{i}" for i in range(count))
    for row in rows:
        said = row["custom_id"].removeprefix("r-")
        assert row["response"]["status_code"] == 200
        assert row["response"]["request_id"] == f"id-{said}"
        assert row["response"]["body"]["choices"][0]["message"]["content"] == said
        assert row["error"] is None
    assert len({row["id"] for row in rows}) == count


def test_a_whole_job(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 50)
    seen: list[int] = []
    with ScriptedServer(answer) as server:
        counts = PerformanceClient(server.url, "k").run_batch(
            tmp_path / "in.jsonl", tmp_path / "out.jsonl", on_progress=lambda c: seen.append(c.done)
        )
        assert server.requests[0].headers["accept"] == "application/json"
        assert len(server.requests) == 50
        again = PerformanceClient(server.url, "k").run_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
        assert len(server.requests) == 50
    check_complete(tmp_path / "out.jsonl", 50)
    assert seen == list(range(51))
    assert counts == BatchCounts(50, 50, 0, 0, 50, 100)
    assert (again.completed, again.resumed) == (50, 50)


def test_failures_go_to_their_own_file(tmp_path: Path) -> None:
    def some(request: Recorded) -> Reply:
        number = int(request.json["messages"][0]["content"])
        if number % 3 == 0:
            return Reply({"error": {"message": "no"}}, status=400)
        return Reply(b"not json") if number % 3 == 1 else answer(request)

    write_input(tmp_path / "in.jsonl", 9)
    with ScriptedServer(some) as server:
        counts = PerformanceClient(server.url, "k").run_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    failed = {row["custom_id"]: row for row in lines(errors_path(tmp_path / "out.jsonl"))}
    assert (counts.completed, counts.failed) == (3, 6)
    assert set(failed) == {f"r-{i}" for i in (0, 1, 3, 4, 6, 7)}
    assert failed["r-0"]["response"]["status_code"] == 400
    assert failed["r-0"]["response"]["body"] == {"error": {"message": "no"}}
    assert failed["r-0"]["error"]["code"] == "http_error"
    assert failed["r-1"]["response"] is None
    assert failed["r-1"]["error"]["code"] == "bad_reply"


@pytest.mark.parametrize("seed", range(2))
def test_kill_9_and_resume(tmp_path: Path, seed: int) -> None:
    """Killed again and again in the middle: in the end each line has been answered exactly once."""
    rng = random.Random(seed)
    count = 120
    write_input(tmp_path / "in.jsonl", count)
    code = (
        "import sys, headrace.client as h;"
        "h.PerformanceClient(sys.argv[1], 'k').run_batch(sys.argv[2], sys.argv[3],"
        " h.RequestProcessingPreference(max_concurrent_requests=8), adaptive=False)"
    )
    output = tmp_path / "out.jsonl"
    kills = 0
    wanted = 0

    def slowly(request: Recorded) -> Reply:
        """Until so many have come: whoever was to be killed before the end does not reach it."""
        if request.number >= wanted:
            return Reply(fault="silent")
        return answer(request, delay=0.02 + 0.02 * delays.random())

    delays = random.Random(seed)
    with ScriptedServer(slowly) as server:
        for _ in range(30):
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            server.settle()
            wanted = len(server.requests) + rng.randrange(20, 60)
            limit = time.monotonic() + 60
            process = subprocess.Popen(
                [sys.executable, "-c", code, server.url, str(tmp_path / "in.jsonl"), str(output)],
                env=environment,
            )
            while len(server.requests) <= wanted and process.poll() is None:
                assert time.monotonic() < limit, "the server is not asked"
                time.sleep(0.005)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                if rng.random() < 0.5 and output.exists() and output.stat().st_size:
                    with output.open("ab") as torn:  # what a kill inside a write would leave
                        torn.write(b'{"id": "batch_req_1", "custom_id": "r-')
            else:
                assert process.returncode == 0
                break
    assert kills >= 2
    check_complete(output, count)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no requests"),
        ("{nope\n", "line 1"),
        ('{"custom_id": "a", "url": "/x"}\n', "body"),
        ('{"custom_id": "a", "url": "x", "body": {}}\n', "url"),
        ('{"custom_id": "a", "url": "//x", "body": {}}\n', "url"),
        ('{"custom_id": "", "url": "/x", "body": {}}\n', "custom_id"),
        ('{"custom_id": "a", "url": "/x", "method": "GET", "body": {}}\n', "method"),
        (
            '\n{"custom_id": "a", "url": "/x", "body": {}}\n{"custom_id": "a", "url": "/x", "body": {}}\n',
            "line 3: custom_id is 'a', as in line 2",
        ),
        ('{"custom_id": "a", "url": "/y", "body": {}}\n', "/y"),
    ],
)
def test_bad_input_files(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=said):
        scan(path, frozenset({"/x"}))


def test_the_ledger_is_locked_and_repaired(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"custom_id": "a"}\n{"custom_id": "b"}\n{"custom')
    with Ledger(path) as ledger:
        ids = IdSet()
        assert ledger.answered(ids) == 2
        ids.freeze()
        assert "a" in ids and "b" in ids and "c" not in ids
        with pytest.raises(InvalidArgument, match="another process"):
            Ledger(path)
        ledger.write(b'{"custom_id": "c"}\n')
    assert path.read_bytes().count(b"\n") == 3
    path.write_bytes(b"x" * 200_000)
    with Ledger(path):
        assert path.stat().st_size == 0
    path.write_bytes(b"something else\n")
    with Ledger(path) as ledger, pytest.raises(InvalidArgument, match="line 1"):
        ledger.answered(IdSet())


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".txt", ".parquet"])
def test_columns_come_back(tmp_path: Path, ending: str) -> None:
    texts = ["a", 'é, "quoted"', "日本", " b "]
    path = tmp_path / f"in{ending}"
    if ending == ".jsonl":
        path.write_text("".join(json.dumps({"text": t, "n": 1}) + "\n" for t in texts))
    elif ending == ".csv":
        import csv

        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["n", "text"], *([1, t] for t in texts)])
    elif ending == ".txt":
        path.write_text("\n".join(texts) + "\n")
    else:
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(arrow.table({"text": texts}), path)
    assert list(read_column(path, "text")) == texts
    if ending != ".txt":
        with pytest.raises(InvalidArgument, match="missing"):
            list(read_column(path, "missing"))


@pytest.mark.parametrize(
    ("name", "data", "rows"),
    [
        ("a.jsonl", b'\xef\xbb\xbf{"text":"a"}\r\n\r\n  \n"b"', ["a", "b"]),
        ("a.jsonl", b"", []),
        ("a.jsonl", b'"a"\n{"text":\n', "line 2 is not JSON"),
        ("a.jsonl", b'"a"\n"\xff"\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text":"a"}\n{"txt":"b"}\n', "line 2 has no 'text'; it has txt"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.csv", '\ufeffid,text\r\n1,"x\ny ""z"""\r\n2,é\r\n'.encode(), ['x\ny "z"', "é"]),
        ("a.csv", b"text\n", []),
        ("a.csv", b"", "no column 'text'; it has nothing"),
        ("a.csv", b"id,text\n1\n", "line 2 is too short"),
        ("a.csv", "text\nx\n".encode("utf-16"), "not UTF-8"),
        ("a.txt", b"\xef\xbb\xbfone\r\n\nthree", ["one", "", "three"]),
        ("a.txt", b"\xff\n", "not UTF-8"),
        ("a.parquet", b"nope", "not a Parquet file"),
        ("a.tsv", b"text\n", "ends in .jsonl"),
    ],
)
def test_odd_files(tmp_path: Path, name: str, data: bytes, rows: Any) -> None:
    """Marks of byte order, line ends of Windows, blank lines, nothing at all; what is wrong is named."""
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(data)
    if isinstance(rows, list):
        assert list(read_column(path, "text")) == rows
    else:
        with pytest.raises(InvalidArgument, match=rows):
            list(read_column(path, "text"))


@pytest.mark.parametrize("ending", [".npy", ".jsonl", ".parquet"])
def test_vectors_come_back(tmp_path: Path, ending: str) -> None:
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    table = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
    path = tmp_path / f"out{ending}"
    with open_writer(path) as out:
        out.vectors(0, table[:4])
        out.vectors(4, table[4:])
        assert not path.exists()  # whole or absent
    if ending == ".npy":
        found = np.load(path, mmap_mode="r")
    elif ending == ".jsonl":
        found = np.array([row["embedding"] for row in lines(path)], np.float32)
    else:
        from pyarrow import parquet

        found = np.array(parquet.read_table(path)["embedding"].to_pylist(), np.float32)
    assert np.array_equal(found, table)
    with pytest.raises(OSError), open_writer(path):
        scan(tmp_path / "no-such-file")
    assert not list(tmp_path.glob("*.part"))
    assert path.exists()


def test_progress_tells_rate_and_time_left() -> None:
    bar = Progress("embed", 1000, begun_with=200, show=False)
    bar.add(300)
    line = bar.line(bar._begun + 3.0)
    assert line == "embed  50% [##########----------]  500/1,000  100.0/s  0:00:05 left"
    assert Progress("x", None, show=False).line(time.monotonic()).startswith("x  0")


def run_command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    code: int = command.run(parser.parse_args(words))
    return code


def test_the_commands(tmp_path: Path) -> None:
    def every(request: Recorded) -> Reply:
        if request.path == "/v1/embeddings":
            return embeddings(request)
        if request.path == "/rerank":
            return Reply([{"index": i, "score": len(t)} for i, t in enumerate(request.json["texts"])])
        if request.path == "/predict":
            return Reply([[{"label": t, "score": 1}] for (t,) in request.json["inputs"]])
        return answer(request)

    texts = ["a", "bbb", "cc"]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(t) + "\n" for t in texts))
    write_input(tmp_path / "batch.jsonl", 5)
    with ScriptedServer(every) as server:
        to = ("--base-url", server.url + "/v1", "--api-key", "K")
        assert run_command("embed", str(source), "-o", str(tmp_path / "v.npy"), "--model", "m", *to) == 0
        assert server.requests[0].headers["authorization"] == "Bearer K"
        assert server.requests[0].json["encoding_format"] == "base64"
        out = tmp_path / "out.jsonl"
        assert run_command("rerank", str(source), "-o", str(out), "--query", "q", *to) == 0
        assert [row["text"] for row in lines(out)] == ["bbb", "cc", "a"]
        assert run_command("classify", str(source), "-o", str(out), *to) == 0
        assert [row["labels"][0]["label"] for row in lines(out)] == texts
        assert run_command("chat", str(source), "-o", str(out), "--model", "m", "--set", "seed=1", *to) == 0
        assert [row["text"] for row in lines(out)] == texts
        assert server.requests[-1].json["seed"] == 1
        done = tmp_path / "done.jsonl"
        assert run_command("batch", str(tmp_path / "batch.jsonl"), "-o", str(done), *to) == 0
        check_complete(done, 5)
        with pytest.raises(InvalidArgument, match="No such file"):
            run_command("embed", "absent.jsonl", "-o", str(tmp_path / "v.npy"), "--model", "m", *to)
        sent = len(server.requests)
        for words, said in (
            (("embed", str(source), "-o", str(source), "--model", "m"), "input too"),
            (("rerank", str(source), "-o", str(tmp_path / "x.npy"), "--query", "q"), "ends in .jsonl"),
            (("classify", str(tmp_path / "batch.jsonl"), "-o", str(out)), "no 'text'"),
            (("chat", str(source), "-o", str(out), "--model", "m", "--set", "=1"), "NAME=VALUE"),
        ):
            with pytest.raises(InvalidArgument, match=said):
                run_command(*words, *to)
        source.write_text('"good"\n[{"role": "user", "content": "x"}]\n5\n')
        with pytest.raises(InvalidArgument, match="row 1 is list"):
            run_command("embed", str(source), "-o", str(out), "--model", "m", *to)
        with pytest.raises(InvalidArgument, match="request 2 is int"):
            run_command("chat", str(source), "-o", str(out), "--model", "m", *to)
        assert len(server.requests) == sent  # the whole input is read before anything is sent
        source.write_text("".join(json.dumps(t) + "\n" for t in texts))
    assert np.load(tmp_path / "v.npy")[:, 0].tolist() == [1, 3, 2]
    with ScriptedServer(lambda request: Reply({"error": "no"}, status=400)) as server:
        to = ("--base-url", server.url, "--api-key", "K")
        assert run_command("embed", str(source), "-o", str(tmp_path / "w.npy"), "--model", "m", *to) == 1
        assert not (tmp_path / "w.npy").exists()
        assert run_command("chat", str(source), "-o", str(out), "--model", "m", *to) == 3
        assert all("400" in row["error"] for row in lines(out))
