"""The comparison with the reference: planted defects are caught every time, good set-ups pass."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from headrace.checkpoints.folder import FolderCheckpoint
from headrace.config.quantization import quantization_type
from headrace.config.spec import EngineSpec
from headrace.engines.quality import MIN_TOKENS
from headrace.engines.quantize import quantize_checkpoint
from headrace.engines.texts import PACKAGED_TEXTS, read_rows
from headrace.engines.verify import Limits, Report, compare, verify
from headrace.errors import ConfigError, MissingFile
from headrace.layers.linear import Linear
from headrace.models.decoder import DecoderModel
from headrace.models.loading import load_decoder
from headrace.quantization.audit import audit
from headrace.quantization.registry import load_time
from headrace.quantization.scaled import ScaledLinear
from headrace.quantization.schemes.fp4 import Fp4Weight
from headrace.quantization.schemes.fp8 import Fp8Weight
from support.tiny_folder import GROUPED, write_llama, write_tokenizer

pytestmark = pytest.mark.usefixtures("home")
CPU = torch.device("cpu")
RNG = random.Random(0)
TEXTS = [[RNG.randrange(300) for _ in range(n)] for n in (40, 33, 7)]
# The tiny model is random, so its distributions are harsher on rounding than any trained one's.
LOOSE = Limits(max_kl=0.5, min_top1=0.3, max_perplexity_ratio=2.0)


def load(folder: Path, scheme: str = "") -> DecoderModel:
    checkpoint = FolderCheckpoint(folder)
    transform = load_time(quantization_type(scheme), CPU) if scheme else None
    return load_decoder(checkpoint.config, checkpoint, dtype=torch.float32, device="cpu", transform=transform)


def check(
    model: DecoderModel, folder: Path, limits: Limits = LOOSE, cache: torch.dtype = torch.float32
) -> Report:
    return compare(model, load(folder), TEXTS, cache, torch.float32, CPU, limits)


@pytest.mark.parametrize("scheme", ["fp8", "fp8_block", "fp4", "mxfp4", "fp8_mlp_only"])
def test_good_setups_pass(folder: Path, scheme: str) -> None:
    report = check(load(folder, scheme), folder)
    assert report.problems == ()
    assert report.passed
    assert report.tokens == sum(map(len, TEXTS))
    assert 0 < report.mean_kl < report.max_kl
    assert len(report.layer_errors) == 2
    assert len(report.matrices) == (4 if "mlp" in scheme else 8)


def test_the_reference_equals_itself(folder: Path) -> None:
    report = check(load(folder), folder)
    assert report.mean_kl == pytest.approx(0, abs=1e-9)
    assert report.top1 == 1
    assert report.perplexity == pytest.approx(report.reference_perplexity)
    assert max(report.layer_errors) == 0


def test_an_fp8_cache_shows(folder: Path) -> None:
    """Only later pieces of a text read the cache, so this fails if they do not."""
    report = check(load(folder), folder, cache=torch.float8_e4m3fn)
    assert report.passed
    assert 1e-6 < report.mean_kl < 0.1


def damaged(weight: object, kind: str, seed: int) -> object:
    """A packed weight with one defect that a wrong packer or reader could leave."""
    rng = random.Random(seed)
    assert isinstance(weight, (Fp8Weight, Fp4Weight))
    rows, columns = weight.shape
    row = rng.randrange(rows // 2)
    if isinstance(weight, Fp8Weight):
        codes, scale = weight.codes.clone().view(torch.uint8), weight.scale.clone()
        if kind == "scale":
            scale[rng.randrange(len(scale))] *= rng.choice([0.5, 1.5, 2.0])
        elif kind == "swapped":
            codes = torch.cat((codes[rows // 2 :], codes[: rows // 2]))
        elif kind == "missing":
            codes[row : row + 4, : columns // 2] = 0
        return Fp8Weight(codes.view(torch.float8_e4m3fn), scale, weight.block)
    packed, scale = weight.packed.clone(), weight.scale.clone()
    factor = weight.row_scale.clone()
    if kind == "scale":
        factor[row] *= rng.choice([0.5, 2.0])
    elif kind == "swapped":
        packed = (packed << 4) | (packed >> 4)
    elif kind == "missing":
        packed[row : row + 4, : columns // 4] = 0
    return Fp4Weight(packed, scale, factor)


@pytest.mark.parametrize("scheme", ["fp8", "fp4"])
@pytest.mark.parametrize("kind", ["scale", "swapped", "missing"])
def test_planted_defects_are_caught(folder: Path, scheme: str, kind: str) -> None:
    """In any matrix, and named: without any help from limits on the output."""
    reference = load(folder)
    anything = Limits(max_kl=1e9, min_top1=0, max_perplexity_ratio=1e9)
    for seed in range(4):
        model = load(folder, scheme)
        linears = [(n, m) for n, m in model.named_modules() if isinstance(m, ScaledLinear)]
        name, linear = random.Random(seed).choice(linears)
        linear.quantized = damaged(linear.quantized, kind, seed)  # type: ignore[assignment]
        report = compare(model, reference, TEXTS, torch.float32, torch.float32, CPU, anything)
        assert not report.passed
        assert all(problem.startswith(name + ":") for problem in report.problems)


def test_a_broken_model_is_beyond_every_limit(folder: Path) -> None:
    model = load(folder)
    model.layers[0].mlp.down.weight.data.mul_(torch.nan)
    report = check(model, folder)
    assert len(report.problems) >= 3


@pytest.mark.parametrize("bits", [4, 8])
def test_audit_names_the_place(bits: int) -> None:
    full = torch.randn(40, 150)
    rounded = full + torch.randn(40, 150) * (0.02 if bits == 8 else 0.1)
    assert audit("w", rounded, full, bits=bits).where is None
    wrong = rounded.clone()
    wrong[17, 128:] = 0
    found = audit("w", wrong, full, bits=bits)
    assert (found.where, found.bad_pieces) == ((17, 128), 1)
    assert audit("w", wrong, full, bits=bits, fitted=1).where == (17, 128)
    wrong[17, 128:] = full[17, 128:] * 1.5  # far off, and alone
    assert audit("w", wrong, full, bits=bits).where == (17, 128)
    assert audit("w", wrong, full, bits=bits, fitted=1).where is None
    wrong[17, :64] = full[17, :64] * 1.5
    assert audit("w", wrong, full, bits=bits, fitted=1).where == (17, 0)
    wrong = rounded.clone()
    wrong[3, 5] = torch.nan
    assert audit("w", wrong, full, bits=bits).where == (3, 0)
    assert audit("w", wrong, full, bits=bits, fitted=1).where == (3, 0)


def test_groups_with_an_outlier_and_moved_weights_are_no_defect() -> None:
    """llm-compressor's groups of 128 and GPTQ's moves: small numbers beside a large one are lost, and some go far."""
    torch.manual_seed(7)
    full = torch.randn(64, 512) * 0.02
    full[9, 70], full[9, 200] = 0.6, -0.8
    step = full.unflatten(1, (-1, 128)).abs().amax(-1, keepdim=True) / 7
    rounded = ((full.unflatten(1, (-1, 128)) / step).round() * step).flatten(1)
    assert audit("w", rounded, full, bits=4).where is not None
    assert audit("w", rounded, full, bits=4, fitted=128).where is None
    moved = rounded.clone()
    moved[20] += torch.randn(512) * 0.02  # as large as the weights, and not along them
    assert audit("w", moved, full, bits=4, fitted=128).where is None
    for factor in (0.5, 2.0, 0.0, -1.0):
        wrong = moved.clone()
        wrong[30, 128:256] *= factor  # one group
        assert audit("w", wrong, full, bits=4, fitted=128).where == (30, 128)
    wrong = torch.cat((rounded[32:], rounded[:32]))
    assert audit("w", wrong, full, bits=4, fitted=128).bad_pieces > 400
    for rows in (slice(0, 64), slice(40, 44)):  # zero points off by one
        wrong = moved.clone()
        wrong[rows] += step.expand(-1, -1, 128).flatten(1)[rows]
        assert audit("w", wrong, full, bits=4, fitted=128).where is not None


def test_large_weights_leave_their_row_few_steps() -> None:
    """Integers with a scale a row: that is rounding, while half a scale or a missing block are none."""
    full = torch.randn(6, 4096)
    full[2, 100] = 200.0
    scale = full.abs().amax(1, keepdim=True) / 127
    codes = (full / scale).round()
    assert audit("w", codes * scale, full, bits=8).where == (2, 0)
    assert audit("w", codes * scale, full, bits=8, even=True).where is None
    for factor in (0.5, 2.0):
        wrong = scale.clone()
        wrong[2] *= factor
        assert audit("w", codes * wrong, full, bits=8, even=True).where is not None
    codes[4, 64:128] = 0
    assert audit("w", codes * scale, full, bits=8, even=True).where == (4, 64)


def test_through_specs(folder: Path) -> None:
    spec = EngineSpec(model=str(folder), path=folder, quantization="fp8", dtype="float32", device="cpu")
    report = verify(spec, lambda _: TEXTS, limits=LOOSE)
    assert report.passed
    assert "fp8" in report.setup
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report
    with pytest.raises(ConfigError, match="reference itself"):
        verify(msgspec.structs.replace(spec, quantization=""), lambda _: TEXTS)
    with pytest.raises(ConfigError, match="at least 64"):
        verify(spec, lambda _: [[1, 2, 3]])


def test_an_fp4_cache(folder: Path) -> None:
    """Served and measured like any other; the tiny model's heads have 16 dimensions, one scale each."""
    from headrace.engines.build import build
    from headrace.types import Request, SamplingParams

    core, ready = build(
        EngineSpec(model="m", path=folder, kv_cache_dtype="fp4", device="cpu", dtype="float32")
    )
    plain, other = build(EngineSpec(model="m", path=folder, device="cpu", dtype="float32"))
    size, wide = (about.summary["kv_bytes"] / about.summary["kv_tokens"] for about in (ready, other))
    assert size / wide == pytest.approx(9 / 16 / 4, rel=0.02)
    core.add([Request(id="a", token_ids=(3, 7, 11), sampling=SamplingParams(max_tokens=5, ignore_eos=True))])
    tokens = [
        token for _ in range(6) if core.has_work() for found in core.step() for token in found.token_ids
    ]
    assert len(tokens) == 5
    del plain
    report = check(load(folder), folder, cache=torch.float4_e2m1fn_x2)
    finer = check(load(folder), folder, cache=torch.float8_e4m3fn)
    assert 0 < finer.mean_kl < report.mean_kl < 0.5


