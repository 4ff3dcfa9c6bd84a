"""``patch_kwargs`` and the ``bis_llm`` block: options written for other engines, read for ours."""

from __future__ import annotations

from typing import Any

from headrace.config.foreign import ENGINE_OPTIONS
from headrace.config.report import Place
from headrace.config.schema.fields import F, Field, Section
from headrace.config.schema.types import (
    REQUIRED,
    Anything,
    Bool,
    Enum,
    Float,
    Int,
    ListOf,
    MapOf,
    Reading,
    Str,
    Type,
)
from headrace.config.yaml import Node
from headrace.errors import nearest

__all__ = ["BIS_CONFIG", "BIS_LLM", "PATCH_KWARGS", "SPECULATIVE_CONFIG"]

_TUNED = "kernels are chosen by this engine"
_STATS = "step statistics are always at /metrics"

SPECULATIVE_CONFIG = Section(
    "speculative_config",
    "Drafting by a model or by n-grams.",
    F(
        "decoding_type",
        Enum("EAGLE", "MTP", "NGRAM", fold=True),
        REQUIRED,
        "Kind of drafter.",
        to="speculation",
    ),
    F("speculative_model_dir", Str(), None, "Draft head; required for Eagle.", to="speculation"),
    F("num_nextn_predict_layers", Int(1), None, "Prediction layers; required for MTP.", to="speculation"),
    F("max_draft_len", Int(1, 2048), None, "Draft tokens a step.", to="speculation"),
    F("eagle3_one_model", Bool(), None, "Draft and target in one graph.", no_effect=_TUNED),
)

KV_CACHE_CONFIG = Section(
    "kv_cache_config",
    "The KV cache.",
    F(
        "free_gpu_memory_fraction",
        Float(0, 1, above=True),
        None,
        "Share of free memory for the cache.",
        to="memory_fraction",
        differs="is the share of the whole GPU that the server takes, weights included; not of what they leave free",
    ),
    F("enable_block_reuse", Bool(), True, "Share prefixes between requests.", to="prefix_caching"),
    F("enable_partial_reuse", Bool(), True, "Reuse parts of blocks.", no_effect="whole blocks are shared"),
    F(
        "dtype",
        Enum("auto", "fp8", "bf16", "fp16", "nvfp4"),
        "auto",
        "Format of the cache.",
        to="kv_cache_dtype",
    ),
    F("host_cache_size", Int(0), None, "Host memory for blocks, bytes.", to="host_kv_bytes"),
    F(
        "event_buffer_max_size",
        Int(0),
        None,
        "Buffered KV events.",
        no_effect="events are sent as they happen",
    ),
)

CUDA_GRAPHS = Section(
    "cuda_graph_config",
    "CUDA graphs; null turns them off.",
    F("enable_padding", Bool(), False, "Round batches up to a captured size.", no_effect=_TUNED),
    F("batch_sizes", ListOf(Int(1)), [], "Captured sizes.", no_effect=_TUNED),
    F("max_batch_size", Int(1), None, "Largest captured size.", no_effect=_TUNED),
)

MOE_CONFIG = Section(
    "moe_config",
    "Kernels of mixture-of-experts layers.",
    F("backend", Str(), None, "Kernel family.", no_effect=_TUNED),
    F(
        "use_low_precision_moe_combine",
        Bool(),
        False,
        "Combine in low precision.",
        no_effect="never done here",
    ),
    F("load_balancer", Anything(), None, "Expert placement.", no_effect=_TUNED),
)

