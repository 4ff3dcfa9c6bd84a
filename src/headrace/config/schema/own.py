"""Our own names: every field of EngineSpec, as under ``model_metadata.headrace``, in flags and in Python.

The types here are the one place where their ranges stand.
"""

from __future__ import annotations

import re
from typing import Any

from headrace.config.quantization import TYPES
from headrace.config.schema.common import SOURCES
from headrace.config.schema.fields import F, Section
from headrace.config.schema.trt_llm import ROUTES
from headrace.config.schema.types import REQUIRED, Bool, Enum, Float, Int, ListOf, MapOf, Reading, Str, Type
from headrace.config.yaml import Node

__all__ = ["KV_DTYPES", "OWN", "SCHEMES"]

SCHEMES = tuple(TYPES)
POOLINGS = (
    *(
        "cls",
        "first",
        "last",
        "last_token",
        "lasttoken",
        "max",
        "mean",
        "mean_sqrt_len",
        "mean_sqrt_len_tokens",
    ),
    *("weighted_mean", "weightedmean", "splade", "colbert", "m3", "yes_no"),
)
KV_DTYPES = ("auto", "float32", "bfloat16", "float16", "fp8", "fp4")


class Size(Type):
    """Bytes: an integer, or text such as ``8GiB``, ``8Gi`` or ``500M``."""

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        value = node.value
        if isinstance(value, str):
            match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?", value.strip())
            if match and len(match[1]) < 20:
                base = 1024 if match[3] else 1000
                return int(float(match[1]) * base ** " kMGT".index(match[2].replace("K", "k") or " "))
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            return reading.wrong(f"is {node.text[:40]!r}; expected bytes, such as 8GiB", path, node.place)
        return value

    def describe(self) -> str:
        return "bytes"


_SPECULATION = Section(
    "speculation",
    "Drafts; they never change what is returned.",
    F("method", Enum("lookahead", "ngram", "eagle", "mtp", "draft"), REQUIRED, "Kind of drafter."),
    F("max_draft_tokens", Int(0, 2048), 0, "Longest draft; 0: chosen by the drafter."),
    F("window", Int(0), 0, "Lookahead window w."),
    F("ngram", Int(0), 0, "Lookahead n-gram size n."),
    F("verification", Int(0), 0, "Lookahead verification set v."),
    F("model", Str(), "", "Draft model or head."),
    F("num_layers", Int(0), 0, "Prediction layers of `mtp`."),
)

_ADAPTER = Section(
    "adapter",
    "A LoRA adapter.",
    F("name", Str(min_length=1), REQUIRED, "Name in requests."),
    F("model", Str(min_length=1), REQUIRED, "Where it lies."),
    F("source", Enum("auto", *SOURCES), "auto", "Kind of place."),
    F("revision", Str(numbers=True), None, "Revision."),
    F("secret_name", Str(), "hf_access_token", "Credentials."),
)

_CALIBRATION = Section(
    "calibration",
    "Data for a quantization that needs some.",
    F("dataset", Str(), "abisee/cnn_dailymail", "Hub data set or file."),
    F("num_rows", Int(64, 16384), 1024, "Rows."),
    F("max_tokens", Int(64, 16384), 1536, "Tokens of a row."),
)

_ENGINES = ("auto", "bert", "embed", "dense", "moe", "decoder", "encoder", "speech")

