"""The choice of an implementation: by operation, function and kind of device, made once."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

__all__ = ["kernel"]

# The file of an operation's folder that serves a device; where it (or a function in it) is missing, the
# reference serves instead, so that a new operation is right everywhere before it is fast anywhere.
_FILES = {"cpu": "cpu", "cuda": "triton"}


@functools.cache
def kernel(operation: str, function: str, device: str) -> Callable[..., Any]:
    """The best implementation of ``function`` of ``headrace.kernels.<operation>`` for a device type."""
    folder = f"headrace.kernels.{operation}"
    file = _FILES.get(device)
    if file is not None and importlib.util.find_spec(f"{folder}.{file}") is not None:
        found = getattr(importlib.import_module(f"{folder}.{file}"), function, None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return getattr(importlib.import_module(f"{folder}.reference"), function)  # type: ignore[no-any-return]
