from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.cli.main import main
from headrace.config.accelerators import ACCELERATORS, parse_accelerator
from headrace.config.plan.facts import Facts, Quantized, Tensor
from headrace.config.plan.floors import floors
from headrace.config.plan.memory import CUDA_PROCESS_BYTES, shard
from headrace.config.plan.plan import Plan, draw_plan, human_bytes
from headrace.config.plan.scratch import Scratch, forward_bytes, largest_load, scratch
from headrace.config.plan.shape import read_shape
from headrace.config.plan.weights import classify, expected_tensors, packed_bytes, packed_format, weigh
from headrace.config.spec import EngineSpec
from headrace.engines.inspect import inspect
from headrace.engines.plan import cpu_machine, gpu_machine, plan_for
from headrace.errors import ConfigError, DoesNotFit, ModelError, UnknownArchitecture, UnsupportedCheckpoint
from unit.config.shapes import (
    BGE_LARGE,
    DEEPSEEK_V3,
    LLAMA_70B,
    QWEN3_06B,
    QWEN3_8B,
    QWEN3_30B_A3B,
    write_config,
    write_header,
)


def facts(config: dict[str, Any]) -> Facts:
    return Facts(where="x", config=config, container="config")


def plan(config: dict[str, Any], gpu: str = "H100", **settings: Any) -> Plan:
    engine = "bert" if "Bert" in config["architectures"][0] else "dense"
    spec = EngineSpec(model="x", **settings)
    return draw_plan(spec, facts(config), gpu_machine(gpu), engine=engine, reason="")


# By hand, from the shapes: q + k + v + o + three MLP matrices, norms, embedding and head.
QWEN8_LAYER = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 12288
QWEN8_NORMS = 36 * (2 * 4096 + 2 * 128) + 4096
QWEN8 = 36 * QWEN8_LAYER + QWEN8_NORMS + 2 * 151936 * 4096
QWEN06_LAYER = 1024 * (2048 + 2 * 1024) + 2048 * 1024 + 3 * 1024 * 3072
QWEN06 = 28 * QWEN06_LAYER + 28 * (2 * 1024 + 2 * 128) + 1024 + 151936 * 1024


@pytest.mark.parametrize(
    ("config", "parameters", "kv_token"),
    [
        (QWEN3_06B, QWEN06, 2 * 28 * 8 * 128 * 2),
        (QWEN3_8B, QWEN8, 2 * 36 * 8 * 128 * 2),
        (LLAMA_70B, 70_553_706_496, 2 * 80 * 8 * 128 * 2),
        (QWEN3_30B_A3B, 30_532_122_624, 2 * 48 * 4 * 128 * 2),
        (DEEPSEEK_V3, 671_026_404_352, 61 * (512 + 64) * 2),
    ],
)
def test_parameters_and_kv_of_real_shapes(config: dict[str, Any], parameters: int, kv_token: int) -> None:
    shape = read_shape(facts(config))
    weights = weigh(facts(config), shape, 2, "")
    # Published counts: 0.596 B, 8.19 B, 70.55 B, 30.53 B, 671 B (router biases are left out of the last).
    assert weights.parameters == pytest.approx(parameters, rel=1e-5)
    assert weights.total == weights.parameters * 2
    assert shape.kv_elements() * 2 == kv_token


