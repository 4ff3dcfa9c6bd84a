"""Passes padded to the ladder of graph sizes against passes as they are; without a GPU nothing is captured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from headrace.checkpoints.resolve import open_checkpoint
from headrace.execution import encode_graphs
from headrace.execution.encode_graphs import TOKENS
from headrace.execution.encode_runner import EncodeRunner
from headrace.models.encode_model import load_encode_model
from headrace.types import EncodeParams, EncodeTask
from parity.encoders import FAMILIES, add_pooling, array, encode, make, runner, sequences

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def padded(folder: Path, pooling: str | None = None) -> EncodeRunner:
    dtype = torch.float16 if ON_GPU else torch.float32
    model = load_encode_model(folder, open_checkpoint(folder), dtype=dtype, device=DEVICE, pooling=pooling)
    return EncodeRunner(model, DEVICE, graphs=True)


def near(ours: np.ndarray, expected: np.ndarray) -> None:
    if ON_GPU:
        cosine = (ours * expected).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(expected, axis=-1)
        assert cosine.min() > 0.999
    else:
        np.testing.assert_allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str, tmp_path: Path) -> None:
    if ON_GPU:
        transformers = pytest.importorskip("transformers")
        if not hasattr(transformers, FAMILIES[family][0] + "Config"):
            pytest.skip("this transformers has no such family")
    make(tmp_path, family)
    add_pooling(tmp_path)
    plain, run = runner(tmp_path), padded(tmp_path)
    assert run.graphs is not None
    for count in (1, 2, 9):
        ids = sequences(seed=count, count=count)
        for task in (EncodeTask.EMBED, EncodeTask.EMBED_ALL):
            params = EncodeParams(task=task, normalize=True)
            for ours, expected in zip(encode(run, ids, params), encode(plain, ids, params)):
                near(array(ours), array(expected))


@pytest.mark.parametrize("pooling", ["cls", "last", "mean", "max", "weighted_mean", "mean_sqrt_len"])
def test_every_pooling(pooling: str, tmp_path: Path) -> None:
    make(tmp_path, "bert")
    plain, run = runner(tmp_path, pooling), padded(tmp_path, pooling)
    ids = sequences(seed=4, count=5)
    types = [[int(i > 3) for i in range(len(x))] for x in ids]
    for kinds in (None, types):
        pairs = zip(encode(run, ids, EncodeParams(), kinds), encode(plain, ids, EncodeParams(), kinds))
        for ours, expected in pairs:
            near(array(ours), array(expected))


@pytest.mark.parametrize("total", [TOKENS[0] - 1, TOKENS[0], TOKENS[0] + 1])
def test_sizes_at_the_border(total: int, tmp_path: Path) -> None:
    """Also more sequences than a graph takes."""
    make(tmp_path, "bert")
    add_pooling(tmp_path)
    plain, run = runner(tmp_path), padded(tmp_path)
    assert run.graphs is not None
    for ids in ([[5] * total], [[7]] * total, [[9 + i % 40] for i in range(70)]):
        pairs = list(zip(encode(run, ids, EncodeParams()), encode(plain, ids, EncodeParams())))
        assert len(pairs) == len(ids)
        for ours, expected in pairs:
            near(array(ours), array(expected))


def test_classifiers(tmp_path: Path) -> None:
    make(tmp_path, "roberta", "ForSequenceClassification", num_labels=3)
    plain, run = runner(tmp_path), padded(tmp_path)
    params = EncodeParams(task=EncodeTask.CLASSIFY)
    ids = sequences(seed=6, count=4)
    for ours, expected in zip(encode(run, ids, params), encode(plain, ids, params)):
        near(array(ours), array(expected))


def test_launched_passes_keep_their_results(tmp_path: Path) -> None:
    """Two passes under way at once, of the same graph and of different ones."""
    from headrace.types import Request

    make(tmp_path, "bert")
    add_pooling(tmp_path)
    plain, run = runner(tmp_path), padded(tmp_path)
    batches = [sequences(seed=i, count=1 + i % 3) for i in range(6)]
    launched = [
        run.launch([Request(id=str(i), token_ids=tuple(x), encode=EncodeParams()) for i, x in enumerate(ids)])
        for ids in batches
    ]
    for ids, one in zip(batches, launched):
        for ours, expected in zip(one.finish(), encode(plain, ids, EncodeParams())):
            near(array(ours), array(expected))


def test_causal_classifier(tmp_path: Path) -> None:
    """Where the last real token is looked for on the device."""
    import json

    import transformers

    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=90, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    transformers.LlamaForSequenceClassification(config).eval().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == 0
    plain, run = runner(tmp_path), padded(tmp_path)
    params = EncodeParams(task=EncodeTask.CLASSIFY)
    ids = [[5, 6, 7], [8, 9, 0, 0], [10]]
    for ours, expected in zip(encode(run, ids, params), encode(plain, ids, params)):
        near(array(ours), array(expected))


def test_full_batches_are_graphs_and_half_full_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_graphs, "TOKENS", (16,))
    monkeypatch.setattr(encode_graphs, "LARGE", (48, 96))
    monkeypatch.setattr(encode_graphs, "_LONG", 48)
    monkeypatch.setattr(encode_graphs, "_LARGE_SEQS", 5)
    sizes = [(size.tokens, size.texts) for size in encode_graphs.graph_sizes()]
    assert sizes == [(16, 16), (48, 1), (48, 5), (96, 2), (96, 5)]
    make(tmp_path, "bert")
    add_pooling(tmp_path)
    plain, run = runner(tmp_path), padded(tmp_path)
    graphs = run.graphs
    assert graphs is not None
    for lengths, captured in (
        ([40, 6], (48, 5)),
        ([48], (48, 1)),
        ([30], None),
        ([60, 33], (96, 2)),
        ([90, 6], (96, 2)),
        ([60, 30, 4], (96, 5)),
        ([16] * 6, None),
        ([60, 40], None),
    ):
        graphs._graphs.clear()
        ids = [[5 + i % 80 for i in range(n)] for n in lengths]
        for ours, expected in zip(encode(run, ids, EncodeParams()), encode(plain, ids, EncodeParams())):
            near(array(ours), array(expected))
        assert list(graphs._graphs) == ([] if captured is None else [captured])
