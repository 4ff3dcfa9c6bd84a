"""Embeddings counted at the client: our server, our bulk client, random weights of a real shape on this machine.

    python -m benchmarks.encode_http --shapes bge-large qwen3-embedding-0.6b --record

A checkpoint folder with random weights and a small trained tokenizer is written, and served by `headrace serve` as a
user would. Every text has about 400 tokens. ``engine_embeddings_s`` is the loop alone over the same token ids, in a
process of its own before the server starts; ``start_s`` runs from the start of the server's process to the first
embedding over HTTP (of the first start of this run, which may compile kernels, and of the next one). A case is items a
request x requests in flight. The client has processes of its own, so that parsing numbers is not what is measured.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.common import Recorder, arguments, model_config

WORDS = [
    a + b + c
    for a in ("ka", "lo", "mi", "tu", "re", "so")
    for b in ("n", "r", "st", "l")
    for c in ("a", "e", "o")
]
CASES = ["16x64", "16x256", "1x256"]
LATENCY_TOKENS = 16


def texts_of(count: int, tokens: int, seed: int) -> list[str]:
    """Texts of so many words, each of them one token."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=tokens)) for _ in range(count)]


def write_tokenizer(folder: Path) -> None:
    """A WordPiece vocabulary that knows the words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = sorted(set("".join(WORDS)))
    pieces = [*special, *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    backend.save(str(folder / "tokenizer.json"))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "tokenizer_class": "BertTokenizer"}))


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint's tensors."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, inputs: int, bias: bool) -> None:
        found[f"{name}.weight"] = (out, inputs)
        if bias:
            found[f"{name}.bias"] = (out,)

    if config.get("model_type") == "bert":
        tables = {
            "word": "vocab_size",
            "position": "max_position_embeddings",
            "token_type": "type_vocab_size",
        }
        found |= {
            f"embeddings.{name}_embeddings.weight": (config[size], hidden) for name, size in tables.items()
        }
        norms = ["embeddings.LayerNorm"]
        for i in range(config["num_hidden_layers"]):
            layer = f"encoder.layer.{i}."
            for name in (
                "attention.self.query",
                "attention.self.key",
                "attention.self.value",
                "attention.output.dense",
            ):
                linear(layer + name, hidden, hidden, True)
            linear(layer + "intermediate.dense", inner, hidden, True)
            linear(layer + "output.dense", hidden, inner, True)
            norms += [f"{layer}{name}.LayerNorm" for name in ("attention.output", "output")]
        return found | {f"{name}.{leaf}": (hidden,) for name in norms for leaf in ("weight", "bias")}
    size = config["head_dim"]
    heads = {
        "q": config["num_attention_heads"],
        "k": config["num_key_value_heads"],
        "v": config["num_key_value_heads"],
    }
    found |= {"embed_tokens.weight": (config["vocab_size"], hidden), "norm.weight": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"layers.{i}."
        for name, count in heads.items():
            linear(f"{layer}self_attn.{name}_proj", count * size, hidden, False)
        linear(f"{layer}self_attn.o_proj", hidden, heads["q"] * size, False)
        for name in ("gate", "up"):
            linear(f"{layer}mlp.{name}_proj", inner, hidden, False)
        linear(f"{layer}mlp.down_proj", hidden, inner, False)
        found |= {f"{layer}self_attn.{name}_norm.weight": (size,) for name in ("q", "k")}
        found |= {f"{layer}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return found


def write_checkpoint(folder: Path, name: str) -> None:
    """Random weights under the names of the published checkpoint, with its pooling."""
    import torch
    from safetensors.torch import save_file

    config = model_config(name)
    bert = config.get("model_type") == "bert"
    config = {"model_type": "qwen3", **config, "pad_token_id": 0}
    dtype = torch.float16 if bert else torch.bfloat16
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = {}
    for key, shape in shapes_of(config).items():
        center = 1.0 if len(shape) == 1 and key.endswith("weight") else 0.0
        tensors[key] = torch.empty(shape, device=device).normal_(center, 0.02).to(dtype).cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    names = ("Transformer", "Pooling", "Normalize")
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{word}"}
        for i, (word, path) in enumerate(zip(names, paths))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {
        "word_embedding_dimension": config["hidden_size"],
        "pooling_mode": "cls" if bert else "lasttoken",
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    write_tokenizer(folder)


def engine_rate(folder: str, name: str, count: int, tokens: int, queue: Any) -> None:
    """Of the encode loop alone over the texts' token ids; best of three runs."""
    import torch

    from benchmarks.encode_random import Case
    from headrace.checkpoints.resolve import open_checkpoint
    from headrace.config.spec import EngineSpec
    from headrace.engines.encode_build import build_encode

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.float32 if not cuda else torch.float16 if name.startswith("bge") else torch.bfloat16
    spec = EngineSpec(model=folder, path=Path(folder))
    core, _ = build_encode(spec, open_checkpoint(Path(folder)), device, dtype)
    say("its model is there")
    case = Case(core, [tokens + 2] * count)
    case.seconds()
    queue.put(count / min(case.seconds() for _ in range(3)))


