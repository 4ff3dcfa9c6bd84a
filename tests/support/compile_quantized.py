"""Compile the kernels of quantized products for Hopper, without a GPU; prints what does not compile.

The interpreter that CPU tests run in knows no types of variables: what changes its type between two branches runs there
and fails on a GPU. Run as a program: Triton decides between interpreter and compiler when it is imported.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from headrace.kernels.quantized_linear import triton as products
from headrace.kernels.quantized_linear import triton_codes as codes
from headrace.kernels.quantized_linear import triton_dequantize as wide_again
from headrace.kernels.quantized_linear import triton_gemv as gemv

Variant = tuple[str, Any, dict[str, str], dict[str, Any]]
FLOATS = ("eps",)
KINDS = {
    "x_ptr": "*bf16", "out_ptr": "*bf16", "bias_ptr": "*bf16", "res_ptr": "*bf16", "gain_ptr": "*bf16",
    "zero_ptr": "*fp32", "scale_ptr": "*fp32", "w_scale_ptr": "*fp32",
    "row_scale_ptr": "*fp32", "xs_ptr": "*fp32", "parts_ptr": "*fp32",
    "arrivals_ptr": "*i32", "codes_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv",
}  # fmt: skip


def fp8() -> Iterator[Variant]:
    base = {
        "BM": 16, "BN": 64, "BK": 128, "SPLITS": 2, "FORM": 0, "GROUP": 0, "HEIGHT": 1, "XGROUP": 0, "ROW_SCALE": True,
        "STATIC": False, "BIAS": True, "GATE": 0, "RESIDUAL": True, "WIDEN": False, "PDL": True,
    }  # fmt: skip
    cases: dict[str, dict[str, Any]] = {
        "token": {},
        "static": {"STATIC": True, "GATE": 1, "SPLITS": 1},
        "blocks": {"GROUP": 128, "HEIGHT": 128, "XGROUP": 128, "ROW_SCALE": False},
        "groups": {"XGROUP": 64, "BK": 64, "BM": 64},
    }
    for name, changes in cases.items():
        yield f"fp8 {name}", products._small, {"x_ptr": "*fp8e4nv"}, {**base, **changes}
    int8 = {"FORM": 1, "GROUP": 64, "ROW_SCALE": False}
    yield "int8", products._small, {"w_ptr": "*u8"}, {**base, **int8}
    for group, norm in itertools.product((0, 128), (False, True)):
        row = {"GROUP": group, "BK": 1024, "NORM": norm, "PDL": True}
        yield f"rounding {group} {norm}", products._quantize_rows, {}, row
    one = {
        "BN": 4, "BW": 256, "NORM": True, "BIAS": True, "GATE": 1, "RESIDUAL": True, "EVEN": True, "PLAIN": False,
        "PDL": True,
    }  # fmt: skip
    for changes in ({}, {"GATE": 0, "EVEN": False, "NORM": False}):
        yield f"fp8 gemv {changes}", gemv._fp8_gemv, {"w_ptr": "*i32"}, {**one, **changes}


def four_bits() -> Iterator[Variant]:
    base = {
        "BM": 8, "T": 2, "W": 4, "SPLITS": 2, "EVEN": True, "BIAS": True, "GATE": 0, "RESIDUAL": True,
        "PLAIN": False, "PDL": True,
    }  # fmt: skip
    nvfp4 = {"FP4": True, "GROUP": 16, "SMALL": False, "ZERO": False}
    mxfp4 = {**nvfp4, "GROUP": 32, "SMALL": True, "EVEN": False}
    int4 = {"FP4": False, "GROUP": 128, "SMALL": False, "ZERO": False}
    middle = {**int4, "GROUP": 64, "ZERO": True}
    fine = {**int4, "GROUP": 32, "ZERO": True, "GATE": 1}
    wide = {"BM": 32, "SPLITS": 1}
    any_scale = {**mxfp4, "SMALL": False}
    forms = {
        "nvfp4": nvfp4,
        "mxfp4": mxfp4,
        "mxfp4 of any scale": any_scale,
        "int4": int4,
        "int4 of 64": middle,
        "int4 of 32": fine,
    }
    for (name, form), more in itertools.product(forms.items(), ({}, wide, {"PLAIN": True})):
        types = {"w_ptr": "*i32", "zero_ptr": "*bf16"} | ({"w_scale_ptr": "*i32"} if form["FP4"] else {})
        if "PLAIN" in more:
            types |= dict.fromkeys(("x_ptr", "out_ptr", "bias_ptr", "res_ptr"), "*fp16")
        yield f"{name} {more}", codes._small_codes, types, {**base, **form, **more}
    for name, form in forms.items():
        types = {"w_ptr": "*i32", "zero_ptr": "*bf16"} | ({"scale_ptr": "*u8"} if form["FP4"] else {})
        kept = {key: form[key] for key in ("FP4", "GROUP", "ZERO")}
        yield f"{name} dequantized", wide_again._dequantize, types, {"W": 4, **kept}


def compile_all(variants: Iterable[Variant], kinds: dict[str, str], floats: Iterable[str]) -> int:
    """How many do not compile, which are printed.

    Args:
        variants: (name, kernel, types of arguments, constants).
        kinds: other types by argument; those named in ``floats`` are float32, the rest int32.
    """
    failed = 0
    for name, kernel, types, constants in variants:
        names = kernel.arg_names
        known = {**kinds, **types}
        signature = {
            arg: "constexpr" if arg in constants else known.get(arg, "fp32" if arg in floats else "i32")
            for arg in names
        }
        places = {(names.index(arg),): value for arg, value in constants.items()}
        divisible = {
            (i,): [["tt.divisibility", 16]] for i, arg in enumerate(names) if signature[arg][0] in "*i"
        }
        options = {"num_warps": 4, "num_stages": 3, "launch_pdl": bool(constants.get("PDL"))}
        try:
            triton.compile(
                ASTSource(kernel, signature, places, divisible),
                target=GPUTarget("cuda", 90, 32),
                options=options,
            )
        except Exception as error:  # any: the point is to see it
            failed += 1
            cause = error.__cause__ or error
            print(f"{name}: {type(cause).__name__} {cause}"[-600:])
    print("failed:", failed)
    return failed


if __name__ == "__main__":
    sys.exit(min(compile_all(itertools.chain(fp8(), four_bits()), KINDS, FLOATS), 1))
