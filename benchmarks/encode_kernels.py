"""Kernels of encoders on a GPU, by shape: packed attention over its tile shapes, activation and norm by bandwidth.

    python -m benchmarks.encode_kernels --record

Medians of `triton.testing.do_bench`. Floors: attention at the rate of cuBLAS, the others at the copy rate. With
--tiles every tile shape is tried and printed, best first; the defaults are in kernels/attention/triton_packed.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import Recorder, arguments, ceilings
from headrace.kernels.activation import bias_activate
from headrace.kernels.attention import triton_packed
from headrace.kernels.norm import layer_norm
from headrace.layers.packed import AttentionBatch

TOKENS = 16384
# name, text length, heads, key heads, head size, causal
ATTENTION: list[tuple[Any, ...]] = [
    ("bge-large", 512, 16, 16, 64, False),
    ("bge-large", 128, 16, 16, 64, False),
    ("bge-large", 32, 16, 16, 64, False),
    ("qwen3-embedding-0.6b", 512, 16, 8, 128, True),
    ("qwen3-embedding-0.6b", 32, 16, 8, 128, True),
]
# query rows, keys, warps, stages, keys through descriptors
TILES = [
    (128, 64, 8, 3, False),
    (128, 64, 4, 3, False),
    (64, 64, 4, 2, False),
    (64, 64, 4, 3, False),
    (64, 128, 4, 2, False),
    (64, 32, 4, 2, False),
    (32, 32, 2, 2, False),
    (64, 32, 4, 3, True),
    (64, 64, 4, 3, True),
]


def seconds(work: Callable[[], Any]) -> float:
    """Median."""
    import triton

    return float(triton.testing.do_bench(work, warmup=10, rep=60, return_mode="median")) / 1e3


def attention_seconds(
    length: int,
    heads: int,
    kv_heads: int,
    dim: int,
    causal: bool,
    shape: tuple[int, int, int, int, bool] | None,
) -> float:
    """Of TOKENS tokens in texts of one length, in 16 bits; with this tile shape, or the default."""
    dtype = torch.bfloat16 if causal else torch.float16
    fused = torch.randn(TOKENS, heads + 2 * kv_heads, dim, dtype=dtype, device="cuda")
    q, k, v = fused.split([heads, kv_heads, kv_heads], 1)
    count = TOKENS // length
    starts = torch.arange(count + 1, dtype=torch.int32, device="cuda") * length
    lens = torch.full((count,), length, dtype=torch.int32, device="cuda")
    batch = AttentionBatch(query_starts=starts, seq_lens=lens, causal=causal)
    chosen = triton_packed._shape
    try:
        if shape is not None:
            triton_packed._shape = lambda *_: shape
        return seconds(lambda: triton_packed.packed_attention(q, k, v, batch, scale=dim**-0.5))
    finally:
        triton_packed._shape = chosen


def attention(record: Recorder, tiles: bool) -> None:
    rates = ceilings()
    for name, *sizes in ATTENTION:
        length, heads, _, dim, causal = sizes
        work = 4 * TOKENS * length * heads * dim * (0.5 if causal else 1.0)
        record.row(
            model=name, precision="bfloat16" if causal else "float16",
            case=f"attention {TOKENS // length}x{length}", metric="flop_s",
            value=work / attention_seconds(*sizes, None), floor=None if rates is None else rates[1],
        )  # fmt: skip
        if tiles:
            found = sorted((attention_seconds(*sizes, shape), shape) for shape in TILES)
            print(name, length, [(shape, round(work / time / 1e12, 1)) for time, shape in found], flush=True)


def elementwise(record: Recorder) -> None:
    x = torch.randn(TOKENS, 4096, dtype=torch.float16, device="cuda")
    bias = torch.randn(4096, dtype=torch.float16, device="cuda")
    hidden, residual = (torch.randn(TOKENS, 1024, dtype=torch.float16, device="cuda") for _ in range(2))
    gain = torch.randn(1024, dtype=torch.float16, device="cuda")
    weight = torch.randn(4096, 1024, dtype=torch.float16, device="cuda") * 0.02
    rates = ceilings()
    floor = None if rates is None else rates[0]
    cases = {
        "bias+gelu": (2 * x.nbytes, lambda: bias_activate(x, bias, "gelu")),
        "norm of a sum": (3 * hidden.nbytes, lambda: layer_norm(hidden, gain, gain, 1e-12, residual)),
    }
    for case, (moved, work) in cases.items():
        record.row(
            model="bge-large", precision="float16", case=f"{case} {TOKENS}", metric="bytes_s",
            value=moved / seconds(work), floor=floor,
        )  # fmt: skip
    products: dict[str, Callable[[], Any]] = {
        "product": lambda: F.linear(hidden, weight),
        "product+bias": lambda: F.linear(hidden, weight, bias),
    }
    for case, product in products.items():
        record.row(
            model="bge-large", precision="float16", case=f"{case} {TOKENS}x1024x4096", metric="flop_s",
            value=2 * TOKENS * 1024 * 4096 / seconds(product), floor=None if rates is None else rates[1],
        )  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tiles", action="store_true", help="try every tile shape of the attention")
    args = parser.parse_args()
    record = Recorder("encode_kernels", args)
    attention(record, args.tiles)
    elementwise(record)


if __name__ == "__main__":
    main()
