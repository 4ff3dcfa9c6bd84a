"""Request bodies of OpenAI's API. Each field says whether it is acted on; docs/api.md is made from this."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from headrace.serving.body import FieldError
from headrace.serving.openai.common import INT32, GenerateFields
from headrace.serving.openai.fields import ApiModel, Many, acts, harmless, refused

__all__ = ["ChatRequest", "CompletionRequest", "EmbeddingRequest", "Message"]

MAX_INPUTS = 2048  # of a request; also its prompts times its choices
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ContentPart(ApiModel):
    """A piece of a message. Text models read text."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    video_url: Any = None
    prompt_cache_breakpoint: Any = None
    cache_control: Any = None

    @model_validator(mode="after")
    def _check(self) -> ContentPart:
        if self.type in ("text", "refusal"):
            if getattr(self, self.type) is None:
                raise ValueError(f"a part of type {self.type!r} needs the field {self.type!r}")
        else:
            known = "'text' or 'refusal'"
            raise ValueError(f"parts of type {self.type!r} are not supported by this model; expected {known}")
        return self

    @property
    def content(self) -> str:
        return self.text if self.type == "text" else self.refusal or ""  # type: ignore[return-value]


class FunctionCall(ApiModel):
    """A function the model called."""

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(ApiModel):
    """A call in an assistant message."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall
    index: int | None = None


class Message(ApiModel):
    """One turn of a conversation."""

    role: Role
    content: str | Many[ContentPart] | None = None
    name: str | None = None
    tool_calls: Many[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    annotations: Any = None
    audio: Any = None

    @model_validator(mode="after")
    def _check(self) -> Message:
        thoughts = self.reasoning_content or self.reasoning or self.thinking
        silent = not (self.tool_calls or self.function_call or self.refusal or thoughts)
        if self.content is None and (self.role != "assistant" or silent):
            raise ValueError(f"a message of role {self.role!r} needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls belong to the assistant, not to role {self.role!r}")
        return self


class FunctionTool(ApiModel):
    """A function offered to the model."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(ApiModel):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionTool


class ChatRequest(GenerateFields):
    """POST /v1/chat/completions"""

    messages: Many[Message] = Field(
        description="The conversation, text only.", min_length=1, json_schema_extra={"effect": "acted on"}
    )
    max_completion_tokens: int | None = acts(None, "The same as `max_tokens`, and goes before it.", le=INT32)
    logprobs: bool | None = acts(None, "Log-probabilities of the output's tokens.")
    top_logprobs: int | None = acts(
        None, "So many most likely tokens a position; needs `logprobs`.", ge=0, le=20
    )
    tools: Many[Tool] | None = acts(
        None, "Functions the model may call; calls follow their schemas wherever the format marks them."
    )
    tool_choice: str | dict[str, Any] | None = acts(
        None, "`auto`, `none`, `required`, a named function, or `allowed_tools`."
    )
    parallel_tool_calls: bool | None = acts(None, "False: at most one call in a turn (default true).")
    functions: Many[FunctionTool] | None = acts(None, "Old form of `tools`; calls come as `tool_calls`.")
    function_call: str | dict[str, Any] | None = acts(None, "Old form of `tool_choice`.")
    documents: Many[dict[str, Any]] | None = acts(None, "Handed to the chat template.")
    chat_template: str | None = acts(None, "Used instead of the model's own, if the server allows it.")
    chat_template_kwargs: dict[str, Any] | None = acts(None, "Variables for the chat template.")
    chat_template_args: dict[str, Any] | None = acts(None, "The same as `chat_template_kwargs`.")
    add_generation_prompt: bool | None = acts(
        None, "End the prompt where the assistant begins (default true)."
    )
    continue_final_message: bool | None = acts(None, "Continue the last message instead of answering it.")
    add_special_tokens: bool | None = acts(
        None, "Add begin tokens beside the template's own (default false)."
    )
    echo: bool | None = acts(None, "Begin the reply with the last message if that is the assistant's.")
    reasoning_effort: Effort | None = acts(
        None, "Handed to the chat template; `none` also sets its `enable_thinking` to false."
    )
    thinking_token_budget: int | None = acts(
        None, "So many tokens of thinking at most; then the model must answer.", ge=0, le=INT32
    )
    verbosity: Literal["low", "medium", "high"] | None = acts(
        None, "Handed to the chat template; a warning tells when that does not read it."
    )
    modalities: Many[Literal["text", "audio"]] | None = acts(None, "`text`; `audio` is refused.")
    audio: dict[str, Any] | None = harmless(
        "Only read together with `modalities: [audio]`, which is refused."
    )
    prediction: dict[str, Any] | None = harmless("A hint for speed; it never changes the reply.")
    store: bool | None = harmless("Nothing is ever stored.")
    metadata: dict[str, Any] | None = harmless("Belongs to stored replies.")
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = acts(
        None, "There is one tier: the reply says `default`."
    )
    safety_identifier: str | None = harmless("For the caller's own books.")
    prompt_cache_key: str | None = harmless("Prefixes are cached by content; see `cache_salt` to keep apart.")
    prompt_cache_options: dict[str, Any] | None = harmless("Prefixes are cached as memory allows.")
    prompt_cache_retention: Literal["in_memory", "24h", "in-memory"] | None = harmless(
        "Prefixes are cached as memory allows."
    )
    web_search_options: dict[str, Any] | None = refused("the model has no access to the web")
    moderation: dict[str, Any] | None = refused("no moderation model runs here")
    include_reasoning: bool | None = acts(None, "False leaves `reasoning_content` out of the reply.")

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if "audio" in (self.modalities or ()):
            raise FieldError("modalities", "modalities holds 'audio'; this model writes text only")
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs", "top_logprobs needs logprobs to be true")
        if self.tools and self.functions:
            raise FieldError("functions", "give tools or functions (its old form), and not both")
        if self.continue_final_message and self.add_generation_prompt:
            raise FieldError(
                "continue_final_message",
                "continue_final_message and add_generation_prompt exclude each other",
            )
        return self


