"""What the server refuses of types and caches, its plan refuses before, and what it serves is planned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace.cli.main import main
from headrace.config.plan.facts import Facts, Quantized, Tensor
from headrace.config.plan.refusals import packing_refusal
from headrace.config.quantization import TYPES
from headrace.config.spec import EngineSpec
from headrace.engines.build import build
from headrace.engines.plan import cpu_machine, gpu_machine, known_refusals, plan_for
from headrace.errors import ConfigError, HeadraceError
from support.one_pass import make_bert
from support.tiny_folder import write_llama, write_tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A decoder, one with a bias in q, k and v, and an encoder."""
    at = tmp_path_factory.mktemp("refusals")
    found = {"decoder": write_llama(at / "decoder", **SIZES), "biased": write_llama(at / "biased", **SIZES)}
    for folder in found.values():
        write_tokenizer(folder)
    config = json.loads((found["biased"] / "config.json").read_text())
    _add_biases(found["biased"], config | {"attention_bias": True})
    found["encoder"] = at / "encoder"
    make_bert(at / "encoder", "ForSequenceClassification", num_labels=3)

    return found


def _add_biases(folder: Path, config: dict[str, object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".self_attn." in name]:
        tensors[name.replace("weight", "bias")] = torch.zeros(tensors[name].shape[0])
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def _refused(call: Callable[..., object], *given: object) -> str:
    """The sentence, "" where it is not refused; any other error is raised."""
    try:
        call(*given)
    except HeadraceError as error:
        return error.message
    return ""


@pytest.mark.parametrize("kind", ["decoder", "biased", "encoder"])
@pytest.mark.parametrize("cache", ["auto", "fp8", "fp4", "bfloat16"])
def test_plan_and_server_agree(folders: dict[str, Path], kind: str, cache: str) -> None:
    for name in ("", *(TYPES if cache == "auto" else ("fp8_kv", "int8"))):
        settings = {
            "quantization": name, "kv_cache_dtype": cache, "device": "cpu", "max_model_len": 32, "max_num_seqs": 2,
        }  # fmt: skip
        if kind != "encoder":
            settings["kv_cache_bytes"] = 1 << 20
        spec = EngineSpec(model=str(folders[kind]), **settings)  # type: ignore[arg-type]
        planned = _refused(plan_for, spec, cpu_machine())
        served = _refused(build, spec)
        assert bool(planned) == bool(served), (name, planned, served)
        assert not planned or repr(name) in planned or repr(cache) in planned
        anywhere = known_refusals(spec)
        assert not anywhere or served, (name, anywhere)


def test_by_device(folders: dict[str, Path]) -> None:
    """Encoders round weights and activations together, which GPUs before Hopper do not."""
    for name, gpus in {"fp8": ("H100",), "int8": ("H100",), "fp8_block": (), "fp4": (), "int4": ()}.items():
        spec = EngineSpec(model=str(folders["encoder"]), quantization=name)
        for gpu in ("H100", "L4"):
            if gpu in gpus:
                plan_for(spec, gpu_machine(gpu))
            else:
                with pytest.raises(ConfigError, match=f"quantization is '{name}'"):
                    plan_for(spec, gpu_machine(gpu))


def test_a_cpu_that_gains_nothing_by_int8(folders: dict[str, Path]) -> None:
    spec = EngineSpec(model=str(folders["encoder"]), quantization="int8")
    machine = cpu_machine()
    for features, told in (
        ({"avx512_vnni"}, ""),
        ({"avx512_bf16", "avx512_vnni"}, "bfloat16"),
        (set(), "VNNI"),
    ):
        found = msgspec.structs.replace(machine, features=frozenset(features))
        assert told in _refused(plan_for, spec, found)
        assert bool(told) == bool(_refused(plan_for, spec, found))


_UP = "model.layers.1.mlp.up_proj"
_PACKINGS: dict[str, Callable[[torch.Tensor], dict[str, torch.Tensor]]] = {
    "fp8": lambda w: {f"{_UP}.weight": w.to(torch.float8_e4m3fn), f"{_UP}.weight_scale": torch.ones(1)},
    "fp8 blocks": lambda w: {
        f"{_UP}.weight": w.to(torch.float8_e4m3fn),
        f"{_UP}.weight_scale_inv": torch.ones(1, 1),
    },
    "words": lambda w: {
        f"{_UP}.weight_packed": torch.zeros(len(w), 8, dtype=torch.int32),
        f"{_UP}.weight_scale": torch.ones(len(w), 2),
    },
    "gptq": lambda w: {
        f"{_UP}.qweight": torch.zeros(8, len(w), dtype=torch.int32),
        f"{_UP}.scales": torch.ones(2, len(w)),
    },
    "bytes": lambda w: {f"{_UP}.weight": torch.zeros(w.numel() // 2, 1, dtype=torch.uint8)},
    "int8": lambda w: {f"{_UP}.weight": w.to(torch.int8), f"{_UP}.SCB": torch.ones(len(w))},
    "codes alone": lambda w: {f"{_UP}.weight": w.to(torch.int8)},
}


def _repacked(folder: Path, packing: str, **config: object) -> Path:
    tensors = load_file(folder / "model.safetensors")
    tensors |= _PACKINGS[packing](tensors.pop(f"{_UP}.weight"))
    save_file(tensors, folder / "model.safetensors")
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(own | config))
    return folder


@pytest.mark.parametrize("packing", _PACKINGS)
def test_packed_weights_of_which_nothing_says_how(
    packing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused from the headers, by plan and server in the same words; config check tells it."""
    settings = {} if packing != "words" else {"quantization_config": None}
    folder = _repacked(write_llama(tmp_path / "m", **SIZES), packing, **settings)
    write_tokenizer(folder)
    spec = EngineSpec(model=str(folder), device="cpu", max_model_len=32, kv_cache_bytes=1 << 20)
    served = _refused(build, spec)
    assert f"'{_UP}." in served
    assert "part of a quantized matrix" in served
    assert "16-bit weights" in served
    assert _refused(plan_for, spec, cpu_machine()) == served
    assert known_refusals(spec) == [served]
    file = tmp_path / "c.yaml"
    file.write_text(f"model_metadata:\n  headrace:\n    model: {folder}\n")
    assert main(["config", "check", "--strict", str(file)]) != 0
    assert "part of a quantized matrix" in capsys.readouterr().out
    assert main(["plan", str(folder), "--device", "cpu"]) == 2
    assert "part of a quantized matrix" in capsys.readouterr().err


def test_packed_weights_with_settings_are_planned(tmp_path: Path) -> None:
    deepseek = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    folder = _repacked(write_llama(tmp_path / "m", **SIZES), "fp8 blocks", quantization_config=deepseek)
    spec = EngineSpec(model=str(folder), device="cpu")
    assert known_refusals(spec) == []
    plan_for(spec, cpu_machine())
    experts = {"model.layers.0.mlp.experts.gate_up_proj_blocks": "U8", "model.layers.0.mlp.experts.x": "BF16"}
    facts = Facts(
        where="x", config={}, tensors={name: Tensor((4, 4), of, 16) for name, of in experts.items()}
    )
    assert "gate_up_proj_blocks" in packing_refusal(facts)
    assert packing_refusal(msgspec.structs.replace(facts, quantized=Quantized(method="mxfp4"))) == ""
    assert packing_refusal(msgspec.structs.replace(facts, container="gguf")) == ""


def test_plain_weights_beside_integers_are_planned(folders: dict[str, Path], tmp_path: Path) -> None:
    """16 bits, buffers of positions and masks; and FP8 numbers without a scale, which are what they say."""
    for kind in ("decoder", "encoder"):
        folder = shutil.copytree(folders[kind], tmp_path / kind)
        tensors = {
            name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()
        }
        if kind == "encoder":
            tensors["bert.embeddings.position_ids"] = torch.arange(64)[None]
        else:
            tensors["model.layers.0.self_attn.masked_bias"] = torch.tensor(-1, dtype=torch.int8)
            tensors[f"{_UP}.weight"] = tensors[f"{_UP}.weight"].to(torch.float8_e4m3fn)
        save_file(tensors, folder / "model.safetensors")
        spec = EngineSpec(model=str(folder), device="cpu", max_model_len=32)
        assert known_refusals(spec) == []
        plan_for(spec, cpu_machine())
        build(spec if kind == "encoder" else msgspec.structs.replace(spec, kv_cache_bytes=1 << 20))
