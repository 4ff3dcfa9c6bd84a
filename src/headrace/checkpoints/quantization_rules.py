"""What settings of quantized checkpoints are read, which say nothing of numbers, and which are refused. No torch.

Planning and loading ask the same rules, so that what ``serve`` refuses by its settings, ``plan`` refuses too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from headrace.checkpoints.quantization_settings import QuantizationSettings, check_method
from headrace.errors import UnsupportedCheckpoint

__all__ = [
    "CT_FORMATS",
    "MODELOPT",
    "cache_problem",
    "check_settings",
    "modelopt_algorithm",
    "refuse",
    "wanted_cache",
]

CT_FORMATS = frozenset(
    {
        "float-quantized", "int-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "naive-quantized",
        "nvfp4-pack-quantized", "pack-quantized",
    }
)  # fmt: skip
# Activations that the second halves of the names ask for are rounded for FP8 and, on Blackwell, NVFP4 alone.
MODELOPT = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP4", "W4A8_MXFP4_FP8", "MXFP8",
    "W8A16",
)  # fmt: skip

Values = Mapping[str, Any]

# Keys that a reader follows, or that name what its tensors show anyhow.
_READ = {
    "awq": """bits w_bit group_size q_group_size zero_point sym version format checkpoint_format dynamic pack_dtype
        data_type""",
    "bitsandbytes": """load_in_4bit load_in_8bit _load_in_4bit _load_in_8bit bnb_4bit_quant_type
        bnb_4bit_use_double_quant bnb_4bit_compute_dtype bnb_4bit_quant_storage llm_int8_threshold llm_int8_skip_modules
        llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight""",
    "gptq": """bits group_size desc_act sym checkpoint_format format dynamic pack_dtype adapter rotation
        is_marlin_format data_type activation""",
    "fp8": """fmt activation_scheme weight_block_size scale_fmt kv_cache_scheme data_type bits group_size sym""",
    "fbgemm_fp8": "activation_scale_ub",
    "mxfp4": "",
    "modelopt": """quant_algo kv_cache_quant_algo kv_cache_scheme group_size quantized_layers config_groups
        pre_quant_scale has_zero_point lora_rank""",
    "compressed-tensors": """config_groups format kv_cache_scheme quantization_status sparsity_config
        transform_config""",
}
# What writers note of their own work: which modules they left out, calibration, versions, kernels to run.
_NOTE_NAMES = """
    quant_method method version modules_to_not_convert ignored_layers ignore exclude_modules producer meta provider
    lm_head tokenizer dataset nsamples seqlen model_seqlen batch_size pad_token_id max_input_length
    damp_percent damp_auto_increment static_groups true_sequential act_group_aware mse gptaq foem v2 v2_alpha
    hessian fallback failsafe telemetry mock_quantization device offload_to_disk offload_to_disk_path pack_impl
    parallel_packing gc_mode wait_for_submodule_finalizers auto_forward_data_parallel dense_vram_strategy
    dense_vram_strategy_devices moe_vram_strategy moe_vram_strategy_devices moe hyb_act vram_strategy
    model_name_or_path model_file_base_name block_name_to_quantize module_name_preceding_first_block
    modules_in_block_to_quantize cache_block_outputs backend use_cuda_fp16 use_exllama disable_exllama exllama_config
    do_fuse fuse_max_seq_len modules_to_fuse use_ipex dequantize run_compressed
    autoround_version to_quant_block_names quant_block_list iters lr minmax_lr low_gpu_mem_usage low_cpu_mem_usage
    enable_minmax_tuning enable_norm_bias_tuning enable_quanted_input not_use_best_mse dynamic_max_gap sampler
    gradient_accumulate_steps amp scale_dtype super_bits super_group_size act_bits act_group_size act_sym act_dynamic
    act_data_type use_quant_input regex_config static_kv_dtype static_attention_dtype
    global_compression_ratio moe_sparsity_config attention_input_activations packed_modules_mapping
    smoothquant_val awq_block_size
