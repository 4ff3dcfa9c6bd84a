"""A real server on loopback over a scripted engine, with a tokenizer of bytes: no weights, no torch."""

from __future__ import annotations

import asyncio
import codecs
import functools
import http.client
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from headrace.config.spec import EngineSpec
from headrace.engines.scripted import ScriptedEngine, Step
from headrace.errors import InvalidRequest
from headrace.llm import AsyncEngine
from headrace.messages import Ready
from headrace.models.encode_card import EncodeCard
from headrace.serving.grammars import GrammarChecker
from headrace.serving.server import Server
from headrace.serving.state import Model, ServerOptions
from headrace.text.encoding import Encoded, EncodeText, Truncate
from headrace.types import EncodeTask, Request

BOS, EOS, NAMED = 256, 257, 258
THINK, UNTHINK = 263, 264
EXTRA = {
    259: b"Hel",
    260: b"lo",
    261: " 🎉".encode()[:3],
    262: "🎉".encode()[2:],
    THINK: b"<think>",
    UNTHINK: b"</think>",
}


class ByteTokenizer:
    """Ids 0 to 255 are bytes, then <bos>, <eos>, <named>, and a few longer tokens."""

    vocab_size = 512

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        return EXTRA.get(token_id) or {BOS: b"<bos>", EOS: b"<eos>", NAMED: b"<named>"}.get(token_id, b"")

    special_ids = frozenset((BOS, EOS, NAMED))

    def token_to_id(self, token: str) -> int | None:
        return {"<bos>": BOS, "<eos>": EOS, "<named>": NAMED, "<think>": THINK, "</think>": UNTHINK}.get(
            token
        )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        shown = (i for i in ids if not (skip_special_tokens and i in (BOS, EOS, NAMED)))
        return b"".join(map(self.token_bytes, shown)).decode("utf-8", "replace")


class ByteDetokenizer:
    def __init__(self, tokenizer: ByteTokenizer, skip: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        shown = (i for i in token_ids if not (self._skip and i in (BOS, EOS, NAMED)))
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, shown)))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteKit:
    """Renders `role: content` a line; refuses a conversation that begins with the assistant."""

    def __init__(self, template: str = "{{ messages }} {{ tools }}") -> None:
        self.tokenizer = ByteTokenizer()
        self.template = template
        self.architecture = ""
        self.rendered: list[dict[str, Any]] = []

    def render(self, messages: Any, *, add_generation_prompt: bool = True, **options: Any) -> str:
        self.rendered.append(
            {"messages": messages, "add_generation_prompt": add_generation_prompt, **options}
        )
        if messages[0]["role"] == "assistant":
            raise InvalidRequest("conversations begin with the user", param="messages")
        lines = [f"{message['role']}: {message.get('content')}" for message in messages]
        return "\n".join(lines) + ("\nassistant: " if add_generation_prompt else "")

    def detokenizer(
        self, *, skip_special_tokens: bool, continuing: bool, visible: frozenset[int] = frozenset()
    ) -> ByteDetokenizer:
        return ByteDetokenizer(self.tokenizer, skip_special_tokens)


class ByteEncodeText(EncodeText):
    """Texts of an embedder as bytes after <bos>."""

    def __init__(self, max_tokens: int) -> None:
        self.card = EncodeCard("ByteModel", "embed", (EncodeTask.EMBED,), ("mean",))
        self.max_tokens = max_tokens

    def prepared(self, texts: Sequence[str], prompt: str | None) -> list[str]:
        return list(texts)

    def encodings(self, texts: list[str], add_special_tokens: bool) -> Any:
        encode = ByteTokenizer().encode
        return [encode(text, add_special_tokens) for text in texts]

    def finished(self, whole: Any, found: Any, *, truncate: Truncate | None, **options: Any) -> list[Encoded]:
        return [self.ids(ids, truncate, f"{options['param']}[{place}]") for place, ids in enumerate(found)]


def says(
    text: str, *, delay: float = 0.0, size: int = 1, eos: bool = True
) -> Callable[[Request], Iterator[Step]]:
    """A script that says this, ``size`` bytes a step, and ends with <eos> or goes on saying it."""
    data = text.encode()

    def script(request: Request) -> Iterator[Step]:
        while True:
            for start in range(0, len(data), size):
                yield Step(tuple(data[start : start + size]), delay)
            if eos:
                yield Step((EOS,), delay, stop=True)
                return

    return script


class LiveServer:
    """A server on a thread of its own."""

    def __init__(self, models: list[Model], options: ServerOptions) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.server = self.call(_make(models, options))
        self.url = self.server.url
        self.port = int(self.url.rsplit(":", 1)[1])
        self.state = self.server.state

    def call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(120)

    def close(self) -> None:
        self.call(self.server.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(120)
        self.loop.close()

    def core(self, name: str = "m") -> ScriptedEngine:
        return self.state.models.find(name).engine.client  # type: ignore[return-value]

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, parsed JSON (or text) and headers of one exchange."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, data, headers or {})
        reply = connection.getresponse()
        text = reply.read()
        found = {key.lower(): value for key, value in reply.getheaders()}
        connection.close()
        is_json = found.get("content-type", "").startswith("application/json")
        return reply.status, json.loads(text) if is_json else text.decode(), found

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, dict[str, str]]:
        return self.request("POST", path, body, headers)


async def _make(models: list[Model], options: ServerOptions) -> Server:
    server = Server(models, options)
    await server.listen()
    return server


def scripted_model(
    script: Any = None, *, name: str = "m", names: tuple[str, ...] = (), kind: str = "dense", **more: Any
) -> Model:
    """A Model over a ScriptedEngine."""
    spec = EngineSpec(
        model=name,
        served_names=(name, *names),
        max_queue=more.pop("max_queue", 2048),
        tool_call_parser=more.pop("tool_call_parser", None),
        reasoning_parser=more.pop("reasoning_parser", None),
    )
    kit = ByteKit(**({"template": more.pop("template")} if "template" in more else {}))
    ready = Ready(kind, more.pop("max_model_len", 4096), more.pop("max_num_seqs", 16), 512)
    defaults = more.pop("sampling_defaults", None)
    core = ScriptedEngine(script or says("Hello!"), spec=spec, ready=ready, **more)
    text = ByteEncodeText(ready.max_model_len) if kind in ("bert", "embed") else None
    return Model(spec, AsyncEngine(core, kit, sampling_defaults=defaults, encode_text=text))


class _KeptChildren(GrammarChecker):
    """Outlives its servers: children of their own cost every test the start of a process or two."""

    async def close(self) -> None:
        """They end with this process, at the end of their input."""


_kept_children = functools.cache(_KeptChildren)


@contextmanager
def live(*models: Model, **options: Any) -> Iterator[LiveServer]:
    """A server with these models (by default one named ``m`` that says "Hello!")."""
    server = LiveServer(list(models) or [scripted_model()], ServerOptions(port=0, **options))
    server.state.grammars = _kept_children()
    try:
        yield server
    finally:
        server.close()


def events(text: str) -> list[Any]:
    """The data of server-sent events; [DONE] as it is."""
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [one if one == "[DONE]" else json.loads(one) for one in found]
