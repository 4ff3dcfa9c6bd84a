"""Entities against transformers' token classification pipeline: random models, three kinds of tokenizer."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from headrace.models.encode_card import read_encode_card
from headrace.text.encoding import EncodeText
from headrace.text.spans import STRATEGIES, Strategy, entities
from headrace.text.tokenizer import Tokenizer
from headrace.types import EncodeParams, EncodeTask, Request
from parity.encoders import array, runner

WORDS = [
    "Apple",
    "buys",
    "a",
    "U.K.",
    "startup",
    "for",
    "$1",
    "billion,",
    "says",
    "Tim",
    "Cook",
    "in",
    "Berlin.",
    "Größe",
    "München",
    "naïve",
    "l'été",
    "x-ray",
]
LABELS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "LOC"]


def backend(kind: str) -> Backend:
    """A small tokenizer trained on the words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer: Any
    if kind == "wordpiece":
        made = Backend(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special)
    elif kind == "bytes":
        made = Backend(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special)
    else:
        made = Backend(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="[UNK]")
    made.train_from_iterator(WORDS * 5, trainer)
    ends = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return made


def make_tagger(folder: Path, kind: str) -> Any:
    """A random BertForTokenClassification with its tokenizer, saved; the pipeline over it."""
    from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast, pipeline

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend(kind),
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "attention_mask"],
    )
    config = BertConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    torch.manual_seed(0)
    model = BertForTokenClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight.normal_(0, 0.6)
        model.bert.embeddings.word_embeddings.weight.normal_(0, 1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return pipeline("token-classification", model=model, tokenizer=tokenizer, device="cpu")


def texts() -> list[str]:
    draw = random.Random(4)
    made = ["", " ", "Apple", "🙂 Apple qqq zz"]
    for _ in range(25):
        made.append(draw.choice(["", " "]) + " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 12))))
    return made


@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "unigram"])
def test_entities_equal_the_pipeline(kind: str, tmp_path: Path) -> None:
    theirs = make_tagger(tmp_path, kind)
    run = runner(tmp_path)
    tokenizer = Tokenizer.from_path(tmp_path)
    text = EncodeText(tokenizer, read_encode_card(tmp_path), run.max_tokens)
    params = EncodeParams(task=EncodeTask.TOKEN_CLASSIFY)
    count = 0
    for sentence in texts():
        if not sentence:
            continue  # the pipeline refuses empty texts
        (encoded,) = text.texts([sentence], details=True)
        (output,) = run.run([Request(id="x", token_ids=encoded.ids, encode=params)])
        for strategy in STRATEGIES:
            ours = entities(
                sentence,
                encoded,
                array(output),
                LABELS,
                strategy,
                joined_words=text.joined_words,
                unknown=text.unknown_id,
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = theirs(sentence, aggregation_strategy=strategy)
            found = [(e.label, e.start, e.end) for e in ours]
            key = "entity" if strategy == "none" else "entity_group"
            assert found == [(e[key], e["start"], e["end"]) for e in expected], (sentence, strategy)
            np.testing.assert_allclose([e.score for e in ours], [e["score"] for e in expected], atol=1e-5)
            count += len(found)
    assert count > 200


def test_words_of_several_pieces_take_one_label() -> None:
    """By hand: micro|soft is one word whose pieces disagree."""
    from headrace.text.encoding import Encoded

    encoded = Encoded((1, 2, 3), (), ((0, 5), (5, 9), (10, 13)), (False,) * 3, ("micro", "##soft", "now"))
    scores = np.array([[0.1, 0.5, 0.4], [0.05, 0.05, 0.9], [0.9, 0.05, 0.05]], dtype=np.float32)
    labels = ["O", "B-ORG", "B-PER"]
    expected: dict[Strategy, list[tuple[str, int, int]]] = {
        "none": [("B-ORG", 0, 5), ("B-PER", 5, 9)],
        "simple": [("ORG", 0, 5), ("PER", 5, 9)],
        "first": [("ORG", 0, 9)],
        "max": [("PER", 0, 9)],
        "average": [("PER", 0, 9)],
    }
    for strategy, spans in expected.items():
        found = entities("microsoft now", encoded, scores, labels, strategy, joined_words=True)
        assert [(e.label, e.start, e.end) for e in found] == spans, json.dumps(strategy)
