"""The hosted system's keys in our own names: a function a block yields (our field, value, their key)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headrace.config.command import read_command
from headrace.config.foreign import ENGINE_OPTIONS
from headrace.config.quantization import HOSTED
from headrace.config.schema.own import OWN
from headrace.config.schema.rules import ENCODERS, stack
from headrace.config.schema.trt_llm import ROUTES
from headrace.config.schema.view import View
from headrace.config.schema.weights import MODEL_CACHE_ROOT
from headrace.config.spec import lookahead_draft_length

__all__ = ["own_settings"]

Setting = tuple[str, Any, str]

_B = "trt_llm.build"
_R = "trt_llm.runtime"
_P = "trt_llm.runtime.patch_kwargs"
_C = "bis_llm.config"

_ENGINES = {"decoder": "decoder", "encoder": "encoder", "encoder_bert": "bert", "whisper": "speech"}
_KV = {"bf16": "bfloat16", "fp16": "float16", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8"}
_SOURCES = {"hf": "HF", "gcs": "GCS", "s3": "S3", "azure": "AZURE"}
_SCHEMES_OF_SOURCES = {
    "hf": "HF",
    "s3": "S3",
    "r2": "S3",
    "cw": "S3",
    "gs": "GCS",
    "azure": "AZURE",
    "bt": "BASETEN_TRAINING",
}


def own_settings(view: View) -> dict[str, tuple[Any, str]]:
    """Our field -> (value, the key that set it). Later blocks win, ``model_metadata.headrace`` over all."""
    found: dict[str, tuple[Any, str]] = {}
    for block in (_around, _docker, _build, _runtime_v1, _runtime_v2, _bis):
        for name, value, path in block(view):
            found[name] = (value, path)
    path = "model_metadata.headrace"
    for field in OWN.fields:
        if view.given(f"{path}.{field.name}"):
            found[field.name] = (view.get(f"{path}.{field.name}"), f"{path}.{field.name}")
    return {name: (value, where) for name, (value, where) in found.items() if value is not None}


def _copy(view: View, block: str, names: dict[str, str]) -> Iterator[Setting]:
    """Keys that only change their name; absent ones with their default there."""
    for theirs, ours in names.items():
        path = f"{block}.{theirs}"
        value = view.get(path)
        if value is not None:
            yield ours, value, path


def _around(view: View) -> Iterator[Setting]:
    if view.get("model_name"):
        yield "served_names", [view.get("model_name")], "model_name"
    if view.get("secrets"):
        yield "secrets", sorted(view.get("secrets")), "secrets"
    if view.get("environment_variables"):
        yield "environment", view.get("environment_variables"), "environment_variables"


def _docker(view: View) -> Iterator[Setting]:
    """What the command of a server of one's own says, where it is one whose flags we know."""
    path = "docker_server.start_command"
    text = view.get(path)
    if text is None:
        return
    command = read_command(text)
    if command is None:
        view.notice("no_effect", path, "is not run, and starts no server whose flags are read here")
        return
    view.notice("differs", path, f"{command.program} is not run: its flags are read, the engine is ours")
    if "$" in command.model:
        view.notice("warning", path, f"{command.model} is known to the shell alone: write the model out")
    elif command.model:
        yield from _mounted(view, path, command.model)
    route = view.get("docker_server.predict_endpoint")
    if route in ROUTES:
        yield "default_route", route, "docker_server.predict_endpoint"
    for name, option, value in command.flags:
        if option is None or value is None:
            what = name if option is None else f"the value of {name}"
            view.notice("warning", path, f"{what} is not read here")
        elif not option.to or option.to.startswith("--") or option.to == "secret_name":
            said = f"{option.to} of headrace serve says that" if option.to else option.note
            how = option.note if option.to == "secret_name" else said
            view.notice("no_effect", path, f"{name}: {how}")
        else:
            yield from _option(option.to, name.removeprefix("--"), value, option.inverted, path)


