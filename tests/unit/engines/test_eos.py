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
