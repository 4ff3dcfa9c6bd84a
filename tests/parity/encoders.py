"""Tiny random encoders of every family, saved as checkpoint folders, and ours beside them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from headrace.checkpoints.resolve import open_checkpoint
from headrace.execution.encode_runner import EncodeRunner
from headrace.models.encode_model import load_encode_model
from headrace.types import EncodeOutput, EncodeParams, EncodeTask, Request

VOCAB = 97

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 90,
    "pad_token_id": 0,
}
# Family -> (transformers class stem, changes of BASE).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {"hidden_act": "gelu_new", "type_vocab_size": 2}),
    "roberta": ("Roberta", {"pad_token_id": 1}),
    "xlm-roberta": ("XLMRoberta", {"pad_token_id": 1, "layer_norm_eps": 1e-5}),
    "distilbert": ("DistilBert", {}),
    "mpnet": ("MPNet", {"pad_token_id": 1}),
    "modernbert": (
        "ModernBert",
        {
            "local_attention": 12,
            "global_attn_every_n_layers": 2,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "cls_token_id": 2,
            "sep_token_id": 3,
        },
    ),
    "nomic": ("NomicBert", {"type_vocab_size": 2}),
    "gte": ("Gte", {"type_vocab_size": 2}),
    "eurobert": ("EuroBert", {"num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3}),
}


def make(
    folder: Path, family: str, head: str = "Model", *, seed: int = 0, **changes: Any
) -> tuple[Any, dict[str, Any]]:
    """Save a random transformers model; returns it and the saved `config.json`."""
    import transformers

    stem, own = FAMILIES[family]
    fields = {**BASE, **own, **changes}
    if family == "distilbert":
        words = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
        words["intermediate_size"] = "hidden_dim"
        fields = {words.get(name, name): value for name, value in fields.items()}
    config = getattr(transformers, f"{stem}Config")(**fields)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{stem}{head}")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Larger matrices make the models chaotic: float32 noise would grow beyond what the tests allow.
            norm = "norm" in name.lower() and name.endswith("weight")
            weight.normal_(1.0 if norm else 0.0, 0.2)
    model.save_pretrained(folder)
    return model, json.loads((folder / "config.json").read_text())


def write_gte(folder: Path, head: str = "Model", *, seed: int = 0, num_labels: int = 0) -> None:
    """A random GTE under the published names, for machines whose transformers does not know the family.

    tests/parity/test_encoder_families.py reads the same folder with one that does.
    """
    prefix = "" if head == "Model" else "gte."
    hidden, inner = BASE["hidden_size"], BASE["intermediate_size"]
    assert isinstance(hidden, int) and isinstance(inner, int)
    embeddings = {"word_embeddings.weight": (VOCAB, hidden), "token_type_embeddings.weight": (2, hidden)}
    embeddings |= {"LayerNorm.weight": (hidden,), "LayerNorm.bias": (hidden,)}
    shapes: dict[str, tuple[int, ...]] = {f"embeddings.{name}": shape for name, shape in embeddings.items()}
    for i in range(3):
        layer = {
            "attention.qkv_proj.weight": (3 * hidden, hidden), "attention.qkv_proj.bias": (3 * hidden,),
            "attention.o_proj.weight": (hidden, hidden), "attention.o_proj.bias": (hidden,),
            "mlp.up_gate_proj.weight": (2 * inner, hidden),
            "mlp.down_proj.weight": (hidden, inner), "mlp.down_proj.bias": (hidden,),
            **{f"{norm}.{leaf}": (hidden,) for norm in ("attn_ln", "mlp_ln") for leaf in ("weight", "bias")},
        }  # fmt: skip
        shapes |= {f"encoder.layer.{i}.{name}": shape for name, shape in layer.items()}
    if head == "ForSequenceClassification":
        shapes |= {"pooler.dense.weight": (hidden, hidden), "pooler.dense.bias": (hidden,)}
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    config = BASE | {"model_type": "gte", "architectures": [f"Gte{head}"], "type_vocab_size": 2}
    config |= {"hidden_act": "gelu", "rope_parameters": {"rope_theta": 160000.0, "rope_type": "default"}}
    if num_labels:
        shapes |= {"classifier.weight": (num_labels, hidden), "classifier.bias": (num_labels,)}
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(num_labels)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        center = (
            1.0 if len(shape) == 1 and ("_ln." in name or "LayerNorm" in name) and "weight" in name else 0.0
        )
        tensors[name] = torch.randn(shape, generator=generator) * 0.2 + center
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def add_pooling(folder: Path, mode: str = "mean", hidden: int = 32, *, normalize: bool = False) -> None:
    """The sentence-transformers files of a checkpoint that pools like this."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    if normalize:
        modules.append(
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
        )
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    config = {"word_embedding_dimension": hidden, "pooling_mode": mode}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


def runner(folder: Path, pooling: str | None = None) -> EncodeRunner:
    """Ours, in float32 on the CPU."""
    model = load_encode_model(
        folder, open_checkpoint(folder), dtype=torch.float32, device="cpu", pooling=pooling
    )
    return EncodeRunner(model, torch.device("cpu"))


def sequences(seed: int, count: int = 7, longest: int = 60, vocab: int = VOCAB) -> list[list[int]]:
    """Random token lists of mixed lengths, some equal, one a single token; ids avoid paddings."""
    draw = random.Random(seed)
    lengths = [1, 2, longest, 17, 17, 17] + [draw.randint(1, longest) for _ in range(count)]
    return [[draw.randint(4, vocab - 1) for _ in range(n)] for n in lengths[:count]]


def encode(
    run: EncodeRunner,
    ids: Sequence[Sequence[int]],
    params: EncodeParams,
    types: Sequence[Sequence[int]] | None = None,
) -> list[EncodeOutput]:
    """All in one batch."""
    requests = [
        Request(id=str(i), token_ids=tuple(x), encode=params, token_types=tuple(types[i]) if types else ())
        for i, x in enumerate(ids)
    ]
    return run.run(requests)


def array(output: EncodeOutput) -> np.ndarray:
    assert not output.error, output.error
    return np.frombuffer(output.data, dtype="<f4").reshape(output.shape)


def hidden_states(run: EncodeRunner, ids: list[list[int]]) -> list[np.ndarray]:
    """Ours, sequence by sequence of one batch."""
    return [array(o) for o in encode(run, ids, EncodeParams(task=EncodeTask.EMBED_ALL, normalize=False))]
