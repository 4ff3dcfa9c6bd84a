"""Settings of quantized checkpoints as publishers vary them: each is followed, or refused by name; none is ignored."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace.checkpoints.folder import FolderCheckpoint
from headrace.checkpoints.quantization_settings import METHODS as KNOWN
from headrace.config.plan.plan import Machine
from headrace.config.plan.weights import KEPT_GROUPS
from headrace.config.spec import EngineSpec
from headrace.engines.inspect import inspect
from headrace.engines.plan import plan_for
from headrace.engines.weights import kv_dtype, load_weights, open_weights
from headrace.errors import ConfigError, HeadraceError, UnsupportedCheckpoint
from headrace.models.registry import read_config
from headrace.quantization.containers import METHODS, QuantizedCheckpoint, open_quantized
from headrace.quantization.keep import keeps_quantized
from headrace.quantization.schemes.int4 import GROUPS, fast_on_this_cpu
from support import quantized_folder as write

RNG = random.Random(11)
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}


def compressed(form: str, weights: dict[str, Any], **others: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, **others}


def gptq(bits: int = 4, *, v1: bool = True, order: bool = False) -> Callable[..., Any]:
    return lambda base, weight: write.gptq(base, weight, 32, RNG, bits=bits, v1=v1, order=order)


def channel_fp8(base: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = torch.rand(weight.shape[0], 1) * 1e-3 + 1e-3
    codes, dense = write.fp8(weight, scale, (1, weight.shape[1]))
    return {f"{base}.weight": codes, f"{base}.weight_scale": scale}, dense


def int4(base: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = weight.shape
    codes = [[RNG.randrange(16) for _ in range(columns)] for _ in range(rows)]
    scale = torch.rand(rows, columns // 32) * 0.02 + 0.01
    packed = {
        f"{base}.weight_packed": write.words(codes, 4),
        f"{base}.weight_shape": torch.tensor([rows, columns]),
        f"{base}.weight_scale": scale,
    }
    return packed, (torch.tensor(codes).float() - 8) * scale.repeat_interleave(32, 1)


def byte_int(bits: int) -> Callable[..., Any]:
    """Integers of few bits, a byte each, as W4A8 and W4AFP8 are published."""

    def pack(base: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        low = 2 ** (bits - 1)
        codes = torch.randint(-low, low, weight.shape, dtype=torch.int8)
        scale = torch.rand(weight.shape[0], weight.shape[1] // 32) * 0.01
        dense = codes.float() * scale.repeat_interleave(32, 1)
        return {f"{base}.weight": codes, f"{base}.weight_scale": scale}, dense

    return pack


def make(folder: Path, pack: Callable[..., Any], settings: dict[str, Any] | None) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return write.write_quantized(folder, pack, settings)


def check(folder: Path, dense: dict[str, Tensor]) -> QuantizedCheckpoint:
    checkpoint = open_quantized(FolderCheckpoint(folder))
    assert isinstance(checkpoint, QuantizedCheckpoint)
    for name, expected in dense.items():
        torch.testing.assert_close(checkpoint.load(name).float(), expected, rtol=0, atol=0)
    inspect(folder)
    return checkpoint


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    edit(config)
    file.write_text(json.dumps(config))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=message):
        open_quantized(FolderCheckpoint(folder))


# --- where it is said ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["compression_config", "text_config", "nested", "no method", "side file"])
def test_settings_are_found_wherever_they_are(place: str, tmp_path: Path) -> None:
    modelopt = {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    own = compressed("float-quantized", FP8)
    dense = make(tmp_path, channel_fp8, own)
    if place == "compression_config":
        change(tmp_path, lambda c: c.update(compression_config=c.pop("quantization_config")))
    elif place == "text_config":
        change(
            tmp_path, lambda c: c.update(text_config={"quantization_config": c.pop("quantization_config")})
        )
    elif place == "nested":
        block = {"quant_method": "modelopt", "quantization": modelopt, "producer": {"name": "modelopt"}}
        change(tmp_path, lambda c: c.update(quantization_config=block))
    elif place == "no method":
        change(tmp_path, lambda c: c.update(quantization_config=modelopt))
    else:
        change(tmp_path, lambda c: c.pop("quantization_config"))
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": modelopt}))
    checkpoint = check(tmp_path, dense)
    assert "quantization_config" not in json.dumps(checkpoint.config)
    assert inspect(tmp_path).quantized.method == "fp8"


def test_packed_weights_without_settings_are_told(tmp_path: Path) -> None:
    make(tmp_path, gptq(), None)
    refused(tmp_path, r"qweight' is part of a quantized matrix.*no quantization_config")


@pytest.mark.parametrize("method", ["aqlm", "hqq", "torchao", "quark", "auto-round", "eetq", ""])
def test_methods_that_are_not_read_are_refused_before_loading(method: str, tmp_path: Path) -> None:
    make(tmp_path, gptq(), {"quant_method": method, "bits": 4})
    refused(tmp_path, f"quant_method is '{method}'.*16-bit weights")
    with pytest.raises(UnsupportedCheckpoint, match="quant_method"):  # as plan and serve look at it
        inspect(tmp_path)


def test_planning_knows_the_readers() -> None:
    assert set(KNOWN) == set(METHODS)


# --- GPTQ and AWQ --------------------------------------------------------------------------------


def test_gptq_format_by_either_name(tmp_path: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "format": "gptq_v2"}
    check(tmp_path, make(tmp_path, gptq(v1=False), settings))
    change(tmp_path, lambda c: c["quantization_config"].update(checkpoint_format="gptq"))
    refused(tmp_path, "gptq and gptq_v2")


def test_gptq_rules_by_module(tmp_path: Path) -> None:
    def pack(base: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        if "k_proj" in base:
            return {f"{base}.weight": weight}, weight
        return gptq(8 if "down_proj" in base else 4)(base, weight)  # type: ignore[no-any-return]

    rules = {"-:.*k_proj": {}, r"+:.*\.down_proj": {"bits": 8}, ".*_proj": {}}
    check(tmp_path, make(tmp_path, pack, {"quant_method": "gptq", "bits": 4, "dynamic": rules}))
    change(tmp_path, lambda c: c["quantization_config"].update(dynamic={"-:.*down_proj": {}}))
    refused(tmp_path, "leaves model.layers.0.mlp.down_proj out")
    change(tmp_path, lambda c: c["quantization_config"].update(dynamic={"+:(": {}}))
    refused(tmp_path, "regular expression")


@pytest.mark.parametrize(
    "extra",
    [{"adapter": {"type": "lora"}}, {"rotation": "hadamard"}, {"pack_dtype": "int16"}, {"format": "marlin"}],
)
def test_gptq_settings_that_change_numbers_are_refused(extra: dict[str, Any], tmp_path: Path) -> None:
    make(tmp_path, gptq(), {"quant_method": "gptq", "bits": 4, **extra})
    refused(tmp_path, "adapter|rotation|pack_dtype|marlin")


def test_eight_bits_are_counted_as_eight(tmp_path: Path) -> None:
    make(tmp_path, gptq(8), {"quant_method": "gptq", "bits": 8})
    assert inspect(tmp_path).quantized.bits == 8


@pytest.mark.parametrize(
    ("pack", "settings", "kept"),
    [
        (gptq(), {"group_size": 32, "desc_act": False}, True),
        (gptq(order=True), {"group_size": 32, "desc_act": True}, False),
        (gptq(8), {"group_size": 32, "bits": 8}, False),
        (
            lambda base, weight: write.gptq(base, weight, 16, RNG, bits=4, v1=True, order=False),
            {"group_size": 16},
            False,
        ),
    ],
    ids=["plain", "desc_act", "8 bits", "groups of 16"],
)
def test_a_cpu_plan_knows_what_stays_packed(
    pack: Any, settings: dict[str, Any], kept: bool, tmp_path: Path
) -> None:
    """As the loader decides; the others are dequantized, and take eight times as much."""
    make(tmp_path, pack, {"quant_method": "gptq", "bits": 4, **settings})
    spec = EngineSpec(model=str(tmp_path), path=tmp_path, device="cpu")
    machine = Machine(name="cpu", memory=1 << 34, cuda=False, packs=True)
    assert plan_for(spec, machine).dtype == ("bfloat16" if kept else "float32")
    checkpoint = open_quantized(FolderCheckpoint(tmp_path))
    if fast_on_this_cpu():
        assert keeps_quantized(checkpoint, torch.bfloat16, torch.device("cpu")) == kept  # type: ignore[arg-type]


def test_groups_of_the_cpu_kernel() -> None:
    assert KEPT_GROUPS == GROUPS


# --- compressed-tensors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "bits"), [("int-quantized", 4), ("naive-quantized", 4), ("int-quantized", 6)]
)
def test_integers_of_few_bits_a_byte_each(form: str, bits: int, tmp_path: Path) -> None:
    weights = {**INT4, "num_bits": bits}
    check(tmp_path, make(tmp_path, byte_int(bits), compressed(form, weights)))


def test_named_modules_go_before_patterns_and_patterns_before_classes(tmp_path: Path) -> None:
    def pack(base: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return int4(base, weight) if base.endswith("up_proj") else channel_fp8(base, weight)

    settings = compressed("mixed-precision", INT4)
    settings["config_groups"] = {
        "all": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}, "format": "int-quantized"},
        "most": {"targets": ["re:.*proj"], "weights": FP8, "format": "float-quantized"},
        "one": {
            "targets": ["model.layers.0.mlp.up_proj"],
            "weights": INT4,
            "format": "pack-quantized",
        },
    }
    check(tmp_path, make(tmp_path, pack, settings))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({**INT4, "symmetric": False}, "weight_zero_point"),
        ({**INT4, "actorder": "group"}, "weight_g_idx"),
        ({**INT4, "hadamard": 64}, "hadamard"),
        ([4], "weights is"),
    ],
)
def test_what_is_announced_and_missing_is_refused(weights: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path, int4, compressed("pack-quantized", weights))
    refused(tmp_path, message)


@pytest.mark.parametrize("groups", [[], {}, "x", None, {"g": None}, {"g": []}, {"g": {"targets": "Linear"}}])
def test_malformed_groups_are_refused(groups: Any, tmp_path: Path) -> None:
    make(tmp_path, int4, {**compressed("pack-quantized", INT4), "config_groups": groups})
    refused(tmp_path, "config_groups")


def test_malformed_pattern_is_refused(tmp_path: Path) -> None:
    groups = {"g": {"targets": ["re:("], "weights": INT4}}
    make(tmp_path, int4, {**compressed("pack-quantized", INT4), "config_groups": groups})
    refused(tmp_path, "regular expression")


# --- FP8 -----------------------------------------------------------------------------------------


def test_scales_that_are_powers_of_two_in_a_byte(tmp_path: Path) -> None:
    def pack(base: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        exponents = torch.randint(118, 127, (-(-rows // 48), -(-columns // 32)), dtype=torch.uint8)
        scale = exponents.view(torch.float8_e8m0fnu)
        codes, dense = write.fp8(weight, torch.exp2(exponents.float() - 127), (48, 32))
        return {f"{base}.weight": codes, f"{base}.weight_scale_inv": scale}, dense

    check(tmp_path, make(tmp_path, pack, {"quant_method": "fp8", "weight_block_size": [48, 32]}))


def test_fbgemm(tmp_path: Path) -> None:
    def pack(base: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, dense = channel_fp8(base, weight)
        return {**tensors, f"{base}.input_scale_ub": torch.tensor([1200.0])}, dense

    settings = {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": ["lm_head"],
    }
    checkpoint = check(tmp_path, make(tmp_path, pack, settings))
    assert all(module.activations().kind == "token" for module in checkpoint.modules.values())


# --- KV cache ------------------------------------------------------------------------------------


def _cache(folder: Path, asked: str = "auto") -> torch.dtype:
    checkpoint = open_quantized(FolderCheckpoint(folder))
    spec = EngineSpec(model=str(folder), kv_cache_dtype=asked)
    return kv_dtype(spec, checkpoint, read_config(checkpoint.config), torch.bfloat16)


@pytest.mark.parametrize(("largest", "expected"), [(0.9, torch.float8_e4m3fn), (1.5, torch.bfloat16)])
def test_calibrated_cache_scales(largest: float, expected: torch.dtype, tmp_path: Path) -> None:
    """Scales up to 1 only say that there is room; beyond it an FP8 cache without scales would cut numbers off."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    make(tmp_path, channel_fp8, compressed("float-quantized", FP8, kv_cache_scheme=scheme))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor([largest])
    tensors["model.layers.0.self_attn.v_scale"] = torch.tensor([0.01])
    save_file(tensors, tmp_path / "model.safetensors")
    assert _cache(tmp_path) is expected
    if largest > 1:
        with pytest.raises(ConfigError, match="448"):
            _cache(tmp_path, "fp8")


