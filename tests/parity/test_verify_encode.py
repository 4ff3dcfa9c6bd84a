"""verify for embedders, classifiers and rerankers: planted defects are caught every time, good set-ups pass.

On a GPU, where there is one: what is measured there are the kernels that serve.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import encoders
import pytest
import torch

from headrace.checkpoints.resolve import open_checkpoint
from headrace.cli.main import main
from headrace.engines.verify_encode import EncodeLimits, EncodeReport, compare_encoders
from headrace.layers.eight_bits import EightBitLinear
from headrace.models.encode_eight_bits import EightBits
from headrace.models.encode_model import EncodeModel, load_encode_model
from headrace.text.encoding import Encoded
from support.tiny_folder import write_tokenizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float16 if torch.cuda.is_available() else torch.float32
LOOSE = EncodeLimits(min_cosine=0.9, max_difference=0.3)  # tiny random models are harsh on rounding
ANYTHING = EncodeLimits(min_cosine=-1, max_difference=1)
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
RNG = random.Random(3)
INPUTS = [Encoded(tuple(RNG.randrange(5, 90) for _ in range(n))) for n in (17, 3, 40, 1, 29, 8)]


@pytest.fixture(scope="module", params=["bert", "modernbert", "nomic", "eurobert"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Norms after and before the blocks, gates, rotary embedding, layer and RMS norm."""
    path = tmp_path_factory.mktemp("m") / request.param
    encoders.make(path, request.param, **SHAPE)
    encoders.add_pooling(path, hidden=64)
    return path


def load(folder: Path, how: EightBits | None = None) -> EncodeModel:
    return load_encode_model(folder, open_checkpoint(folder), dtype=DTYPE, device=DEVICE, eight_bits=how)


def check(model: EncodeModel, folder: Path, limits: EncodeLimits = LOOSE) -> EncodeReport:
    return compare_encoders(model, load(folder), INPUTS, DEVICE, limits)


@pytest.mark.parametrize("how", [EightBits("fp8"), EightBits("int8"), EightBits("fp8", mlp_only=True)])
def test_good_setups_pass(folder: Path, how: EightBits) -> None:
    report = check(load(folder, how), folder)
    assert report.problems == ()
    (change,) = report.changes
    assert (change.task, change.results) == ("embed", len(INPUTS))
    assert change.mean_cosine is not None
    assert change.min_cosine is not None
    assert 0.9 < change.min_cosine <= change.mean_cosine < 1 - 1e-7
    assert len(report.matrices) == (4 if how.mlp_only else 8)
    assert all(matrix.error < (0.04 if how.format == "fp8" else 0.015) for matrix in report.matrices)
    assert len(report.layer_errors) == 2
    assert all(0 < error < 0.3 for error in report.layer_errors)


def test_the_reference_equals_itself(folder: Path) -> None:
    report = check(load(folder), folder)
    assert report.changes[0].min_cosine == pytest.approx(1, abs=1e-6)
    assert max(report.layer_errors) == 0
    assert report.matrices == ()


