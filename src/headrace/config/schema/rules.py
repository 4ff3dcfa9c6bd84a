"""Cross-field rules of the ``trt_llm`` block: as the hosted validator has them, or lifted with a notice."""

from __future__ import annotations

import re

from headrace.config.accelerators import parse_accelerator
from headrace.config.schema.common import FP4_TYPES, FP8_TYPES, hf_repo_id
from headrace.config.schema.fields import Section
from headrace.config.schema.top_types import memory_bytes
from headrace.config.schema.trt_llm import BUILD
from headrace.config.schema.view import Rule, View, rule
from headrace.config.spec import lookahead_draft_length

__all__ = ["ENCODERS", "LEGACY_TAG", "OPENAI_TAG", "TRT_RULES", "accelerator", "stack"]

TRT_RULES: list[Rule] = []
ENCODERS = ("encoder", "encoder_bert")
_DECODER_KEYS = (
    "trt_llm.build.max_seq_len",
    "trt_llm.build.moe_expert_parallel_option",
    *(
        f"trt_llm.runtime.{name}"
        for name in ("kv_cache_host_memory_bytes", "batch_scheduler_policy", "request_default_max_tokens")
    ),
)
OPENAI_TAG = "openai-compatible"
LEGACY_TAG = "force-legacy-api-non-openai-compatible"
_B = "trt_llm.build"
_R = "trt_llm.runtime"
_GPU = "resources.accelerator"
_V2_BUILD = (
    "checkpoint_repository",
    "quantization_type",
    "quantization_config",
    "skip_build_result",
    "num_builder_gpus",
)
_RENAMES = {
    "tensor_parallel_count": "write runtime.tensor_parallel_size",
    "max_seq_len": "write runtime.max_seq_len",
    "max_batch_size": "write runtime.max_batch_size",
    "max_num_tokens": "write runtime.max_num_tokens",
    "speculator": "write runtime.patch_kwargs.speculative_config",
    "base_model": "leave it out; the engine is read from the checkpoint",
    "moe_expert_parallel_option": "write runtime.patch_kwargs.moe_expert_parallel_size",
    "plugin_configuration": "leave it out; the cache is always paged",
}


def stack(view: View) -> str:
    return str(view.get("trt_llm.inference_stack", "v1"))


def _base(view: View) -> str:
    return str(view.get(f"{_B}.base_model", "decoder"))


def accelerator(view: View) -> tuple[str, int]:
    """Name ("" for none) and count."""
    text = view.get(_GPU)
    if not text:
        return "", 1
    parsed = parse_accelerator(text)
    return parsed.name, parsed.count


@rule(TRT_RULES, f"{_B}.checkpoint_repository", when=_B)
def checkpoint_is_named(view: View) -> None:
    """v1 needs `build.checkpoint_repository`; v2 needs it unless `skip_build_result` is true."""
    if view.get(f"{_B}.checkpoint_repository") is not None:
        return
    if stack(view) == "v1":
        view.error(f"{_B}.checkpoint_repository", "is required in stack v1: name the source and the repo")
    elif not view.get(f"{_B}.skip_build_result"):
        view.error(
            f"{_B}.checkpoint_repository",
            "is required in stack v2; or set skip_build_result: true and name the weights by "
            "runtime.patch_kwargs.model_path",
        )


@rule(TRT_RULES, f"{_B}.checkpoint_repository.repo", f"{_B}.checkpoint_repository.source", when=_B)
def repository_matches_source(view: View) -> None:
    """HF takes a repository id, S3 s3://, GCS gs://, AZURE az:// or azure://, REMOTE_URL http(s)://."""
    blocks = [f"{_B}.checkpoint_repository"]
    blocks += [f"{_B}.lora_adapters.{name}" for name in view.get(f"{_B}.lora_adapters", {})]
    for block in blocks:
        _check_repository(view, block)


