"""What a request is, and what comes back: frozen, validated, without tensors.

These types cross every wall of the house once, unchanged. They import nothing of ours but errors.
"""

from __future__ import annotations

import math
from enum import StrEnum

import msgspec

from headrace.errors import InvalidRequest

__all__ = [
    "ConstraintSpec",
    "EncodeOutput",
    "EncodeParams",
    "EncodeTask",
    "FinishReason",
    "Judged",
    "Output",
    "Request",
    "SamplingParams",
    "TokenLogprobs",
    "Usage",
]

MAX_LOGPROBS = 20
_INT64 = 2**63


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # end token, stop id or stop string
    LENGTH = "length"  # max_tokens or the context
    ABORT = "abort"  # the client left, or the deadline passed
    ERROR = "error"  # the engine failed this request; Output.error says how


class Judged(msgspec.Struct, frozen=True, array_like=True):
    """What it cost to compile a grammar in a process with limits.

    Attributes:
        cpu_ms: of compiling and the first mask.
        bytes: by which the process grew.
    """

    cpu_ms: float
    bytes: int


class ConstraintSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """A grammar that the output must follow.

    Attributes:
        kind: ``json_object``, ``json_schema``, ``regex``, ``choice``, ``grammar``, ``lark``, ``structural_tag``, or
            ``text`` (anything, for a head with a limit).
        text: its canonical source (JSON for schemas, choices and tags; Lark or GBNF for grammars).
        free_until: token ids that end an unconstrained head (thinking); empty: constrained from the start.
        free_from: the head is there only if the output begins with this token; None: it is there.
        free_tokens: longest head in tokens; then ``free_until`` is forced. None: no limit.
        judged: what compiling costs; None: nobody has tried, so the core does before it compiles for itself.
    """

    kind: str
    text: str
    free_until: tuple[int, ...] = ()
    free_from: int | None = None
    free_tokens: int | None = None
    judged: Judged | None = None


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens. Defaults leave the model's distribution unchanged.

    Attributes:
        max_tokens: output tokens at most; None: as many as the context holds.
        min_tokens: end and stop tokens are masked, and stop strings not looked for, before this many.
        temperature: 0 is greedy.
        top_k: 0 or -1 is off.
        repetition_penalty: > 1 makes every token of prompt and output less likely (Keskar et al. 2019).
        presence_penalty, frequency_penalty: OpenAI's, over output tokens only.
        logit_bias: token id -> added to its logit.
        seed: the same seed gives the same tokens in any batch; None draws one.
        stop: strings that end the output (checked where text is made, outside the engine core).
        stop_token_ids: ids that end the output.
        bad_words: token id sequences that must not appear.
        logprobs: None, or how many most likely tokens to report beside the sampled one.
        prompt_logprobs: the same for prompt tokens (turns prefix reuse off for this request).
        constraint: a grammar for the output.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: ConstraintSpec | None = None

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, 1, None, optional=True)
        _check("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check("temperature", self.temperature, 0.0, 100.0)
        _check("top_p", self.top_p, 0.0, 1.0, above=True)
        _check("top_k", self.top_k, -1, None)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100.0)  # smaller ones overflow logits
        _check("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _check("seed", self.seed, -_INT64, _INT64 - 1, optional=True)
        _check("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _check("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        for token, bias in self.logit_bias.items():
            _check(f"logit_bias[{token}]", bias, -1e4, 1e4)
        if any(not word for word in self.bad_words):
            raise InvalidRequest(
                "bad_words holds an empty sequence; give at least one token id", param="bad_words"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _check(
    name: str,
    value: float | None,
    low: float | None,
    high: float | None,
    *,
    optional: bool = False,
    above: bool = False,
) -> None:
    """Refuse a value outside [low, high] (or (low, high] with ``above``), NaN and infinities included."""
    if value is None:
        if optional:
            return
        raise InvalidRequest(f"{name} must be a number, not null", param=name)
    bad = isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
    if not bad:
        bad = (low is not None and (value <= low if above else value < low)) or (
            high is not None and value > high
        )
    if bad:
        bounds = []
        if low is not None:
            bounds.append(f"{'above' if above else 'at least'} {low:g}")
        if high is not None:
            bounds.append(f"at most {high:g}")
        raise InvalidRequest(f"{name} is {value!r}; expected a number {' and '.join(bounds)}", param=name)


class EncodeTask(StrEnum):
    """What a single pass returns."""

    EMBED = "embed"  # one pooled vector
    EMBED_ALL = "embed_all"  # one vector a token
    SPARSE = "sparse"  # {token id: weight}
    CLASSIFY = "classify"  # one logit a label
    TOKEN_CLASSIFY = "token_classify"  # one logit a label and token
    SCORE = "score"  # one logit for a pair (rerank)


class EncodeParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What to compute in one pass.

    Attributes:
        normalize: L2-normalize vectors; None follows the checkpoint.
        dimensions: Matryoshka: keep this many leading dimensions, then normalize again.
        raw_scores: logits instead of probabilities.
        also: further results of the same pass (BGE-M3: dense, sparse and token vectors).
    """

    task: EncodeTask = EncodeTask.EMBED
    normalize: bool | None = None
    dimensions: int | None = None
    raw_scores: bool = False
    also: tuple[EncodeTask, ...] = ()


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence for an engine core. Exactly one of ``sampling`` and ``encode`` is set.

    Attributes:
        id: unique among live requests of the core.
        token_ids: the prompt, or the text(s) to encode; never empty.
        token_types: segment ids for encoders with pairs; empty: all zero.
        priority: lower runs first; equal ones in order of arrival.
        cache_salt: requests share cached prefixes only within one salt.
        adapter: name of a LoRA adapter; empty: the base model.
        deadline: seconds of the monotonic clock after which the core drops it.
    """

    id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams | None = None
    encode: EncodeParams | None = None
    token_types: tuple[int, ...] = ()
    priority: int = 0
    cache_salt: str = ""
    adapter: str = ""
    deadline: float | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position.

    Attributes:
        token_id: the token that stands there.
        logprob: its own.
        rank: 1 for the most likely token.
        top: the most likely tokens, best first, as (token id, log-probability).
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class Output(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """What one step adds to one sequence.

    Attributes:
        token_ids: tokens sampled since the last Output of this request.
        logprobs: one entry a token of ``token_ids`` if asked for.
        stop_token: the id that ended the sequence, when one did.
        num_cached_tokens: prompt tokens found in the prefix cache (first Output only).
        prompt_logprobs: one entry a prompt token from the second on (first Output only).
        error: why the request failed, with FinishReason.ERROR.
        error_code, error_param: ``code`` and ``param`` of the exception it stands for; "": the engine's fault.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    stop_token: int | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: str = ""
    error_code: str = ""
    error_param: str = ""


class EncodeOutput(msgspec.Struct, frozen=True, array_like=True):
    """Result of one pass: a float32 array as little-endian bytes, row-major, and its shape.

    ``indices`` is set for sparse vectors (uint32 token ids, little-endian), ``error`` when it failed (with
    ``error_code`` and ``error_param`` as in Output), ``also`` when EncodeParams.also asked for more, in its order.
    """

    request_id: str
    data: bytes = b""
    shape: tuple[int, ...] = ()
    indices: bytes = b""
    error: str = ""
    also: tuple[EncodeOutput, ...] = ()
    error_code: str = ""
    error_param: str = ""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one request, as billed."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens
