"""Whole tiny encoders over the Triton kernels (interpreted where there is no GPU) against the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import triton_device
from headrace.execution.encode_runner import EncodeRunner
from headrace.kernels import dispatch
from headrace.types import EncodeParams, EncodeTask
from parity.encoders import add_pooling, array, encode, make, runner


@pytest.fixture
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Calls of the patch's `use` send CPU tensors to Triton's kernels from then on."""
    yield monkeypatch
    monkeypatch.undo()
    dispatch.kernel.cache_clear()


def use_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_FILES", {"cpu": "triton"})
    dispatch.kernel.cache_clear()
    for operation, function in (("attention", "attention"), ("norm", "layer_norm"), ("dense", "dense")):
        assert dispatch.kernel(operation, function, "cpu").__module__.endswith(".triton")


@pytest.mark.skipif(triton_device.ON_GPU, reason="tests/gpu compares real shapes there")
@pytest.mark.parametrize("family", ["bert", "modernbert", "mpnet", "eurobert", "nomic"])
def test_families(family: str, tmp_path: Path, triton_kernels: pytest.MonkeyPatch) -> None:
    make(tmp_path, family)
    add_pooling(tmp_path)
    ids = [[5] * 3, [8, 9, 10, 11, 12, 13] * 4, [7]]
    params = EncodeParams(normalize=True, also=(EncodeTask.EMBED_ALL,))
    expected = encode(runner(tmp_path), ids, params)
    use_triton(triton_kernels)
    plain = runner(tmp_path)
    padded = EncodeRunner(plain.model, plain.device, graphs=True)
    for run in (plain, padded):
        for ours, theirs in zip(encode(run, ids, params), expected):
            assert not ours.error
            np.testing.assert_allclose(array(ours), array(theirs), atol=1e-5)
            np.testing.assert_allclose(array(ours.also[0]), array(theirs.also[0]), atol=1e-5)


@pytest.mark.skipif(triton_device.ON_GPU, reason="tests/gpu compares real shapes there")
def test_causal_embedder(tmp_path: Path, triton_kernels: pytest.MonkeyPatch) -> None:
    import transformers

    torch.manual_seed(3)
    config = transformers.Qwen3Config(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=48, max_position_embeddings=90,
    )  # fmt: skip
    transformers.Qwen3Model(config).eval().save_pretrained(tmp_path)
    ids = [[5, 6, 7], [8, 9] * 11, [10]]
    expected = encode(runner(tmp_path, "last"), ids, EncodeParams())
    use_triton(triton_kernels)
    for ours, theirs in zip(encode(runner(tmp_path, "last"), ids, EncodeParams()), expected):
        assert not ours.error
        np.testing.assert_allclose(array(ours), array(theirs), atol=1e-5)
