"""One served model: text in, text or vectors out, over any engine core. Imports no torch."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from headrace.config.spec import EngineSpec
from headrace.engines.child import CoreChild
from headrace.engines.client import EngineClient, Health
from headrace.errors import ContextLengthExceeded, InvalidRequest, Unprocessable
from headrace.llm.choice import Choice, Delta
from headrace.llm.encoder import INLINE_CHARS, Embeddings, Encoder
from headrace.llm.generation import Generation
from headrace.llm.protocols import Messages, Prompt, TextKit
from headrace.llm.results import Completion, Result, collect
from headrace.text.encoding import Direction, EncodeText, Truncate
from headrace.text.rerank import RerankTemplate
from headrace.text.stopping import StopMatcher
from headrace.types import EncodeParams, Request, SamplingParams

if TYPE_CHECKING:
    from headrace.engines.attached import Attachment

__all__ = ["AsyncEngine", "Embeddings", "PromptLike"]

PromptLike = str | Sequence[int] | Prompt
_GOLDEN = 0x9E3779B97F4A7C15
_EMBEDDERS = ("bert", "embed")
T = TypeVar("T")


def choice_seed(seed: int | None, k: int) -> int | None:
    """Seed of the k-th choice: the given one first, then others that differ yet are reproducible."""
    if seed is None:
        return None
    return (seed + k * _GOLDEN + 2**63) % 2**64 - 2**63


class AsyncEngine:
    """Joins an engine core with its tokenizer, chat template and detokenizers.

    Args:
        client: the engine core.
        text: tokenizer and template; None serves token ids only.
        sampling_defaults: what the checkpoint's own ``generation_config.json`` advises.
        encode_text: how an embedder, classifier or reranker reads texts; None for models that generate.
        rerank_template: how a causal reranker wants query and document put.
        tokenizer_threads: threads for texts too long to tokenize on the event loop.
    """

    def __init__(
        self,
        client: EngineClient,
        text: TextKit | None,
        *,
        sampling_defaults: Mapping[str, Any] | None = None,
        encode_text: EncodeText | None = None,
        rerank_template: RerankTemplate | None = None,
        tokenizer_threads: int = 2,
    ) -> None:
        self.client = client
        self.text = text
        self.sampling_defaults = dict(sampling_defaults or {})
        self._threads = ThreadPoolExecutor(tokenizer_threads, thread_name_prefix="tokenize")
        self._encoder: Encoder | None = None
        if encode_text is not None:
            self._encoder = Encoder(client, encode_text, rerank_template, self._threads)

    @classmethod
    async def start(
        cls,
        spec: EngineSpec,
        on_loading: Callable[[int, int, str], None] | None = None,
        child: CoreChild | None = None,
    ) -> AsyncEngine:
        """Start an engine core as the spec says and wait until it is ready.

        Args:
            on_loading: told the bytes of weights in place and in all, and then ``weights``; or of kernels that are
                compiled, how many, of how many, and ``kernels``.
            child: a process for the core that was started before (with the same device and environment).

        Raises ConfigError and ModelError when the model cannot be served, EngineDead when its process dies.
        """
        from headrace.llm.startup import start

        return cls._over(*await start(spec, on_loading, child))

    @classmethod
    async def attach(cls, attachment: Attachment) -> AsyncEngine:
        """A further client of a core that another process runs (`ProcessClient.share`)."""
        from headrace.llm.startup import attach

        return cls._over(*await attach(attachment))

    @classmethod
    def _over(cls, client: EngineClient, text: TextKit, defaults: Mapping[str, Any]) -> AsyncEngine:
        from headrace.llm.startup import encode_side

        encode_text, template = encode_side(client, text)
        return cls(
            client, text, sampling_defaults=defaults, encode_text=encode_text, rerank_template=template
        )

    @property
    def name(self) -> str:
        """The canonical served name."""
        return self.client.spec.name

    @property
    def max_model_len(self) -> int:
        return self.client.ready.max_model_len

    @property
    def embeds(self) -> bool:
        """True for single-pass models (vectors), false for those that generate text."""
        return self.client.ready.engine in _EMBEDDERS

    def health(self) -> Health:
        return self.client.health()

    async def close(self, drain: bool = True) -> None:
        """Stop the core, finishing what runs first if asked to."""
        await self.client.close(drain)
        self._threads.shutdown(wait=False, cancel_futures=True)

    # Text to prompts -------------------------------------------------------------------------------------

    @property
    def kit(self) -> TextKit:
        if self.text is None:
            raise Unprocessable(f"model {self.name!r} was started without a tokenizer; send token ids")
        return self.text

    async def _offload(self, size: int, work: Callable[[], T]) -> T:
        """Run it here when small, in a thread when it would hold up the other requests."""
        if size <= INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def prompts(
        self, inputs: Sequence[PromptLike], *, add_special_tokens: bool = True, cut: bool = False
    ) -> list[Prompt]:
        """Tokenize texts; take token ids and Prompts as they are.

        Args:
            cut: they will be cut to fit. Else a text that is far too long is refused by its beginning.

        Raises ContextLengthExceeded.
        """
        size = sum(len(item) for item in inputs if isinstance(item, str))
        return await self._offload(size, partial(self._prompts, inputs, add_special_tokens, cut))

    def _prompts(self, inputs: Sequence[PromptLike], add_special_tokens: bool, cut: bool) -> list[Prompt]:
        texts = [item for item in inputs if isinstance(item, str)]
        if not cut:
            for text in texts:
                self._check_length(text, "prompt")
        if len(texts) > 1:
            encoded = iter(self.kit.tokenizer.encode_batch(texts, add_special_tokens))
        else:
            encoded = iter([self.kit.tokenizer.encode(text, add_special_tokens) for text in texts])
        prompts = []
        for item in inputs:
            if isinstance(item, str):
                prompts.append(Prompt(tuple(next(encoded)), item))
            else:
                prompts.append(item if isinstance(item, Prompt) else Prompt(tuple(item)))
        return prompts

    def _check_length(self, text: str, param: str) -> None:
        """Refuse a text that is far too long without reading it to its end: that may take half a minute.

        A beginning with twice the tokens that fit is proof enough: cutting a text splits its last word only.
        """
        limit = self.max_model_len
        size = 8 * limit  # characters; few prompts that fit are longer
        while size < len(text):
            if (count := len(self.kit.tokenizer.encode(text[:size], False))) > 2 * limit:
                raise self._too_long(f"more than {count} tokens", param)
            size *= 2

    def _too_long(self, count: str, param: str) -> ContextLengthExceeded:
        return ContextLengthExceeded(
            f"the prompt has {count}, but model {self.name!r} holds {self.max_model_len} tokens of "
            "prompt and output together; shorten it or set truncate_prompt_tokens",
            param=param,
        )

    async def chat_prompt(
        self, messages: Messages, *, add_special_tokens: bool = False, cut: bool = False, **options: Any
    ) -> Prompt:
        """Render messages with the chat template and tokenize the result; ``cut`` as in `prompts`.

        ``options`` are those of `TextKit.render`: ``tools``, ``documents``, ``add_generation_prompt``...
        """
        self._check_generates()
        kit = self.kit

        def work() -> Prompt:
            text = kit.render(messages, **options)
            if not cut:
                self._check_length(text, "messages")
            ids = kit.tokenizer.encode(text, add_special_tokens)
            return Prompt(tuple(ids), text, bool(options.get("continue_final_message")), "messages")

        foreign = options.get("chat_template") is not None  # a program from outside: never on the event loop
        return await self._offload(INLINE_CHARS + 1 if foreign else _size(messages), work)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included; raises InvalidRequest (param ``tokens``)."""
        _check_ids(token_ids, self.client.ready.vocab_size, "tokens")
        work = partial(self.kit.tokenizer.decode, token_ids, skip_special_tokens=False)
        return await self._offload(len(token_ids), work)

    def bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token sequences that spell these words, at the start of a text and after a space."""
        sequences: dict[tuple[int, ...], None] = {}
        for word in words:
            for spelling in (word, f" {word.lstrip()}"):
                ids = tuple(self.kit.tokenizer.encode(spelling, False))
                if ids:
                    sequences[ids] = None
        return tuple(sequences)

    # Generation ------------------------------------------------------------------------------------------

    def open(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        n: int = 1,
        truncate_prompt_tokens: int | None = None,
        priority: int = 0,
        cache_salt: str = "",
        deadline: float | None = None,
        visible: frozenset[int] = frozenset(),
    ) -> Generation:
        """Check everything and prepare the call; it runs when the Generation is iterated.

        Args:
            truncate_prompt_tokens: keep only the last so many; -1: as many as fit beside ``max_tokens``.
            deadline: seconds of the monotonic clock.
            visible: special tokens that are text all the same (markers that a parser looks for).

        Raises InvalidRequest, ContextLengthExceeded, Unprocessable.
        """
        self._check_generates()
        spec = self.client.spec
        if spec.stop:
            params = msgspec.structs.replace(params, stop=(*params.stop, *spec.stop))
        if params.max_tokens is None and spec.default_max_tokens is not None:
            params = msgspec.structs.replace(params, max_tokens=spec.default_max_tokens)
        self._check_params(params)
        fitted = [self._fit(prompt, params, truncate_prompt_tokens) for prompt in prompts]
        base = uuid.uuid4().hex
        choices = []
        for place, prompt in enumerate(fitted):
            room = self.max_model_len - len(prompt.token_ids)
            limit = room if params.max_tokens is None else min(params.max_tokens, room)
            for k in range(n):
                index = place * n + k
                own = msgspec.structs.replace(params, max_tokens=limit, seed=choice_seed(params.seed, k))
                request = Request(
                    id=f"{base}-{index}",
                    token_ids=prompt.token_ids,
                    sampling=own,
                    priority=priority,
                    cache_salt=cache_salt,
                    deadline=deadline,
                )
                choices.append(self._choice(index, request, own, prompt, visible))
        return Generation(self.client, fitted, choices)

    def _check_generates(self) -> None:
        if self.embeds:
            raise Unprocessable(
                f"model {self.name!r} makes embeddings and generates no text; use /v1/embeddings",
                param="model",
            )

    def _choice(
        self, index: int, request: Request, params: SamplingParams, prompt: Prompt, visible: frozenset[int]
    ) -> Choice:
        detokenizer = self.kit.detokenizer(
            skip_special_tokens=params.skip_special_tokens, continuing=prompt.continuing, visible=visible
        )
        stops = None
        if params.stop:
            stops = StopMatcher(params.stop, include_stop=params.include_stop_str_in_output)
        return Choice(index, request, detokenizer, stops)

    def _check_params(self, params: SamplingParams) -> None:
        vocab = self.client.ready.vocab_size
        for name, ids in (
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
            ("bad_words", [token for word in params.bad_words for token in word]),
        ):
            _check_ids(ids, vocab, name)

    def _fit(self, prompt: Prompt, params: SamplingParams, truncate: int | None) -> Prompt:
        limit = self.max_model_len
        if truncate is not None:
            _check_truncate(truncate)
            keep = limit - min(params.max_tokens or 1, limit - 1) if truncate == -1 else truncate
            if len(prompt.token_ids) > keep:
                prompt = msgspec.structs.replace(prompt, token_ids=prompt.token_ids[-keep:], text=None)
        count = len(prompt.token_ids)
        if count == 0:
            raise InvalidRequest("the prompt is empty: it has no tokens", param=prompt.param)
        if count + max(1, params.min_tokens) > limit:
            at_least = f" with min_tokens {params.min_tokens}" if params.min_tokens > 1 else ""
            raise self._too_long(f"{count} tokens{at_least}", prompt.param)
        _check_ids(prompt.token_ids, self.client.ready.vocab_size, prompt.param)
        return prompt

    async def _one_prompt(
        self, prompt: PromptLike | None, messages: Messages | None, options: dict[str, Any]
    ) -> Prompt:
        if (prompt is None) == (messages is None):
            raise InvalidRequest("give either prompt or messages, and not both", param="prompt")
        cut = options.get("truncate_prompt_tokens") is not None
        if messages is not None:
            return await self.chat_prompt(messages, cut=cut)
        assert prompt is not None
        return (await self.prompts([prompt], cut=cut))[0]

    async def generate(
        self,
        prompt: PromptLike | None = None,
        params: SamplingParams | None = None,
        *,
        messages: Messages | None = None,
        n: int = 1,
        **options: Any,
    ) -> AsyncIterator[Delta]:
        """Deltas of ``n`` choices as they come. Leaving the iterator aborts; ``options`` as for `open`."""
        one = await self._one_prompt(prompt, messages, options)
        generation = self.open([one], params or self.default_params(), n=n, **options)
        async with aclosing(generation):
            async for deltas in generation:
                for delta in deltas:
                    yield delta

    async def complete(
        self,
        prompt: PromptLike | None = None,
        params: SamplingParams | None = None,
        *,
        messages: Messages | None = None,
        n: int = 1,
        best_of: int | None = None,
        **options: Any,
    ) -> Result:
        """The whole answer: ``best_of`` choices run, the ``n`` of highest log-probability per token"""
        params = params or self.default_params()
        one = await self._one_prompt(prompt, messages, options)
        runs = n if best_of is None else best_of
        generation = self.open([one], ranked(params, n, runs), n=runs, **options)
        completions = best(await collect(generation), n, keep_logprobs=params.logprobs is not None)
        return Result(
            prompt=generation.prompts[0].text,
            prompt_token_ids=generation.prompts[0].token_ids,
            outputs=completions,
            usage=generation.usage,
            prompt_logprobs=generation.prompt_logprobs(0),
        )

    def default_params(self) -> SamplingParams:
        """What applies when the caller says nothing: the checkpoint's own advice."""
        return SamplingParams(**self.sampling_defaults)

    # Vectors ---------------------------------------------------------------------------------------------

    async def embed(
        self,
        inputs: Sequence[PromptLike],
        params: EncodeParams | None = None,
        *,
        truncate_prompt_tokens: int | None = None,
        truncate: bool | None = None,
        truncation_direction: Direction | None = None,
        prompt_name: str | None = None,
        add_special_tokens: bool = True,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Embeddings:
        """One vector an input, all in flight together.

        Args:
            truncate_prompt_tokens: cut inputs to so many tokens, special ones included; -1: to what fits.
            truncate: cut them to what fits, or refuse them; None: as the engine was told at its start.
            truncation_direction: the end that is cut off; None: the tokenizer's.
            prompt_name: a prompt of the checkpoint that is put before each text; "": not even its default one.

        Raises Unprocessable naming the input that is too long, and for a model of text.
        """
        cut: Truncate | None = None
        if truncate_prompt_tokens is not None:
            _check_truncate(truncate_prompt_tokens)
            limit = None if truncate_prompt_tokens == -1 else truncate_prompt_tokens
            cut = Truncate(truncation_direction, limit)
        elif self.encoder.auto_truncate is not None if truncate is None else truncate:
            cut = Truncate(truncation_direction)
        plain = [item.token_ids if isinstance(item, Prompt) else item for item in inputs]
        encoded = await self.encoder.texts(
            plain, prompt=prompt_name, truncate=cut, add_special_tokens=add_special_tokens
        )
        return await self.encoder.run(encoded, params or EncodeParams(), priority=priority, deadline=deadline)

    @property
    def encoder(self) -> Encoder:
        """Single passes; raises Unprocessable for a model that generates."""
        if self._encoder is None:
            why = (
                "was started without a tokenizer"
                if self.embeds
                else "generates text; use /v1/chat/completions"
            )
            raise Unprocessable(f"model {self.name!r} makes no embeddings: it {why}", param="model")
        return self._encoder


def ranked(params: SamplingParams, n: int, best_of: int) -> SamplingParams:
    """Parameters for ``best_of`` runs: ranking needs the tokens' log-probabilities."""
    if best_of == n or params.logprobs is not None:
        return params
    return msgspec.structs.replace(params, logprobs=0)


def best(completions: list[Completion], n: int, *, keep_logprobs: bool) -> list[Completion]:
    """The ``n`` of highest log-probability per token, numbered anew, best first."""
    if len(completions) > n:
        completions = sorted(completions, key=lambda c: -c.mean_logprob)[:n]
    for index, completion in enumerate(completions):
        completion.index = index
        if not keep_logprobs:
            completion.logprobs = []
    return completions


def _check_ids(ids: Any, vocab: int, name: str) -> None:
    """Refuse token ids outside the vocabulary (min and max: one pass in C each)."""
    if ids and (min(ids) < 0 or max(ids) >= vocab):
        wrong = next(token for token in ids if not 0 <= token < vocab)
        raise InvalidRequest(f"{name} holds token id {wrong}; expected ids from 0 to {vocab - 1}", param=name)


def _check_truncate(value: int) -> None:
    if value == 0 or value < -1:
        raise InvalidRequest(
            f"truncate_prompt_tokens is {value}; expected a number of tokens, or -1 for what fits",
            param="truncate_prompt_tokens",
        )


def _size(messages: Messages) -> int:
    """About how many characters the messages hold."""
    return sum(
        len(content if isinstance(content := m.get("content"), str) else str(content)) for m in messages
    )
