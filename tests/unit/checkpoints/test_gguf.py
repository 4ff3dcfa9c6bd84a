"""GGUF files: names, configuration, what the converter did undone, and hostile input refused."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.checkpoints.gguf import GGUFCheckpoint
from headrace.checkpoints.gguf_config import _llama3_factors
from headrace.checkpoints.gguf_header import read_header
from headrace.config.plan.plan import Machine
from headrace.config.spec import EngineSpec
from headrace.engines.plan import plan_for
from headrace.errors import HeadraceError, MissingFile, UnknownArchitecture, UnsupportedCheckpoint
from support.gguf_file import LLAMA, decoder_tensors, write_gguf

TOKENS = {"ggml.tokens": [f"t{i}" for i in range(96)], "ggml.token_type": [1] * 96, "ggml.eos_token_id": 2}


def interleave(weights: np.ndarray, heads: int) -> np.ndarray:
    """What the converter does to q and k: halves of a head become pairs."""
    out = np.empty_like(weights)
    dim = weights.shape[0] // heads
    for head in range(heads):
        for i in range(dim // 2):
            out[head * dim + 2 * i] = weights[head * dim + i]
            out[head * dim + 2 * i + 1] = weights[head * dim + dim // 2 + i]
    return out


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def test_llama_comes_back_as_it_was_before_conversion(tmp_path: Path, rng: np.random.Generator) -> None:
    original = decoder_tensors(rng)
    stored = dict(original)
    stored["blk.0.attn_q.weight"] = interleave(original["blk.0.attn_q.weight"], 4)
    stored["blk.0.attn_k.weight"] = interleave(original["blk.0.attn_k.weight"], 2)
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", stored))
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
        "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
        "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
        "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
        "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }
    assert sorted(checkpoint.names()) == sorted(names)
    for name, source in names.items():
        assert checkpoint.info(name).shape == original[source].shape
        np.testing.assert_array_equal(checkpoint.load(name).numpy(), original[source])
    assert checkpoint.config["tie_word_embeddings"] is True
    assert checkpoint.config["rms_norm_eps"] == 1e-5  # not 9.999999747378752e-06


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_packed_rows_stand_in_the_original_order(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    original = decoder_tensors(rng)
    q = original["blk.0.attn_q.weight"]
    stored = original | {"blk.0.attn_q.weight": interleave(q, 4)}
    file = write_gguf(tmp_path / "m.gguf", stored, quantized={"blk.0.attn_q.weight": kind})
    checkpoint = GGUFCheckpoint(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    packed = checkpoint.load_packed(name)
    ggml = gguf.GGMLQuantizationType[kind]
    assert packed.ggml_type == kind
    assert packed.shape == (64, 64)
    np.testing.assert_array_equal(packed.raw.numpy(), gguf.quants.quantize(q, ggml))
    dense = gguf.quants.dequantize(gguf.quants.quantize(q, ggml), ggml)
    np.testing.assert_array_equal(checkpoint.load(name).numpy(), dense)
    assert checkpoint.load(name, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(UnsupportedCheckpoint, match="stored as F32"):
        checkpoint.load_packed("model.norm.weight")


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0", "F16"])
def test_a_file_of_blocks_is_planned(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    """Blocks ask for no cache of their own."""
    tensors = decoder_tensors(rng)
    matrices = {
        name: kind for name, tensor in tensors.items() if tensor.ndim == 2 and name.startswith("blk.")
    }
    file = write_gguf(tmp_path / "m.gguf", tensors, quantized=matrices)
    machine = Machine(name="cpu", memory=1 << 34, cuda=False, packs=True)
    plan = plan_for(EngineSpec(model=str(file), path=file, device="cpu"), machine)
    assert plan.kv_dtype == plan.dtype == ("float32" if kind == "F16" else "bfloat16")
    assert plan.fits


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_halves_keep_their_type(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    tensors = decoder_tensors(rng)
    file = write_gguf(tmp_path / "m.gguf", tensors, quantized={"blk.0.ffn_up.weight": kind})
    value = GGUFCheckpoint(file).load("model.layers.0.mlp.up_proj.weight")
    assert value.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}[kind]
    assert torch.equal(value, torch.from_numpy(tensors["blk.0.ffn_up.weight"]).to(value.dtype))


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_gemma_norms_lose_the_one_that_was_added(tmp_path: Path, rng: np.random.Generator, arch: str) -> None:
    tensors = decoder_tensors(rng, arch=arch)
    keys = {"attention.key_length": 16, "attention.sliding_window": 8}
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", tensors, arch=arch, keys=keys))
    for name, source in {
        "model.norm.weight": "output_norm.weight",
        "model.layers.0.pre_feedforward_layernorm.weight": "blk.0.ffn_norm.weight",
        "model.layers.0.post_feedforward_layernorm.weight": "blk.0.post_ffw_norm.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.post_attention_norm.weight",
    }.items():
        np.testing.assert_array_equal(checkpoint.load(name).numpy(), tensors[source] - np.float32(1))
    q = checkpoint.load("model.layers.0.self_attn.q_proj.weight").numpy()
    np.testing.assert_array_equal(q, tensors["blk.0.attn_q.weight"])
    assert checkpoint.config["query_pre_attn_scalar"] == 16
    assert checkpoint.config["sliding_window"] == 8


def test_an_own_head_is_untied(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = decoder_tensors(rng) | {"output.weight": rng.standard_normal((96, 64), dtype=np.float32)}
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", tensors, arch="qwen2"))
    assert checkpoint.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(checkpoint.load("lm_head.weight").numpy(), tensors["output.weight"])
    assert checkpoint.config["architectures"] == ["Qwen2ForCausalLM"]


def test_end_tokens_are_all_that_end_a_turn(tmp_path: Path, rng: np.random.Generator) -> None:
    tokens = {
        "ggml.tokens": ["a", "<|im_end|>", "<|endoftext|>", "<|im_end|>x", "</s>"],
        "ggml.token_type": [1, 3, 3, 3, 1],
        "ggml.eos_token_id": 1,
        "ggml.bos_token_id": 0,
    }
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", decoder_tensors(rng), tokenizer=tokens))
    assert checkpoint.generation_config == {"bos_token_id": 0, "eos_token_id": [1, 2]}


def test_llama3_scaling_is_recovered_from_its_factors(tmp_path: Path, rng: np.random.Generator) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = np.array(_llama3_factors(500000.0, 16, scaling), dtype=np.float32)
    assert factors[0] == 1.0
    assert factors[-1] == 32.0
    tensors = decoder_tensors(rng) | {"rope_freqs.weight": factors}
    keys = {"rope.freq_base": 500000.0}
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", tensors, keys=keys))
    assert checkpoint.config["rope_scaling"] == scaling
    assert not any("rope" in name for name in checkpoint.names())
    tensors["rope_freqs.weight"] = factors + np.float32(0.5)
    with pytest.raises(UnsupportedCheckpoint, match="rope scaling"):
        GGUFCheckpoint(write_gguf(tmp_path / "other.gguf", tensors, keys=keys))


@pytest.mark.parametrize(
    ("arch", "keys", "expected"),
    [
        ("qwen3", {"attention.key_length": 16}, {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}),
        ("olmo2", {}, {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}),
        ("smollm3", {"block_count": 5}, {"no_rope_layers": [1, 1, 1, 0, 1]}),
        (
            "granite",
            {"attention.scale": 0.5, "embedding_scale": 12.0, "residual_scale": 0.25, "logit_scale": 8.0},
            {"attention_multiplier": 0.5, "logits_scaling": 8.0, "residual_multiplier": 0.25},
        ),
        ("phi3", {"rope.dimension_count": 12}, {"partial_rotary_factor": 0.75, "sliding_window": None}),
        (
            "qwen2",
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
            },
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        ),
    ],
)
def test_configuration_by_architecture(
    tmp_path: Path, rng: np.random.Generator, arch: str, keys: dict, expected: dict
) -> None:
    tensors = decoder_tensors(rng)
    if arch == "olmo2":
        for name in ("attn_norm", "ffn_norm"):
            tensors.pop(f"blk.0.{name}.weight")
    config = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", tensors, arch=arch, keys=keys)).config
    assert {key: config[key] for key in expected} == expected
    assert config["hidden_size"] == 64
    assert config["num_key_value_heads"] == 2
    assert config["vocab_size"] == 96


def test_unknown_architecture_names_the_nearest(tmp_path: Path, rng: np.random.Generator) -> None:
    with pytest.raises(UnknownArchitecture, match=r"'qwen33'.*did you mean 'qwen3'"):
        GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", decoder_tensors(rng), arch="qwen33"))


def test_a_tensor_nobody_knows_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = decoder_tensors(rng) | {"blk.0.attn_sinks.weight": np.zeros(4, dtype=np.float32)}
    with pytest.raises(UnsupportedCheckpoint, match=r"blk\.0\.attn_sinks\.weight"):
        GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", tensors))


def test_a_missing_key_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    file = write_gguf(tmp_path / "m.gguf", decoder_tensors(rng), keys={"attention.head_count": 0})
    with pytest.raises(UnsupportedCheckpoint, match=r"llama\.attention\.head_count is 0"):
        GGUFCheckpoint(file)


def test_an_unknown_tensor_name_is_answered_with_near_ones(tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", decoder_tensors(rng)))
    with pytest.raises(MissingFile, match=r"model\.norm\.weight"):
        checkpoint.load("model.norm.weigth")


def test_fingerprint_follows_content_and_not_the_place(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = decoder_tensors(rng)
    (tmp_path / "x").mkdir()
    first = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", tensors)).fingerprint
    assert GGUFCheckpoint(write_gguf(tmp_path / "x" / "m.gguf", tensors)).fingerprint == first
    tensors["blk.0.ffn_down.weight"] = tensors["blk.0.ffn_down.weight"] * np.float32(1.01)
    assert GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", tensors)).fingerprint != first


# -- hostile and damaged files


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, decoder_tensors(np.random.default_rng(3)), tokenizer=TOKENS)
    return path.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "m.gguf"


def test_every_truncation_is_an_error(sound: bytes, scratch: Path) -> None:
    for size in [*range(200), *range(200, len(sound) - 1, 997)]:
        scratch.write_bytes(sound[:size])
        with pytest.raises(UnsupportedCheckpoint):
            GGUFCheckpoint(scratch)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_altered_bytes_give_errors_and_nothing_else(sound: bytes, scratch: Path, data: st.DataObject) -> None:
    altered = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, 4000))
        altered[position : position + 8] = data.draw(
            st.one_of(
                st.binary(min_size=8, max_size=8),
                st.integers(0, 2**64 - 1).map(lambda n: n.to_bytes(8, "little")),
            )
        )
    scratch.write_bytes(altered)
    try:
        checkpoint = GGUFCheckpoint(scratch)
        for name in checkpoint.names():
            checkpoint.load(name)
    except HeadraceError:
        pass


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"GGML" + bytes(60), "magic"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0) + bytes(60), "version 1"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0) + bytes(60), "big-endian"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 2**63, 0) + bytes(60), "number of tensors"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**62) + bytes(60), "metadata keys"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**60) + bytes(60), "a metadata key wants"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"k", 77) + bytes(60), "unknown value type 77"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 2**61) + bytes(60), "length of k"),
        (
            struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"k", 9) + struct.pack("<IQ", 9, 1) * 9,
            "too deeply",
        ),
    ],
)
def test_hostile_headers(scratch: Path, head: bytes, message: str) -> None:
    scratch.write_bytes(head)
    with pytest.raises(UnsupportedCheckpoint, match=message):
        read_header(scratch)


def test_split_files_say_how_to_join_them(tmp_path: Path, rng: np.random.Generator) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("a.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedCheckpoint, match=r"3 parts.*--merge"):
        read_header(tmp_path / "m.gguf")
    assert LLAMA["block_count"] == 1
