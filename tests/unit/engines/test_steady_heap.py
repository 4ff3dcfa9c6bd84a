"""Large blocks of a CPU core come from the system one by one, whatever was freed before."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import ctypes, sys
import torch
from headrace.engines.memory import steady_heap

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    _fields_ = [(name, ctypes.c_size_t) for name in names]

look = ctypes.CDLL(None).mallinfo2
look.restype = Info
if sys.argv[1] == "steady":
    steady_heap()
for _ in range(3):
    torch.empty(24 << 20, dtype=torch.uint8)  # freed at once: glibc then keeps blocks of this size in its heap
before = look().hblkhd
held = torch.empty(6 << 20, dtype=torch.uint8)
print(look().hblkhd - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_large_blocks_do_not_enter_the_heap() -> None:
    def mapped(how: str) -> int:
        src = Path(__file__).parents[3] / "src"
        done = subprocess.run(
            [sys.executable, "-c", CODE, how],
            capture_output=True,
            text=True,
            timeout=150,
            cwd=src,
            check=True,
        )
        return int(done.stdout)

    assert mapped("as it comes") == 0  # else there is nothing to steady
    assert mapped("steady") >= 6 << 20
