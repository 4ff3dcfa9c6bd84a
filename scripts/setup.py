"""Install headrace into this virtual environment: ``python scripts/setup.py serve|dev``.

Without an NVIDIA GPU constraints.txt holds torch to the CPU build; with one, constraints-gpu.txt applies.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(extra: str) -> None:
    has_gpu = shutil.which("nvidia-smi") is not None
    constraints = ROOT / ("constraints-gpu.txt" if has_gpu else "constraints.txt")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    extras = "serve,dev" if extra == "dev" else "serve"
    print(
        f"headrace: setting up {extras} ({'GPU' if has_gpu else 'CPU'}), once; this takes a minute or two",
        flush=True,
    )
    if not has_gpu:
        # First and alone: with the CPU build in place no later requirement pulls a CUDA build.
        subprocess.run([*pip, "-c", str(constraints), "torch"], check=True)
    subprocess.run([*pip, "-c", str(constraints), "-e", f"{ROOT}[{extras}]"], check=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "serve")