def test_texts(tmp_path: Path) -> None:
    packaged = read_rows(PACKAGED_TEXTS)
    assert len(packaged) >= 8
    words = [len(row.split()) for row in packaged if isinstance(row, str)]
    assert sum(words) > 1.2 * MIN_TOKENS  # whatever the tokenizer
    file = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "hi"}]
    file.write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"messages": chat}) + "\n")
    assert read_rows(file) == ["one", chat]
    assert read_rows(file, limit=1) == ["one"]
    (tmp_path / "a.txt").write_text("first\nline\n\nsecond\n\n\n")
    assert read_rows(tmp_path / "a.txt") == ["first\nline", "second"]
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"txt": 1}\n')
    with pytest.raises(ConfigError, match="line 2 has neither"):
        read_rows(tmp_path / "bad.jsonl")
    with pytest.raises(MissingFile):
        read_rows(tmp_path / "none")
    lines = "one\u2028two\u0085three\x0c"  # JSON allows them within a string
    row = json.dumps({"text": lines}, ensure_ascii=False)
    (tmp_path / "bom.jsonl").write_bytes(f"\ufeff{row}\r\n{row}\n".encode())
    assert read_rows(tmp_path / "bom.jsonl") == [lines, lines]
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n{"text": "\\ud800"}\n')
    with pytest.raises(ConfigError, match="line 2 holds half of a character"):
        read_rows(tmp_path / "half.jsonl")


