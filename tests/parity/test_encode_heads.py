"""Heads against transformers: classifiers of one and several layers, token classifiers, SPLADE, causal models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace.types import EncodeParams, EncodeTask
from parity.encoders import FAMILIES, VOCAB, array, encode, make, runner, sequences

CLASSIFY = EncodeParams(task=EncodeTask.CLASSIFY)
RAW = EncodeParams(task=EncodeTask.CLASSIFY, raw_scores=True)


def logits_of(model: Any, sequence: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([sequence])).logits[0]  # type: ignore[no-any-return]


def with_labels(folder: Path, count: int, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {str(i): f"L{i}" for i in range(count)}, **fields}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_sequence_classifiers(family: str, tmp_path: Path) -> None:
    model, _ = make(tmp_path, family, "ForSequenceClassification", num_labels=3)
    with_labels(tmp_path, 3)
    run, ids = runner(tmp_path), sequences(seed=11)
    for sequence, raw, output in zip(ids, encode(run, ids, RAW), encode(run, ids, CLASSIFY)):
        theirs = logits_of(model, sequence)
        np.testing.assert_allclose(array(raw), theirs.numpy(), atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(array(output), theirs.softmax(-1).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        (
            "modernbert",
            {"classifier_pooling": "mean", "classifier_bias": True, "classifier_activation": "silu"},
        ),
        ("eurobert", {"classifier_pooling": "bos"}),
        ("eurobert", {"classifier_pooling": "mean"}),
    ],
)
def test_classifier_variants(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model, _ = make(tmp_path, family, "ForSequenceClassification", num_labels=2, **fields)
    with_labels(tmp_path, 2)
    ids = sequences(seed=12)
    for sequence, raw in zip(ids, encode(runner(tmp_path), ids, RAW)):
        np.testing.assert_allclose(array(raw), logits_of(model, sequence).numpy(), atol=1e-4, rtol=1e-4)


def test_multi_label_and_rerank_scores_are_sigmoids(tmp_path: Path) -> None:
    model, _ = make(tmp_path / "m", "bert", "ForSequenceClassification", num_labels=3)
    with_labels(tmp_path / "m", 3, problem_type="multi_label_classification")
    ids = sequences(seed=13, count=4)
    for sequence, output in zip(ids, encode(runner(tmp_path / "m"), ids, CLASSIFY)):
        np.testing.assert_allclose(array(output), logits_of(model, sequence).sigmoid().numpy(), atol=1e-5)
    model, _ = make(tmp_path / "r", "xlm-roberta", "ForSequenceClassification", num_labels=1)
    with_labels(tmp_path / "r", 1)
    score = EncodeParams(task=EncodeTask.SCORE)
    for sequence, output in zip(ids, encode(runner(tmp_path / "r"), ids, score)):
        np.testing.assert_allclose(array(output), logits_of(model, sequence).sigmoid().numpy(), atol=1e-5)


@pytest.mark.parametrize("labels", [1, 3])
def test_quantities_are_not_squeezed(labels: int, tmp_path: Path) -> None:
    """problem_type regression: what transformers' pipeline gives; as a rerank score still from 0 to 1."""
    model, _ = make(tmp_path, "bert", "ForSequenceClassification", num_labels=labels)
    with_labels(tmp_path, labels, problem_type="regression")
    ids, run = sequences(seed=13, count=4), runner(tmp_path)
    for sequence, output in zip(ids, encode(run, ids, CLASSIFY)):
        np.testing.assert_allclose(array(output), logits_of(model, sequence).numpy(), atol=1e-4)
    if labels == 1:
        for sequence, output in zip(ids, encode(run, ids, EncodeParams(task=EncodeTask.SCORE))):
            np.testing.assert_allclose(array(output), logits_of(model, sequence).sigmoid().numpy(), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_classifiers(family: str, tmp_path: Path) -> None:
    model, _ = make(tmp_path, family, "ForTokenClassification", num_labels=5)
    with_labels(tmp_path, 5)
    params = EncodeParams(task=EncodeTask.TOKEN_CLASSIFY)
    ids = sequences(seed=14)
    for sequence, output in zip(ids, encode(runner(tmp_path), ids, params)):
        theirs = logits_of(model, sequence).softmax(-1).numpy()
        assert output.shape == (len(sequence), 5)
        np.testing.assert_allclose(array(output), theirs, atol=1e-5)


@pytest.mark.parametrize("strategy", ["max", "sum"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "mpnet", "modernbert", "nomic", "gte"])
def test_splade(family: str, strategy: str, tmp_path: Path) -> None:
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    model, _ = make(tmp_path, family, "ForMaskedLM")
    modules = [
        {
            "idx": 0,
            "name": "0",
            "path": "",
            "type": "sentence_transformers.sparse_encoder.models.MLMTransformer",
        },
        {
            "idx": 1,
            "name": "1",
            "path": "1",
            "type": "sentence_transformers.sparse_encoder.models.SpladePooling",
        },
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "config.json").write_text(json.dumps({"pooling_strategy": strategy}))
    ids = sequences(seed=15)
    pooling = SpladePooling(strategy).eval()
    for sequence, output in zip(ids, encode(runner(tmp_path), ids, EncodeParams(task=EncodeTask.SPARSE))):
        logits = logits_of(model, sequence)[None]
        features = {"token_embeddings": logits.clone(), "attention_mask": torch.ones(1, len(sequence))}
        theirs = pooling(features)["sentence_embedding"][0].numpy()
        ours = np.zeros(VOCAB, dtype=np.float32)
        indices = np.frombuffer(output.indices, dtype="<u4")
        ours[indices] = array(output)
        assert list(indices) == sorted(set(indices))
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


CAUSAL: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma3Text": {},
}


