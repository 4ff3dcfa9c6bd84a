"""Embeddings from text on a CPU, the packaged MiniLM: ours beside sentence-transformers in the same run.

    python -m benchmarks.encode --threads 2 --record

All get the same texts and give unit vectors; runs alternate and the best of each counts, so that other load on
the machine hurts all alike. `--peers PYTHON --onnx FOLDER` adds fastembed and infinity-emb from a Python that has
them (benchmarks/encode_peer.py); FOLDER holds the checkpoint as model.onnx with its tokenizer, which
`optimum-cli export onnx --task feature-extraction` makes of ours: no registry offers one. `latency_ms` is one short
text alone, the median. The floor is the time of the linear maps alone, at the rate of one large product in the same
precision on this machine.

With --shapes: the rate of the loop itself on a GPU, see encode_random.py.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import encode_random
from benchmarks.common import Recorder, arguments
from headrace.checkpoints.resolve import open_checkpoint, resolve
from headrace.config.spec import EngineSpec
from headrace.engines.encode_build import build_encode
from headrace.kernels.dense import dense, pack
from headrace.text.encoding import EncodeText, Truncate
from headrace.text.tokenizer import Tokenizer
from headrace.types import EncodeParams, Request

_WORDS = """
    river market engine garden winter signal copper window letter mountain doctor planet village mirror station
    harbor forest teacher silver pencil runs falls opens under without before a the of and in
