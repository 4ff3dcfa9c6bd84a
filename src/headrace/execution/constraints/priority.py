"""Work that must not be felt."""

from __future__ import annotations

import contextlib
import os
import threading

__all__ = ["come_forward", "stand_aside", "stand_back"]


def stand_aside() -> None:
    """From now on this thread gets a tenth of what a thread of the model gets where both want a processor."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def stand_back(thread: int | None = None) -> None:
    """From now on a thread (on Linux; elsewhere its process) runs when the processors have nothing else to do.

    There is no way back without privileges. The nice value tells ThreadGovernor that these are no rivals.

    Args:
        thread: native id, also of another process of this user; None: the calling one.
    """
    with contextlib.suppress(OSError, AttributeError):
        thread = threading.get_native_id() if thread is None else thread
        os.setpriority(os.PRIO_PROCESS, thread, 19)
        os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def come_forward(thread: int) -> None:
    """Undo `stand_back` where this process may; else nothing changes."""
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, thread, 0)
