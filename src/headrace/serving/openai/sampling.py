"""From API fields to SamplingParams."""

from __future__ import annotations

from typing import Any

from headrace.errors import InvalidRequest
from headrace.llm import AsyncEngine
from headrace.serving.openai.common import GenerateFields
from headrace.types import ConstraintSpec, SamplingParams

__all__ = ["check_stream", "num_choices", "sampling_params"]

_SAME = (
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "prompt_logprobs",
)


def sampling_params(
    body: GenerateFields,
    engine: AsyncEngine,
    *,
    logprobs: int | None,
    max_tokens: int | None,
    limit: str = "max_tokens",
    constraint: ConstraintSpec | None = None,
) -> SamplingParams:
    """Sampling parameters of a request; what it leaves out follows the checkpoint's advice.

    Args:
        limit: name of the field that ``max_tokens`` comes from.

    Raises InvalidRequest naming the API's field.
    """
    _no_special_text(constraint, engine)
    values: dict[str, Any] = dict(engine.sampling_defaults)
    values |= {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    values |= {
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "logit_bias": _logit_bias(body.logit_bias),
        "stop": _texts(body.stop),
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "bad_words": _bad_words(body, engine),
        "constraint": constraint,
    }
    try:
        return SamplingParams(**values)
    except InvalidRequest as error:
        if error.param == "max_tokens" and limit != "max_tokens":
            raise InvalidRequest(error.message.replace("max_tokens", limit), param=limit) from error
        raise


_SPECIAL_TEXTS: dict[int, tuple[Any, tuple[str, ...]]] = {}  # by id of the tokenizer, which is kept with them


def _special_texts(tokenizer: Any) -> tuple[str, ...]:
    known = _SPECIAL_TEXTS.get(id(tokenizer))
    if known is None:
        found = (tokenizer.token_bytes(number).decode("utf-8", "replace") for number in tokenizer.special_ids)
        known = (tokenizer, tuple(text for text in found if len(text) > 2))
        if len(_SPECIAL_TEXTS) >= 32:
            _SPECIAL_TEXTS.clear()
        _SPECIAL_TEXTS[id(tokenizer)] = known
    return known[1]


def _no_special_text(constraint: ConstraintSpec | None, engine: AsyncEngine) -> None:
    """Where a grammar demands the text of a special token, only that token could be written, and it is no text."""
    if constraint is None or constraint.kind in ("text", "lark"):  # lark: markers of the model's own format
        return
    tokenizer: Any = engine.kit.tokenizer
    for text in _special_texts(tokenizer):
        if text in constraint.text:
            raise InvalidRequest(
                f"the grammar holds {text!r}, which is a special token of this model and cannot be written as text",
                param="response_format",
                code="invalid_grammar",
            )


def num_choices(body: GenerateFields) -> tuple[int, int]:
    """How many choices to return (n) and to run (best_of)."""
    n = body.n or 1
    runs = body.best_of or n
    if runs < n:
        raise InvalidRequest(f"best_of is {runs}; expected at least n, which is {n}", param="best_of")
    if body.stream and runs > n:
        raise InvalidRequest(
            "best_of above n cannot be streamed: the best is known only at the end", param="best_of"
        )
    if runs > 1 and body.temperature == 0.0 and runs > n:
        raise InvalidRequest(
            "best_of makes no sense at temperature 0: all choices are the same", param="best_of"
        )
    return n, runs


def check_stream(body: GenerateFields) -> None:
    """Combinations with ``stream`` that make no sense."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest(
            "stream_options is only allowed together with stream: true", param="stream_options"
        )
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs is not available with stream: true", param="prompt_logprobs")


def _texts(value: str | list[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _bad_words(body: GenerateFields, engine: AsyncEngine) -> tuple[tuple[int, ...], ...]:
    words = (*_texts(body.bad), *_texts(body.bad_words))
    single = tuple((token,) for token in body.bad_token_ids or ())
    return engine.bad_words(words) + single if words else single


def _logit_bias(given: dict[str, float] | None) -> dict[int, float]:
    bias = {}
    for key, value in (given or {}).items():
        if not key.isdecimal() or len(key) > 12:
            raise InvalidRequest(
                f'logit_bias has the key {key[:40]!r}; expected token ids, such as "42"', param="logit_bias"
            )
        bias[int(key)] = value
    return bias
