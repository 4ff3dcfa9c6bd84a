"""A byte-level BPE of any size, made up: for measuring where no real tokenizer can be had.

Its entries are of the kinds that real vocabularies hold, in like shares: words with and without a space before them,
capitals, JSON's and code's punctuation, runs of blanks, digits one by one, and pieces of other scripts.
"""

from __future__ import annotations

import json
import random

__all__ = ["END", "made_up_bpe"]

END = "<|end|>"
_PUNCTUATION = [
    '{"',
    '":',
    '",',
    '":"',
    '","',
    '"}',
    "},",
    "],",
    '["',
    "[{",
    "}]",
    " =",
    "()",
    "();",
    "->",
    "//",
    "\\n",
    '\\"',
]
_ONSETS = ["", *"bcdfghjklmnprstvwz", "ch", "sh", "th", "st", "tr", "pl", "gr"]
_CODAS = ["", "", "n", "r", "s", "t", "l", "ng", "st", "rd"]
_SCRIPTS = (
    (0x400, 0x45F),
    (0x3B1, 0x3C9),
    (0x4E00, 0x6FFF),
    (0xAC00, 0xBFFF),
    (0x627, 0x64A),
    (0x3041, 0x3093),
)


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def made_up_bpe(size: int, seed: int = 0) -> str:
    """tokenizer.json of ``size`` entries, the last of them the end token."""
    rng = random.Random(seed)
    shown = _byte_characters()
    vocabulary = {shown[byte]: byte for byte in range(256)}
    merges: list[tuple[str, str]] = []

    def add(text: str) -> None:
        """The text as an entry, and every prefix that its merges need."""
        symbols = [shown[byte] for byte in text.encode()]
        have = symbols[0]
        for symbol in symbols[1:]:
            if have + symbol not in vocabulary and len(vocabulary) < size - 1:
                vocabulary[have + symbol] = len(vocabulary)
                merges.append((have, symbol))
            have += symbol

    for text in (*_PUNCTUATION, *(" " * n for n in range(2, 33)), *("\n" + " " * n for n in range(17))):
        add(text)
    while len(vocabulary) < size - 1:
        if rng.random() < 0.25:
            first, last = rng.choice(_SCRIPTS)
            add("".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 3))))
            continue
        syllables = (
            rng.choice(_ONSETS) + rng.choice("aeiou") + rng.choice(_CODAS) for _ in range(rng.randint(1, 4))
        )
        word = "".join(syllables)
        add(rng.choice((" ", " ", "")) + rng.choice((word, word, word.capitalize())))
    vocabulary[END] = size - 1
    end = {"id": size - 1, "content": END, "special": True, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [end | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)],
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
        }
    )
