"""Start-up: from the start of `headrace serve`'s process to its first answer over HTTP, broken down by part.

    python -m benchmarks.startup --models qwen3-0.6b qwen3-8b bge-large --record
    python -m benchmarks.startup --models smollm2-135m minilm                     # packaged models, on CPUs too

Each measurement is a server of its own. Kernels: ``warm`` is a cache that has them all; ``cold`` an empty one, as on a
new machine (--cold). Weights of generators: made on the device, so that nothing is read (the goals' case), or with
--weights file read from a file whose pages are all holes, which is the page cache's rate; those of encoders are always
read. The vocabulary has its real size and is made up. ``parts`` are the core's own account, which the server also logs;
``ready`` is when /ready said 200, ``value`` when the first answer (one token, or one vector) was there. ``late`` are
milliseconds of 50 requests right after, one by one, of different kinds: nothing may compile in them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.common import SHAPES, Recorder, arguments, model_config

_DEADLINE = 300.0


def write_folder(folder: Path, name: str) -> None:
    """A checkpoint of this shape; a generator's weights are holes."""
    from benchmarks.made_up_bpe import END, made_up_bpe
    from headrace.config.plan.facts import Facts
    from headrace.config.plan.shape import read_shape
    from headrace.config.plan.weights import expected_tensors

    config = {"model_type": "qwen3", **model_config(name)}
    if config["model_type"] == "bert" or "Embedding" in name or "embedding" in name:
        from benchmarks.encode_http import write_checkpoint

        write_checkpoint(folder, name)
        return
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    (folder / "tokenizer.json").write_text(made_up_bpe(config["vocab_size"]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    header, at = {}, 0
    shape = read_shape(Facts(where="", config=config, container="config"))
    for key, tensor in expected_tensors(shape, 2).items():
        size = tensor.nbytes
        header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


class Server:
    """`headrace serve` of one folder, from its first moment to its first answer."""

    def __init__(self, folder: Path | str, cache: Path | None, made_up: bool, extra: list[str]) -> None:
        self.began = time.time()
        command = [sys.executable, "-m", "benchmarks.startup_server", *(["--made-up"] if made_up else [])]
        more = {} if cache is None else {"TRITON_CACHE_DIR": str(cache)}
        self.process = subprocess.Popen(
            [*command, "serve", f"m={folder}", "--port", "0", *extra],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **more, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.lines: list[str] = []
        self.parts: dict[str, float] = {}
        self.url = ""
        self.kernels = 0
        self.encodes = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"headrace \S+ on (http://\S+)", line):
                self.url = found[1]
            elif found := re.search(r"compiling (\d+) kernels", line):
                self.kernels = int(found[1])
            elif '"model ready"' in line:
                record = json.loads(line)
                self.encodes, self.parts = "tasks" in record, record["start"]

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """The answer, or None while the server cannot give one."""
        data = None if body is None else json.dumps({"model": "m", **body}).encode()
        ask = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(ask, timeout=120) as reply:
                return json.load(reply) if path != "/ready" else {}
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise RuntimeError(error.read().decode()) from error
        except OSError:
            pass
        return None

    def until(self, path: str, body: dict[str, Any] | None = None) -> float:
        """Seconds from the process's start to the first answer."""
        while time.time() < self.began + _DEADLINE and self.process.poll() is None:
            if self.url and self.ask(path, body) is not None:
                return time.time() - self.began
            time.sleep(0.01)
        raise RuntimeError("the server gave no answer:\n" + "".join(self.lines[-30:]))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def requests(encodes: bool, vocab: int) -> list[tuple[str, dict[str, Any]]]:
    """Fifty of different kinds."""
    draw = random.Random(1)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 1}, {"temperature": 0.7, "top_p": 0.9, "top_k": 40},
        {"temperature": 0, "logprobs": 3}, {"temperature": 1, "frequency_penalty": 0.5},
    ]  # fmt: skip
    found: list[tuple[str, dict[str, Any]]] = []
    for i in range(50):
        length = draw.choice((1, 7, 30, 90, 250, 480))
        if encodes:
            found.append(
                ("/v1/embeddings", {"input": " ".join(draw.choices(("kana", "lona", "mina"), k=length))})
            )
        else:
            ids = [draw.randrange(vocab - 300) + 256 for _ in range(length)]
            found.append(
                (
                    "/v1/completions",
                    {"prompt": ids, "max_tokens": 8, "ignore_eos": True, **kinds[i % len(kinds)]},
                )
            )
    return found


def measure(name: str, folder: Path, cache: Path | None, args: Any) -> dict[str, Any]:
    """One start."""
    known = name in SHAPES
    encodes = known and (SHAPES[name].get("model_type") == "bert" or "embedding" in name)
    made_up = known and args.weights == "device" and not encodes
    server = Server(folder if known else name, cache, made_up, args.serve or [])
    try:
        ready = server.until("/ready")
        while not server.parts:
            time.sleep(0.001)  # its log is on the way
        first = {"prompt": [300, 301, 302], "max_tokens": 1, "temperature": 0}
        path, body = ("/v1/embeddings", {"input": "kana"}) if server.encodes else ("/v1/completions", first)
        value = server.until(path, body)
        found = {"value": value, "ready": round(ready, 2), "parts": server.parts, "compiled": server.kernels}
        found["weights"] = "made on the device" if made_up else "read"
        if args.late:
            work = requests(server.encodes, SHAPES[name]["vocab_size"] if known else 3000)
            found["late"] = {**milliseconds(server, work, ""), **milliseconds(server, work, "later_")}
    finally:
        server.close()
    return found


def milliseconds(server: Server, work: list[tuple[str, dict[str, Any]]], name: str) -> dict[str, float]:
    """Of these requests one after another."""
    found = []
    for path, body in work:
        began = time.perf_counter()
        server.ask(path, body)
        found.append((time.perf_counter() - began) * 1e3)
    return {f"{name}median": round(statistics.median(found), 1), f"{name}worst": round(max(found), 1)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["qwen3-0.6b"])
    parser.add_argument("--weights", choices=("device", "file"), default="device")
    parser.add_argument("--cold", action="store_true", help="also with an empty cache of kernels")
    parser.add_argument("--starts", type=int, default=2, help="warm ones; the first one may compile")
    parser.add_argument(
        "--late", action=argparse.BooleanOptionalAction, default=True, help="also time the first requests"
    )
    parser.add_argument("--folder", type=Path, help="where checkpoints are written and kept")
    parser.add_argument(
        "--serve", nargs="+", help="more flags for headrace serve, each as one word: --flag=value"
    )
    args = parser.parse_args()
    rows: list[tuple[str, str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.models:
            folder = (args.folder or Path(scratch)) / name
            if name in SHAPES and not (folder / "config.json").is_file():
                folder.mkdir(parents=True, exist_ok=True)
                write_folder(folder, name)
            if args.cold:
                empty = Path(scratch) / f"kernels-{name}"
                rows.append((name, "cold kernels", measure(name, folder, empty, args)))
                print(rows[-1], file=sys.stderr, flush=True)
                rows.append((name, "warm kernels", measure(name, folder, empty, args)))
                print(rows[-1], file=sys.stderr, flush=True)
                shutil.rmtree(empty, ignore_errors=True)
            for _ in range(args.starts):
                rows.append((name, "warm kernels", measure(name, folder, None, args)))
                print(rows[-1], file=sys.stderr, flush=True)
    recorder = Recorder("startup", args)  # imports torch: after the measurements
    for name, case, found in rows:
        recorder.row(model=name, precision="auto", case=case, metric="first_answer_s", **found)


if __name__ == "__main__":
    main()
