"""The Python API: `LLM` (offline, blocking) and `AsyncEngine`, over the same core. Imports no torch."""

from headrace.llm.async_engine import AsyncEngine
from headrace.llm.generation import Delta, Generation
from headrace.llm.offline import LLM
from headrace.llm.results import Completion, Result

__all__ = ["LLM", "AsyncEngine", "Completion", "Delta", "Generation", "Result"]
