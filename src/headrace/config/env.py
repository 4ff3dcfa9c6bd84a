"""The environment variables that Headrace reads: all of them, and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

from headrace.errors import ConfigError

__all__ = ["VARIABLES", "api_keys", "home", "kernel_cache", "log_level", "secrets_folder", "variable"]

VARIABLES = {
    "HEADRACE_HOME": "Where models and caches are kept; default: `headrace` in the user's cache folder.",
    "TRITON_CACHE_DIR": "Where compiled GPU kernels are kept; default: the folder `kernels` of `HEADRACE_HOME`.",
    "HEADRACE_SECRETS_DIR": "Folder of mounted secrets; default: `/secrets`.",
    "HEADRACE_LOG": "Log level: `debug`, `info`, `warning` or `error`; default: `info`.",
    "HEADRACE_API_KEYS": "API keys of the server, separated by commas.",
    "TRUSS_SECRET_<name>": "A secret; wins over the file of that name.",
    "HF_TOKEN, HUGGING_FACE_HUB_TOKEN": "The secret `hf_access_token`.",
}
_LEVELS = ("debug", "info", "warning", "error")


def home() -> Path:
    """Where models and caches are kept: ``HEADRACE_HOME``, else ``headrace`` in the user's cache folder."""
    if chosen := os.environ.get("HEADRACE_HOME"):
        return Path(chosen).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches).expanduser() if caches else Path.home() / ".cache") / "headrace"


def kernel_cache() -> Path | None:
    """Where compiled GPU kernels are kept, so that what carries HEADRACE_HOME carries them: its folder ``kernels``.

    None where the user's own TRITON_CACHE_DIR says otherwise.
    """
    return None if os.environ.get("TRITON_CACHE_DIR") else home() / "kernels"


def secrets_folder() -> Path:
    """Where mounted secrets lie: ``HEADRACE_SECRETS_DIR``, else ``/secrets``."""
    return Path(os.environ.get("HEADRACE_SECRETS_DIR") or "/secrets")


def log_level() -> str:
    """``HEADRACE_LOG``. Raises ConfigError for a word that is no level."""
    level = os.environ.get("HEADRACE_LOG", "info").lower()
    if level not in _LEVELS:
        raise ConfigError(f"HEADRACE_LOG is {level[:40]!r}; expected one of {', '.join(_LEVELS)}")
    return level


def api_keys() -> tuple[str, ...]:
    """``HEADRACE_API_KEYS``: keys that open the server, separated by commas."""
    given = os.environ.get("HEADRACE_API_KEYS", "")
    return tuple(key.strip() for key in given.split(",") if key.strip())


def variable(name: str) -> str | None:
    """One variable by name, for secrets whose names users choose; None when absent."""
    return os.environ.get(name)
