"""A tokenizer out of a GGUF file's metadata, built with the `tokenizers` library.

GGUF holds vocabulary, merges and a short name for how text is cut before merging (`tokenizer.ggml.pre`); the
regular expressions behind those names are the published ones of the model families.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from headrace.errors import UnsupportedCheckpoint, nearest

__all__ = ["build_tokenizer"]

_NORMAL, _CONTROL, _USER, _BYTE = 1, 3, 4, 6

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _MARKS
_QWEN2 = _CONTRACTIONS + _WORDS + r"|\p{N}" + _MARKS
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}" + _SLASHED
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}" + _SLASHED
)
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

# tokenizer.ggml.pre -> the regular expressions that cut text, applied one after another
_SPLITS: dict[str, tuple[str, ...]] = {}
for _names, _expressions in (
    ("gpt-2 phi-2 mpt olmo jais trillion granite-docling jina-es jina-de jina-v2-es jina-v2-de", (_GPT2,)),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b", (r"\p{N}", _GPT2)),
    ("llama3 llama-v3 llama-bpe falcon3 pixtral lfm2 dbrx smaug-bpe", (_LLAMA3,)),
    ("qwen2 deepseek-r1-qwen stablelm2 hunyuan megrez", (_QWEN2,)),
    ("tekken", (_TEKKEN,)),
    ("gpt-4o llama4 kimi-k2-o200k", (_GPT4O,)),
    ("deepseek-v3 deepseek3", _DEEPSEEK3),
    ("default", _DEFAULT),
):
    _SPLITS.update(dict.fromkeys(_names.split(), _expressions))

# Vocabularies in which a whole word that is a token is taken as it is, without looking at merges.
_WHOLE_WORDS = frozenset(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"))
_COMPOSED = frozenset(("qwen2", "deepseek-r1-qwen"))  # text is brought to NFC first
_START_BY_DEFAULT = frozenset(("llama3", "llama-v3", "llama-bpe", "tekken"))


class _Vocabulary:
    """The tokenizer metadata of one file, checked."""

    def __init__(self, metadata: dict[str, Any], path: Path) -> None:
        self.metadata = metadata
        self.path = path
        self.tokens: list[str] = self.get("tokens", [])
        self.types: list[int] = self.get("token_type") or [_NORMAL] * len(self.tokens)
        self.pre = str(self.get("pre", "default"))
        if not self.tokens or not all(isinstance(token, str) for token in self.tokens):
            raise UnsupportedCheckpoint(
                f"{path} holds no vocabulary; put the model's tokenizer.json beside it"
            )
        if len(self.types) != len(self.tokens):
            raise UnsupportedCheckpoint(
                f"{path}: {len(self.tokens)} tokens have {len(self.types)} token types"
            )

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def special(self, key: str) -> str | None:
        """Text of the token whose id stands under ``<key>_token_id``."""
        index = self.get(f"{key}_token_id")
        return self.tokens[index] if isinstance(index, int) and 0 <= index < len(self.tokens) else None

    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def merges(self) -> list[tuple[str, str]]:
        pairs = [tuple(merge.split(" ", 1)) for merge in self.get("merges", [])]
        if any(len(pair) != 2 for pair in pairs):
            raise UnsupportedCheckpoint(f"{self.path}: tokenizer.ggml.merges holds an entry that is no pair")
        return [(left, right) for left, right in pairs]


def build_tokenizer(metadata: dict[str, Any], path: Path) -> Tokenizer:
    """The file's tokenizer.

    Args:
        metadata: of the GGUF header.
        path: for messages.

    Raises UnsupportedCheckpoint for a kind of vocabulary or a way of cutting text that is not known here: a
    near miss would give a model other tokens than it was trained on.
    """
    vocabulary = _Vocabulary(metadata, path)
    kind = str(vocabulary.get("model", ""))
    if kind not in _KINDS:
        raise UnsupportedCheckpoint(
            f"{path} has a {kind!r} vocabulary; known are {', '.join(_KINDS)}. Put the model's "
            "tokenizer.json beside the file"
        )
    tokenizer = _KINDS[kind](vocabulary)
    _add_specials(tokenizer, vocabulary)
    _add_template(tokenizer, vocabulary, kind)
    return tokenizer


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    """GPT-2's byte-level BPE and its descendants."""
    pre = vocabulary.pre
    if pre not in _SPLITS:
        raise UnsupportedCheckpoint(
            f"{vocabulary.path} cuts text in the way {pre!r} (tokenizer.ggml.pre), unknown here"
            f"{nearest(pre, _SPLITS)}. Put the model's tokenizer.json beside the file"
        )
    model = models.BPE(vocabulary.ids(), vocabulary.merges(), ignore_merges=pre in _WHOLE_WORDS)
    tokenizer = Tokenizer(model)
    if pre in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(one), "isolated") for one in _SPLITS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    """SentencePiece BPE with byte fallback: Llama 1 and 2, Mistral 7B, Phi-3, Gemma."""
    prefix = bool(vocabulary.get("add_space_prefix", True))
    # Runs of spaces are stored as such where they are whole tokens, yet looked up as "▁" after normalization.
    tokens = ["▁" * len(t) if " " in t and not t.strip(" ") else t for t in vocabulary.tokens]
    vocabulary.tokens = tokens
    ids = vocabulary.ids()
    merges = vocabulary.merges() or _implied_merges(ids, vocabulary)
    tokenizer = Tokenizer(
        models.BPE(ids, merges, fuse_unk=True, byte_fallback=True, unk_token=vocabulary.special("unknown"))
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _implied_merges(ids: dict[str, int], vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """All ways to make a token from two others, best scored token first.

    That is what SentencePiece does at run time: it always joins the pair whose result has the highest score.
    """
    scores = vocabulary.get("scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise UnsupportedCheckpoint(f"{vocabulary.path} has neither merges nor one score for each token")
    if str(vocabulary.metadata.get("general.architecture", "")).startswith("gemma"):
        # Gemma's tokens stand in merge order, while some of its scores do not follow it.
        scores = [-float(index) for index in range(len(scores))]
    found: list[tuple[float, int, int, str, str]] = []
    for index, (token, score) in enumerate(zip(vocabulary.tokens, scores)):
        if vocabulary.types[index] in (_NORMAL, _USER):
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in ids and right in ids:
                    found.append((-score, cut, len(right), left, right))
    found.sort(key=lambda entry: entry[:3])
    return [(left, right) for *_, left, right in found]


def _wordpiece(vocabulary: _Vocabulary) -> Tokenizer:
    """BERT's WordPiece. The converter marks word starts with "▁" instead of continuations with "##"."""
    tokens = []
    for token, kind in zip(vocabulary.tokens, vocabulary.types):
        if kind in (_CONTROL, _USER) or (token.startswith("[") and token.endswith("]")):
            tokens.append(token)
        else:
            tokens.append(token[1:] if token.startswith("▁") else f"##{token}")
    vocabulary.tokens = tokens
    cased = any(token.isascii() and token.isalpha() and token.isupper() for token in tokens)
    unknown = vocabulary.special("unknown") or "[UNK]"
    tokenizer = Tokenizer(models.WordPiece(vocabulary.ids(), unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


_KINDS: dict[str, Callable[[_Vocabulary], Tokenizer]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "bert": _wordpiece,
}


def _add_specials(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Control tokens are special; user-defined ones are plain text that is never cut."""
    pairs = list(zip(vocabulary.tokens, vocabulary.types))
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text, kind in pairs if kind == _CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False, special=False) for text, kind in pairs if kind == _USER]
    )


def _add_template(tokenizer: Tokenizer, vocabulary: _Vocabulary, kind: str) -> None:
    """What stands before and after every text."""
    starts = {"llama": True, "bert": True}.get(kind, vocabulary.pre in _START_BY_DEFAULT)
    before = [vocabulary.special("bos") or vocabulary.special("cls")]
    after = [vocabulary.special("seperator") or vocabulary.special("eos")]  # llama.cpp spells it so
    if kind == "bert":
        before = [vocabulary.special("cls") or vocabulary.special("bos") or "[CLS]"]
        after = [vocabulary.special("seperator") or "[SEP]"]
    if not vocabulary.get("add_bos_token", starts):
        before = []
    if not vocabulary.get("add_eos_token", kind == "bert"):
        after = []
    parts = [*filter(None, before), "$A", *filter(None, after)]
    if len(parts) == 1:
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=parts,
        pair=[*parts, *(f"{part}:1" for part in ["$B", *filter(None, after)])],
        special_tokens=[(text, tokenizer.token_to_id(text)) for text in dict.fromkeys(parts) if text != "$A"],
    )
