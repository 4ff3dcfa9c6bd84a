"""AsyncEngine over a scripted core and a real byte-level tokenizer: text, stops, limits, choices."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.config.spec import EngineSpec
from headrace.engines.scripted import ScriptedEngine, Step
from headrace.errors import ContextLengthExceeded, InvalidRequest, MissingFile, RequestTimeout, Unprocessable
from headrace.llm import AsyncEngine, Delta
from headrace.llm.async_engine import choice_seed
from headrace.llm.results import collect
from headrace.messages import Ready
from headrace.models.encode_card import EncodeCard
from headrace.text.encoding import EncodeText
from headrace.types import EncodeTask, FinishReason, Request, SamplingParams
from support.tiny_text import tiny_text

KIT = tiny_text()
TOKENIZER = KIT.tokenizer


def engine_of(script: Any, spec: dict[str, Any] | None = None, **ready: Any) -> AsyncEngine:
    options = {"max_model_len": 256, "max_num_seqs": 4, "vocab_size": TOKENIZER.vocab_size} | ready
    core = ScriptedEngine(script, spec=EngineSpec(model="m", **(spec or {})), ready=Ready("dense", **options))
    return AsyncEngine(core, KIT)


def gives(ids: list[int], cuts: list[int] | None = None, end: bool = True) -> Any:
    """A script of these ids, cut into steps at these places."""
    places = sorted({0, len(ids), *(cut for cut in cuts or range(len(ids)) if cut < len(ids))})

    def script(request: Request) -> Iterator[Step]:
        for start, stop in pairwise(places):
            yield Step(tuple(ids[start:stop]))
        if end:
            yield Step((TOKENIZER.eos_ids[0],), stop=True)

    return script


async def joined(engine: AsyncEngine, prompt: Any = "x", **params: Any) -> tuple[str, Delta]:
    deltas = [d async for d in engine.generate(prompt, SamplingParams(**params))]
    assert all(delta.finish_reason is None for delta in deltas[:-1])
    return "".join(delta.text for delta in deltas), deltas[-1]


@settings(max_examples=80, deadline=None)
@given(
    text=st.text(max_size=24) | st.lists(st.sampled_from("ab🎉é你 \n"), max_size=24).map("".join),
    cuts=st.lists(st.integers(0, 60), max_size=12),
    stops=st.lists(st.text(alphabet="ab🎉é你 ", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_deltas_joined_equal_the_text_up_to_the_first_stop(
    text: str, cuts: list[int], stops: list[str], include: bool
) -> None:
    text = text.encode("utf-8", "ignore").decode()
    ids = TOKENIZER.encode(text, False)
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    expected = text
    if ends:
        end, _, stop = min(ends)
        expected = text[:end] if include else text[: end - len(stop)]
    found, last = asyncio.run(
        joined(engine_of(gives(ids, cuts)), stop=tuple(stops), include_stop_str_in_output=include)
    )
    assert found == expected
    assert last.finish_reason is FinishReason.STOP
    assert last.stop_reason == (min(ends)[2] if ends else None)


def test_stop_string_ends_the_core_and_counts_no_later_token() -> None:
    ids = TOKENIZER.encode("the cat sat on the mat", False)

    async def main() -> None:
        engine = engine_of(gives(ids, [len(ids)]))  # everything in one step
        prompts = await engine.prompts(["x"])
        generation = engine.open(prompts, SamplingParams(stop=("cat",)))
        (completion,) = await collect(generation)
        assert completion.text == "the "
        used = len(completion.token_ids)
        assert "cat" in TOKENIZER.decode(completion.token_ids)
        assert "cat" not in TOKENIZER.decode(completion.token_ids[:-1])
        assert generation.usage.completion_tokens == used < len(ids)
        assert len(engine.client.aborted) == 1

    asyncio.run(main())


def test_min_tokens_keeps_stop_strings_away() -> None:
    ids = TOKENIZER.encode("abababab", False)
    text, last = asyncio.run(joined(engine_of(gives(ids)), stop=("a",), min_tokens=3, max_tokens=50))
    assert text == TOKENIZER.decode(ids[:3]) + TOKENIZER.decode(ids[3:]).split("a")[0]
    assert last.stop_reason == "a"


def test_stop_token_is_hidden_unless_asked_for() -> None:
    ids = TOKENIZER.encode("ab", False)
    assert len(ids) == 2
    text, last = asyncio.run(joined(engine_of(gives(ids)), stop_token_ids=(ids[1],)))
    assert (text, last.stop_reason) == ("a", ids[1])
    text, _ = asyncio.run(
        joined(engine_of(gives(ids)), stop_token_ids=(ids[1],), include_stop_str_in_output=True)
    )
    assert text == "ab"


def test_special_tokens_are_shown_when_asked_for() -> None:
    named = TOKENIZER.token_to_id("<|user|>")
    text, _ = asyncio.run(joined(engine_of(gives([named])), skip_special_tokens=False))
    assert text == "<|user|>"


def test_output_is_limited_by_the_context() -> None:
    ids = TOKENIZER.encode("a" * 100, False)
    engine = engine_of(gives(ids, end=False), max_model_len=10)
    _, last = asyncio.run(joined(engine, [1, 2, 3], max_tokens=50))
    assert last.finish_reason is FinishReason.LENGTH
    assert engine.client.requests[0].sampling.max_tokens == 7


def test_prompts_that_do_not_fit_are_refused_or_truncated() -> None:
    async def main() -> None:
        engine = engine_of(gives([1]), max_model_len=8)
        for size in (8, 9, 100):
            with pytest.raises(ContextLengthExceeded, match=f"{size} tokens"):
                await joined(engine, [1] * size)
        with pytest.raises(ContextLengthExceeded, match="min_tokens 5"):
            await joined(engine, [1] * 4, min_tokens=5)
        prompts = await engine.prompts([list(range(20))])
        assert engine.open(prompts, SamplingParams(), truncate_prompt_tokens=3).prompts[0].token_ids == (
            17,
            18,
            19,
        )
        fits = engine.open(prompts, SamplingParams(max_tokens=5), truncate_prompt_tokens=-1)
        assert fits.prompts[0].token_ids == (17, 18, 19)
        with pytest.raises(InvalidRequest, match="empty"):
            await joined(engine, [])
        with pytest.raises(InvalidRequest, match="token id 9999"):
            await joined(engine, [9999])
        assert engine.client.requests == []

    asyncio.run(main())


def test_the_servers_own_limits_and_stops_apply() -> None:
    ids = TOKENIZER.encode("ab" * 20, False)
    engine = engine_of(gives(ids, end=False), {"default_max_tokens": 3, "stop": ("zz",)})
    asyncio.run(joined(engine))
    assert engine.client.requests[0].sampling.max_tokens == 3
    text, last = asyncio.run(joined(engine_of(gives(ids), {"stop": ("b",)})))
    assert (text, last.stop_reason) == ("a", "b")


def test_chat_renders_and_continues() -> None:
    async def main() -> None:
        engine = engine_of(gives([1]))
        talk = [{"role": "user", "content": "hi"}]
        prompt = await engine.chat_prompt(talk)
        assert prompt.text == "<|user|>hi<|assistant|>"
        assert not prompt.continuing
        more = [*talk, {"role": "assistant", "content": "he"}]
        prompt = await engine.chat_prompt(more, continue_final_message=True, add_generation_prompt=False)
        assert prompt.text == "<|user|>hi<|assistant|>he"
        assert prompt.continuing
        developer = await engine.chat_prompt([{"role": "developer", "content": "x"}])
        assert developer.text.startswith("<|system|>")
        long = await engine.chat_prompt([{"role": "user", "content": "a" * 10_000}], cut=True)
        assert len(long.token_ids) > 1000

    asyncio.run(main())


def test_texts_far_too_long_are_refused_by_their_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        engine = engine_of(gives([]))
        read: list[int] = []
        encode = type(TOKENIZER).encode
        monkeypatch.setattr(
            type(TOKENIZER), "encode", lambda self, text, *a: read.append(len(text)) or encode(self, text, *a)
        )
        with pytest.raises(ContextLengthExceeded, match="more than") as refused:
            await engine.prompts(["\x01" * 500_000])
        assert refused.value.param == "prompt"
        with pytest.raises(ContextLengthExceeded, match="more than") as refused:
            await engine.chat_prompt([{"role": "user", "content": "\x01" * 500_000}])
        assert refused.value.param == "messages"
        assert sum(read) < 50_000
        [cut] = await engine.prompts(["\x01" * 5000], cut=True)
        assert len(cut.token_ids) >= 5000

    asyncio.run(main())


def test_a_model_that_cannot_start_gives_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Core and tokenizer load side by side; when both fail, the second failure is not left to asyncio's log."""
    left: list[Any] = []

    async def fails(*_: Any) -> Any:
        await asyncio.sleep(0.05)
        raise MissingFile("no weights")

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: left.append(context))
        with pytest.raises(MissingFile, match="no weights"):
            await AsyncEngine.start(EngineSpec(model=str(tmp_path), path=tmp_path))
        gc.collect()
        await asyncio.sleep(0)

    monkeypatch.setattr("headrace.engines.process.start", fails)
    asyncio.run(main())
    assert left == []


