"""Tests of single kernels and steps compile what they launch; that a start compiles all is test_start_cuda's."""

from __future__ import annotations

import pytest

from headrace.execution import encode_warm_up, warm_up


@pytest.fixture(autouse=True)
def nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (encode_warm_up, warm_up):
        monkeypatch.setattr(module, "rehearse", lambda *args, **kwargs: 0)
