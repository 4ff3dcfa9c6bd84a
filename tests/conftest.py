"""Fixtures that every kind of test may use, and settings that must stand before anything imports Triton."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.checkpoints.base import Checkpoint
from headrace.errors import HeadraceError
from support.packaged import packaged

# Processes that tests start find the package too, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[1] / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

for name in ("no_proxy", "NO_PROXY"):  # servers that tests start are here, whatever proxy leads elsewhere
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost"]))

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels of tests/parity/test_triton_* run on the CPU


def pytest_collection_finish(session: pytest.Session) -> None:
    """Packaged models are fetched before the first test that needs one: its time limit is not for a download."""
    if session.config.option.collectonly:
        return
    uses = {"smollm2_path", "smollm2", "minilm_path"}
    if any(item.get_closest_marker("models") or uses & set(item.fixturenames) for item in session.items):
        from headrace.checkpoints.resolve import resolve

        for name in ("smollm2-135m", "minilm"):
            with contextlib.suppress(HeadraceError):  # told where it is needed
                resolve(name)


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A command that a test runs in this process sends the package's logs to its captured standard error."""
    log = logging.getLogger("headrace")
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:] = handlers
    log.setLevel(level)
    log.propagate = propagate


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return packaged("smollm2-135m")


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    return packaged("minilm")


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Checkpoint:
    from headrace.checkpoints.resolve import open_checkpoint

    return open_checkpoint(smollm2_path)
