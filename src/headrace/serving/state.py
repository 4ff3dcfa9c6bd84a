"""What the handlers of one server share: its models, the queue before each, counters, keys."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import msgspec
from aiohttp import web

from headrace.config.spec import EngineSpec
from headrace.errors import ConfigError, NotFound, NotReady, nearest
from headrace.llm import AsyncEngine
from headrace.serving.admission import Admission
from headrace.serving.auth import Keys
from headrace.serving.batches import BatchJobs
from headrace.serving.grammars import GrammarChecker
from headrace.serving.metrics import Counts, Metrics
from headrace.serving.openai.response_store import ResponseStore
from headrace.serving.parsers.choose import choose
from headrace.serving.parsers.grammar import Format
from headrace.serving.places import Places

__all__ = ["STATE", "Model", "Models", "ServerOptions", "State"]


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How the front end behaves.

    Attributes:
        max_body_bytes: larger bodies get 413.
        max_inputs: texts of one embed, predict or rerank request; more get 413.
        drain_seconds: how long running requests may take to finish after SIGTERM.
        allow_chat_template: whether requests may bring their own chat template. Templates are programs: one
            can keep a thread busy for ever.
        log_prompts: whether the log may hold what clients send.
        cors_origins: pages of these origins may call this server; ``*``: all.
        data_dir: folder for /v1/files and /v1/batches; None: they are off.
        api_server_count: processes that listen on the same port.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 2**20
    max_inputs: int = 2048
    drain_seconds: float = 30.0
    allow_chat_template: bool = False
    log_prompts: bool = False
    cors_origins: tuple[str, ...] = ()
    data_dir: str | None = None
    api_server_count: int = 1


class Model:
    """One served model, from the moment it is named until it is closed."""

    def __init__(self, spec: EngineSpec, engine: AsyncEngine | None = None) -> None:
        self.spec = spec
        self.names = spec.served_names or (spec.model,)
        self.created = int(time.time())
        self.loaded: AsyncEngine | None = engine

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.names[0]

    @property
    def engine(self) -> AsyncEngine:
        """The engine; raises NotReady while it loads."""
        if self.loaded is None:
            raise NotReady(f"model {self.name!r} is loading; GET /ready says when it is done")
        return self.loaded

    @cached_property
    def format(self) -> Format:
        """How it writes calls and thoughts; raises ConfigError for a parser's name that is not known."""
        kit = self.engine.kit
        return choose(kit.template, kit.architecture, self.spec.tool_call_parser, self.spec.reasoning_parser)

    @property
    def limit(self) -> int:
        """Sequences that may be in the house: a full batch and a full queue."""
        batch = self.loaded.client.ready.max_num_seqs if self.loaded else self.spec.max_num_seqs
        return batch + self.spec.max_queue


class Models:
    """All models of one server, by every name they are served under."""

    def __init__(self, models: Iterable[Model]) -> None:
        self.all = list(models)
        self._by_name: dict[str, Model] = {}
        for model in self.all:
            for name in model.names:
                if name in self._by_name:
                    raise ConfigError(
                        f"two models are served as {name!r}; give one another name (NAME=MODEL)",
                        param="served_model_name",
                    )
                self._by_name[name] = model

    def find(self, name: str) -> Model:
        """The model of a name; raises NotFound naming those that are served."""
        model = self._by_name.get(name)
        if model is None:
            served = ", ".join(self._by_name)
            raise NotFound(
                f"no model {name[:200]!r}{nearest(name[:200], self._by_name)}; served here: {served}",
                param="model",
                code="model_not_found",
            )
        return model

    @property
    def names(self) -> Sequence[str]:
        return list(self._by_name)

    def engines(self) -> dict[str, AsyncEngine]:
        """The engines that are loaded, by canonical name."""
        return {model.name: model.loaded for model in self.all if model.loaded is not None}


class State:
    """Shared by all handlers of one server.

    Attributes:
        running: tasks of requests being answered.
        draining: set when the server takes no more requests.
        other_counts: asks the other HTTP processes of this server what they have counted.
        joining: set while further HTTP processes of this server start.

    Args:
        jobs: this process keeps files and batch jobs, if the server has any.
    """

    def __init__(
        self, models: Models, options: ServerOptions, places: Places | None = None, *, jobs: bool = True
    ) -> None:
        self.models = models
        self.options = options
        self.keys = Keys(options.api_keys)
        self.metrics = Metrics(models.engines)
        self.admission = Admission(self.metrics, places, options.api_server_count)
        self.grammars = GrammarChecker()
        self.responses = ResponseStore()
        self.running: set[asyncio.Task[object]] = set()
        self.draining = self.joining = False
        self.other_counts: Callable[[], Awaitable[list[Counts]]] = _no_others
        self.batches: BatchJobs | None = None
        if options.data_dir is not None and jobs:
            key = options.api_keys[0] if options.api_keys else None
            try:
                self.batches = BatchJobs(Path(options.data_dir), key, self._all_loaded)
            except OSError as error:
                raise ConfigError(
                    f"--data-dir {options.data_dir} cannot be used: {error.strerror or error}; give a folder that "
                    "can be written",
                    param="data_dir",
                ) from error

    def _all_loaded(self) -> bool:
        return all(model.loaded is not None for model in self.models.all)


async def _no_others() -> list[Counts]:
    return []


STATE: web.AppKey[State] = web.AppKey("state", State)