def _check_repository(view: View, block: str) -> None:
    # Adapter names may hold dots, so the block is looked up by hand.
    name = block.removeprefix(f"{_B}.lora_adapters.")
    found = view.get(block) if name == block else view.get(f"{_B}.lora_adapters", {}).get(name)
    if not isinstance(found, dict) or not isinstance(found.get("repo"), str):
        return
    source, repo = found.get("source"), found["repo"]
    schemes = {
        "S3": ("s3://",),
        "GCS": ("gs://",),
        "AZURE": ("az://", "azure://"),
        "REMOTE_URL": ("https://", "http://"),
    }.get(str(source), ())
    if source == "HF":
        try:
            hf_repo_id(repo)
        except ValueError as error:
            view.error(f"{block}.repo", str(error))
    if schemes and found.get("revision") is not None:
        view.notice("no_effect", f"{block}.revision", f"{source} has no revisions, so it is ignored")
    if schemes and not re.match("|".join(schemes) + r"\S", repo):
        view.error(f"{block}.repo", f"is {repo[:80]!r}; source {source} needs {' or '.join(schemes)}…")
    elif source == "LOCAL":
        view.notice("lifted", f"{block}.source", "a folder on this machine; the hosted system refuses LOCAL")


@rule(TRT_RULES, when=_B)
def v2_build_is_small(view: View) -> None:
    """v2 allows `build` to set only checkpoint, quantization, `skip_build_result` and `num_builder_gpus`;
    other keys are fine at their defaults, `plugin_configuration` only when it is absent."""
    if stack(view) != "v2":
        return
    for field in BUILD.fields:
        path = f"{_B}.{field.name}"
        if field.name in _V2_BUILD or not view.given(path) or view.invalid(path):
            continue
        value = view.get(path)
        default = (
            None if isinstance(field.type, Section) else field.default
        )  # a block is refused whatever it says
        if value is not None and value != default:
            hint = _RENAMES.get(field.name, "remove it or set inference_stack: v1")
            view.error(path, f"is not allowed with stack v2; {hint}")


@rule(TRT_RULES, f"{_B}.plugin_configuration", when=_B)
def paged_attention_needs_paged_cache(view: View) -> None:
    """`use_paged_context_fmha` needs `paged_kv_cache`."""
    plugin = f"{_B}.plugin_configuration"
    encoder = _base(view) == "encoder"
    if (
        view.get(f"{plugin}.use_paged_context_fmha")
        and not view.get(f"{plugin}.paged_kv_cache")
        and not encoder
    ):
        view.error(
            f"{plugin}.paged_kv_cache", "is false while use_paged_context_fmha is true; set both or neither"
        )


def _both_flags(view: View) -> bool:
    plugin = f"{_B}.plugin_configuration"
    return bool(view.get(f"{plugin}.paged_kv_cache") and view.get(f"{plugin}.use_paged_context_fmha"))


@rule(TRT_RULES, f"{_B}.plugin_configuration", f"{_R}.enable_chunked_context", when=_B)
def chunked_context_needs_flags(view: View) -> None:
    """v1 decoders: `enable_chunked_context` needs both plugin flags."""
    if stack(view) != "v1" or _base(view) in ENCODERS or _both_flags(view):
        return
    if view.get(f"{_R}.enable_chunked_context", True):
        view.error(
            f"{_R}.enable_chunked_context",
            "is true, which needs plugin_configuration.paged_kv_cache and use_paged_context_fmha; "
            "leave those at true, or set enable_chunked_context: false",
        )


