"""Compiled kernels are kept under HEADRACE_HOME, and a folder that can only be read still serves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headrace.engines.kernel_cache import keep_kernels


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("TRITON_CACHE_DIR", "TRITON_STORE_BINARY_ONLY"):
        monkeypatch.setenv(name, "")  # so that what is set is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    return tmp_path / "home"


def test_beside_the_models(home: Path) -> None:
    keep_kernels()
    assert os.environ["TRITON_CACHE_DIR"] == str(home / "kernels")
    assert (home / "kernels").is_dir()


def test_what_the_user_says_holds(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    keep_kernels()
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"
    assert not home.exists()


def test_a_folder_that_can_only_be_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = home / "kernels" / "ABC"
    shipped.mkdir(parents=True)
    (shipped / "k.cubin").write_text("machine code")
    user = Path(os.environ["HOME"]) / ".triton" / "cache"
    closed = [home]
    access = os.access
    monkeypatch.setattr(
        "headrace.engines.kernel_cache.os.access",
        lambda path, mode: access(path, mode) and not any(Path(path).is_relative_to(one) for one in closed),
    )
    for _ in range(2):
        keep_kernels()
        assert os.environ.pop("TRITON_CACHE_DIR") == str(user)
        assert (user / "ABC" / "k.cubin").read_text() == "machine code"
    closed.append(user)
    keep_kernels()
    assert (Path(os.environ["TRITON_CACHE_DIR"]) / "ABC" / "k.cubin").read_text() == "machine code"
    assert Path(os.environ["TRITON_CACHE_DIR"]) not in (user, home / "kernels")
