"""The packaged embedder on a GPU against float32 on the CPU, which tests/parity compares with sentence-transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpu.test_encode_families_gpu import DEVICE, EMBED, HALVES, cosines, on
from headrace.text.tokenizer import Tokenizer
from parity.encoders import encode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.models,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TEXTS = [
    "eating food",
    "What is the capital of France?",
    "def f(x):\n    return x ** 2",
    "Größe, naïve café, 你好，世界！ 🙂",
    "the quick brown fox jumps over the lazy dog. " * 24,
    "A reply takes a tenth of a second; most of it is spent waiting for the first token.",
]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_vectors(dtype: torch.dtype, minilm_path: Path) -> None:
    tokenizer = Tokenizer.from_path(minilm_path)
    ids = [tokenizer.encode(text)[:256] for text in TEXTS]
    expected = encode(on(minilm_path, torch.float32, torch.device("cpu")), ids, EMBED)
    found = encode(on(minilm_path, dtype, DEVICE), ids, EMBED)
    for ours, theirs in zip(found, expected, strict=True):
        pooled, token = cosines(ours, theirs)
        assert pooled >= (0.99999 if dtype is torch.float32 else 0.999)
        assert token >= (0.9999 if dtype is torch.float32 else 0.998)
