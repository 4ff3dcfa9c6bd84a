"""Where the bytes of a GPU go, stage by stage: what the driver says is gone, and how much of it the allocator holds.

    python -m benchmarks.memory --model qwen3-0.6b --rows 256

`outside` is what no tensor explains: the context, loaded kernels, graphs. Kernels whose first launch takes more than
a MiB of it are named. Run alone on the device: the driver counts everybody.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.common import model_config

if TYPE_CHECKING:
    from headrace.engines.generate import GenerateCore
    from headrace.execution.graphs import GraphRunner

MIB = 1 << 20


class Meter:
    """Prints what each stage added, in MiB."""

    def __init__(self) -> None:
        self.last = (0, 0, 0)
        self.took: dict[str, int] = {}
        self.seen = 0
        self.began = time.perf_counter()

    def read(self) -> tuple[int, int, int]:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        return total - free - reserved, reserved, torch.cuda.memory_allocated()

    def mark(self, stage: str) -> None:
        now = self.read()
        outside, reserved, allocated = (round((a - b) / MIB, 1) for a, b in zip(now, self.last))
        peak = round((torch.cuda.max_memory_allocated() - self.last[2]) / MIB, 1)
        kernels = {name: round(size / MIB, 1) for name, size in self.took.items()}
        seconds = round(time.perf_counter() - self.began, 2)
        row: dict[str, Any] = {
            "stage": stage,
            "outside": outside,
            "reserved": reserved,
            "allocated": allocated,
        }
        row |= {"peak": peak, "s": seconds}
        print(json.dumps({**row, **({"kernels": kernels} if kernels else {})}), flush=True)
        self.took.clear()
        self.last = self.read()
        self.seen = self.last[0]
        torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()

    def watch(self) -> None:
        """Name the kernels that take memory of the driver."""
        import triton

        def look(what: str) -> Any:
            def hook(metadata: Any) -> None:
                if torch.cuda.is_current_stream_capturing():
                    return
                free, total = torch.cuda.mem_get_info()
                outside = total - free - torch.cuda.memory_reserved()
                if outside - self.seen > MIB:
                    name = what + str(metadata.get().get("name"))
                    self.took[name] = self.took.get(name, 0) + outside - self.seen
                    self.seen = outside

            return hook

        triton.knobs.runtime.launch_enter_hook.add(look("before "))
        triton.knobs.runtime.launch_exit_hook.add(look(""))


def _plain_capture() -> None:
    """Without what may not work here."""
    import headrace.execution.capture as module
    import headrace.execution.graphs as graphs

    def capture(self: Any, work: Any) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            work()
            self.stream.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            work()
            graph.capture_end()
        torch.cuda.synchronize()
        return graph.replay

    module.GraphMemory.capture = capture  # type: ignore[method-assign]
    graphs.borrowed = lambda tensor: tensor  # type: ignore[attr-defined]


def generate(args: argparse.Namespace, meter: Meter) -> None:
    from headrace.engines.bench.cores import build_core, quantize
    from headrace.execution.graphs import GraphRunner
    from headrace.models.loading import random_weights
    from headrace.models.registry import read_config

    config = dict(model_config(args.model))
    if args.layers:
        config["num_hidden_layers"] = args.layers
    model = random_weights(read_config(config), dtype=torch.bfloat16, device="cuda")
    meter.mark("weights")
    if args.quantization:
        quantize(model, args.quantization)
        meter.mark("quantized")
        torch.cuda.empty_cache()
        meter.mark("empty_cache")
    rows, length = args.rows, 16384 // args.rows if args.rows > 2 else 4096
    cache = torch.float8_e4m3fn if args.kv == "fp8" else None
    core = build_core(model, [(rows, length, 8), (2, 8192, 8)], eager=False, step_tokens=8192, cache=cache)
    meter.mark("cache and runner")
    runner, vocab = core.runner, model.config.vocab_size
    assert isinstance(runner, GraphRunner)
    plain = build_core(model, [(8, 1024, 8)], eager=True, step_tokens=8192, cache=cache)
    meter.mark("plain cache and runner")
    _run_plain(plain, vocab, meter)
    del plain
    torch.cuda.empty_cache()
    meter.mark("empty_cache")
    _capture(runner, rows, meter)
    _run(core, vocab, rows, meter)
    torch.cuda.empty_cache()
    meter.mark("empty_cache")


def _run_plain(core: GenerateCore, vocab: int, meter: Meter) -> None:
    from headrace.engines.bench.cases import Case, measure

    measure(core, Case(1, 8191, 1), vocab, seed=1)
    meter.mark("plain prefill 1x8191")
    measure(core, Case(8, 1024, 1), vocab, seed=2)
    meter.mark("plain prefill 8x1024")


def _capture(runner: GraphRunner, rows: int, meter: Meter) -> None:
    from headrace.execution.graph_keys import MIXED_TOKENS, GraphKey

    sizes = runner.ladders.decode_sizes
    try:
        runner.warm_up([rows])
    except Exception:
        import traceback

        traceback.print_exc()
        _plain_capture()
    meter.mark("first graph")
    for size in reversed(sizes[:-1]):
        runner.warm_up([size])
        meter.mark(f"tokens graph {size}")
    for size in (rows, max(1, rows // 2), 1):
        with torch.inference_mode():
            size = min(s for s in sizes if s >= size)
            runner._graph(GraphKey(size, size, "logits"))
        meter.mark(f"logits graph {size}")
    for size in (MIXED_TOKENS[-1], 4096, 1024, 512, 256, 128, 64, 32, 16):
        with torch.inference_mode():
            runner._graph(GraphKey(size, runner.ladders.seq_sizes[-1], "mixed"))
        meter.mark(f"mixed graph {size}")


def _run(core: GenerateCore, vocab: int, rows: int, meter: Meter) -> None:
    from headrace.engines.bench.cases import Case, measure

    measure(core, Case(2, 8000, 2), vocab, seed=3)
    meter.mark("run 2x8000/2")
    measure(core, Case(rows, 2, 4), vocab, seed=4)
    meter.mark(f"run {rows}x2/4 greedy")
    for name, sampling in (
        ("drawn", {"temperature": 1.0}),
        ("top_k", {"temperature": 1.0, "top_k": 40}),
        ("top_p", {"temperature": 1.0, "top_p": 0.95}),
        ("penalties", {"temperature": 1.0, "top_p": 0.5, "repetition_penalty": 1.1, "presence_penalty": 0.1}),
        ("logprobs", {"logprobs": 5}),
    ):
        measure(core, Case(rows, 2, 2), vocab, seed=5, **sampling)
        meter.mark(f"run {rows}x2/2 {name}")


def encode(args: argparse.Namespace, meter: Meter) -> None:
    import random

    from benchmarks.encode_random import random_model
    from headrace.execution.encode_graphs import graph_sizes
    from headrace.execution.encode_runner import EncodeRunner
    from headrace.types import EncodeParams, EncodeTask, Request

    device = torch.device("cuda")
    model = random_model(args.model, device)
    meter.mark("weights")
    runner = EncodeRunner(model, device)
    meter.mark("runner")

    def go(count: int, length: int, task: EncodeTask = EncodeTask.EMBED) -> None:
        params = EncodeParams(task=task)
        runner.run(
            [
                Request(
                    id=str(i),
                    token_ids=tuple(random.randrange(model.vocab_size) for _ in range(length)),
                    encode=params,
                )
                for i in range(count)
            ]
        )
        meter.mark(f"plain {count}x{length} {task.value}")

    longest = min(model.max_tokens, 16384)
    go(16384 // 512, 512)
    go(16384 // longest, longest)
    go(256, 64)
    go(16384 // 512, 512, EncodeTask.EMBED_ALL)
    assert runner.graphs is not None
    for size in reversed(graph_sizes()):
        with torch.inference_mode():
            runner.graphs._graphs[size] = runner.graphs._make(size)
        meter.mark(f"graph {size.tokens}x{size.texts}")
    torch.cuda.empty_cache()
    meter.mark("empty_cache")


def pools(meter: Meter) -> None:
    """How graphs' pools and the allocator's cache behave: what the plan relies on."""
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    x @ x
    meter.mark("tensors")
    side = torch.cuda.Stream()
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool), torch.cuda.stream(side):
        torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
        small = [torch.empty(MIB // 2, dtype=torch.uint8, device="cuda") for _ in range(16)]
        del small
    meter.mark("pool grown by 256 MiB and 8")
    before = torch.cuda.memory_stats()["segment.all.allocated"]

    def work() -> Any:
        y = x
        for _ in range(4):
            y = torch.relu(y @ x) + 1
        return y.sum(0)

    for name, streams in (
        ("one stream", [side] * 3),
        ("new streams", [torch.cuda.Stream() for _ in range(3)]),
    ):
        for stream in streams:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):
                with torch.cuda.use_mem_pool(pool):
                    work()
                stream.synchronize()
                graph.capture_begin(pool=pool.id, capture_error_mode="thread_local")
                work()
                graph.capture_end()
            graph.replay()
            meter.mark(f"{name}: {torch.cuda.memory_stats()['segment.all.allocated'] - before} segments")
    big = torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")
    del big
    meter.mark("cache grown by 512 MiB")
    before = torch.cuda.memory_stats()["segment.all.allocated"]
    parts = [torch.empty(3 * MIB, dtype=torch.uint8, device="cuda") for _ in range(100)]
    meter.mark(f"100 x 3 MiB: {torch.cuda.memory_stats()['segment.all.allocated'] - before} segments")
    del parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--rows", type=int, default=256, help="max_num_seqs")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--quantization", default="")
    parser.add_argument("--kv", default="bf16", choices=["bf16", "fp8"])
    args = parser.parse_args()
    meter = Meter()
    torch.cuda.init()
    meter.last = (0, 0, 0)
    print(json.dumps({"case": vars(args)}), flush=True)
    meter.mark("context (with all others on the device)")
    torch.zeros(1024, device="cuda").add_(1).sum().item()
    meter.mark("first torch kernels")
    a = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
    (a @ a).sum().item()
    del a
    meter.mark("cublas")
    if args.model == "pools":
        pools(meter)
        return
    meter.watch()
    (encode if args.model in ("bge-large", "qwen3-embedding-0.6b") else generate)(args, meter)
    free, total = torch.cuda.mem_get_info()
    print(
        json.dumps(
            {"used_mib": round((total - free) / MIB), "reserved_mib": torch.cuda.memory_reserved() // MIB}
        )
    )


if __name__ == "__main__":
    main()
