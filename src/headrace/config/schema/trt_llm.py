"""The ``trt_llm`` block: build and runtime of stacks v1 and v2."""

from __future__ import annotations

from headrace.config.schema.common import CHECKPOINT_REPOSITORY, quantization_fields
from headrace.config.schema.fields import Choice, F, Field, Section
from headrace.config.schema.patch import PATCH_KWARGS
from headrace.config.schema.types import REQUIRED, Anything, Bool, Enum, Float, Int, ListOf, MapOf, Str

__all__ = ["BUILD", "LORA_CACHE_KEYS", "ROUTES", "RUNTIME_V1", "RUNTIME_V2", "SPECULATOR", "TRT_LLM"]

ROUTES = ("/v1/embeddings", "/v1/systemone", "/rerank", "/predict", "/predict_tokens")
LORA_CACHE_KEYS = (
    "lora_cache_max_adapter_size",
    "lora_cache_optimal_adapter_size",
    "lora_cache_gpu_memory_fraction",
    "lora_cache_host_memory_bytes",
)
_RENAMED = "was renamed: write `decoder`; the architecture is read from the checkpoint"
_PAGED = "the cache is always paged and its blocks always reused"
_EXTERNAL = "external drafts are discontinued; use LOOKAHEAD_DECODING"


def _positive() -> Int:
    return Int(1)


PLUGINS = Section(
    "plugin_configuration",
    "Switches of the hosted system's attention plugins. Checked as there; the cache here is always paged.",
    F("paged_kv_cache", Bool(), True, "Paged KV cache.", no_effect=_PAGED),
    F(
        "use_paged_context_fmha",
        Bool(),
        True,
        "Block reuse in prefill; needs `paged_kv_cache`.",
        no_effect=_PAGED,
    ),
    F(
        "use_fp8_context_fmha",
        Bool(),
        False,
        "FP8 prefill attention.",
        no_effect="chosen from the cache's format",
    ),
)

LORA = Section(
    "lora_configuration",
    "Properties of the LoRA adapters.",
    F("max_lora_rank", Int(1, strict=False), 64, "Largest rank that is served.", to="max_lora_rank"),
    F(
        "lora_target_modules",
        ListOf(Str()),
        [],
        "Modules with adapters.",
        no_effect="read from each adapter's adapter_config.json",
    ),
)


_SHARE = "is the share of the whole GPU that the server takes, weights included; not of what they leave free"

_RUNTIME_V1_FIELDS: tuple[Field, ...] = (
    F(
        "kv_cache_free_gpu_mem_fraction",
        Float(0, 1, above=True),
        0.9,
        "Share of free GPU memory for the KV cache.",
        to="memory_fraction",
        differs=_SHARE,
    ),
    F(
        "kv_cache_host_memory_bytes",
        _positive(),
        None,
        "Host memory for KV blocks, bytes.",
        to="host_kv_bytes",
    ),
    F(
        "enable_chunked_context",
        Bool(),
        True,
        "Split long prompts over steps; needs both plugin flags for decoders.",
        to="chunked_prefill",
    ),
    F(
        "batch_scheduler_policy",
        Enum("guaranteed_no_evict", "max_utilization"),
        "guaranteed_no_evict",
        "Reserve room for each request's whole output, or fill the cache and pause requests.",
        to="admission",
    ),
    F(
        "request_default_max_tokens",
        _positive(),
        None,
        "Output limit of requests that set none.",
        to="default_max_tokens",
    ),
    F("served_model_name", Str(numbers=True), None, "Name in replies; decoders.", to="served_names"),
    F(
        "total_token_limit",
        Int(1, strict=False),
        500_000,
        "Tokens handed to the engine at once.",
        no_effect="requests wait in the engine's own queue, bounded by max_queue",
    ),
    F(
        "webserver_default_route",
        Enum(*ROUTES),
        None,
        "Where `/predict` of the platform lands; encoders. Absent: by architecture.",
        to="default_route",
    ),
    F(LORA_CACHE_KEYS[0], _positive(), None, "Largest rank in the adapter cache.", to="max_lora_rank"),
    F(
        LORA_CACHE_KEYS[1],
        _positive(),
        None,
        "Rank that sizes the cache's pages.",
        no_effect="adapters are stored at their own rank",
    ),
    F(
        LORA_CACHE_KEYS[2],
        Float(0, 1, above=True),
        None,
        "Share of GPU memory for adapters.",
        no_effect="adapters are planned by their own size",
    ),
    F(
        LORA_CACHE_KEYS[3],
        _positive(),
        None,
        "Host memory for adapters, bytes.",
        no_effect="adapters are planned by their own size",
    ),
)