def _build(view: View) -> Iterator[Setting]:
    if view.get(_B) is None:
        return
    yield from _checkpoint(view)
    quantization = view.get(f"{_B}.quantization_type", "no_quant")
    if quantization != "no_quant":
        scheme, cache = HOSTED[quantization]
        yield "quantization", scheme, f"{_B}.quantization_type"
        if view.get(f"{_B}.base_model") not in ENCODERS:  # which keep none: the check says so
            yield "kv_cache_dtype", cache, f"{_B}.quantization_type"
    calibration = view.get(f"{_B}.quantization_config", {})
    yield (
        "calibration",
        {
            "dataset": calibration.get("calib_dataset"),
            "num_rows": calibration.get("calib_size"),
            "max_tokens": calibration.get("calib_max_seq_length"),
        },
        f"{_B}.quantization_config",
    )
    if view.given(f"{_B}.base_model") and stack(view) == "v1":
        yield "engine", _ENGINES[view.get(f"{_B}.base_model")], f"{_B}.base_model"
    if stack(view) == "v1":
        yield from _build_v1(view)


def _checkpoint(view: View) -> Iterator[Setting]:
    block = f"{_B}.checkpoint_repository"
    yield from _copy(
        view,
        block,
        {"repo": "model", "source": "source", "revision": "revision", "runtime_secret_name": "secret_name"},
    )


def _build_v1(view: View) -> Iterator[Setting]:
    base = view.get(f"{_B}.base_model", "decoder")
    encoder = base in ENCODERS
    yield "max_num_seqs", view.get(f"{_B}.max_batch_size", 256), f"{_B}.max_batch_size"
    # Absent it follows the device, which on a GPU is the hosted default.
    if base == "encoder" or view.given(f"{_B}.max_num_tokens"):
        tokens = view.get(f"{_B}.max_num_tokens") if view.given(f"{_B}.max_num_tokens") else 16384
        yield "max_num_batched_tokens", tokens, f"{_B}.max_num_tokens"
    if not encoder:
        yield from _copy(
            view, _B, {"max_seq_len": "max_model_len", "tensor_parallel_count": "tensor_parallel_size"}
        )
        stages = view.get(f"{_B}.pipeline_parallel_count", 1)
        yield "pipeline_parallel_size", stages, f"{_B}.pipeline_parallel_count"
        experts = view.get(f"{_B}.moe_expert_parallel_option", -1)
        if experts > 0:
            yield "expert_parallel_size", experts, f"{_B}.moe_expert_parallel_option"
        yield from _lookahead(view)
    yield from _adapters(view)


def _lookahead(view: View) -> Iterator[Setting]:
    path = f"{_B}.speculator"
    if view.get(path) is None:
        return
    window, ngram, verification = (
        view.get(f"{path}.lookahead_{name}")
        for name in ("windows_size", "ngram_size", "verification_set_size")
    )
    length = view.get(f"{path}.num_draft_tokens") or lookahead_draft_length(window, ngram, verification)
    drafts = {
        "method": "lookahead",
        "max_draft_tokens": length,
        "window": window,
        "ngram": ngram,
        "verification": verification,
    }
    yield "speculation", drafts, path


def _adapters(view: View) -> Iterator[Setting]:
    found = view.get(f"{_B}.lora_adapters", {})
    if found:
        adapters = [
            {
                "name": name,
                "model": repository["repo"],
                "source": repository["source"],
                "revision": repository["revision"],
                "secret_name": repository["runtime_secret_name"],
            }
            for name, repository in found.items()
        ]
        yield "adapters", adapters, f"{_B}.lora_adapters"
    yield from _copy(view, f"{_B}.lora_configuration", {"max_lora_rank": "max_lora_rank"})


_COMMON = {"max_seq_len": "max_model_len", "max_batch_size": "max_num_seqs"}


