"""End tokens that a checkpoint names and its model cannot write."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from headrace.config.spec import EngineSpec
from headrace.engines.build import build
from headrace.engines.generate import GenerateCore
from headrace.types import Request, SamplingParams
from support.tiny_folder import write_llama


def test_end_tokens_outside_the_vocabulary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are told and left out: to forbid them under min_tokens would be to write beside a row's logits."""
    folder = write_llama(tmp_path / "llama", eos_token_id=[2, 400, -1])
    with caplog.at_level(logging.WARNING, "headrace.core"):
        core, _ = build(EngineSpec(model=str(folder), device="cpu"))
    assert isinstance(core, GenerateCore)
    assert core.scheduler.eos_ids == {2}
    assert "[400, -1] are outside the vocabulary of 300" in caplog.text
    core.add(
        Request(id=str(i), token_ids=(5, 6), sampling=SamplingParams(max_tokens=4, min_tokens=3 * i, seed=i))
        for i in range(2)
    )
    errors = {}
    while core.has_work():
        errors |= {output.request_id: output.error for output in core.step() if output.finish_reason}
    assert errors == {"0": "", "1": ""}