@rule(TRT_RULES, f"{_B}.speculator.speculative_decoding_mode", when=f"{_B}.speculator")
def speculator_is_lookahead(view: View) -> None:
    """Drafts by an external model are discontinued: the mode must be set to LOOKAHEAD_DECODING."""
    path = f"{_B}.speculator"
    if view.get(f"{path}.speculative_decoding_mode") == "DRAFT_TOKENS_EXTERNAL":
        word = "is" if view.given(f"{path}.speculative_decoding_mode") else "is absent, which means"
        view.error(
            f"{path}.speculative_decoding_mode",
            f"{word} DRAFT_TOKENS_EXTERNAL, which is discontinued; write LOOKAHEAD_DECODING with "
            "lookahead_windows_size, lookahead_ngram_size and lookahead_verification_set_size",
        )


@rule(TRT_RULES, f"{_B}.speculator", when=f"{_B}.speculator")
def lookahead_sizes(view: View) -> None:
    """Lookahead needs its three sizes; `num_draft_tokens` may not be below the computed length nor above
    2048; above 512 warns."""
    path = f"{_B}.speculator"
    if view.get(f"{path}.speculative_decoding_mode") != "LOOKAHEAD_DECODING":
        return
    names = ("lookahead_windows_size", "lookahead_ngram_size", "lookahead_verification_set_size")
    if any(view.invalid(f"{path}.{name}") for name in (*names, "num_draft_tokens")):
        return
    sizes = [view.get(f"{path}.{name}") for name in names]
    missing = [name for name, size in zip(names, sizes) if size is None]
    if missing:
        view.error(
            path, f"lookahead needs {', '.join(missing)}; a general choice is 3, 8, 3 (window, n-gram, set)"
        )
        return
    window, ngram, verification = sizes
    computed = lookahead_draft_length(window, ngram, verification)
    given = view.get(f"{path}.num_draft_tokens")
    where = f"{path}.num_draft_tokens" if given else path
    sum_up = f"w={window}, n={ngram}, v={verification} need {computed} draft tokens"
    if given is not None and given < computed:
        view.error(where, f"is {given}; {sum_up}: raise it or leave it out")
        return
    length = computed if given is None else given
    if length > 2048:
        view.error(where, f"{length} draft tokens a step; at most 2048 ({sum_up}): lower the three sizes")
    elif length > 512:
        view.notice("warning", where, f"{length} draft tokens a step cost more than they save; try 7, 5, 3")


@rule(
    TRT_RULES,
    f"{_B}.speculator",
    f"{_B}.max_batch_size",
    f"{_B}.plugin_configuration",
    when=f"{_B}.speculator",
)
def speculator_needs_reuse(view: View) -> None:
    """A speculator needs a decoder and both plugin flags; `max_batch_size` above 64 warns; lifted: structured
    output, sampling and chunked prefill work together with lookahead."""
    path = f"{_B}.speculator"
    if stack(view) != "v1" or view.get(f"{path}.speculative_decoding_mode") != "LOOKAHEAD_DECODING":
        return  # refused for that
    if _base(view) in ENCODERS:
        view.error(path, f"is for decoders; {_base(view)} generates nothing: remove it")
        return
    if not _both_flags(view):
        view.error(
            f"{_B}.plugin_configuration",
            "a speculator needs block reuse: leave paged_kv_cache and use_paged_context_fmha at true",
        )
    if view.get(f"{_B}.max_batch_size", 256) > 64:
        view.notice("warning", f"{_B}.max_batch_size", "drafts pay off in small batches; 32 or 64 is advised")
    view.notice("lifted", path, "structured output, sampling and chunked prefill work with lookahead here")


@rule(TRT_RULES, when=_R)
def adapter_cache_sizes(view: View) -> None:
    """`lora_cache_optimal_adapter_size` may not exceed `lora_cache_max_adapter_size`."""
    largest = view.get(f"{_R}.lora_cache_max_adapter_size")
    optimal = view.get(f"{_R}.lora_cache_optimal_adapter_size")
    if largest is not None and optimal is not None and optimal > largest:
        path = f"{_R}.lora_cache_optimal_adapter_size"
        view.error(path, f"is {optimal}, above lora_cache_max_adapter_size, which is {largest}")


