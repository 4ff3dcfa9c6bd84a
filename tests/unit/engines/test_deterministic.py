"""Where sums would follow the batch, deterministic mode is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.config.spec import EngineSpec
from headrace.engines.build import build
from headrace.errors import ConfigError
from support.tiny_folder import write_llama


def test_a_cpu_refuses(tmp_path: Path) -> None:
    folder = str(write_llama(tmp_path / "llama"))
    build(EngineSpec(model=folder, device="cpu"))
    with pytest.raises(ConfigError, match="this is a CPU") as caught:
        build(EngineSpec(model=folder, device="cpu", deterministic=True))
    assert caught.value.param == "deterministic"


def test_one_pass_models_refuse(tmp_path: Path) -> None:
    folder = str(write_llama(tmp_path / "llama"))
    with pytest.raises(ConfigError, match="a model of one pass"):
        build(EngineSpec(model=folder, device="cpu", pooling="mean", deterministic=True))
