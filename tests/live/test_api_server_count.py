"""`headrace serve --api-server-count 2`: two HTTP processes, one port, one core for each model."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from support.process import ServeProcess, serving
from support.tiny_folder import write_llama, write_tokenizer

pytestmark = pytest.mark.models
SEQS, QUEUE = 4, 3


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServeProcess]:
    """A model that generates and one that embeds, with room for seven sequences of each."""
    folder = write_tokenizer(write_llama(tmp_path, max_position_embeddings=8192))
    limits = ("--max-num-seqs", str(SEQS), "--max-queue", str(QUEUE), "--num-threads", "1")
    models = (f"tiny={folder}", "minilm")
    with serving(*models, "--api-server-count", "2", "--drain-seconds", "20", *limits) as process:
        yield process


class Client:
    """One connection, which stays with the process that accepted it."""

    def __init__(self, server: ServeProcess) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=60)

    def json(self, method: str, path: str, body: object = None) -> tuple[int, dict[str, object]]:
        self.connection.request(method, path, None if body is None else json.dumps(body))
        reply = self.connection.getresponse()
        return reply.status, json.loads(reply.read())

    def text(self, path: str) -> str:
        self.connection.request("GET", path)
        return self.connection.getresponse().read().decode()

    def begin(self, max_tokens: int = 8000) -> None:
        """Ask for a long generation."""
        ask = {"model": "tiny", "prompt": "x", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        self.connection.request("POST", "/v1/completions", json.dumps(ask))

    def stream(self, max_tokens: int = 8000) -> http.client.HTTPResponse:
        """One that runs: its first event was read."""
        self.begin(max_tokens)
        reply = self.connection.getresponse()
        assert reply.status == 200
        assert reply.readline().startswith(b"data:")
        return reply


def port_of(server: ServeProcess) -> int:
    return int(server.url.rsplit(":", 1)[1])


def children(server: ServeProcess, program: str) -> list[int]:
    """Ids of those that run this program; some may end meanwhile."""
    pid = server.process.pid
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):
            if program in Path(f"/proc/{child}/cmdline").read_text():
                found.append(int(child))
    return found


def further(server: ServeProcess) -> list[int]:
    """Ids of the HTTP processes beside the first."""
    return children(server, "front_process")


def sockets_of(pid: int) -> set[str]:
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(os.readlink(entry))
        except FileNotFoundError:
            continue
    return {name[8:-1] for name in found if name.startswith("socket:[")}


def listeners(port: int) -> set[str]:
    """Inodes of the sockets that listen on a port."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {row[9] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}


def listener(port: int, pid: int) -> str:
    """Of one process. It outlives the first thread of a killed process, which is then a zombie already."""
    (inode,) = listeners(port) & sockets_of(pid)
    return inode


def holder(client: Client, pids: list[int]) -> int:
    """Which process accepted this connection."""
    remote = client.connection.sock.getsockname()[1]
    for row in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = row.split()
        local, peer, inode = fields[1], fields[2], fields[9]
        if int(peer.split(":")[1], 16) == remote and int(local.split(":")[1], 16) == client.connection.port:
            return next(pid for pid in pids if inode in sockets_of(pid))
    raise AssertionError("no such connection")


def until(check: Callable[[], bool], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.1)


def on_each(server: ServeProcess) -> tuple[Client, Client]:
    """A connection to the first process, and one to the other."""
    first, (other,) = server.process.pid, further(server)
    until(lambda: bool(listeners(port_of(server)) & sockets_of(other)))  # a new one may still start
    found: dict[int, Client] = {}
    for _ in range(64):  # the kernel deals them out by a hash of the client's port
        client = Client(server)
        assert client.json("GET", "/ready")[0] == 200
        found.setdefault(holder(client, [first, other]), client)
        if len(found) == 2:
            return found[first], found[other]
    raise AssertionError("one process gets all connections")


