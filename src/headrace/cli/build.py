"""Prepare a model for its starts: fetch it, check that it loads, and compile the kernels that it needs on this GPU.

All of it lies in HEADRACE_HOME (kernels in its folder kernels): in an image or on a volume it spares each new machine
with the same kind of GPU the download and the compiler.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.cli.options import add_model_arguments, specs

if TYPE_CHECKING:
    from headrace.config.spec import EngineSpec

EXAMPLES = """\
examples:
  headrace build Qwen/Qwen3-8B --dtype bfloat16        with the flags that serve will get
  HEADRACE_HOME=/image headrace build config.yaml      into a folder that a container image carries
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    parser.add_argument(
        "models", nargs="+", metavar="[NAME=]MODEL", help="name, folder, .gguf file, hub id or config.yaml"
    )
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Build each; 0 when all are ready."""
    for spec in specs(args, args.models):
        asyncio.run(_build(spec))
    return 0


async def _build(spec: EngineSpec) -> None:
    """Start a core as serve would, and end it."""
    import msgspec

    from headrace.checkpoints.resolve import resolve
    from headrace.config import env
    from headrace.engines.plan import plan_for
    from headrace.engines.process import start
    from headrace.llm.progress import LoadingBars

    plan = await asyncio.to_thread(plan_for, spec)
    print(f"{spec.name}: {plan.short()}", flush=True)
    plan.check_fits()
    if spec.path is None:
        path = await asyncio.to_thread(resolve, spec.model, spec.revision, spec.secret_name)
        spec = msgspec.structs.replace(spec, path=path)
    client = await start(spec, LoadingBars().of(spec.name))
    device = str(client.ready.summary.get("device", "cpu"))
    await client.close(drain=False)
    print(f"{spec.name}: loads from {spec.path}")
    if device == "cpu":
        print(f"{spec.name}: runs on the CPU here, for which nothing is compiled")
        return
    folder = env.kernel_cache() or Path(env.variable("TRITON_CACHE_DIR") or "")
    files = [file for file in folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    print(f"{spec.name}: kernels for this GPU are in {folder} ({size / 2**20:.1f} MiB in all)")
