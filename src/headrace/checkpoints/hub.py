"""Models from the Hugging Face hub, where there is a network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace.checkpoints.base import TensorInfo
from headrace.config.secrets import Secret, find_secret, hide, require_secret
from headrace.errors import HeadraceError, MissingFile, UnsupportedCheckpoint

__all__ = ["TOKEN_SECRET", "cached_snapshot", "headers", "is_hub_id", "snapshot"]

TOKEN_SECRET = "hf_access_token"  # name of the secret with the hub's token; it may be absent

_SECONDS = 10.0  # for the hub's first answer
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "vocab.txt", "merges.txt"]
_UNWANTED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.onnx", "original/*", "onnx/*", "openvino/*"]
_SETTINGS = ["*.json", "*.jinja"]
_LARGE = ["tokenizer.json", "vocab.json", "*.index.json", "onnx/*", "openvino/*"]


def is_hub_id(model: str) -> bool:
    """True for ``owner/name``, which is no path on this machine."""
    return _ID.fullmatch(model) is not None and ".." not in model


def snapshot(model: str, revision: str | None = None, secret: str = TOKEN_SECRET) -> Path:
    """Folder with a repository's safetensors, settings and tokenizer, cached or downloaded.

    Args:
        secret: name of the secret with the token; without it, that of `hf auth login`, if any.

    Raises MissingFile when there is no such repository or revision, or no network and no cached copy,
    UnsupportedCheckpoint when huggingface_hub is not installed, ConfigError for a named secret that is missing.
    """
    token = _token(model, secret)
    with _explained(model, revision, token):
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
                token=token.reveal() if token else None,
            )
        )


def _token(model: str, secret: str) -> Secret | None:
    if secret == TOKEN_SECRET:
        return find_secret(secret)
    return require_secret(secret, f"downloading {model}")


def cached_snapshot(model: str, revision: str | None = None) -> Path | None:
    """Folder of a repository whose weights are already here; None without a network access otherwise."""
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (ImportError, OSError, ValueError):
        return None
    return folder if any(folder.glob("*.safetensors")) else None


def headers(
    model: str, revision: str | None = None, secret: str = TOKEN_SECRET
) -> tuple[Path, frozenset[str], dict[str, TensorInfo]]:
    """What a repository says about itself without its weights: a folder of settings, the names of all files, and
    the tensors by the headers of their shards.

    Raises as snapshot does.
    """
    token = _token(model, secret)
    revealed = token.reveal() if token else None
    with _explained(model, revision, token):
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

        api = HfApi(token=revealed)
        # One request, which fails at once where there is no network: listing the files would try for half a minute.
        found = api.model_info(model, revision=revision, timeout=_SECONDS)
        files = frozenset(file.rfilename for file in found.siblings or ())
        folder = Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=_SETTINGS,
                ignore_patterns=_LARGE,
                token=revealed,
            )
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
def _explained(model: str, revision: str | None, token: Secret | None) -> Iterator[None]:
    """The hub library's errors as ours, without the token."""
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
            f"the hub repository {model!r} is gated: accept its terms on its page, then give a token "
            f"that may read it: set HF_TOKEN, write it into the file of the secret {TOKEN_SECRET}, or `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise MissingFile(
            f"{model!r} is no path on this machine and no public repository of the hub; check the spelling, "
            "or, if it is private, give a token that may read it (HF_TOKEN, or the secret hf_access_token)"
        ) from None
    except RevisionNotFoundError:
        raise MissingFile(f"the hub repository {model!r} has no revision {revision!r}") from None
    except HeadraceError:
        raise
    except (
        Exception
    ) as error:  # connection, time-out, proxy and cache faults, some of the HTTP library's own kinds
        reason = hide(_reason(error), [token] if token else [])
        raise MissingFile(
            f"{model!r} is no path on this machine, and the hub could not be reached for it ({reason}). Without a "
            "network give a path: a Hugging Face folder or a .gguf file"
        ) from error


def _reason(error: BaseException) -> str:
    """First line of what went wrong, short."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