def damage(linear: EightBitLinear, kind: str, rng: random.Random) -> None:
    """One defect that a wrong packer could leave."""
    rows, columns = linear.out_features, linear.in_features
    row, codes = rng.randrange(rows // 2), linear.codes.view(torch.uint8)
    if kind == "scale":
        linear.scale[rng.randrange(rows)] *= rng.choice([0.5, 1.5, 2.0])
    elif kind == "swapped":
        codes.copy_(torch.cat((codes[rows // 2 :], codes[: rows // 2])))
    else:
        codes[row : row + 4, : columns // 2] = 0


@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize("kind", ["scale", "swapped", "missing"])
def test_planted_defects_are_caught(folder: Path, form: str, kind: str) -> None:
    """In any matrix, and named: without any help from limits on the vectors."""
    for seed in range(3):
        model = load(folder, EightBits(form))  # type: ignore[arg-type]
        linears = [(n, m) for n, m in model.backbone.named_modules() if isinstance(m, EightBitLinear)]
        name, linear = random.Random(seed).choice(linears)
        damage(linear, kind, random.Random(seed))
        report = check(model, folder, ANYTHING)
        assert not report.passed
        assert all(problem.startswith(name + ":") for problem in report.problems)


def test_weights_in_16_bits_are_looked_at_too(folder: Path) -> None:
    """A wrong row of an embedding or a shuffled norm is no matter of quantization, and found all the same."""
    for part in ("word", "norm"):
        model = load(folder, EightBits("int8"))
        names = [n for n, p in model.backbone.named_parameters() if part in n and n.endswith("weight")]
        weight = model.backbone.get_parameter(names[-1])
        weight.data[: weight.shape[0] // 2] *= 1.2
        report = check(model, folder, ANYTHING)
        assert len(report.problems) == 1


@pytest.mark.parametrize(
    ("head", "task", "labels"),
    [("ForSequenceClassification", "classify", 3), ("ForTokenClassification", "token_classify", 4)],
)
def test_probabilities(tmp_path: Path, head: str, task: str, labels: int) -> None:
    names = {"id2label": {i: f"l{i}" for i in range(labels)}, "label2id": {f"l{i}": i for i in range(labels)}}
    encoders.make(tmp_path, "bert", head, **SHAPE, **names)
    report = check(load(tmp_path, EightBits("int8")), tmp_path)
    (change,) = report.changes
    assert change.task == task
    assert change.min_cosine is None
    assert change.max_difference is not None
    assert 0 < change.max_difference < 0.3
    assert change.same_label is not None
    broken = load(tmp_path, EightBits("int8"))
    broken.backbone.layers[0].mlp.up.scale.fill_(torch.nan)
    report = check(broken, tmp_path)
    assert any("probability is off by inf" in problem for problem in report.problems)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole rows and their sentences; what is found is kept for `quality`."""
    from headrace.engines.build import build
    from headrace.engines.quality import check_quality
    from headrace.errors import ConfigError

    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "m"
    encoders.make(folder, "bert", **SHAPE, vocab_size=300)
    encoders.add_pooling(folder, hidden=64)
    write_tokenizer(folder)
    texts = tmp_path / "t.txt"
    texts.write_text("One is short. Two is not much longer!\n\nAnd a third one? Yes.")
    command = ["verify", str(folder), "--quantization", "fp8", "--device", "cpu", "--texts", str(texts)]
    assert main([*command, "--json", "--min-cosine", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["inputs"], found["passed"]) == (6, True)
    assert main([*command, "--min-cosine", "0.9999999"]) == 1
    shown = capsys.readouterr().out
    assert "lowest cosine" in shown
    assert main(["verify", str(folder), "--device", "cpu"]) == 2
    assert "reference itself" in capsys.readouterr().err
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model_metadata:\n  headrace:\n    model: {folder}\n    quantization: fp8\n    device: cpu\n"
        "    quality: refuse\n"
        "    min_cosine: 0.9999999\n"
    )
    from headrace.config.resolve import resolve

    with pytest.raises(ConfigError, match="vectors have cosine"):
        build(resolve(str(config)).spec)
    config.write_text(config.read_text().replace("0.9999999", "0.5"))
    assert "note: this was measured on 6 inputs of" in shown
    with pytest.raises(
        ConfigError, match=r"on 6 inputs of \d+ tokens.* 20 inputs of 500 tokens.*run: headrace v"
    ):
        build(resolve(str(config)).spec)
    texts.write_text("\n\n".join(f"This is text number {n}, which is short." for n in range(20)))
    assert main([*command, "--max-tokens", "24", "--min-cosine", "0.5"]) == 0
    assert "on 20 inputs of 480 tokens" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="on 20 inputs of 480 tokens"):
        build(resolve(str(config)).spec)
    assert main([*command[:-2], "--min-cosine", "0.5"]) == 0  # the packaged texts
    assert "note" not in capsys.readouterr().out
    spec = resolve(str(config)).spec  # FP8 itself is for GPUs
    assert check_quality(spec, open_checkpoint(folder), torch.float32, torch.float32, changed=True) is None


def test_rerankers_get_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each sentence with its text."""
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "m"
    encoders.make(folder, "bert", "ForSequenceClassification", **SHAPE, vocab_size=300, num_labels=1)
    write_tokenizer(folder)
    texts = tmp_path / "t.jsonl"
    chat = [{"role": "user", "content": "Is it? It is."}, {"role": "assistant", "content": "So. It. Is."}]
    texts.write_text(json.dumps({"messages": chat}))
    command = [
        "verify",
        str(folder),
        "--quantization",
        "int8",
        "--device",
        "cpu",
        "--texts",
        str(texts),
        "--json",
    ]
    assert main([*command, "--max-difference", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["inputs"] == 5
    (change,) = found["changes"]
    assert (change["task"], change["results"], change["same_label"]) == ("score", 5, None)
    assert 0 < change["max_difference"] < 0.5
    assert main([*command, "--max-difference", "0"]) == 1