def test_counts_limits_responses_and_cancellation_are_one_servers(server: ServeProcess) -> None:
    first, other = on_each(server)
    for client in (first, other):
        status, reply = client.json("POST", "/v1/embeddings", {"model": "minilm", "input": ["a", "b"]})
        assert (status, len(reply["data"])) == (200, 2)  # type: ignore[arg-type]
        status, reply = client.json(
            "POST", "/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 3, "ignore_eos": True}
        )
        assert (status, reply["usage"]["completion_tokens"]) == (200, 3)  # type: ignore[index]
    rows = (
        r'^headrace_requests_total\{model="minilm",outcome="stop"\} 2\.0$',
        r'^headrace_output_tokens_total\{model="tiny"\} 6\.0$',
        r'route="/v1/embeddings",status="200"\} 2\.0$',
    )
    for client in (first, other):  # an answer is counted when it is sent, perhaps after it is read here
        until(lambda: all(re.search(row, client.text("/metrics"), re.M) for row in rows))  # noqa: B023

    status, reply = other.json(
        "POST", "/v1/responses", {"model": "tiny", "input": "x", "max_output_tokens": 4, "temperature": 0}
    )
    assert status == 200
    for client in (first, other):
        assert client.json("GET", f"/v1/responses/{reply['id']}") == (200, reply)
    ask = {"model": "tiny", "input": "x", "max_output_tokens": 4, "temperature": 0, "stream": True}
    other.connection.request("POST", "/v1/responses", json.dumps(ask))
    told = other.connection.getresponse()
    assert told.headers.get_content_type() == "text/event-stream"
    assert b"event: response.created" in (events := told.read())
    assert events.count(b"response.output_text.delta") >= 1
    other.connection.request("GET", "/v1/responses/none", headers={"X-Request-Id": "mine"})
    missing = other.connection.getresponse()
    assert (missing.status, missing.headers.get_all("X-Request-Id")) == (404, ["mine"])
    missing.read()

    streams = [Client(server) for _ in range(24)]
    for stream in streams:
        stream.begin()
    refused = 24 - SEQS - QUEUE  # whoever accepted them
    until(lambda: server.metric("headrace_rejected_requests_total", "tiny") >= refused)
    assert server.metric("headrace_rejected_requests_total", "tiny") == refused
    assert server.metric("headrace_requests_in_flight", "tiny") == SEQS + QUEUE
    for stream in streams:
        stream.connection.close()
    until(lambda: server.metric("headrace_engine_running", "tiny") == 0)
    until(lambda: server.metric("headrace_requests_in_flight", "tiny") == 0)
    Client(server).stream(1)


def test_a_dead_engine_is_told_by_both(server: ServeProcess) -> None:
    pair = on_each(server)
    cores = children(server, "core_process")
    os.kill(cores[0], signal.SIGKILL)
    for client in pair:
        until(lambda: client.json("GET", "/health")[0] == 503)  # noqa: B023
    asks: list[tuple[str, dict[str, object]]] = [
        ("/v1/embeddings", {"model": "minilm", "input": "a"}),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 2}),
    ]
    for client in pair:  # one engine is gone, the other goes on
        assert sorted(client.json("POST", path, body)[0] for path, body in asks) == [200, 503]
    os.kill(cores[1], signal.SIGKILL)
    assert server.process.wait(90) == 1


def test_a_killed_process_takes_only_its_own_requests_and_is_replaced(server: ServeProcess) -> None:
    first, other = on_each(server)
    killed = further(server)[0]
    theirs, ours = other.stream(), first.stream(4000)
    time.sleep(1.2)  # everybody's counts are kept once a second
    before = server.metric("headrace_rejected_requests_total", "tiny")
    listening = listener(port_of(server), killed)
    os.kill(killed, signal.SIGKILL)
    until(lambda: listening not in listeners(port_of(server)))  # until then the kernel gives it connections
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        theirs.read()
    until(lambda: server.metric("headrace_engine_running", "tiny") <= 1)
    assert ours.read().endswith(b"data: [DONE]\n\n")
    until(lambda: bool(further(server)) and further(server) != [killed])
    first, other = on_each(server)
    for client in (first, other):
        assert client.json("POST", "/v1/embeddings", {"model": "minilm", "input": "a"})[0] == 200
    held = [Client(server) for _ in range(SEQS + QUEUE)]
    for client in held:
        client.begin()
    until(lambda: server.metric("headrace_requests_in_flight", "tiny") == SEQS + QUEUE)
    assert server.metric("headrace_rejected_requests_total", "tiny") == before  # the dead one holds no place


def test_the_end_drains_both_and_a_stranger_cannot_share_the_port(server: ServeProcess) -> None:
    command = [sys.executable, "-m", "headrace.cli.main", "serve", "minilm", "--api-server-count", "2"]
    second = subprocess.run(
        [*command, "--port", str(port_of(server))], capture_output=True, text=True, timeout=120, check=False
    )
    assert second.returncode == 2 and "cannot listen" in second.stderr
    first, other = on_each(server)
    streams = [first.stream(300), other.stream(300)]
    pids = further(server)
    assert server.terminate() == 0
    assert [stream.read().endswith(b"data: [DONE]\n\n") for stream in streams] == [True, True]
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_all_end_with_the_first(server: ServeProcess) -> None:
    pid = server.process.pid
    family = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(family) == 3  # two cores and one HTTP process
    server.process.kill()
    server.process.wait()
    until(lambda: not any(alive(child) for child in family))
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{server.url}/health", timeout=5)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
