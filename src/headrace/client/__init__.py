"""The bulk performance client: knows only types and errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headrace.client.chat import Answer
from headrace.client.endpoints import Endpoint, EndpointPool
from headrace.client.exceptions import BadReply, Cancelled, ConnectionFailed, InvalidArgument
from headrace.client.jobs import BatchCounts
from headrace.client.performance import PerformanceClient
from headrace.client.preference import CancellationToken, RequestProcessingPreference, TraceContext
from headrace.client.replies import OpenAIUsage
from headrace.client.responses import (
    BatchPostResponse,
    ClassificationResponse,
    ClassificationResult,
    OpenAIEmbeddingsResponse,
    RerankResponse,
    RerankResult,
)
from headrace.client.transport import HttpClientWrapper
from headrace.client.vectors import OpenAIEmbeddingData

if TYPE_CHECKING:
    from headrace.client.exceptions import HTTPError, Timeout

__all__ = [
    "Answer",
    "BadReply",
    "BatchCounts",
    "BatchPostResponse",
    "CancellationToken",
    "Cancelled",
    "ClassificationResponse",
    "ClassificationResult",
    "ConnectionFailed",
    "Endpoint",
    "EndpointPool",
    "HTTPError",
    "HttpClientWrapper",
    "InvalidArgument",
    "OpenAIEmbeddingData",
    "OpenAIEmbeddingsResponse",
    "OpenAIUsage",
    "PerformanceClient",
    "RequestProcessingPreference",
    "RerankResponse",
    "RerankResult",
    "Timeout",
    "TraceContext",
]


def __getattr__(name: str) -> Any:
    if name in ("HTTPError", "Timeout"):  # their bases come from requests, which is slow to import
        from headrace.client import exceptions

        return getattr(exceptions, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
