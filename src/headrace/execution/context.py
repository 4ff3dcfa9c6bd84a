"""What a GPU needs before the first kernel and can have while Python still imports: a context, a known compiler."""

from __future__ import annotations

import contextlib
import ctypes
import os

__all__ = ["prepare"]


def prepare() -> None:
    """Create the context, and have Triton hash its own libraries: half a gigabyte, in every process, for its cache.

    Neither takes time beside imports: the driver and the hashing leave Python's lock to others.
    """
    if _create_context():
        with contextlib.suppress(ImportError):  # another place in another version: hashed when first needed
            from triton.runtime.cache import triton_key

            triton_key()


def _create_context() -> bool:
    """Create the first device's primary context, which the CUDA runtime then uses too; True if it is there.

    Without a driver or a device nothing happens: torch says what is missing when it is asked for one.
    """
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch does; read once, by cuInit
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    device, context = ctypes.c_int(), ctypes.c_void_p()
    return bool(
        driver.cuInit(0) == 0
        and driver.cuDeviceGet(ctypes.byref(device), 0) == 0
        and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    )
