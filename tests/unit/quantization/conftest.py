"""What the tests of ``verify`` and of ``quality`` measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.tiny_folder import GROUPED, write_llama


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements are kept here and nowhere else."""
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama."""
    return write_llama(tmp_path_factory.mktemp("m") / "llama", **GROUPED)
