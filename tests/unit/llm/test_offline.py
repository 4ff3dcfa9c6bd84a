"""LLM: the blocking face over the same engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from headrace.engines.scripted import ScriptedEngine, Step
from headrace.errors import ContextLengthExceeded, InvalidRequest, UnknownArchitecture
from headrace.llm import LLM, AsyncEngine
from headrace.messages import Ready
from headrace.models.encode_card import EncodeCard
from headrace.text.encoding import EncodeText
from headrace.types import EncodeTask, Request, SamplingParams
from support.tiny_text import tiny_text

KIT = tiny_text()
VOCAB = KIT.tokenizer.vocab_size


def say_back(request: Request) -> Iterator[Step]:
    for token in request.token_ids:
        yield Step((token,))
    yield Step((KIT.tokenizer.eos_ids[0],), stop=True)


def llm_of(kind: str = "dense") -> LLM:
    async def make() -> AsyncEngine:
        card = EncodeCard("TinyModel", "embed", (EncodeTask.EMBED,), ("last",))
        text = EncodeText(KIT.tokenizer, card, 64) if kind == "bert" else None
        return AsyncEngine(ScriptedEngine(say_back, ready=Ready(kind, 64, 2, VOCAB)), KIT, encode_text=text)

    return LLM(make)


def test_generate_keeps_the_order_of_many_prompts() -> None:
    with llm_of() as llm:
        prompts = [f"prompt {i}" for i in range(30)]
        results = llm.generate(prompts, progress=False)
        assert [result.text for result in results] == prompts
        assert [result.prompt for result in results] == prompts
        assert max(len(r.outputs) for r in results) == 1


@pytest.mark.parametrize("prompts", ["one", [65, 66], ["one"], [[65, 66], [67]], [[65], "x"]])
def test_generate_takes_text_ids_and_lists(prompts: object) -> None:
    with llm_of() as llm:
        results = llm.generate(prompts, SamplingParams(max_tokens=1), n=2, progress=False)  # type: ignore[arg-type]
        assert all(len(result.outputs) == 2 for result in results)
        assert len(results) == (2 if prompts in ([[65, 66], [67]], [[65], "x"]) else 1)


def test_chat_takes_one_conversation_or_several() -> None:
    talk = [{"role": "user", "content": "hi"}]
    with llm_of() as llm:
        assert len(llm.chat(talk)) == 1
        two = llm.chat([talk, talk], progress=False)
        assert [result.prompt for result in two] == ["<|user|>hi<|assistant|>"] * 2


def test_embed_gives_an_array() -> None:
    with llm_of("bert") as llm:
        vectors = llm.embed(["a", "bc", "d"], progress=False)
        assert vectors.shape == (3, 8)
        assert vectors.dtype == np.float32
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
        assert llm.embed("a").shape == (1, 8)


def test_errors_are_the_plain_ones_and_leave_the_engine_usable() -> None:
    with llm_of() as llm:
        with pytest.raises(ContextLengthExceeded):
            llm.generate(["ok", [65] * 100], progress=False)
        with pytest.raises(InvalidRequest, match="mixes"):
            llm.generate(["a", 5])  # type: ignore[list-item]
        assert llm.generate("still here")[0].text == "still here"


def test_a_failing_start_leaves_no_thread() -> None:
    async def make() -> AsyncEngine:
        raise UnknownArchitecture("no such family")

    with pytest.raises(UnknownArchitecture):
        LLM(make)
    assert not [thread for thread in threading.enumerate() if thread.name == "headrace-llm"]


def test_closing_twice_is_fine() -> None:
    llm = llm_of()
    llm.close()
    llm.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "headrace-llm"]


def test_progress_bar_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with llm_of() as llm:
        llm.generate(["a", "b", "c"])
    assert "3/3" in capsys.readouterr().err
