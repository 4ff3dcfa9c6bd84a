from __future__ import annotations

import importlib
from types import ModuleType

import pytest


@pytest.fixture(params=["headrace.client", "baseten_performance_client"])
def lib(request: pytest.FixtureRequest) -> ModuleType:
    """Ours, and the client that it stands in for: the same test must hold for both."""
    name: str = request.param
    if name == "headrace.client":
        return importlib.import_module(name)
    return pytest.importorskip(name)
