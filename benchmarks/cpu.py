"""A packaged LLM on the CPU: ours, llama.cpp and transformers on the same file, one after another, in rounds.

    python -m benchmarks.cpu MODEL.gguf --llamacpp-python /path/to/venv/bin/python [--transformers] [--rounds 3]

Prints one JSON object a line: decode tokens/s at 1 and 8 requests (8 is ours alone), prefill tokens/s of 256 tokens,
start-up seconds. Each value is the best of the rounds; ``floor`` is what reading the file's bytes once a token
would allow at the memory bandwidth measured in this run. Every contender runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

OUTPUT, PROMPT, PREFILL = 96, 16, 256


def prompt(index: int, length: int) -> list[int]:
    """Token ids that share no prefix with another prompt's."""
    return [(index * 7919 + j * 31) % 40000 + 10 for j in range(length)]


def ours(path: str, options: dict[str, Any]) -> dict[str, float]:
    from headrace import LLM
    from headrace.types import SamplingParams

    began = time.perf_counter()
    with LLM(path, prefix_caching=False, **options) as llm:
        result = {"start": time.perf_counter() - began}
        decode = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
        one = SamplingParams(max_tokens=1, temperature=0.0)
        llm.generate([prompt(99, PROMPT)], decode)
        for count in (1, 8):
            prompts = [prompt(i, PROMPT) for i in range(count)]
            began = time.perf_counter()
            llm.generate(prompts, one)
            first = time.perf_counter() - began
            began = time.perf_counter()
            llm.generate(prompts, decode)
            result[f"decode_{count}"] = count * (OUTPUT - 1) / (time.perf_counter() - began - first)
        began = time.perf_counter()
        llm.generate([prompt(7, PREFILL)], one)
        result["prefill"] = PREFILL / (time.perf_counter() - began)
    return result


LLAMA = """
import json, sys, time
began = time.perf_counter()
from llama_cpp import Llama
path, prompt, prefill, output = sys.argv[1], *json.loads(sys.argv[2])
m = Llama(path, n_ctx=1024, n_batch=512, n_threads=int(sys.argv[3]), n_threads_batch=int(sys.argv[3]), verbose=False)
r = {"start": time.perf_counter() - began}
m.eval(prompt); m.reset()
t = time.perf_counter(); m.eval(prefill); r["prefill"] = len(prefill) / (time.perf_counter() - t)
m.reset(); m.eval(prompt)
t = time.perf_counter()
for i in range(output):
    m.eval([prefill[i]])
r["decode_1"] = output / (time.perf_counter() - t)
print(json.dumps(r))
"""


def llama(python: str, path: str, threads: int) -> dict[str, float]:
    lists = json.dumps([prompt(0, PROMPT), prompt(7, PREFILL), OUTPUT])
    command = [python, "-c", LLAMA, path, lists, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def reference(path: str) -> dict[str, float]:
    """transformers in float32, its own generate."""
    import torch
    from transformers import AutoModelForCausalLM

    folder, file = os.path.split(path)
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    result = {"start": time.perf_counter() - began}
    ids, long = torch.tensor([prompt(0, PROMPT)]), torch.tensor([prompt(7, PREFILL)])
    with torch.inference_mode():
        model(long)
        began = time.perf_counter()
        model(long)
        result["prefill"] = PREFILL / (time.perf_counter() - began)
        began = time.perf_counter()
        model.generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False)
        result["decode_1"] = 32 / (time.perf_counter() - began)
    return result


def bandwidth() -> float:
    """Bytes/s that a sum over 256 MB reads at, all threads."""
    import torch

    data = torch.zeros(32 << 20, dtype=torch.int64)
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - began)
    return data.nbytes / best


def child(kind: str, path: str, options: str) -> dict[str, float]:
    """One contender in a fresh interpreter."""
    command = [sys.executable, "-m", "benchmarks.cpu", path, "--only", kind, "--options", options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--llamacpp-python", help="interpreter that has llama-cpp-python")
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--options", default="{}", help="fields of EngineSpec for ours, JSON")
    parser.add_argument("--only", choices=["ours", "transformers", "bandwidth"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    path = str(Path(args.model).resolve())
    if args.only:
        run = {"ours": lambda: ours(path, json.loads(args.options)), "transformers": lambda: reference(path)}
        print(json.dumps(run[args.only]() if args.only in run else {"bytes_s": bandwidth()}))
        return
    best: dict[tuple[str, str], float] = {}
    load = []
    for _ in range(args.rounds):
        load.append(os.getloadavg()[0])
        found = {"ours": child("ours", path, args.options)}
        if args.llamacpp_python:
            for threads in (1, os.cpu_count() or 1):
                found[f"llama.cpp/{threads}"] = llama(args.llamacpp_python, path, threads)
        if args.transformers:
            found["transformers float32"] = child("transformers", path, "{}")
        for who, results in found.items():
            for metric, value in results.items():
                choose = min if metric == "start" else max
                best[who, metric] = choose(best.get((who, metric), value), value)
    size, rate = Path(path).stat().st_size, child("bandwidth", path, "{}")["bytes_s"]
    for (who, metric), value in best.items():
        row = {
            "bench": "cpu",
            "model": Path(path).name,
            "who": who,
            "metric": metric,
            "value": round(value, 2),
        }
        if metric == "decode_1":
            row["floor"] = round(rate / size, 1)
        print(json.dumps({**row, "rounds": args.rounds, "load": [round(value, 1) for value in load]}))


if __name__ == "__main__":
    main()
