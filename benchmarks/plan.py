"""What a plan says against what a core then takes: bytes of the device, model by model, with random weights.

    python -m benchmarks.plan --models qwen3-0.6b llama-3.2-1b --record

Each model is written as a folder of random weights, planned, built as `headrace serve` builds it, and driven with
full steps of prompts and of decode, greedy and drawn. `used_bytes` is what the driver says is gone then; `planned`
is the plan's figure and `ratio` planned over used. Run alone on the device: the driver counts everybody.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import SHAPES, Recorder, arguments

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}
_WIDE = {**SHAPES["qwen3-8b"], "num_hidden_layers": 12}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3-0.6b": (SHAPES["qwen3-0.6b"], {}),
    "qwen3-0.6b, pool of 4 GiB": (SHAPES["qwen3-0.6b"], {"kv_cache_bytes": 4 << 30}),
    "qwen3-0.6b, half the card, 1024 rows": (
        SHAPES["qwen3-0.6b"], {"memory_fraction": 0.5, "max_num_seqs": 1024}
    ),
    "qwen3-0.6b, fp8": (SHAPES["qwen3-0.6b"], {"quantization": "fp8", "kv_cache_bytes": 8 << 30}),
    "qwen3-0.6b, fp8 cache, 16 rows": (
        SHAPES["qwen3-0.6b"], {"kv_cache_dtype": "fp8", "max_num_seqs": 16, "kv_cache_bytes": 8 << 30}
    ),
    "qwen3-0.6b, eager": (SHAPES["qwen3-0.6b"], {"eager": True, "kv_cache_bytes": 8 << 30}),
    **{
        f"qwen3-0.6b, {kind}": (SHAPES["qwen3-0.6b"], {"quantization": kind, "kv_cache_bytes": 8 << 30})
        for kind in ("fp4", "mxfp4", "int8", "int4", "fp8_block")
    },
    **{
        f"qwen3-0.6b-{kind}-container": (SHAPES["qwen3-0.6b"], {"kv_cache_bytes": 8 << 30})
        for kind in ("fp8", "fp4", "int8", "int4")
    },
    "bge-large": (SHAPES["bge-large"], {"pooling": "cls"}),
    "bge-large, fp8": (SHAPES["bge-large"], {"pooling": "cls", "quantization": "fp8"}),
    "bge-large, int8": (SHAPES["bge-large"], {"pooling": "cls", "quantization": "int8"}),
    "qwen3-embedding-0.6b": (SHAPES["qwen3-embedding-0.6b"], {"pooling": "last"}),
    "qwen3-embedding-0.6b, fp8": (
        SHAPES["qwen3-embedding-0.6b"], {"pooling": "last", "quantization": "fp8"}
    ),
    "qwen3-8b of 12 layers": (_WIDE, {"kv_cache_bytes": 8 << 30}),
    "qwen3-8b of 12 layers, fp8": (_WIDE, {"kv_cache_bytes": 8 << 30, "quantization": "fp8"}),
    "qwen3-8b of 12 layers, int4": (_WIDE, {"kv_cache_bytes": 8 << 30, "quantization": "int4"}),
    "qwen3-1.7b, pool of 4 GiB": (SHAPES["qwen3-1.7b"], {"kv_cache_bytes": 4 << 30, "max_num_seqs": 64}),
    "llama-3.2-1b": (
        {**_LLAMA, "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
        {"kv_cache_bytes": 8 << 30},
    ),
    "qwen2.5-1.5b": (
        {"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
         "max_position_embeddings": 32768, "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
         "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
        {"kv_cache_bytes": 8 << 30},
    ),
    "gemma2-2b": (
        {"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
         "rope_theta": 10000.0, "max_position_embeddings": 8192, "vocab_size": 256000, "hidden_size": 2304,
         "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": 256, "sliding_window": 4096, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
         "final_logit_softcapping": 30.0, "tie_word_embeddings": True},
        {"kv_cache_bytes": 8 << 30},
    ),
    "gemma3-1b": (
        {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "rms_norm_eps": 1e-6,
         "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
         "max_position_embeddings": 32768, "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
         "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
         "sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
         "tie_word_embeddings": True},
        {"kv_cache_bytes": 8 << 30},
    ),
}  # fmt: skip

# Models that share one card, with pools as `headrace serve` would divide it among them.
SHARED: dict[str, tuple[str, ...]] = {
    "qwen3-0.6b beside bge-large": ("qwen3-0.6b", "bge-large"),
    "qwen3-0.6b beside gemma3-1b and qwen3-embedding-0.6b": (
        "qwen3-0.6b", "gemma3-1b", "qwen3-embedding-0.6b",
    ),
}  # fmt: skip
_CONTAINER = "-container"  # NAME-TYPE-container: NAME as `headrace quantize --type TYPE` writes it

_READY = "ready"

PACKAGED: dict[str, dict[str, Any]] = {
    "minilm": {},
    "minilm, bfloat16": {"dtype": "bfloat16"},
    "smollm2-135m": {"kv_cache_bytes": 64 << 20, "max_num_seqs": 16, "max_model_len": 1024},
    "smollm2-135m, float32": {
        "kv_cache_bytes": 64 << 20, "max_num_seqs": 16, "max_model_len": 1024, "dtype": "float32"
    },
    "gemma3-270m": {"kv_cache_bytes": 64 << 20, "max_num_seqs": 8, "max_model_len": 1024},
    "qwen2.5-coder-0.5b": {"kv_cache_bytes": 64 << 20, "max_num_seqs": 8, "max_model_len": 1024},
}  # fmt: skip


def write_model(folder: Path, name: str) -> None:
    """The files of a model of MODELS, if they are not there. Runs in a process of its own."""
    if (folder / "config.json").exists() and list(folder.glob("*.safetensors")):
        return
    if not name.endswith(_CONTAINER):
        write_folder(folder, MODELS[name][0])
        return
    from headrace.checkpoints.resolve import open_checkpoint
    from headrace.engines.quantize import quantize_checkpoint

    base, _, kind = name.removesuffix(_CONTAINER).rpartition("-")
    write_model(folder.parent / base, base)
    quantize_checkpoint(open_checkpoint(folder.parent / base), kind, folder)


def write_folder(folder: Path, config: dict[str, Any]) -> None:
    """config.json and random bfloat16 weights under their Hugging Face names."""
    import torch
    from safetensors.torch import save_file

    from headrace.config.plan.facts import Facts
    from headrace.config.plan.shape import ENCODER_TYPES, read_shape
    from headrace.config.plan.weights import expected_tensors

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    facts = Facts(where=str(folder), config=config, container="config")
    encodes = config.get("model_type") in ENCODER_TYPES or config["architectures"][0].endswith("Model")
    sizes = {
        name: found.shape for name, found in expected_tensors(read_shape(facts, encoder=encodes), 2).items()
    }
    tensors = {}
    for name, size in sizes.items():
        tensor = torch.empty(size, dtype=torch.bfloat16, device="cuda")
        tensors[name] = (tensor.fill_(1.0) if len(size) == 1 else tensor.normal_(0.0, 0.02)).cpu()
    save_file(tensors, folder / "model.safetensors")


def drive(core: Any, ready: Any, rounds: list[tuple[int, int]]) -> None:
    """Steps of every kind that serving takes.

    Args:
        rounds: of so many requests with so many tokens.
    """
    from headrace.types import EncodeParams, EncodeTask, Request, SamplingParams

    rng = random.Random(0)
    encodes = ready.engine in ("bert", "embed")
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 0.0, "prompt_logprobs": 1},
    ]
    longest = ready.max_model_len - 30
    for count, length in rounds:
        length = min(length, longest)
        core.add(
            Request(
                id=f"{count}-{i}",
                token_ids=tuple(rng.randrange(ready.vocab_size) for _ in range(length)),
                sampling=None if encodes else SamplingParams(max_tokens=20, ignore_eos=True, **kinds[i % 4]),
                encode=EncodeParams(task=EncodeTask.EMBED) if encodes else None,
            )
            for i in range(count)
        )
        while core.has_work():
            for output in core.step():
                assert not getattr(output, "error", ""), output


def measure(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Plan, build and drive; bytes. Runs in a process of its own, which waits for its turn on standard input."""
    import torch

    from headrace.config.spec import EngineSpec
    from headrace.engines.build import build
    from headrace.engines.plan import plan_for

    sys.stdin.readline()
    spec = EngineSpec(model=str(folder), path=folder, **settings)
    plan = plan_for(spec)
    core, ready = build(spec)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    taken = torch.cuda.memory_stats()["segment.all.allocated"]
    drive(core, ready, [(1, 30), (8, 900), (1, 9000), (spec.max_num_seqs, 40)])
    torch.cuda.synchronize()
    after, _ = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    budget = plan.budget
    return {
        "device": torch.cuda.get_device_name(),
        "used": total - after,
        "planned": budget.used,
        "ratio": round(budget.used / (total - after), 4),
        "used_at_start": total - free,
        "device_allocations_later": torch.cuda.memory_stats()["segment.all.allocated"] - taken,
        "process": total - after - reserved,
        "planned_process": budget.process + budget.graphs,
        "reserved": reserved,
        "peak_tensors": torch.cuda.max_memory_allocated(),
        "pool": int(ready.summary.get("kv_bytes", 0)),
        "planned_pool": budget.pool,
        "weights": int(ready.summary["weight_bytes"]),
        "planned_weights": budget.weights,
        "planned_activations": budget.activations,
        "build_s": ready.summary["seconds"],
    }


