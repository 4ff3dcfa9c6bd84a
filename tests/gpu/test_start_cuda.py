"""A first start on a new machine: kernels are compiled before the first request, several at once, and only once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from headrace.config.plan.facts import Facts
from headrace.config.plan.shape import read_shape
from headrace.config.plan.weights import expected_tensors
from parity.encoders import add_pooling, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parents[2]
# As Qwen3-0.6B but for its depth and vocabulary.
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128,
    "num_hidden_layers": 3, "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True,
    "max_position_embeddings": 4096, "dtype": "bfloat16",
}  # fmt: skip


def write_decoder(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shape = read_shape(Facts(where="", config=CONFIG, container="config"))
    generator = torch.Generator("cuda").manual_seed(1)
    tensors = {}
    for name, tensor in expected_tensors(shape, 2).items():
        value = torch.ones(tensor.shape, dtype=torch.bfloat16, device="cuda")
        tensors[name] = (value if value.dim() == 1 else value.normal_(0, 0.05, generator=generator)).cpu()
    save_file(tensors, folder / "model.safetensors")


def start(folder: Path, cache: Path, settings: dict[str, Any]) -> dict[str, Any]:
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "support" / "first_requests.py"),
            str(folder),
            json.dumps(settings),
        ],
        env={**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "foreseen" not in done.stderr, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "settings", [{"max_num_seqs": 48}, {"max_num_seqs": 4, "quantization": "fp8"}], ids=["plain", "fp8"]
)
def test_generating(settings: dict[str, Any], tmp_path: Path) -> None:
    write_decoder(tmp_path)
    first = start(tmp_path, tmp_path / "cache", settings)
    assert first["told"][0][0] == 0
    assert first["told"][-1][0] == first["told"][-1][1] > 10
    assert first["late"] == []
    assert first["allocations"] == 0
    assert first["idle_turns"] > 5
    assert first["same"]
    second = start(tmp_path, tmp_path / "cache", settings)
    assert second["told"] == []
    assert second["late"] == []
    assert second["answers"] == first["answers"]


def test_encoding(tmp_path: Path) -> None:
    make(tmp_path, "bert")
    add_pooling(tmp_path)
    first = start(tmp_path, tmp_path / "cache", {"max_num_seqs": 64})
    assert first["told"][-1][0] == first["told"][-1][1] > 2
    assert first["late"] == []
    assert first["allocations"] == 0
    assert first["same"]
    assert start(tmp_path, tmp_path / "cache", {"max_num_seqs": 64})["told"] == []
