"""Requests of the routes for one-pass models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from headrace.serving.openai.fields import ApiModel, acts, harmless, needed

__all__ = [
    "ClassifyRequest",
    "CohereRerankRequest",
    "DecodeRequest",
    "EmbedAllRequest",
    "EmbedRequest",
    "JinaRerankRequest",
    "OnePass",
    "PredictParameters",
    "PredictRequest",
    "PredictTokensRequest",
    "Question",
    "RerankRequest",
    "SimilarityParameters",
    "SimilarityRequest",
    "SparseRequest",
    "SystemOneRequest",
    "TokenParameters",
    "TokenizeRequest",
]

Direction = Literal["Left", "Right", "left", "right"]
_MODEL = "A served name; only needed where several models of this kind are served."
_TRUNCATE = (
    "Cut inputs that are too long. Default: the server's --auto-truncate, which is on for BERT-like models."
)
TextOrIds = str | list[str] | list[int] | list[list[int]]


class OnePass(ApiModel):
    """Fields that all share."""

    model: str | None = acts(None, _MODEL)
    truncate: bool | None = acts(None, _TRUNCATE)
    truncation_direction: Direction | None = acts(
        None, "The end that is cut off: `Right` (default) or `Left`."
    )


class EmbedRequest(OnePass):
    """POST /embed"""

    inputs: TextOrIds = needed("A text, token ids, or a list of either.")
    normalize: bool | None = acts(None, "Vectors of length one (default true).")
    dimensions: int | None = acts(None, "Keep the leading dimensions (Matryoshka), normalized again.", ge=1)
    prompt_name: str | None = acts(None, "A prompt of the checkpoint to put before each text.")


class EmbedAllRequest(OnePass):
    """POST /embed_all"""

    inputs: TextOrIds = needed("A text, token ids, or a list of either.")
    prompt_name: str | None = acts(None, "A prompt of the checkpoint to put before each text.")


class SparseRequest(EmbedAllRequest):
    """POST /embed_sparse"""


class SimilarityInputs(ApiModel):
    """What is compared."""

    source_sentence: str = needed("One text.")
    sentences: list[str] = needed("The texts that it is compared with.")


class SimilarityParameters(ApiModel):
    """How texts are read."""

    truncate: bool | None = acts(None, _TRUNCATE)
    truncation_direction: Direction | None = acts(None, "The end that is cut off.")
    prompt_name: str | None = acts(None, "A prompt of the checkpoint to put before each text.")


class SimilarityRequest(ApiModel):
    """POST /similarity"""

    model: str | None = acts(None, _MODEL)
    inputs: SimilarityInputs = needed("What is compared with what.")
    parameters: SimilarityParameters | None = acts(None, "How texts are read.")


class PredictParameters(ApiModel):
    """What Hugging Face's clients say beside a text to classify."""

    top_k: int | None = acts(None, "Return the best so many labels.", ge=1)
    function_to_apply: Literal["none", "sigmoid", "softmax"] | None = acts(
        None, "What makes scores of logits (default: what the checkpoint is for)."
    )


class TokenParameters(ApiModel):
    """What Hugging Face's clients say beside a text with entities."""

    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] | None = acts(
        None, "How tokens become entities (default none: every labelled token)."
    )


_PARAMETERS = "As Hugging Face's clients send them; the reply then has the shape that they read."


class PredictRequest(OnePass):
    """POST /predict"""

    inputs: str | list[str | list[str]] = needed(
        "A text; a pair `[a, b]`; or a list of lists, each one text or a pair."
    )
    raw_scores: bool = acts(False, "Logits instead of probabilities.")
    parameters: PredictParameters | None = acts(None, _PARAMETERS)


class ClassifyRequest(OnePass):
    """POST /classify (Infinity's shape, and vLLM's)"""

    input: str | list[str] = needed("A text or a list of texts.")
    raw_scores: bool | None = acts(
        None,
        "Logits instead of probabilities. Where it is given, the reply has Infinity's shape, else vLLM's.",
    )
    user: str | None = harmless("For the caller's own books.")


