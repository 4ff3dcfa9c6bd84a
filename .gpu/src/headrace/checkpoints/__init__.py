"""Where weights come from, and how they are read lazily."""

from __future__ import annotations

from headrace.checkpoints.base import Checkpoint, PackedTensor, TensorInfo
from headrace.checkpoints.resolve import open_checkpoint, resolve

__all__ = ["Checkpoint", "PackedTensor", "TensorInfo", "open_checkpoint", "resolve"]
