"""Shapes of kernels as measured: ``tuned/<gpu>.json`` beside an operation's code."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

__all__ = ["tuned"]


@functools.cache
def tuned(folder: Path, device: torch.device) -> dict[str, list[Any]]:
    """The measurements for this GPU, or none.

    Args:
        folder: of the operation.
    """
    if device.type != "cuda":
        return {}
    name = torch.cuda.get_device_name(device).lower().replace(" ", "-")
    path = folder / "tuned" / f"{name}.json"
    if not path.exists():
        return {}
    table: dict[str, list[Any]] = json.loads(path.read_text())
    return table
