from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from headrace.config.load import check_text
from headrace.config.resolve import is_config_file, redacted, resolve, resolve_view
from headrace.config.schema.fields import Field, Section
from headrace.config.schema.own import OWN
from headrace.config.schema.top import TOP
from headrace.config.schema.types import Bool, Enum, Float, Int, ListOf, MapOf, Str
from headrace.config.spec import Adapter, Calibration, EngineSpec, Speculation
from headrace.errors import ConfigError
from unit.config.cases import BIS, V1, V2, B, C, P, R, build, encoder, look


def spec_of(text: str) -> EngineSpec:
    return resolve_view(check_text(text)).spec


def sample(field: Field, rng: random.Random) -> Any:
    """A value that the field takes and that is not its default."""
    kind = field.type
    if field.name == "speculation":
        return {"method": "ngram", "max_draft_tokens": 4}
    if field.name == "adapters":
        return [{"name": "a", "model": "/x"}]
    if field.name == "calibration":
        return {"dataset": "d", "num_rows": 64, "max_tokens": 64}
    if isinstance(kind, Bool):
        return not field.default
    if isinstance(kind, Int):
        step = kind.multiple
        low = -(-(kind.low or 1) // step) * step
        return rng.choice([value for value in (low, low + step, low + 3 * step) if value != field.default])
    if isinstance(kind, Float):
        return 0.5
    if isinstance(kind, Enum):
        return rng.choice([value for value in kind.values if value and value != field.default])
    if isinstance(kind, ListOf):
        return ["x", "y"]
    if isinstance(kind, MapOf):
        return {"A": "1", "B": "2"}
    if isinstance(kind, Str):
        return f"text-{rng.randrange(100)}"
    return 2**20  # Size


def test_every_field_of_the_spec_has_one_declaration_and_the_same_default() -> None:
    assert [field.name for field in OWN.fields if field.name != "model"] and {f.name for f in OWN.fields} | {
        "path"
    } == set(EngineSpec.__struct_fields__)
    resolved = resolve("m").spec
    assert resolved == EngineSpec(model="m")


@pytest.mark.parametrize(
    "field", [field for field in OWN.fields if field.name != "model"], ids=lambda field: field.name
)
def test_yaml_flags_and_python_give_the_same(field: Field, tmp_path: Path) -> None:
    value = sample(field, random.Random(3))
    text = yaml.safe_dump({"model_metadata": {"headrace": {"model": "m", field.name: value}}})
    file = tmp_path / "config.yaml"
    file.write_text(text)
    from_yaml = resolve(str(file)).spec
    from_python = resolve("m", **{field.name: value}).spec
    from_flag_over_yaml = resolve(str(file), origin="flag", **{field.name: value}).spec
    assert from_yaml == from_python == from_flag_over_yaml
    assert from_yaml != EngineSpec(model="m")
    assert msgspec.convert(msgspec.to_builtins(from_yaml), EngineSpec) == from_yaml


def test_structs_are_taken_too() -> None:
    drafts = Speculation(method="lookahead", window=3, ngram=8, verification=3, max_draft_tokens=41)
    spec = resolve(
        "m", speculation=drafts, adapters=(Adapter(name="a", model="b"),), calibration=Calibration()
    ).spec
    assert spec.speculation == drafts
    assert spec.adapters[0].name == "a"
    again = resolve(
        spec.model,
        **{name: getattr(spec, name) for name in spec.__struct_fields__ if name not in ("model", "path")},
    )
    assert again.spec == spec


def test_wrong_settings_name_flag_or_argument() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("m", origin="flag", max_model_len=0, memory_fraction=2.0, dtpye="x")
    text = str(caught.value)
    assert text.count("flag") == 3
    for name in ("max_model_len", "memory_fraction", "'dtype'"):
        assert name in text
    with pytest.raises(ConfigError, match="model"):
        resolve(None)


def test_flags_win_and_origins_say_who_set_what(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(build(V1, {f"{B}.max_batch_size": 8, f"{B}.max_seq_len": 4096, "model_name": "n"}))
    found = resolve(str(tmp_path), origin="flag", max_num_seqs=4)
    assert (found.spec.max_num_seqs, found.spec.max_model_len) == (4, 4096)
    assert found.origins["max_num_seqs"] == "flag"
    assert found.origins["max_model_len"].startswith(f"{B}.max_seq_len ({file}:")
    assert found.spec.served_names == ("n",)
    assert found.accelerator == "H100"
    assert is_config_file(str(tmp_path))
    assert not is_config_file("owner/name")


def test_v1() -> None:
    changes = {
        "resources.accelerator": "H100:2",
        f"{B}.tensor_parallel_count": 2,
        f"{B}.max_seq_len": 8192,
        f"{B}.max_num_tokens": 4096,
        f"{B}.quantization_type": "fp8_kv",
        f"{B}.quantization_config": {"calib_size": 128},
        **look(),
        f"{B}.max_batch_size": 32,
        f"{B}.lora_adapters": {"a.b": {"source": "S3", "repo": "s3://b/p", "runtime_secret_name": "k"}},
        f"{B}.checkpoint_repository": {"source": "GCS", "repo": "gs://b/p", "runtime_secret_name": "g"},
        f"{R}.batch_scheduler_policy": "max_utilization",
        f"{R}.kv_cache_host_memory_bytes": 100,
        f"{R}.request_default_max_tokens": 7,
        f"{R}.kv_cache_free_gpu_mem_fraction": 0.8,
        f"{R}.served_model_name": "served",
        "environment_variables": {"A": True},
    }
    spec = spec_of(build(V1, changes))
    assert spec == EngineSpec(
        model="gs://b/p",
        source="GCS",
        secret_name="g",
        served_names=("served",),
        tensor_parallel_size=2,
        max_model_len=8192,
        max_num_seqs=32,
        max_num_batched_tokens=4096,
        quantization="fp8",
        kv_cache_dtype="fp8",
        calibration=Calibration(num_rows=128),
        speculation=Speculation(method="lookahead", window=3, ngram=8, verification=3, max_draft_tokens=41),
        adapters=(Adapter(name="a.b", model="s3://b/p", source="S3", secret_name="k"),),
        admission="fill",
        host_kv_bytes=100,
        default_max_tokens=7,
        memory_fraction=0.8,
        environment=(("A", "true"),),
    )


def test_encoders() -> None:
    text = build(V1, encoder(max_seq_len=128, tensor_parallel_count=4))
    spec = spec_of(text)
    assert (spec.engine, spec.max_num_batched_tokens, spec.tensor_parallel_size) == ("encoder", 16384, 1)
    assert spec.max_model_len is None  # encoders follow the model
    small = spec_of(build(V1, encoder(max_num_tokens=512)))
    assert small.max_num_batched_tokens == 512
    bert = spec_of(build(V1, {f"{B}.base_model": "encoder_bert", f"{R}.webserver_default_route": "/rerank"}))
    assert (bert.engine, bert.default_route) == ("bert", "/rerank")
    assert spec_of(build(V1, {})).engine == "auto"
    assert spec_of(build(V1, {f"{B}.base_model": "decoder"})).engine == "decoder"


@pytest.mark.parametrize(
    ("kind", "scheme", "cache"),
    [
        ("fp8", "fp8", "auto"),
        ("fp8_kv", "fp8", "fp8"),
        ("fp8_mlp_only", "fp8_mlp_only", "auto"),
        ("fp4", "nvfp4", "auto"),
        ("fp4_kv", "nvfp4", "fp8"),
        ("fp4_mlp_only", "nvfp4_mlp_only", "auto"),
        ("weights_int8", "int8", "auto"),
        ("weights_int4", "int4", "auto"),
        ("smooth_quant", "int8", "auto"),
        ("no_quant", "", "auto"),
    ],
)
def test_quantization_types(kind: str, scheme: str, cache: str) -> None:
    spec = spec_of(build(V1, {f"{B}.quantization_type": kind, "resources.accelerator": "B200"}))
    assert (spec.quantization, spec.kv_cache_dtype) == (scheme, cache)


@pytest.mark.parametrize("base", ["encoder", "encoder_bert"])
def test_encoders_have_no_cache_to_quantize(base: str) -> None:
    """The hosted system takes the type and uses its weights; the check says so."""
    spec = spec_of(build(V1, {f"{B}.base_model": base, f"{B}.quantization_type": "fp8_kv"}))
    assert (spec.quantization, spec.kv_cache_dtype) == ("fp8", "auto")


def test_v2_and_patch_kwargs() -> None:
    changes = {
        f"{R}.max_seq_len": 4096,
        f"{R}.max_batch_size": 16,
        f"{R}.tensor_parallel_size": 2,
        P: {
            "disable_overlap_scheduler": True,
            "kv_cache_config": {
                "free_gpu_memory_fraction": 0.7,
                "enable_block_reuse": False,
                "dtype": "fp8",
                "host_cache_size": 5,
            },
            "cuda_graph_config": None,
            "moe_expert_parallel_size": 2,
            "speculative_config": {"decoding_type": "mtp", "num_nextn_predict_layers": 3},
            "tool_call_parser": "qwen25",
            "model_level_stop_words": ["<|call|>"],
            "guided_decoding_backend": None,
        },
    }
    spec = spec_of(build(V2, changes))
    assert spec == EngineSpec(
        model="owner/name",
        source="HF",
        max_model_len=4096,
        max_num_seqs=16,
        tensor_parallel_size=2,
        overlap=False,
        memory_fraction=0.7,
        prefix_caching=False,
        kv_cache_dtype="fp8",
        host_kv_bytes=5,
        eager=True,
        expert_parallel_size=2,
        speculation=Speculation(method="mtp", num_layers=3),
        tool_call_parser="qwen25",
        stop=("<|call|>",),
    )
    assert spec_of(build(V2, {R: {"gated_features": {"tool_call_parser": "x"}}})).tool_call_parser == "x"


def test_mounted_weights() -> None:
    path = {f"{P}.model_path": "/models/qwen/sub"}
    source = {
        "weights": [
            {
                "source": "hf://o/n@v1",
                "mount_location": "/models/qwen",
                "auth_secret_name": "t",
                "allow_patterns": ["*.json"],
            }
        ]
    }
    spec = spec_of(build(V2, {**path, **source}))
    assert (spec.model, spec.source, spec.revision, spec.secret_name) == ("o/n/sub", "HF", "v1", "t")
    assert spec.allow_patterns == ("*.json",)
    s3 = spec_of(
        build(V2, {**path, "weights": [{"source": "s3://b/p", "mount_location": "/models/qwen/sub"}]})
    )
    assert (s3.model, s3.source, s3.revision) == ("s3://b/p", "S3", None)
    other = spec_of(build(V2, {**path, "weights": [{"source": "s3://b/p", "mount_location": "/models/q"}]}))
    assert (other.model, other.source) == ("/models/qwen/sub", "auto")
    cache = [
        {
            "repo_id": "o/n",
            "revision": "main",
            "use_volume": True,
            "volume_folder": "x",
            "runtime_secret_name": "k",
        }
    ]
    cached = spec_of(build(V2, {f"{P}.model_path": "/app/model_cache/x", "model_cache": cache}))
    assert (cached.model, cached.source, cached.revision, cached.secret_name) == ("o/n", "HF", "main", "k")


def test_bis() -> None:
    changes = {
        C: {
            "engine_backend": "vllm",
            "checkpoint_name": "o/n",
            "model_name": "m",
            "tensor_parallel_size": 2,
            "engine_config": {
                "max_num_seqs": 8,
                "max_model_len": 4096,
                "gpu_memory_utilization": 0.8,
                "enforce_eager": True,
                "enable_prefix_caching": False,
                "kv_cache_dtype": "fp8_e4m3",
                "dtype": "half",
                "seed": 3,
                "swap_space": 2,
                "trust_remote_code": True,
            },
            "speculative_config": {"decoding_type": "NGram", "max_draft_len": 5},
        }
    }
    spec = spec_of(build(BIS, changes))
    assert spec == EngineSpec(
        model="o/n",
        served_names=("m",),
        tensor_parallel_size=2,
        max_num_seqs=8,
        max_model_len=4096,
        memory_fraction=0.8,
        eager=True,
        prefix_caching=False,
        kv_cache_dtype="fp8",
        dtype="float16",
        seed=3,
        host_kv_bytes=2 * 1024**3,
        speculation=Speculation(method="ngram", max_draft_tokens=5),
    )
    view = check_text(build(BIS, {f"{C}.engine_config": {"max_batch_size": 4, "trust_remote_code": True}}))
    assert resolve_view(view).spec.max_num_seqs == 4
    assert "vLLM calls max_num_seqs" in str(view.report.of_kind("lifted")[0])


def test_own_block_wins_over_all() -> None:
    text = build(
        V1,
        {f"{B}.max_batch_size": 8, "model_metadata": {"headrace": {"max_num_seqs": 3, "dtype": "float32"}}},
    )
    spec = spec_of(text)
    assert (spec.max_num_seqs, spec.dtype) == (3, "float32")


def test_no_model_and_not_yet() -> None:
    with pytest.raises(ConfigError, match="names no model"):
        spec_of("model_name: x\n")
    view = check_text(build(V1, {"resources.node_count": 2}))
    assert resolve_view(view).spec.model == "owner/name"
    with pytest.raises(ConfigError, match="one machine"):
        view.report.require_supported()


def test_every_target_in_the_schema_is_a_field_of_the_spec() -> None:
    names = set(EngineSpec.__struct_fields__)
    targets = {field.to for section in TOP.walk() for field in section.fields if field.to}
    targets |= {field.to for item in (TOP,) for field in item.fields if field.to}
    assert targets <= names, targets - names


def test_every_key_says_what_becomes_of_it() -> None:
    """No key is silently dropped: it sets something, has a notice, is a section, or only helps to check."""
    quiet = []
    for section in TOP.walk():
        for field in section.fields:
            inner = list(field.type.walk())
            if not (field.to or field.here or inner or isinstance(field.type, Section)):
                quiet.append(f"{section.title}.{field.name}")
    helpers = {
        "trt_llm (v1).inference_stack", "trt_llm (v2).inference_stack", "speculator.checkpoint_repository",
        "speculator.build", "speculator.runtime", "build.sequence_parallel_count", "config.yaml.model_metadata",
        "resources.accelerator", "bis_llm.config.engine_config", "build (image).no_cache", "transport (http).kind",
    }  # fmt: skip
    blocks = {
        "weights",
        "auth",
        "model_cache",
        "training_checkpoints",
        "artifact_references",
        "bdn.mounts",
        "bdn.access",
    }
    blocks |= {"external_data", "docker_auth", "metrics"}
    left = {name for name in quiet if name.rsplit(".", 1)[0] not in blocks}
    assert left == helpers


def test_redacted_has_every_field() -> None:
    spec = resolve("m", environment={"HF_TOKEN": "x", "A": "1"}).spec
    shown = redacted(spec)
    assert set(shown) == set(EngineSpec.__struct_fields__)
    assert shown["environment"] == {"HF_TOKEN": "***", "A": "1"}
