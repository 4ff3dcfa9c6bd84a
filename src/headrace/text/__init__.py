"""Text to tokens and back: tokenizers, chat templates, incremental detokenization, stop strings."""

from __future__ import annotations

from headrace.text.detokenizer import Detokenizer
from headrace.text.stopping import StopMatcher
from headrace.text.template import ChatTemplate
from headrace.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "StopMatcher", "Tokenizer"]
