"""Calls of a client library, ours or the one it stands in for, against a scripted server."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from support.scripted_server import Recorded, ScriptedServer

__all__ = ["batch_number", "client", "preference"]

QUICK = {"timeout_s": 30.0, "initial_backoff_ms": 50}


def client(lib: ModuleType, server: ScriptedServer) -> Any:
    return lib.PerformanceClient(server.url, "KEY")


def preference(lib: ModuleType, **fields: Any) -> Any:
    return lib.RequestProcessingPreference(**{**QUICK, **fields})


def batch_number(request: Recorded) -> int:
    return int(request.headers["x-baseten-customer-request-id"].split("-")[2])
