"""Tokenizers from folders and from GGUF metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.errors import MissingFile, UnsupportedCheckpoint
from headrace.text.gguf_vocabulary import _SPLITS, build_tokenizer
from headrace.text.sources import read_sources
from headrace.text.tokenizer import Tokenizer
from support import tiny_tokenizers
from support.gguf_file import decoder_tensors, write_gguf

TEXTS = [
    *tiny_tokenizers.LINES,
    "",
    " ",
    "\n\n\n x",
    "a<|end|>b <|start|>",
    "naïve café ﬁ",
    "x" * 40,
    "\x00\x7f",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": "<|start|>",
                "eos_token": {"content": "<|end|>", "special": True},
                "chat_template": [
                    {"name": "default", "template": "A"},
                    {"name": "tool_use", "template": "B"},
                ],
                "added_tokens_decoder": {
                    "420": {"content": "<think>", "special": False},
                    "421": {"content": "<|extra|>", "special": True},
                },
            }
        )
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    return tmp_path


def test_a_folder(folder: Path) -> None:
    tokenizer = Tokenizer.from_path(folder)
    backend = tiny_tokenizers.byte_level()
    for text in TEXTS:
        assert tokenizer.encode(text) == backend.encode(text).ids
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.special_tokens == {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (0, (1, 5), None)
    think, extra = tokenizer.token_to_id("<think>"), tokenizer.token_to_id("<|extra|>")
    assert think is not None
    assert extra is not None
    assert tokenizer.encode("<think>") == [think]
    assert extra in tokenizer.special_ids
    assert think not in tokenizer.special_ids
    assert tokenizer.vocab_size == max(think, extra) + 1
    assert tokenizer.token_bytes(tokenizer.vocab_size + 7) == b""


def test_template_files_win_over_settings(folder: Path) -> None:
    assert read_sources(folder).templates == {"default": "A", "tool_use": "B"}
    (folder / "chat_template.json").write_text('{"chat_template": "C"}')
    assert read_sources(folder).templates == {"default": "C", "tool_use": "B"}
    (folder / "chat_template.jinja").write_text("D")
    assert read_sources(folder).templates == {"default": "D", "tool_use": "B"}


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    backend = tiny_tokenizers.Tokenizer.from_str(tiny_tokenizers.byte_level().to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    tokenizer = Tokenizer.from_path(tiny_tokenizers.save(backend, tmp_path))
    assert tokenizer.decode(tokenizer.encode("the lazy dog")) == "the lazy dog"


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(MissingFile, match=r"no tokenizer\.json.*vocab\.txt alone is not enough"):
        Tokenizer.from_path(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UnsupportedCheckpoint, match=r"tokenizer\.json"):
        Tokenizer.from_path(tmp_path)


# -- GGUF


def gguf_vocabulary(backend: Any, **extra: Any) -> dict[str, Any]:
    """Metadata as the converter writes it for a byte-level tokenizer."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": tokens,
        "ggml.token_type": [3 if token in tiny_tokenizers.SPECIALS else 1 for token in tokens],
        "ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 1,
        **extra,
    }


def write(path: Path, vocabulary: dict[str, Any]) -> Path:
    tensors = decoder_tensors(np.random.default_rng(0), vocab=len(vocabulary["ggml.tokens"]))
    return write_gguf(path, tensors, tokenizer=vocabulary)