class Server:
    """`headrace serve` of one folder."""

    def __init__(self, folder: Path, extra: list[str]) -> None:
        began = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "headrace.cli.main",
            "serve",
            f"m={folder}",
            "--port",
            "0",
            "--max-queue",
            "16384",
        ]
        self.process = subprocess.Popen(
            [*command, *extra],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stdout is not None
        found = None
        for line in self.process.stdout:
            found = re.search(r"on (http://\S+)", line)
            if found:
                break
        if found is None:
            raise RuntimeError(f"the server ended with {self.process.wait()}")
        self.url = found[1]
        self._first(began + 180)
        self.start_seconds = time.perf_counter() - began

    def _first(self, deadline: float) -> None:
        body = json.dumps({"model": "m", "input": WORDS[0]}).encode()
        ask = urllib.request.Request(f"{self.url}/v1/embeddings", body, {"Content-Type": "application/json"})
        while time.perf_counter() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(ask, timeout=60) as reply:
                    assert len(json.load(reply)["data"][0]["embedding"]) > 1
                    return
            except (urllib.error.HTTPError, OSError):
                time.sleep(0.02)
        raise RuntimeError("the server gave no embedding")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def drive(url: str, count: int, tokens: int, batch: int, at_once: int, processes: int, queue: Any) -> None:
    """The client's side: seconds for all texts, best of two."""
    from headrace.client import PerformanceClient, RequestProcessingPreference

    client = PerformanceClient(url, api_key="none", processes=processes)
    how = RequestProcessingPreference(
        max_concurrent_requests=at_once, batch_size=batch, max_chars_per_request=1_000_000, max_retries=0
    )
    client.embed(texts_of(max(64, count // 8), tokens, 1), "m", preference=how)
    texts = texts_of(count, tokens, 2)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        response = client.embed(texts, "m", preference=how)
        seconds.append(time.perf_counter() - began)
        assert len(response.data) == count
    queue.put(min(seconds))


def latency(url: str, tokens: int, count: int = 300) -> float:
    """Seconds of one text alone, from the request's first byte to the reply's last; the median."""
    host = url.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(host, timeout=60)
    times = []
    for text in texts_of(count, tokens - 2, 3):
        body = json.dumps({"model": "m", "input": text})
        began = time.perf_counter()
        connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        data = reply.read()
        times.append(time.perf_counter() - began)
        assert reply.status == 200, data
    connection.close()
    return statistics.median(times)


def in_process(work: Any, *args: Any) -> Any:
    """What it puts into a queue."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(*args, queue))
    process.start()
    while process.is_alive() and queue.empty():
        time.sleep(0.05)
    if queue.empty():
        raise RuntimeError(f"{work.__name__} failed")
    result = queue.get()
    process.join()
    return result


def say(text: str) -> None:
    """How far it is, for whoever waits."""
    print(f"{time.strftime('%X')} {text}", file=sys.stderr, flush=True)


def measure(record: Recorder, name: str, folder: Path, args: Any) -> None:
    say(f"writing {name}")
    write_checkpoint(folder, name)
    common: dict[str, Any] = {"model": name, "precision": args.precision}
    engine = args.engine_rate
    if engine is None:
        say("the loop alone")
        engine = in_process(engine_rate, str(folder), name, args.texts, args.tokens)
        record.row(
            **common, case=f"{args.texts}x{args.tokens + 2}", metric="engine_embeddings_s", value=engine
        )
    for start in range(args.starts):
        say("starting the server")
        server = Server(folder, args.serve or [])
        record.row(**common, case=f"start {start + 1}", metric="start_s", value=server.start_seconds)
        if start + 1 < args.starts:
            server.close()
    try:
        record.row(
            **common, case=f"1x{LATENCY_TOKENS}", metric="latency_ms",
            value=latency(server.url, LATENCY_TOKENS) * 1e3,
        )  # fmt: skip
        for case in args.cases:
            batch, at_once = map(int, case.split("x"))
            say(f"{batch} texts a request, {at_once} requests in flight")
            seconds = in_process(
                drive, server.url, args.texts, args.tokens, batch, at_once, args.client_processes
            )
            rate = args.texts / seconds
            record.row(
                **common, case=case, metric="client_embeddings_s", value=rate, floor=engine,
                of_engine=round(rate / engine, 3), tokens=args.tokens + 2,
            )  # fmt: skip
    finally:
        server.close()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["bge-large", "qwen3-embedding-0.6b"])
    parser.add_argument("--texts", type=int, default=4096)
    parser.add_argument(
        "--tokens", type=int, default=398, help="words of a text; two special tokens are added"
    )
    parser.add_argument(
        "--engine-rate", type=float, help="embeddings a second of the loop alone, measured before"
    )
    parser.add_argument("--starts", type=int, default=2, help="of the server; the first may compile kernels")
    parser.add_argument("--cases", nargs="+", default=CASES, help="texts a request x requests in flight")
    parser.add_argument("--client-processes", type=int, default=4)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, help="more flags for headrace serve (last)")
    args = parser.parse_args()
    record = Recorder("encode_http", args)
    args.precision = "float32" if record.common["device"] == "cpu" else "float16 or bfloat16"
    for name in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            measure(record, name, Path(folder), args)


if __name__ == "__main__":
    main()