OWN = Section(
    "headrace",
    "Settings of this engine in its own names: under `model_metadata.headrace` in config.yaml, as flags "
    "(`--max-model-len`), and as arguments in Python. They win over the hosted system's keys.",
    F("model", Str(min_length=1), None, "Folder, GGUF file, packaged name or hub id."),
    F("revision", Str(numbers=True), None, "Revision of a hub repository."),
    F("source", Enum("auto", *SOURCES), "auto", "Kind of place that `model` names; `auto`: by its form."),
    F("secret_name", Str(), "hf_access_token", "Name of the secret with credentials."),
    F("allow_patterns", ListOf(Str()), [], "Only these files."),
    F("ignore_patterns", ListOf(Str()), [], "Not these files."),
    F(
        "served_names",
        ListOf(Str(min_length=1, numbers=True)),
        [],
        "Names that clients may use; the first is canonical.",
    ),
    F("engine", Enum(*_ENGINES), "auto", "`decoder` is dense or moe, `encoder` is embed or bert; checked."),
    F("device", Enum("auto", "cpu", "cuda"), "auto", "Device."),
    F("dtype", Enum("auto", "float32", "bfloat16", "float16"), "auto", "Of weights and activations."),
    F("quantization", Enum("", *SCHEMES), "", "Scheme of the weights; empty: the checkpoint's own format."),
    F("kv_cache_dtype", Enum(*KV_DTYPES), "auto", "Format of the KV cache; `auto` is the dtype."),
    F("calibration", _CALIBRATION, {}, "Calibration data."),
    F("max_model_len", Int(1, 16_777_216), None, "Context; absent: the checkpoint's, or what fits."),
    F("max_num_seqs", Int(1, 8192), 256, "Sequences in one step."),
    F("max_num_batched_tokens", Int(1, 1_048_576), None, "Tokens in one step; absent: by device."),
    F("max_queue", Int(0, 1_000_000), 2048, "Waiting requests before 429."),
    F("chunked_prefill", Bool(), True, "Split long prompts over steps."),
    F(
        "admission",
        Enum("reserve", "fill"),
        "fill",
        "Reserve room for whole outputs, or fill and preempt.",
    ),
    F("block_size", Int(8, 256, multiple=8), 16, "Tokens of one KV block."),
    F("kv_cache_bytes", Size(), None, "KV pool; absent: by `memory_fraction`."),
    F("memory_fraction", Float(0, 1, above=True), 0.9, "Share of a GPU's memory that the server takes."),
    F("host_kv_bytes", Size(), 0, "Host memory for KV blocks."),
    F("prefix_caching", Bool(), True, "Share prefixes between requests."),
    F("num_threads", Int(1, 4096), None, "CPU threads; absent: all cores."),
    F("overlap", Bool(), None, "Prepare the next step while this one runs; absent: on with a device."),
    F(
        "quality",
        Enum("off", "warn", "refuse"),
        "off",
        "Whether `headrace verify` must have measured this quantization and cache, within `max_kl` and `min_cosine`.",
    ),
    F(
        "max_kl",
        Float(0, above=True),
        0.05,
        "Mean KL divergence from the 16-bit model that `quality` allows.",
    ),
    F(
        "min_cosine",
        Float(-1, 1),
        0.999,
        "Least cosine of an embedder's vectors with the unquantized model's that `quality` allows.",
    ),
    F("deterministic", Bool(), False, "Results do not depend on the batch."),
    F("eager", Bool(), False, "No CUDA graphs."),
    F("seed", Int(0, 2**63 - 1), 0, "Seed for requests without one."),
    F("tensor_parallel_size", Int(1, 1024), 1, "GPUs of one replica."),
    F("pipeline_parallel_size", Int(1, 1024), 1, "Stages of layers."),
    F("expert_parallel_size", Int(1, 1024), None, "GPUs that share the experts."),
    F("speculation", _SPECULATION, None, "Drafts."),
    F("adapters", ListOf(_ADAPTER), [], "LoRA adapters."),
    F("max_lora_rank", Int(1, 4096), 64, "Largest rank that is served."),
    F("default_max_tokens", Int(1), None, "Output limit of requests that set none."),
    F("stop", ListOf(Str(min_length=1)), [], "Stop strings of every request."),
    F("pooling", Enum(*POOLINGS), None, "For embedders whose checkpoint does not say."),
    F("auto_truncate", Bool(), None, "Cut inputs that are too long; absent: only for `bert`."),
    F("default_route", Enum(*ROUTES), None, "Where `/predict` of an encoder lands."),
    F("chat_template", Str(), None, "File or text instead of the checkpoint's own."),
    F("tool_call_parser", Str(), None, "Reader of tool calls; absent: by checkpoint."),
    F("reasoning_parser", Str(), None, "Reader of thinking; absent: by checkpoint."),
    F("secrets", ListOf(Str(min_length=1)), [], "Names of secrets; never values."),
    F("environment", MapOf(Str(numbers=True)), {}, "Variables of the core's process."),
)
