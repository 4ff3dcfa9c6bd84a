"""Where Triton keeps what it compiles: beside the models, so that what carries these carries it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from headrace.config import env

__all__ = ["keep_kernels"]


def keep_kernels() -> None:
    """Set Triton's environment, before it is imported.

    A folder that can only be read (of an image) serves as it is; what it lacks is kept in Triton's own place, or in
    a temporary folder.
    """
    os.environ.setdefault(
        "TRITON_STORE_BINARY_ONLY", "1"
    )  # what is needed to load a kernel again, and no more
    folder = env.kernel_cache()
    if folder is None:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        folder = _linked(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder)


def _linked(folder: Path) -> Path:
    """A folder that can be written, with links to all that is in this one."""
    own = Path.home() / ".triton" / "cache"
    try:
        own.mkdir(parents=True, exist_ok=True)
        writable = os.access(own, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        own = Path(tempfile.mkdtemp(prefix="headrace-kernels-"))
    for entry in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(FileExistsError):
            (own / entry.name).symlink_to(entry)
    return own
