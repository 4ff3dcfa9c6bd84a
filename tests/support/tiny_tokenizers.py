"""Small real tokenizers, trained on a few lines with the tokenizers library."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

LINES = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "def add(a, b):\n    return a + b\n\n\nclass Größe:\n\tpass\n",
    "你好，世界！今天天气很好。 日本語のテキスト",
    "🙂👨‍👩‍👧‍👦🇩🇪 emoji 🏳️‍🌈 e\u0301 ﬁ",
    "  leading   spaces and don't WE'RE 1234567890",
]
SPECIALS = ["<|start|>", "<|end|>"]


@cache
def byte_level() -> Tokenizer:
    """GPT-2's kind: every byte has a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


@cache
def sentencepiece(prefix: bool = True, metaspace: bool = False) -> Tokenizer:
    """Llama 2's kind: byte fallback and a leading space; with ``metaspace`` the newer way to write that."""
    base = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    base.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False)
    base.train_from_iterator([line for line in LINES if line.isascii()], trainer)
    vocab = dict(base.get_vocab())
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    import json

    merges = [tuple(pair) for pair in json.loads(base.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="first" if prefix else "never", split=False
        )
        scheme = "first" if prefix else "never"
        steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme, split=False)]
        tokenizer.decoder = steps[1]
    elif prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return tokenizer


@cache
def wordpiece() -> Tokenizer:
    """BERT's kind."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=220, special_tokens=["[UNK]", *SPECIALS], show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
