"""How a checkpoint is read: what the files say is taken, what they do not say is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import HeadraceError, MissingFile, UnsupportedCheckpoint
from headrace.models.encode_card import ModuleSpec, read_encode_card
from headrace.types import EncodeTask


def folder(path: Path, **files: Any) -> Path:
    """Files by name; ``__`` is a slash."""
    for name, value in files.items():
        file = path / (name.replace("__", "/") + ".json")
        file.parent.mkdir(exist_ok=True)
        file.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def modules(*types: str) -> list[dict[str, Any]]:
    return [
        {"idx": i, "name": str(i), "path": "" if i == 0 else f"{i}_{t}", "type": f"st.{t}"}
        for i, t in enumerate(types)
    ]


BERT = {"architectures": ["BertModel"], "model_type": "bert"}
FULL = modules("Transformer", "Pooling", "Normalize")


def test_an_embedder_as_sentence_transformers_saves_it(tmp_path: Path) -> None:
    card = read_encode_card(
        folder(
            tmp_path,
            config={**BERT, "matryoshka_dimensions": [256, 64]},
            modules=FULL,
            **{"1_Pooling__config": {"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}},
            sentence_bert_config={"max_seq_length": 256, "do_lower_case": True},
            config_sentence_transformers={
                "prompts": {"query": "q: ", "none": None},
                "default_prompt_name": "query",
                "similarity_fn_name": "dot",
            },
        )
    )
    assert (card.pooling, card.modules, card.normalized) == (("last",), (ModuleSpec("normalize"),), True)
    assert (card.max_tokens, card.lowercase, card.similarity) == (256, True, "dot")
    assert (card.prompts, card.default_prompt, card.dimensions) == ({"query": "q: "}, "query", (64, 256))


@pytest.mark.parametrize(
    ("files", "kind", "word"),
    [
        ({"config": BERT}, MissingFile, r"modules\.json and 1_Pooling/config\.json.*--pooling"),
        ({"config": BERT, "modules": modules("Transformer")}, MissingFile, "no Pooling module"),
        ({"config": BERT, "modules": FULL}, MissingFile, r"1_Pooling/config\.json is missing"),
        (
            {"config": BERT, "modules": FULL, "1_Pooling__config": {}},
            UnsupportedCheckpoint,
            "no pooling mode",
        ),
        (
            {"config": BERT, "modules": FULL, "1_Pooling__config": {"pooling_mode": "median"}},
            UnsupportedCheckpoint,
            "median",
        ),
        ({"config": BERT, "modules": modules("Transformer", "LSTM")}, UnsupportedCheckpoint, "LSTM"),
        ({"config": BERT, "modules": "{"}, UnsupportedCheckpoint, r"modules\.json is no valid JSON"),
        ({"config": {"model_type": "bert"}}, UnsupportedCheckpoint, "names no architecture"),
        ({"config": {"architectures": ["LlamaForCausalLM"]}}, MissingFile, "generator.*--pooling yes_no"),
        ({"config": {"architectures": ["BertForSequenceClassification"]}}, UnsupportedCheckpoint, "id2label"),
        (
            {"config": {"architectures": ["BertForTokenClassification"], "id2label": {"0": "a", "2": "b"}}},
            UnsupportedCheckpoint,
            r"outputs \[0, 2\]",
        ),
        (
            {
                "config": BERT,
                "modules": FULL,
                "1_Pooling__config": {"pooling_mode": "mean", "include_prompt": False},
            },
            UnsupportedCheckpoint,
            "include_prompt",
        ),
    ],
)
def test_what_is_missing_is_named(files: Any, kind: type[HeadraceError], word: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=word):
        read_encode_card(folder(tmp_path, **files))


def test_an_explicit_pooling_replaces_the_files(tmp_path: Path) -> None:
    folder(tmp_path, config=BERT)
    assert read_encode_card(tmp_path, pooling="mean").pooling == ("mean",)
    assert read_encode_card(tmp_path, pooling="splade").tasks == (EncodeTask.SPARSE,)
    with pytest.raises(UnsupportedCheckpoint, match="did you mean 'mean'"):
        read_encode_card(tmp_path, pooling="meen")


def test_one_label_reranks_and_several_classify(tmp_path: Path) -> None:
    config = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "x"}}
    assert read_encode_card(folder(tmp_path, config=config)).tasks == (EncodeTask.SCORE, EncodeTask.CLASSIFY)
    config["id2label"] = {"1": "b", "0": "a"}
    card = read_encode_card(folder(tmp_path, config=config))
    assert (card.tasks, card.labels) == ((EncodeTask.CLASSIFY,), ("a", "b"))
