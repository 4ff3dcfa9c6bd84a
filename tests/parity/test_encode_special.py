"""Families and heads that installed transformers lacks: plain references written from the papers.

Jina v2 (Günther et al. 2023) and Nomic's mixture of experts (Nussbaum and Duderstadt 2025) exist only as code in
their repositories; BGE-M3's heads (Chen et al. 2024) in another package. The references below are independent of
the code under test, and of theirs: loops over one sequence, float64.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from headrace.errors import UnsupportedCheckpoint
from headrace.types import EncodeParams, EncodeTask
from parity.encoders import VOCAB, add_pooling, array, encode, hidden_states, make, runner, sequences
from parity.test_encode_heads import make_causal

D, H, I, LAYERS, E = 24, 6, 40, 4, 4  # six heads: no power of two


def draw(names: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in names.items():
        center = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
        tensors[name] = torch.randn(shape, generator=generator) * 0.25 + center
    return tensors


def norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], 1e-12)


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    out = x @ w[name + ".weight"].T
    return out + w[name + ".bias"] if name + ".bias" in w else out


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """q, k, v [n, D]; bias [H, n, n]."""
    n = q.shape[0]
    q, k, v = (x.view(n, H, D // H).transpose(0, 1) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(D // H)
    out = (scores if bias is None else scores + bias).softmax(-1) @ v
    return out.transpose(0, 1).reshape(n, D)


def save(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    add_pooling(folder, hidden=D)
    return {name: tensor.double() for name, tensor in tensors.items()}


def jina(folder: Path) -> dict[str, Tensor]:
    names: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (VOCAB, D),
        "embeddings.token_type_embeddings.weight": (2, D),
        "embeddings.LayerNorm.weight": (D,),
        "embeddings.LayerNorm.bias": (D,),
    }
    for i in range(2):
        layer = f"encoder.layer.{i}."
        for name in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
        ):
            names |= {f"{layer}{name}.weight": (D, D), f"{layer}{name}.bias": (D,)}
        for name in ("attention.output.LayerNorm", "mlp.layernorm"):
            names |= {f"{layer}{name}.weight": (D,), f"{layer}{name}.bias": (D,)}
        names |= {f"{layer}mlp.gated_layers.weight": (2 * I, D), f"{layer}mlp.wo.weight": (D, I)}
        names |= {f"{layer}mlp.wo.bias": (D,)}
    config = {
        "architectures": ["JinaBertModel"],
        "model_type": "bert",
        "position_embedding_type": "alibi",
        "feed_forward_type": "geglu",
        "emb_pooler": "mean",
        "hidden_act": "gelu",
        "vocab_size": VOCAB,
        "hidden_size": D,
        "num_hidden_layers": 2,
        "num_attention_heads": H,
        "intermediate_size": I,
        "max_position_embeddings": 1200,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    }
    return save(folder, config, draw(names, 1))


def jina_reference(w: dict[str, Tensor], ids: list[int]) -> Tensor:
    n = len(ids)
    # 8 / 4 for the four heads of the power of two below six, then every other slope of eight heads.
    slopes = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    distance = (torch.arange(n)[:, None] - torch.arange(n)[None, :]).abs().double()
    bias = -torch.tensor(slopes, dtype=torch.float64)[:, None, None] * distance
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(w, "embeddings.LayerNorm", x)
    for i in range(2):
        layer = f"encoder.layer.{i}."
        q, k, v = (linear(w, f"{layer}attention.self.{name}", x) for name in ("query", "key", "value"))
        x = norm(
            w,
            layer + "attention.output.LayerNorm",
            x + linear(w, layer + "attention.output.dense", attend(q, k, v, bias)),
        )
        gated = linear(w, layer + "mlp.gated_layers", x)
        x = norm(
            w, layer + "mlp.layernorm", x + linear(w, layer + "mlp.wo", F.gelu(gated[:, :I]) * gated[:, I:])
        )
    return x


def test_jina(tmp_path: Path) -> None:
    weights = jina(tmp_path)
    ids = [*sequences(seed=21), [5 + i % 50 for i in range(700)]]  # longer than one piece of queries
    for sequence, states in zip(ids, hidden_states(runner(tmp_path), ids)):
        np.testing.assert_allclose(states, jina_reference(weights, sequence).numpy(), atol=2e-5, rtol=1e-4)


def test_jina_with_normed_queries_is_refused(tmp_path: Path) -> None:
    jina(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "jinaai/jina-bert-v2-qk-post-norm--modeling_bert.JinaBertModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedCheckpoint, match="qk-post-norm"):
        runner(tmp_path)


def nomic(folder: Path, every: int) -> dict[str, Tensor]:
    moe = every > 0
    names: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (VOCAB, D),
        "embeddings.token_type_embeddings.weight": (1, D),
        "emb_ln.weight": (D,),
        "emb_ln.bias": (D,),
    }
    for i in range(LAYERS):
        layer = f"encoder.layers.{i}."
        names |= {f"{layer}attn.Wqkv.weight": (3 * D, D), f"{layer}attn.out_proj.weight": (D, D)}
        names |= {f"{layer}norm{j}.{leaf}": (D,) for j in (1, 2) for leaf in ("weight", "bias")}
        if moe:
            names |= {f"{layer}attn.Wqkv.bias": (3 * D,), f"{layer}attn.out_proj.bias": (D,)}
        if moe and i % every == 1:
            names |= {
                f"{layer}mlp.router.layer.weight": (E, D),
                f"{layer}mlp.experts.mlp.w1": (E * I, D),
                f"{layer}mlp.experts.mlp.w2": (E * I, D),
                f"{layer}mlp.experts.bias": (D,),
            }
        elif moe:
            names |= {f"{layer}mlp.fc1.weight": (I, D), f"{layer}mlp.fc1.bias": (I,)}
            names |= {f"{layer}mlp.fc2.weight": (D, I), f"{layer}mlp.fc2.bias": (D,)}
        else:
            names |= {f"{layer}mlp.fc11.weight": (I, D), f"{layer}mlp.fc12.weight": (I, D)}
            names |= {f"{layer}mlp.fc2.weight": (D, I)}
    config = {
        "architectures": ["NomicBertModel"],
        "model_type": "nomic_bert",
        "activation_function": "gelu" if moe else "swiglu",
        "vocab_size": VOCAB,
        "n_embd": D,
        "n_head": H,
        "n_layer": LAYERS,
        "n_inner": I,
        "n_positions": 512,
        "type_vocab_size": 1,
        "layer_norm_epsilon": 1e-12,
        "rotary_emb_base": 10000 if moe else 1000,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_scaling_factor": None,
        "prenorm": False,
        "parallel_block": False,
        "qkv_proj_bias": moe,
        "mlp_fc1_bias": moe,
        "mlp_fc2_bias": moe,
        "use_rms_norm": False,
        "causal": False,
        **(
            {
                "moe_every_n_layers": every,
                "num_experts": E,
                "moe_top_k": 2,
                "moe_normalize_expert_weights": False,
            }
            if moe
            else {}
        ),
    }
    return save(folder, config, draw(names, 2))


def rotate(x: Tensor, base: float) -> Tensor:
    n, size = x.shape[0], D // H
    angles = torch.arange(n).double()[:, None] * base ** (-torch.arange(0, size, 2).double() / size)
    heads = x.view(n, H, size)
    a, b = heads[..., : size // 2], heads[..., size // 2 :]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).reshape(n, D)


def nomic_reference(w: dict[str, Tensor], ids: list[int], every: int) -> Tensor:
    base = 10000.0 if every else 1000.0
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(w, "emb_ln", x)
    for i in range(LAYERS):
        layer = f"encoder.layers.{i}."
        q, k, v = linear(w, layer + "attn.Wqkv", x).chunk(3, -1)
        x = norm(
            w,
            layer + "norm1",
            x + linear(w, layer + "attn.out_proj", attend(rotate(q, base), rotate(k, base), v, None)),
        )
        if every and i % every == 1:
            rows = []
            for row in x:
                p = (w[layer + "mlp.router.layer.weight"] @ row).softmax(0)
                total = w[layer + "mlp.experts.bias"].clone()
                for expert in p.argsort(descending=True)[:2].tolist():
                    up = w[layer + "mlp.experts.mlp.w1"][expert * I : (expert + 1) * I]
                    down = w[layer + "mlp.experts.mlp.w2"][expert * I : (expert + 1) * I]
                    total += p[expert] * (F.gelu(up @ row) @ down)
                rows.append(total)
            y = torch.stack(rows)
        elif every:
            y = linear(w, layer + "mlp.fc2", F.gelu(linear(w, layer + "mlp.fc1", x)))
        else:
            y = linear(
                w,
                layer + "mlp.fc2",
                linear(w, layer + "mlp.fc11", x) * F.silu(linear(w, layer + "mlp.fc12", x)),
            )
        x = norm(w, layer + "norm2", x + y)
    return x


@pytest.mark.parametrize("every", [0, 2])
def test_nomic_as_its_authors_store_it(every: int, tmp_path: Path) -> None:
    weights = nomic(tmp_path, every)
    ids = sequences(seed=22)
    for sequence, states in zip(ids, hidden_states(runner(tmp_path), ids)):
        theirs = nomic_reference(weights, sequence, every).numpy()
        np.testing.assert_allclose(states, theirs, atol=2e-5, rtol=1e-4)


def m3(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    model, _ = make(folder, "xlm-roberta")
    tensors = draw(
        {"sparse_linear": (1, 32), "sparse_bias": (1,), "colbert_linear": (32, 32), "colbert_bias": (32,)}, 3
    )
    for stem in ("sparse", "colbert"):
        file = folder / f"{stem}_linear.safetensors"
        save_file({"weight": tensors[f"{stem}_linear"], "bias": tensors[f"{stem}_bias"]}, file)
    add_pooling(folder, "cls", normalize=True)
    return model, tensors


def test_bge_m3_gives_dense_sparse_and_token_vectors_in_one_pass(tmp_path: Path) -> None:
    model, heads = m3(tmp_path)
    run = runner(tmp_path)
    params = EncodeParams(also=(EncodeTask.SPARSE, EncodeTask.EMBED_ALL))
    passes = []
    hidden = run.model.hidden
    run.model.hidden = lambda batch: passes.append(1) or hidden(batch)  # type: ignore[func-returns-value,method-assign,assignment]
    ids = [[0, *(x if len(x) > 1 else [7, 7]), 2] for x in sequences(seed=23, vocab=30)]
    outputs = encode(run, ids, params)
    assert len(passes) == 1
    for sequence, output in zip(ids, outputs):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([sequence])).last_hidden_state[0]
        np.testing.assert_allclose(array(output), F.normalize(states[0], dim=0).numpy(), atol=1e-5)
        sparse, vectors = output.also
        weights = F.relu(states @ heads["sparse_linear"].T + heads["sparse_bias"]).squeeze(1)
        expected: dict[int, float] = {}
        for token, weight in zip(sequence, weights.tolist()):
            if token not in (0, 1, 2, 3) and weight > 0:
                expected[token] = max(weight, expected.get(token, 0.0))
        found = dict(zip(np.frombuffer(sparse.indices, "<u4").tolist(), array(sparse).tolist()))
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, abs=1e-4)
        theirs = F.normalize(states[1:] @ heads["colbert_linear"].T + heads["colbert_bias"], dim=-1)
        np.testing.assert_allclose(array(vectors), theirs.numpy(), atol=1e-5)


def test_bge_m3_pickles_are_refused_but_dense_vectors_are_served(tmp_path: Path) -> None:
    m3(tmp_path)
    for stem in ("sparse_linear", "colbert_linear"):
        (tmp_path / f"{stem}.safetensors").rename(tmp_path / f"{stem}.pt")
    with pytest.raises(UnsupportedCheckpoint, match="pickle"):
        runner(tmp_path, pooling="m3")
    assert runner(tmp_path).tasks == {EncodeTask.EMBED, EncodeTask.EMBED_ALL}


@pytest.mark.parametrize("form", ["stanford", "pylate"])
def test_colbert(form: str, tmp_path: Path) -> None:
    model, config = make(tmp_path, "bert")
    weight = torch.randn(12, 32, generator=torch.Generator().manual_seed(5))
    if form == "stanford":
        from safetensors.torch import load_file

        tensors = {f"bert.{k}": v for k, v in load_file(tmp_path / "model.safetensors").items()}
        save_file({**tensors, "linear.weight": weight}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["HF_ColBERT"]}))
    else:
        modules = [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Dense", "type": "pylate.models.Dense.Dense"},
        ]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        (tmp_path / "1_Dense").mkdir()
        dense = {"in_features": 32, "out_features": 12, "bias": False}
        dense["activation_function"] = "torch.nn.modules.linear.Identity"  # type: ignore[assignment]
        (tmp_path / "1_Dense" / "config.json").write_text(json.dumps(dense))
        save_file({"linear.weight": weight}, tmp_path / "1_Dense" / "model.safetensors")
    ids = sequences(seed=24)
    run = runner(tmp_path, pooling="colbert" if form == "stanford" else None)
    for sequence, output in zip(ids, encode(run, ids, EncodeParams(task=EncodeTask.EMBED_ALL))):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([sequence])).last_hidden_state[0]
        theirs = F.normalize(states @ weight.T, dim=-1)
        np.testing.assert_allclose(array(output), theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize("no", [11, None])
def test_yes_no_logits_of_a_generator(no: int | None, tmp_path: Path) -> None:
    model = make_causal(tmp_path, "Qwen3", "ForCausalLM", tie_word_embeddings=True)
    modules = [
        {
            "idx": 0,
            "name": "0",
            "path": "",
            "type": "sentence_transformers.base.modules.transformer.Transformer",
        },
        {
            "idx": 1,
            "name": "1",
            "path": "1_LogitScore",
            "type": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
        },
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_LogitScore").mkdir()
    answers = {"true_token_id": 9, "false_token_id": no}
    (tmp_path / "1_LogitScore" / "config.json").write_text(json.dumps(answers))
    ids = sequences(seed=25)
    params = EncodeParams(task=EncodeTask.SCORE, raw_scores=True)
    for sequence, output in zip(ids, encode(runner(tmp_path), ids, params)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sequence])).logits[0, -1]
        expected = logits[9] - (logits[no] if no is not None else 0)
        np.testing.assert_allclose(array(output), [expected.item()], atol=1e-4)
