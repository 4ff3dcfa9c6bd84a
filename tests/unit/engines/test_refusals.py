"""What the server refuses of types and caches, its plan refuses before, and what it serves is planned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

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
    import torch
    from safetensors.torch import load_file, save_file

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
