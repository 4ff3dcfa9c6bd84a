"""Serve one or more models over HTTP with OpenAI's API: LLMs and embedding models side by side."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

from headrace.cli.flags import positive
from headrace.cli.options import SERVE_FLAGS, add_model_arguments, api_keys, specs
from headrace.cli.per_model import add_hidden, rewrite

if TYPE_CHECKING:
    from collections.abc import Callable

    from headrace.config.plan.plan import Plan
    from headrace.config.spec import EngineSpec
    from headrace.engines.child import CoreChild
    from headrace.llm import AsyncEngine
    from headrace.serving.server import Server

EXAMPLES = """\
examples:
  headrace serve smollm2-135m minilm            a chat model and an embedding model, by name
  headrace serve ./Qwen3-0.6B --dtype bfloat16  a Hugging Face folder
  headrace serve model-q4_k_m.gguf --port 9000  a GGUF file
  headrace serve chat=./big embed=./small       under names of your own
  headrace serve chat=./big embed=./small --chat.max-model-len 8192 --embed.dtype float32
                                                settings of one model: --NAME.flag, which goes before --flag
  headrace serve chat.yaml embed.yaml           a config.yaml each
  headrace serve smollm2-135m --api-key "$KEY"  clients must send 'Authorization: Bearer KEY'

environment:
  HEADRACE_API_KEYS   keys, separated by commas     HEADRACE_HOME   where models are kept
  HEADRACE_LOG        debug, info, warning, error

exit codes: 0 after SIGTERM and draining; 2 for a wrong option or model; 1 when no engine is left alive.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    parser.add_argument(
        "models", nargs="+", metavar="[NAME=]MODEL", help="name, folder, .gguf file or hub id"
    )
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default 127.0.0.1)")
    add("--port", type=_port, default=8000, help="port; 0 lets the system choose (default 8000)")
    add(
        "--served-model-name", nargs="+", metavar="NAME", help="names of the only model; the first is its own"
    )
    add("--api-key", action="append", default=[], metavar="KEY", help="may be given several times")
    add("--api-key-file", action="append", default=[], metavar="FILE", help="one key a line")
    add(
        "--max-body-bytes",
        type=positive,
        default=8 * 2**20,
        metavar="N",
        help="larger bodies get 413 (8 MiB)",
    )
    add(
        "--max-inputs",
        type=positive,
        default=2048,
        metavar="N",
        help="texts of one request; more get 413 (2048)",
    )
    add(
        "--cors-allow-origin", action="append", default=[], metavar="ORIGIN",
        help="pages of this origin may call the server; * for all; may be given several times",
    )  # fmt: skip
    add("--data-dir", metavar="DIR", help="folder for /v1/files and /v1/batches; without it they are off")
    add(
        "--api-server-count",
        type=positive,
        default=1,
        metavar="N",
        help="HTTP processes on the one port, for one set of engines (1)",
    )
    add(
        "--drain-seconds", type=_duration, default=30.0, metavar="S", help="time to finish after SIGTERM (30)"
    )
    add("--allow-chat-template", action="store_true", help="let requests bring templates (they are programs)")
    add("--log-prompts", action="store_true", help="write what clients send into the log")
    add_model_arguments(parser)
    add_hidden(parser)


def prepare(args: list[str]) -> list[str]:
    """Before argparse: flags of one model."""
    return rewrite(args, SERVE_FLAGS)


