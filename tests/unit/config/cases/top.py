"""Top level and trt_llm.build: sections 1.1 and 1.2."""

from __future__ import annotations

from unit.config.cases.base import (
    DELETE,
    V1,
    V2,
    B,
    Case,
    R,
)

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