class CompletionRequest(GenerateFields):
    """POST /v1/completions"""

    prompt: str | Many[str] | Many[int] | Many[Many[int]] = Field(
        description="Text, token ids, or a list of either.", json_schema_extra={"effect": "acted on"}
    )
    max_tokens: int | None = acts(
        None, "Output tokens at most (default 16, or the server's own); 0 only with `echo`.", ge=0, le=INT32
    )
    logprobs: int | None = acts(None, "So many most likely tokens a position.", ge=0, le=20)
    echo: bool | None = acts(None, "Begin the text with the prompt.")
    suffix: str | None = refused("this model cannot fill in the middle", "")
    add_special_tokens: bool | None = acts(None, "Add the tokenizer's begin tokens to texts (default true).")

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if isinstance(self.prompt, list) and not len(self.prompt) >= 1:
            raise FieldError(
                "prompt", "prompt is an empty list; expected text, token ids, or a list of either"
            )
        many = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        if many and len(self.prompt) > MAX_INPUTS:
            raise FieldError(
                "prompt", f"prompt holds {len(self.prompt)} items; expected at most {MAX_INPUTS}"
            )
        if self.max_tokens == 0 and not self.echo:
            raise FieldError("max_tokens", "max_tokens is 0; expected at least 1, or echo with it")
        return self


class EmbeddingRequest(ApiModel):
    """POST /v1/embeddings"""

    model: str | None = acts(
        None, "A served name; GET /v1/models lists them. Only needed where several embedders are served."
    )
    input: str | Many[str] | Many[int] | Many[Many[int]] = Field(
        description="Text, token ids, or a list of either, at most --max-inputs (2048).",
        json_schema_extra={"effect": "acted on"},
    )
    encoding_format: Literal["float", "base64", "bytes"] | None = acts(
        None, "`base64`: float32, little-endian; `bytes`: the same as the whole body, without JSON."
    )
    dimensions: int | None = acts(
        None,
        "Keep the leading dimensions, normalized again (Matryoshka); 0 beside `modality`: all.",
        ge=0,
        le=INT32,
    )
    modality: Literal["text"] | None = acts(None, "What `input` is (Infinity's clients say it).")
    truncate_prompt_tokens: int | None = acts(
        None, "Cut inputs to so many tokens; -1: to what the model takes.", ge=-1
    )
    truncate: bool | None = acts(
        None, "Cut inputs that are too long, or refuse them. Default: the server's --auto-truncate."
    )
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = acts(
        None, "The end that is cut off. Default: the tokenizer's."
    )
    add_special_tokens: bool | None = acts(
        None, "Add the tokenizer's special tokens to texts (default true)."
    )
    normalize: bool | None = acts(None, "Vectors of length one (default true).")
    prompt_name: str | None = acts(None, "A prompt of the checkpoint to put before each text.")
    priority: int | None = acts(None, "Lower runs first.", ge=-INT32, le=INT32)
    user: str | None = harmless("For the caller's own books.")

    @model_validator(mode="after")
    def _check(self) -> EmbeddingRequest:
        many = isinstance(self.input, list)
        if many and not self.input:
            raise FieldError("input", "input is an empty list; expected text, token ids, or a list of either")
        if self.dimensions == 0 and self.modality is None:
            raise FieldError("dimensions", "dimensions is 0; expected 1 or more")
        if self.truncate is False and self.truncate_prompt_tokens is not None:
            raise FieldError("truncate", "truncate is false, but truncate_prompt_tokens asks for a cut")
        return self