def _duration(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0 up")
    return value


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port from 0 to 65535")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    chosen = specs(args, args.models)
    keys = api_keys(args)
    from headrace.engines.child import CoreChild

    children = [CoreChild(spec) for spec in chosen]  # they import while this process does
    try:
        return _serve(args, chosen, keys, children)
    finally:
        for child in children:
            child.end()


def _serve(
    args: argparse.Namespace, chosen: list[EngineSpec], keys: tuple[str, ...], children: list[CoreChild]
) -> int:
    from headrace.config import env
    from headrace.llm.progress import LoadingBars
    from headrace.serving import logs
    from headrace.serving.cors import check_origins
    from headrace.serving.server import Server, serve
    from headrace.serving.state import Model, ServerOptions

    logs.configure(env.log_level())
    check_origins(tuple(args.cors_allow_origin))
    options = ServerOptions(
        host=args.host,
        port=args.port,
        api_keys=keys,
        max_body_bytes=args.max_body_bytes,
        max_inputs=args.max_inputs,
        drain_seconds=args.drain_seconds,
        allow_chat_template=args.allow_chat_template,
        log_prompts=args.log_prompts,
        cors_origins=tuple(args.cors_allow_origin),
        data_dir=args.data_dir,
        api_server_count=args.api_server_count,
    )
    bars = LoadingBars()
    models = [Model(spec) for spec in chosen]
    of_spec = {id(spec): child for spec, child in zip(chosen, children)}
    plans = _Plans(chosen)
    server = Server(
        models,
        options,
        start_engine=lambda spec: _start(spec, plans, bars.of(spec.name), of_spec[id(spec)]),
    )
    asyncio.run(serve(server, _listening, _ready))
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _listening(server: Server) -> None:
    from headrace import __version__

    names = ", ".join(model.name for model in server.state.models.all)
    _say(f"headrace {__version__} on {server.url}\nloading {names} ...")


class _Plans:
    """The plans of all models, drawn together when the first of them starts."""

    def __init__(self, specs: list[EngineSpec]) -> None:
        self._specs = specs
        self._drawing: asyncio.Task[list[tuple[EngineSpec, Plan]]] | None = None

    async def of(self, spec: EngineSpec) -> tuple[EngineSpec, Plan]:
        """A model's plan, and its spec with its share of the device. From headers: nothing is downloaded for it."""
        from headrace.engines.plan import plan_together

        if self._drawing is None:
            self._drawing = asyncio.create_task(asyncio.to_thread(plan_together, self._specs))
        pairs = await asyncio.shield(self._drawing)
        return next(pair for pair, given in zip(pairs, self._specs) if given is spec)


async def _start(
    spec: EngineSpec, plans: _Plans, on_loading: Callable[[int, int, str], None], child: CoreChild
) -> AsyncEngine:
    import msgspec

    from headrace.checkpoints.resolve import resolve
    from headrace.llm import AsyncEngine

    begin = time.perf_counter()
    spec, plan = await plans.of(spec)
    _say(f"  {spec.name}: {plan.short()}")
    plan.check_fits()
    if spec.path is None:
        path = await asyncio.to_thread(resolve, spec.model, spec.revision, spec.secret_name)
        spec = msgspec.structs.replace(spec, path=path)
    engine = await AsyncEngine.start(spec, on_loading, child)
    ready = engine.client.ready
    _say(
        f"  {spec.name}: {ready.engine} engine, context {ready.max_model_len}, "
        f"{ready.max_num_seqs} sequences a step, {_seconds(ready.summary, time.perf_counter() - begin)}"
    )
    return engine


def _seconds(summary: dict[str, Any], waited: float) -> str:
    """How long the start took, and its parts."""
    parts = summary.get("start") or {}
    listed = ", ".join(f"{name} {value:.1f}" for name, value in parts.items() if value >= 0.05)
    return f"{sum(parts.values()) or waited:.1f} s" + (f" ({listed})" if listed else "")


def banner(server: Server) -> str:
    """What to do now."""
    key = ' -H "Authorization: Bearer $KEY"' if server.state.options.api_keys else ""
    lines = [f"\nready: {server.url}/v1   docs: {server.url}/docs   health: {server.url}/health\n"]
    seen = set()
    for model in server.state.models.all:
        kind = "embed" if model.engine.embeds else "chat"
        if kind in seen:
            continue
        seen.add(kind)
        body: dict[str, object] = {"model": model.name}
        if kind == "embed":
            path = "embeddings"
            body |= {"input": ["Hello!"]}
        else:
            path = "chat/completions"
            body |= {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "stream": True}
        curl = f"curl {server.url}/v1/{path}{key} -H 'Content-Type: application/json'"
        lines.append(f"  {curl} \\\n    -d '{json.dumps(body)}'\n")
    return "\n".join(lines)


def _ready(server: Server) -> None:
    _say(banner(server))
