"""tokenizer_config.json against tokenizer.json: where they differ, texts are the tokens that transformers makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from headrace.text.tokenizer import Tokenizer

ROLES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
WORDS = [*ROLES.values(), "hello", "Hello", "cafe", "café", "Café", "Cafe", "中", "国", "中国"]
TEXT = "Hello Café café 中国"
SETTINGS: list[dict[str, Any]] = [
    {},
    {"do_lower_case": True},
    {"do_lower_case": False},
    {"strip_accents": True},
    {"strip_accents": False},
    {"do_lower_case": False, "strip_accents": True},
    {"tokenize_chinese_chars": False},
]


def write(
    folder: Path, lower: bool, accents: bool | None, settings: dict[str, Any], name: str | None
) -> None:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=accents)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    backend.save(str(folder / "tokenizer.json"))
    chosen = {} if name is None else {"tokenizer_class": name}
    (folder / "tokenizer_config.json").write_text(json.dumps({**ROLES, **settings, **chosen}))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))


@pytest.mark.parametrize(
    "name",
    [
        None,
        "BertTokenizer",
        "BertTokenizerFast",
        "DistilBertTokenizer",
        "MPNetTokenizer",
        "PreTrainedTokenizerFast",
    ],
)
@pytest.mark.parametrize("lower", [False, True])
def test_letters_are_read_as_transformers_reads_them(name: str | None, lower: bool, tmp_path: Path) -> None:
    for i, settings in enumerate(SETTINGS):
        for accents in (None, False):
            folder = tmp_path / f"{i}{accents}"
            folder.mkdir()
            write(folder, lower, accents, settings, name)
            theirs = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
            assert Tokenizer.from_path(folder).encode(TEXT) == theirs, (settings, accents)
