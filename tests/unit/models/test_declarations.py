"""Reading `config.json`: right or refused, never passed over."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import transformers as hf

from headrace.config.plan.facts import Facts
from headrace.config.plan.shape import read_shape
from headrace.errors import UnknownArchitecture, UnsupportedCheckpoint
from headrace.models.registry import FAMILIES, read_config

SIZES = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
HF_CONFIGS = {
    "LlamaForCausalLM": hf.LlamaConfig,
    "MistralForCausalLM": hf.MistralConfig,
    "Qwen2ForCausalLM": hf.Qwen2Config,
    "Qwen3ForCausalLM": hf.Qwen3Config,
    "Gemma2ForCausalLM": hf.Gemma2Config,
    "Gemma3ForCausalLM": hf.Gemma3TextConfig,
    "Phi3ForCausalLM": hf.Phi3Config,
    "GraniteForCausalLM": hf.GraniteConfig,
    "Olmo2ForCausalLM": hf.Olmo2Config,
    "SmolLM3ForCausalLM": hf.SmolLM3Config,
    "GemmaForCausalLM": hf.GemmaConfig,
    "Olmo3ForCausalLM": hf.Olmo3Config,
    "MinistralForCausalLM": hf.MinistralConfig,
    "Starcoder2ForCausalLM": hf.Starcoder2Config,
    "StableLmForCausalLM": hf.StableLmConfig,
    "Exaone4ForCausalLM": hf.Exaone4Config,
    "SeedOssForCausalLM": hf.SeedOssConfig,
    "GptOssForCausalLM": hf.GptOssConfig,
    "CohereForCausalLM": hf.CohereConfig,
    "Cohere2ForCausalLM": hf.Cohere2Config,
    "GlmForCausalLM": hf.GlmConfig,
    "Glm4ForCausalLM": hf.Glm4Config,
    "Ernie4_5ForCausalLM": hf.Ernie4_5Config,
    "GraniteMoeForCausalLM": hf.GraniteMoeConfig,
    "NemotronForCausalLM": hf.NemotronConfig,
    "ArceeForCausalLM": hf.ArceeConfig,
}
# Fields that are free to change: training, tokens, bookkeeping, and output switches.
FREE = {
    *(
        "attention_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "initializer_range",
        "use_cache",
        "transformers_version",
    ),
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "pretraining_tp",
        "dtype",
        "model_type",
        "_name_or_path",
    ),
    *(
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
    ),
    *(
        "residual_dropout",
        "hidden_dropout",
        "embedding_dropout",
        "router_aux_loss_coef",
        "output_router_logits",
    ),
    *("id2label", "label2id", "problem_type", "architectures", "default_theta"),
    "original_max_position_embeddings",  # of Phi 3, without LongRoPE
}
# Fields without effect beside the others that transformers writes: windows that are switched off, and
# switches and patterns that layer_types overrules. tests/parity has cases where they act.
DORMANT = {
    "Qwen2ForCausalLM": {"use_sliding_window", "sliding_window", "max_window_layers"},
    "Qwen3ForCausalLM": {"use_sliding_window", "sliding_window", "max_window_layers"},
    "Gemma3ForCausalLM": {"_sliding_window_pattern"},
    "SmolLM3ForCausalLM": {"no_rope_layer_interval", "use_sliding_window"},
    "Exaone4ForCausalLM": {"sliding_window_pattern"},
}
PARTIAL = (
    "Phi3ForCausalLM",
    "StableLmForCausalLM",
    "GlmForCausalLM",
    "Glm4ForCausalLM",
    "NemotronForCausalLM",
)  # rotate a part of each head where the file says so
LEFT_OUT = ("tie_word_embeddings", "attention_bias", "use_qkv_bias", "qkv_bias", "use_bias")
UNGATED = ("Starcoder2ForCausalLM", "NemotronForCausalLM", "ArceeForCausalLM")


def config_of(architecture: str, **fields: Any) -> dict[str, Any]:
    config = HF_CONFIGS[architecture](**{**SIZES, **fields}).to_dict()
    return {**config, "architectures": [architecture]}


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2 + 1
    if isinstance(value, float):
        return value * 1.5 + 0.01
    if isinstance(value, str):
        return value + "_of_another_kind"
    if isinstance(value, list):
        return [other(v) for v in value]
    return {key: other(v) for key, v in value.items()}


@pytest.mark.parametrize("architecture", list(HF_CONFIGS))
def test_every_field_counts(architecture: str) -> None:
    """Changing any field changes the declaration or is refused by name."""
    config = config_of(architecture)
    declared = read_config(config)
    for name, value in config.items():
        if value is None or name in FREE | DORMANT.get(architecture, set()):
            continue
        changed = {**copy.deepcopy(config), name: other(copy.deepcopy(value))}
        got = outcome(changed)
        assert got not in (declared, None), f"{name} = {changed[name]!r} was ignored"


def outcome(config: dict[str, Any]) -> object:
    """The declaration, or the name of the field for which it was refused."""
    try:
        return read_config(config)
    except UnsupportedCheckpoint as error:
        name = error.param or ""
        return name if name and name.split(".")[-1] in str(error) else None


@pytest.mark.parametrize("architecture", list(HF_CONFIGS))
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_parameters", {"rope_type": "proportional", "rope_theta": 1e4}),
        ("rope_scaling", {"type": "spiral", "factor": 2.0}),
        ("rope_scaling", {"type": "linear", "factor": "two"}),
        ("rope_scaling", {"type": "linear", "factor": 2.0, "mystery": 3}),
        ("num_experts", 7),
        ("alibi_bias", True),
        ("attention_sinks", 4),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", True),
        ("hidden_size", "64"),
        ("num_key_value_heads", 3),
        ("rms_norm_eps", float("nan")),
        ("tie_word_embeddings", "yes"),
        ("quantization_config", {"quant_method": "fp8"}),
        ("layer_types", ["full_attention", "linear_attention"] * 2),
        ("rope_parameters", {"rope_type": ["yarn"]}),
    ],
)
def test_refused_by_name(architecture: str, field: str, value: Any) -> None:
    config = config_of(architecture)
    if "rope" in field:
        config.pop("rope_parameters", None)
    with pytest.raises(UnsupportedCheckpoint, match=r"rope|" + field) as caught:
        read_config({**config, field: value})
    assert caught.value.param


@pytest.mark.parametrize("value", [0, -4.0, "256"])
def test_a_scale_of_attention_is_above_zero(value: Any) -> None:
    config = {**config_of("Gemma2ForCausalLM"), "query_pre_attn_scalar": value}
    with pytest.raises(UnsupportedCheckpoint, match="query_pre_attn_scalar is"):
        read_config(config)


@pytest.mark.parametrize("architecture", list(HF_CONFIGS))
def test_unknown_activation_is_refused(architecture: str) -> None:
    field = "hidden_activation" if "Gemma" in architecture else "hidden_act"
    for value in ("xielu", {"name": "silu"}, ["silu"]):
        with pytest.raises(UnsupportedCheckpoint, match=field):
            read_config({**config_of(architecture), field: value})


@pytest.mark.parametrize("architecture", list(HF_CONFIGS))
def test_plain_activation_is_no_gate(architecture: str) -> None:
    config = config_of(architecture)
    field = "hidden_activation" if "Gemma" in architecture else "hidden_act"
    if architecture in UNGATED:
        assert read_config({**config, field: "relu2"}).activation == "relu2"
    else:
        with pytest.raises(UnsupportedCheckpoint, match=field):
            read_config({**config, field: "relu2"})


@pytest.mark.parametrize("architecture", list(HF_CONFIGS))
def test_bookkeeping_is_not_refused(architecture: str) -> None:
    config = config_of(architecture)
    junk = {
        "unsloth_version": "2026.1",
        "transformers.js_config": {"dtype": "q4"},
        "rope_interleaved": False,
        "is_llama_config": True,
        "mlp_only_layers": [],
    }
    assert read_config({**config, **junk}) == read_config(config)


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(UnknownArchitecture, match="Qwen3ForCausalLM"):
        read_config({"architectures": ["Qwen3NextForCausalLM"]})
    with pytest.raises(UnknownArchitecture, match="LlamaForCausalLM"):
        read_config({"architectures": ["Zzz"]})
    with pytest.raises(UnknownArchitecture, match="architectures"):
        read_config({})


def test_all_headless_forms_are_headless() -> None:
    for name in FAMILIES:
        assert name.endswith(("Model", "ForCausalLM", "ForConditionalGeneration"))
    config = {**config_of("Qwen3ForCausalLM"), "architectures": ["Qwen3Model"]}
    assert read_config(config).headless
    assert not read_config(config_of("Qwen3ForCausalLM")).headless


# Excerpts of published config.json files, in the spelling they were published in.
LLAMA_32 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}


def test_llama_3_2() -> None:
    declared = read_config(LLAMA_32)
    assert (declared.rope.kind, declared.rope.theta, declared.rope.original_length) == ("llama3", 5e5, 8192)
    assert declared.tied
    assert declared.norm_eps == 1e-5
    assert declared.attention_scale == 64**-0.5


def test_gemma_3_multimodal_reads_the_text_part() -> None:
    declared = read_config(GEMMA_3_4B)
    assert (declared.num_heads, declared.num_kv_heads, declared.head_dim) == (8, 4, 256)
    assert declared.vocab_size == 262_208
    assert declared.windows[:6] == (1024,) * 5 + (None,)
    assert declared.local_rope is not None
    assert (declared.rope.kind, declared.rope.theta, declared.local_rope.theta) == ("linear", 1e6, 1e4)
    assert declared.local_rope.kind == "default"
    assert declared.tied


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM"])
def test_old_and_new_rope_spellings_agree(architecture: str) -> None:
    new = config_of(architecture)
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    parameters = new["rope_parameters"]
    if "full_attention" in parameters:
        old["rope_theta"] = parameters["full_attention"]["rope_theta"]
        old["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    else:
        old["rope_theta"] = parameters["rope_theta"]
        old["partial_rotary_factor"] = parameters.get("partial_rotary_factor")
    assert read_config(old) == read_config(new)


@pytest.mark.parametrize("architecture", list(HF_CONFIGS))
@pytest.mark.parametrize("place", ["top", "rope_parameters"])
def test_a_part_of_the_head_is_rotated_by_some_alone(architecture: str, place: str) -> None:
    """transformers ignores the factor in the other families and vLLM follows it: neither is a safe guess."""
    config = config_of(architecture, head_dim=16)
    if place == "top":
        config["rope_theta"] = 10_000.0
        config["rope_parameters"] = {"rope_type": "default"}
        config["partial_rotary_factor"] = 0.5
    else:
        config["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
        }
    if architecture in PARTIAL:
        assert read_config(config).rope.dim == 8
    else:
        with pytest.raises(UnsupportedCheckpoint, match="partial_rotary_factor"):
            read_config(config)


def test_gemma_2_does_not_look_both_ways() -> None:
    """transformers masks Gemma 2 causally whatever this field of Gemma 3 says."""
    with pytest.raises(UnsupportedCheckpoint, match="use_bidirectional_attention"):
        read_config({**config_of("Gemma2ForCausalLM"), "use_bidirectional_attention": True})


@pytest.mark.parametrize("architecture", list(HF_CONFIGS))
def test_plans_read_the_same_sizes(architecture: str) -> None:
    """As the file states them, and where it leaves to the family what published files leave out."""
    whole = config_of(architecture)
    sparse = {name: value for name, value in whole.items() if name not in LEFT_OUT}
    biased = {name: True if name in LEFT_OUT and "bias" in name else value for name, value in whole.items()}
    for config in (whole, sparse, biased):
        declared = read_config(config)
        shape = read_shape(Facts(where="", config=config, container="config"))
        assert (shape.tied, shape.qkv_bias, shape.gated) == (
            declared.tied,
            declared.qkv_bias,
            declared.gated_mlp,
        )
        assert (shape.head_dim, shape.kv_heads, shape.context) == (
            declared.head_dim,
            declared.num_kv_heads,
            declared.max_position_embeddings,
        )
        windows = [window for window in declared.windows if window is not None]
        assert shape.windows == len(windows)
        assert not windows or {shape.window} == set(windows)
        if declared.experts is not None:
            assert (shape.experts, shape.expert_size) == (
                declared.experts.num_experts,
                declared.experts.intermediate_size,
            )