def test_byte_level_from_gguf_is_the_tokenizer_it_came_from(tmp_path: Path) -> None:
    backend = tiny_tokenizers.byte_level()
    vocabulary = gguf_vocabulary(backend, **{"chat_template": "T", "chat_template.tool_use": "U"})
    tokenizer = Tokenizer.from_path(write(tmp_path / "m.gguf", vocabulary))
    for text in TEXTS:
        assert tokenizer.encode(text) == backend.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text), False) == text
    assert tokenizer.special_tokens == {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    assert tokenizer.eos_ids == (1,)
    assert tokenizer.sources.templates == {"default": "T", "tool_use": "U"}
    assert tokenizer.special_ids == {0, 1}


def test_start_and_end_as_the_file_says(tmp_path: Path) -> None:
    flags = {"ggml.add_bos_token": True, "ggml.add_eos_token": True}
    vocabulary = gguf_vocabulary(tiny_tokenizers.byte_level(), **flags)
    tokenizer = Tokenizer.from_path(write(tmp_path / "m.gguf", vocabulary))
    inner = tokenizer.encode("dog", add_special_tokens=False)
    assert tokenizer.encode("dog") == [0, *inner, 1]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_from_gguf_by_scores_alone(tmp_path: Path, prefix: bool) -> None:
    """GGUF has scores instead of merges; tokens trained in order have falling scores."""
    backend = tiny_tokenizers.sentencepiece(prefix=prefix)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    types = [
        3 if t in (*tiny_tokenizers.SPECIALS, "<unk>") else 6 if t.startswith("<0x") else 1 for t in tokens
    ]
    rank = {"".join(pair): number for number, pair in enumerate(model["merges"])}
    vocabulary = {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.scores": [-float(rank.get(token, 1000)) for token in tokens],
        "ggml.unknown_token_id": tokens.index("<unk>"),
        "ggml.add_space_prefix": prefix,
        "ggml.add_bos_token": False,
    }
    tokenizer = Tokenizer.from_path(write(tmp_path / "m.gguf", vocabulary))
    for text in TEXTS:
        assert tokenizer.encode(text) == backend.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == backend.decode(backend.encode(text).ids)


def test_wordpiece_from_gguf(tmp_path: Path) -> None:
    backend = tiny_tokenizers.wordpiece()
    tokens = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    specials = (*tiny_tokenizers.SPECIALS, "[UNK]")
    stored = [t if t in specials else t[2:] if t.startswith("##") else f"▁{t}" for t in tokens]
    vocabulary = {
        "ggml.model": "bert",
        "ggml.tokens": stored,
        "ggml.token_type": [3 if token in specials else 1 for token in tokens],
        "ggml.unknown_token_id": tokens.index("[UNK]"),
        "ggml.cls_token_id": tokens.index("<|start|>"),
        "ggml.seperator_token_id": tokens.index("<|end|>"),
    }
    tokenizer = Tokenizer.from_path(write(tmp_path / "m.gguf", vocabulary))
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == backend.encode(text).ids
    ids, segments = tokenizer.encode_pair("the dog", "a fox")
    first = tokenizer.encode("the dog", add_special_tokens=False)
    second = tokenizer.encode("a fox", add_special_tokens=False)
    start, end = tokenizer.token_to_id("<|start|>"), tokenizer.token_to_id("<|end|>")
    assert ids == [start, *first, end, *second, end]
    assert segments == [0] * (len(first) + 2) + [1] * (len(second) + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ggml.pre": "llama-bpx"}, r"'llama-bpx'.*did you mean 'llama-bpe'"),
        ({"ggml.model": "rwkv"}, r"'rwkv' vocabulary; known are gpt2, llama, bert"),
        ({"ggml.tokens": []}, "no vocabulary"),
        ({"ggml.token_type": [1]}, "1 token types"),
        ({"ggml.merges": ["ab"]}, "no pair"),
    ],
)
def test_what_is_not_known_is_refused(change: dict[str, Any], message: str) -> None:
    vocabulary = {**gguf_vocabulary(tiny_tokenizers.byte_level()), **change}
    with pytest.raises(UnsupportedCheckpoint, match=message):
        build_tokenizer({f"tokenizer.{key}": value for key, value in vocabulary.items()}, Path("m.gguf"))


@pytest.mark.parametrize("pre", sorted(_SPLITS))
def test_every_way_of_cutting_loses_nothing(pre: str) -> None:
    vocabulary = gguf_vocabulary(tiny_tokenizers.byte_level(), **{"ggml.pre": pre})
    backend = build_tokenizer(
        {f"tokenizer.{key}": value for key, value in vocabulary.items()}, Path("m.gguf")
    )
    for text in TEXTS:
        expected = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        ids = backend.encode(text, add_special_tokens=False).ids
        assert backend.decode(ids, skip_special_tokens=False) == expected


def test_a_tokenizer_json_beside_a_gguf_file_counts_only_if_it_fits(tmp_path: Path) -> None:
    backend = tiny_tokenizers.byte_level()
    file = write(tmp_path / "m.gguf", gguf_vocabulary(backend))
    tiny_tokenizers.save(tiny_tokenizers.wordpiece(), tmp_path)
    assert Tokenizer.from_path(file).encode("dog") == backend.encode("dog").ids
    tiny_tokenizers.save(backend, tmp_path)
    assert read_sources(file).tokenizer_file == tmp_path / "tokenizer.json"
    assert read_sources(tmp_path).gguf is not None
    assert Tokenizer.from_path(tmp_path).eos_ids == (1,)


def test_long_texts_leave_pythons_lock(folder: Path) -> None:
    """`tokenizers`' encode holds it, its batch calls do not."""
    tokenizer = Tokenizer.from_path(folder)
    locked: list[int] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(backend, name)

        def encode(self, text: str, **options: Any) -> Any:
            locked.append(len(text))
            return backend.encode(text, **options)

    backend, tokenizer.backend = tokenizer.backend, Watched()
    for size in (10, 20_000):
        text = "ab c " * size
        assert tokenizer.encode(text) == list(backend.encode(text).ids)
        assert tokenizer.encode(text, False) == list(backend.encode(text, add_special_tokens=False).ids)
    assert locked == [50, 50]
