"""verify on a GPU: what it measures there are the real kernels."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from headrace.config.spec import EngineSpec
from headrace.engines.verify import Limits, verify
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
    assert report.mean_kl > 0
    print(f"{scheme}: KL {report.mean_kl:.5f}, worst matrix {max(m.error for m in report.matrices):.4f}")
