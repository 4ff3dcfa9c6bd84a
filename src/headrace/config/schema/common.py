"""Declarations that several blocks share: where a checkpoint lies, credentials, quantization."""

from __future__ import annotations

import re

from headrace.config.schema.fields import F, Field, Section
from headrace.config.schema.types import REQUIRED, Enum, Int, Str

__all__ = [
    "CHECKPOINT_REPOSITORY",
    "QUANTIZATION",
    "QUANTIZATION_CONFIG",
    "SOURCES",
    "hf_repo_id",
    "quantization_fields",
]

SOURCES = ("HF", "GCS", "S3", "AZURE", "REMOTE_URL", "BASETEN_TRAINING", "LOCAL")

_REPO_ID = re.compile(
    r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?(?:/[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?)?"
)


def hf_repo_id(repo: str) -> str:
    """A hub id: ``name`` or ``owner/name``.

    Raises:
        ValueError: with the rule that is broken.
    """
    if len(repo) > 96:
        raise ValueError(f"{repo[:40]!r}… is no Hugging Face repository id: it has over 96 characters")
    if not _REPO_ID.fullmatch(repo) or "--" in repo or ".." in repo or repo.endswith(".git"):
        raise ValueError(
            f"{repo!r} is no Hugging Face repository id; expected 'owner/name' of letters, "
            "digits, '-', '_' and '.', which neither begin nor end with '-' or '.', without '--' or '..', "
            "not ending in '.git'"
        )
    return repo


CHECKPOINT_REPOSITORY = Section(
    "checkpoint_repository",
    "Where the checkpoint lies.",
    F(
        "source",
        Enum(*SOURCES, old={source.lower(): f"write it in upper case: {source}" for source in SOURCES}),
        REQUIRED,
        "Kind of place. `LOCAL`, a path on this machine, is refused by the hosted system, not here.",
        to="source",
    ),
    F(
        "repo",
        Str("text", min_length=1),
        REQUIRED,
        "`owner/name`, `s3://bucket/path`, `gs://bucket/path`, `az://container/path`, the address of "
        "a tar.gz, a training project, or a path.",
        to="model",
    ),
    F(
        "revision",
        Str(numbers=True),
        None,
        "Branch, tag or commit on the hub; `<job>/<checkpoint>`, `<job>` or `latest` of a training project.",
        to="revision",
    ),
    F(
        "runtime_secret_name",
        Str(),
        "hf_access_token",
        "Name of the secret that holds the credentials (see Secrets); never the credential itself.",
        to="secret_name",
    ),
)

LEGACY_QUANTIZATION = (
    "weights_int8",
    "weights_kv_int8",
    "weights_int4",
    "weights_int4_kv_int8",
    "smooth_quant",
)
FP8_TYPES = ("fp8", "fp8_kv", "fp8_mlp_only")
FP4_TYPES = ("fp4", "fp4_kv", "fp4_mlp_only")
QUANTIZATION = ("no_quant", *FP8_TYPES, *FP4_TYPES, *LEGACY_QUANTIZATION)

QUANTIZATION_CONFIG = Section(
    "quantization_config",
    "Calibration of a quantization that needs one.",
    F(
        "calib_size",
        Int(64, 16384, multiple=64, strict=False),
        1024,
        "Rows of the calibration set.",
        to="calibration",
    ),
    F(
        "calib_dataset",
        Str(),
        "abisee/cnn_dailymail",
        "Calibration set: a hub data set or a file.",
        to="calibration",
    ),
    F(
        "calib_max_seq_length",
        Int(64, 16384, multiple=64, strict=False),
        1536,
        "Tokens of one calibration row.",
        to="calibration",
    ),
)


def quantization_fields() -> tuple[Field, ...]:
    """The two quantization keys of ``build``."""
    return (
        F(
            "quantization_type",
            Enum(*QUANTIZATION),
            "no_quant",
            "Format of weights and KV cache; `no_quant` keeps the checkpoint's own.",
            to="quantization",
        ),
        F("quantization_config", QUANTIZATION_CONFIG, {}, "Calibration."),
    )
