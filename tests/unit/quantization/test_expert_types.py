"""Mixtures of experts in every type: on load, written and read back, verified, and planned."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from headrace.checkpoints.folder import FolderCheckpoint
from headrace.config.quantization import TYPES, quantization_type
from headrace.config.spec import EngineSpec
from headrace.engines.build import build
from headrace.engines.calibration import Calibration, input_statistics
from headrace.engines.plan import cpu_machine, gpu_machine, plan_for
from headrace.engines.quantize import quantize_checkpoint
from headrace.engines.verify import Limits, compare, verify
from headrace.errors import UnsupportedCheckpoint
from headrace.layers.experts import ExpertLinear
from headrace.layers.linear import Linear
from headrace.layers.packed import PackedBatch
from headrace.models.decoder import DecoderModel
from headrace.models.loading import load_decoder
from headrace.quantization.containers import QuantizedCheckpoint, open_quantized
from headrace.quantization.experts import PackedExperts, ScaledExperts
from headrace.quantization.registry import load_time
from headrace.quantization.writing import round_weight
from support.tiny_folder import write_moe

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "num_attention_heads": 8}
RNG = random.Random(0)
TEXTS = [[RNG.randrange(300) for _ in range(n)] for n in (40, 33, 7)]
LOOSE = Limits(max_kl=1.5, min_top1=0.2, max_perplexity_ratio=3.0)
ANYTHING = Limits(max_kl=1e9, min_top1=0, max_perplexity_ratio=1e9)
WRITTEN = ["fp8", "fp8_block", "fp4", "mxfp4", "int8", "int4"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_moe(tmp_path_factory.mktemp("m") / "moe", **SHAPE)


def load(folder: Path, scheme: str = "", dtype: torch.dtype = torch.float32) -> DecoderModel:
    checkpoint = open_quantized(FolderCheckpoint(folder))
    transform = load_time(quantization_type(scheme), CPU) if scheme else None
    return load_decoder(checkpoint.config, checkpoint, dtype=dtype, device="cpu", transform=transform)


def logits(model: DecoderModel) -> torch.Tensor:
    return model.logits(model(PackedBatch.for_encoding(TEXTS, causal=True))).float()


@pytest.mark.parametrize("scheme", TYPES)
def test_on_load(folder: Path, scheme: str) -> None:
    """Experts become what their matrices rounded one by one are; routers stay."""
    plain, model = load(folder), load(folder, scheme, torch.bfloat16 if "int" in scheme else torch.float32)
    kind = quantization_type(scheme)
    router = model.layers[1].mlp.router
    assert type(router) is Linear and torch.equal(
        router.weight.float(), plain.layers[1].mlp.router.weight.to(router.weight.dtype).float()
    )
    assert (type(model.layers[1].attention.o) is Linear) == (kind.layers == "mlp")
    for name in ("gate_up", "down"):
        module, whole = getattr(model.layers[1].mlp.experts, name), getattr(plain.layers[1].mlp.experts, name)
        assert isinstance(whole, ExpertLinear)
        if kind.weights.startswith("int"):
            assert isinstance(module, PackedExperts)
            error = (module.dequantize() - whole.weight).norm() / whole.weight.norm()
            assert error < (0.02 if kind.weights == "int8" else 0.15)
            continue
        assert isinstance(module, ScaledExperts)
        rounded = torch.cat(
            [round_weight(part, kind.weights).dequantize() for part in whole.weight.split(whole.parts)]
        )
        assert torch.equal(module.dequantize(), rounded)
    distance = (logits(model) - logits(plain)).norm() / logits(plain).norm()
    assert 0 < distance < 0.6


@pytest.mark.parametrize("name", WRITTEN)
def test_written_and_read_back(name: str, folder: Path, tmp_path: Path) -> None:
    source = load_file(folder / "model.safetensors")
    out = quantize_checkpoint(FolderCheckpoint(folder), name, tmp_path / "q", shard_bytes=100_000)
    checkpoint = open_quantized(FolderCheckpoint(out))
    assert isinstance(checkpoint, QuantizedCheckpoint)
    assert set(checkpoint.names()) == set(source)
    expert = "model.layers.1.mlp.experts.4.up_proj.weight"
    assert expert in checkpoint.modules and "model.layers.1.mlp.gate.weight" not in checkpoint.modules
    form = quantization_type(name).weights
    dense = round_weight(source[expert], form).dequantize()
    torch.testing.assert_close(checkpoint.load(expert), dense, rtol=3e-7, atol=0)
    kept = load_decoder(checkpoint.config, checkpoint, dtype=torch.float32, device="cpu", keep_packed=True)
    assert isinstance(kept.layers[1].mlp.experts.gate_up, ScaledExperts)
    unpacked = load(out)
    assert isinstance(unpacked.layers[1].mlp.experts.gate_up, ExpertLinear)
    spec = EngineSpec(model=str(out), path=out, dtype="float32", device="cpu")
    original = EngineSpec(model=str(folder), path=folder, dtype="float32", device="cpu")
    report = verify(spec, lambda _: TEXTS, reference=original, limits=LOOSE)
    assert report.problems == ()
    assert {m.name for m in report.matrices} > {"layers.1.mlp.experts.gate_up", "layers.1.mlp.experts.down"}


def test_four_bits_stay_packed_on_cpus(folder: Path, tmp_path: Path) -> None:
    out = quantize_checkpoint(FolderCheckpoint(folder), "int4", tmp_path / "q")
    checkpoint = open_quantized(FolderCheckpoint(out))
    kept = load_decoder(checkpoint.config, checkpoint, dtype=torch.bfloat16, device="cpu", keep_packed=True)
    module = kept.layers[1].mlp.experts.down
    assert isinstance(module, PackedExperts)
    dense = load(out).layers[1].mlp.experts.down.weight
    assert (module.dequantize() - dense).norm() < 0.01 * dense.norm()


@pytest.mark.parametrize("name", WRITTEN)
def test_a_wrong_scale_of_one_expert_is_caught(name: str, folder: Path, tmp_path: Path) -> None:
    out = quantize_checkpoint(FolderCheckpoint(folder), name, tmp_path / "q")
    (file,) = out.glob("*.safetensors")
    rng = random.Random(name)
    part = rng.choice(["gate", "up", "down"])
    key = f"model.layers.1.mlp.experts.{rng.randrange(6)}.{part}_proj.weight_scale"
    tensors = load_file(file)
    wide = tensors[key].float()
    wide[0] = wide[0] - 2 if name == "mxfp4" else wide[0] * 0.5
    tensors[key] = wide.to(tensors[key].dtype)
    save_file(tensors, file)
    spec = EngineSpec(model=str(out), path=out, dtype="float32", device="cpu")
    original = EngineSpec(model=str(folder), path=folder, dtype="float32", device="cpu")
    report = verify(spec, lambda _: TEXTS, reference=original, limits=ANYTHING)
    assert len(report.problems) == 1
    assert f"layers.1.mlp.experts.{'down' if part == 'down' else 'gate_up'}" in report.problems[0]


@pytest.mark.parametrize("name", ["fp4", "int4"])
def test_calibration(name: str, folder: Path, tmp_path: Path) -> None:
    """What an expert meets decides how its matrices are rounded."""
    texts = [[RNG.randrange(300) for _ in range(200)] for _ in range(8)]
    calibration = Calibration(FolderCheckpoint(folder), texts, CPU)
    fitted = quantize_checkpoint(FolderCheckpoint(folder), name, tmp_path / "fitted", calibration=calibration)
    plain = quantize_checkpoint(FolderCheckpoint(folder), name, tmp_path / "plain")
    source = load_file(folder / "model.safetensors")
    names = [name for name in source if ".experts." in name]
    met = calibration(names)
    lost = []
    for out in (fitted, plain):
        checkpoint = open_quantized(FolderCheckpoint(out))
        errors = [(checkpoint.load(name) - source[name], met[name].gram) for name in names]
        lost.append(sum(float((error @ gram * error).sum()) for error, gram in errors))
    assert lost[0] < 0.8 * lost[1]


def test_what_each_expert_meets(folder: Path) -> None:
    model = load(folder)
    paths = [f"layers.1.mlp.experts.{name}" for name in ("gate_up", "down")]
    found = input_statistics(model, TEXTS, paths)
    (shared,) = found[paths[0]]
    assert shared.rows == sum(map(len, TEXTS))
    assert sum(inputs.rows for inputs in found[paths[1]]) == 2 * shared.rows  # two experts a token
    met: list[torch.Tensor] = []
    mixture = model.layers[1].mlp
    handle = mixture.register_forward_pre_hook(lambda _, given: met.append(given[0].clone()))
    for ids in TEXTS:
        model(PackedBatch.for_encoding([ids], causal=True))
    handle.remove()
    x = torch.cat(met)
    torch.testing.assert_close(shared.gram, x.T @ x / len(x), rtol=1e-4, atol=1e-4)
    chosen = mixture.router(x).topk(2).indices
    for expert in range(6):
        rows = x[(chosen == expert).any(1)]
        gate, up = (rows @ mixture.experts.gate_up.weight.view(6, 256, 128)[expert].T).chunk(2, 1)
        inner = F.silu(gate) * up
        own = found[paths[1]][expert]
        assert own.rows == len(rows)
        torch.testing.assert_close(own.gram, inner.T @ inner / max(len(rows), 1), rtol=1e-3, atol=1e-3)
        assert own.peak == pytest.approx(float(inner.abs().max()) if len(rows) else own.peak, rel=1e-4)


def test_one_tensor_for_all_experts_is_not_written(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    base = "model.layers.1.mlp.experts."
    down = torch.stack([tensors.pop(f"{base}{i}.down_proj.weight") for i in range(6)])
    both = [
        torch.cat([tensors.pop(f"{base}{i}.{part}_proj.weight") for part in ("gate", "up")]) for i in range(6)
    ]
    fused = tmp_path / "fused"
    fused.mkdir()
    (fused / "config.json").write_text((folder / "config.json").read_text())
    save_file(
        {**tensors, f"{base}gate_up_proj": torch.stack(both), f"{base}down_proj": down},
        fused / "model.safetensors",
    )
    assert torch.equal(logits(load(fused)), logits(load(folder)))
    with pytest.raises(UnsupportedCheckpoint, match=r"gate_up_proj|down_proj"):
        quantize_checkpoint(FolderCheckpoint(fused), "fp8", tmp_path / "q")


@pytest.mark.parametrize(
    ("dtype", "scheme"), [("float32", ""), ("bfloat16", ""), ("bfloat16", "int8"), ("bfloat16", "int4")]
)
def test_the_plan_is_what_is_loaded(dtype: str, scheme: str, folder: Path) -> None:
    spec = EngineSpec(model=str(folder), path=folder, dtype=dtype, quantization=scheme, device="cpu")  # type: ignore[arg-type]
    plan = plan_for(spec, cpu_machine())
    _, ready = build(spec)
    assert ready.engine == plan.engine == "moe"
    assert plan.weights.parameters == ready.summary["parameters"]
    assert plan.weights.total == pytest.approx(ready.summary["weight_bytes"], rel=2e-3)


@pytest.mark.parametrize("scheme", ["fp8", "fp8_block", "fp4", "mxfp4", "int8", "int4"])
def test_the_plan_of_a_gpu(scheme: str, folder: Path) -> None:
    """Numbers that follow from the shapes; layouts of GPUs pad by tiles only."""
    spec = EngineSpec(model=str(folder), path=folder, quantization=scheme)
    plain = plan_for(EngineSpec(model=str(folder), path=folder), gpu_machine("H100")).weights
    plan = plan_for(spec, gpu_machine("H100")).weights
    numbers = 6 * 3 * 128 * 128
    router = 6 * 128 * 2
    assert plain.by_kind["experts"] == 2 * numbers
    bits = {"fp8": 8, "fp8_block": 8, "fp4": 4.5, "mxfp4": 4.25, "int8": 8, "int4": 5}[scheme]
    assert plan.by_kind["experts"] == pytest.approx(numbers * bits / 8, rel=0.08)
    dense = 3 * 128 * 128 * bits / 8
    assert plan.by_kind["mlp"] == pytest.approx(router + dense, rel=0.1)


def test_scales_moved_between_experts_matrices_are_no_defect(folder: Path) -> None:
    """What AWQ does: the norm divided, all that read it multiplied; and each expert's ups divided for its downs."""
    plain, moved = load(folder), load(folder)
    layer = moved.layers[1]
    experts = layer.mlp.experts
    factor = torch.rand(128) + 0.5
    layer.mlp_norm.weight.data.div_(factor)
    for linear in (layer.mlp.router, experts.gate_up):
        linear.weight.data.mul_(factor)
    each = torch.rand(6, 128) + 0.5
    experts.gate_up.weight.data.view(6, 256, 128)[:, 128:] /= each[:, :, None]
    experts.down.weight.data.view(6, 128, 128).mul_(each[:, None])
    torch.testing.assert_close(logits(moved), logits(plain), rtol=1e-3, atol=1e-3)
    transform = load_time(quantization_type("fp8"), CPU)
    for name in ("gate_up", "down"):
        setattr(experts, name, transform(f"layers.1.mlp.experts.{name}", getattr(experts, name)))
    compared = compare(moved, plain, TEXTS, torch.float32, torch.float32, CPU, ANYTHING)
    assert compared.problems == ()
    experts.down.quantized.codes.view(torch.uint8)[300:400] = 0  # of one expert
    compared = compare(moved, plain, TEXTS, torch.float32, torch.float32, CPU, ANYTHING)
    assert any(problem.startswith("layers.1.mlp.experts.down:") for problem in compared.problems)
