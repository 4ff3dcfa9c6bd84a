"""One case a rule: a change to a good configuration that breaks it, and one that just passes."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import yaml

V1: dict[str, Any] = {
    "resources": {"accelerator": "H100"},
    "trt_llm": {"build": {"checkpoint_repository": {"source": "HF", "repo": "owner/name"}}},
}
V2: dict[str, Any] = {
    "resources": {"accelerator": "H100:2"},
    "trt_llm": {
        "inference_stack": "v2",
        "build": {"checkpoint_repository": {"source": "HF", "repo": "owner/name"}},
        "runtime": {},
    },
}
BIS: dict[str, Any] = {
    "bis_llm": {"config": {"engine_backend": "vllm", "checkpoint_name": "owner/name", "model_name": "m"}}
}
PLAIN: dict[str, Any] = {"model_metadata": {"headrace": {"model": "owner/name"}}}
LOOKAHEAD = {
    "speculative_decoding_mode": "LOOKAHEAD_DECODING",
    "lookahead_windows_size": 3,
    "lookahead_ngram_size": 8,
    "lookahead_verification_set_size": 3,
}
DOCKER = {
    "start_command": "serve",
    "server_port": 8000,
    "predict_endpoint": "/p",
    "readiness_endpoint": "/r",
    "liveness_endpoint": "/l",
}
B = "trt_llm.build"
R = "trt_llm.runtime"
P = "trt_llm.runtime.patch_kwargs"
DELETE = object()


@dataclass(frozen=True)
class Case:
    """Attributes: path: of the expected problem; says: text that it contains."""

    name: str
    base: dict[str, Any]
    bad: dict[str, Any]
    path: str
    says: str
    good: dict[str, Any] = field(default_factory=dict)
    hosted: bool = True  # the hosted package refuses `bad` too, at parsing

    def __str__(self) -> str:
        return self.name


def build(base: dict[str, Any], changes: dict[str, Any]) -> str:
    """YAML text of a base with dotted keys set."""
    config = copy.deepcopy(base)
    for path, value in changes.items():
        *parents, last = path.split(".")
        block = config
        for name in parents:
            block = block.setdefault(name, {})
        if value is DELETE:
            block.pop(last, None)
        else:
            block[last] = value
    return yaml.safe_dump(config, sort_keys=False)


def look(**changes: Any) -> dict[str, Any]:
    return {f"{B}.speculator": {**LOOKAHEAD, **changes}}


def encoder(**changes: Any) -> dict[str, Any]:
    return {f"{B}.base_model": "encoder", **{f"{B}.{name}": value for name, value in changes.items()}}


def weights(**changes: Any) -> dict[str, Any]:
    return {"weights": [{"source": "hf://o/n@main", "mount_location": "/m", **changes}]}


def cache(**changes: Any) -> dict[str, Any]:
    entry = {"repo_id": "o/n", "revision": "main", "use_volume": True, "volume_folder": "x", **changes}
    return {"model_cache": [{name: value for name, value in entry.items() if value is not DELETE}]}


def auth(method: str, **keys: Any) -> dict[str, Any]:
    return weights(source="s3://b/p", auth={"auth_method": method, **keys})


def docker(**changes: Any) -> dict[str, Any]:
    return {
        "docker_server": {k: v for k, v in {**DOCKER, **changes}.items() if v is not DELETE},
    }


ROLE = {"aws_oidc_role_arn": "arn:x", "aws_oidc_region": "us-east-1"}
GCP = {"gcp_oidc_service_account": "a@b", "gcp_oidc_workload_id_provider": "p"}
ASSUME = {"aws_assume_role_arn": "arn:x", "aws_assume_role_region": "us-east-1"}

TOP_CASES = [  # 1.1
    Case(
        "stack",
        V1,
        {"trt_llm.inference_stack": "v3"},
        "trt_llm.inference_stack",
        "v1, v2",
        {"trt_llm.inference_stack": "v1"},
    ),
    Case("build-required", V1, {B: DELETE}, B, "required"),
    Case("v2-runtime-required", V2, {R: DELETE}, R, "required", {R: {"max_batch_size": 1}}),
    *(
        Case(
            f"version-{name}",
            V1,
            {f"trt_llm.version_overrides.{name}": "v0.1"},
            f"trt_llm.version_overrides.{name}",
            "start with a digit",
            {
                f"trt_llm.version_overrides.{name}": "0.1",
                "trt_llm.version_overrides.v2_llm_version": "main",  # the one without the rule
            },
        )
        for name in ("engine_builder_version", "briton_version", "bei_version", "bei_bert_version")
    ),
]

BUILD_CASES = [  # 1.2
    *(
        Case(f"renamed-{name}", V1, {f"{B}.base_model": name}, f"{B}.base_model", "write `decoder`")
        for name in ("llama", "qwen", "mistral", "deepseek", "palmyra")
    ),
    Case(
        "base-model",
        V1,
        {f"{B}.base_model": "decodr"},
        f"{B}.base_model",
        "'decoder'",
        {f"{B}.base_model": "decoder"},
    ),
    Case(
        "checkpoint-v1",
        V1,
        {f"{B}.checkpoint_repository": DELETE},
        f"{B}.checkpoint_repository",
        "required in stack v1",
    ),
    Case(
        "max-seq-low",
        V1,
        {f"{B}.max_seq_len": 0},
        f"{B}.max_seq_len",
        "1 to 1048576",
        {f"{B}.max_seq_len": 1},
    ),
    Case(
        "max-seq-high",
        V1,
        {f"{B}.max_seq_len": 1048577},
        f"{B}.max_seq_len",
        "1 to",
        {f"{B}.max_seq_len": 1048576},
    ),
    Case(
        "max-seq-text",
        V1,
        {f"{B}.max_seq_len": "8192"},
        f"{B}.max_seq_len",
        "without quotes",
        {f"{B}.max_seq_len": 8192},
    ),
    Case(
        "max-seq-float",
        V1,
        {f"{B}.max_seq_len": 8192.5},
        f"{B}.max_seq_len",
        "integer",
        {f"{B}.max_seq_len": 8192},
    ),
    Case(
        "batch-low",
        V1,
        {f"{B}.max_batch_size": 0},
        f"{B}.max_batch_size",
        "1 to 2048",
        {f"{B}.max_batch_size": 1},
    ),
    Case(
        "batch-high",
        V1,
        {f"{B}.max_batch_size": 2049},
        f"{B}.max_batch_size",
        "1 to 2048",
        {f"{B}.max_batch_size": 2048},
    ),
    Case(
        "tokens-low",
        V1,
        {f"{B}.max_num_tokens": 64},
        f"{B}.max_num_tokens",
        "65 to",
        {f"{B}.max_num_tokens": 65},
    ),
    Case(
        "tokens-high",
        V1,
        {f"{B}.max_num_tokens": 1048577},
        f"{B}.max_num_tokens",
        "65 to",
        {f"{B}.max_num_tokens": 1048576},
    ),
    Case(
        "beam",
        V1,
        {f"{B}.max_beam_width": 2},
        f"{B}.max_beam_width",
        "1; no other",
        {f"{B}.max_beam_width": 1},
    ),
    Case(
        "tp-zero",
        V1,
        {f"{B}.tensor_parallel_count": 0},
        f"{B}.tensor_parallel_count",
        "at least 1",
        {f"{B}.tensor_parallel_count": 1},
    ),
    Case(
        "moe-over-tp",
        V1,
        {f"{B}.moe_expert_parallel_option": 2},
        f"{B}.moe_expert_parallel_option",
        "above tensor_parallel_count",
        {f"{B}.moe_expert_parallel_option": 1},
    ),
    Case(
        "moe-zero",
        V1,
        {f"{B}.moe_expert_parallel_option": 0},
        f"{B}.moe_expert_parallel_option",
        "-1 or 1",
        {f"{B}.moe_expert_parallel_option": -1},
    ),
    Case(
        "paged-fmha",
        V1,
        {f"{B}.plugin_configuration.paged_kv_cache": False},
        f"{B}.plugin_configuration.paged_kv_cache",
        "set both or neither",
        {
            f"{B}.plugin_configuration.paged_kv_cache": False,
            f"{B}.plugin_configuration.use_paged_context_fmha": False,
            f"{R}.enable_chunked_context": False,
        },
    ),
    Case(
        "moe-below",
        V1,
        {f"{B}.moe_expert_parallel_option": -2},
        f"{B}.moe_expert_parallel_option",
        "-1 or 1",
        {
            "resources.accelerator": "H100:2",
            f"{B}.tensor_parallel_count": 2,
            f"{B}.moe_expert_parallel_option": 2,
        },
    ),
    Case(
        "lora-rank",
        V1,
        {f"{B}.lora_configuration.max_lora_rank": 0},
        f"{B}.lora_configuration.max_lora_rank",
        "at least 1",
        {f"{B}.lora_configuration.max_lora_rank": 1},
        hosted=False,
    ),
    Case(
        "builder-gpus",
        V1,
        {f"{B}.num_builder_gpus": 0},
        f"{B}.num_builder_gpus",
        "at least 1",
        {f"{B}.num_builder_gpus": 1},
    ),
    Case(
        "lora-name",
        V1,
        {f"{B}.lora_adapters": {"a b": {"source": "HF", "repo": "o/n"}}},
        f"{B}.lora_adapters.a b",
        "letters, digits",
        {f"{B}.lora_adapters": {"a-b_c:1": {"source": "HF", "repo": "o/n"}}},
    ),
    *(
        Case(
            f"misplaced-{name}",
            V1,
            {f"{B}.{name}": value},
            f"{B}.{name}",
            "trt_llm.runtime, not trt_llm.build",
            {f"{R}.{name}": value},
        )
        for name, value in (
            ("lora_cache_max_adapter_size", 8),
            ("lora_cache_optimal_adapter_size", 8),
            ("lora_cache_gpu_memory_fraction", 0.5),
            ("lora_cache_host_memory_bytes", 8),
        )
    ),
    Case(
        "unknown-build",
        V1,
        {f"{B}.max_sequence_len": 1},
        f"{B}.max_sequence_len",
        "'max_seq_len'",
        {f"{B}.max_seq_len": 1},
        hosted=False,
    ),
]

RUNTIME_CASES = [  # 1.3
    Case(
        "kv-fraction",
        V1,
        {f"{R}.kv_cache_free_gpu_mem_fraction": 1.5},
        f"{R}.kv_cache_free_gpu_mem_fraction",
        "at most 1",
        {f"{R}.kv_cache_free_gpu_mem_fraction": 1},
        hosted=False,
    ),
    Case(
        "kv-host",
        V1,
        {f"{R}.kv_cache_host_memory_bytes": 0},
        f"{R}.kv_cache_host_memory_bytes",
        "at least 1",
        {f"{R}.kv_cache_host_memory_bytes": 1},
    ),
    Case(
        "chunked-flags",
        V1,
        {
            f"{B}.plugin_configuration.paged_kv_cache": False,
            f"{B}.plugin_configuration.use_paged_context_fmha": False,
        },
        f"{R}.enable_chunked_context",
        "needs plugin_configuration",
        {f"{B}.plugin_configuration.use_paged_context_fmha": False, f"{R}.enable_chunked_context": False},
    ),
    Case(
        "policy",
        V1,
        {f"{R}.batch_scheduler_policy": "greedy"},
        f"{R}.batch_scheduler_policy",
        "max_utilization",
        {f"{R}.batch_scheduler_policy": "max_utilization"},
    ),
    Case(
        "default-tokens",
        V1,
        {f"{R}.request_default_max_tokens": 0},
        f"{R}.request_default_max_tokens",
        "at least 1",
        {f"{R}.request_default_max_tokens": 1},
    ),
    Case(
        "route",
        V1,
        {f"{R}.webserver_default_route": "/embed"},
        f"{R}.webserver_default_route",
        "/v1/embeddings",
        {f"{R}.webserver_default_route": "/predict_tokens"},
    ),
    Case(
        "lora-fraction",
        V1,
        {f"{R}.lora_cache_gpu_memory_fraction": 1.1},
        f"{R}.lora_cache_gpu_memory_fraction",
        "at most 1",
        {f"{R}.lora_cache_gpu_memory_fraction": 1.0},
    ),
    Case(
        "lora-fraction-zero",
        V1,
        {f"{R}.lora_cache_gpu_memory_fraction": 0.0},
        f"{R}.lora_cache_gpu_memory_fraction",
        "above 0",
        {f"{R}.lora_cache_gpu_memory_fraction": 0.1},
    ),
    *(
        Case(
            f"zero-{name}",
            V1,
            {f"{R}.{name}": 0},
            f"{R}.{name}",
            "at least 1",
            {f"{R}.{name}": 1},
            hosted=hosted,
        )
        for name, hosted in (
            ("lora_cache_max_adapter_size", True),
            ("lora_cache_optimal_adapter_size", True),
            ("lora_cache_host_memory_bytes", True),
            ("total_token_limit", False),
        )
    ),
    Case(
        "lora-optimal",
        V1,
        {f"{R}.lora_cache_max_adapter_size": 8, f"{R}.lora_cache_optimal_adapter_size": 9},
        f"{R}.lora_cache_optimal_adapter_size",
        "above lora_cache_max_adapter_size",
        {f"{R}.lora_cache_max_adapter_size": 8, f"{R}.lora_cache_optimal_adapter_size": 8},
    ),
    Case(
        "v2-name-in-v1",
        V1,
        {f"{R}.enable_chunked_prefill": True},
        f"{R}.enable_chunked_prefill",
        "v2 name",
        {f"{R}.enable_chunked_context": True},
        hosted=False,
    ),
]

V2_CASES = [  # 1.4
    *(
        Case(
            f"v2-build-{name}",
            V2,
            {f"{B}.{name}": bad},
            f"{B}.{name}",
            "not allowed with stack v2",
            {f"{B}.{name}": good},
        )
        for name, bad, good in (
            ("base_model", "encoder", "decoder"),
            ("max_num_tokens", 4096, 8192),
            ("max_batch_size", 32, 256),
            ("max_seq_len", 4096, None),
            ("tensor_parallel_count", 2, 1),
            ("gather_all_token_logits", True, False),
            ("strongly_typed", True, False),
            ("max_prompt_embedding_table_size", 1, 0),
            ("pipeline_parallel_count", 2, 1),
            ("sequence_parallel_count", 2, 1),
            ("moe_expert_parallel_option", 1, -1),
            ("plugin_configuration", {}, DELETE),
            ("speculator", LOOKAHEAD, None),
            ("lora_adapters", {"a": {"source": "HF", "repo": "o/n"}}, None),
            ("lora_configuration", {"max_lora_rank": 8}, None),
        )
    ),
    Case(
        "v2-checkpoint",
        V2,
        {f"{B}.checkpoint_repository": DELETE},
        f"{B}.checkpoint_repository",
        "skip_build_result",
        {f"{B}.checkpoint_repository": DELETE, f"{B}.skip_build_result": True},
    ),
    Case(
        "v2-seq-low",
        V2,
        {f"{R}.max_seq_len": 0},
        f"{R}.max_seq_len",
        "1 to 1048576",
        {f"{R}.max_seq_len": 1},
    ),
    Case(
        "v2-seq-high",
        V2,
        {f"{R}.max_seq_len": 1048577},
        f"{R}.max_seq_len",
        "1 to 1048576",
        {f"{R}.max_seq_len": 1048576},
    ),
    Case(
        "v2-batch-low",
        V2,
        {f"{R}.max_batch_size": 0},
        f"{R}.max_batch_size",
        "1 to 2048",
        {f"{R}.max_batch_size": 1},
    ),
    Case(
        "v2-batch-high",
        V2,
        {f"{R}.max_batch_size": 2049},
        f"{R}.max_batch_size",
        "1 to 2048",
        {f"{R}.max_batch_size": 2048},
    ),
    Case(
        "v2-tokens-low",
        V2,
        {f"{R}.max_num_tokens": 64},
        f"{R}.max_num_tokens",
        "65 to 131072",
        {f"{R}.max_num_tokens": 65},
    ),
    Case(
        "v2-tokens-high",
        V2,
        {f"{R}.max_num_tokens": 131073},
        f"{R}.max_num_tokens",
        "65 to 131072",
        {f"{R}.max_num_tokens": 131072},
    ),
    Case(
        "v2-tp-zero",
        V2,
        {f"{R}.tensor_parallel_size": 0},
        f"{R}.tensor_parallel_size",
        "at least 1",
        {f"{R}.tensor_parallel_size": 1},
    ),
    Case(
        "v2-tp-over-gpus",
        V2,
        {f"{R}.tensor_parallel_size": 4},
        f"{R}.tensor_parallel_size",
        "has 2 GPU",
        {f"{R}.tensor_parallel_size": 2},
        hosted=False,
    ),
    Case(
        "v2-old-name",
        V2,
        {f"{R}.enable_chunked_context": True},
        f"{R}.enable_chunked_context",
        "v1 name",
        {f"{R}.enable_chunked_prefill": True},
        hosted=False,
    ),
    *(
        Case(
            f"patch-repeats-{name}",
            V2,
            {f"{P}.{name}": value},
            f"{P}.{name}",
            "repeats",
            {f"{R}.{name}": value},
            hosted=False,
        )
        for name, value in (
            ("max_seq_len", 8),
            ("max_batch_size", 8),
            ("max_num_tokens", 128),
            ("tensor_parallel_size", 2),
            ("enable_chunked_prefill", False),
            ("served_model_name", "x"),
        )
    ),
    Case("patch-build-config", V2, {f"{P}.build_config": {}}, f"{P}.build_config", "repeats", hosted=False),
    Case(
        "patch-unknown",
        V2,
        {f"{P}.disable_overlap_sheduler": True},
        f"{P}.disable_overlap_sheduler",
        "'disable_overlap_scheduler'",
        {f"{P}.disable_overlap_scheduler": True},
        hosted=False,
    ),
    Case(
        "patch-eagle",
        V2,
        {f"{P}.speculative_config": {"decoding_type": "Eagle"}},
        f"{P}.speculative_config",
        "speculative_model_dir",
        {f"{P}.speculative_config": {"decoding_type": "eagle", "speculative_model_dir": "/x"}},
        hosted=False,
    ),
    Case(
        "patch-mtp",
        V2,
        {f"{P}.speculative_config": {"decoding_type": "MTP"}},
        f"{P}.speculative_config",
        "num_nextn_predict_layers",
        {f"{P}.speculative_config": {"decoding_type": "MTP", "num_nextn_predict_layers": 3}},
        hosted=False,
    ),
]

CHECKPOINT_CASES = [  # 1.5
    Case(
        "source-case",
        V1,
        {f"{B}.checkpoint_repository.source": "s3"},
        f"{B}.checkpoint_repository.source",
        "upper case: S3",
        {f"{B}.checkpoint_repository": {"source": "S3", "repo": "s3://b/p"}},
    ),
    Case(
        "source-required",
        V1,
        {f"{B}.checkpoint_repository": {"repo": "o/n"}},
        f"{B}.checkpoint_repository.source",
        "required",
    ),
    Case(
        "repo-required",
        V1,
        {f"{B}.checkpoint_repository": {"source": "HF"}},
        f"{B}.checkpoint_repository.repo",
        "required",
    ),
    Case(
        "hf-id",
        V1,
        {f"{B}.checkpoint_repository.repo": "a/b/c"},
        f"{B}.checkpoint_repository.repo",
        "repository id",
        {f"{B}.checkpoint_repository.repo": "a/b.c"},
    ),
    Case(
        "hf-dashes",
        V1,
        {f"{B}.checkpoint_repository.repo": "a/b--c"},
        f"{B}.checkpoint_repository.repo",
        "repository id",
        {f"{B}.checkpoint_repository.repo": "a/b-c"},
    ),
    Case(
        "gcs-form",
        V1,
        {f"{B}.checkpoint_repository": {"source": "GCS", "repo": "s3://b"}},
        f"{B}.checkpoint_repository.repo",
        "gs://",
        {f"{B}.checkpoint_repository": {"source": "GCS", "repo": "gs://b/p"}},
        hosted=False,
    ),
    Case(
        "s3-form",
        V1,
        {f"{B}.checkpoint_repository": {"source": "S3", "repo": "gs://b/p"}},
        f"{B}.checkpoint_repository.repo",
        "s3://",
        {f"{B}.checkpoint_repository": {"source": "S3", "repo": "s3://b/p"}},
        hosted=False,
    ),
    Case(
        "azure-form",
        V1,
        {f"{B}.checkpoint_repository": {"source": "AZURE", "repo": "b"}},
        f"{B}.checkpoint_repository.repo",
        "az://",
        {f"{B}.checkpoint_repository": {"source": "AZURE", "repo": "az://b/p"}},
        hosted=False,
    ),
    Case(
        "url-form",
        V1,
        {f"{B}.checkpoint_repository": {"source": "REMOTE_URL", "repo": "b"}},
        f"{B}.checkpoint_repository.repo",
        "https://",
        {f"{B}.checkpoint_repository": {"source": "REMOTE_URL", "repo": "https://x/y.tgz"}},
        hosted=False,
    ),
    Case(
        "lora-repo",
        V1,
        {f"{B}.lora_adapters": {"a": {"source": "HF", "repo": "x//y"}}},
        f"{B}.lora_adapters.a.repo",
        "repository id",
        {f"{B}.lora_adapters": {"a": {"source": "HF", "repo": "x/y"}}},
    ),
]

QUANTIZATION_CASES = [  # 1.6
    Case(
        "type",
        V1,
        {f"{B}.quantization_type": "fp9"},
        f"{B}.quantization_type",
        "fp8_mlp_only",
        {f"{B}.quantization_type": "fp8_mlp_only"},
    ),
    *(
        Case(
            f"calibration-{key}-{bad}",
            V1,
            {f"{B}.quantization_config.{key}": bad},
            f"{B}.quantization_config.{key}",
            says,
            {f"{B}.quantization_config.{key}": good},
        )
        for key in ("calib_size", "calib_max_seq_length")
        for bad, says, good in (
            (100, "multiple of 64", 128),
            (0, "64 to 16384", 64),
            (16448, "64 to 16384", 16384),
        )
    ),
]

SPECULATOR_CASES = [  # 1.7
    Case(
        "no-mode",
        V1,
        {
            f"{B}.speculator": {
                "num_draft_tokens": 4,
                "checkpoint_repository": {"source": "HF", "repo": "o/n"},
            }
        },
        f"{B}.speculator.speculative_decoding_mode",
        "discontinued",
        look(),
    ),
    Case(
        "external",
        V1,
        look(speculative_decoding_mode="DRAFT_TOKENS_EXTERNAL"),
        f"{B}.speculator.speculative_decoding_mode",
        "discontinued",
        look(),
    ),
    Case(
        "sizes",
        V1,
        {f"{B}.speculator": {"speculative_decoding_mode": "LOOKAHEAD_DECODING", "lookahead_ngram_size": 3}},
        f"{B}.speculator",
        "lookahead_windows_size",
        look(),
    ),
    *(
        Case(f"sizes-{name}", V1, look(**{name: None}), f"{B}.speculator", name, look())
        for name in ("lookahead_ngram_size", "lookahead_verification_set_size")
    ),
    *(
        Case(
            f"zero-{name}",
            V1,
            look(**{name: 0}),
            f"{B}.speculator.{name}",
            "at least 1",
            look(**{name: good}),
        )
        for name, good in (
            ("lookahead_ngram_size", 2),
            ("lookahead_verification_set_size", 1),
            ("num_draft_tokens", 41),
        )
    ),
    Case(
        "window-zero",
        V1,
        look(lookahead_windows_size=0),
        f"{B}.speculator.lookahead_windows_size",
        "at least 1",
        look(lookahead_windows_size=1),
    ),
    Case(
        "draft-short",
        V1,
        look(num_draft_tokens=40),
        f"{B}.speculator.num_draft_tokens",
        "41 draft tokens",
        look(num_draft_tokens=41),
    ),
    Case(
        "draft-long",
        V1,
        look(num_draft_tokens=2049),
        f"{B}.speculator.num_draft_tokens",
        "at most 2048",
        look(num_draft_tokens=2048),
    ),
    Case(
        "draft-computed",
        V1,
        look(lookahead_windows_size=50, lookahead_ngram_size=50, lookahead_verification_set_size=50),
        f"{B}.speculator",
        "4899",
        look(lookahead_windows_size=7),
    ),
    Case(
        "reuse",
        V1,
        {
            **look(),
            f"{B}.plugin_configuration.use_paged_context_fmha": False,
            f"{R}.enable_chunked_context": False,
        },
        f"{B}.plugin_configuration",
        "block reuse",
        look(),
    ),
    Case("encoder", V1, {**look(), **encoder()}, f"{B}.speculator", "for decoders"),
]

CROSS_CASES = [  # 1.8
    Case(
        "world",
        V1,
        {"resources.accelerator": "H100:2"},
        f"{B}.tensor_parallel_count",
        "has 2 GPU",
        {"resources.accelerator": "H100:2", f"{B}.tensor_parallel_count": 2},
    ),
    Case(
        "world-pp",
        V1,
        {
            "resources.accelerator": "H100:2",
            f"{B}.tensor_parallel_count": 2,
            f"{B}.pipeline_parallel_count": 2,
        },
        f"{B}.tensor_parallel_count",
        "= 4",
        {
            "resources.accelerator": "H100:4",
            f"{B}.tensor_parallel_count": 2,
            f"{B}.pipeline_parallel_count": 2,
        },
    ),
    Case(
        "world-sp",
        V1,
        {"resources.accelerator": "H100:2", f"{B}.sequence_parallel_count": 4},
        f"{B}.tensor_parallel_count",
        "= 4",
        {"resources.accelerator": "H100:4", f"{B}.sequence_parallel_count": 4},
    ),
    Case(
        "encoder-gpus",
        V1,
        {f"{B}.tensor_parallel_count": 8},
        f"{B}.tensor_parallel_count",
        "has 1 GPU",
        {"resources.accelerator": "H100:8", **encoder(tensor_parallel_count=8)},
    ),
    *(
        Case(
            f"{gpu}-{base}",
            V1,
            {"resources.accelerator": gpu, f"{B}.base_model": base},
            "resources.accelerator",
            "encoder_bert only",
            {"resources.accelerator": gpu, f"{B}.base_model": "encoder_bert"},
        )
        for gpu in ("T4", "V100")
        for base in ("decoder", "encoder")
    ),
    *(
        Case(
            f"{gpu}-{quant}",
            V1,
            {"resources.accelerator": gpu, f"{B}.quantization_type": quant},
            f"{B}.quantization_type",
            "no_quant",
            {
                "resources.accelerator": "L4" if quant.startswith("fp8") else "B200",
                f"{B}.quantization_type": quant,
            },
        )
        for gpu in ("A10G", "A100", "A100_40GB")
        for quant in ("fp8", "fp8_kv", "fp8_mlp_only", "fp4", "fp4_kv", "fp4_mlp_only")
    ),
    Case(
        "bert-T4-fp8",
        V1,
        {"resources.accelerator": "T4", f"{B}.base_model": "encoder_bert", f"{B}.quantization_type": "fp8"},
        f"{B}.quantization_type",
        "no_quant",
        {"resources.accelerator": "T4", f"{B}.base_model": "encoder_bert"},
        hosted=False,
    ),
    Case(
        "tags",
        V1,
        {"model_metadata": {"tags": ["openai-compatible", "force-legacy-api-non-openai-compatible"]}},
        "model_metadata.tags",
        "exclude each other",
        {"model_metadata": {"tags": ["openai-compatible"]}},
    ),
    Case(
        "legacy-speculator",
        V1,
        {**look(), "model_metadata": {"tags": ["force-legacy-api-non-openai-compatible"]}},
        "model_metadata.tags",
        "speculator",
        {**look(), "model_metadata": {"tags": ["openai-compatible"]}},
        hosted=False,
    ),
    Case("unknown-top", V1, {"resource": {}}, "resource", "'resources'", hosted=False),
    Case("unknown-trt", V1, {"trt_llm.runtim": {}}, "trt_llm.runtim", "'runtime'", hosted=False),
    Case(
        "unknown-runtime",
        V1,
        {f"{R}.served_model_nam": "x"},
        f"{R}.served_model_nam",
        "'served_model_name'",
        {f"{R}.served_model_name": "x"},
        hosted=False,
    ),
]

REST_CASES = [  # 1.9
    Case("cpu", PLAIN, {"resources.cpu": "4 cores"}, "resources.cpu", "500m", {"resources.cpu": "500m"}),
    Case(
        "memory",
        PLAIN,
        {"resources.memory": "16 GiB"},
        "resources.memory",
        "16Gi",
        {"resources.memory": "16Gi"},
    ),
    Case(
        "accelerator",
        PLAIN,
        {"resources.accelerator": "h100"},
        "resources.accelerator",
        "'H100'",
        {"resources.accelerator": "H100"},
    ),
    Case(
        "accelerator-count",
        PLAIN,
        {"resources.accelerator": "H100:0"},
        "resources.accelerator",
        "positive integer",
        {"resources.accelerator": "H100:1"},
    ),
    Case(
        "accelerator-empty",
        PLAIN,
        {"resources.accelerator": ""},
        "resources.accelerator",
        "empty",
        {"resources.accelerator": None},
    ),
    Case(
        "node-count",
        PLAIN,
        {"resources.node_count": 0},
        "resources.node_count",
        "at least 1",
        {"resources.node_count": 1},
    ),
    Case(
        "transport",
        PLAIN,
        {"runtime.transport": {"kind": "quic"}},
        "runtime.transport.kind",
        "websocket",
        {"runtime.transport": {"kind": "grpc"}},
    ),
    Case(
        "workers",
        PLAIN,
        {"runtime.num_workers": 2},
        "runtime.num_workers",
        "1; no other",
        {"runtime.num_workers": 1},
    ),
    Case(
        "egress-ip",
        PLAIN,
        {"runtime.egress_restrictions": {"ip_allow_list": ["::1"]}},
        "runtime.egress_restrictions.ip_allow_list[0]",
        "IPv4",
        {"runtime.egress_restrictions": {"ip_allow_list": ["10.0.0.0/8"]}},
    ),
    Case(
        "egress-host",
        PLAIN,
        {"runtime.egress_restrictions": {"fqdn_allow_list": ["a..b"]}},
        "runtime.egress_restrictions.fqdn_allow_list[0]",
        "host name",
        {"runtime.egress_restrictions": {"fqdn_allow_list": ["*.b.co"]}},
    ),
    Case(
        "cache-revision",
        PLAIN,
        cache(revision=""),
        "model_cache[0].revision",
        "required with use_volume",
        cache(),
    ),
    Case(
        "cache-revision-short",
        PLAIN,
        cache(revision="m"),
        "model_cache[0].revision",
        "at least 2",
        cache(revision="ma"),
    ),
    Case(
        "cache-folder",
        PLAIN,
        cache(volume_folder=DELETE),
        "model_cache[0].volume_folder",
        "required with use_volume",
        cache(),
    ),
    Case("cache-volume", PLAIN, cache(use_volume=DELETE), "model_cache[0].use_volume", "required"),
    Case("cache-kind", PLAIN, cache(kind="HF"), "model_cache[0].kind", "hf", cache(kind="gcs", revision="")),
    Case(
        "cache-mixed",
        PLAIN,
        {"model_cache": [cache()["model_cache"][0], {"repo_id": "o/m", "use_volume": False}]},
        "model_cache",
        "mixes",
        cache(),
        hosted=False,
    ),
    Case(
        "weights-relative",
        PLAIN,
        weights(mount_location="m"),
        "weights[0].mount_location",
        "absolute path",
        weights(),
    ),
    Case(
        "weights-scheme",
        PLAIN,
        weights(source="ftp://x/y"),
        "weights[0].source",
        "unsupported scheme",
        weights(source="gs://x/y"),
    ),
    Case(
        "weights-no-scheme",
        PLAIN,
        weights(source="o/n"),
        "weights[0].source",
        "no scheme",
        weights(source="hf://o/n"),
    ),
    Case(
        "weights-revision",
        PLAIN,
        weights(source="s3://b/p@v1"),
        "weights[0].source",
        "hf:// only",
        weights(source="s3://b/p"),
    ),
    Case(
        "weights-empty-bucket",
        PLAIN,
        weights(source="s3:///p"),
        "weights[0].source",
        "incomplete",
        weights(source="r2://a.b/p"),
    ),
    Case(
        "weights-empty-host",
        PLAIN,
        weights(source="https://"),
        "weights[0].source",
        "incomplete",
        weights(source="https://h/p"),
    ),
    Case(
        "weights-duplicate",
        PLAIN,
        {"weights": weights()["weights"] * 2},
        "weights[1].mount_location",
        "taken by weights[0]",
        {"weights": [*weights()["weights"], {"source": "cw://b/p", "mount_location": "/n"}]},
    ),
    Case("weights-and-cache", PLAIN, {**weights(), **cache()}, "model_cache", "beside weights", weights()),
    Case(
        "secret-twice",
        PLAIN,
        weights(auth_secret_name="a", auth={"auth_method": "CUSTOM_SECRET", "auth_secret_name": "b"}),
        "weights[0].auth_secret_name",
        "given twice",
        weights(auth_secret_name="a"),
    ),
    Case(
        "auth-custom",
        PLAIN,
        auth("CUSTOM_SECRET"),
        "weights[0].auth",
        "needs auth_secret_name",
        auth("custom_secret", auth_secret_name="a"),
    ),
    Case(
        "auth-aws",
        PLAIN,
        auth("AWS_OIDC", aws_oidc_region="r"),
        "weights[0].auth",
        "needs aws_oidc_role_arn",
        auth("AWS_OIDC", **ROLE),
    ),
    Case(
        "auth-gcp",
        PLAIN,
        auth("GCP_OIDC"),
        "weights[0].auth",
        "gcp_oidc_service_account",
        auth("GCP_OIDC", **GCP),
    ),
    Case(
        "auth-assume",
        PLAIN,
        auth("AWS_ASSUME_ROLE"),
        "weights[0].auth",
        "aws_assume_role_arn",
        auth("AWS_ASSUME_ROLE", **ASSUME),
    ),
    Case(
        "auth-foreign",
        PLAIN,
        auth("AWS_OIDC", **ROLE, **GCP),
        "weights[0].auth.gcp_oidc_service_account",
        "cannot stand",
        auth("AWS_OIDC", **ROLE),
    ),
    Case("auth-method", PLAIN, auth("PASSWORD"), "weights[0].auth.auth_method", "CUSTOM_SECRET"),
    Case(
        "bdn-source",
        PLAIN,
        {"bdn.mounts": [{"source": "bdn:x", "path": "/m"}]},
        "bdn.mounts[0].source",
        "bdn:namespace/volume",
        {"bdn.mounts": [{"source": "bdn:ns/vol:tag", "path": "/m"}]},
    ),
    Case(
        "bdn-digest",
        PLAIN,
        {"bdn.mounts": [{"source": "bdn:ns/vol@abc", "path": "/m"}]},
        "bdn.mounts[0].source",
        "12 to 64",
        {"bdn.mounts": [{"source": "bdn:ns/vol@" + "ab" * 6, "path": "/m"}]},
    ),
    Case(
        "bdn-path",
        PLAIN,
        {"bdn.mounts": [{"source": "bdn:ns/vol", "path": "/"}]},
        "bdn.mounts[0].path",
        "below /",
        {"bdn.mounts": [{"source": "bdn:ns/vol", "path": "/m"}]},
    ),
    Case(
        "bdn-filter",
        PLAIN,
        {"bdn.mounts": [{"source": "bdn:ns/vol", "path": "/m", "include": ["../x"]}]},
        "bdn.mounts[0].include[0]",
        "relative pattern",
        {"bdn.mounts": [{"source": "bdn:ns/vol", "path": "/m", "include": ["x/*"]}]},
    ),
    Case(
        "bdn-duplicate",
        PLAIN,
        {"bdn.mounts": [{"source": "bdn:ns/a", "path": "/m"}, {"source": "bdn:ns/b", "path": "/m"}]},
        "bdn.mounts[1].path",
        "taken by",
        {"bdn.mounts": [{"source": "bdn:ns/a", "path": "/m"}, {"source": "bdn:ns/b", "path": "/n"}]},
    ),
    Case(
        "bdn-grants",
        PLAIN,
        {"bdn.access": [{"namespace": "n", "grants": ["pull", "pull"]}]},
        "bdn.access[0].grants",
        "twice",
        {"bdn.access": [{"namespace": "n", "grants": ["pull", "push"]}]},
    ),
    Case(
        "bdn-no-grants",
        PLAIN,
        {"bdn.access": [{"namespace": "n", "grants": []}]},
        "bdn.access[0].grants",
        "at least one",
        {"bdn.access": [{"namespace": "n", "grants": ["tag"]}]},
    ),
    Case(
        "bdn-namespaces",
        PLAIN,
        {"bdn.access": [{"namespace": "n", "grants": ["pull"]}] * 2},
        "bdn.access[1].namespace",
        "taken by",
        {"bdn.access": [{"namespace": "n", "grants": ["pull"]}]},
    ),
    Case(
        "training-both",
        PLAIN,
        {
            "training_checkpoints": {
                "artifact_references": [{"training_job_id": "j"}],
                "loops_checkpoint_ids": ["l"],
            }
        },
        "training_checkpoints.loops_checkpoint_ids",
        "keep one",
        {"training_checkpoints": {"loops_checkpoint_ids": ["l"]}},
    ),
    Case(
        "docker-command",
        PLAIN,
        docker(start_command=DELETE),
        "docker_server.start_command",
        "unless no_build",
        docker(start_command=DELETE, no_build=True),
    ),
    Case(
        "docker-port",
        PLAIN,
        docker(server_port=8080),
        "docker_server.server_port",
        "reserves",
        docker(server_port=8081),
        hosted=False,
    ),
    Case(
        "docker-root",
        PLAIN,
        docker(run_as_user_id=0),
        "docker_server.run_as_user_id",
        "at least 1",
        docker(run_as_user_id=1),
    ),
    Case(
        "docker-user",
        PLAIN,
        docker(run_as_user_id=60000),
        "docker_server.run_as_user_id",
        "reserves",
        docker(run_as_user_id=59999),
    ),
    Case(
        "docker-missing",
        PLAIN,
        docker(liveness_endpoint=DELETE),
        "docker_server.liveness_endpoint",
        "required",
    ),
    Case(
        "docker-ssh",
        PLAIN,
        {**docker(run_as_user_id=5), "runtime.remote_ssh.enabled": True},
        "runtime.remote_ssh.enabled",
        "drop one",
        {**docker(), "runtime.remote_ssh.enabled": True},
    ),
    Case(
        "image-python",
        PLAIN,
        {"base_image": {"image": "x", "python_executable_path": "bin/python"}},
        "base_image.python_executable_path",
        "absolute",
        {"base_image": {"image": "x", "python_executable_path": "/bin/python"}},
    ),
    Case(
        "image-auth",
        PLAIN,
        {"base_image": {"image": "x", "docker_auth": {"auth_method": "GCP_SERVICE_ACCOUNT_JSON"}}},
        "base_image.docker_auth",
        "needs secret_name",
        {
            "base_image": {
                "image": "x",
                "docker_auth": {"auth_method": "gcp_service_account_json", "secret_name": "s"},
            }
        },
    ),
    Case(
        "requirements",
        PLAIN,
        {"requirements": ["x"], "requirements_file": "r.txt"},
        "requirements",
        "keep one",
        {"requirements": ["x"]},
    ),
    Case("python", PLAIN, {"python_version": "py38"}, "python_version", "py313", {"python_version": "py314"}),
    Case("no-cache", PLAIN, {"build.no_cache": True}, "build.no_cache", "flag", {"build.no_cache": False}),
    Case(
        "env-list",
        PLAIN,
        {"environment_variables": {"A": [1]}},
        "environment_variables.A",
        "expected text",
        {"environment_variables": {"A": True}},
        hosted=False,
    ),
    Case(
        "secret-name",
        PLAIN,
        {"secrets": {"a b": None}},
        "secrets.a b",
        "refused",
        {"secrets": {"a-b": None}},
        hosted=False,
    ),
    Case(
        "own-unknown",
        PLAIN,
        {"model_metadata.headrace.max_model_length": 1},
        "model_metadata.headrace.max_model_length",
        "'max_model_len'",
        {"model_metadata.headrace.max_model_len": 1},
        hosted=False,
    ),
    Case(
        "own-range",
        PLAIN,
        {"model_metadata.headrace.memory_fraction": 0},
        "model_metadata.headrace.memory_fraction",
        "above 0",
        {"model_metadata.headrace.memory_fraction": 1},
        hosted=False,
    ),
]

C = "bis_llm.config"
BIS_CASES = [  # 1.10
    Case("config", BIS, {C: DELETE}, C, "required", hosted=False),
    Case(
        "backend",
        BIS,
        {f"{C}.engine_backend": DELETE},
        f"{C}.engine_backend",
        "gpuTRTImage",
        {f"{C}.engine_backend": DELETE, f"{C}.gpuTRTImage": "x"},
        hosted=False,
    ),
    Case(
        "backend-name",
        BIS,
        {f"{C}.engine_backend": "sglang"},
        f"{C}.engine_backend",
        "vllm",
        {f"{C}.engine_backend": "trtllm"},
        hosted=False,
    ),
    Case(
        "checkpoint", BIS, {f"{C}.checkpoint_name": DELETE}, f"{C}.checkpoint_name", "required", hosted=False
    ),
    Case("model-name", BIS, {f"{C}.model_name": DELETE}, f"{C}.model_name", "required", hosted=False),
    Case(
        "option",
        BIS,
        {f"{C}.engine_config": {"max_nun_seqs": 1}},
        f"{C}.engine_config.max_nun_seqs",
        "'max_num_seqs'",
        {f"{C}.engine_config": {"max_num_seqs": 1}},
        hosted=False,
    ),
    Case(
        "option-type",
        BIS,
        {f"{C}.engine_config": {"max_num_seqs": "many"}},
        f"{C}.engine_config.max_num_seqs",
        "an integer",
        {f"{C}.engine_config": {"max_batch_size": 1}},
        hosted=False,
    ),
    Case(
        "disagg-flag",
        BIS,
        {f"{C}.b10_disagg_config": {"prefill_workers_per_replica": 1, "decode_workers_per_replica": 2}},
        f"{C}.is_disaggregated",
        "must be true",
        {
            f"{C}.is_disaggregated": True,
            f"{C}.b10_disagg_config": {"prefill_workers_per_replica": 1, "decode_workers_per_replica": 2},
        },
        hosted=False,
    ),
    Case(
        "disagg-block",
        BIS,
        {f"{C}.is_disaggregated": True},
        f"{C}.b10_disagg_config",
        "both worker counts",
        {f"{C}.is_disaggregated": False},
        hosted=False,
    ),
    Case(
        "disagg-counts",
        BIS,
        {f"{C}.is_disaggregated": True, f"{C}.b10_disagg_config": {"prefill_workers_per_replica": 1}},
        f"{C}.b10_disagg_config.decode_workers_per_replica",
        "required",
        hosted=False,
    ),
    Case(
        "eagle",
        BIS,
        {f"{C}.speculative_config": {"decoding_type": "Eagle"}},
        f"{C}.speculative_config",
        "speculative_model_dir",
        {f"{C}.speculative_config": {"decoding_type": "NGram"}},
        hosted=False,
    ),
    Case(
        "drafts-misplaced",
        BIS,
        {f"{C}.engine_config": {"speculative_config": {}}},
        f"{C}.engine_config.speculative_config",
        "one level up",
        hosted=False,
    ),
    Case("both-blocks", BIS, V1, "bis_llm", "one engine", hosted=False),
    Case(
        "metrics",
        BIS,
        {"bis_llm.additional_autoscaling_config": {"metrics": [{"name": "in_flight_tokens"}]}},
        "bis_llm.additional_autoscaling_config.metrics[0].target",
        "required",
        {
            "bis_llm.additional_autoscaling_config": {
                "metrics": [{"name": "in_flight_tokens", "target": 100000}]
            }
        },
    ),
    Case(
        "autoscaling",
        BIS,
        {"bis_llm.concurrency_target": 3},
        "bis_llm.concurrency_target",
        "unknown key",
        hosted=False,
    ),
]

CASES = [
    *TOP_CASES, *BUILD_CASES, *RUNTIME_CASES, *V2_CASES, *CHECKPOINT_CASES, *QUANTIZATION_CASES,
    *SPECULATOR_CASES, *CROSS_CASES, *REST_CASES, *BIS_CASES,
]  # fmt: skip
