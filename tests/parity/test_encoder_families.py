"""Hidden states of every encoder family against transformers, and batch against single."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from headrace.types import EncodeParams, EncodeTask
from parity.encoders import FAMILIES, add_pooling, array, encode, hidden_states, make, runner, sequences


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