"""
WORDS = _WORDS.split()
PEER = "sentence-transformers"
CASES = {"short": (512, 6, 14), "medium": (128, 60, 120), "mixed": (256, 3, 150)}  # texts, words from, to


def texts_of(case: tuple[int, int, int], seed: int) -> list[str]:
    """Random texts of so many words."""
    count, low, high = case
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(low, high))) for _ in range(count)]


class Ours:
    """Tokenizer, encode loop and unit vectors, in this process."""

    def __init__(self, precision: str) -> None:
        path = resolve("minilm")
        checkpoint = open_checkpoint(path)
        quantization = "int8" if precision == "int8" else ""
        self.dtype = torch.float32 if quantization else getattr(torch, precision)
        spec = EngineSpec(model="minilm", path=path, quantization=quantization)
        self.core, ready = build_encode(spec, checkpoint, torch.device("cpu"), self.dtype)
        self.text = EncodeText(Tokenizer.from_path(path), self.core.runner.model.card, ready.max_model_len)

    def __call__(self, texts: list[str]) -> np.ndarray[Any, Any]:
        encoded = self.text.texts(texts, truncate=Truncate())
        params = EncodeParams(normalize=True)
        self.core.add(Request(id=str(i), token_ids=e.ids, encode=params) for i, e in enumerate(encoded))
        rows: list[Any] = [None] * len(texts)
        while self.core.has_work():
            for output in self.core.step():
                rows[int(output.request_id)] = np.frombuffer(output.data, "<f4")
        return np.stack(rows)

    def tokens(self, texts: list[str]) -> int:
        return sum(len(e.ids) for e in self.text.texts(texts, truncate=Truncate()))

    def flops_per_token(self) -> int:
        """Of the linear maps."""
        config = self.core.runner.model.backbone.config
        layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
        return int(2 * config.num_layers * layer)


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of one large product."""
    size, rows = 1536, 1024
    weight, x = pack(torch.randn(size, size, dtype=dtype)), torch.randn(rows, size, dtype=dtype)
    with torch.inference_mode():
        best = min(_seconds(lambda: dense(x, weight, None)) for _ in range(15))
    return 2 * rows * size * size / best


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def sentence_transformers(batch: int) -> Callable[[list[str]], Any]:
    """The peer, in float32, at one of its batch sizes."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(resolve("minilm")), device="cpu")
    return lambda texts: model.encode(
        texts, batch_size=batch, normalize_embeddings=True, show_progress_bar=False
    )


class Peer:
    """fastembed or infinity-emb in a Python of its own, fed by files."""

    def __init__(self, name: str, python: str, folder: str, threads: int, work: Path) -> None:
        script = Path(__file__).with_name("encode_peer.py")
        self.files = work / f"{name}.json", work / f"{name}.npy"
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [python, str(script), name, folder, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a peer ended with {self.process.wait()}")
        return line

    def seconds(self, texts: list[str]) -> float:
        """What these took, by its own clock."""
        assert self.process.stdin is not None
        self.files[0].write_text(json.dumps(texts))
        self.process.stdin.write(f"{self.files[0]} {self.files[1]}\n")
        self.process.stdin.flush()
        return float(self._line())

    def __call__(self, texts: list[str]) -> np.ndarray[Any, Any]:
        self.seconds(texts)
        vectors: np.ndarray[Any, Any] = np.load(self.files[1])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def seconds_of(run: Callable[[list[str]], Any], texts: list[str]) -> float:
    """Of one run."""
    return run.seconds(texts) if isinstance(run, Peer) else _seconds(partial(run, texts))


def compare(
    record: Recorder,
    engines: dict[str, Ours],
    peers: dict[str, Callable[[list[str]], Any]],
    case: str,
    texts: list[str],
    args: Any,
) -> None:
    """Alternating runs of one case; a row each."""
    runs: dict[str, Callable[[list[str]], Any]] = {**engines, **peers}
    vectors = {name: run(texts) for name, run in runs.items()}
    reference = vectors.get(PEER, vectors[args.dtypes[0]])
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(args.runs):
        for name, run in runs.items():
            best[name] = min(best[name], seconds_of(run, texts))
    for name, seconds in best.items():
        ours, floor = engines.get(name), None
        if ours is not None:
            flops = ours.tokens(texts) * ours.flops_per_token()
            floor = len(texts) * product_rate(ours.dtype) / flops
        record.row(
            model="minilm",
            precision=name if ours else "float32",
            case=f"{case} {len(texts)}",
            metric="embeddings_s",
            value=len(texts) / seconds,
            floor=floor,
            engine="headrace" if ours else name,
            threads=args.threads,
            min_cosine=round(float((vectors[name] * reference).sum(1).min()), 7),
        )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true", help="without sentence-transformers")
    parser.add_argument("--peers", metavar="PYTHON", help="one that has fastembed and infinity-emb")
    parser.add_argument("--onnx", metavar="FOLDER", help="the checkpoint for fastembed")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "int8"])
    shapes = parser.add_argument_group("random weights of real shapes, from token ids (encode_random.py)")
    shapes.add_argument("--shapes", nargs="+", help="bge-large, qwen3-embedding-0.6b")
    shapes.add_argument("--dtype", choices=["float16", "bfloat16"], help="else each family's own")
    shapes.add_argument("--cases", nargs="+", help="texts x tokens: 2048x512, 2048x16..512, 1x16")
    shapes.add_argument("--eight-bits", choices=["fp8", "int8"], help="round weights and activations")
    shapes.add_argument("--max-num-seqs", type=int, default=256)
    shapes.add_argument("--batch-tokens", type=int)
    shapes.add_argument("--latency-runs", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = Recorder("encode", args)
    if args.shapes:
        encode_random.measure(record, args)
        return
    peers: dict[str, Callable[[list[str]], Any]] = {} if args.no_peer else {PEER: sentence_transformers(32)}
    work = tempfile.TemporaryDirectory()
    if args.peers:
        folders = {"fastembed": args.onnx, "infinity": str(resolve("minilm"))}
        for name, folder in folders.items():
            peers[name] = Peer(name, args.peers, folder, args.threads, Path(work.name))
    engines = {name: Ours(name) for name in args.dtypes}
    for case, shape in CASES.items():
        compare(record, engines, peers, case, texts_of(shape, seed=len(case)), args)
    one = texts_of((1, 8, 8), seed=1)
    for name, run in {**engines, **peers}.items():
        times = [seconds_of(run, one) for _ in range(60)]
        record.row(
            model="minilm", precision=name if name in engines else "float32", case="one text", metric="latency_ms",
            value=statistics.median(times) * 1e3, engine="headrace" if name in engines else name, threads=args.threads,
        )  # fmt: skip


if __name__ == "__main__":
    main()
