"""Decode steps over caches of each type, and what each further key of all sequences costs.

    python -m benchmarks.cache_step --record --model qwen3-8b --layers 8

A step is one CUDA graph of FastDecoder with greedy sampling, weights in bfloat16; times are medians of replays. The
slope is that of the line from the shortest to the longest context. Few layers change the time of a step, not how slopes
relate: attention is all that depends on the context.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common import Recorder, arguments, model_config
from benchmarks.kernels import DEVICE, DTYPE, graph_seconds
from headrace.engines.bench.cores import random_model
from headrace.kernels.attention.decode_shapes import is_long
from headrace.kernels.attention.fp4 import FP4
from headrace.kvcache.pool import allocate_caches
from headrace.models.decoder_fast import DecodeBatch, FastDecoder

CACHES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp4": FP4}
BLOCK = 16


def step_seconds(decoder: FastDecoder, kind: torch.dtype, count: int, length: int) -> float:
    """Seconds of a step of ``count`` sequences of ``length`` keys each, over random numbers in shuffled blocks."""
    c = decoder.config
    per = -(-length // BLOCK)
    shape = [(c.num_kv_heads, c.head_dim)] * len(decoder.layers)
    caches = allocate_caches(shape, count * per + 1, BLOCK, kind, DEVICE)
    for cache in caches:
        for pool in (cache.k, cache.v):
            # Bytes below 60: no NaN, and no large number, in any of the types.
            pool.view(torch.uint8).random_(0, 60)
    tables = (torch.randperm(count * per, device=DEVICE).int() + 1).view(count, per)
    embedded = torch.randn(count, c.hidden_size, dtype=DTYPE, device=DEVICE)
    last = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    batch = DecodeBatch(
        embedded=embedded.clone(),
        seq_lens=torch.full((count,), length, dtype=torch.int32, device=DEVICE),
        rows=torch.arange(count, dtype=torch.int32, device=DEVICE),
        tables=tables,
        caches=caches,
        workspace=decoder.workspace(count),
        long=is_long(count * c.num_kv_heads, c.head_dim, length),
    )

    def step(_: int) -> None:
        batch.embedded.copy_(embedded)
        decoder.tokens(batch, last)

    with torch.inference_mode():
        seconds = graph_seconds(step, 1, 9)
    assert bool((last >= 0).all()), "not finite"
    return seconds


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="qwen3-8b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--requests", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 16384])
    args = parser.parse_args()
    recorder = Recorder("cache_step", args)
    config: dict[str, Any] = {**model_config(args.model), "num_hidden_layers": args.layers}
    decoder = FastDecoder(random_model(config, dtype=DTYPE, device=DEVICE), max(args.lengths) + 1)
    for count in args.requests:
        slopes: dict[str, float] = {}
        for name in args.caches:
            seconds = [step_seconds(decoder, CACHES[name], count, length) for length in args.lengths]
            torch.cuda.empty_cache()
            slopes[name] = (seconds[-1] - seconds[0]) / (args.lengths[-1] - args.lengths[0])
            recorder.row(
                model=f"{args.model}, {args.layers} layers", precision=f"{name} cache",
                case=f"a step of {count}, contexts {args.lengths}", metric="seconds_per_key", value=slopes[name],
                step_us=[round(t * 1e6, 1) for t in seconds],
                of_bf16=round(slopes[name] / slopes["bf16"], 3) if "bf16" in slopes else None,
            )  # fmt: skip


if __name__ == "__main__":
    main()
