"""Models from the Hugging Face hub, where there is a network."""

from __future__ import annotations

import re
from pathlib import Path

from headrace.errors import MissingFile, UnsupportedCheckpoint

__all__ = ["is_hub_id", "snapshot"]

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "vocab.txt", "merges.txt"]
_UNWANTED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.onnx", "original/*", "onnx/*", "openvino/*"]


def is_hub_id(model: str) -> bool:
    """True for ``owner/name``, which is no path on this machine."""
    return _ID.fullmatch(model) is not None and ".." not in model


def snapshot(model: str, revision: str | None = None) -> Path:
    """Folder with the repository's safetensors, settings and tokenizer, from the local hub cache or downloaded.

    Raises MissingFile when there is no such repository or revision, or no network and no cached copy,
    UnsupportedCheckpoint when huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        raise UnsupportedCheckpoint(
            f"{model!r} is no path here, and hub ids need huggingface_hub: pip install 'headrace[serve]'"
        ) from None
    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
        )
    except GatedRepoError:
        raise MissingFile(
            f"the hub repository {model!r} is gated: accept its terms on its page, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise MissingFile(
            f"{model!r} is no path on this machine and no public repository of the hub; check the spelling, "
            "or log in with `hf auth login` if it is private"
        ) from None
    except RevisionNotFoundError:
        raise MissingFile(f"the hub repository {model!r} has no revision {revision!r}") from None
    except (OSError, ValueError, RuntimeError) as error:  # connection, time-out, proxy and cache faults
        raise MissingFile(
            f"{model!r} is no path on this machine, and the hub could not be reached for it "
            f"({_reason(error)}). Without a network give a path: a Hugging Face folder or a .gguf file"
        ) from error


def _reason(error: BaseException) -> str:
    """First line of what went wrong, short."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
