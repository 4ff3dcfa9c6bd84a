"""Start-up: process start to first token, broken down, without reading weights.

    python -m benchmarks.startup --model qwen3-0.6b --record

Each measurement is a process of its own: once with an empty cache of compiled kernels, once with a filled one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

from benchmarks.common import Recorder, arguments


def child(name: str, began: float) -> None:
    """What a core does until its first token; prints seconds since ``began`` for each stage."""
    stages = {"python": time.time() - began}
    import torch

    from benchmarks.common import model_config
    from headrace.engines.bench.cases import Case, measure
    from headrace.engines.bench.cores import build_core, random_model

    stages["imports"] = time.time() - began
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = random_model(model_config(name), dtype=dtype, device=torch.device(device))
    stages["weights"] = time.time() - began
    core = build_core(model, [(1, 128, 2)], eager=device == "cpu", step_tokens=8192)
    stages["cache"] = time.time() - began
    measure(core, Case(1, 128, 1), model.config.vocab_size, seed=1)
    stages["first_token"] = time.time() - began
    measure(core, Case(1, 128, 2), model.config.vocab_size, seed=2)
    stages["first_decode_step"] = time.time() - began
    print(json.dumps(stages))


def measured(model: str, cache: str | None) -> dict[str, float]:
    """Stages of a process of its own; ``cache``: folder of compiled kernels, None: the usual one."""
    began = repr(time.time())
    command = [sys.executable, "-m", "benchmarks.startup", "--model", model, "--child", began]
    environment = {**os.environ, **({} if cache is None else {"TRITON_CACHE_DIR": cache})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    stages: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return stages


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--warm", action="store_true", help="only with the kernels that are compiled already")
    parser.add_argument("--child", type=float, help="internal")
    args = parser.parse_args()
    if args.child is not None:
        child(args.model, args.child)
        return
    rows = []
    with tempfile.TemporaryDirectory() as empty:
        kept = os.environ.get("TRITON_CACHE_DIR")
        cold = {} if args.warm else {"cold kernels": empty}
        for case, cache in {**cold, "warm kernels": kept if args.warm else empty}.items():
            rows.append((case, measured(args.model, cache)))
    recorder = Recorder("startup", args)  # imports torch: after the measurements
    for case, stages in rows:
        recorder.row(
            model=args.model, precision="bfloat16", case=case, metric="seconds", value=stages["first_token"],
            stages={name: round(seconds, 2) for name, seconds in stages.items()},
        )  # fmt: skip


if __name__ == "__main__":
    main()
