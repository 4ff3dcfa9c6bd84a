"""A small byte-level BPE tokenizer with a chat template, made of the text room's own parts."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from headrace.llm.textkit import ModelText
from headrace.text.sources import TextSources
from headrace.text.template import ChatTemplate
from headrace.text.tokenizer import Tokenizer

CORPUS = ["the cat sat on the mat", "naïve café 🎉🎉 你好 你好", "user: assistant: hello hello"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_text(template: str = TEMPLATE) -> ModelText:
    """ModelText over about 300 tokens; <|end|> is its end token."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|end|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    sources = TextSources(Path("tiny"), tokenizer_config={"eos_token": "<|end|>"})
    tokenizer = Tokenizer(backend, sources)
    return ModelText(tokenizer, ChatTemplate({"default": template}, tokenizer.special_tokens))
