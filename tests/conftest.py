"""Fixtures that every kind of test may use, and settings that must stand before anything imports Triton."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.checkpoints.base import Checkpoint
from support.packaged import packaged

# Processes that tests start find the package too, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[1] / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels of tests/parity/test_triton_* run on the CPU


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