def test_qwen8_by_hand() -> None:
    drawn = plan(QWEN3_8B, max_model_len=8192)
    assert drawn.weights.by_kind == {
        "embedding": 151936 * 4096 * 2,
        "head": 151936 * 4096 * 2,
        "attention": 36 * (4096 * 6144 + 4096 * 4096) * 2,
        "mlp": 36 * 3 * 4096 * 12288 * 2,
        "norm": QWEN8_NORMS * 2,
    }
    need = scratch(
        read_shape(facts(QWEN3_8B)),
        largest_load(
            EngineSpec(model="x"),
            read_shape(facts(QWEN3_8B)),
            tokens=8192,
            context=8192,
            dtype_bytes=2,
            cuda=True,
        ),
    )
    # The widest place of a layer: two streams and a norm, and both halves of the MLP with their product.
    assert need.pooled >= 8192 * (3 * 4096 + 3 * 12288) * 2
    assert need.plain >= 256 * 151936 * (2 + 4)
    assert need.state >= 256 * 32 * 32 * 130 * 4
    assert drawn.budget.activations == need.state + need.plain + need.pooled
    usable = int(81_559 * 1024**2 * 0.9)
    room = usable - CUDA_PROCESS_BYTES - QWEN8 * 2 - drawn.budget.activations - need.objects
    pool = room // (147_456 * 16) * 147_456 * 16
    assert drawn.budget.pool == pool
    assert drawn.kv_token_bytes == 147_456
    assert drawn.pool_tokens == (pool // (147_456 * 16) - 1) * 16
    assert drawn.batch == drawn.pool_tokens // 8192
    assert drawn.fits
    assert "8.19 B" in drawn.short()


def test_steps_read_what_the_reference_measured() -> None:
    """Bytes that a decode step must read: 1.19, 15.1 and 8.19 GB, as counted elsewhere by hand."""
    sizes = [
        (QWEN3_06B, "", 1.19e9),
        (QWEN3_8B, "", 15.1e9),
        (QWEN3_8B, "fp8", 8.19e9),
        (QWEN3_30B_A3B, "", 6.1e9),
        (QWEN3_8B, "int4-g128", 4.02e9),  # scale and zero of 16 bit for 128 values
    ]
    for config, scheme, expected in sizes:
        shape = read_shape(facts(config))
        assert weigh(facts(config), shape, 2, scheme).read_step == pytest.approx(expected, rel=0.02)


def test_floors_are_bytes_over_bandwidth_and_work_over_rate() -> None:
    shape = read_shape(facts(QWEN3_8B))
    weights = weigh(facts(QWEN3_8B), shape, 2, "")
    h100 = ACCELERATORS["H100"]
    found = floors(h100, 1, shape, weights, arithmetic="bfloat16", kv_bytes=147_456, batch=64, prompt=4096)
    assert found.token == pytest.approx((weights.read_step + 4096 * 147_456) / 3.35e12)
    products = QWEN8 - 151936 * 4096
    work = 2 * products * 4096 + 2 * 36 * 4096 * 4096**2
    assert found.first_token == pytest.approx(work / 989e12, rel=1e-6)
    assert found.throughput < 64 * found.single
    two = floors(h100, 2, shape, weights, arithmetic="bfloat16", kv_bytes=147_456, batch=64, prompt=4096)
    assert two.single == pytest.approx(2 * found.single)
    # Experts: at batch 1 eight of 128, at large batches all of them.
    moe = read_shape(facts(QWEN3_30B_A3B))
    moe_weights = weigh(facts(QWEN3_30B_A3B), moe, 2, "")
    one, many = (
        floors(h100, 1, moe, moe_weights, arithmetic="bfloat16", kv_bytes=0, batch=batch, prompt=1)
        for batch in (1, 512)
    )
    assert one.token == pytest.approx(6.1e9 / 3.35e12, rel=0.02)
    assert 512 / many.throughput == pytest.approx((moe_weights.total - 151936 * 2048 * 2) / 3.35e12, rel=0.02)


def _need(packed: str, *, tokens: int, rows: int = 64, quantization: str = "") -> Scratch:
    shape = read_shape(facts(QWEN3_8B))
    spec = EngineSpec(model="x", max_num_seqs=rows, quantization=quantization)
    load = largest_load(
        spec, shape, tokens=tokens, context=8192, dtype_bytes=2, cuda=True, packed=packed
    )  # fmt: skip
    return scratch(shape, load)


def test_products_that_unpack_weights_have_room_for_them() -> None:
    """A short step is less than one matrix in 16 bits, of gate and up; FP8 in blocks goes by way of float32."""
    halves = 2 * 12288 * 4096
    direct = _need("fp8", tokens=64).pooled
    for packed in ("int4", "int8", "nvfp4", "mxfp4", "awq", "gptq"):
        assert _need(packed, tokens=64).pooled > direct + halves * 2 * 0.8
    assert _need("fp8_block", tokens=64).pooled > direct + halves * 14 * 0.9
    assert _need("fp8_block", tokens=8192).pooled > 8192 * 12288 * 15 > _need("fp8", tokens=8192).pooled
    assert _need("int4", tokens=8192) == _need("", tokens=8192)  # by then the product is larger


def test_a_packed_head_is_unpacked_for_many_rows_only() -> None:
    head = 151936 * 4096 * 2
    assert _need("int4", tokens=512, rows=65, quantization="int4").pooled > head
    assert _need("int4", tokens=512, rows=64, quantization="int4").pooled < head
    assert _need("fp8", tokens=512, rows=256, quantization="fp8").pooled < head


def test_encoders_in_eight_bits_take_more_for_a_pass_and_less_for_the_process() -> None:
    plain, packed = plan(BGE_LARGE, pooling="cls"), plan(BGE_LARGE, pooling="cls", quantization="fp8")
    assert packed.budget.activations > plain.budget.activations
    assert packed.budget.process < plain.budget.process == CUDA_PROCESS_BYTES


def test_fp8_that_pytorch_does_not_multiply_as_it_is() -> None:
    tensors = {"a.weight": Tensor((256, 256), "F8_E4M3", 65536)}
    fp8 = Facts(where="", config={}, tensors=tensors, quantized=Quantized("fp8", "", "config.json"))
    assert packed_format(fp8, "") == "fp8"
    for extra in ("a.weight_scale_inv", "a.input_scale"):
        more = {**tensors, extra: Tensor((2, 2), "F32", 16)}
        assert packed_format(msgspec.structs.replace(fp8, tensors=more), "") == "fp8_block"
    assert packed_format(facts(QWEN3_8B), "fp4_mlp_only") == "nvfp4"
    assert packed_format(facts(QWEN3_8B), "") == ""


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("fp8", 256 * 512 + 256 * 4),
        ("fp8_mlp_only", 256 * 512 + 256 * 4),
        ("int8", 256 * 512 + 256 * 2),
        ("fp8_block", 256 * 512 + 2 * 4 * 4),
        ("nvfp4", 256 * 256 + 256 * 32 + 256 * 4),
        ("mxfp4", 256 * 256 + 256 * 16 + 256 * 4),
        ("int4", 256 * 256 + 256 * 16 * 4),
        ("int4-g128", 256 * 256 + 256 * 4 * 4),
    ],
)
def test_packed_bytes(scheme: str, expected: int) -> None:
    assert packed_bytes((256, 512), scheme) == expected