def test_best_of_picks_by_mean_logprob() -> None:
    async def main() -> None:
        engine = engine_of(gives(TOKENIZER.encode("ab", False)))
        result = await engine.complete("x", n=2, best_of=4)
        assert [output.index for output in result.outputs] == [0, 1]
        assert result.outputs[0].logprobs == []
        assert result.usage.completion_tokens == 4 * 3
        assert result.usage.prompt_tokens == 1

    asyncio.run(main())


@settings(deadline=None)
@given(seed=st.integers(-(2**63), 2**63 - 1))
def test_derived_seeds_differ_and_fit(seed: int) -> None:
    seeds = [choice_seed(seed, k) for k in range(64)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 64
    assert all(-(2**63) <= one < 2**63 for one in seeds)


@pytest.mark.parametrize("n", [1, 3])
def test_leaving_the_iterator_aborts(n: int) -> None:
    async def main() -> None:
        engine = engine_of(gives(TOKENIZER.encode("a" * 200, False), end=False))
        stream = engine.generate("x", n=n)
        async for _ in stream:
            break
        await stream.aclose()
        assert len(engine.client.aborted) == n
        assert engine.client.num_unfinished == 0

    asyncio.run(main())


def test_deadline_in_the_core_is_a_timeout() -> None:
    async def main() -> None:
        engine = engine_of(lambda request: iter([Step((1,), delay=0.05)] * 100))
        deadline = asyncio.get_running_loop().time() + 0.1
        with pytest.raises(RequestTimeout):
            async for _ in engine.generate("x", deadline=deadline):
                pass

    asyncio.run(main())


def test_bad_words_are_spelled_in_both_ways() -> None:
    words = engine_of(gives([1])).bad_words(["cat"])
    assert {TOKENIZER.decode(word) for word in words} == {"cat", " cat"}


def test_embedding_inputs_are_cut_before_their_closing_tokens() -> None:
    async def main() -> None:
        core = ScriptedEngine(ready=Ready("embed", 6, 4, TOKENIZER.vocab_size))
        card = EncodeCard("TinyModel", "embed", (EncodeTask.EMBED,), ("last",))
        text = EncodeText(TOKENIZER, card, 6)
        engine = AsyncEngine(core, KIT, encode_text=text)
        with pytest.raises(ContextLengthExceeded, match=r"input\[1\]"):
            await engine.embed([[1], [1] * 7])
        await engine.embed([[1, 2, 3, 4, 5, 6, 7]], truncate_prompt_tokens=-1)
        assert core.requests[-1].token_ids == (1, 2, 3, 4, 5, 6)
        frame = TOKENIZER.backend.post_processor
        from tokenizers.processors import TemplateProcessing

        end = ("<|end|>", TOKENIZER.eos_ids[0])
        TOKENIZER.backend.post_processor = TemplateProcessing(single="$A <|end|>", special_tokens=[end])
        try:
            await engine.embed(["a" * 50], truncate_prompt_tokens=4)
            assert len(core.requests[-1].token_ids) == 4
            assert core.requests[-1].token_ids[-1] == end[1]
        finally:
            TOKENIZER.backend.post_processor = frame
        with pytest.raises(Unprocessable):
            await engine.complete("x")
        auto = AsyncEngine(
            ScriptedEngine(spec=EngineSpec(model="m", auto_truncate=True), ready=core.ready),
            KIT,
            encode_text=text,
        )
        assert len((await auto.embed([[1] * 50])).outputs) == 1

    asyncio.run(main())