def _runtime_v1(view: View) -> Iterator[Setting]:
    if view.get(_R) is None or stack(view) != "v1":
        return
    names = {
        "kv_cache_free_gpu_mem_fraction": "memory_fraction",
        "kv_cache_host_memory_bytes": "host_kv_bytes",
        "enable_chunked_context": "chunked_prefill",
        "request_default_max_tokens": "default_max_tokens",
        "webserver_default_route": "default_route",
        "lora_cache_max_adapter_size": "max_lora_rank",
    }
    if view.get(f"{_B}.base_model", "decoder") in ENCODERS:  # these split and generate nothing
        names = {name: names[name] for name in ("kv_cache_free_gpu_mem_fraction", "webserver_default_route")}
    yield from _copy(view, _R, names)
    policy = view.get(f"{_R}.batch_scheduler_policy", "guaranteed_no_evict")
    admission = {"guaranteed_no_evict": "reserve", "max_utilization": "fill"}[policy]
    yield "admission", admission, f"{_R}.batch_scheduler_policy"
    yield from _served(view, f"{_R}.served_model_name")


def _served(view: View, path: str) -> Iterator[Setting]:
    if view.get(path):
        yield "served_names", [view.get(path)], path


def _runtime_v2(view: View) -> Iterator[Setting]:
    if view.get(_R) is None or stack(view) != "v2":
        return
    yield from _copy(view, _R, _COMMON)
    if view.given(f"{_R}.max_num_tokens"):
        yield from _copy(view, _R, {"max_num_tokens": "max_num_batched_tokens"})
    yield from _copy(
        view,
        _R,
        {"enable_chunked_prefill": "chunked_prefill", "tensor_parallel_size": "tensor_parallel_size"},
    )
    yield from _served(view, f"{_R}.served_model_name")
    yield from _patch(view, _P)
    yield from _mounted(view, f"{_P}.model_path")


def _patch(view: View, path: str) -> Iterator[Setting]:
    """Options of TensorRT-LLM, wherever they stand."""
    if view.given(f"{path}.disable_overlap_scheduler"):
        yield (
            "overlap",
            not view.get(f"{path}.disable_overlap_scheduler"),
            f"{path}.disable_overlap_scheduler",
        )
    if view.given(f"{path}.cuda_graph_config") and view.get(f"{path}.cuda_graph_config") is None:
        yield "eager", True, f"{path}.cuda_graph_config"
    cache = f"{path}.kv_cache_config"
    if view.given(cache):
        yield from _copy(
            view,
            cache,
            {
                "free_gpu_memory_fraction": "memory_fraction",
                "enable_block_reuse": "prefix_caching",
                "host_cache_size": "host_kv_bytes",
            },
        )
        dtype = view.get(f"{cache}.dtype", "auto")
        if dtype != "auto":
            yield "kv_cache_dtype", _KV.get(dtype, dtype), f"{cache}.dtype"
    yield from _copy(
        view,
        path,
        {
            "moe_expert_parallel_size": "expert_parallel_size",
            "tool_call_parser": "tool_call_parser",
            "reasoning_parser": "reasoning_parser",
        },
    )
    if view.get(f"{path}.model_level_stop_words"):
        yield "stop", view.get(f"{path}.model_level_stop_words"), f"{path}.model_level_stop_words"
    yield from _drafter(view, f"{path}.speculative_config")


def _drafter(view: View, path: str) -> Iterator[Setting]:
    config = view.get(path)
    if config is None:
        return
    drafts = {
        "method": {"EAGLE": "eagle", "MTP": "mtp", "NGRAM": "ngram"}[config["decoding_type"]],
        "max_draft_tokens": config.get("max_draft_len") or 0,
        "model": config.get("speculative_model_dir") or "",
        "num_layers": config.get("num_nextn_predict_layers") or 0,
    }
    yield "speculation", drafts, path


