"""verify on a GPU: what it measures there are the real kernels."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import encoders
from headrace.checkpoints.resolve import open_checkpoint
from headrace.config.spec import EngineSpec
from headrace.engines.verify import Limits, verify
from headrace.engines.verify_encode import EncodeLimits, compare_encoders
from headrace.kernels.rounding import Format
from headrace.layers.eight_bits import EightBitLinear
from headrace.models.encode_eight_bits import EightBits
from headrace.models.encode_model import EncodeModel, load_encode_model
from headrace.text.encoding import Encoded
from support.tiny_folder import write_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
RNG = random.Random(0)
TEXTS = [[RNG.randrange(300) for _ in range(n)] for n in (80, 33, 7)]
LOOSE = Limits(max_kl=0.7, min_top1=0.3, max_perplexity_ratio=2.0)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements are kept here and nowhere else."""
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("scheme", ["fp8", "fp8_block", "fp4", "mxfp4", "int8", "int4", "fp8_kv"])
def test_decoders(tmp_path: Path, scheme: str) -> None:
    folder = write_llama(
        tmp_path / "llama", hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64
    )
    spec = EngineSpec(model=str(folder), path=folder, quantization=scheme, device="cuda")
    report = verify(spec, lambda _: TEXTS, limits=LOOSE)
    assert report.problems == ()
    assert len(report.matrices) == 8
    assert 0 < report.mean_kl
    print(f"{scheme}: KL {report.mean_kl:.5f}, worst matrix {max(m.error for m in report.matrices):.4f}")


@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "eurobert"])
def test_encoders(tmp_path: Path, family: str, form: Format) -> None:
    encoders.make(tmp_path, family, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    encoders.add_pooling(tmp_path, hidden=256)
    device = torch.device("cuda")

    def load(how: EightBits | None) -> EncodeModel:
        return load_encode_model(
            tmp_path, open_checkpoint(tmp_path), dtype=torch.float16, device=device, eight_bits=how
        )

    inputs = [Encoded(tuple(RNG.randrange(5, 90) for _ in range(n))) for n in (17, 3, 80, 1, 29, 8)]
    own, loose = load(None), EncodeLimits(min_cosine=0.9)
    model = load(EightBits(form))
    report = compare_encoders(model, own, inputs, device, loose)
    assert report.problems == ()
    assert len(report.matrices) == 8
    print(f"{family} {form}: {report.changes[0]}")
    linears = [(n, m) for n, m in model.backbone.named_modules() if isinstance(m, EightBitLinear)]
    name, linear = random.Random(family).choice(linears)
    linear.scale[5] *= 2
    report = compare_encoders(model, own, inputs, device, loose)
    assert [problem.split(":")[0] for problem in report.problems if "pieces" in problem] == [name]
