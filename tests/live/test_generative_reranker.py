"""A generator that reranks by yes and no: its prompt is applied by default, and without one it is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from headrace.config.spec import EngineSpec
from headrace.engines.process import start_in_process
from headrace.errors import Unprocessable
from headrace.llm import AsyncEngine
from headrace.llm.startup import encode_side
from headrace.llm.textkit import load_text
from headrace.text.encoding import Truncate
from headrace.types import EncodeParams, EncodeTask
from parity.encoders import VOCAB
from parity.test_encode_heads import make_causal

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
# The prompt of the model card, written out once more by hand.
PROMPT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}\n'
    "<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


def make(folder: Path) -> tuple[Any, Backend]:
    """A tiny random Qwen3 whose tokenizer knows yes and no; transformers' model and the tokenizer."""
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([PROMPT, "yes no yes no"] * 4, trainer)
    backend.add_tokens(["yes", "no"])
    assert VOCAB < backend.get_vocab_size() <= 620
    model = make_causal(folder, "Qwen3", "ForCausalLM", vocab_size=620, max_position_embeddings=400)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(folder)
    return model, backend


async def engine_of(folder: Path, **fields: Any) -> AsyncEngine:
    spec = EngineSpec(model=folder.name, path=folder, pooling="yes_no", num_threads=1, **fields)
    client = await start_in_process(spec)
    text = load_text(spec)
    encode_text, template = encode_side(client, text)
    return AsyncEngine(client, text, encode_text=encode_text, rerank_template=template)


def test_scores_are_those_of_the_model_cards_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-Reranker-tiny"
    model, backend = make(folder)
    query, texts = "who built it", ["an apple", "the builders of the tower", ""]

    async def main() -> list[float]:
        engine = await engine_of(folder)
        try:
            encoded = await engine.encoder.pairs(query, texts, truncate=None)
            result = await engine.encoder.run(encoded, EncodeParams(task=EncodeTask.SCORE))
            cut = await engine.encoder.pairs(query, ["apple " * 500], truncate=Truncate())
            assert len(cut[0].ids) == 400
            assert cut[0].ids[-9:] == encoded[0].ids[-9:]
            return [float(np.frombuffer(output.data, "<f4")[0]) for output in result.outputs]
        finally:
            await engine.close()

    found = asyncio.run(main())
    yes, no = backend.token_to_id("yes"), backend.token_to_id("no")
    for text, score in zip(texts, found):
        ids = backend.encode(PROMPT.format(instruction=INSTRUCTION, query=query, document=text)).ids
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        assert score == pytest.approx(torch.stack([logits[no], logits[yes]]).softmax(0)[1].item(), abs=1e-4)


def test_without_a_known_prompt_it_is_refused_and_the_operators_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "some-model"
    make(folder)

    async def main() -> None:
        engine = await engine_of(folder)
        with pytest.raises(Unprocessable, match="--chat-template"):
            await engine.encoder.pairs("q", ["d"], truncate=None)
        await engine.close()
        engine = await engine_of(folder, chat_template="{{ query }} / {{ document }} ?")
        (one,) = await engine.encoder.pairs("q", ["d"], truncate=None)
        assert engine.encoder.text.tokenizer.decode(one.ids) == "q / d ?"
        await engine.close()

    asyncio.run(main())