@rule(TRT_RULES, f"{_B}.moe_expert_parallel_option", f"{_B}.tensor_parallel_count", when=_B)
def expert_parallelism(view: View) -> None:
    """`moe_expert_parallel_option` is -1 or 1 to `tensor_parallel_count`; not dividing it warns."""
    option = view.get(f"{_B}.moe_expert_parallel_option", -1)
    count = view.get(f"{_B}.tensor_parallel_count", 1)
    path = f"{_B}.moe_expert_parallel_option"
    if _base(view) != "decoder" or option == -1:
        return
    if option > count:
        view.error(path, f"is {option}, above tensor_parallel_count, which is {count}")
    elif option <= 0:
        view.error(path, f"is {option}; expected -1 or 1 to {count}")
    elif count % option:
        view.notice("warning", path, f"{option} does not divide tensor_parallel_count, which is {count}")


@rule(TRT_RULES, _GPU, f"{_B}.base_model", when=_B)
def encoders_use_one_gpu(view: View) -> None:
    """Encoders force the parallel counts to 1 with a warning, and use one GPU of several; a `*_kv` type
    warns; keys of decoders (context, scheduling, defaults of requests) have no effect on them."""
    base = _base(view)
    if base not in ENCODERS:
        return
    for name in ("tensor_parallel_count", "pipeline_parallel_count", "sequence_parallel_count"):
        value = view.get(f"{_B}.{name}", 1)
        if value != 1:
            view.notice("warning", f"{_B}.{name}", f"is {value}; an encoder runs on one GPU, so 1 is used")
    count = accelerator(view)[1]
    if count > 1:
        view.notice(
            "differs", _GPU, f"an encoder uses one of the {count} GPUs; run a server for each of them"
        )
    for path in _DECODER_KEYS:
        if view.given(path) and view.get(path) not in (None, {}):
            view.notice("no_effect", path, f"is a decoder's; {base} follows its checkpoint")
    quantization = str(view.get(f"{_B}.quantization_type", "no_quant"))
    if "_kv" in quantization:
        served = quantization.removesuffix("_kv")
        view.notice(
            "warning",
            f"{_B}.quantization_type",
            f"{quantization}: an encoder keeps no KV cache; taken as {served}",
        )


_PARALLEL = ("tensor_parallel_count", "pipeline_parallel_count", "sequence_parallel_count")


@rule(TRT_RULES, _GPU, f"{_B}.base_model", *(f"{_B}.{name}" for name in _PARALLEL), when=_B)
def world_size_matches(view: View) -> None:
    """v1 decoders: TP x PP x SP must equal the number of GPUs; not a power of two warns. v2, stricter than
    there: `tensor_parallel_size` may not exceed the number of GPUs, and should not be less."""
    gpu, count = accelerator(view)
    if stack(view) == "v2":
        size = view.get(f"{_R}.tensor_parallel_size", 1)
        if gpu and size > count:
            view.error(
                f"{_R}.tensor_parallel_size", f"is {size}, but resources.accelerator has {count} GPU(s)"
            )
        elif gpu and size < count:
            view.notice(
                "warning",
                f"{_R}.tensor_parallel_size",
                f"is {size}: the other {count - size} GPU(s) stay idle",
            )
        return
    sizes = [view.get(f"{_B}.{name}", 1) for name in _PARALLEL]
    world = sizes[0] * sizes[1] * sizes[2]
    if _base(view) == "decoder" and world != count:
        view.error(
            f"{_B}.tensor_parallel_count",
            f"tensor x pipeline x sequence = {' x '.join(map(str, sizes))} = {world}, "
            f"but resources.accelerator "
            f"has {count} GPU(s); set tensor_parallel_count: {count} or accelerator: {gpu or 'TYPE'}:{world}",
        )
    if sizes[2] > 1 and _base(view) not in ENCODERS:
        view.notice("not_yet", f"{_B}.sequence_parallel_count", f"is {sizes[2]}: one GPU a model")
    if world > 0 and world & (world - 1) and _base(view) not in ENCODERS:
        view.notice(
            "warning", f"{_B}.tensor_parallel_count", f"{world} GPUs is unusual; a power of two is typical"
        )


