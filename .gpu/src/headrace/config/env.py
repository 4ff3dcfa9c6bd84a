"""The environment variables that Headrace reads: all of them, and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["home"]


def home() -> Path:
    """Where models and caches are kept: ``HEADRACE_HOME``, else ``headrace`` in the user's cache folder."""
    if chosen := os.environ.get("HEADRACE_HOME"):
        return Path(chosen).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches).expanduser() if caches else Path.home() / ".cache") / "headrace"
