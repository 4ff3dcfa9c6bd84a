"""A core from nothing: what it compiles at start, and what requests then compile, as JSON.

Run as a program with an empty TRITON_CACHE_DIR: a process has compiled nothing yet.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch

from headrace.config.spec import EngineSpec
from headrace.engines.build import build
from headrace.execution.device_memory import num_device_allocations
from headrace.types import EncodeParams, EncodeTask, Request, SamplingParams

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 4},
    {"temperature": 1.0, "top_p": 0.999, "seed": 5},
    {"temperature": 0.0, "logprobs": 5},
    {"temperature": 0.0, "prompt_logprobs": 2},
    {
        "temperature": 1.0,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.1,
        "seed": 6,
    },
    {"temperature": 1.0, "logit_bias": {3: 2.0}, "min_tokens": 3, "seed": 7},
]


def compiled() -> set[str]:
    """Entries of Triton's cache, our own notes aside."""
    return {name for name in os.listdir(os.environ["TRITON_CACHE_DIR"]) if not name.startswith("headrace-")}


def requests(name: str, count: int, longest: int, vocab: int, *, encodes: bool) -> list[Request]:
    rng = random.Random(f"{count} {longest}")
    found = []
    for i in range(count):
        ids = tuple(rng.randrange(vocab) for _ in range(rng.randint(min(2, longest), longest)))
        if encodes:
            task = EncodeTask.EMBED_ALL if i % 7 == 3 else EncodeTask.EMBED
            found.append(Request(id=f"{name}{i}", token_ids=ids, encode=EncodeParams(task=task)))
        else:
            sampling = SamplingParams(max_tokens=3 + i % 9, ignore_eos=True, **KINDS[i % len(KINDS)])
            found.append(Request(id=f"{name}{i}", token_ids=ids, sampling=sampling))
    return found


def run(core: Any, some: list[Request]) -> dict[str, list[Any]]:
    """Tokens by request, or the first numbers of its vector."""
    found: dict[str, list[Any]] = {request.id: [] for request in some}
    core.add(some)
    while core.has_work():
        for output in core.step():
            assert not output.error, output
            if hasattr(output, "token_ids"):
                found[output.request_id] += output.token_ids
            else:
                found[output.request_id] = list(output.data[:64])
    return found


def main(folder: str, settings: str) -> None:
    told: list[tuple[int, int]] = []
    spec = EngineSpec(
        model=folder,
        path=Path(folder),
        prefix_caching=False,
        kv_cache_bytes=400 << 20,
        **json.loads(settings),
    )
    core, ready = build(spec, on_compiling=lambda done, total: told.append((done, total)))
    encodes = ready.engine in ("bert", "embed")
    at_start, memory = compiled(), num_device_allocations(torch.device("cuda"))
    room = ready.max_model_len - (0 if encodes else 20)
    wanted = ((1, 30), (2, 5), (8, 500), (48, 60), (100, 20), (16, 3), (33, 2), (3, room))
    shapes = [(count, min(longest, room)) for count, longest in wanted]
    answers = [run(core, requests("a", *shape, ready.vocab_size, encodes=encodes)) for shape in shapes]
    late = compiled() - at_start
    turns = 0
    while core.idle():
        turns += 1
    again = [run(core, requests("a", *shape, ready.vocab_size, encodes=encodes)) for shape in shapes[:2]]
    names = sorted(
        {file.stem for entry in late for file in (Path(os.environ["TRITON_CACHE_DIR"]) / entry).iterdir()}
    )
    print(
        json.dumps(
            {
                "told": told,
                "start": ready.summary["start"],
                "at_start": len(at_start),
                "late": names,
                "allocations": num_device_allocations(torch.device("cuda")) - memory,
                "idle_turns": turns,
                "same": again == answers[:2],
                "answers": answers,
            }
        )
    )
    core.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