"""
_NOTES = frozenset(_NOTE_NAMES.split())
# A stranger is refused when its name speaks of numbers or of how they lie; others are told and left.
_NUMBERS = re.compile(
    r"rot|hadamard|transform|smooth|scal|zero|pack|order|perm|code|outlier|spars|lora|adapt|resid|bits|group|format|"
    r"layout|dtype|type|offset|norm|clip|cap|sink|svd|rank|kv|cache|axis|interleav|split|shuffle|lut|table|vector|"
    r"double|nested|mean|bias|mix"
)

_OTHERS = "Take another quantization of this model, or its 16-bit weights"


def refuse(key: str, value: object, expected: str) -> UnsupportedCheckpoint:
    """The error for a setting that is not supported; raise it."""
    return UnsupportedCheckpoint(f"{key} is {value!r}; expected {expected}. {_OTHERS}", param=key)


def check_settings(found: QuantizationSettings) -> tuple[str, ...]:
    """Refuse what is not read, by file, key and value.

    Returns sentences about keys that no reader knows, whose names do not speak of numbers.

    Raises UnsupportedCheckpoint for an unknown method, a value that is not had, or an unknown key whose name may mean
    that numbers are others.
    """
    check_method(found)
    method = "modelopt" if found.method.startswith("modelopt") else found.method
    told = _strangers(found, frozenset(_READ[method].split()) | _NOTES)
    if method in _RULES:
        _RULES[method](found.values, found.where)
    return told


def _strangers(found: QuantizationSettings, known: frozenset[str]) -> tuple[str, ...]:
    told = []
    for key, value in found.values.items():
        if key in known or not value:
            continue
        if _NUMBERS.search(key.lower()):
            raise UnsupportedCheckpoint(
                f"{found.where}.{key} is {value!r}; no reader of {found.method} knows this key, and its name may mean "
                f"that weights are not what they seem. {_OTHERS}; if you know that it changes no number, delete it",
                param=key,
            )
        told.append(
            f"{found.where}.{key} is {value!r}, which no reader of {found.method} knows: it is left out. Compare the "
            "model with its original: headrace verify MODEL --reference ORIGINAL"
        )
    return tuple(told)


# --- caches --------------------------------------------------------------------------------------


def wanted_cache(found: QuantizationSettings) -> Any:
    """What the checkpoint asks its KV cache to be: ``fp8``, "" for nothing, or something else, as it says it."""
    scheme = found.values.get("kv_cache_scheme")
    if found.method.startswith("modelopt"):
        scheme = found.values.get("kv_cache_quant_algo") or scheme
    elif found.method not in ("compressed-tensors", "fp8"):
        return ""
    if not scheme:
        return ""
    if isinstance(scheme, Mapping):
        return "fp8" if scheme.get("num_bits") == 8 and scheme.get("type") == "float" else scheme
    if found.method == "fp8":  # AutoFP8 has scales, or none
        return "fp8" if scheme in ("static", "dynamic") else scheme
    return "fp8" if found.method.startswith("modelopt") and str(scheme).upper() == "FP8" else scheme


def cache_problem(found: QuantizationSettings) -> str:
    """Why the cache that the checkpoint asks for is not had; "" when it is, or nothing is asked for."""
    wanted = wanted_cache(found)
    if wanted in ("", "fp8"):
        return ""
    key = "kv_cache_quant_algo" if found.values.get("kv_cache_quant_algo") else "kv_cache_scheme"
    if isinstance(wanted, Mapping):
        wanted = {name: value for name, value in wanted.items() if value is not None}
    return (
        f"{found.where}.{key} asks for a KV cache that is not had: {wanted!r}. Give --kv-cache-dtype fp8, fp4 or "
        "bfloat16 to choose one; the weights are read all the same"
    )


# --- by method -----------------------------------------------------------------------------------


def _awq(own: Values, where: str) -> None:
    bits = own.get("bits", own.get("w_bit", 4))
    if bits != 4:
        raise refuse(f"{where}.bits", bits, "4")
    for key in ("version", "format", "checkpoint_format"):
        if str(own.get(key) or "gemm").lower() != "gemm":
            raise refuse(f"{where}.{key}", own[key], "gemm")
    _words(own, where)


def _bitsandbytes(own: Values, where: str) -> None:
    kind = own.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise refuse(f"{where}.bnb_4bit_quant_type", kind, "nf4 or fp4")


def _gptq(own: Values, where: str) -> None:
    forms = {str(own[key]).lower() for key in ("checkpoint_format", "format") if own.get(key)}
    if len(forms) > 1 or not forms <= {"gptq", "gptq_v2"}:
        raise refuse(f"{where}.checkpoint_format", " and ".join(sorted(forms)), "gptq or gptq_v2")
    for key in ("adapter", "rotation", "is_marlin_format"):
        if own.get(key):
            raise refuse(
                f"{where}.{key}", own[key], "none (weights that need more than a product, or lie otherwise)"
            )
    rules = own.get("dynamic") or {}
    if own.get("bits") not in (4, 8) and not rules:
        raise refuse(f"{where}.bits", own.get("bits"), "4 or 8")
    _words(own, where)


def _words(own: Values, where: str) -> None:
    """What AWQ and GPTQ share."""
    if own.get("pack_dtype") not in (None, "int32"):
        raise refuse(f"{where}.pack_dtype", own["pack_dtype"], "int32")
    kind = own.get("data_type") or "int"
    if not str(kind).startswith("int"):
        raise refuse(f"{where}.data_type", kind, "int")
    if not isinstance(own.get("dynamic") or {}, Mapping):
        raise refuse(f"{where}.dynamic", own["dynamic"], "an object of rules by module")


def _fp8(own: Values, where: str) -> None:
    if own.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise refuse(f"{where}.fmt", own["fmt"], "e4m3")
    scheme = own.get("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise refuse(f"{where}.activation_scheme", scheme, "dynamic or static")
    if own.get("weight_block_size") is not None:
        _block(f"{where}.weight_block_size", own["weight_block_size"])


def _block(at: str, size: object) -> None:
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise refuse(at, size, "[rows, columns]")


def modelopt_algorithm(name: object) -> str:
    """As the documentation spells it: its exporter writes some in small letters."""
    return str(name or "").upper()


def _modelopt(own: Values, where: str) -> None:
    algorithm = modelopt_algorithm(own.get("quant_algo"))
    if not algorithm and wanted_cache(QuantizationSettings("modelopt", dict(own), where, "")):
        return  # nothing but the cache is quantized
    if algorithm not in (*MODELOPT, "MIXED_PRECISION"):
        raise refuse(
            f"{where}.quant_algo", own.get("quant_algo"), f"one of {', '.join(MODELOPT)}, MIXED_PRECISION"
        )
    if algorithm not in ("FP8_PB_WO", "MIXED_PRECISION"):
        group = 16 if algorithm in ("NVFP4", "W4A16_NVFP4") else 32
        for size in (own.get("group_size"), *_group_sizes(own.get("config_groups"))):
            if size not in (None, group):
                raise refuse(f"{where}.group_size", size, str(group))
    for key in ("pre_quant_scale", "has_zero_point", "lora_rank"):
        if own.get(key):
            raise refuse(f"{where}.{key}", own[key], "none (weights that need more than a product)")


def _group_sizes(groups: object) -> list[object]:
    """Of the weights of each group, where they say so."""
    if not isinstance(groups, Mapping):
        return []
    weights = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
    return [part.get("group_size") for part in weights if isinstance(part, Mapping)]


# --- compressed-tensors --------------------------------------------------------------------------

# The format's own fields (its library knows no others); what another one says could change what weights mean.
_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_WEIGHT_KEYS = {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype",
    "zp_dtype", "observer", "observer_kwargs",
}  # fmt: skip


def _compressed(own: Values, where: str) -> None:
    if own.get("quantization_status", "compressed") not in ("compressed", "frozen"):
        raise refuse(f"{where}.quantization_status", own["quantization_status"], "compressed")
    sparsity = own.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense"):
        raise refuse(f"{where}.sparsity_config", sparsity, "dense")
    if own.get("transform_config"):
        raise refuse(f"{where}.transform_config", "set", "none (rotated weights are not supported)")
    groups = own.get("config_groups")
    if groups == {} and own.get("kv_cache_scheme"):
        return  # nothing but the cache is quantized
    if not isinstance(groups, Mapping) or not groups:
        raise refuse(f"{where}.config_groups", groups, "at least one group")
    for name, group in groups.items():
        _group(f"{where}.config_groups.{name}", group, own)


def _group(at: str, group: Any, own: Values) -> None:
    if not isinstance(group, Mapping):
        raise refuse(at, group, "an object")
    _only(at, group, _GROUP_KEYS)
    for part in ("weights", "input_activations"):
        if not isinstance(group.get(part) or {}, Mapping):
            raise refuse(f"{at}.{part}", group[part], "an object, or null")
    weights = group.get("weights") or {}
    _only(f"{at}.weights", weights, _WEIGHT_KEYS)
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise refuse(f"{at}.targets", targets, "a list of names")
    for target in targets:
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except re.error as error:
            raise refuse(f"{at}.targets", target, f"a regular expression ({error})") from None
    form = group.get("format") or own.get("format")
    if not isinstance(form, str) or form not in CT_FORMATS:
        raise refuse(f"{at.split('.config_groups.')[0]}.format", form, f"one of {sorted(CT_FORMATS)}")
    _numbers(at, form, weights, group.get("input_activations"))


def _numbers(at: str, form: str, weights: Values, inputs: Values | None) -> None:
    bits, kind = weights.get("num_bits"), str(weights.get("type", "int")).lower()
    strategy = weights.get("strategy", "tensor")
    if form == "pack-quantized":
        if kind != "int" or bits not in (4, 8):
            raise refuse(f"{at}.weights", f"{kind} of {bits} bits", "int of 4 or 8 bits packed")
    elif form in ("int-quantized", "naive-quantized", "float-quantized"):
        if kind not in ("int", "float"):
            raise refuse(f"{at}.weights.type", kind, "int or float")
        if bits not in (range(2, 9) if kind == "int" else (8,)):
            raise refuse(f"{at}.weights.num_bits", bits, "2 to 8" if kind == "int" else "8")
        if kind == "float" and strategy not in ("tensor", "channel", "block"):
            raise refuse(f"{at}.weights.strategy", strategy, "tensor, channel or block for FP8")
        if kind == "float" and inputs and (inputs.get("type") != "float" or inputs.get("num_bits") != 8):
            raise refuse(f"{at}.input_activations", dict(inputs), "8-bit float, or none")
        if strategy == "block":
            _block(f"{at}.weights.block_structure", weights.get("block_structure"))
    if kind == "int" and "fp" not in form and strategy not in ("tensor", "channel", "group"):
        raise refuse(f"{at}.weights.strategy", strategy, "tensor, channel or group")


def _only(at: str, found: Values, known: set[str]) -> None:
    for key in found.keys() - known:
        if found[key]:
            raise refuse(f"{at}.{key}", found[key], f"only {', '.join(sorted(known))}")


_RULES: dict[str, Callable[[Values, str], None]] = {
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "fp8": _fp8,
    "modelopt": _modelopt,
    "compressed-tensors": _compressed,
}
