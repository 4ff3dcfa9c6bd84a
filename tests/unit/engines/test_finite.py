"""Weights that are no numbers are found when a model is loaded, not by the first request."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from headrace.config.spec import EngineSpec
from headrace.engines.build import build
from headrace.errors import UnsupportedCheckpoint
from headrace.types import Request, SamplingParams
from support.tiny_folder import write_llama


def spoil(folder: Path, name: str, value: float, at: tuple[int, ...]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name][at] = value
    save_file(tensors, file)


@pytest.mark.parametrize("encodes", [False, True], ids=["generates", "embeds"])
@pytest.mark.parametrize(
    ("tensor", "value", "ours"),
    [
        ("model.layers.1.mlp.down_proj.weight", float("nan"), "layers.1.mlp.down.weight"),
        ("model.layers.0.self_attn.k_proj.weight", float("inf"), "layers.0.attention.qkv.weight"),
        ("model.layers.1.post_attention_layernorm.weight", float("-inf"), "layers.1.mlp_norm.weight"),
        ("model.norm.weight", float("nan"), "norm.weight"),
        ("lm_head.weight", float("nan"), "head.weight"),
    ],
)
def test_broken_weights_are_named(
    tmp_path: Path, tensor: str, value: float, ours: str, encodes: bool
) -> None:
    folder = write_llama(tmp_path / "llama")
    spoil(folder, tensor, value, (7,) if "norm" in tensor else (7, 3))
    spec = EngineSpec(model=str(folder), device="cpu", pooling="mean" if encodes else None)
    if encodes and tensor.startswith("lm_head"):
        build(spec)  # an embedder has no head
        return
    with pytest.raises(UnsupportedCheckpoint, match=f"NaN or infinity in .*{ours}") as caught:
        build(spec)
    assert str(folder) in str(caught.value)


def test_a_tied_embedding_is_a_head(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama", tie_word_embeddings=True)
    spoil(folder, "model.embed_tokens.weight", float("nan"), (40,))
    with pytest.raises(UnsupportedCheckpoint, match=r"infinity in embed\.weight"):
        build(EngineSpec(model=str(folder), device="cpu"))


def test_what_overflows_is_told_so(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama")
    spoil(folder, "model.layers.1.mlp.down_proj.weight", 6e4, (17,))
    build(EngineSpec(model=str(folder), device="cpu"))
    spoil(folder, "model.layers.1.mlp.up_proj.weight", 6e4, (slice(None),))
    with pytest.raises(UnsupportedCheckpoint, match="overflow float16"):
        build(EngineSpec(model=str(folder), device="cpu", dtype="float16"))


def test_an_embedding_of_one_token_breaks_that_token_alone(tmp_path: Path) -> None:
    """Nothing tells before somebody uses it: its requests end in an error, others do not notice."""
    folder = write_llama(tmp_path / "llama")
    spoil(folder, "model.embed_tokens.weight", float("nan"), (40,))
    core, _ = build(EngineSpec(model=str(folder), device="cpu"))
    greedy = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, logprobs=1)
    core.add(
        Request(id=name, token_ids=ids, sampling=greedy)
        for name, ids in {"fine": (5, 6), "broken": (5, 40, 6)}.items()
    )
    ended = {}
    while core.has_work():
        for output in core.step():
            if output.finish_reason is not None:
                ended[output.request_id] = (output.finish_reason, output.error)
    assert ended["fine"] == ("length", "")
    assert ended["broken"][0] == "error"
    assert "not finite" in ended["broken"][1]
