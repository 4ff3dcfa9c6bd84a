"""Compile the kernels of mixtures of experts for Hopper, without a GPU; see compile_quantized.py."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

from headrace.kernels.experts import triton as plain
from headrace.kernels.experts import triton_codes as codes
from headrace.kernels.experts import triton_eight_bits as eight
from headrace.kernels.experts import triton_plan as plan
from support.compile_quantized import KINDS, Variant, compile_all

OWN = {
    **KINDS, "w_ptr": "*bf16", "pairs_ptr": "*i32", "contents_ptr": "*i32", "chosen_ptr": "*i32", "counts_ptr": "*i32",
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
        yield "add up", plan._add_up, {}, {"BE": common["BE"], "PDL": True, "BM": 128, "ROWS": 32}
        yield "place", plan._place_many, {}, {**common, "CHUNK": 64}


def products() -> Iterator[Variant]:
    for (rows, bn, bk), gate, even in itertools.product(
        ((16, 64, 128), (32, 64, 128), (64, 64, 64), (128, 64, 64)), (0, 1, 4), (False, True)
    ):
        shape = {"BM": rows, "BN": bn if gate else 64 if rows < 64 else 128, "BK": bk}
        settings = {**shape, "SHARED": 1, "BIAS": gate == 4, "GATE": gate, "EVEN": even, "PDL": True}
        yield f"product {settings}", plain._expert_linear, {}, settings
    yield "combine", plain._combine, {}, {"TOP": 8, "RESIDUAL": True, "BLOCK": 1024, "PDL": True}


def eight_bits() -> Iterator[Variant]:
    base = {
        "SHARED": 8, "BM": 16, "BN": 64, "BK": 128, "FORM": 0, "GROUP": 0, "HEIGHT": 1, "XGROUP": 0, "STATIC": False,
        "ROW_SCALE": True, "BIAS": True, "GATE": 1, "EVEN": True, "WIDEN": False, "PDL": True,
    }  # fmt: skip
    fp8 = {"x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv"}
    blocks = {"GROUP": 128, "HEIGHT": 128, "ROW_SCALE": False}
    cases: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
        "fp8": (fp8, {}),
        "fp8 static": (fp8, {"STATIC": True, "EVEN": False, "GATE": 0}),
        "fp8 blocks": (fp8, {**blocks, "XGROUP": 128}),
        "fp8 many": (fp8, {"BM": 128, "BN": 64}),
        "fp8 weights": ({"w_ptr": "*fp8e4nv"}, {"FORM": 2}),
        "fp8 weights in blocks": ({"w_ptr": "*fp8e4nv"}, {**blocks, "FORM": 2, "GATE": 0}),
        "int8": ({"w_ptr": "*u8"}, {"FORM": 1, "GROUP": 2048, "ROW_SCALE": False}),
        "int8 of 64": ({"w_ptr": "*u8"}, {"FORM": 1, "GROUP": 64, "ROW_SCALE": False, "BM": 64}),
    }
    for name, (types, changes) in cases.items():
        yield name, eight._expert_eight_bits, types, {**base, **changes}


def four_bits() -> Iterator[Variant]:
    base = {"SHARED": 8, "ROWS": 16, "BM": 8, "EVEN": True, "BIAS": False, "PLAIN": False, "PDL": True}
    forms = {
        "nvfp4": {"FP4": True, "GROUP": 16, "ZERO": False, "SMALL": False},
        "mxfp4": {"FP4": True, "GROUP": 32, "ZERO": False, "SMALL": True},
        "mxfp4 of any scale": {"FP4": True, "GROUP": 32, "ZERO": False, "SMALL": False},
        "int4": {"FP4": False, "GROUP": 128, "ZERO": True, "SMALL": False},
        "int4 of 32": {"FP4": False, "GROUP": 32, "ZERO": False, "SMALL": False},
    }
    shapes: tuple[dict[str, Any], ...] = (
        {"T": 2, "W": 4, "GATE": 1},
        {"T": 1, "W": 2, "GATE": 0, "EVEN": False},
        {"T": 2, "W": 4, "GATE": 4, "BM": 32, "ROWS": 128},
    )
    for (name, form), shape in itertools.product(forms.items(), shapes):
        types = {"w_ptr": "*i32", "zero_ptr": "*bf16"} | ({"w_scale_ptr": "*i32"} if form["FP4"] else {})
        yield f"{name} {shape}", codes._few_codes, types, {**base, **form, **shape}
    for name, form in forms.items():
        types = {"w_ptr": "*i32", "zero_ptr": "*bf16"} | ({"w_scale_ptr": "*i32"} if form["FP4"] else {})
        kept = {key: value for key, value in base.items() if key != "ROWS"}
        yield f"{name} many", codes._many_codes, types, {**kept, **form, "BM": 128, "T": 8, "GATE": 1}


if __name__ == "__main__":
    sys.exit(min(compile_all(itertools.chain(plans(), products(), eight_bits(), four_bits()), OWN, ()), 1))