def written(folder: Path, out: Path, name: str) -> Path:
    """Quantized into several files."""
    from headrace.engines.quantize import quantize_checkpoint

    quantize_checkpoint(FolderCheckpoint(folder), name, out, shard_bytes=60_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    return out


@pytest.mark.parametrize("name", ["fp8", "fp8_block", "fp4", "mxfp4", "int8", "int4"])
def test_checkpoints_in_several_files(name: str, folder: Path, tmp_path: Path) -> None:
    """Also on CPUs, which dequantize most of them as they load: what lies on disk is held against the original."""
    out = written(folder, tmp_path / "q", name)
    spec = EngineSpec(model=str(out), path=out, dtype="float32", device="cpu")
    original = EngineSpec(model=str(folder), path=folder, dtype="float32", device="cpu")
    report = verify(spec, lambda _: TEXTS, reference=original, limits=LOOSE)
    assert report.problems == ()
    assert len(report.matrices) == 8
    for number in (1, 3):
        other = write_llama(tmp_path / f"other{number}", **{**GROUPED, "num_hidden_layers": number})
        wrong = msgspec.structs.replace(original, path=other)
        with pytest.raises(ConfigError, match="another model"):
            verify(spec, lambda _: TEXTS, reference=wrong, limits=LOOSE)


@pytest.mark.parametrize("name", ["fp8", "fp4", "int8", "int4"])
@pytest.mark.parametrize("kind", ["scale", "swapped", "missing"])
def test_defects_on_disk_are_caught(name: str, kind: str, folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    out = written(folder, tmp_path / "q", name)
    rng = random.Random(f"{name} {kind}")
    weights = [
        (file, key)
        for file in sorted(out.glob("*.safetensors"))
        for key in load_file(file)
        if ".layers." in key and key.endswith((".weight_packed", "_proj.weight"))
    ]
    file, key = rng.choice(weights)
    tensors = load_file(file)
    base = key.rsplit(".", 1)[0]
    codes = tensors[key].view(torch.uint8) if tensors[key].element_size() == 1 else tensors[key]
    rows, columns = codes.shape
    if kind == "scale":
        scale = tensors[f"{base}.weight_scale"]
        wide = scale.float()
        wide[rng.randrange(rows)] *= rng.choice([0.5, 2.0])
        tensors[f"{base}.weight_scale"] = wide.to(scale.dtype)
    elif kind == "swapped":
        codes.copy_(torch.cat((codes[rows // 2 :], codes[: rows // 2])))
    else:
        codes[3:7, : max(columns // 2, 1)] = 0
    save_file(tensors, file)
    spec = EngineSpec(model=str(out), path=out, dtype="float32", device="cpu")
    original = EngineSpec(model=str(folder), path=folder, dtype="float32", device="cpu")
    anything = Limits(max_kl=1e9, min_top1=0, max_perplexity_ratio=1e9)
    report = verify(spec, lambda _: TEXTS, reference=original, limits=anything)
    assert not report.passed
    assert all("pieces are not the reference's" in problem for problem in report.problems)
    assert len(report.problems) == 1


def test_a_quantized_table_is_judged_by_its_own_bits(folder: Path, tmp_path: Path) -> None:
    """llm-compressor rounds embeddings, too, where it is told to; rounding alone is no defect, and a wrong scale is."""
    from safetensors.torch import load_file, save_file

    out = written(folder, tmp_path / "q", "int8")
    name = "model.embed_tokens.weight"
    file = next(file for file in sorted(out.glob("*.safetensors")) if name in load_file(file))
    tensors = load_file(file)
    weight = tensors.pop(name).float()
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int64) + 128
    words = (codes.unflatten(1, (-1, 4)) << torch.arange(0, 32, 8)).sum(-1).to(torch.int32)
    base = name.removesuffix(".weight")
    tensors |= {f"{base}.weight_packed": words, f"{base}.weight_scale": scale}
    tensors[f"{base}.weight_shape"] = torch.tensor(weight.shape)
    save_file(tensors, file)
    for index in out.glob("*.index.json"):
        listed = json.loads(index.read_text())
        listed["weight_map"] = dict.fromkeys(tensors, file.name) | {
            key: value for key, value in listed["weight_map"].items() if key != name
        }
        index.write_text(json.dumps(listed))
    spec = EngineSpec(model=str(out), path=out, dtype="float32", device="cpu")
    original = EngineSpec(model=str(folder), path=folder, dtype="float32", device="cpu")
    assert verify(spec, lambda _: TEXTS, reference=original, limits=LOOSE).problems == ()
    scale[7] *= 2
    save_file(tensors, file)
    problems = verify(spec, lambda _: TEXTS, reference=original, limits=LOOSE).problems
    assert any(problem.startswith("embed:") for problem in problems)


def test_a_checkpoint_with_a_cache_alone(folder: Path, tmp_path: Path) -> None:
    """No matrix is quantized: all are judged as 16 bits, and it may stand as a reference."""
    out = shutil.copytree(folder, tmp_path / "kv")
    config = json.loads((out / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "kv_cache_scheme": scheme,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    spec = EngineSpec(model=str(out), path=out, dtype="float32", device="cpu")
    report = verify(spec, lambda _: TEXTS, limits=LOOSE)
    assert report.passed
    assert "float8_e4m3fn" in report.setup
    assert report.mean_kl > 0


def test_weights_in_16_bits_are_looked_at_too(folder: Path) -> None:
    """A wrong row of the embeddings, a norm or the head."""
    anything = Limits(max_kl=1e9, min_top1=0, max_perplexity_ratio=1e9)
    for place in ("embed.weight", "norm.weight", "head.weight", "layers.1.mlp_norm.weight"):
        model = load(folder, "fp8")
        weight = model.get_parameter(place)
        weight.data[5:40] *= 2.0
        report = check(model, folder, anything)
        name = place.removesuffix(".weight") if place != "norm.weight" else place
        named = "layers.1.mlp.gate_up" if "mlp_norm" in place else name
        assert [problem.split(":")[0] for problem in report.problems] == [named]


def test_scales_moved_into_norms_are_no_defect(folder: Path) -> None:
    """What AWQ and SmoothQuant do: columns times a factor, the norm or the rows before them divided by it."""
    plain, moved = load(folder), load(folder)
    for layer in moved.layers:
        attention, mlp = layer.attention, layer.mlp
        for norm, linear in ((layer.attention_norm, attention.qkv), (layer.mlp_norm, mlp.gate_up)):
            factor = torch.rand(norm.weight.shape) + 0.5
            norm.weight.data.div_(factor)
            linear.weight.data.mul_(factor)
        factor = torch.rand(mlp.down.in_features) + 0.5
        mlp.gate_up.weight.data[-len(factor) :].div_(factor[:, None])
        mlp.down.weight.data.mul_(factor)
    transform = load_time(quantization_type("fp8"), CPU)
    for path, module in list(moved.named_modules()):
        if type(module).__name__ == "Linear" and path != "head":
            parent = moved.get_submodule(path.rsplit(".", 1)[0])
            setattr(parent, path.rsplit(".", 1)[1], transform(path, module))
    assert compare(moved, plain, TEXTS, torch.float32, torch.float32, CPU, LOOSE).problems == ()
    moved.layers[0].attention_norm.weight.data[:20] *= 1.5
    anything = Limits(max_kl=1e9, min_top1=0, max_perplexity_ratio=1e9)
    report = compare(moved, plain, TEXTS, torch.float32, torch.float32, CPU, anything)
    assert [problem.split(":")[0] for problem in report.problems] == ["layers.0.attention.qkv"]
    down = moved.layers[1].mlp.down.quantized
    down.codes.view(torch.uint8)[:, 64:] = 0  # nothing undoes these rows any more
    report = compare(moved, plain, TEXTS, torch.float32, torch.float32, CPU, anything)
    named = [problem.split(":")[0] for problem in report.problems]
    assert named == ["layers.0.attention.qkv", "layers.1.mlp.gate_up", "layers.1.mlp.down"]


def test_the_floor_and_near_ties(folder: Path) -> None:
    spec = EngineSpec(model=str(folder), path=folder, quantization="fp8", dtype="float32", device="cpu")
    report = verify(spec, lambda _: TEXTS, limits=LOOSE, floor=True)
    assert report.floor is not None
    kl, top1, decided = report.floor
    assert 0 < kl < report.mean_kl
    assert report.top1 <= top1 <= 1
    assert 0 < report.decided < 1
    assert report.top1_decided >= report.top1
    assert decided >= top1


@pytest.mark.parametrize("scheme", ["fp8", "fp8_block", "int8", "fp4", "mxfp4", "int4"])
def test_a_factor_of_a_whole_matrix(scheme: str) -> None:
    """A scale that is wrong everywhere by less than rounding hides in each piece; the rows together show it."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(192, 256, generator=generator) * torch.rand(192, 1, generator=generator)
    weight[5] = 0
    linear = load_time(quantization_type(scheme), CPU)("layers.0.mlp.down", _linear(weight))
    packed = linear.dequantize().float()  # type: ignore[operator, union-attr]
    kind = {"fp8": (8, False), "fp8_block": (8, False), "int8": (8, True)}.get(scheme, (4, False))
    fitted = 32 if scheme == "int4" else 0
    judge = partial(audit, "m", reference=weight, bits=kind[0], even=kind[1], fitted=fitted)
    assert judge(packed).where is None
    for factor in (1.1, 0.9, 1.25) if kind[0] == 4 else (1.04, 0.95, 1.2):
        wrong = packed.clone()
        wrong[64:128] *= factor
        found = judge(wrong)
        assert found.where is not None
        assert 64 <= found.where[0] < 128
        assert found.problem
    if scheme in ("fp8", "int8"):
        wrong = packed.clone()
        wrong[7] *= 1.06
        found = judge(wrong)
        assert found.where == (7, 0)
        assert "row 7" in found.problem
        assert "1.06 times" in found.problem


def _linear(weight: Tensor) -> Linear:
    linear = Linear(weight.shape[1], weight.shape[0], dtype=torch.float32, device="cpu")
    linear.weight.data = weight.clone()
    return linear


def test_settings_and_tokens_of_another_model(tmp_path: Path) -> None:
    """Equal weights under another config.json or tokenizer are no good set-up, whatever the texts show."""
    from headrace.text.tokenizer import Tokenizer

    folder = write_llama(tmp_path / "llama", **GROUPED)
    write_tokenizer(folder)
    out = quantize_checkpoint(FolderCheckpoint(folder), "int8", tmp_path / "out")
    spec, base = EngineSpec(model=str(out), device="cpu"), EngineSpec(model=str(folder), device="cpu")

    def check() -> tuple[str, ...]:
        report = verify(spec, lambda _: TEXTS, reference=base, limits=LOOSE)
        assert report.passed == (not report.problems)
        return report.problems

    assert check() == ()
    config = json.loads((out / "config.json").read_text())
    for changes, told in (
        ({"rope_theta": 11000.0}, "rope.theta is 11000.0"),
        ({"rms_norm_eps": 1e-5}, "norm_eps is 1e-05"),
        ({"max_position_embeddings": 256}, ""),
        ({"_name_or_path": "x", "use_cache": False}, ""),
    ):
        (out / "config.json").write_text(json.dumps({**config, **changes}))
        problems = check()
        assert bool(problems) == bool(told)
        assert not told or told in problems[0]
    (out / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert Tokenizer.from_path(out).encode("e") != Tokenizer.from_path(folder).encode("e")
    (problem,) = check()
    assert "tokenizer is not the reference's" in problem
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert check() == ()
