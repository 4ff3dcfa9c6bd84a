"""Packaged models, for tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.errors import HeadraceError


def packaged(name: str) -> Path:
    """Files of a packaged model; the test is skipped, with the reason, when they cannot be had."""
    from headrace.checkpoints.resolve import resolve

    try:
        return resolve(name)
    except HeadraceError as error:
        pytest.skip(f"packaged model {name}: {error}")
