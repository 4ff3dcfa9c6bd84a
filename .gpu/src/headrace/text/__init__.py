"""Text to tokens and back: tokenizers, chat templates, incremental detokenization. Never imports torch."""