def test_schemes_touch_only_what_they_should() -> None:
    shape = read_shape(facts(QWEN3_30B_A3B))
    plain, whole, mlp = (
        weigh(facts(QWEN3_30B_A3B), shape, 2, scheme) for scheme in ("", "fp8", "fp8_mlp_only")
    )
    for kind in ("embedding", "head", "norm"):
        assert plain.by_kind[kind] == whole.by_kind[kind]
    assert whole.by_kind["attention"] < 0.51 * plain.by_kind["attention"]
    assert mlp.by_kind["attention"] == plain.by_kind["attention"]
    assert mlp.by_kind["experts"] == whole.by_kind["experts"] < 0.51 * plain.by_kind["experts"]
    assert plain.parameters == whole.parameters


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("model.layers.3.self_attn.q_proj.weight", "attention"),
        ("model.layers.3.self_attn.q_norm.weight", "norm"),
        ("model.layers.3.mlp.down_proj.weight", "mlp"),
        ("model.layers.3.mlp.gate.weight", "mlp"),
        ("model.layers.3.mlp.experts.7.up_proj.weight", "experts"),
        ("model.layers.3.block_sparse_moe.experts.1.w1.weight", "experts"),
        ("model.layers.3.post_attention_layernorm.weight", "norm"),
        ("model.norm.weight", "norm"),
        ("embeddings.word_embeddings.weight", "embedding"),
        ("bert.embeddings.LayerNorm.bias", "norm"),
        ("encoder.layer.0.attention.self.query.weight", "attention"),
        ("encoder.layer.0.attention.output.dense.weight", "attention"),
        ("encoder.layer.0.output.dense.weight", "mlp"),
        ("encoder.layer.0.intermediate.dense.bias", "mlp"),
        ("classifier.weight", "head"),
        ("score.weight", "head"),
        ("vision_tower.blocks.0.attn.qkv.weight", "vision"),
        ("layers.0.Wqkv.weight", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert classify(name) in (kind, "attention" if "Wqkv" in name else kind)


def test_encoder_keeps_no_cache() -> None:
    drawn = plan(BGE_LARGE)
    assert (drawn.kv_token_bytes, drawn.pool_tokens) == (0, 0)
    assert drawn.max_model_len == 512
    assert drawn.fits
    # bge-large has 335.1 M parameters, 334.1 M without its pooler.
    assert drawn.weights.parameters == pytest.approx(334.1e6, rel=1e-3)


def test_inputs_of_encoders() -> None:
    def context(name: str, positions: int, max_tokens: int = 0, **more: Any) -> int:
        config = BGE_LARGE | {"architectures": [name], "max_position_embeddings": positions} | more
        return read_shape(Facts(where="x", config=config, max_tokens=max_tokens), encoder=True).context

    assert context("BertModel", 512) == 512
    assert context("BertModel", 512, 256) == 256
    assert context("BertModel", 512, 8192) == 512
    assert context("XLMRobertaModel", 514, pad_token_id=1) == 512
    assert context("RobertaModel", 514) == 512
    assert context("MPNetModel", 514) == 512


def test_what_does_not_fit_says_what_would() -> None:
    drawn = plan(LLAMA_70B, "H100")
    assert not drawn.fits
    assert drawn.shortage > 0
    fitting = {option.what for option in drawn.options if option.fits}
    assert "fp4 weights" in fitting
    assert "H100:4 (tensor_parallel_size 4)" in fitting
    assert "fp8 KV cache" not in fitting
    assert all(option.served != ("tensor_parallel_size" in option.what) for option in drawn.options)
    with pytest.raises(
        DoesNotFit, match=r"would fit: fp4 weights\. It would fit H100:2.*does not serve"
    ) as caught:
        drawn.check_fits()
    assert "131." in str(caught.value)  # GiB of weights
    assert "DOES NOT FIT" in drawn.short()
    split = plan(LLAMA_70B, "H200:4", tensor_parallel_size=4)
    assert split.fits
    assert any("serve will refuse this: tensor_parallel_size 4" in sentence for sentence in split.warnings)


def test_what_serve_refuses_is_no_way_out() -> None:
    """An FP8 cache where q, k and v have a bias."""
    for bias in (False, True):
        drawn = plan({**LLAMA_70B, "num_hidden_layers": 8, "attention_bias": bias}, "H100")
        assert ("fp8 KV cache" in {option.what for option in drawn.options}) != bias


def test_asked_context_is_held_to() -> None:
    drawn = plan(QWEN3_8B, "L4", max_model_len=40960)
    assert not drawn.fits
    free = plan(QWEN3_8B, "L4")
    assert free.fits
    assert 0 < free.largest_context < 40960
    assert free.max_model_len == free.largest_context
    assert plan(QWEN3_8B, "L4", max_model_len=free.largest_context).fits
    # A shorter context needs smaller tables, 1 KiB a token; those of 40,960 tokens make room for 300 more.
    tight = plan(QWEN3_8B, "L4", max_model_len=free.largest_context + 512)
    assert not tight.fits
    with pytest.raises(DoesNotFit, match=f"max_model_len {tight.largest_context}"):
        tight.check_fits()
    with pytest.raises(ConfigError, match="made for 40960 tokens"):
        plan(QWEN3_8B, max_model_len=40961)


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("config", [QWEN3_06B, QWEN3_8B, QWEN3_30B_A3B])
def test_parts_never_exceed_the_whole(config: dict[str, Any], fraction: float) -> None:
    for gpu in ("L4", "A100", "H100", "H200:2", "B200"):
        ranks = parse_accelerator(gpu).count
        drawn = plan(config, gpu, memory_fraction=fraction, tensor_parallel_size=ranks)
        budget = drawn.budget
        if drawn.fits:
            assert drawn.pool_tokens * drawn.kv_token_bytes <= budget.pool
            assert budget.used <= budget.usable <= budget.total
            assert drawn.batch * drawn.max_model_len <= drawn.pool_tokens or drawn.batch == 256
        else:
            assert drawn.shortage > 0


def test_fixed_pool_and_ranks() -> None:
    drawn = plan(QWEN3_8B, kv_cache_bytes=2**30)
    assert 0 <= 2**30 - drawn.budget.pool < 147_456 * 16
    assert drawn.pool_tokens == (2**30 // (147_456 * 16) - 1) * 16
    assert not plan(QWEN3_8B, kv_cache_bytes=2**40).fits
    two = plan(QWEN3_8B, "H100:2", tensor_parallel_size=2)
    assert two.kv_token_bytes == 147_456 // 2
    assert two.budget.weights == shard(two.weights.by_kind, 2)
    with pytest.raises(ConfigError, match="does not divide 32"):
        plan(QWEN3_8B, "H100:3", tensor_parallel_size=3)
    with pytest.raises(ConfigError, match="plan is for H100"):
        plan(QWEN3_8B, "H100", tensor_parallel_size=2)


def test_more_bits_and_tokens_take_more() -> None:
    base = plan(QWEN3_8B, "H100")
    assert plan(QWEN3_8B, "H100", dtype="float32").budget.weights == pytest.approx(2 * base.budget.weights)
    assert plan(QWEN3_8B, "H100", kv_cache_dtype="fp8").kv_token_bytes == base.kv_token_bytes // 2
    shape = read_shape(facts(QWEN3_8B))
    assert forward_bytes(shape, 8192, 2) > forward_bytes(shape, 4096, 2)
    assert forward_bytes(shape, 8192, 2, 2) < forward_bytes(shape, 8192, 2)
    assert plan(QWEN3_8B, "V100", quantization="int4").dtype == "float16"


def test_headers_count_the_same_as_shapes(tmp_path: Path) -> None:
    for name, config in (
        ("dense", QWEN3_06B),
        ("moe", QWEN3_30B_A3B | {"num_hidden_layers": 3}),
        ("bert", BGE_LARGE),
    ):
        folder = write_config(tmp_path / name, config)
        shape = read_shape(facts(config), encoder=name == "bert")
        sizes = expected_tensors(shape, 2)
        write_header(
            folder / "model.safetensors", {key: ("BF16", tensor.shape) for key, tensor in sizes.items()}
        )
        start = time.process_time()
        drawn = plan_for(EngineSpec(model=str(folder)), gpu_machine("H100"))
        assert time.process_time() - start < 2
        assert not drawn.weights.estimated
        assert drawn.weights.by_kind == weigh(facts(config), shape, 2, "").by_kind
        assert drawn.weights.disk == sum(tensor.nbytes for tensor in sizes.values())


def test_quantized_checkpoints_count_as_they_are(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": ("BF16", (1000, 64)),
        "lm_head.weight": ("BF16", (1000, 64)),
        "model.norm.weight": ("BF16", (64,)),
    }
    for layer in range(2):
        at = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{at}.self_attn.{name}.weight"] = ("F8_E4M3", (64, 64))
            tensors[f"{at}.self_attn.{name}.weight_scale"] = ("F32", (1,))
        tensors[f"{at}.mlp.up_proj.weight"] = ("U8", (128, 32))
        tensors[f"{at}.mlp.up_proj.weight_scale"] = ("F8_E4M3", (128, 4))
    config = LLAMA_70B | {
        "vocab_size": 1000,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config |= {"num_key_value_heads": 4, "intermediate_size": 128}
    quantization = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    folder = write_config(tmp_path, config, hf_quant_config_json=quantization)
    write_header(folder / "model.safetensors", tensors)
    drawn = plan_for(EngineSpec(model=str(folder)), gpu_machine("B200"))
    assert drawn.quantization == "nvfp4"
    assert drawn.weights.by_kind["attention"] == 2 * 4 * (64 * 64 + 4)
    assert drawn.weights.by_kind["mlp"] == 2 * (128 * 32 + 128 * 4)
    assert drawn.weights.parameters == 2 * 1000 * 64 + 64 + 2 * (4 * 64 * 64 + 128 * 64)
    with pytest.raises(ConfigError, match="already quantized"):
        plan_for(EngineSpec(model=str(folder), quantization="fp8"), gpu_machine("B200"))


def test_broken_checkpoints_are_errors_of_ours(tmp_path: Path) -> None:
    broken: list[dict[str, Any]] = [
        {},
        {"architectures": []},
        {"architectures": ["LlamaForCausalLM"]},
        QWEN3_8B | {"num_hidden_layers": "many"},
        QWEN3_8B | {"num_hidden_layers": -1},
        QWEN3_8B | {"num_attention_heads": 0},
        QWEN3_8B | {"vocab_size": None},
    ]
    for index, config in enumerate(broken):
        folder = write_config(tmp_path / str(index), config)
        with pytest.raises(ModelError):
            plan_for(EngineSpec(model=str(folder)), gpu_machine("H100"))
    folder = write_config(tmp_path / "json", {})
    (folder / "config.json").write_text("{")
    with pytest.raises(UnsupportedCheckpoint, match="no valid JSON"):
        inspect(folder)
    with pytest.raises(ConfigError, match="no data on B10"):
        gpu_machine("B10")
    with pytest.raises(ConfigError, match="'H100'"):
        gpu_machine("h100")


def test_warnings(tmp_path: Path) -> None:
    def found(config: dict[str, Any], *, engine: EngineSpec | None = None, **files: Any) -> str:
        folder = write_config(tmp_path / str(time.monotonic_ns()), config, **files)
        spec = engine or EngineSpec(model=str(folder))
        spec = EngineSpec(
            **{name: getattr(spec, name) for name in spec.__struct_fields__} | {"model": str(folder)}
        )
        return "\n".join(plan_for(spec, gpu_machine("H100")).warnings)

    bare = found(QWEN3_8B)
    assert "licence" in bare
    assert "chat template" in bare
    full = found(QWEN3_8B, LICENSE_txt="terms", chat_template_jinja="x")
    assert "licence" not in full
    assert "chat template" not in full
    assert "pool" in found(BGE_LARGE)
    assert "pool" not in found(BGE_LARGE, modules_json=[{"type": "x.Pooling"}], engine=None)
    assert "pool" not in found(BGE_LARGE, engine=EngineSpec(model="x", pooling="cls"))
    labels = BGE_LARGE | {"architectures": ["BertForSequenceClassification"]}
    assert "id2label" in found(labels)
    assert "id2label" not in found(labels | {"id2label": {"0": "a"}})
    short = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8192}
    assert "16384" in found(QWEN3_8B | {"rope_scaling": short})
    assert "rope" not in found(QWEN3_8B | {"rope_scaling": short | {"factor": 5.0}})
    assert "original_max" in found(QWEN3_8B | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}})
    gemma = QWEN3_06B | {"architectures": ["Gemma3ForCausalLM"]}
    assert "overflows" in found(gemma, engine=EngineSpec(model="x", dtype="float16"))
    qwen2 = QWEN3_8B | {"architectures": ["Qwen2ForCausalLM"]}
    with pytest.raises(ConfigError, match=r"'fp8'.*adds a bias"):
        found(qwen2, engine=EngineSpec(model="x", kv_cache_dtype="fp8"))


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (
            "bert",
            {"architectures": ["DebertaV2Model"], "model_type": "deberta-v2"},
            "DebertaV2Model.*deberta-v2",
        ),
        ("bert", {"architectures": ["ElectraModel"], "model_type": "electra"}, "model_type 'electra'"),
        ("bert", {"hidden_act": "quick_gelu"}, "hidden_act"),
        ("qwen", {"architectures": ["DeepseekV3ForCausalLM"]}, "DeepseekV3ForCausalLM"),
        ("qwen", {"architectures": ["RwkvModel"], "model_type": "rwkv"}, "RwkvModel"),
        ("qwen", {"rope_scaling": {"rope_type": "weird", "factor": 2}}, "'weird'"),
        ("qwen", {"hidden_act": "relu6"}, "hidden_act"),
    ],
)
def test_what_serve_refuses_is_refused(
    base: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Both ask the same registries: a plan of a model that cannot start would be no plan."""
    config = (BGE_LARGE if base == "bert" else QWEN3_8B) | changes
    folder = write_config(tmp_path, config)
    with pytest.raises((UnknownArchitecture, UnsupportedCheckpoint), match=message):
        plan_for(EngineSpec(model=str(folder)), gpu_machine("H100"))
    assert main(["plan", str(folder), "--gpu", "H100"]) == 2


def test_planning_reads_the_registries_without_torch() -> None:
    code = "import sys, headrace.engines.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_plan_is_json_and_its_line_is_short(tmp_path: Path) -> None:
    drawn = plan(QWEN3_8B)
    data = json.loads(json.dumps(drawn.as_dict()))
    assert data["weights"]["total"] == QWEN8 * 2
    assert data["budget"]["total"] == 81_559 * 1024**2
    assert len(drawn.short()) < 300
    assert human_bytes(1536) == "1.5 KiB"
    assert human_bytes(3 * 1024**4) == "3.0 TiB"


def test_cpu_of_this_machine() -> None:
    machine = cpu_machine()
    assert 2**28 < machine.memory < 2**45
    drawn = draw_plan(EngineSpec(model="x"), facts(QWEN3_06B), machine, engine="dense", reason="")
    assert drawn.dtype == "float32"
    assert drawn.floors is None
    assert drawn.options == ()
    assert drawn.step_tokens == 512


def test_gpu_table_is_sane() -> None:
    for name, gpu in ACCELERATORS.items():
        if not gpu.known:
            continue
        assert gpu.name == name
        assert 10 * 2**30 < gpu.memory < 300 * 2**30
        assert 2e11 < gpu.bandwidth < 1e13
        assert ("fp8" in gpu.flops) == gpu.has_fp8
        assert ("fp4" in gpu.flops) == (gpu.compute >= 100)
        assert ("bfloat16" in gpu.flops) == (gpu.compute >= 80)
        assert all(1e13 < rate < 2e16 for rate in gpu.flops.values())
