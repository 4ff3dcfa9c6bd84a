"""Work that must not be felt."""

from __future__ import annotations

import contextlib
import os
import threading

__all__ = ["stand_back"]


def stand_back() -> None:
    """From now on this thread (on Linux; elsewhere its process) runs when the processors have nothing else to do.

    There is no way back without privileges. The nice value tells ThreadGovernor that these are no rivals.
    """
    with contextlib.suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, 19)
        os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
