"""Headrace: open, self-hosted inference engines on PyTorch and Triton.

Importing this package is cheap: nothing heavy (torch, tokenizers) loads before it is used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["LLM", "AsyncEngine", "SamplingParams", "__version__"]

_LAZY = {"LLM": "headrace.llm", "AsyncEngine": "headrace.llm", "SamplingParams": "headrace.types"}

if TYPE_CHECKING:
    from headrace.llm import LLM, AsyncEngine
    from headrace.types import SamplingParams


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        try:
            module = importlib.import_module(_LAZY[name])
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("headrace"):
                raise
            missing = f'headrace.{name} needs the package {error.name!r}; pip install "headrace[serve]"'
            raise ModuleNotFoundError(missing, name=error.name) from error
        return getattr(module, name)
    raise AttributeError(f"module 'headrace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