def _mounted(view: View, path: str, model: str | None = None) -> Iterator[Setting]:
    """A model path (by default the value at ``path``): the source of the mount it lies in, or the path itself."""
    model = view.get(path) if model is None else model
    if model is None:
        return
    for index, source in enumerate(view.get("weights", [])):
        if _below(model, source["mount_location"]):
            yield from _weights_source(source, model, f"weights[{index}]")
            return
    for index, entry in enumerate(view.get("model_cache", [])):
        if entry["volume_folder"] and _below(model, f"{MODEL_CACHE_ROOT}/{entry['volume_folder']}"):
            where = f"model_cache[{index}]"
            yield "model", entry["repo_id"], f"{where}.repo_id"
            yield "source", _SOURCES[entry["kind"]], f"{where}.kind"
            yield "revision", entry["revision"] or None, f"{where}.revision"
            yield "secret_name", entry["runtime_secret_name"], f"{where}.runtime_secret_name"
            yield from _patterns(entry, where)
            return
    yield "model", model, path
    yield "source", "auto", path


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _weights_source(source: dict[str, Any], model: str, where: str) -> Iterator[Setting]:
    scheme, _, rest = source["source"].partition("://")
    revision = None
    if scheme == "hf":
        rest, _, revision = rest.partition("@")
    inner = model[len(source["mount_location"].rstrip("/")) :].strip("/")
    repo = rest if scheme in ("hf", "bt") else source["source"]
    yield "model", f"{repo}/{inner}" if inner else repo, f"{where}.source"
    yield "source", _SCHEMES_OF_SOURCES.get(scheme, "REMOTE_URL"), f"{where}.source"
    yield "revision", revision or None, f"{where}.source"
    secret = source["auth_secret_name"] or (source["auth"] or {}).get("auth_secret_name")
    if secret:
        yield "secret_name", secret, f"{where}.auth_secret_name"
    yield from _patterns(source, where)


def _patterns(source: dict[str, Any], where: str) -> Iterator[Setting]:
    for name in ("allow_patterns", "ignore_patterns"):
        if source[name]:
            yield name, source[name], f"{where}.{name}"


def _bis(view: View) -> Iterator[Setting]:
    if view.get(_C) is None:
        return
    yield from _copy(view, _C, {"checkpoint_name": "model", "tensor_parallel_size": "tensor_parallel_size"})
    for name in ("model_name", "served_model_name"):
        yield from _served(view, f"{_C}.{name}")
    path = f"{_C}.engine_config"
    yield from _patch(view, path)
    for name in view.get(path, {}):
        option = ENGINE_OPTIONS.get(name)
        value = view.get(f"{path}.{name}")
        if option is not None and option.to and value is not None:
            yield from _option(option.to, name, value, option.inverted, f"{path}.{name}")
    yield from _copy(
        view, _C, {"tool_call_parser": "tool_call_parser", "reasoning_parser": "reasoning_parser"}
    )
    yield from _drafter(view, f"{_C}.speculative_config")
    yield from _mounted(view, f"{_C}.engine_config.model_path")
    yield from _mounted(view, f"{_C}.model_path")


def _option(to: str, name: str, value: Any, inverted: bool, path: str) -> Iterator[Setting]:
    """One native option, its value in our terms."""
    if to.startswith("--") or to == "model":
        return
    name = name.replace("-", "_")
    if name == "swap_space":
        value = int(value * 1024**3)
    elif name == "enable_expert_parallel":
        return
    elif name == "served_model_name":
        value = [value]
    elif name == "dtype":
        value = {"half": "float16", "float": "float32"}.get(value, value)
    elif name == "kv_cache_dtype":
        value = _KV.get(value, value)
    elif name == "pooling":
        value = value.removesuffix("-token")
    elif name in ("runner", "task"):
        value = {"pooling": "encoder", "embed": "encoder", "generate": "decoder"}.get(value, "auto")
    elif inverted:
        value = not value
    yield to, value, path
