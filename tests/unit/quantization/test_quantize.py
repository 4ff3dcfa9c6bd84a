"""Checkpoints that we write: read back as they were rounded, resumable, and readable by others."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace.checkpoints.folder import FolderCheckpoint
from headrace.cli.main import main
from headrace.config.quantization import quantization_type
from headrace.engines import quantize as module
from headrace.engines.calibration import Calibration
from headrace.engines.quantize import quantize_checkpoint
from headrace.errors import ConfigError, UnsupportedCheckpoint
from headrace.layers.packed import PackedBatch
from headrace.models.loading import load_decoder
from headrace.quantization.audit import audit
from headrace.quantization.compensation import Compensation
from headrace.quantization.containers import QuantizedCheckpoint, open_quantized
from headrace.quantization.registry import load_time
from headrace.quantization.writing import round_weight
from support.tiny_folder import write_llama

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
TYPES = ["fp8", "fp8_kv", "fp8_mlp_only", "fp8_block", "fp4", "fp4_kv", "mxfp4", "int8", "int4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_llama(tmp_path_factory.mktemp("m") / "llama", **SHAPE)
    (path / "tokenizer.json").write_text("{}")
    return path


def written(folder: Path, out: Path, name: str, **options: object) -> QuantizedCheckpoint:
    quantize_checkpoint(FolderCheckpoint(folder), name, out, **options)  # type: ignore[arg-type]
    checkpoint = open_quantized(FolderCheckpoint(out))
    assert isinstance(checkpoint, QuantizedCheckpoint)
    return checkpoint


@pytest.mark.parametrize("name", TYPES)
def test_read_back_as_rounded(name: str, folder: Path, tmp_path: Path) -> None:
    source = load_file(folder / "model.safetensors")
    checkpoint = written(folder, tmp_path / "q", name)
    kind = quantization_type(name)
    assert set(checkpoint.names()) == set(source)
    for tensor, dense in source.items():
        got = checkpoint.load(tensor)
        if tensor in checkpoint.modules:
            dense = round_weight(dense, kind.weights).dequantize()
        torch.testing.assert_close(got, dense, rtol=3e-7, atol=0)
    assert ("self_attn" in str(sorted(checkpoint.modules))) == (kind.layers == "all")
    assert not any("embed" in tensor or "lm_head" in tensor for tensor in checkpoint.modules)
    assert checkpoint.container.kv_cache == kind.kv_cache
    assert (tmp_path / "q" / "tokenizer.json").is_file()


def test_the_same_model_as_quantized_on_load(folder: Path, tmp_path: Path) -> None:
    checkpoint = written(folder, tmp_path / "q", "fp8")
    plain = FolderCheckpoint(folder)
    kind = load_time(quantization_type("fp8"), CPU)
    models = (
        load_decoder(checkpoint.config, checkpoint, dtype=torch.float32, device="cpu", keep_packed=True),
        load_decoder(plain.config, plain, dtype=torch.float32, device="cpu", transform=kind),
    )
    a, b = (model.logits(model(PackedBatch.for_encoding([[3, 7, 11, 90]], causal=True))) for model in models)
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_an_interrupted_run_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = written(folder, tmp_path / "a", "fp8", shard_bytes=30_000)
    shards = sorted(file.name for file in (tmp_path / "a").glob("model-*"))
    assert len(shards) > 3
    made: list[str] = []
    real = module._write_shard

    def stopping(*args: object) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        real(*args)  # type: ignore[arg-type]
        made.append(str(args[6]))

    monkeypatch.setattr(module, "_write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        written(folder, tmp_path / "b", "fp8", shard_bytes=30_000)
    mark = tmp_path / "b" / module._MARK
    kept = mark.read_text()
    mark.write_text(kept[:5])
    with pytest.raises(ConfigError, match=r"something else \(no JSON\); delete it"):
        written(folder, tmp_path / "b", "fp8", shard_bytes=30_000)
    mark.write_text(kept)
    with pytest.raises(ConfigError, match="unfinished run of something else"):
        written(folder, tmp_path / "b", "fp4", shard_bytes=30_000)
    for killed in (".tmpVs10WT", "model-00003.part"):  # safetensors' own, and ours
        (tmp_path / "b" / killed).write_bytes(b"half")
    again: list[str] = []
    monkeypatch.setattr(module, "_write_shard", lambda *args: (again.append(str(args[6])), real(*args)))
    resumed = written(folder, tmp_path / "b", "fp8", shard_bytes=30_000)
    assert not set(again) & set(made)
    assert len(again) == len(shards) - 2
    for name in whole.names():
        assert torch.equal(whole.load(name), resumed.load(name))
    assert not list((tmp_path / "b").glob(".tmp*")) and not list((tmp_path / "b").glob("*.part"))
    with pytest.raises(ConfigError, match="something else already"):
        written(folder, tmp_path / "b", "fp8")


def test_static_activations(folder: Path, tmp_path: Path) -> None:
    """One calibrated scale a layer, read back; inputs beyond it saturate."""
    texts = [[(7 * i + j) % 300 for j in range(30)] for i in range(4)]
    calibration = Calibration(FolderCheckpoint(folder), texts, CPU)
    checkpoint = written(folder, tmp_path / "q", "fp8", calibration=calibration, static=True)
    name = "model.layers.1.mlp.down_proj.weight"
    inputs = calibration([name])
    assert checkpoint.modules[name].activations().kind == "static"
    torch.testing.assert_close(
        checkpoint.modules[name].activations().scale, torch.tensor(inputs[name].peak / 448)
    )
    dynamic = written(folder, tmp_path / "d", "fp8")
    plain = FolderCheckpoint(folder)
    want = load_decoder(plain.config, plain, dtype=torch.float32, device="cpu")
    got = [
        load_decoder(source.config, source, dtype=torch.float32, device="cpu", keep_packed=True)
        for source in (checkpoint, dynamic)
    ]
    batch = PackedBatch.for_encoding([texts[0]], causal=True)
    logits = want.logits(want(batch))
    static, token = (float((m.logits(m(batch)) - logits).norm() / logits.norm()) for m in got)
    assert 0.5 * token < static < 2 * token
    with pytest.raises(ConfigError, match="static activation scales are for the fp8 types"):
        quantize_checkpoint(
            FolderCheckpoint(folder), "fp4", tmp_path / "r", calibration=calibration, static=True
        )
    with pytest.raises(ConfigError, match="static activation scales"):
        quantize_checkpoint(FolderCheckpoint(folder), "fp8", tmp_path / "r", static=True)


@pytest.mark.parametrize("name", ["fp8", "fp8_block", "fp4", "mxfp4", "int8", "int4"])
def test_calibration_lowers_the_error_that_counts(name: str, folder: Path, tmp_path: Path) -> None:
    """That of the product, on texts of the same kind; inputs have large columns and go together, as in real models."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][:6] = 5.0
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text((folder / "config.json").read_text())
    checkpoint = FolderCheckpoint(source)
    rng = random.Random(1)
    texts = [[rng.randrange(60) for _ in range(60)] for _ in range(16)]
    calibration = Calibration(checkpoint, texts[:12], CPU)
    tensor = "model.layers.0.self_attn.q_proj.weight"
    met, other = (Calibration(checkpoint, part, CPU)([tensor])[tensor] for part in (texts[:12], texts[12:]))
    squares = met.gram.diagonal()
    assert squares[:6].min() > 5 * squares[6:].mean()
    got = written(source, tmp_path / "q", name, calibration=calibration)
    full, form = tensors[tensor], quantization_type(name).weights

    def lost(weight: torch.Tensor) -> float:
        return float(((weight - full) @ other.gram * (weight - full)).sum())

    fitted = got.load(tensor)
    assert lost(fitted) < 0.9 * lost(round_weight(full, form).dequantize())
    again = written(source, tmp_path / "again", name, calibration=calibration)
    assert torch.equal(fitted, again.load(tensor))