def _anonymous(process: int | str = "self") -> int:
    """Anonymous memory of a process, bytes: what the kernel cannot take back. 0 when it has ended."""
    try:
        resident, shared = Path(f"/proc/{process}/statm").read_text().split()[1:3]
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def _forget_peak() -> None:
    """From now on the kernel keeps this process's peak anew (proc(5), clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _kept_peak() -> int:
    """Most memory since then but what is of files or shared, bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    sizes = {words[0]: int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"}
    return sizes["VmHWM:"] - sizes["RssFile:"] - sizes["RssShmem:"]


def measure_cpu(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The same of a packaged model without a GPU: most anonymous memory of the core's process."""
    from headrace.config.spec import EngineSpec
    from headrace.engines.build import build
    from headrace.engines.plan import cpu_machine, plan_for

    spec = EngineSpec(model=model, device="cpu", num_threads=1, **settings)
    budget = plan_for(spec, cpu_machine()).budget
    core, ready = build(spec)
    start = _anonymous()
    full = ready.max_model_len - 30
    _forget_peak()
    print(_READY, flush=True)
    drive(core, ready, [(1, 30), (ready.max_num_seqs, 40), (4, full)])
    return {
        "planned": budget.used,
        "kept_peak": _kept_peak(),
        "used_at_start": start,
        "pool": int(ready.summary.get("kv_bytes", 0)),
        "planned_pool": budget.pool,
        "weights": int(ready.summary["weight_bytes"]),
        "planned_weights": budget.weights,
        "planned_process": budget.process,
        "planned_activations": budget.activations,
        "build_s": ready.summary["seconds"],
    }


def _watched(*arguments: str) -> dict[str, Any] | None:
    """What the child prints, and its most anonymous memory while it loads and while it serves.

    Watched from here, since a thread of the child would sleep through the peaks, which are inside calls that hold its
    lock; on a busy machine this process may miss one, but the kernel's own figure (of all memory, less what is of
    files at the end) does not.
    """
    command = [sys.executable, "-m", "benchmarks.plan", *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    peaks = [0, 0]
    lines: list[str] = []

    def watch() -> None:
        while child.poll() is None:
            phase = len(lines) > 0
            peaks[phase] = max(peaks[phase], _anonymous(child.pid))
            time.sleep(0.0001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    lines += [line for line in [child.stdout.readline()] if line.strip() == _READY]
    lines += child.stdout.readlines()
    watcher.join()
    if child.returncode:
        return None
    found: dict[str, Any] = json.loads(lines[-1])
    peaks[1] = max(peaks[1], found.pop("kept_peak"))
    ratio = round(found["planned"] / peaks[1], 4)
    return {"device": "cpu", "used": peaks[1], "used_loading": peaks[0], "ratio": ratio, **found}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cpu", action="store_true", help="the packaged models that are here, without a GPU")
    parser.add_argument("--one-cpu", nargs=2, metavar=("MODEL", "SETTINGS"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=[*MODELS, *SHARED], metavar="NAME"
    )
    parser.add_argument(
        "--packaged", nargs="+", default=list(PACKAGED), choices=list(PACKAGED), metavar="NAME"
    )
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "SETTINGS"), help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=2, metavar=("FOLDER", "NAME"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help="where models are written and kept; default: a temporary folder")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no more after so many")
    args = parser.parse_args()
    if args.write:
        write_model(Path(args.write[0]), args.write[1])
        return
    if args.one:
        print(json.dumps(measure(Path(args.one[0]), json.loads(args.one[1]))), flush=True)
        sys.stdin.readline()  # holds what it took until the end of its input
        return
    if args.one_cpu:
        print(json.dumps(measure_cpu(args.one_cpu[0], json.loads(args.one_cpu[1]))))
        return
    recorder = None
    for name, precision, found in _cpu_rows(args) if args.cpu else _gpu_rows(args):
        used = found.pop("used")
        recorder = recorder or Recorder("plan", args, found.pop("device"))
        found.pop("device", None)
        recorder.row(
            model=name, precision=precision, case="plan against use", metric="used_bytes", value=used, **found
        )


Row = tuple[str, str, dict[str, Any]]


def _cpu_rows(args: argparse.Namespace) -> Iterator[Row]:
    from headrace.checkpoints.fetch import installed

    for name in args.packaged:
        settings = PACKAGED[name]
        model = name.split(",")[0]
        if installed(model) is None:
            print(model, "is not here", flush=True)
            continue
        found = _watched("--one-cpu", model, json.dumps(settings))
        if found is not None:
            yield name, str(settings.get("dtype", "auto")), found


def _gpu_rows(args: argparse.Namespace) -> Iterator[Row]:
    """The driver counts every process: this one never touches the GPU, and the children take turns.

    All of them start at once, since reading libraries takes longer than most measurements.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(args.folder or scratch)
        groups = {name: _tenants(root, SHARED.get(name, (name,))) for name in args.models}
        waiting = {
            name: [_start("--one", str(folder), json.dumps(settings)) for folder, settings in tenants]
            for name, tenants in groups.items()
        }
        for name, children in waiting.items():
            if time.monotonic() - began > args.seconds:
                print("no time left for", name, flush=True)
                for child in children:
                    child.kill()
                continue
            found = _together(children)
            if found is None:
                print(name, "failed", flush=True)
            else:
                yield name, MODELS[name][1].get("quantization", "bf16") if name in MODELS else "bf16", found


Tenant = tuple[Path, dict[str, Any]]


def _tenants(root: Path, names: tuple[str, ...]) -> list[Tenant]:
    """Folder and settings of each model; several get pools that fit the card together."""
    from headrace.config.spec import EngineSpec
    from headrace.engines.plan import plan_together

    folders = [root / name.split(",")[0] for name in names]
    for folder, name in zip(folders, names):
        if not list(folder.glob("*.safetensors")):
            _run("--write", str(folder), name)
    settings = [dict(MODELS[name][1]) for name in names]
    if len(names) > 1:
        specs = [EngineSpec(model=str(at), path=at, **own) for at, own in zip(folders, settings)]
        for own, (spec, _) in zip(settings, plan_together(specs)):
            if spec.kv_cache_bytes is not None:
                own["kv_cache_bytes"] = spec.kv_cache_bytes
    return list(zip(folders, settings))


def _together(children: list[subprocess.Popen[str]]) -> dict[str, Any] | None:
    """What the last of them says when all hold what they took, with the plans of all added; None when one failed."""
    found: list[dict[str, Any]] = []
    for child in children:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write("go\n")
        child.stdin.flush()
        line = next((line for line in child.stdout if line.startswith("{")), "")
        if not line:
            print(child.communicate()[1][-1500:], flush=True)
            break
        found.append(json.loads(line))
    for child in children:
        child.communicate()
    if len(found) < len(children):
        return None
    if len(found) == 1:
        return found[0]
    used, planned = found[-1]["used"], sum(one["planned"] for one in found)
    later = sum(one["device_allocations_later"] for one in found)
    return {
        "device": found[0]["device"],
        "used": used,
        "planned": planned,
        "ratio": round(planned / used, 4),
        "device_allocations_later": later,
        "planned_each": [one["planned"] for one in found],
        "used_each": [one["used"] - (found[i - 1]["used"] if i else 0) for i, one in enumerate(found)],
    }


def _start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.plan", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "benchmarks.plan", *arguments], check=True)


if __name__ == "__main__":
    main()
