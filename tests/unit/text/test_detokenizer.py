"""Deltas joined are the whole text, for every tokenizer kind, id sequence and split."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from headrace.errors import UnsupportedCheckpoint
from headrace.text.detokenizer import Detokenizer
from headrace.text.pieces import Pieces
from headrace.text.sources import TextSources
from headrace.text.tokenizer import Tokenizer
from support import tiny_tokenizers

KINDS: dict[str, Callable[[], Backend]] = {
    "byte level": tiny_tokenizers.byte_level,
    "sentencepiece": tiny_tokenizers.sentencepiece,
    "sentencepiece without prefix": lambda: tiny_tokenizers.sentencepiece(prefix=False),
    "metaspace": lambda: tiny_tokenizers.sentencepiece(metaspace=True),
    "metaspace without prefix": lambda: tiny_tokenizers.sentencepiece(prefix=False, metaspace=True),
    "wordpiece": tiny_tokenizers.wordpiece,
}


def make(kind: str) -> Tokenizer:
    return Tokenizer(KINDS[kind](), TextSources(Path("made-up")))


ids = st.lists(st.integers(0, 500), max_size=40)
texts = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from([*tiny_tokenizers.LINES, "🙂", " ", "  ", "你", "<|end|>", "."]), max_size=4
    ).map("".join),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(data=st.data(), tokens=ids, skip=st.booleans(), continuing=st.booleans())
def test_any_split_gives_the_same_text(
    kind: str, data: st.DataObject, tokens: list[int], skip: bool, continuing: bool
) -> None:
    tokenizer = make(kind)
    whole = Detokenizer(tokenizer, skip_special_tokens=skip, continuing=continuing)
    expected = whole.push(tokens) + whole.finish()
    stream = Detokenizer(tokenizer, skip_special_tokens=skip, continuing=continuing)
    joined, position = "", 0
    while position < len(tokens):
        step = data.draw(st.integers(1, 5))
        joined += stream.push(tokens[position : position + step])
        position += step
    assert joined + stream.finish() == expected
    if not continuing:
        assert tokenizer.decode(tokens, skip) == expected


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(tokens=ids, skip=st.booleans())
def test_equals_the_library_on_any_ids(kind: str, tokens: list[int], skip: bool) -> None:
    """Also on sequences no encoder makes. Only a run of fallback bytes that mixes whole characters with broken
    ones differs on purpose: the library gives up the whole run, this keeps its whole characters."""
    tokenizer = make(kind)
    known = [token for token in tokens if tokenizer.id_to_token(token) is not None]
    expected = tokenizer.backend.decode(known, skip_special_tokens=skip)
    found = tokenizer.decode(tokens, skip)
    if tokenizer.pieces.errors != "replace" and "�" in expected:
        assert found.count("�") <= expected.count("�")
    else:
        assert found == expected


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=texts)
@example(text="🙂")
@example(text=" two  spaces ")
def test_encoded_text_decodes_as_the_library_does(kind: str, text: str) -> None:
    tokenizer = make(kind)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens, False) == tokenizer.backend.decode(tokens, skip_special_tokens=False)


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_byte_level_loses_nothing(text: str) -> None:
    tokenizer = make("byte level")
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens, False) == text
    assert b"".join(map(tokenizer.token_bytes, tokens)) == text.encode()


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_an_emoji_over_several_tokens_comes_out_once_whole(kind: str) -> None:
    tokenizer = make(kind)
    tokens = tokenizer.encode("a🙃b")  # not in the training lines: four byte tokens
    stream = Detokenizer(tokenizer)
    deltas = [stream.push([token]) for token in tokens]
    assert "".join(deltas).strip() == "a🙃b"
    assert "🙃" in deltas
    assert deltas[deltas.index("🙃") - 1] == ""
    assert stream.finish() == ""


@pytest.mark.parametrize(("kind", "replaced"), [("byte level", "�"), ("sentencepiece", "���")])
def test_an_unfinished_character_is_flushed_at_the_end(kind: str, replaced: str) -> None:
    tokenizer = make(kind)
    tokens = tokenizer.encode("🙃")[:-1]
    stream = Detokenizer(tokenizer)
    assert "".join(stream.push([token]) for token in tokens) == ""
    assert stream.finish() == replaced == tokenizer.backend.decode(tokens)


def test_whole_characters_of_a_broken_run_are_kept() -> None:
    tokenizer = make("sentencepiece")
    run = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "你".encode() + b"\xe4\xbd"]
    assert tokenizer.decode(run) == "你��"
    assert tokenizer.backend.decode(run) == "�����"


def test_the_leading_space_belongs_to_the_start_only() -> None:
    tokenizer = make("sentencepiece")
    tokens = tokenizer.encode("The dog")
    assert tokenizer.decode(tokens) == "The dog"
    going_on = Detokenizer(tokenizer, continuing=True)
    assert going_on.push(tokens) + going_on.finish() == " The dog"


def test_special_tokens_are_left_out_or_shown() -> None:
    tokenizer = make("byte level")
    tokens = tokenizer.encode("a<|end|>b")
    assert tokenizer.decode(tokens) == "ab"
    assert tokenizer.decode(tokens, skip_special_tokens=False) == "a<|end|>b"


def test_a_decoder_that_cannot_stream_is_refused() -> None:
    with pytest.raises(UnsupportedCheckpoint, match="'CTC'"):
        Pieces({"type": "CTC"})
    with pytest.raises(UnsupportedCheckpoint, match="'Strip'"):
        Pieces(
            {
                "type": "Sequence",
                "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}],
            }
        )


def test_without_a_decoder_tokens_are_joined_by_spaces() -> None:
    backend = Backend.from_str(tiny_tokenizers.wordpiece().to_str())
    backend.decoder = None
    tokenizer = Tokenizer(backend, TextSources(Path("made-up")))
    tokens = tokenizer.encode("the dog")
    assert tokenizer.decode(tokens) == backend.decode(tokens)
    backend.decoder = decoders.ByteLevel()


def test_the_error_handler_counts_bytes() -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("headrace_each_byte")
    assert decoder.decode(b"\xe4\xbd") + decoder.decode(b"a\xff\xf0", final=True) == "��a��"
