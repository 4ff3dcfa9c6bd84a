"""Attention against the device's ceilings, torch's, and FlashAttention-3 as the peer ships it.

    python -m benchmarks.attention --record --fa3 vllm-0.24.0-cp38-abi3-manylinux_2_28_x86_64.whl   # see fa3.py

Every figure is the median of replays of one CUDA graph that walks over enough different caches not to fit L2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import fa3
from benchmarks.common import Recorder, arguments, ceilings
from benchmarks.kernels import DEVICE, DTYPE, SPREAD, graph_seconds
from headrace.kernels.attention.cache import cache_width
from headrace.kernels.attention.decode_shapes import is_long
from headrace.kernels.attention.fp4 import FP4
from headrace.kernels.attention.triton_decode import DecodeWorkspace, decode_attention
from headrace.kernels.attention.triton_fresh import fresh_attention
from headrace.kernels.attention.triton_prefill import prefill_attention

HEADS = [(16, 8, 128), (32, 8, 128)]  # queries, keys, size: Qwen3-0.6B and 8B
DECODES = [*itertools.product((1, 4, 16, 32, 64), (512, 4096, 32768)), (256, 512), (256, 1088), (256, 4096)]
PREFILLS = [(1, 4096), (8, 1024), (16, 512)]
SCALE = 0.088
CACHES = {"bf16": DTYPE, "fp8": torch.float8_e4m3fn, "fp4": FP4}
BLOCK = 16


def blocks_of(count: int, length: int) -> tuple[int, Tensor, Tensor]:
    """Blocks of a cache for equal sequences, their shuffled table int32 [count, B], and lengths int32 [count]."""
    per = -(-length // BLOCK)
    table = (torch.randperm(count * per, device=DEVICE).int() + 1).view(count, per)
    return count * per + 1, table, torch.full((count,), length, dtype=torch.int32, device=DEVICE)


def decode(
    recorder: Recorder, heads: int, kv: int, dim: int, count: int, length: int, *, peer: bool, kind: str
) -> None:
    """One new token a sequence over the paged cache; the peer's at its best, its work planned ahead or not."""
    width = cache_width(dim, CACHES[kind])
    size = 2 * count * length * kv * width * CACHES[kind].itemsize
    copies = max(1, min(8, SPREAD // size))
    blocks, tables, lens = blocks_of(count, length)
    shape = (2, blocks, BLOCK, kv, width * CACHES[kind].itemsize)
    # Bytes below 60: no NaN, and no large number, in any of the types.
    caches = [
        torch.randint(0, 60, shape, dtype=torch.uint8, device=DEVICE).view(CACHES[kind])
        for _ in range(copies)
    ]
    if kind == "bf16":
        for cache in caches:
            cache.normal_()
    q = torch.randn(count, heads, dim, dtype=DTYPE, device=DEVICE)
    out, theirs = torch.empty_like(q), torch.empty_like(q)
    long = is_long(count * kv, dim, length)
    space = DecodeWorkspace.allocate(count, heads, kv, dim, DEVICE)

    def ours(i: int) -> None:
        decode_attention(q, *caches[i].unbind(), tables, lens, space, scale=SCALE, long=long, out=out)

    def peers(planned: bool) -> Callable[[int], None]:
        run = fa3.paged_decode(q, caches[0][0], tables, lens, length, planned=planned)
        return lambda i: run(q, *caches[i].unbind(), theirs, SCALE)

    seconds = graph_seconds(ours, copies)
    more: dict[str, Any] = {}
    if peer:
        best = min(graph_seconds(peers(planned), copies) for planned in (False, True))
        ours(0)
        peers(False)(0)
        apart = float((out.float() - theirs.float()).norm() / theirs.float().norm())
        more = {"fa3_us": round(best * 1e6, 1), "of_fa3": round(best / seconds, 3), "apart": round(apart, 4)}
    rates = ceilings()
    recorder.row(
        model=f"{heads}/{kv} heads of {dim}", precision=kind, case=f"decode {count}x{length}", metric="bytes_s",
        value=size / seconds, floor=rates[0] if rates else None, us=round(seconds * 1e6, 1), **more,
    )  # fmt: skip


def prefill(
    recorder: Recorder, heads: int, kv: int, dim: int, count: int, length: int, *, peer: bool
) -> None:
    """Causal attention of equal prompts: keys of the batch, keys in the paged cache, SDPA, the peer's."""
    blocks, tables, lens = blocks_of(count, length)
    cache = torch.randn(2, blocks, BLOCK, kv, dim, dtype=DTYPE, device=DEVICE)
    starts = torch.arange(count + 1, dtype=torch.int32, device=DEVICE) * length
    q, k, v = torch.randn(count * length, heads + 2 * kv, dim, dtype=DTYPE, device=DEVICE).split(
        [heads, kv, kv], 1
    )
    out = torch.empty(q.shape, dtype=DTYPE, device=DEVICE)
    dense = [x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v)]
    runs: dict[str, Callable[[int], object]] = {
        "fresh": lambda _: fresh_attention(q, k, v, starts, lens, scale=SCALE, skip_single=True, out=out),
        "paged": lambda _: prefill_attention(
            q, *cache.unbind(), starts, lens, scale=SCALE, causal=True, tables=tables, out=out
        ),
        "sdpa": lambda _: F.scaled_dot_product_attention(*dense, is_causal=True, enable_gqa=True),
    }
    if peer:
        runs["fa3"] = lambda _: fa3.prefill(q, k, v, out, starts, length, SCALE)
        runs["fa3 paged"] = lambda _: fa3.prefill(
            q, *cache.unbind(), out, starts, length, SCALE, lens, tables
        )
    flops, rates = 2 * count * length * length * heads * dim, ceilings()
    for label, function in runs.items():
        seconds = graph_seconds(function, 2)
        recorder.row(
            model=f"{heads}/{kv} heads of {dim}", precision="bf16", case=f"prefill {count}x{length}, {label}",
            metric="flop_s", value=flops / seconds, floor=rates[1] if rates else None, us=round(seconds * 1e6, 1),
        )  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--what", nargs="+", choices=["decode", "prefill"], default=["decode", "prefill"])
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=["bf16"], help="of decode steps")
    parser.add_argument("--heads", nargs="+", type=int, default=[16, 32], help="of queries")
    parser.add_argument("--fa3", help="the peer's wheel or library, to compare with")
    args = parser.parse_args()
    recorder = Recorder("attention", args)
    if args.fa3:
        fa3.load(args.fa3)
    shapes = [shape for shape in HEADS if shape[0] in args.heads]
    for shape, setting in itertools.product(shapes, DECODES if "decode" in args.what else []):
        for kind in args.caches:
            peer = args.fa3 is not None and kind == "bf16"
            decode(recorder, *shape, *setting, peer=peer, kind=kind)
            torch.cuda.empty_cache()
    for shape, setting in itertools.product(shapes, PREFILLS if "prefill" in args.what else []):
        prefill(recorder, *shape, *setting, peer=args.fa3 is not None)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