@rule(TRT_RULES, _GPU, f"{_B}.base_model", f"{_B}.quantization_type", when=_B)
def gpu_can_do_it(view: View) -> None:
    """T4 and V100 run only `encoder_bert`; FP8 and FP4 types need L4, H100, H200, B200 or newer; lifted: FP4
    types run on Hopper and Ada, as FP4 weights."""
    gpu, _ = accelerator(view)
    quantization = str(view.get(f"{_B}.quantization_type", "no_quant"))
    if gpu in ("T4", "V100") and _base(view) != "encoder_bert":
        view.error(_GPU, f"{gpu} runs encoder_bert only; the oldest GPUs for {_base(view)} are A10G and A100")
    elif quantization in (*FP8_TYPES, *FP4_TYPES) and gpu in ("A10G", "A100", "A100_40GB", "T4", "V100"):
        view.error(
            f"{_B}.quantization_type",
            f"{quantization} on {gpu}: 8-bit and 4-bit floating point need L4, L40S, H100, H200, B200 "
            "or newer; use no_quant",
        )
    elif quantization in FP4_TYPES and gpu in ("H100", "H100_40GB", "H200", "L4", "L40S"):
        view.notice(
            "lifted",
            f"{_B}.quantization_type",
            f"{quantization} on {gpu}: FP4 weights, computed in 16 bit; the hosted system wants Blackwell",
        )
    if quantization.endswith("kv_int8"):
        note = f"{quantization}: the weights; the KV cache stays in 16 bits (fp8_kv has one of 8)"
        view.notice("differs", f"{_B}.quantization_type", note)
    elif quantization == "smooth_quant":
        view.notice("differs", f"{_B}.quantization_type", "smooth_quant: INT8 weights, 16-bit activations")


@rule(TRT_RULES, f"{_B}.base_model", when=_B)
def whisper_is_allowed(view: View) -> None:
    """Lifted: `base_model: whisper` names the speech engine."""
    if _base(view) == "whisper":
        view.notice("lifted", f"{_B}.base_model", "whisper: the hosted system moved it out of trt_llm")
        view.notice("not_yet", f"{_B}.base_model", "whisper: the speech engine is not in this version")


@rule(TRT_RULES, "model_metadata", when=_B)
def tags_choose_the_api(view: View) -> None:
    """v1 decoders: `openai-compatible` and the legacy tag exclude each other, and so do the legacy tag and a
    speculator. Neither is fine here: the API is always OpenAI's."""
    tags = view.get("model_metadata.tags", []) or []
    if stack(view) != "v1" or _base(view) in ENCODERS:
        return
    path = "model_metadata.tags"
    if LEGACY_TAG in tags and OPENAI_TAG in tags:
        view.error(path, f"{OPENAI_TAG} and {LEGACY_TAG} exclude each other; keep the first")
    elif LEGACY_TAG in tags and view.get(f"{_B}.speculator") is not None:
        view.error(path, f"{LEGACY_TAG} does not go with a speculator; write {OPENAI_TAG}")
    elif LEGACY_TAG in tags:
        view.notice("differs", path, "the API is OpenAI's; the legacy request form is not served")


@rule(TRT_RULES, "resources.memory", when=_B)
def host_memory(view: View) -> None:
    """`resources.memory` under 10Gi is raised to 10Gi on a push; no effect here."""
    memory = str(view.get("resources.memory", "2Gi"))
    if view.given("resources.memory") and memory_bytes(memory) < 10 * 1024**3:
        view.notice("no_effect", "resources.memory", f"{memory}: the hosted system raises it to 10Gi")