RUNTIME_V1 = Section(
    "runtime (v1)",
    "How the engine runs, stack v1.",
    *_RUNTIME_V1_FIELDS,
    elsewhere={
        "enable_chunked_prefill": "is the v2 name: write `enable_chunked_context`, or `inference_stack: v2`",
        "tensor_parallel_size": "is the v2 name: write `build.tensor_parallel_count`",
        "patch_kwargs": "belongs to stack v2: set `inference_stack: v2` to use it",
        "max_seq_len": "belongs under `trt_llm.build` in stack v1",
        "max_batch_size": "belongs under `trt_llm.build` in stack v1",
        "max_num_tokens": "belongs under `trt_llm.build` in stack v1",
    },
)

SPECULATOR = Section(
    "speculator",
    "Speculative decoding. Draft length = (0 if n == 1 else n - 2) + (w - 1 + v) * (n - 1).",
    F(
        "speculative_decoding_mode",
        Enum("LOOKAHEAD_DECODING", "DRAFT_TOKENS_EXTERNAL"),
        "DRAFT_TOKENS_EXTERNAL",
        "Must be set to `LOOKAHEAD_DECODING`; the default is discontinued.",
        to="speculation",
    ),
    F("lookahead_windows_size", _positive(), None, "Window w: n-grams guessed at once.", to="speculation"),
    F("lookahead_ngram_size", _positive(), None, "Size n of the n-grams.", to="speculation"),
    F("lookahead_verification_set_size", _positive(), None, "v: n-grams verified at once.", to="speculation"),
    F(
        "num_draft_tokens",
        _positive(),
        None,
        "Draft tokens a step; at least the computed length.",
        to="speculation",
    ),
    F(
        "enable_b10_lookahead",
        Bool(),
        False,
        "Suffix matches over prompt and output.",
        differs="suffix matches are always part of lookahead here",
    ),
    F("checkpoint_repository", Anything("a mapping", (dict,)), None, f"Draft model; {_EXTERNAL}."),
    F("build", Anything("a mapping", (dict,)), None, f"Build of a draft model; {_EXTERNAL}."),
    F("runtime", Anything("a mapping", (dict,)), None, f"Runtime of a draft model; {_EXTERNAL}."),
)

BUILD = Section(
    "build",
    "The model and its limits. Stack v2 allows only `checkpoint_repository`, `quantization_type`, "
    "`quantization_config`, `skip_build_result` and `num_builder_gpus` here. Nothing is compiled.",
    F(
        "base_model",
        Enum(
            "decoder",
            "encoder",
            "encoder_bert",
            "whisper",
            old=dict.fromkeys(("llama", "qwen", "mistral", "deepseek", "palmyra"), _RENAMED),
        ),
        "decoder",
        "Kind of engine; checked against the checkpoint, which decides.",
        to="engine",
    ),
    F(
        "checkpoint_repository",
        CHECKPOINT_REPOSITORY,
        None,
        "Where the checkpoint lies; required in stack v1.",
    ),
    F(
        "max_seq_len",
        Int(1, 1_048_576),
        None,
        "Context of one request; encoders follow the model.",
        to="max_model_len",
    ),
    F("max_batch_size", Int(1, 2048), 256, "Requests in one step.", to="max_num_seqs"),
    F(
        "max_num_tokens",
        Int(65, 1_048_576),
        8192,
        "Tokens in one step; 16384 for `encoder` when absent. Caps one input of encoders.",
        to="max_num_batched_tokens",
    ),
    F("max_beam_width", Int(1, 1), 1, "Beam search is not supported.", no_effect="no beam search"),
    F(
        "max_prompt_embedding_table_size",
        Int(strict=False),
        0,
        "Legacy prompt tuning.",
        no_effect="prompt tables do not exist here",
    ),
    F(
        "gather_all_token_logits",
        Bool(),
        False,
        "Keep all logits.",
        no_effect="ask for prompt_logprobs in a request",
    ),
    F("strongly_typed", Bool(), False, "Build flag.", no_effect="nothing is compiled"),
    *quantization_fields(),
    F("tensor_parallel_count", Int(1), 1, "GPUs of one replica; decoders.", to="tensor_parallel_size"),
    F("pipeline_parallel_count", Int(strict=False), 1, "Stages of layers.", to="pipeline_parallel_size"),
    F("sequence_parallel_count", Int(strict=False), 1, "Sequence parallel ranks; counts towards the GPUs."),
    F(
        "moe_expert_parallel_option",
        Int(strict=False),
        -1,
        "GPUs that share the experts; -1: decided here, else 1 to the tensor parallel count.",
        to="expert_parallel_size",
    ),
    F("plugin_configuration", PLUGINS, {}, "Attention switches."),
    F("num_builder_gpus", Int(1), None, "GPUs of the build.", no_effect="there is no build step"),
    F("speculator", SPECULATOR, None, "Speculative decoding."),
    F(
        "lora_adapters",
        MapOf(
            CHECKPOINT_REPOSITORY,
            key=r"^[a-zA-Z0-9_\-.:]+$",
            key_what="use letters, digits and _ - . : only",
        ),
        None,
        "Adapters by the name that requests ask for.",
        to="adapters",
    ),
    F("lora_configuration", LORA, None, "Properties of the adapters."),
    F("skip_build_result", Bool(), False, "v2: weights come from `weights` or `model_cache`.", to="model"),
    elsewhere=dict.fromkeys(
        (*LORA_CACHE_KEYS, *(field.name for field in _RUNTIME_V1_FIELDS)),
        "must stand under trt_llm.runtime, not trt_llm.build",
    ),
)

