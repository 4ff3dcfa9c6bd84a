"""Write a commented config.yaml for a model, in the hosted system's format."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.errors import ConfigError, HeadraceError

if TYPE_CHECKING:
    from headrace.config.plan.facts import Facts

EXAMPLES = """\
examples:
  headrace init Qwen/Qwen3-8B --gpu H100       write config.yaml here
  headrace init ./my-model -o serve.yaml       for a folder on this machine
  headrace init minilm -o -                    print it

The file is read by `headrace serve` and `headrace plan`, and by the official truss package.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    parser.add_argument("model", help="hub id, folder, .gguf file or packaged name")
    parser.add_argument(
        "--gpu", metavar="TYPE[:N]", default="", help="such as H100 or L4:2; default: none named"
    )
    parser.add_argument(
        "-o", "--output", default="config.yaml", metavar="FILE", help="- prints (config.yaml)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the file")


def run(args: argparse.Namespace) -> int:
    """Write the file."""
    text = config_text(args.model, args.gpu)
    if args.output == "-":
        print(text, end="")
        return 0
    file = Path(args.output)
    if file.exists() and not args.force:
        raise ConfigError(f"{file} is there already; name another with -o, or overwrite it with --force")
    file.write_text(text, encoding="utf-8")
    print(f"wrote {file}; next: headrace plan {file}, then headrace serve {file}", file=sys.stderr)
    return 0


def config_text(model: str, gpu: str = "") -> str:
    """The file's text. Reads the checkpoint's headers when it is on this machine.

    Raises:
        ConfigError: an unknown GPU, or one that cannot run it.
    """
    from headrace.config.accelerators import parse_accelerator
    from headrace.config.load import check_text
    from headrace.engines.select import select

    if not model.strip() or "\n" in model:
        raise ConfigError(f"the model {model[:40]!r} is no name and no path", param="model")
    count = 1
    if gpu:
        try:
            named = parse_accelerator(gpu)
        except ValueError as error:
            raise ConfigError(f"gpu: {error}", param="gpu") from None
        if named.gpu is not None and not named.gpu.hosted:
            raise ConfigError(
                f"gpu: the hosted system, in whose format the file is, has no {named.name}; leave --gpu out, and "
                f"plan with headrace plan config.yaml --gpu {named}",
                param="gpu",
            )
        count = named.count
    facts = _facts(model)
    engine, reason = (
        "decoder",
        "not read: it is not on this machine; decoder generates, encoder and encoder_bert embed",
    )
    context = 0
    if facts is not None:
        found = select(facts)
        engine = {"embed": "encoder", "bert": "encoder_bert", "speech": "whisper"}.get(
            found.engine, "decoder"
        )
        reason = found.reason
        context = int(facts.text_config.get("max_position_embeddings") or 0)
    text = _text(model, gpu, count, engine, reason, context)
    problems = check_text(text).report.problems
    if problems:  # a GPU that cannot run this engine, say
        raise ConfigError(
            [f"the file would be refused: {problem.message}" for problem in problems], param="gpu"
        )
    return text


def _facts(model: str) -> Facts | None:
    """Headers of a checkpoint that is already here; a name is not fetched for this."""
    from headrace.checkpoints.fetch import installed
    from headrace.checkpoints.packaged import PACKAGED
    from headrace.engines.inspect import inspect

    path = installed(model) if model in PACKAGED else Path(model).expanduser()
    if path is None or not path.exists():
        return None
    try:
        return inspect(path)
    except HeadraceError as error:
        raise ConfigError(error.message, param="model") from None


def _text(model: str, gpu: str, count: int, engine: str, reason: str, context: int) -> str:
    source = "LOCAL" if Path(model).expanduser().exists() else "HF"
    name = Path(model).name if source == "LOCAL" else model.split("/")[-1]
    lines = [
        f"# config.yaml for {model}: read by `headrace serve` and `headrace plan`, and by the truss package.",
        "# `headrace config check config.yaml` reports every mistake with its line.",
        f"model_name: {_quoted(name)}",
        "",
        "resources:",
        "  # Checked against tensor_parallel_count; the server takes the GPUs that the machine has.",
        f"  accelerator: {gpu or 'null'}   # TYPE or TYPE:count, such as H100:2; null for a CPU",
        '  # memory: "16Gi"   # cpu and memory matter to the hosted system only',
        "",
        "secrets:",
        "  # Names only. The value comes from TRUSS_SECRET_hf_access_token, HF_TOKEN or /secrets/hf_access_token.",
        "  hf_access_token: null",
        "",
    ]
    if engine == "decoder":
        lines += ["model_metadata:", "  tags:", "    - openai-compatible   # the API is OpenAI's", ""]
    lines += [
        "trt_llm:",
        "  inference_stack: v1",
        "  build:",
        f"    # {reason}.",
        f"    base_model: {engine}",
        "    checkpoint_repository:",
        f"      source: {source}   # HF, S3, GCS, AZURE, REMOTE_URL; here also LOCAL",
        f"      repo: {_quoted(model)}",
        "      # revision: main",
        "    # Requests in one step.",
        "    max_batch_size: 256",
        "    # Tokens in one step; caps one input of encoders.",
        f"    max_num_tokens: {16384 if engine == 'encoder' else 8192}",
    ]
    lines += _decoder_lines(count, context) if engine == "decoder" else []
    lines += [
        "    # no_quant keeps the checkpoint's format; fp8, fp8_kv, fp4, fp4_kv, fp8_mlp_only, fp4_mlp_only.",
        "    quantization_type: no_quant",
        "  runtime:",
        f"    served_model_name: {_quoted(name)}",
        "    # Share of free GPU memory to use.",
        "    kv_cache_free_gpu_mem_fraction: 0.9",
    ]
    if engine == "decoder":
        lines += ["    # Long prompts are split over steps.", "    enable_chunked_context: true"]
    else:
        lines += ["    # webserver_default_route: /v1/embeddings   # or /rerank, /predict, /predict_tokens"]
    return "\n".join(lines) + "\n"


def _decoder_lines(count: int, context: int) -> list[str]:
    return [
        f"    # Context of one request; the checkpoint allows {context}."
        if context
        else "    # Context of one request.",
        f"    max_seq_len: {min(context, 1_048_576)}" if context else "    # max_seq_len: 32768",
        "    # GPUs of one replica; must equal the accelerator's count.",
        f"    tensor_parallel_count: {count}",
        "    # Drafts from n-grams; output does not change. Good for code and structured text:",
        "    # speculator:",
        "    #   speculative_decoding_mode: LOOKAHEAD_DECODING",
        "    #   lookahead_windows_size: 3",
        "    #   lookahead_ngram_size: 8",
        "    #   lookahead_verification_set_size: 3",
    ]


def _quoted(text: str) -> str:
    """A YAML string that needs no thought: JSON's form."""
    return json.dumps(text, ensure_ascii=False)
