"""Models from the Hugging Face hub, where there is a network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace.checkpoints.base import TensorInfo
from headrace.errors import MissingFile, UnsupportedCheckpoint

__all__ = ["cached_snapshot", "headers", "is_hub_id", "snapshot"]

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "vocab.txt", "merges.txt"]
_UNWANTED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.onnx", "original/*", "onnx/*", "openvino/*"]
_SETTINGS = ["*.json", "*.jinja"]
_LARGE = ["tokenizer.json", "vocab.json", "*.index.json", "onnx/*", "openvino/*"]


def is_hub_id(model: str) -> bool:
    """True for ``owner/name``, which is no path on this machine."""
    return _ID.fullmatch(model) is not None and ".." not in model


def snapshot(model: str, revision: str | None = None) -> Path:
    """Folder with a repository's safetensors, settings and tokenizer, cached or downloaded.

    Raises MissingFile when there is no such repository or revision, or no network and no cached copy,
    UnsupportedCheckpoint when huggingface_hub is not installed.
    """
    with _explained(model, revision):
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(model, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
        )


def cached_snapshot(model: str, revision: str | None = None) -> Path | None:
    """Folder of a repository whose weights are already here; None without a network access otherwise."""
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (ImportError, OSError, ValueError):
        return None
    return folder if any(folder.glob("*.safetensors")) else None


def headers(model: str, revision: str | None = None) -> tuple[Path, frozenset[str], dict[str, TensorInfo]]:
    """What a repository says about itself without its weights: a folder of settings, the names of all files, and
    the tensors by the headers of their shards.

    Raises as snapshot does.
    """
    with _explained(model, revision):
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

        api = HfApi()
        files = frozenset(api.list_repo_files(model, revision=revision))
        folder = Path(
            snapshot_download(model, revision=revision, allow_patterns=_SETTINGS, ignore_patterns=_LARGE)
        )
        if not any(name.endswith(".safetensors") for name in files):
            return folder, files, {}
        try:
            shards = api.get_safetensors_metadata(model, revision=revision).files_metadata.values()
        except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
            raise UnsupportedCheckpoint(f"{model}: {_reason(error)}") from None
    tensors = {}
    for shard in shards:
        for name, info in shard.tensors.items():
            start, end = info.data_offsets
            tensors[name] = TensorInfo(tuple(info.shape), str(info.dtype), end - start)
    return folder, files, tensors


@contextmanager
def _explained(model: str, revision: str | None) -> Iterator[None]:
    """The hub library's errors as ours."""
    try:
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        raise UnsupportedCheckpoint(
            f"{model!r} is no path here, and hub ids need huggingface_hub: pip install 'headrace[serve]'"
        ) from None
    try:
        yield
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
