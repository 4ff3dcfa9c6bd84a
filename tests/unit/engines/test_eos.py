"""Which tokens end an answer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.engines.generate_build import eos_token_ids
from headrace.errors import UnsupportedCheckpoint


def ids(config: dict[str, Any], generation: dict[str, Any]) -> tuple[int, ...]:
    checkpoint: Any = SimpleNamespace(path=Path("m"), config=config, generation_config=generation)
    return eos_token_ids(checkpoint, None)


def test_every_file_counts_and_none_twice() -> None:
    assert ids({"eos_token_id": 2}, {"eos_token_id": [7, 2, 9]}) == (7, 2, 9)
    assert ids({"eos_token_id": None}, {}) == ()
    assert ids({"eos_token_id": 0}, {}) == (0,)


@pytest.mark.parametrize("wrong", ["</s>", [2, "</s>"], 2.0, {"id": 2}])
def test_what_is_no_id_is_refused(wrong: Any) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="eos_token_id"):
        ids({}, {"eos_token_id": wrong})


def test_turns_of_harmony_end_with_calls_too() -> None:
    """Files that were saved anew may name <|return|> alone; of other families such a token ends nothing."""
    known = {"<|return|>": 12, "<|call|>": 13}
    tokenizer: Any = SimpleNamespace(eos_ids=(12,), special_ids={12, 13}, token_to_id=known.get)
    for architecture, wanted in (("GptOssForCausalLM", (12, 2, 13)), ("LlamaForCausalLM", (12, 2))):
        config = {"architectures": [architecture], "eos_token_id": [12, 2]}
        checkpoint: Any = SimpleNamespace(path=Path("m"), config=config, generation_config={})
        assert eos_token_ids(checkpoint, tokenizer) == wanted
    tokenizer.special_ids = {12}  # text that only looks like it
    checkpoint.config["architectures"] = ["GptOssForCausalLM"]
    assert eos_token_ids(checkpoint, tokenizer) == (12, 2)
