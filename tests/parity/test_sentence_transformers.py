"""Vectors against sentence-transformers: pooling modes, dense modules, and the packaged real model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from headrace.errors import UnsupportedCheckpoint
from headrace.types import EncodeParams
from parity.encoders import add_pooling, array, encode, make, runner, sequences

MODES = ["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ["mean", "cls", "max"]]


def st_pool(states: torch.Tensor, mode: str | list[str]) -> np.ndarray:
    """sentence-transformers' own Pooling module on one sequence [1, n, D]."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    mask = torch.ones(states.shape[:2], dtype=torch.int64)
    pooling = Pooling(states.shape[-1], pooling_mode=mode)
    return pooling({"token_embeddings": states, "attention_mask": mask})["sentence_embedding"][0].numpy()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_pooling_modes(mode: str | list[str], tmp_path: Path) -> None:
    model, _ = make(tmp_path, "bert")
    add_pooling(tmp_path, mode)  # type: ignore[arg-type]
    ids = sequences(seed=5)
    for sequence, output in zip(ids, encode(runner(tmp_path), ids, EncodeParams(normalize=False))):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([sequence])).last_hidden_state
        np.testing.assert_allclose(array(output), st_pool(states, mode), atol=1e-4, rtol=1e-4)


def test_dense_modules_and_matryoshka(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling

    model, _ = make(tmp_path / "base", "bert")
    torch.manual_seed(3)
    parts = [
        Dense(32, 24),
        LayerNorm(24),
        Dense(24, 16, activation_function=torch.nn.GELU(), use_residual=True),
    ]
    with torch.no_grad():
        for part in parts:
            for weight in part.parameters():
                weight.normal_(0.5, 0.5)
    modules = SentenceTransformer(modules=[Pooling(32, "mean"), *parts, Normalize()], device="cpu")
    modules.save_pretrained(str(tmp_path / "base"), create_model_card=False)
    listed = json.loads((tmp_path / "base" / "modules.json").read_text())
    # The first module is ours: the tiny transformer has no tokenizer that sentence-transformers could save.
    listed.insert(0, {"idx": 0, "name": "t", "path": "", "type": "sentence_transformers.models.Transformer"})
    (tmp_path / "base" / "modules.json").write_text(json.dumps(listed))
    make(tmp_path / "base", "bert")
    ids = sequences(seed=6)
    run = runner(tmp_path / "base")
    assert run.dimensions == 16
    for sequence, output, cut in zip(
        ids, encode(run, ids, EncodeParams()), encode(run, ids, EncodeParams(dimensions=5))
    ):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([sequence])).last_hidden_state
            mask = torch.ones(states.shape[:2], dtype=torch.int64)
            theirs = modules({"token_embeddings": states, "attention_mask": mask})["sentence_embedding"][0]
        np.testing.assert_allclose(array(output), theirs.numpy(), atol=1e-5)
        short = theirs.numpy()[:5] / np.linalg.norm(theirs.numpy()[:5])
        np.testing.assert_allclose(array(cut), short, atol=1e-5)


@pytest.mark.parametrize("order", ["nd", "dn", "ndn", "dnd", "nln"])
def test_modules_act_in_their_order(order: str, tmp_path: Path) -> None:
    """Normalization (n), Dense (d) and LayerNorm (l) in any order: only a last one is the request's to switch."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling

    make(tmp_path, "bert")
    torch.manual_seed(4)
    kinds = {"n": Normalize, "d": lambda: Dense(32, 32), "l": lambda: LayerNorm(32)}
    parts = [kinds[letter]() for letter in order]
    modules = SentenceTransformer(modules=[Pooling(32, "mean"), *parts], device="cpu")
    with torch.no_grad():
        for weight in modules.parameters():
            weight.normal_(0.3, 0.5)
    modules.save_pretrained(str(tmp_path), create_model_card=False)
    listed = json.loads((tmp_path / "modules.json").read_text())
    listed.insert(0, {"idx": 0, "name": "t", "path": "", "type": "sentence_transformers.models.Transformer"})
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    model, _ = make(tmp_path, "bert")
    ids = sequences(seed=9)
    for sequence, output in zip(ids, encode(runner(tmp_path), ids, EncodeParams())):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([sequence])).last_hidden_state
            mask = torch.ones(states.shape[:2], dtype=torch.int64)
            theirs = modules({"token_embeddings": states, "attention_mask": mask})["sentence_embedding"][0]
        np.testing.assert_allclose(array(output), theirs.numpy(), atol=2e-5, rtol=1e-4)


def test_modules_that_do_not_fit_are_refused_at_the_start(tmp_path: Path) -> None:
    make(tmp_path, "bert")
    add_pooling(tmp_path, "mean")
    listed = json.loads((tmp_path / "modules.json").read_text())
    listed.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense" / "config.json").write_text(json.dumps({"in_features": 20, "out_features": 8}))
    with pytest.raises(UnsupportedCheckpoint, match=r"2_Dense.*20.*32"):
        runner(tmp_path)


@pytest.mark.models
def test_the_packaged_model_equals_sentence_transformers(minilm_path: Path) -> None:
    folder = minilm_path
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

    words = [
        "a",
        "river",
        "runs",
        "through",
        "7",
        "towns,",
        "Größe",
        "und",
        "東京",
        "🙂",
        "don't",
        "e.g.",
        "x",
    ]
    texts = ["", "?", *(" ".join(words[: 1 + i % 13] * (1 + i // 7)) for i in range(60))]
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    ours = np.stack([array(output) for output in encode(runner(folder), ids, EncodeParams())])
    assert (ours * theirs).sum(1).min() >= 0.9999
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.models
def test_the_packaged_models_vectors_are_the_same_alone_and_among_300(minilm_path: Path) -> None:
    draw = random.Random(7)
    ids = [
        [101, *(draw.randrange(1000, 30000) for _ in range(draw.choice((1, 3, 8, 20, 80)))), 102]
        for _ in range(300)
    ]
    run = runner(minilm_path)
    together = [array(output) for output in encode(run, sorted(ids, key=len), EncodeParams())]
    for place in (0, 1, 77, 150, 298, 299):
        (alone,) = encode(run, [sorted(ids, key=len)[place]], EncodeParams())
        np.testing.assert_allclose(array(alone), together[place], atol=1e-6)


@pytest.mark.models
def test_the_packaged_model_in_bfloat16_keeps_its_directions(minilm_path: Path) -> None:
    from headrace.checkpoints.resolve import open_checkpoint
    from headrace.execution.encode_runner import EncodeRunner
    from headrace.models.encode_model import load_encode_model

    draw = random.Random(8)
    ids = [[101, *(draw.randrange(1000, 30000) for _ in range(n)), 102] for n in (2, 9, 30, 100)]
    exact = np.stack([array(output) for output in encode(runner(minilm_path), ids, EncodeParams())])
    checkpoint = open_checkpoint(minilm_path)
    model = load_encode_model(minilm_path, checkpoint, dtype=torch.bfloat16, device="cpu")
    low = np.stack(
        [array(output) for output in encode(EncodeRunner(model, torch.device("cpu")), ids, EncodeParams())]
    )
    assert (exact * low).sum(1).min() > 0.999
