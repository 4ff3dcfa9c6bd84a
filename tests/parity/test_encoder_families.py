"""Hidden states of every encoder family against transformers, and batch against single."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from headrace.engines.encode import EncodeCore
from headrace.errors import UnsupportedCheckpoint
from headrace.execution.encode_runner import EncodeRunner
from headrace.types import EncodeParams, EncodeTask, Request
from parity.encoders import (
    FAMILIES,
    VOCAB,
    add_pooling,
    array,
    encode,
    hidden_states,
    make,
    runner,
    sequences,
    write_gte,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_transformers(family: str, tmp_path: Path) -> None:
    model, _ = make(tmp_path, family)
    add_pooling(tmp_path)
    ids = sequences(seed=1)
    ours = hidden_states(runner(tmp_path), ids)
    for sequence, states in zip(ids, ours):
        with torch.no_grad():
            theirs = model(input_ids=torch.tensor([sequence])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(states, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "gte", "nomic"])
def test_token_types(family: str, tmp_path: Path) -> None:
    model, _ = make(tmp_path, family)
    add_pooling(tmp_path)
    ids = sequences(seed=2, count=4)
    types = [[int(i > len(x) // 2) for i in range(len(x))] for x in ids]
    params = EncodeParams(task=EncodeTask.EMBED_ALL, normalize=False)
    for sequence, kinds, output in zip(ids, types, encode(runner(tmp_path), ids, params, types)):
        with torch.no_grad():
            inputs = {"input_ids": torch.tensor([sequence]), "token_type_ids": torch.tensor([kinds])}
            theirs = model(**inputs).last_hidden_state[0].numpy()
        np.testing.assert_allclose(array(output), theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vector_is_the_same_alone_and_in_a_batch(family: str, tmp_path: Path) -> None:
    make(tmp_path, family)
    add_pooling(tmp_path)
    run = runner(tmp_path)
    ids = sorted(sequences(seed=3, count=40), key=len)
    together = [array(o) for o in encode(run, ids, EncodeParams(normalize=True))]
    for i in (0, 1, 13, 39):
        (alone,) = encode(run, [ids[i]], EncodeParams(normalize=True))
        np.testing.assert_allclose(array(alone), together[i], atol=1e-6)


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForTokenClassification"])
def test_the_folder_of_gte_written_without_transformers(head: str, tmp_path: Path) -> None:
    """It is what tests/gpu compares where transformers has no such class: all of its names must be real ones."""
    labels = 0 if head == "Model" else 3
    write_gte(tmp_path, head, num_labels=labels)
    theirs, report = getattr(transformers, f"Gte{head}").from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids = sequences(seed=4, count=5)
    if head == "Model":
        add_pooling(tmp_path)
        ours = hidden_states(runner(tmp_path), ids)
    else:
        task = EncodeTask.CLASSIFY if "Sequence" in head else EncodeTask.TOKEN_CLASSIFY
        params = EncodeParams(task=task, raw_scores=True)
        ours = [array(output) for output in encode(runner(tmp_path), ids, params)]
    for sequence, found in zip(ids, ours, strict=True):
        with torch.no_grad():
            expected = theirs(input_ids=torch.tensor([sequence]))[0][0].numpy()
        np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("factor", [2.0, 8])
def test_gte_stretched_by_a_fixed_factor(factor: float, tmp_path: Path) -> None:
    """As gte-v1.5 and gte-multilingual publish it: the base times the factor, then all frequencies / f^(2 / dim)."""
    model, config = make(tmp_path, "gte")
    add_pooling(tmp_path)
    published = {
        **{k: v for k, v in config.items() if k != "rope_parameters"},
        "model_type": "new",
        "architectures": ["NewModel"],
        "rope_theta": 20000,
        "rope_scaling": {"type": "ntk", "factor": factor},
    }
    dim = config["hidden_size"] // config["num_attention_heads"]
    plain = 1.0 / (20000 * factor) ** (torch.arange(0, dim, 2).double() / dim)
    model.rotary_emb.inv_freq.copy_(plain / factor ** (2 / dim))
    (tmp_path / "config.json").write_text(json.dumps(published))
    ids = sequences(seed=9, count=5)
    for sequence, states in zip(ids, hidden_states(runner(tmp_path), ids), strict=True):
        with torch.no_grad():
            theirs = model(input_ids=torch.tensor([sequence])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(states, theirs, atol=2e-5, rtol=1e-4)
    for wrong in (
        {"type": "ntk"},
        {"type": "ntk", "factor": 2.0, "mixed_b": 0.6},
        {"type": "dynamic", "factor": 2.0},
    ):
        (tmp_path / "config.json").write_text(json.dumps(published | {"rope_scaling": wrong}))
        with pytest.raises(UnsupportedCheckpoint, match="rope_scaling"):
            runner(tmp_path)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_wrong_token_id_fails_alone(graphs: bool, tmp_path: Path) -> None:
    make(tmp_path, "bert")
    add_pooling(tmp_path)
    run = EncodeRunner(runner(tmp_path).model, torch.device("cpu"), graphs=graphs)
    core = EncodeCore(run, max_tokens=512, max_seqs=32)
    for wrong in (VOCAB, -1, 2**40):
        ids = [*sequences(seed=5, count=6), [5, wrong, 6]]
        core.add([Request(id=str(i), token_ids=tuple(x), encode=EncodeParams()) for i, x in enumerate(ids)])
        found = {output.request_id: output for _ in range(2) if core.has_work() for output in core.step()}
        assert not core.has_work()
        bad = found.pop("6")
        assert (bad.error_code, bad.error_param) == ("invalid_value", "input")
        assert "vocabulary" in bad.error
        assert not any(output.error for output in found.values())
        alone = encode(run, ids[:6], EncodeParams())
        for i in range(6):
            np.testing.assert_allclose(array(found[str(i)]), array(alone[i]), atol=1e-6)
