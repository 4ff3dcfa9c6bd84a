"""Single passes with a checkpoint's own text handling: vectors, scores and labels of texts. Imports no torch."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

import msgspec

from headrace.engines.client import EngineClient
from headrace.errors import InvalidRequest, Unprocessable
from headrace.llm.tokenizing import TokenizeQueue
from headrace.text.encoding import Encoded, EncodeText, Truncate
from headrace.text.rerank import RerankTemplate
from headrace.types import EncodeOutput, EncodeParams, EncodeTask, Request, Usage

__all__ = ["Embeddings", "Encoder"]

INLINE_CHARS = 4096  # shorter texts are tokenized on the event loop: a thread hop costs more
T = TypeVar("T")
_ROUTES = {
    EncodeTask.EMBED: "/v1/embeddings",
    EncodeTask.EMBED_ALL: "/embed_all",
    EncodeTask.SPARSE: "/embed_sparse",
    EncodeTask.CLASSIFY: "/predict",
    EncodeTask.TOKEN_CLASSIFY: "/predict_tokens",
    EncodeTask.SCORE: "/rerank",
}


class Embeddings(msgspec.Struct, frozen=True):
    """Results in the order of the inputs, one EncodeOutput each."""

    outputs: tuple[EncodeOutput, ...]
    usage: Usage


class Encoder:
    """One embedder, classifier or reranker over any engine core.

    Args:
        text: tokenizer and what the checkpoint says about its inputs.
        template: how a causal reranker wants query and document put; None: pairs as the tokenizer makes them.
        threads: where long texts are tokenized.
    """

    def __init__(
        self, client: EngineClient, text: EncodeText, template: RerankTemplate | None, threads: Executor
    ) -> None:
        self.client, self.text, self.template = client, text, template
        self.card = text.card
        self._threads = threads
        self._queue = TokenizeQueue(text.encodings, threads)

    @property
    def auto_truncate(self) -> Truncate | None:
        """What applies to long inputs when a request does not say: BERT-like models cut them by default."""
        asked = self.client.spec.auto_truncate
        cut = self.client.ready.engine == "bert" if asked is None else asked
        return Truncate() if cut else None

    def check(self, task: EncodeTask) -> None:
        """Raises Unprocessable when this model does something else; the message says which route serves it."""
        if task not in self.card.tasks:
            serves = ", ".join(_ROUTES[task] for task in self.card.tasks)
            raise Unprocessable(
                f"model {self.client.spec.name!r} ({self.card.architecture}) has nothing for {_ROUTES[task]}; "
                f"it serves {serves}",
                param="model",
            )

    async def offload(self, size: int, work: Callable[[], T]) -> T:
        """Run it here when small, in a thread when it would hold up other requests."""
        if size <= INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def texts(
        self,
        inputs: Sequence[str | Sequence[int]],
        *,
        prompt: str | None = None,
        truncate: Truncate | None = None,
        add_special_tokens: bool = True,
        details: bool = False,
        param: str = "input",
    ) -> list[Encoded]:
        """Tokenize texts; take token ids as they are. Raises: see EncodeText.texts."""
        if not details and all(isinstance(item, str) for item in inputs):
            whole = self.text.prepared(inputs, prompt)  # type: ignore[arg-type]
            try:
                found = await self._queue.encode(whole, add_special_tokens)
            except (TypeError, UnicodeEncodeError):
                self.text.check_unicode(whole, param)
                raise
            return self.text.finished(
                whole, found, truncate=truncate, add_special_tokens=add_special_tokens, param=param
            )
        size = sum(len(item) for item in inputs if isinstance(item, str))
        work = partial(self._texts, inputs, prompt, truncate, add_special_tokens, details, param)
        return await self.offload(size, work)

    def _texts(
        self,
        inputs: Sequence[str | Sequence[int]],
        prompt: str | None,
        truncate: Truncate | None,
        special: bool,
        details: bool,
        param: str,
    ) -> list[Encoded]:
        if all(isinstance(item, str) for item in inputs):
            return self.text.texts(
                inputs,  # type: ignore[arg-type]
                prompt=prompt,
                truncate=truncate,
                add_special_tokens=special,
                details=details,
                param=param,
            )
        vocab = self.client.ready.vocab_size
        found = []
        for place, item in enumerate(inputs):
            name = f"{param}[{place}]"
            if isinstance(item, str):
                raise InvalidRequest(f"{param} mixes texts and token ids; send either", param=param)
            encoded = self.text.ids(item, truncate, name)
            if min(encoded.ids) < 0 or max(encoded.ids) >= vocab:
                raise InvalidRequest(
                    f"{name} holds a token id outside the vocabulary; expected 0 to {vocab - 1}", param=name
                )
            found.append(encoded)
        return found

    async def pairs(
        self,
        query: str,
        texts: Sequence[str],
        *,
        truncate: Truncate | None,
        instruction: str | None = None,
        param: str = "texts",
    ) -> list[Encoded]:
        """A query with each text, as this reranker reads them.

        Raises Unprocessable when the model is causal and no template says how to put them.
        """
        size = len(query) * len(texts) + sum(map(len, texts))
        if self.template is not None:
            template = self.template
            return await self.offload(
                size, lambda: template.encode(self.text, query, texts, instruction, truncate, param)
            )
        if instruction is not None:
            raise InvalidRequest("this reranker takes no instruction", param="instruction")
        if self.client.ready.engine == "embed":
            raise Unprocessable(
                f"model {self.client.spec.name!r} reranks with a prompt template, and none is known for it: start "
                "the server with --chat-template (jinja2 with the variables query, document and instruction), or "
                "send finished prompts to /predict",
                param="model",
            )
        pairs = [(query, text) for text in texts]
        return await self.offload(size, lambda: self.text.pairs(pairs, truncate=truncate, param=param))

    async def run(
        self,
        inputs: Sequence[Encoded],
        params: EncodeParams,
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Embeddings:
        """One pass for each, all in flight together; leaving cancels them all.

        Raises Unprocessable for a task that the model cannot do, InvalidRequest for wrong dimensions.
        """
        for task in (params.task, *params.also):
            self.check(task)
        self._check_dimensions(params)
        base = uuid.uuid4().hex
        requests = [
            Request(
                id=f"{base}-{place}",
                token_ids=encoded.ids,
                token_types=encoded.types,
                encode=params,
                priority=priority,
                deadline=deadline,
            )
            for place, encoded in enumerate(inputs)
        ]
        outputs = await self.client.encode_all(requests)
        if params.dimensions is not None and outputs and outputs[0].shape[-1] != params.dimensions:
            raise InvalidRequest(
                f"dimensions is {params.dimensions}, but this model makes {outputs[0].shape[-1]}",
                param="dimensions",
            )
        return Embeddings(tuple(outputs), Usage(prompt_tokens=sum(len(encoded.ids) for encoded in inputs)))

    def _check_dimensions(self, params: EncodeParams) -> None:
        wanted = params.dimensions
        if wanted is None:
            return
        size = int(self.client.ready.summary.get("dimensions") or 0)
        if size and wanted > size:
            raise InvalidRequest(
                f"dimensions is {wanted}; this model makes vectors of {size}", param="dimensions"
            )
        allowed = self.card.dimensions
        if allowed and wanted not in (*allowed, size):
            raise InvalidRequest(
                f"dimensions is {wanted}; this checkpoint was trained for {', '.join(map(str, allowed))}",
                param="dimensions",
            )
