"""Generation, offline: token ids in, fixed output lengths, random weights of a real shape made on the device.

    python -m benchmarks.generate --model qwen3-0.6b --cases 1x128/256 16x128/256 --record

Output tokens over the wall time of the whole batch, after one warm-up run of the same case. The floor takes each
step at the larger of bytes and arithmetic: weights and keys at the copy rate, products at the rate of cuBLAS.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch

from benchmarks.common import Recorder, arguments, ceilings, model_config
from headrace.config.quantization import quantization_type
from headrace.engines.generate import GenerateCore
from headrace.execution.graphs import GraphRunner
from headrace.execution.runner import Runner
from headrace.execution.sampler import Masks
from headrace.kvcache.blocks import BlockPool
from headrace.kvcache.pool import allocate_caches
from headrace.layers.linear import FixedLinear, Linear
from headrace.models.decoder import DecoderModel
from headrace.models.loading import random_weights
from headrace.models.registry import read_config
from headrace.quantization.registry import load_time
from headrace.quantization.scaled import ScaledLinear
from headrace.scheduling.plan import StepPlan
from headrace.scheduling.scheduler import Scheduler
from headrace.types import Request, SamplingParams

CASES = ["1x128/256", "1x4096/1", "16x128/256", "64x512/128", "256x1024/128", "1024x128/128"]
BLOCK = 16
FILTERS = {"top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float, "logprobs": int}


def build_core(
    model: DecoderModel,
    cases: list[tuple[int, int, int]],
    *,
    eager: bool,
    step_tokens: int,
    cache: torch.dtype | None = None,
    fixed: bool = False,
) -> GenerateCore:
    """A core whose cache holds every case at once; ``fixed``: in deterministic mode."""
    device = model.embed.weight.device
    dtype = model.embed.weight.dtype
    blocks = 2 + max(count * (-(-(inputs + outputs) // BLOCK) + 1) for count, inputs, outputs in cases)
    blocks += blocks // 50
    layout = [(layer.num_kv_heads, layer.head_dim) for layer in model.kv_layout]
    caches = allocate_caches(layout, blocks, BLOCK, cache or dtype, device)
    rows = max(count for count, _, _ in cases)
    length = max(8192, max(inputs + outputs for _, inputs, outputs in cases))
    sizes: dict[str, Any] = {
        "device": device,
        "block_size": BLOCK,
        "max_num_seqs": rows,
        "max_model_len": length,
        "fixed": fixed,
    }
    runner = Runner(model, caches, **sizes) if eager else GraphRunner(model, caches, **sizes)
    scheduler = Scheduler(
        BlockPool(blocks), block_size=BLOCK, max_num_seqs=rows, max_num_batched_tokens=step_tokens,
        max_model_len=length, prefix_caching=False,
    )  # fmt: skip
    return GenerateCore(runner, scheduler, overlap=device.type == "cuda")


def run_case(
    core: GenerateCore, case: tuple[int, int, int], vocab: int, seed: int, **sampling: Any
) -> dict[str, float]:
    """Seconds, and where they went."""
    count, inputs, outputs = case
    rng = random.Random(seed)
    sampling = {"temperature": 0.0, **sampling}
    params = SamplingParams(max_tokens=outputs, ignore_eos=True, **sampling)
    requests = [
        Request(
            id=f"{seed}-{i}", token_ids=tuple(rng.randrange(vocab) for _ in range(inputs)), sampling=params
        )
        for i in range(count)
    ]
    torch.cuda.synchronize() if torch.cuda.is_available() else None
    began = time.perf_counter()
    core.add(requests)
    first = 0.0
    seen = steps = 0
    while core.has_work():
        for output in core.step():
            if output.error:
                raise RuntimeError(output.error)
            seen += len(output.token_ids)
        steps += 1
        if seen and not first:
            first = time.perf_counter() - began
    seconds = time.perf_counter() - began
    if seen != count * outputs:
        raise RuntimeError(f"{seen} tokens came out, expected {count * outputs}")
    return {"seconds": seconds, "first_s": first, "steps": steps, "host_ms": core.stats().host_ms}


class HalfMasks:
    """Forbids a random half of the tokens to every row: what grammars cost the device, without their own work."""

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        shape = (rows, -(-vocab // 32))
        generator = torch.Generator().manual_seed(0)
        self.bits = torch.randint(-(2**31), 2**31, shape, generator=generator).int()
        if device.type == "cuda":
            self.bits = self.bits.pin_memory()
        self.rows = torch.arange(rows, dtype=torch.int32, device=device)

    def masks(self, plan: StepPlan) -> tuple[Masks | None, list[Any]]:
        """As ConstraintTable.masks."""
        count = len(plan.sampling)
        if not count:
            return None, []
        return Masks(self.rows[:count], self.bits[:count].to(self.rows.device, non_blocking=True)), []


def floor_seconds(model: DecoderModel, case: tuple[int, int, int]) -> float | None:
    """The least time for a case on this device."""
    rates = ceilings()
    if rates is None:
        return None
    bandwidth, flops = rates
    count, inputs, outputs = case
    config = model.config
    head = config.vocab_size * config.hidden_size
    packed = [module for module in model.modules() if isinstance(module, ScaledLinear)]
    dense = sum(p.numel() for p in model.layers.parameters() if p.dim() > 1)
    body = dense + sum(module.in_features * module.out_features for module in packed)
    weights = 2 * (head + dense) + sum(module.nbytes for module in packed)
    key = 4 * config.num_kv_heads * config.head_dim * config.num_layers
    pairs = count * inputs * inputs / 2
    attention = 4 * pairs * config.num_heads * config.head_dim * config.num_layers
    prefill = max((2 * body * count * inputs + 2 * head * count + attention) / flops, weights / bandwidth)
    total = prefill
    for step in range(1, outputs):
        read = weights + key * count * (inputs + step)
        total += max(read / bandwidth, 2 * (body + head) * count / flops)
    return total


def quantize(model: DecoderModel, scheme: str) -> None:
    """Swap the linears as loading does."""
    transform = load_time(quantization_type(scheme), model.embed.weight.device)
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear):
            model.set_submodule(path, transform(path, module))


def parse_case(text: str) -> tuple[int, int, int]:
    count, lengths = text.split("x")
    inputs, outputs = lengths.split("/")
    return int(count), int(inputs), int(outputs)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a quick look")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", help="a type of config/quantization.py")
    parser.add_argument("--kv-cache-dtype", choices=["fp8"], help="instead of --dtype")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--step-tokens", type=int, default=8192)
    parser.add_argument("--temperature", type=float, default=0.0)
    for name, kind in FILTERS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help="as in SamplingParams")
    parser.add_argument("--masked", action="store_true", help="forbid half of the tokens to every row")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--repeat", type=int, default=1)
    args = parser.parse_args()
    recorder = Recorder("generate", args)
    config = dict(model_config(args.model))
    if args.layers:
        config["num_hidden_layers"] = args.layers
    model = random_weights(read_config(config), dtype=getattr(torch, args.dtype), device=args.device)
    if args.quantization:
        quantize(model, args.quantization)
    if args.deterministic:
        FixedLinear.fix(model)
    sampling = {name: value for name in FILTERS if (value := getattr(args, name)) is not None}
    sampling["temperature"] = args.temperature
    cache = torch.float8_e4m3fn if args.kv_cache_dtype else None
    precision = args.quantization or args.dtype
    precision += "+fp8kv" if args.kv_cache_dtype else ""
    cases = [parse_case(text) for text in args.cases]
    core = build_core(model, cases, eager=args.eager, step_tokens=args.step_tokens, cache=cache,
                      fixed=args.deterministic)  # fmt: skip
    if args.masked:
        sampling["bad_words"] = ((0, 0, 0),)  # as with grammars, sampling waits for the token before
        rows = max(count for count, _, _ in cases)
        vars(core.constraints)["masks"] = HalfMasks(rows, model.config.vocab_size, core.runner.device).masks
    for text, case in zip(args.cases, cases):
        if isinstance(core.runner, GraphRunner) and case[2] > 1:
            core.runner.warm_up(list(range(1, case[0] + 1)))
        run_case(core, (case[0], case[1], min(case[2], 8)), model.config.vocab_size, 1, **sampling)
        for again in range(args.repeat):
            seconds = run_case(core, case, model.config.vocab_size, 2 + again, **sampling)
            least = floor_seconds(model, case)
            tokens = case[0] * case[2]
            single = case[2] == 1
            recorder.row(
                model=args.model, precision=precision, case=text,
                metric="seconds" if single else "output_tok_s",
                value=seconds["seconds"] if single else tokens / seconds["seconds"],
                floor=None if least is None else least if single else tokens / least,
                first_token_s=round(seconds["first_s"], 4),
                sampling=sampling, masked=args.masked, deterministic=args.deterministic,
                steps=seconds["steps"], host_ms=round(seconds["host_ms"], 3),
            )  # fmt: skip


if __name__ == "__main__":
    main()