PATCH_KWARGS = Section(
    "patch_kwargs",
    "Keys seen in public configurations. Anything else is refused: it would mean nothing here.",
    F(
        "model_path",
        Str(min_length=1),
        None,
        "Folder of the weights, mounted by `weights` or `model_cache`.",
        to="model",
    ),
    F(
        "backend",
        Enum("pytorch", "tensorrt", "_autodeploy"),
        "pytorch",
        "Engine below.",
        no_effect="one engine here",
    ),
    F("disable_overlap_scheduler", Bool(), False, "Do not prepare steps ahead.", to="overlap"),
    F("enable_iter_perf_stats", Bool(), False, "Statistics of each step.", no_effect=_STATS),
    F("autotuner_enabled", Bool(), True, "Kernel tuning.", no_effect=_TUNED, aliases=("enable_autotuner",)),
    F("enable_trtllm_sampler", Bool(), False, "Sampler.", no_effect="one sampler, on the device"),
    F("max_beam_width", Int(1, 1), 1, "Beam search is not supported.", no_effect="no beam search"),
    F("max_input_len", Int(1), None, "Longest prompt.", differs="a prompt is bounded by max_seq_len"),
    F("tokenizer_limit_length", Int(1), None, "Longest text.", differs="a prompt is bounded by max_seq_len"),
    F(
        "trust_remote_code",
        Bool(),
        False,
        "Run code from the checkpoint.",
        no_effect="code of a checkpoint never runs",
    ),
    F("kv_cache_config", KV_CACHE_CONFIG, {}, "The KV cache."),
    F("cuda_graph_config", CUDA_GRAPHS, None, "CUDA graphs.", to="eager"),
    F("moe_expert_parallel_size", Int(1), None, "GPUs that share the experts.", to="expert_parallel_size"),
    F("moe_config", MOE_CONFIG, {}, "Expert kernels."),
    F("speculative_config", SPECULATIVE_CONFIG, None, "Drafting.", to="speculation"),
    F(
        "guided_decoding_backend",
        Enum("xgrammar", "outlines", "llguidance"),
        None,
        "Structured output.",
        no_effect="structured output is always on, by llguidance",
    ),
    F("tool_call_parser", Str(), None, "Reader of tool calls.", to="tool_call_parser"),
    F("reasoning_parser", Str(), None, "Reader of thinking.", to="reasoning_parser"),
    F("chat_processor", Enum("harmony"), None, "Chat format.", no_effect="known from the checkpoint"),
    F("model_level_stop_words", ListOf(Str()), [], "Stop strings of every request.", to="stop"),
    elsewhere={
        "build_config": "repeats the build block; remove it",
        **{
            name: f"repeats a key of the runtime block; set trt_llm.runtime.{name} instead"
            for name in (
                *("max_seq_len", "max_batch_size", "max_num_tokens", "tensor_parallel_size"),
                *("enable_chunked_prefill", "served_model_name", "patch_kwargs", "gated_features"),
            )
        },
    },
)


class EngineOptions(Type):
    """A mapping of native options of TensorRT-LLM or vLLM; unknown names and wrong types are refused."""

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        if not isinstance(node.value, dict):
            return reading.wrong(f"is {node.kind()}; expected a mapping", path, node.place)
        values = {}
        for name, child in node.value.items():
            inner, place = f"{path}.{name}", node.key_places[name]
            reading.places[inner] = place
            values[name] = self._option(name, child, inner, place, reading)
        return values

    def _option(self, name: str, child: Node, path: str, place: Place, reading: Reading) -> Any:
        patch, option = PATCH_KWARGS.by_name.get(name), ENGINE_OPTIONS.get(name)
        if name == "speculative_config":
            return reading.wrong("stands one level up: bis_llm.config.speculative_config", path, place)
        if patch is not None:
            return None if child.value is None else patch.type.read(child, path, reading)
        if option is None:
            known = [*ENGINE_OPTIONS, *PATCH_KWARGS.by_name]
            return reading.wrong(f"unknown engine option{nearest(name, known)}", path, place)
        if not option.accepts(child.plain()):
            return reading.wrong(f"is {child.kind()}; expected {option.expects}", path, child.place)
        return child.plain()

    def describe(self) -> str:
        return "map of native options"


_ROUTING = "there is no router here yet"