def test_compensation_stays_on_the_format() -> None:
    """What is written are codes under the scales that rounding alone would choose; without correlation, the same."""
    weight = torch.randn(24, 128)
    for form in ("fp8", "fp8_block", "nvfp4", "mxfp4", "int8", "int4"):
        plain = round_weight(weight, form, torch.ones(128))
        alone = Compensation(torch.eye(128)).round(weight, form)
        torch.testing.assert_close(alone.dequantize(), plain.dequantize(), rtol=0, atol=0)
        x = torch.randn(500, 128) @ torch.randn(128, 128)
        fitted = Compensation(x.T @ x / 500).round(weight, form).dequantize()
        assert torch.equal(fitted.isfinite(), torch.ones_like(fitted, dtype=torch.bool))
        lost, before = (float(((w - weight) @ x.T).square().sum()) for w in (fitted, plain.dequantize()))
        assert lost < 0.8 * before
        assert audit("w", fitted, weight, bits=8 if form in ("fp8", "fp8_block", "int8") else 4).where is None


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "q"
    assert main(["quantize", str(folder), "--type", "fp8", "--out", str(out)]) == 0
    assert "verify" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["quantization_config"]["format"] == "float-quantized"
    assert main(["quantize", str(out), "--type", "fp8", "--out", str(tmp_path / "r")]) == 2
    assert "already quantized" in capsys.readouterr().err
    assert main(["quantize", str(folder), "--type", "fp9", "--out", str(tmp_path / "r")]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["quantize", str(folder), "--out", str(tmp_path / "r")]) == 2


