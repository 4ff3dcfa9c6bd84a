"""A server with real (tiny random) embedder, classifier, reranker and tagger, and transformers' models of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.config.spec import EngineSpec
from headrace.engines.process import start_in_process
from headrace.llm import AsyncEngine
from headrace.llm.startup import encode_side
from headrace.llm.textkit import load_text
from headrace.serving.state import Model
from parity.test_entity_spans import backend, make_tagger
from support.serving import LiveServer, live

TEXTS = ["Apple buys a startup", "", "Tim Cook in Berlin says $1 billion"]


def save_tokenizer(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    names: dict[str, Any] = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=backend("wordpiece"), **names).save_pretrained(folder)


def make_bert(folder: Path, head: str, **fields: Any) -> Any:
    """A random Bert of this head with the small tokenizer; returns transformers' model."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        **fields,
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"Bert{head}")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    saved = json.loads((folder / "config.json").read_text())
    if "id2label" in fields:
        saved["id2label"] = fields["id2label"]
    (folder / "config.json").write_text(json.dumps(saved))
    return model


def make_embedder(folder: Path) -> Any:
    from parity.encoders import add_pooling

    model = make_bert(folder, "Model")
    add_pooling(folder, "mean")
    settings = {"prompts": {"query": "Tim Cook "}, "similarity_fn_name": "cosine"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return model


MAKERS: dict[str, Any] = {
    "embedder": make_embedder,
    "classifier": lambda f: make_bert(
        f, "ForSequenceClassification", num_labels=3, id2label={0: "a", 1: "b", 2: "c"}
    ),
    "reranker": lambda f: make_bert(f, "ForSequenceClassification", num_labels=1, id2label={0: "score"}),
    "tagger": lambda f: make_tagger(f, "wordpiece"),
}


async def start_engine(spec: EngineSpec) -> AsyncEngine:
    client = await start_in_process(spec)
    text = load_text(spec)
    encode_text, template = encode_side(client, text)
    return AsyncEngine(client, text, encode_text=encode_text, rerank_template=template)


class Served:
    """A server with one of each, and transformers' models."""

    def __init__(self, server: LiveServer, theirs: dict[str, Any], folders: dict[str, Path]) -> None:
        self.server, self.theirs, self.folders = server, theirs, folders
        self.post = server.post

    def ok(self, path: str, body: Any, **headers: str) -> Any:
        status, reply, _ = self.post(path, body, **headers)
        assert status == 200, reply
        return reply


def serve_one_pass(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    theirs, folders, models = {}, {}, []
    for name, make in MAKERS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        theirs[name] = make(folders[name])
        cut = False if name == "embedder" else None
        spec = EngineSpec(model=name, path=folders[name], num_threads=1, auto_truncate=cut)
        models.append(Model(spec))
    with live(*models, max_inputs=64) as server:
        for model in models:
            model.loaded = server.call(start_engine(model.spec))
        yield Served(server, theirs, folders)
