"""`headrace` as benchmarks/startup.py starts it; with --made-up a generator's weights are made on the device."""

from __future__ import annotations

import sys

from headrace.engines import child, core_process
from headrace.engines.stages import Stages


def _core() -> None:
    """The core's process, with weights made up instead of read."""
    load = core_process._import_all

    def import_all(device: str, stages: Stages) -> None:
        load(device, stages)
        from headrace.engines import generate_build
        from headrace.models.loading import random_weights
        from headrace.models.registry import read_config

        generate_build.load_weights = lambda spec, checkpoint, dtype, device, progress: random_weights(  # type: ignore[assignment]
            read_config(checkpoint.config), dtype=dtype, device=device
        )

    core_process._import_all = import_all
    core_process.main()


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[0] == "--core":
        del sys.argv[1]
        _core()
    else:
        if words[0] == "--made-up":
            child.MODULE = ("benchmarks.startup_server", "--core")
            words = words[1:]
        from headrace.cli.main import main

        sys.exit(main(words))