class PredictTokensRequest(OnePass):
    """POST /predict_tokens"""

    inputs: str | list[str | list[str]] = needed("A text, a list of texts, or a list of lists of one text.")
    raw_scores: bool = acts(False, "Logits of every label.")
    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] | None = acts(
        None, "How tokens become entities (default none: every labelled token)."
    )
    parameters: TokenParameters | None = acts(None, _PARAMETERS)


class RerankRequest(OnePass):
    """POST /rerank"""

    query: str = needed("What the texts are judged by.")
    texts: list[str] = needed("The texts.")
    raw_scores: bool = acts(False, "Logits instead of numbers from 0 to 1.")
    return_text: bool = acts(False, "Repeat the texts in the reply.")
    instruction: str | None = acts(None, "For rerankers whose prompt has one.")


class JinaDocument(ApiModel):
    """A document as an object."""

    text: str = needed("Its text.")


class JinaRerankRequest(OnePass):
    """POST /v1/rerank (Jina's shape)"""

    query: str = needed("What the documents are judged by.")
    documents: list[str | JinaDocument] = needed("Texts, or objects with a text.")
    top_n: int | None = acts(None, "Return the best so many.", ge=1)
    return_documents: bool | None = acts(None, "Repeat the documents in the reply (default true).")
    raw_scores: bool = acts(False, "Logits instead of numbers from 0 to 1 (Infinity's field).")
    instruction: str | None = acts(None, "For rerankers whose prompt has one.")
    user: str | None = harmless("For the caller's own books.")


class CohereRerankRequest(OnePass):
    """POST /v2/rerank (Cohere's shape)"""

    query: str = needed("What the documents are judged by.")
    documents: list[str] = needed("Texts.")
    top_n: int | None = acts(None, "Return the best so many.", ge=1)
    max_tokens_per_doc: int | None = acts(None, "Cut a query with its document to so many tokens.", ge=8)
    priority: int | None = acts(None, "Lower runs first.", ge=0, le=999)


class Question(ApiModel):
    """One question of /v1/systemone."""

    type: Literal["choice", "score", "noul"] = needed("Which option; which level; or whether it is so.")
    instructions: str = needed("The question.")
    criteria: dict[str, str | None] | list[str] | None = acts(
        None,
        "`choice`: an object of options, each described or null; `score`: a list of levels, from low to high; `noul`: "
        'nothing, or `{"true": ..., "false": ...}`.',
    )


class SystemOneRequest(OnePass):
    """POST /v1/systemone"""

    state: str | dict[str, Any] | list[Any] = needed(
        "What is judged: a text, or JSON, which is shown as it is."
    )
    questions: dict[str, Question] = needed("Questions by name.")


class TokenizeRequest(ApiModel):
    """POST /tokenize"""

    model: str | None = acts(None, _MODEL)
    inputs: str | list[str] = needed("A text or a list of texts.")
    add_special_tokens: bool = acts(True, "Add the tokenizer's special tokens.")
    prompt_name: str | None = acts(None, "A prompt of the checkpoint to put before each text.")


class DecodeRequest(ApiModel):
    """POST /decode"""

    model: str | None = acts(None, _MODEL)
    ids: list[int] | list[list[int]] = needed("Token ids, or a list of lists of them.")
    skip_special_tokens: bool = acts(True, "Leave special tokens out.")

    @field_validator("ids")
    @classmethod
    def _bounded(cls, ids: list[int] | list[list[int]]) -> list[int] | list[list[int]]:
        flat = [i for part in ids for i in (part if isinstance(part, list) else [part])]
        if any(not 0 <= i < 2**32 for i in flat):
            raise ValueError("token ids are integers from 0 to 4294967295")
        return ids
