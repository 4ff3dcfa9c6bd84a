"""What a plan says against what a core then takes: bytes of the device, model by model, with random weights.

    python -m benchmarks.plan --models qwen3-0.6b llama-3.2-1b --record

Each model is written as a folder of random weights, planned, built as `headrace serve` builds it, and driven with
full steps of prompts and of decode. `used_bytes` is what the driver says is gone then; `floor` is the plan's figure.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
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
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3-0.6b": (SHAPES["qwen3-0.6b"], {}),
    "qwen3-0.6b small pool": (SHAPES["qwen3-0.6b"], {"kv_cache_bytes": 4 << 30}),
    "qwen3-0.6b half the card": (SHAPES["qwen3-0.6b"], {"memory_fraction": 0.5, "max_num_seqs": 1024}),
    "qwen3-0.6b fp8": (SHAPES["qwen3-0.6b"], {"quantization": "fp8", "kv_cache_bytes": 8 << 30}),
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
}  # fmt: skip


def write_folder(folder: Path, config: dict[str, Any]) -> None:
    """config.json and random bfloat16 weights under their Hugging Face names."""
    import torch
    from safetensors.torch import save_file

    from headrace.models.loading import _Loader, random_weights
    from headrace.models.registry import family_of, read_config

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    model = random_weights(read_config(config), dtype=torch.bfloat16, device="cuda")
    family, architecture = family_of(config)

    class Names:
        def names(self) -> list[str]:
            return ["model.embed_tokens.weight", "lm_head.weight"]

    sources = _Loader(model, Names(), family.names, architecture, torch.device("cpu")).sources
    tensors = {}
    for path, names in sources.items():
        if path == "head.weight" and config.get("tie_word_embeddings"):
            continue
        tensor = model.get_parameter(path).data
        owner = model.get_submodule(path.rpartition(".")[0])
        parts = tensor.split(list(owner.parts)) if len(names) > 1 else (tensor,)
        tensors.update({name: part.contiguous().cpu() for name, part in zip(names, parts, strict=True)})
    save_file(tensors, folder / "model.safetensors")
    del model
    torch.cuda.empty_cache()


def measure(folder: Path, settings: dict[str, Any]) -> dict[str, int]:
    """Plan, build and drive; bytes. Runs in a process of its own."""
    import torch

    from headrace.config.spec import EngineSpec
    from headrace.engines.build import build
    from headrace.engines.plan import plan_for
    from headrace.types import Request, SamplingParams

    free_before, total = torch.cuda.mem_get_info()  # creates this process's context
    spec = EngineSpec(model=str(folder), path=folder, **settings)
    plan = plan_for(spec)
    core, ready = build(spec)
    rng = random.Random(0)
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.0)
    vocab = ready.vocab_size
    for count, length in ((1, 30), (8, 900), (spec.max_num_seqs, 40)):
        core.add(
            Request(
                id=f"{count}-{i}",
                token_ids=tuple(rng.randrange(vocab) for _ in range(length)),
                sampling=params,
            )
            for i in range(count)
        )
        while core.has_work():
            for output in core.step():
                assert not getattr(output, "error", ""), output
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    budget = plan.budget
    return {
        "used": total - free,
        "before": total - free_before,
        "peak_tensors": torch.cuda.max_memory_allocated(),
        "planned": budget.process + budget.weights + budget.activations + budget.graphs + budget.pool,
        "planned_pool": budget.pool,
        "pool": int(ready.summary["kv_bytes"]),
        "planned_weights": budget.weights,
        "weights": int(ready.summary["weight_bytes"]),
        "planned_activations": budget.activations,
        "planned_graphs": budget.graphs,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "SETTINGS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(Path(args.one[0]), json.loads(args.one[1]))))
        return
    recorder = Recorder("plan", args)
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.models:
            config, settings = MODELS[name]
            folder = Path(scratch) / name.split()[0]
            if not folder.exists():
                write_folder(folder, config)
            command = [sys.executable, "-m", "benchmarks.plan", "--one", str(folder), json.dumps(settings)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(name, "failed:", done.stderr[-1500:], flush=True)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                json.dumps({"model": name, **found, "ratio": round(found["planned"] / found["used"], 4)}),
                flush=True,
            )
            recorder.row(
                model=name, precision=settings.get("quantization", "bf16"), case="plan against use",
                metric="used_bytes", value=found["used"], floor=found["planned"],
            )  # fmt: skip


if __name__ == "__main__":
    main()
