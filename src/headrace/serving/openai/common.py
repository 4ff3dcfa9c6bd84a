"""Fields that chat completions and completions share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from headrace.serving.openai.fields import ApiModel, Many, Numbers, acts, harmless, refused

__all__ = ["GenerateFields", "StopText", "StreamOptions"]

MAX_CHOICES = 128
INT32 = 2**31 - 1  # what any engine holds in a number
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
StopList = Annotated[Many[StopText], Field(max_length=32)]
TokenIds = Many[int]
_BEAMS = "it belongs to beam search, which is not offered; sampling and best_of are"
_REMOTE = "prefill and decode run in one engine here"


class StreamOptions(ApiModel):
    """What a stream tells beside text."""

    include_usage: bool | None = acts(None, "A last chunk with usage and no choices.")
    continuous_usage_stats: bool | None = acts(None, "Usage so far in every chunk.")
    include_obfuscation: bool | None = harmless("Chunks are never padded with random text.")


class GenerateFields(ApiModel):
    """Sampling, stopping, streaming and the extras of other open servers."""

    model: str = Field(
        description="A served name; GET /v1/models lists them.", json_schema_extra={"effect": "acted on"}
    )
    stream: bool | None = acts(None, "Server-sent events instead of one reply.")
    stream_options: StreamOptions | None = acts(None, "Only together with `stream`.")
    n: int | None = acts(None, "Choices for each prompt.", ge=1, le=MAX_CHOICES)
    best_of: int | None = acts(
        None,
        "Run so many, return the `n` of highest log-probability per token. Not with `stream` if above `n`.",
        ge=1,
        le=MAX_CHOICES,
    )
    max_tokens: int | None = acts(None, "Output tokens at most; cut to what the context holds.", le=INT32)
    min_tokens: int | None = acts(None, "No end token, stop id or stop string before so many tokens.")
    temperature: float | None = acts(None, "0 is greedy. Default: the checkpoint's own advice, else 1.")
    top_p: float | None = acts(None, "Nucleus: the smallest set of tokens with this probability, in (0, 1].")
    top_k: int | None = acts(None, "The k most likely tokens; 0 or -1 is off.", le=INT32)
    min_p: float | None = acts(None, "Tokens at least this likely relative to the most likely one.")
    top_p_min: float | None = refused("a lower bound for a decaying top_p; use min_p", 0, 0.0)
    repetition_penalty: float | None = acts(None, "Above 1 makes tokens of prompt and output less likely.")
    frequency_penalty: float | None = acts(None, "Subtracted once per occurrence in the output.")
    presence_penalty: float | None = acts(None, "Subtracted for each token that occurs in the output.")
    length_penalty: float | None = refused(_BEAMS, 1, 1.0)
    early_stopping: bool | None = refused(_BEAMS, False)
    use_beam_search: bool | None = refused("beam search is not offered; use best_of", False)
    logit_bias: Numbers | None = acts(None, "Token id (a string) to a number added to its logit.")
    seed: int | None = acts(None, "The same seed gives the same text in any batch; choice k derives its own.")
    stop: StopText | StopList | None = acts(
        None, "A string or up to 32; output ends before the first that occurs."
    )
    stop_token_ids: TokenIds | None = acts(None, "Token ids that end the output.")
    include_stop_str_in_output: bool | None = acts(None, "Keep the stop string or stop token's text.")
    ignore_eos: bool | None = acts(None, "Go on after the model's end token.")
    bad: StopText | StopList | None = acts(None, "Strings whose token sequences must not appear.")
    bad_words: StopList | None = acts(None, "The same as `bad`.")
    bad_token_ids: TokenIds | None = acts(None, "Token ids that must not appear.")
    allowed_token_ids: TokenIds | None = refused("use logit_bias, bad_token_ids or a grammar")
    skip_special_tokens: bool | None = acts(None, "Leave special tokens out of the text (default true).")
    spaces_between_special_tokens: bool | None = harmless(
        "Nothing is put between special tokens that are shown."
    )
    truncate_prompt_tokens: int | None = acts(
        None, "Keep only the last so many prompt tokens; -1: what fits.", ge=-1
    )
    prompt_logprobs: int | None = acts(None, "Log-probabilities of the prompt's tokens; not with `stream`.")
    return_token_ids: bool | None = acts(None, "Add `token_ids` to choices and `prompt_token_ids`.")
    return_tokens_as_token_ids: bool | None = acts(None, "Name tokens `token_id:N` in logprobs.")
    priority: int | None = acts(None, "Lower runs first.", ge=-INT32, le=INT32)
    cache_salt: str | None = acts(None, "Prompt prefixes are shared only within one salt.", max_length=256)
    user: str | None = harmless("For the caller's own books.")
    request_id: str | None = harmless("Use the x-request-id header.")
    response_format: dict[str, Any] | None = acts(
        None,
        "`text`, `json_object`, `json_schema`, `regex`, `choice`, `grammar` (Lark or GBNF), `structural_tag`.",
    )
    structured_outputs: dict[str, Any] | None = acts(
        None, "vLLM's form: one of json, json_object, regex, choice, grammar, structural_tag."
    )
    guided_json: Any = acts(None, "A JSON schema (older form of `structured_outputs`).")
    guided_regex: str | None = acts(None, "The whole answer matches this regular expression.")
    guided_choice: Many[str] | None = acts(None, "The answer is one of these.")
    guided_grammar: str | None = acts(None, "The answer follows this grammar (Lark or GBNF).")
    json_schema: Any = acts(None, "SGLang's name of `guided_json`; often a text that holds the schema.")
    regex: str | None = acts(None, "SGLang's name of `guided_regex`.")
    ebnf: str | None = acts(None, "SGLang's name of `guided_grammar`.")
    guided_decoding_backend: str | None = harmless("There is one back end.")
    guided_whitespace_pattern: str | None = refused("whitespace in JSON is the compiler's choice")
    structural_tag: Any = acts(None, "Free text with tags whose inside is constrained.")
    logits_processors: Any = refused("no foreign code runs in the engine")
    disaggregated_params: Any = refused(_REMOTE)
    kv_transfer_params: Any = refused(_REMOTE)
    mm_processor_kwargs: Any = refused("this server reads text only")
    vllm_xargs: Any = refused("there is no plug-in that would read it")
