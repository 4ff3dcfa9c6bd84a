"""Every encoder family and head on a GPU, in float32 and 16 bits, against float32 on the CPU.

What the CPU gives is compared with transformers in tests/parity.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace.checkpoints.resolve import open_checkpoint
from headrace.execution.encode_runner import EncodeRunner
from headrace.models.encode_model import load_encode_model
from headrace.types import EncodeOutput, EncodeParams, EncodeTask
from parity.encoders import FAMILIES, VOCAB, add_pooling, array, encode, sequences, write_gte
from parity.encoders import make as make_by_transformers
from parity.test_encode_heads import make_causal, with_labels
from parity.test_encode_special import jina, m3, nomic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
HALVES = [torch.float32, torch.float16, torch.bfloat16]
EMBED = EncodeParams(normalize=True, also=(EncodeTask.EMBED_ALL,))


def make(folder: Path, family: str, head: str = "Model", *, num_labels: int = 0) -> None:
    """A random checkpoint, written here or by transformers."""
    if family == "gte":  # not every version of transformers knows it
        write_gte(folder, head, num_labels=num_labels)
    else:
        make_by_transformers(folder, family, head, **({"num_labels": num_labels} if num_labels else {}))


def on(folder: Path, dtype: torch.dtype, device: torch.device, pooling: str | None = None) -> EncodeRunner:
    checkpoint = open_checkpoint(folder)
    model = load_encode_model(folder, checkpoint, dtype=dtype, device=device, pooling=pooling)
    return EncodeRunner(model, device)


def tame(folder: Path) -> Path:
    """Shrink the matrices: tests/parity draws them large, which multiplies rounding more than trained ones do."""
    file = folder / "model.safetensors"
    tensors = {
        name: tensor if tensor.dim() < 2 else tensor * 0.35 for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def cosines(ours: EncodeOutput, theirs: EncodeOutput) -> tuple[float, float]:
    """Of the vectors, and the smallest over their tokens."""
    pairs = [(ours, theirs), *zip(ours.also, theirs.also, strict=True)]
    pooled, token = (float((unit(array(a)) * unit(array(b))).sum(-1).min()) for a, b in pairs)
    return pooled, token


def compare(folder: Path, dtype: torch.dtype, pooling: str | None = None, routed: bool = False) -> None:
    """All sequences in one batch, of which a part is alone again.

    With ``routed`` in 16 bits most sequences count and not the worst: a token between two experts may go to either.
    """
    tame(folder)
    ids = sequences(seed=1, count=30)
    expected = encode(on(folder, torch.float32, torch.device("cpu"), pooling), ids, EMBED)
    run = on(folder, dtype, DEVICE, pooling)
    together = encode(run, ids, EMBED)
    pooled, token = zip(*map(cosines, together, expected))
    if dtype is torch.float32:
        assert min(*pooled, *token) >= 0.99999
    elif routed:
        assert np.quantile(pooled, 0.3) >= 0.999
    else:
        assert min(pooled) >= 0.999
        assert min(token) >= 0.998
    for i in (0, 2, 29):
        (alone,) = encode(run, [ids[i]], EMBED)
        assert (routed and dtype is not torch.float32) or min(cosines(alone, together[i])) >= 0.9999


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make(tmp_path, family)
    add_pooling(tmp_path)
    compare(tmp_path, dtype)


SPECIAL: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "jina": (jina, None),
    "nomic authors": (lambda folder: nomic(folder, 0), None),
    "nomic moe": (lambda folder: nomic(folder, 2), None),
    "llama": (lambda folder: make_causal(folder, "Llama", "Model"), "last"),
    "mistral": (lambda folder: make_causal(folder, "Mistral", "Model"), "last"),
    "qwen2": (lambda folder: make_causal(folder, "Qwen2", "Model"), "last"),
    "qwen3": (lambda folder: make_causal(folder, "Qwen3", "Model"), "last"),
    "gemma3": (lambda folder: make_causal(folder, "Gemma3Text", "Model", sliding_window=16), "last"),
    "gemma3 both ways": (
        lambda folder: make_causal(
            folder, "Gemma3Text", "Model", sliding_window=16, use_bidirectional_attention=True
        ),
        "mean",
    ),
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_and_causal(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write, pooling = SPECIAL[name]
    write(tmp_path)
    compare(tmp_path, dtype, pooling, routed=name == "nomic moe")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, "Qwen3"])
def test_scores(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Classes, and a reranker's sigmoid."""
    for labels in (1, 3):
        folder = tmp_path / str(labels)
        folder.mkdir()
        if family in FAMILIES:
            make(folder, family, "ForSequenceClassification", num_labels=labels)
        else:
            make_causal(folder, family, "ForSequenceClassification", num_labels=labels)
        with_labels(tame(folder), labels)
        ids = sequences(seed=11, count=12)
        params = EncodeParams(task=EncodeTask.SCORE if labels == 1 else EncodeTask.CLASSIFY)
        expected = encode(on(folder, torch.float32, torch.device("cpu")), ids, params)
        found = encode(on(folder, dtype, DEVICE), ids, params)
        allowed = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
        for ours, theirs in zip(found, expected):
            np.testing.assert_allclose(array(ours), array(theirs), atol=allowed)


@pytest.mark.parametrize("dtype", HALVES[:2], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_token_scores(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make(tmp_path, family, "ForTokenClassification", num_labels=5)
    with_labels(tame(tmp_path), 5)
    params = EncodeParams(task=EncodeTask.TOKEN_CLASSIFY)
    ids = sequences(seed=14, count=12)
    expected = encode(on(tmp_path, torch.float32, torch.device("cpu")), ids, params)
    for ours, theirs in zip(encode(on(tmp_path, dtype, DEVICE), ids, params), expected):
        np.testing.assert_allclose(array(ours), array(theirs), atol=1e-4 if dtype is torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", HALVES[:2], ids=str)
def test_bge_m3(dtype: torch.dtype, tmp_path: Path) -> None:
    m3(tmp_path)
    tame(tmp_path)
    params = EncodeParams(also=(EncodeTask.SPARSE, EncodeTask.EMBED_ALL))
    ids = [[0, *(x if len(x) > 1 else [7, 7]), 2] for x in sequences(seed=23, vocab=30)]
    expected = encode(on(tmp_path, torch.float32, torch.device("cpu")), ids, params)
    for ours, theirs in zip(encode(on(tmp_path, dtype, DEVICE), ids, params), expected):
        for a, b in ((ours, theirs), (ours.also[1], theirs.also[1])):
            assert (unit(array(a)) * unit(array(b))).sum(-1).min() >= 0.999
        dense = np.zeros((2, VOCAB), np.float32)
        for row, output in zip(dense, (ours.also[0], theirs.also[0])):
            row[np.frombuffer(output.indices, "<u4")] = array(output)
        np.testing.assert_allclose(dense[0], dense[1], atol=1e-3 if dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_alone_and_among_300(family: str, tmp_path: Path) -> None:
    make(tmp_path, family)
    add_pooling(tmp_path)
    draw = random.Random(3)
    ids = [[draw.randint(4, VOCAB - 1) for _ in range(draw.randint(1, 80))] for _ in range(300)]
    for dtype, allowed in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
        run = on(tmp_path, dtype, DEVICE)
        together = [array(o) for o in encode(run, ids, EncodeParams(normalize=True))]
        for i in (0, 5, 150, 299):
            (alone,) = encode(run, [ids[i]], EncodeParams(normalize=True))
            np.testing.assert_allclose(array(alone), together[i], atol=allowed)
