"""The command line: what it says, what it refuses, how it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from headrace.cli import options
from headrace.cli.main import COMMANDS, main
from headrace.errors import ConfigError
from support.serving import live, says, scripted_model

HEAVY = ("torch", "aiohttp", "pydantic", "numpy", "rich", "asyncio", "tokenizers", "msgspec")


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["nonsense"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        f"import sys; from headrace.cli.main import main; main({command!r}); "
        f"sys.stderr.write(repr([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.endswith("[]")


@pytest.mark.parametrize(
    "command", [["--help"], ["serve", "--help"], ["models", "--json"], ["init", "--help"]]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_ends_a_command_in_silence(command: list[str], unbuffered: str) -> None:
    """As in ``headrace models | head -1``; here the reader is gone before the first word."""
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(
        [sys.executable, "-m", "headrace", *command],
        stdout=write,
        stderr=subprocess.PIPE,
        env=environment,
        check=False,
    )
    os.close(write)
    assert result.stderr == b""
    assert (
        result.returncode == 141 or unbuffered
    )  # where nothing is buffered, argparse itself overlooks the fault


def test_broken_connections_elsewhere_stay_errors(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str, args: list[str]) -> int:
        raise BrokenPipeError("of a socket")

    monkeypatch.setattr("headrace.cli.main._run", broken)
    with pytest.raises(BrokenPipeError, match="of a socket"):
        main(["models"])


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serv"]) == 2
    assert "'serve'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x", "--max-num-seqs", "0"], "--max-num-seqs is 0"),
        (["x", "--memory-fraction", "1.5"], "--memory-fraction is 1.5"),
        (["x", "y", "--served-model-name", "z"], "NAME=MODEL"),
        (["x", "--api-key", " "], "--api-key is empty"),
        (["x", "--api-key-file", "/nowhere"], "--api-key-file /nowhere"),
        (["a=x", "a=y"], "two models are served as 'a'"),
        (["./no/such/folder", "--port", "0"], "no/such"),
    ],
)
def test_wrong_options_exit_with_2_and_say_what(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_taken_port_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with live() as server:
        assert main(["serve", "x", "--port", str(server.port)]) == 2
    assert "cannot listen" in capsys.readouterr().err


def parse(*arguments: str) -> object:
    import argparse

    from headrace.cli import serve

    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(arguments)


def test_flags_become_specs(tmp_path: Path) -> None:
    args = parse(
        "chat=some/repo",
        str(tmp_path),
        "--dtype",
        "bfloat16",
        "--kv-cache-bytes",
        "1.5Gi",
        "--num-threads",
        "3",
    )
    first, second = options.specs(args, args.models)
    assert (first.model, first.name) == ("some/repo", "chat")
    assert (second.model, second.name) == (str(tmp_path), tmp_path.name)
    assert (first.dtype, first.kv_cache_bytes, first.num_threads) == ("bfloat16", 3 * 2**29, 3)
    assert first.prefix_caching
    args = parse("x", "--served-model-name", "a", "b", "--no-prefix-caching")
    (only,) = options.specs(args, args.models)
    assert only.served_names == ("a", "b")
    assert not only.prefix_caching


def test_keys_come_from_flags_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# comment\none\n\n two \n")
    monkeypatch.setenv("HEADRACE_API_KEYS", "three, one")
    args = parse("x", "--api-key", "zero", "--api-key-file", str(file))
    assert options.api_keys(args) == ("zero", "three", "one", "two")
    file.write_text("\n")
    with pytest.raises(ConfigError, match="holds no key"):
        options.api_keys(args)


def test_chat_answers_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with live(scripted_model(says("Grüße 🎉")), api_keys=("k",)) as server:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        assert main(["chat", "--url", f"{server.url}/v1", "--api-key", "k", "--system", "be brief"]) == 0
        assert capsys.readouterr().out == "Grüße 🎉\n"
        seen = server.state.models.find("m").engine.kit.rendered[-1]["messages"]
        assert [message["role"] for message in seen] == ["system", "user"]
        assert main(["chat", "--url", server.url]) == 2
        assert "401" in capsys.readouterr().err


def test_chat_keeps_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    lines = iter(["one", "/system be kind", "two", "/clear", "three", "/what", "/exit"])
    with live() as server:
        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr("builtins.input", lambda _: next(lines))
        assert main(["chat", "--url", server.url]) == 0
        counts = [len(call["messages"]) for call in server.state.models.find("m").engine.kit.rendered]
    assert counts == [1, 4, 2]
    assert capsys.readouterr().out.count("Hello!") == 3


def test_chat_with_nobody_there_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 2
    assert "headrace serve" in capsys.readouterr().err
    assert main(["chat", "--url", "nonsense"]) == 2


def test_models_lists_what_can_be_served(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    assert main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["packaged"]
    assert "smollm2-135m" in [row["name"] for row in found]
    assert all(row["path"] is None for row in found)
    assert main(["models"]) == 0
    assert "smollm2-135m" in capsys.readouterr().out


SERVER = """
import asyncio, sys
from headrace.serving.server import Server, serve
from headrace.serving.state import ServerOptions
from support.serving import says, scripted_model

def script(request):
    print("asked", flush=True)
    yield from says("0123456789", delay=0.05)(request)

server = Server([scripted_model(script)], ServerOptions(port=0))
asyncio.run(serve(server, lambda s: print(s.url, flush=True), lambda s: print("ready", flush=True)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_with_0(number: int) -> None:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert process.stdout.readline().strip() == "ready"
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}]}).encode()
        replies: list[str] = []

        def ask() -> None:
            request = urllib.request.Request(f"{url}/v1/chat/completions", body)
            replies.append(
                json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["message"]["content"]
            )

        thread = threading.Thread(target=ask)
        thread.start()
        assert process.stdout.readline().strip() == "asked"
        process.send_signal(number)
        assert process.wait(60) == 0
        thread.join(60)
        assert replies == ["0123456789"]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("port", ["99999", "-1", "http"])
def test_a_port_that_cannot_be_is_a_wrong_option(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "minilm", f"--port={port}"])
    assert ended.value.code == 2
    assert "no port from 0 to 65535" in capsys.readouterr().err
