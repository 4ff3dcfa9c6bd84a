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
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{t}",
            "type": t if "." in t else f"sentence_transformers.models.{t}",
        }
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
        (
            {"config": BERT, "modules": modules("custom_st.Transformer", "Pooling")},
            UnsupportedCheckpoint,
            r"custom_st\.Transformer.*never run.*--pooling",
        ),
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


POOLED = {"modules": FULL, "1_Pooling__config": {"pooling_mode": "mean"}}


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"sentence_roberta_config": {"max_seq_length": 16}}, 16),
        ({"sentence_xlm-roberta_config": {"max_seq_length": 17}}, 17),
        ({"sentence_bert_config": {"max_seq_length": 18}, "tokenizer_config": {"model_max_length": 9}}, 18),
        ({"tokenizer_config": {"model_max_length": 20}}, 20),
        (
            {"sentence_bert_config": {"max_seq_length": None}, "tokenizer_config": {"model_max_length": 20}},
            20,
        ),
        ({"tokenizer_config": {"model_max_length": 10**30}}, None),
        ({"tokenizer_config": {"model_max_length": 1e30}}, None),
    ],
)
def test_the_longest_input_is_the_one_of_sentence_transformers(
    files: dict[str, Any], limit: int | None, tmp_path: Path
) -> None:
    """Its file has been called after six families, and without one the tokenizer's limit counts."""
    assert read_encode_card(folder(tmp_path, config=BERT, **POOLED, **files)).max_tokens == limit


def test_a_generators_tokenizer_limits_nothing(tmp_path: Path) -> None:
    files = {"config": {"architectures": ["Qwen3ForCausalLM"]}, "tokenizer_config": {"model_max_length": 20}}
    assert read_encode_card(folder(tmp_path, **files, **POOLED)).max_tokens is None


@pytest.mark.parametrize("first", ["Normalize", "Dense", "LayerNorm"])
def test_modules_before_pooling_are_refused(first: str, tmp_path: Path) -> None:
    config = {"in_features": 32, "out_features": 32, "dimension": 32, "module_input_name": "token_embeddings"}
    files = {
        "modules": modules("Transformer", first, "Pooling"),
        f"1_{first}__config": config,
        "2_Pooling__config": {"pooling_mode": "mean"},
    }
    with pytest.raises(UnsupportedCheckpoint, match="before Pooling"):
        read_encode_card(folder(tmp_path, config=BERT, **files))


def test_a_checkpoint_that_cuts_its_vectors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="truncate_dim 64"):
        read_encode_card(
            folder(tmp_path, config=BERT, config_sentence_transformers={"truncate_dim": 64}, **POOLED)
        )


def test_only_a_last_normalization_makes_vectors_normalized(tmp_path: Path) -> None:
    dense = {"in_features": 32, "out_features": 8}
    files = {
        "modules": modules("Transformer", "Pooling", "Normalize", "Dense"),
        "1_Pooling__config": {"pooling_mode": "mean"},
        "3_Dense__config": dense,
    }
    card = read_encode_card(folder(tmp_path, config=BERT, **files))
    assert [module.kind for module in card.modules] == ["normalize", "dense"]
    assert not card.normalized


ST = "config_sentence_transformers"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config": {**BERT, "architectures": "BertModel"}}, "names no architecture"),
        ({"config": {**BERT, "matryoshka_dimensions": [64, "x"]}}, r"matryoshka_dimensions \[64, 'x'\]"),
        ({"config": {**BERT, "matryoshka_dimensions": 1e300}}, "matryoshka_dimensions 1e"),
        ({ST: {"prompts": "query"}}, "prompts 'query'; expected a JSON object"),
        ({ST: {"prompts": {"q": "q: "}, "default_prompt_name": ["q"]}}, r"default_prompt_name \['q'\]"),
        ({"2_Dense__config": {"out_features": 3, "bias": True}}, "in_features None; expected a positive integer"),
        ({"2_Dense__config": {"in_features": 4, "out_features": "3"}}, "out_features '3'"),
        ({"3_LayerNorm__config": {"dimension": 0}}, "dimension 0; expected a positive integer"),
        ({"modules": modules("Transformer", "SpladePooling"), "1_SpladePooling__config": {"pooling_strategy": "mean"}},
         "pooling_strategy 'mean'; expected max or sum"),
        ({"modules": modules("Transformer", "SpladePooling"),
          "1_SpladePooling__config": {"activation_function": ["relu"]}}, "expected relu or log1p_relu"),
        ({"modules": modules("Transformer", "LogitScore"), "1_LogitScore__config": {"false_token_id": 3}},
         "true_token_id None; expected the id of a token"),
        ({"modules": modules("Transformer", "LogitScore"),
          "1_LogitScore__config": {"true_token_id": 3, "false_token_id": "no"}}, "false_token_id 'no'"),
    ],
)  # fmt: skip
def test_what_is_no_number_or_word_is_refused_by_key(files: Any, message: str, tmp_path: Path) -> None:
    whole = {
        "config": BERT,
        "1_Pooling__config": {"pooling_mode_cls_token": True},
        "modules": modules("Transformer", "Pooling", "Dense", "LayerNorm"),
        "2_Dense__config": {"in_features": 4, "out_features": 4},
        "3_LayerNorm__config": {"dimension": 4},
    }
    read_encode_card(folder(tmp_path, **whole))
    with pytest.raises(UnsupportedCheckpoint, match=message):
        read_encode_card(folder(tmp_path, **whole | files))
