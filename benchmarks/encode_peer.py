"""One peer of benchmarks/encode.py in a Python of its own: texts in a file in, vectors in a file and seconds out.

    PYTHON encode_peer.py {fastembed|infinity} FOLDER THREADS

FOLDER is the checkpoint; for fastembed it holds model.onnx. Needs nothing of ours, so that it runs beside the peer's
own dependencies. Reads lines `IN.json OUT.npy`; answers each with the seconds that the vectors took.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def fastembed(folder: str, threads: int) -> Callable[[list[str]], Any]:
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    TextEmbedding.add_custom_model(
        model="local/minilm",
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf="local/minilm"),
        dim=384,
        model_file="model.onnx",
    )
    model = TextEmbedding("local/minilm", specific_model_path=folder, threads=threads)
    return lambda texts: list(model.embed(texts, batch_size=32))


def infinity(folder: str, threads: int) -> Callable[[list[str]], Any]:
    import torch

    torch.set_num_threads(threads)
    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    engine = AsyncEmbeddingEngine.from_args(
        EngineArgs(
            model_name_or_path=folder,
            engine="torch",
            device="cpu",
            dtype="float32",
            bettertransformer=False,
            compile=False,
            model_warmup=False,
            batch_size=32,
        )
    )
    loop = asyncio.new_event_loop()
    loop.run_until_complete(engine.astart())

    def run(texts: list[str]) -> Any:
        vectors, _ = loop.run_until_complete(engine.embed(sentences=texts))
        return vectors

    return run


def main() -> None:
    name, folder, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    os.environ["OMP_NUM_THREADS"] = str(threads)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    run = {"fastembed": fastembed, "infinity": infinity}[name](folder, threads)
    import numpy as np

    print("ready", file=out, flush=True)
    for line in sys.stdin:
        given, found = line.split()
        with open(given) as file:
            texts = json.load(file)
        began = time.perf_counter()
        vectors = run(texts)
        seconds = time.perf_counter() - began
        np.save(found, np.asarray(vectors, dtype=np.float32))
        print(seconds, file=out, flush=True)


if __name__ == "__main__":
    main()
