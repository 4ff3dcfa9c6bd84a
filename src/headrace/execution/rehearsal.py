"""A model's Triton kernels before its first step: what steps would launch is found by taking them without launching."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from headrace.kernels.ahead import Note, Progress, noting
from headrace.kernels.launch import INTERPRETED

__all__ = ["rehearse"]

logger = logging.getLogger("headrace.core")


def rehearse(
    work: str,
    device: torch.device,
    steps: Callable[[], None],
    aside: AbstractContextManager[None],
    progress: Progress | None = None,
) -> int:
    """Compile the kernels that ``steps`` need, several at once, unless a note in Triton's cache says it was done.

    Args:
        work: all that decides which kernels these are (see Note).
        steps: run once, with nothing launched and zeros for results.
        aside: entered meanwhile; keeps what they leave behind out of the way.

    Returns: how many were compiled, or read from the cache.

    A step that fails when nothing is launched is told in the log; its kernels compile when they are first launched.
    """
    if INTERPRETED or device.type != "cuda":
        return 0
    note = Note(work, device)
    if note.exists():
        return 0
    whole = True
    with noting() as kernels:
        try:
            with aside, torch.inference_mode():
                steps()
        except Exception:  # a rehearsal that goes wrong costs time later, never the start
            whole = False
            logger.warning(
                "kernels were not all foreseen; the others compile when first needed", exc_info=True
            )
    count = len(kernels)
    kernels.compile(progress)
    if whole:
        note.write(count)
    return count
