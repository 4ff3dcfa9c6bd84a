"""`make bench`: the benchmarks that make sense on this machine, one after another; each prints JSON lines.

On a CPU the packaged models: generation, encoding, the front end. With a GPU also random weights of real shapes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

from headrace.checkpoints.resolve import resolve

CPU: dict[str, list[str]] = {"cpu": ["--transformers"], "encode": [], "frontend": []}
GPU: dict[str, list[str]] = {
    "generate": ["--model", "qwen3-0.6b"],
    "kernels": [],
    "attention": [],
    "encode": ["--shapes", "bge-large", "qwen3-embedding-0.6b"],
}


def main() -> int:
    """Run them all; the exit code counts those that failed."""
    failed = 0
    gpu = shutil.which("nvidia-smi") is not None
    for name, options in (GPU if gpu else CPU).items():
        arguments = [str(resolve("smollm2-135m")), *options] if name == "cpu" else options
        print(f"# benchmarks.{name} {' '.join(arguments)}", flush=True)
        failed += (
            subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], check=False).returncode
            != 0
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