ROUTING = Section(
    "b10_routing_config",
    "KV-aware routing.",
    F("router_queue_policy", Enum("fcfs", "wspt"), "fcfs", "Order of waiting requests.", no_effect=_ROUTING),
    F("router_overlap_score_weight", Float(0), 3.5, "Cache against balance.", no_effect=_ROUTING),
    F("router_temperature", Float(0), 0.05, "Spread.", no_effect=_ROUTING),
)

DISAGGREGATION = Section(
    "b10_disagg_config",
    "Separate prefill and decode workers.",
    F(
        "prefill_workers_per_replica",
        Int(1),
        REQUIRED,
        "Prefill workers of a unit.",
        not_yet="no separate prefill",
    ),
    F(
        "decode_workers_per_replica",
        Int(1),
        REQUIRED,
        "Decode workers of a unit.",
        not_yet="no separate prefill",
    ),
)

_PLATFORM = "scaling is the platform's; here run more replicas"

BIS_CONFIG = Section(
    "bis_llm.config",
    "The deployment. `engine_config` takes TensorRT-LLM's or vLLM's names, whatever the backend.",
    F("engine_backend", Enum("trtllm", "vllm"), None, "Engine below.", no_effect="one engine here"),
    F("gpuTRTImage", Str(), None, "Exact image instead of a backend.", no_effect="one engine here"),
    F(
        "checkpoint_name",
        Str(min_length=1),
        REQUIRED,
        "Checkpoint: a hub id or the name of a mounted folder.",
        to="model",
    ),
    F("model_name", Str(min_length=1), REQUIRED, "Name of the deployment.", to="served_names"),
    F("served_model_name", Str(numbers=True), None, "Name in replies.", to="served_names"),
    F("model_path", Str(min_length=1), None, "Folder of the weights.", to="model"),
    F(
        "model_path_for_tokenizer",
        Str(),
        None,
        "Folder of the tokenizer.",
        differs="taken from the model's folder",
    ),
    F("tensor_parallel_size", Int(1), 1, "GPUs of one replica.", to="tensor_parallel_size"),
    F("engine_config", EngineOptions(), {}, "Options in the backend's own names; see the migration page."),
    F("tokenizer_limit_length", Int(1), None, "Longest text.", differs="a prompt is bounded by the context"),
    F(
        "additional_environment_variables",
        MapOf(Anything()),
        {},
        "Per worker.",
        no_effect="set them on the process",
    ),
    F("b10_routing_config", ROUTING, None, "KV-aware routing."),
    F(
        "is_disaggregated",
        Bool(),
        False,
        "Separate prefill and decode.",
        not_yet="no separate prefill and decode",
    ),
    F("b10_disagg_config", DISAGGREGATION, None, "Workers of a unit; needs `is_disaggregated: true`."),
    F("speculative_config", SPECULATIVE_CONFIG, None, "Drafting.", to="speculation"),
    F("tool_call_parser", Str(), None, "Reader of tool calls.", to="tool_call_parser"),
    F("reasoning_parser", Str(), None, "Reader of thinking.", to="reasoning_parser"),
    F("b10_autoscaling_config", MapOf(Anything()), {}, "Scale-down.", no_effect=_PLATFORM),
)


def _metric_fields() -> tuple[Field, ...]:
    return (
        F("name", Str(min_length=1), REQUIRED, "Metric, such as `in_flight_tokens`."),
        F("target", Float(), REQUIRED, "Target of one replica."),
    )


BIS_LLM = Section(
    "bis_llm",
    "The newer way to describe a stack v2 deployment, without `trt_llm`.",
    F("version", Str(numbers=True), "", "Version of the hosted stack.", no_effect="one engine here"),
    F("config", BIS_CONFIG, None, "The deployment."),
    F(
        "additional_autoscaling_config",
        Section(
            "additional_autoscaling_config",
            "Scaling signals.",
            F(
                "metrics",
                ListOf(Section("metrics", "One signal.", *_metric_fields())),
                REQUIRED,
                "Signals.",
                no_effect=_PLATFORM,
            ),
        ),
        None,
        "Scaling signals.",
    ),
)