@pytest.mark.parametrize("scheme", [{"num_bits": 4, "type": "int"}, {"num_bits": 8, "type": "int"}, "static"])
def test_other_caches_are_refused_with_the_flag(scheme: Any, tmp_path: Path) -> None:
    make(tmp_path, channel_fp8, compressed("float-quantized", FP8, kv_cache_scheme=scheme))
    with pytest.raises(HeadraceError, match="--kv-cache-dtype"):
        _cache(tmp_path)
    assert _cache(tmp_path, "bfloat16") is torch.bfloat16
    assert inspect(tmp_path).quantized.kv == ""


@pytest.mark.parametrize("method", ["compressed-tensors", "modelopt", "side file"])
def test_a_checkpoint_may_ask_for_a_cache_alone(method: str, tmp_path: Path) -> None:
    """Weights in 16 bits, and an FP8 cache: it was refused for one, and passed over for the other."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    block = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    settings: dict[str, Any] | None = {"quant_method": "modelopt", **block}
    if method == "compressed-tensors":
        settings = {**compressed("dense", {}), "config_groups": {}, "kv_cache_scheme": scheme}
    dense = make(tmp_path, lambda base, weight: ({f"{base}.weight": weight}, weight), settings)
    if method == "side file":
        change(tmp_path, lambda c: c.pop("quantization_config"))
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": block}))
    checkpoint = check(tmp_path, dense)
    assert not checkpoint.modules
    assert _cache(tmp_path) is torch.float8_e4m3fn
    assert _cache(tmp_path, "bfloat16") is torch.bfloat16
    spec = EngineSpec(model=str(tmp_path), path=tmp_path, device="cpu")
    machine = Machine(name="cpu", memory=1 << 34, cuda=False, packs=True)
    assert plan_for(spec, machine).kv_dtype == "fp8"
    model = load_weights(spec, open_weights(spec), torch.float32, torch.device("cpu"))
    assert torch.equal(model.embed.weight, dense["model.embed_tokens.weight"])
    rounded = EngineSpec(model=str(tmp_path), path=tmp_path, device="cpu", quantization="int8")
    assert open_weights(rounded).names()  # the weights are in 16 bits: they may be rounded


def test_autofp8_asks_for_a_cache_in_a_word(tmp_path: Path) -> None:
    def pack(base: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, dense = write.fp8(weight, torch.tensor([[0.01]]), tuple(weight.shape))  # type: ignore[arg-type]
        return {f"{base}.weight": codes, f"{base}.weight_scale": torch.tensor(0.01)}, dense

    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}
    check(tmp_path, make(tmp_path, pack, {**settings, "kv_cache_scheme": "static"}))
    assert _cache(tmp_path) is torch.float8_e4m3fn
    change(tmp_path, lambda c: c["quantization_config"].update(kv_cache_scheme="int4"))
    with pytest.raises(HeadraceError, match=r"'int4'.*--kv-cache-dtype"):
        _cache(tmp_path)


def test_plan_refuses_the_cache_that_serve_refuses(tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "int", "strategy": "tensor"}
    make(tmp_path, channel_fp8, compressed("float-quantized", FP8, kv_cache_scheme=scheme))
    machine = Machine(name="cpu", memory=1 << 34, cuda=False)
    with pytest.raises(UnsupportedCheckpoint, match=r"kv_cache_scheme.*--kv-cache-dtype"):
        plan_for(EngineSpec(model=str(tmp_path), path=tmp_path, device="cpu"), machine)
    asked = EngineSpec(model=str(tmp_path), path=tmp_path, device="cpu", kv_cache_dtype="fp8")
    assert plan_for(asked, machine).kv_dtype == "fp8"


# --- keys that nobody knows ----------------------------------------------------------------------

# What the writers themselves put there (GPTQModel 7.7, AutoGPTQ 0.7, AutoAWQ 0.2.9, Auto-Round 0.16, transformers 5).
WRITTEN: dict[str, dict[str, Any]] = {
    "gptqmodel": {
        "quant_method": "gptq", "method": "gptq", "format": "gptq", "checkpoint_format": "gptq", "bits": 4,
        "group_size": 32, "desc_act": False, "lm_head": False, "pack_dtype": "int32", "sym": False,
        "meta": {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.05, "true_sequential": True},
    },
    "autogptq": {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "damp_percent": 0.1, "desc_act": False,
        "static_groups": True, "sym": True, "true_sequential": True, "model_name_or_path": "x",
        "model_file_base_name": "model", "is_marlin_format": False,
    },
    "transformers": {
        "quant_method": "gptq", "bits": 4, "tokenizer": "x", "dataset": ["c4"], "group_size": 32, "damp_percent": 0.1,
        "desc_act": False, "sym": True, "true_sequential": True, "backend": "auto", "model_seqlen": 2048,
        "block_name_to_quantize": "model.layers", "module_name_preceding_first_block": ["model.embed_tokens"],
        "batch_size": 1, "pad_token_id": 2, "max_input_length": 4096, "cache_block_outputs": True,
        "modules_in_block_to_quantize": [["q"]], "use_exllama": True, "exllama_config": {"version": 1},
        "checkpoint_format": "gptq", "meta": {"quantizer": ["optimum:2"]}, "act_group_aware": True,
    },
    "auto-round": {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "autoround_version": "0.16.1", "damp_percent": 0.01,
        "data_type": "int", "desc_act": False, "enable_quanted_input": True, "lm_head": False, "iters": 200,
        "provider": "auto-round", "sym": True, "true_sequential": False, "to_quant_block_names": "model.layers",
    },
}  # fmt: skip


@pytest.mark.parametrize("tool", WRITTEN)
def test_what_the_writers_note_is_no_stranger(
    tool: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check(tmp_path, make(tmp_path, gptq(), WRITTEN[tool]))
    assert not caplog.records
    assert not inspect(tmp_path).quantized.strangers


@pytest.mark.parametrize(
    ("pack", "settings"),
    [
        (gptq(), {"quant_method": "gptq", "bits": 4}),
        (lambda base, weight: write.awq(base, weight, 32, RNG), {"quant_method": "awq", "bits": 4}),
        (channel_fp8, {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}),
        (channel_fp8, compressed("float-quantized", FP8)),
    ],
    ids=["gptq", "awq", "modelopt", "compressed-tensors"],
)
def test_unknown_keys_are_told_or_refused(
    pack: Any, settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By name: one that may mean other numbers is refused, bookkeeping is told, and what is off says nothing."""
    dense = make(
        tmp_path, pack, {**settings, "author": "somebody", "online_hadamard": False, "shuffle": None}
    )
    check(tmp_path, dense)
    assert "quantization_config.author is 'somebody'" in caplog.text
    assert "verify" in caplog.text
    (sentence,) = inspect(tmp_path).quantized.strangers
    assert "author" in sentence
    for key, value in (("online_hadamard", "R4"), ("outlier_scales", [1.5]), ("bits_by_layer", {"0": 3})):
        change(tmp_path, lambda c, key=key, value=value: c["quantization_config"].update({key: value}))  # type: ignore[misc]
        message = rf"{key} is .*no reader of .* knows this key"
        refused(tmp_path, message)
        with pytest.raises(UnsupportedCheckpoint, match=message):
            inspect(tmp_path)
        change(tmp_path, lambda c, key=key: c["quantization_config"].pop(key))  # type: ignore[misc]