def make_causal(folder: Path, stem: str, head: str, **fields: Any) -> Any:
    import transformers

    defaults = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 90,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, f"{stem}Config")(**{**defaults, **CAUSAL[stem], **fields})
    name = stem.removesuffix("Text") if head == "ForSequenceClassification" and stem != "Gemma3Text" else stem
    torch.manual_seed(1)
    model = getattr(transformers, name + head)(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in key and stem != "Gemma3Text" else 0.0, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("stem", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3Text"])
def test_causal_classifiers_look_at_the_last_token_that_is_no_padding(stem: str, tmp_path: Path) -> None:
    model = make_causal(tmp_path, stem, "ForSequenceClassification", num_labels=3)
    with_labels(tmp_path, 3)
    ids = [*sequences(seed=16), [5, 6, 7, 0, 0], [9, 0]]
    for sequence, raw in zip(ids, encode(runner(tmp_path), ids, RAW)):
        np.testing.assert_allclose(array(raw), logits_of(model, sequence).numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stem", ["Llama", "Qwen2", "Qwen3"])
def test_causal_models_label_tokens(stem: str, tmp_path: Path) -> None:
    """As process reward models do."""
    model = make_causal(tmp_path, stem, "ForTokenClassification", num_labels=3)
    with_labels(tmp_path, 3)
    ids = sequences(seed=16, count=4)
    params = EncodeParams(task=EncodeTask.TOKEN_CLASSIFY, raw_scores=True)
    for sequence, raw in zip(ids, encode(runner(tmp_path), ids, params)):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([sequence])).logits[0].numpy()
        np.testing.assert_allclose(array(raw), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stem", ["Llama", "Qwen3", "Gemma3Text"])
@pytest.mark.parametrize("causal", [True, False])
def test_causal_embedders_and_their_bidirectional_forms(stem: str, causal: bool, tmp_path: Path) -> None:
    fields = {"use_bidirectional_attention": not causal, "sliding_window": 16} if stem == "Gemma3Text" else {}
    model = make_causal(tmp_path, stem, "Model", **fields)
    if not causal and stem != "Gemma3Text":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"is_causal": False}))
        for layer in model.layers:
            layer.self_attn.is_causal = False
    ids = sequences(seed=17)
    run = runner(tmp_path, pooling="last" if causal else "mean")
    params = EncodeParams(task=EncodeTask.EMBED_ALL, normalize=False)
    for sequence, output in zip(ids, encode(run, ids, params)):
        mask = None
        if not causal and stem != "Gemma3Text":
            mask = torch.zeros(1, 1, len(sequence), len(sequence))  # nothing hidden
        with torch.no_grad():
            theirs = model(input_ids=torch.tensor([sequence]), attention_mask=mask).last_hidden_state[0]
        np.testing.assert_allclose(array(output), theirs.numpy(), atol=1e-4, rtol=1e-4)


def test_more_labels_than_outputs_are_refused(tmp_path: Path) -> None:
    from headrace.errors import UnsupportedCheckpoint

    make(tmp_path, "bert", "ForSequenceClassification", num_labels=3)
    with_labels(tmp_path, 4)
    with pytest.raises(UnsupportedCheckpoint, match="4 labels"):
        runner(tmp_path)
