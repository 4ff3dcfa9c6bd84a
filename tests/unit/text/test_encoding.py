"""Texts and pairs for one pass: truncation as the tokenizers library cuts, and rerank prompts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from headrace.errors import ContextLengthExceeded, InvalidRequest
from headrace.models.encode_card import EncodeCard
from headrace.text.encoding import EncodeText, Truncate, longest_first
from headrace.text.rerank import RerankTemplate, rerank_template
from headrace.text.sources import TextSources
from headrace.text.tokenizer import Tokenizer
from headrace.types import EncodeTask

WORDS = [f"w{i}" for i in range(50)]


def backend() -> Backend:
    vocab = {token: i for i, token in enumerate(["[CLS]", "[SEP]", "[UNK]", *WORDS])}
    made = Backend(models.WordLevel(vocab, unk_token="[UNK]"))  # type: ignore[call-arg]
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 1)],
    )
    return made


def text(limit: int, **fields: object) -> EncodeText:
    card = EncodeCard("X", "embed", (EncodeTask.EMBED,), ("mean",), **fields)  # type: ignore[arg-type]
    return EncodeText(Tokenizer(backend(), TextSources(Path("x"))), card, limit)


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


@pytest.mark.parametrize("direction", ["right", "left"])
def test_cuts_equal_the_librarys(direction: str) -> None:
    draw = random.Random(1)
    for _ in range(60):
        limit = draw.randint(4, 12)
        own, theirs = text(limit), backend()
        theirs.enable_truncation(limit, direction=direction)
        one, two = words(draw, draw.randint(0, 15)), words(draw, draw.randint(0, 15))
        cut = Truncate(direction)  # type: ignore[arg-type]
        assert own.texts([one], truncate=cut)[0].ids == tuple(theirs.encode(one).ids)
        (pair,), expected = own.pairs([(one, two)], truncate=cut), theirs.encode(one, two)
        assert pair.ids == tuple(expected.ids)
        assert (pair.types or (0,) * len(pair.ids)) == tuple(expected.type_ids)


@pytest.mark.parametrize("side", ["left", "right", None])
def test_what_the_tokenizer_says_decides_when_nobody_else_does(side: str | None) -> None:
    own, theirs = text(6), backend()
    if side is not None:
        sources = TextSources(Path("x"), tokenizer_config={"truncation_side": side})
        own = EncodeText(Tokenizer(backend(), sources), own.card, 6)
    theirs.enable_truncation(6, direction=side or "right")
    long = " ".join(WORDS[:20])
    assert own.texts([long], truncate=Truncate())[0].ids == tuple(theirs.encode(long).ids)
    assert own.pairs([(long, "w1")], truncate=Truncate())[0].ids == tuple(theirs.encode(long, "w1").ids)
    ids = list(range(3, 13))
    kept = ids[-6:] if side == "left" else ids[:6]
    assert own.ids(ids, Truncate(), "input").ids == tuple(kept)
    theirs.enable_truncation(6, direction="right")
    assert own.texts([long], truncate=Truncate("right"))[0].ids == tuple(theirs.encode(long).ids)


@pytest.mark.parametrize("stated", ["left", "right", None])
def test_the_section_in_tokenizer_json_says_it_where_no_other_file_does(stated: str | None) -> None:
    """As transformers: its length, padding and stride count for nothing."""
    theirs = backend()
    theirs.enable_truncation(9, direction="left", stride=2)
    theirs.enable_padding(length=20)
    theirs = Backend.from_str(theirs.to_str())
    settings = {} if stated is None else {"truncation_side": stated}
    own = EncodeText(Tokenizer(theirs, TextSources(Path("x"), tokenizer_config=settings)), text(6).card, 6)
    expected = backend()
    expected.enable_truncation(6, direction=stated or "left")
    long = " ".join(WORDS[:20])
    assert own.texts([long], truncate=Truncate())[0].ids == tuple(expected.encode(long).ids)
    assert own.texts(["w1"])[0].ids == tuple(expected.encode("w1").ids)


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 60))
def test_longest_first_takes_from_the_longer_text(first: int, second: int, room: int) -> None:
    one, two = longest_first(first, second, room)
    assert one + two == min(first + second, room)
    assert one <= first
    assert two <= second
    if first + second > room:
        assert abs(one - two) <= 1 or (one == first and one < two) or (two == second and two < one)


def test_too_long_prompts_lowercase_and_empty() -> None:
    with pytest.raises(ContextLengthExceeded, match=r"input\[1\] has 7 tokens and this model takes 6"):
        text(6).texts(["w1", "w1 w2 w3 w4 w5"])
    prompted = text(9, prompts={"query": "w7 w8 "}, default_prompt="query", lowercase=True)
    assert prompted.texts(["W9"])[0].ids == text(9).texts(["w7 w8 w9"])[0].ids
    assert prompted.texts(["W9"], prompt="")[0].ids == text(9).texts(["w9"])[0].ids
    with pytest.raises(InvalidRequest, match="this checkpoint has 'query'"):
        prompted.texts(["x"], prompt="quary")
    with pytest.raises(InvalidRequest, match="empty"):
        text(9).texts([""], add_special_tokens=False)
    with pytest.raises(InvalidRequest, match="surrogate"):
        text(9).texts(["w1", "\ud800"])


def test_a_rerank_prompt_cuts_the_document_and_nothing_else() -> None:
    template = RerankTemplate("w1 {{ instruction or 'w2' }} {{ query }} {{ document }} w3")
    reader = text(8)

    def ids(value: str) -> tuple[int, ...]:
        return reader.raw([value], "x")[0].ids

    assert template.encode(reader, "w4", ["w5 w6"], None, None, "texts")[0].ids == ids("w1 w2 w4 w5 w6 w3")
    found = template.encode(reader, "w4", ["w5", "w5 w6 w7 w8 w9 w10"], "w11", Truncate(), "texts")
    assert [one.ids for one in found] == [ids("w1 w11 w4 w5 w3"), ids("w1 w11 w4 w5 w6 w7 w8 w3")]
    (left,) = template.encode(reader, "w4", ["w5 w6 w7 w8 w9 w10"], None, Truncate("left"), "texts")
    assert left.ids == ids("w1 w2 w4 w7 w8 w9 w10 w3")
    with pytest.raises(ContextLengthExceeded, match=r"texts\[0\] has 10 tokens"):
        template.encode(reader, "w4", ["w5 w6 w7 w8 w9 w10"], None, None, "texts")


def test_known_rerankers_bring_their_template_and_others_none() -> None:
    known = rerank_template("qwen3", ("Qwen/Qwen3-Reranker-0.6B", "x"), None)
    assert known is not None
    before, after = known.render("where is it", None)
    assert before.endswith(
        "retrieve relevant passages that answer the query\n<Query>: where is it\n<Document>: "
    )
    assert after == "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert rerank_template("qwen3", ("some/other",), None) is None
    given = rerank_template("qwen3", ("Qwen3-Reranker",), "{{ query }} {{ document }}")
    assert given is not None
    assert given.render("q", None) == ("q ", "")
    with pytest.raises(InvalidRequest, match="variable 'document'"):
        RerankTemplate("{{ query }}")
