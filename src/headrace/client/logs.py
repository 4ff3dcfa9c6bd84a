"""The client's logger. ``PERFORMANCE_CLIENT_LOG_LEVEL`` prints what it says without any set-up."""

from __future__ import annotations

import logging
import os

__all__ = ["log", "show_as_asked"]

log = logging.getLogger("headrace.client")
_LEVELS = {
    "off": logging.CRITICAL + 1,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": logging.DEBUG,
}
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def show_as_asked() -> None:
    """Set the level from the environment and write to standard error, unless logging goes somewhere already.

    ``off``, ``error``, ``warn``, ``info`` (hedges), ``debug`` (retries; ``trace`` is the same). Without the
    variable, and with any other value, nothing changes: warnings appear, as logging has it.
    """
    level = _LEVELS.get(os.environ.get("PERFORMANCE_CLIENT_LOG_LEVEL", "").strip().lower())
    if level is None:
        return
    log.setLevel(level)
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_FORMAT))
        log.addHandler(handler)