@pytest.mark.parametrize(
    "flags", [["--rows", "0"], ["--rows", "-1"], ["--max-tokens", "-5"], ["--max-tokens", "0"]]
)
def test_counts_begin_at_one(flags: list[str], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as left:
        main(["quantize", str(folder), "--type", "fp4", "--out", str(tmp_path / "q"), *flags])
    assert left.value.code == 2


def test_places_that_cannot_be_written_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for out in (file, file / "below"):
        assert main(["quantize", str(folder), "--type", "fp8", "--out", str(out)]) == 2
        assert str(file) in capsys.readouterr().err
    assert file.read_text() == "x"


def test_others_may_read_what_is_written(folder: Path, tmp_path: Path) -> None:
    written(folder, tmp_path / "q", "fp8")
    modes = {entry.stat().st_mode for entry in (tmp_path / "q").iterdir() if entry.suffix != ".json"}
    assert modes == {(tmp_path / "q" / "config.json").stat().st_mode}


def test_an_embedder_keeps_its_modules_and_buffers(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "embedder"
    shutil.copytree(folder, source)
    tensors = load_file(source / "model.safetensors") | {"embeddings.position_ids": torch.arange(7)}
    save_file(tensors, source / "model.safetensors")
    modules = [
        {"path": "", "type": "x.Transformer"},
        {"path": "1_Pooling", "type": "x.Pooling"},
        {"path": "../q"},
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    checkpoint = written(source, tmp_path / "q", "fp8")
    assert checkpoint.load("embeddings.position_ids").tolist() == list(range(7))
    assert (tmp_path / "q" / "1_Pooling" / "config.json").read_text() == '{"pooling_mode_cls_token": true}'


def test_what_cannot_be_quantized(tmp_path: Path) -> None:
    odd = write_llama(tmp_path / "odd", **{**SHAPE, "intermediate_size": 72})
    with pytest.raises(UnsupportedCheckpoint, match=r"32 columns each.*down_proj.weight has 72"):
        written(odd, tmp_path / "q", "mxfp4")
    assert not (tmp_path / "q").exists()
    written(odd, tmp_path / "q", "int8")


def test_files_beside_the_weights(folder: Path, tmp_path: Path) -> None:
    """Text goes along, whatever its name; weights in other forms do not, nor what names them: others would load it."""
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    goes = ("README.md", "chat_template.jinja", "vocab.txt", "quantize.json", "sparse_linear.safetensors")
    stays = (
        "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_config.json", "adapter_model.safetensors",
        "model.onnx", "tf_model.h5", "consolidated.00.pth",
    )  # fmt: skip
    for name in (*goes, *stays):
        (source / name).write_text(name)
    (source / "link.txt").symlink_to(source / "README.md")
    (source / "broken.txt").symlink_to(source / "nowhere")
    out = tmp_path / "q"
    written(source, out, "int8")
    made = {
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
        "tokenizer.json",
    }
    assert {file.name for file in out.iterdir()} == {*goes, *made, "link.txt"}
    assert all((out / name).read_text() == name for name in goes)


def test_caches_that_harm_are_not_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others would use them without a word."""
    biased = tmp_path / "biased"
    shutil.copytree(folder, biased)
    config = json.loads((biased / "config.json").read_text())
    (biased / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    tensors = load_file(biased / "model.safetensors")
    for name in [name for name in tensors if ".self_attn." in name]:
        tensors[name.replace("weight", "bias")] = torch.zeros(tensors[name].shape[0])
    save_file(tensors, biased / "model.safetensors")
    out = ["--out", str(tmp_path / "q"), "--no-calibration"]
    for name in ("fp8_kv", "fp4_kv"):
        assert main(["quantize", str(biased), "--type", name, *out]) == 2
        assert "adds a bias" in capsys.readouterr().err
    assert main(["quantize", str(biased), "--type", "fp8", *out]) == 0


@pytest.mark.parametrize("name", ["fp8", "fp8_block", "fp4", "mxfp4", "int8", "int4"])
def test_others_read_the_same_numbers(name: str, folder: Path, tmp_path: Path) -> None:
    """The reference library decompresses our files to the weights that we multiply with."""
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import decompress_module
    from compressed_tensors.quantization import QuantizationConfig

    checkpoint = written(folder, tmp_path / "q", name)
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert library is not None
    parsed = QuantizationConfig.model_validate(config)
    (scheme,) = parsed.config_groups.values()
    stored = load_file(next((tmp_path / "q").glob("model-*.safetensors")))
    for tensor in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        base = tensor.removesuffix("weight")
        linear = torch.nn.Linear(*reversed(checkpoint.info(tensor).shape), bias=False)
        del linear.weight
        for key, value in stored.items():
            if key.startswith(base):
                linear.register_parameter(
                    key.removeprefix(base), torch.nn.Parameter(value, requires_grad=False)
                )
        linear.quantization_scheme = scheme
        linear.quantization_status = parsed.quantization_status
        decompress_module(linear)
        torch.testing.assert_close(linear.weight.float(), checkpoint.load(tensor), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["fp8", "fp4", "mxfp4", "int8", "int4"])
def test_the_plan_counts_what_is_loaded(name: str, folder: Path, tmp_path: Path) -> None:
    """On a CPU, where all but 4-bit integers is dequantized, and on a GPU, where the numbers stay."""
    from headrace.config.spec import EngineSpec
    from headrace.engines.plan import gpu_machine, plan_for

    out = quantize_checkpoint(FolderCheckpoint(folder), name, tmp_path / "q")
    plain = plan_for(EngineSpec(model=str(folder), path=folder, dtype="float32"), None)
    spec = EngineSpec(model=str(out), path=out, dtype="float32")
    cpu, gpu = plan_for(spec, None), plan_for(spec, gpu_machine("H100"))
    assert cpu.weights.parameters == gpu.weights.parameters == plain.weights.parameters
    assert cpu.weights.total == plain.weights.total
    matrices = 2 * (2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 128)
    saved = {"fp8": 3.0, "int8": 3.0}.get(name, 3.5) - 0.4
    assert plain.weights.total - gpu.weights.total > saved * matrices
