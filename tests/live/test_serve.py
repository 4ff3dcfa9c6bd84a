"""`headrace serve` as users run it: a process with real models, or with a tiny one of random weights."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest

from support.tiny_folder import write_llama
from support.tiny_text import CORPUS


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """The URL of a server started with these arguments; ends it with SIGTERM and checks that it ends well."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", "serve", *arguments, "--port", "0", "--num-threads", "1"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "HEADRACE_LOG": "warning"},
    )
    assert process.stdout is not None
    try:
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("ready: "):
                break
        assert "ready: " in said, said
        yield said.split("ready: ")[1].split("/v1")[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.mark.models
def test_packaged_models_side_by_side(smollm2_path: Path, minilm_path: Path) -> None:
    with served("smollm2-135m", "minilm", "--kv-cache-bytes", "64M") as url:
        client = client_of(url)
        ask: Any = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
        whole = client.chat.completions.create(
            model="smollm2-135m", messages=ask, max_tokens=16, temperature=0
        )
        assert "Paris" in whole.choices[0].message.content
        parts = client.chat.completions.create(
            model="smollm2-135m", messages=ask, max_tokens=16, temperature=0, stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in parts)
        assert text == whole.choices[0].message.content
        again = client.chat.completions.create(
            model="smollm2-135m", messages=ask, max_tokens=16, temperature=0
        )
        assert again.usage.prompt_tokens_details.cached_tokens > 0
        seeded = [
            client.completions.create(model="smollm2-135m", prompt="Once", seed=3, n=2, max_tokens=8)
            for _ in range(2)
        ]
        assert [c.text for c in seeded[0].choices] == [c.text for c in seeded[1].choices]
        assert seeded[0].choices[0].text != seeded[0].choices[1].text
        vectors = client.embeddings.create(model="minilm", input=["a cat", "a kitten", "the stock market"])
        a, b, c = (item.embedding for item in vectors.data)
        assert len(a) == 384
        assert sum(x * y for x, y in zip(a, b)) > sum(x * y for x, y in zip(a, c)) + 0.2
        with pytest.raises(openai.BadRequestError, match="dimensions"):
            client.embeddings.create(model="minilm", input="a", dimensions=9999)


def tiny_model(folder: Path) -> Path:
    """A Llama of random weights with a byte-level tokenizer and a chat template beside it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    write_llama(folder)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    )
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}assistant: "
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def metric(url: str, name: str) -> float:
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{"))


def until_none(url: str, *names: str) -> None:
    deadline = time.monotonic() + 60
    while any(metric(url, name) for name in names):
        assert time.monotonic() < deadline, f"still there: {[(name, metric(url, name)) for name in names]}"
        time.sleep(0.1)


def test_random_disconnects_leave_no_block_behind(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tiny")
    rng = random.Random(5)
    with served(f"t={folder}", "--kv-cache-bytes", "4M", "--max-num-seqs", "8", "--max-queue", "64") as url:
        host, port = url.removeprefix("http://").split(":")

        def bother(count: int, seed: int) -> None:
            own = random.Random(seed)
            for _ in range(count):
                body = {
                    "model": "t",
                    "messages": [{"role": "user", "content": "x" * own.randint(1, 60)}],
                    "max_tokens": own.randint(1, 60),
                    "stream": own.random() < 0.5,
                    "n": own.choice([1, 1, 3]),
                    "ignore_eos": True,
                }
                data = json.dumps(body).encode()
                timeout = "Request-Timeout-Ms: 20\r\n" if own.random() < 0.3 else ""
                head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{timeout}Content-Length: {len(data)}\r\n\r\n"
                with socket.create_connection((host, int(port)), timeout=30) as sock:
                    sock.sendall(head.encode() + data[: own.choice([len(data)] * 9 + [5])])
                    time.sleep(own.random() * 0.05)
                    if own.random() < 0.3:
                        sock.settimeout(0.05)
                        with suppress(TimeoutError):
                            sock.recv(500)

        threads = [threading.Thread(target=bother, args=(25, rng.random())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until_none(url, "headrace_requests_in_flight", "headrace_engine_running")
        reply = client_of(url).chat.completions.create(
            model="t", messages=[{"role": "user", "content": "still there?"}], max_tokens=5
        )
        assert reply.usage.completion_tokens <= 5
        time.sleep(1.2)  # a heartbeat, so that the core's counters are new
        until_none(url, "headrace_kv_blocks_used", "headrace_engine_running")
        assert urllib.request.urlopen(f"{url}/health", timeout=10).status == 200
