"""Compile the attention kernels for Hopper, without a GPU, as compile_quantized.py does."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

from compile_quantized import Variant, compile_all

from headrace.kernels.attention import triton_decode, triton_fresh, triton_prefill, triton_tile_map

KINDS = {
    **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "gain_ptr", "k_cache", "v_cache"), "*bf16"),
    **dict.fromkeys(("arrivals_ptr", "tables_ptr", "rows_ptr", "starts_ptr", "lens_ptr", "map_ptr"), "*i32"),
    **dict.fromkeys(("partial_ptr", "cos_ptr", "sin_ptr", "sinks_ptr"), "*fp32"),
}
FLOATS = ("scale", "soft_cap", "eps")
SHAPE = {"G": 4, "D": 128, "DP": 128, "BLOCK": 16, "WINDOW": 0, "CAPPED": False, "SINKS": False,
    "PDL": True,
}  # fmt: skip


def decode() -> Iterator[Variant]:
    """Every cache, as the fused step and on its own."""
    base = {
        **SHAPE, "SEQS": 16, "GP": 8, "GM": 4, "R": 128, "TILE": 32, "FUSED": True, "NORM": True, "ROWS": True,
        "STARTS": False, "WIDE": False, "MAX_SPLITS": 32, "MIN_SPLIT": 512, "CHUNK": 8, "FEW": False,
        "PARTS": 1, "PLAIN": False,
    }  # fmt: skip
    plain = {
        "FUSED": False,
        "FEW": True,
        "NORM": False,
        "R": 0,
        "STARTS": True,
        "WINDOW": 100,
        "CAPPED": True,
    }
    caches = {
        "bf16": ("*bf16", {}),
        "fp8": ("*i16", {"PARTS": 2}),
        "fp8, 16 dimensions": ("*fp8e4nv", {"D": 16, "DP": 16}),
        "fp4": ("*i16", {"PARTS": 4}),
        "fp4, 80 dimensions": ("*u8", {"D": 80}),
    }
    for (name, (kind, changes)), more in itertools.product(caches.items(), ({}, plain)):
        types: dict[str, str] = {"k_cache": kind, "v_cache": kind}
        yield f"decode {name} {more}", triton_decode._decode, types, {**base, **changes, **more}
    sinks = {"D": 64, "DP": 64, "R": 64, "G": 8, "GM": 8, "NORM": False, "SINKS": True}
    for more in ({}, {"WINDOW": 128}):
        yield f"decode sinks {more}", triton_decode._decode, {}, {**base, **sinks, **more}
    half = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "gain_ptr"), "*fp16")
    words = {"k_cache": "*i16", "v_cache": "*i16"}
    yield "decode fp4, float16", triton_decode._decode, {**half, **words}, {**base, "PARTS": 4, "PLAIN": True}


def prefill() -> Iterator[Variant]:
    """Prompts alone and behind a prefix."""
    tiles: dict[str, Any] = {**SHAPE, "ROWS": 64, "TILE": 64}
    paged = {**tiles, "CAUSAL": True, "PAGED": True}
    for kind, changes in (
        ("*bf16", {}),
        ("*fp8e4nv", {}),
        ("*u8", {"TILE": 32}),
        ("*bf16", {"PAGED": False}),
    ):
        yield f"prefill {kind}", triton_prefill._prefill, {"k_ptr": kind, "v_ptr": kind}, {**paged, **changes}
    fresh = {key: value for key, value in tiles.items() if key not in ("DP", "BLOCK")}
    keys = dict.fromkeys(("k_desc", "v_desc"), "tensordesc<bf16[64,128]>")
    for lanes, which in itertools.product((16, 1024), (0, 1, 2)):
        search = {
            "ROWS": 64,
            "TILES": 16,
            "SEQS": lanes,
            "SKIP_SINGLE": lanes > 16,
            "FRESH": which,
            "PDL": True,
        }
        yield f"tile map {search}", triton_tile_map._tile_map, {}, search
    for more in ({}, {"WINDOW": 100}, {"CAPPED": True}, {"SINKS": True, "WINDOW": 128}):
        yield f"fresh {more}", triton_fresh._fresh, keys, {**fresh, **more}
        yield f"prefill {more}", triton_prefill._prefill, {}, {**paged, **more}


if __name__ == "__main__":
    sys.exit(min(compile_all(itertools.chain(decode(), prefill()), KINDS, FLOATS), 1))