RUNTIME_V2 = Section(
    "runtime (v2)",
    "How the engine runs, stack v2.",
    F("max_seq_len", Int(1, 1_048_576), None, "Context of one request.", to="max_model_len"),
    F("max_batch_size", Int(1, 2048), 256, "Requests in one step.", to="max_num_seqs"),
    F("max_num_tokens", Int(65, 131_072), 8192, "Tokens in one step.", to="max_num_batched_tokens"),
    F("tensor_parallel_size", Int(1), 1, "GPUs of one replica.", to="tensor_parallel_size"),
    F("enable_chunked_prefill", Bool(), True, "Split long prompts over steps.", to="chunked_prefill"),
    F("served_model_name", Str(numbers=True), None, "Name in replies.", to="served_names"),
    F("patch_kwargs", PATCH_KWARGS, {}, "Options of the engine below.", aliases=("gated_features",)),
    elsewhere={
        "tensor_parallel_count": "is the v1 name: write `tensor_parallel_size`",
        "enable_chunked_context": "is the v1 name: write `enable_chunked_prefill`",
        "kv_cache_free_gpu_mem_fraction": "is the v1 name: write "
        "`patch_kwargs.kv_cache_config.free_gpu_memory_fraction`",
    },
)

_VERSION = "versions of the hosted system's images"


def _starts_with_digit(text: str) -> str:
    if not text[:1].isdigit():
        raise ValueError(f"is {text[:40]!r}; a version must start with a digit")
    return text


VERSIONS = Section(
    "version_overrides",
    "Pins of the hosted system's images; checked as there, without effect here.",
    *(
        F(
            name,
            Str("a version", parse=_starts_with_digit, numbers=True),
            None,
            "Image version.",
            no_effect=_VERSION,
        )
        for name in ("engine_builder_version", "briton_version", "bei_version", "bei_bert_version")
    ),
    F("v2_llm_version", Str("a version", numbers=True), None, "Image version.", no_effect=_VERSION),
)


def _stack(version: str, *fields: Field) -> Section:
    return Section(
        f"trt_llm ({version})",
        f"Engine settings, stack {version}.",
        F("inference_stack", Enum("v1", "v2"), version, "Which of the two schemas; `v1` when absent."),
        F("build", BUILD, REQUIRED, "The model and its limits."),
        *fields,
        F("version_overrides", VERSIONS, {}, "Image pins."),
    )


TRT_LLM = Choice(
    "inference_stack",
    {
        "v1": _stack("v1", F("runtime", RUNTIME_V1, {}, "How the engine runs.")),
        "v2": _stack("v2", F("runtime", RUNTIME_V2, REQUIRED, "How the engine runs; required in stack v2.")),
    },
    "v1",
)
