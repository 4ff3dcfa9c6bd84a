"""A vocabulary for constraints in core tests: bytes, an end token, and two special tokens, as a tokenizer.json."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

EOS, THINK, UNTHINK = 256, 257, 258
VOCAB = 259


@cache
def tokenizer_json() -> str:
    """Ids 0 to 255 are bytes; then <eos>, <think> and </think>."""
    from headrace.text.pieces import _byte_alphabet

    tokenizer = Tokenizer(models.BPE(vocab=_byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<eos>", "<think>", "</think>")]
    )
    return str(tokenizer.to_str())
