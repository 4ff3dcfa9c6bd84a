"""Compile the kernels of mixtures of experts for Hopper, without a GPU; see compile_quantized.py."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

from headrace.kernels.experts import triton as plain
from headrace.kernels.experts import triton_plan as plan
from support.compile_quantized import KINDS, Variant, compile_all

OWN = {
    **KINDS, "w_ptr": "*bf16", "pairs_ptr": "*i32", "experts_ptr": "*i32", "chosen_ptr": "*i32", "counts_ptr": "*i32",
    "starts_ptr": "*i32", "logits_ptr": "*bf16", "weights_ptr": "*fp32", "parts_ptr": "*bf16",
}  # fmt: skip


def plans() -> Iterator[Variant]:
    for top, experts in ((8, 128), (2, 8), (4, 64)):
        common = {"TOP": top, "BE": max(16, experts), "PDL": True}
        for renormalize in (False, True):
            route = {**common, "BE": experts, "BT": 4, "RENORMALIZE": renormalize}
            yield f"route {top} {experts}", plan._route, {}, route
        for chunk in (4, 64):
            yield f"plan {top} {experts}", plan._plan_few, {}, {**common, "BM": 16, "CHUNK": chunk}
        yield "count", plan._count, {}, {**common, "CHUNK": 64}
        yield "add up", plan._add_up, {}, {**common, "BM": 128, "ROWS": 16}
        yield "place", plan._place_many, {}, {**common, "CHUNK": 64}


def products() -> Iterator[Variant]:
    for (rows, bn, bk), gate, even in itertools.product(
        ((16, 64, 128), (32, 64, 128), (64, 64, 64), (128, 64, 64)), (0, 1, 4), (False, True)
    ):
        shape = {"BM": rows, "BN": bn if gate else 64 if rows < 64 else 128, "BK": bk}
        settings = {**shape, "SHARED": 1, "BIAS": gate == 4, "GATE": gate, "EVEN": even, "PDL": True}
        yield f"product {settings}", plain._expert_linear, {}, settings
    yield "combine", plain._combine, {}, {"TOP": 8, "RESIDUAL": True, "BLOCK": 1024, "PDL": True}


if __name__ == "__main__":
    sys.exit(min(compile_all(itertools.chain(plans(), products()), OWN, ()), 1))
