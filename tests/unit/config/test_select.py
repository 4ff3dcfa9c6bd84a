from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace.config.plan.facts import Facts
from headrace.config.spec import EngineSpec
from headrace.engines.inspect import inspect
from headrace.engines.select import select
from headrace.errors import ConfigError, UnsupportedCheckpoint
from unit.config.shapes import BGE_LARGE, QWEN3_06B, write_config


def facts(name: str, modules: bool = False, **config: Any) -> Facts:
    return Facts(
        where="x", config={"architectures": [name], **config}, modules=("Transformer",) if modules else ()
    )


@pytest.mark.parametrize(
    ("found", "engine", "says"),
    [
        (facts("Qwen3ForCausalLM"), "dense", "one MLP"),
        (facts("LlamaForCausalLM", num_experts=1), "dense", "one MLP"),
        (facts("GPT2LMHeadModel"), "dense", "one MLP"),
        (facts("Qwen3MoeForCausalLM", num_experts=128), "moe", "128 experts"),
        (facts("MixtralForCausalLM", num_local_experts=8), "moe", "8 experts"),
        (facts("DeepseekV3ForCausalLM", n_routed_experts=256), "moe", "256 experts"),
        (facts("Llama4ForConditionalGeneration", text_config={"num_local_experts": 16}), "moe", "16 experts"),
        (facts("Gemma3ForConditionalGeneration", text_config={"num_attention_heads": 4}), "dense", "one MLP"),
        (facts("Qwen3ForCausalLM", modules=True), "embed", "sentence-transformers"),
        (facts("Qwen3Model"), "embed", "no language-model head"),
        (facts("MistralModel", modules=True), "embed", "causal"),
        (facts("Qwen3ForSequenceClassification"), "embed", "classifies"),
        (facts("LlamaForTokenClassification"), "embed", "labels"),
        (facts("Qwen2Model", is_causal=False), "bert", "config.json says so"),
        (facts("Gemma3TextModel", use_bidirectional_attention=True), "bert", "both sides"),
        (facts("LlamaBidirectionalModel"), "bert", "both sides"),
        (facts("BertModel"), "bert", "its family"),
        (facts("RobertaModel", modules=True), "bert", "its family"),
        (facts("XLMRobertaForSequenceClassification"), "bert", "classifies"),
        (facts("BertForTokenClassification"), "bert", "labels"),
        (facts("ModernBertModel"), "bert", "its family"),
        (facts("NomicBertModel"), "bert", "its family"),
        (facts("NewModel"), "bert", "its family"),
        (facts("JinaBertModel"), "bert", "its family"),
        (facts("EuroBertModel"), "bert", "its family"),
        (facts("MPNetModel"), "bert", "its family"),
        (facts("BertForMaskedLM"), "bert", "masked"),
        (facts("DistilBertForMaskedLM", modules=True), "bert", "masked"),
        (facts("WhisperForConditionalGeneration"), "speech", "speech"),
    ],
)
def test_engine_and_one_sentence(found: Facts, engine: str, says: str) -> None:
    chosen = select(found)
    assert chosen.engine == engine
    assert says in chosen.reason
    assert "\n" not in chosen.reason


DENSE, MOE = facts("Qwen3ForCausalLM"), facts("Qwen3MoeForCausalLM", num_experts=8)
EMBED, BERT = facts("Qwen3Model", modules=True), facts("BertModel", modules=True)


@pytest.mark.parametrize(
    ("found", "asked"),
    [
        *((DENSE, asked) for asked in ("auto", "decoder", "dense")),
        *((MOE, asked) for asked in ("auto", "decoder", "moe")),
        *((EMBED, asked) for asked in ("auto", "encoder", "embed")),
        *((BERT, asked) for asked in ("auto", "encoder", "bert")),
    ],
)
def test_right_choices_stand(found: Facts, asked: Any) -> None:
    assert select(found, EngineSpec(model="x", engine=asked)) == select(found)


@pytest.mark.parametrize(
    ("found", "asked", "right"),
    [
        (DENSE, "moe", "engine: dense"),
        (DENSE, "bert", "base_model: decoder"),
        (DENSE, "encoder", "--pooling"),
        (MOE, "dense", "engine: moe"),
        (EMBED, "decoder", "base_model: encoder)"),
        (EMBED, "bert", "engine: embed"),
        (BERT, "decoder", "base_model: encoder_bert"),
        (BERT, "embed", "engine: bert"),
        (BERT, "speech", "engine: bert"),
    ],
)
def test_wrong_choices_are_refused_with_the_right_one(found: Facts, asked: Any, right: str) -> None:
    with pytest.raises(ConfigError, match="engine") as caught:
        select(found, EngineSpec(model="x", engine=asked))
    assert right in str(caught.value)
    assert caught.value.param == "engine"


def test_pooling_turns_a_generator_into_an_embedder() -> None:
    assert select(DENSE, EngineSpec(model="x", pooling="last")).engine == "embed"
    assert select(DENSE, EngineSpec(model="x", pooling="last", engine="encoder")).engine == "embed"


def test_no_architecture() -> None:
    with pytest.raises(UnsupportedCheckpoint, match="architectures"):
        select(Facts(where="x", config={}))


NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}


@pytest.mark.parametrize(
    ("quantization", "method", "kv"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", ""),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", ""),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": NVFP4}},
            },
            "nvfp4",
            "",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": FP8}},
                "kv_cache_scheme": {"num_bits": 8, "type": "float"},
            },
            "fp8",
            "fp8",
        ),
        ({"quant_method": "mxfp4"}, "mxfp4", ""),
        ({"quant_method": "awq", "bits": 4}, "awq", ""),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq", ""),
    ],
)
def test_quantization_is_read(tmp_path: Path, quantization: dict[str, Any], method: str, kv: str) -> None:
    folder = write_config(tmp_path, QWEN3_06B | {"quantization_config": quantization})
    found = inspect(folder).quantized
    assert (found.method, found.kv, found.source) == (method, kv, "config.json")
    assert method in select(inspect(folder)).reason


def test_folder_facts(tmp_path: Path) -> None:
    folder = write_config(
        tmp_path,
        BGE_LARGE,
        modules_json=[{"type": "sentence_transformers.models.Transformer"}, {"type": "x.Pooling"}],
        **{"1_Pooling__config_json": {"pooling_mode_cls_token": True}},
        tokenizer_config_json={"chat_template": "{{ messages }}"},
        hf_quant_config_json={"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}},
    )
    found = inspect(folder)
    assert found.container == "config"
    assert found.modules == ("sentence_transformers.models.Transformer", "x.Pooling")
    assert found.pooling == {"pooling_mode_cls_token": True}
    assert found.chat_template
    assert (found.quantized.method, found.quantized.kv) == ("fp8", "fp8")
    assert "1_Pooling/config.json" in found.files
