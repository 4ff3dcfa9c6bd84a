"""Settings that must stand before anything imports Triton."""

from __future__ import annotations

import os
import shutil

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels of tests/parity/test_triton_* run on the CPU
