"""verify on a GPU: what it measures there are the real kernels."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from headrace.checkpoints.folder import FolderCheckpoint
from headrace.config.quantization import quantization_type
from headrace.config.spec import EngineSpec
from headrace.engines.verify import Limits, Report, compare, verify
from headrace.models.loading import load_decoder
from headrace.quantization.registry import load_time
from support.tiny_folder import write_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
RNG = random.Random(0)
TEXTS = [[RNG.randrange(300) for _ in range(n)] for n in (80, 33, 7)]
ANYTHING = Limits(max_kl=1e9, min_top1=0, max_perplexity_ratio=1e9)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements are kept here and nowhere else."""
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))


def on_cpu(folder: Path, scheme: str) -> Report:
    """The same rounding by the references, in bfloat16 as on the GPU."""
    kind, checkpoint, cpu = quantization_type(scheme), FolderCheckpoint(folder), torch.device("cpu")
    transform = load_time(kind, torch.device("cuda"))
    dtype = torch.bfloat16
    model, own = (
        load_decoder(checkpoint.config, checkpoint, dtype=dtype, device=cpu, transform=how)
        for how in (transform, None)
    )
    cache = torch.float8_e4m3fn if kind.kv_cache == "fp8" else dtype
    return compare(model, own, TEXTS, cache, dtype, cpu, ANYTHING)


@pytest.mark.parametrize("scheme", ["fp8", "fp8_block", "fp4", "mxfp4", "int8", "int4", "fp8_kv"])
def test_decoders(tmp_path: Path, scheme: str) -> None:
    """The model is random, so that few bits cost it much: what counts is that kernels cost no more than rounding."""
    folder = write_llama(
        tmp_path / "llama", hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64
    )
    spec = EngineSpec(model=str(folder), path=folder, quantization=scheme, device="cuda")
    report = verify(spec, lambda _: TEXTS, limits=ANYTHING)
    wanted = on_cpu(folder, scheme)
    assert report.problems == ()
    assert len(report.matrices) == len(wanted.matrices) == (9 if scheme.startswith("int") else 8)
    assert report.mean_kl == pytest.approx(wanted.mean_kl, rel=0.15, abs=0.01)
    assert report.layer_errors == pytest.approx(wanted.layer_errors, rel=0.15)
    for found, expected in zip(report.matrices, wanted.matrices):
        assert (found.name, found.error) == (expected.name, pytest.approx(expected.error, rel=0.1))
