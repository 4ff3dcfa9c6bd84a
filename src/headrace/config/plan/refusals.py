"""Weights, their types and caches that the server refuses for a model, from its headers: plans refuse them, too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from headrace.config.plan.facts import Facts
from headrace.config.plan.shape import ModelShape
from headrace.config.plan.weights import classify
from headrace.config.quantization import (
    cache_harm,
    int8_encoder_problem,
    no_cache_problem,
    quantization_type,
    undeclared_problem,
)
from headrace.config.spec import EngineSpec

if TYPE_CHECKING:
    from headrace.config.plan.plan import Machine

__all__ = ["GROUP_COLUMNS", "cache_refusal", "packing_refusal", "refusals"]

# Columns that share a scale, which must divide a matrix's; of whole rows, what a CPU's kernel reads at a time.
GROUP_COLUMNS = {"nvfp4": 16, "mxfp4": 32, "int4": 32, "int4-g64": 64, "int4-g128": 128}
_CPU_COLUMNS = {"int8": 32}
_CACHE_GROUP = 16  # dimensions of a head that share a scale in an FP4 cache
_HOPPER = 90  # compute capability


def refusals(
    spec: EngineSpec, facts: Facts, shape: ModelShape, machine: Machine | None = None
) -> Iterator[str]:
    """Sentences with the way out.

    Args:
        machine: what it is for; None: only what holds on every one.
    """
    if problem := packing_refusal(facts):
        yield problem
    if problem := cache_refusal(spec, shape):
        yield problem
    if not spec.quantization:
        return
    kind = quantization_type(spec.quantization)
    if shape.encoder and kind.weights == "int8" and (problem := _int8_on_cpu(machine)):
        yield problem
        return
    if shape.bidirectional and (problem := _of_weights_alone(spec.quantization, machine)):
        yield problem
    else:
        yield from _widths(spec.quantization, facts, machine)


def _int8_on_cpu(machine: Machine | None) -> str:
    if machine is None or machine.cuda or machine.features is None:
        return ""
    return int8_encoder_problem(
        bfloat16="avx512_bf16" in machine.features, vnni="avx512_vnni" in machine.features
    )


def packing_refusal(facts: Facts) -> str:
    """Which tensor is quantized though nothing says how; "" when all are plain, or the settings say it."""
    if facts.container == "gguf" or facts.quantized.method:
        return ""
    return undeclared_problem((name, info.dtype) for name, info in facts.tensors.items())


def cache_refusal(spec: EngineSpec, shape: ModelShape) -> str:
    """Why this model does not take the cache that is asked for; "" when it does."""
    if shape.encoder:
        return no_cache_problem(spec.quantization, spec.kv_cache_dtype)
    name, asks = spec.kv_cache_dtype, f"kv_cache_dtype is {spec.kv_cache_dtype!r}"
    if name == "auto" and spec.quantization:
        name = quantization_type(spec.quantization).kv_cache
        asks = f"quantization is {spec.quantization!r}, with an FP8 KV cache"
    if harm := cache_harm(name, qkv_bias=shape.qkv_bias):
        return f"{asks}, and {harm}"
    if name == "fp4" and shape.head_dim % _CACHE_GROUP:
        return f"{asks}, which takes heads of a multiple of {_CACHE_GROUP} dimensions, not {shape.head_dim}; use fp8"
    return ""


def _of_weights_alone(name: str, machine: Machine | None) -> str:
    """Families of encoders round activations, too, or nothing."""
    kind = quantization_type(name)
    rounds = kind.weights in ("fp8", "int8")
    if machine is not None and machine.cuda and machine.gpu is not None:
        rounds = rounds and machine.gpu.compute >= _HOPPER
    elif machine is not None and not machine.cuda:
        rounds = rounds and kind.weights == "int8"
    if rounds:
        return ""
    return (
        f"quantization is {name!r}, and encoders keep their weights in 16 or 32 bits, or with their activations in "
        "8: fp8 and int8 on GPUs from Hopper on, int8 on CPUs; leave it out, or take one of these"
    )


def _widths(name: str, facts: Facts, machine: Machine | None) -> Iterator[str]:
    kind = quantization_type(name)
    on_cpu = machine is not None and not machine.cuda
    group = GROUP_COLUMNS.get(kind.weights) or (_CPU_COLUMNS.get(kind.weights) if on_cpu else None)
    if group is None or facts.quantized.method not in ("", "gguf"):
        return
    for tensor, info in facts.tensors.items():
        of = classify(tensor)
        chosen = of in ("mlp", "experts") or (of == "attention" and kind.layers == "all")
        small = tensor.endswith((".gate.weight", ".router.weight", ".shared_expert_gate.weight"))
        if (
            chosen
            and not small
            and tensor.endswith(".weight")
            and len(info.shape) == 2
            and info.shape[1] % group
        ):
            yield (
                f"quantization is {name!r}, whose scales are for {group} columns each, and {tensor} has "
                f"{info.shape[1]}; take a type with smaller groups or with a scale a row (fp8)"
            )
            return
