"""Packaged models: their GGUF tokenizers and templates equal transformers', and their weights the gguf package's."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.checkpoints.gguf import GGUFCheckpoint
from headrace.checkpoints.resolve import open_checkpoint
from headrace.text.detokenizer import Detokenizer
from headrace.text.template import ChatTemplate
from headrace.text.tokenizer import Tokenizer
from support.packaged import packaged

pytestmark = pytest.mark.models

TEXTS = [
    "Hello world",
    "  two  spaces and\ttabs\n\n\nnewlines   ",
    "def f(x):\n    return x**2 # 12345 1,000.50",
    "Größe Straße ÄÖÜ naïve café",
    "你好，世界！今天天气很好。",
    "🙂👨‍👩‍👧‍👦🇩🇪 emoji 🏳️‍🌈",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<start_of_turn>user\nhi<end_of_turn>\n<bos>[multimodal]<table>",
    "I'll don't WE'RE it's",
    "",
    " ",
    "\n",
    "العربية עברית ไทย हिन्दी 한국어 日本語",
    "x" + " " * 70 + "y\n\n\n\n\n",
]
NAMES = [
    "smollm2-135m",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2.5-coder-0.5b", "gemma3-270m")),
]


@pytest.fixture(scope="module")
def smollm2_tokenizer() -> Tokenizer:
    return Tokenizer.from_path(packaged("smollm2-135m"))


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_equals_transformers(name: str) -> None:
    from transformers import AutoTokenizer

    path = packaged(name)
    reference = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    tokenizer = Tokenizer.from_path(path)
    for text in TEXTS:
        for special in (True, False):
            ids = reference(text, add_special_tokens=special)["input_ids"]
            assert tokenizer.encode(text, special) == ids
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)
    if reference.chat_template:
        chat = [{"role": "user", "content": "Hi <b>ü</b>"}]
        template = ChatTemplate.from_sources(tokenizer.sources, tokenizer.special_tokens)
        expected = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert template.render(chat) == expected


def test_minilm_tokenizer_equals_transformers(minilm_path: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(minilm_path))
    tokenizer = Tokenizer.from_path(minilm_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference(text)["input_ids"]
    ids, segments = tokenizer.encode_pair("a question", "an answer")
    expected = reference("a question", "an answer")
    assert (ids, segments) == (expected["input_ids"], expected["token_type_ids"])


@settings(max_examples=80, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=30), cut=st.integers(1, 4))
def test_streamed_text_is_the_librarys_text(smollm2_tokenizer: Tokenizer, ids: list[int], cut: int) -> None:
    stream = Detokenizer(smollm2_tokenizer)
    text = "".join(stream.push(ids[i : i + cut]) for i in range(0, len(ids), cut)) + stream.finish()
    assert text == smollm2_tokenizer.backend.decode(ids)


def test_weights_equal_the_gguf_packages(smollm2_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2_path)
    assert isinstance(checkpoint, GGUFCheckpoint)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(smollm2_path)).tensors}
    assert len(stored) == len(checkpoint.names()) == 272
    config = checkpoint.config
    shape = (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"])
    assert shape == (9, 3, 64)
    for name, source, heads in (
        ("model.embed_tokens.weight", "token_embd.weight", 0),
        ("model.layers.29.mlp.down_proj.weight", "blk.29.ffn_down.weight", 0),
        ("model.layers.3.self_attn.q_proj.weight", "blk.3.attn_q.weight", 9),
        ("model.layers.3.self_attn.k_proj.weight", "blk.3.attn_k.weight", 3),
    ):
        expected = gguf.quants.dequantize(stored[source].data, stored[source].tensor_type)
        if heads:  # pairs back to halves
            expected = (
                expected.reshape(heads, -1, 2, expected.shape[1]).swapaxes(1, 2).reshape(expected.shape)
            )
        np.testing.assert_array_equal(checkpoint.load(name).numpy(), expected)
