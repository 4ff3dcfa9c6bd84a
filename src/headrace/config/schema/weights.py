"""Where weights and files come from: ``weights``, ``model_cache``, ``bdn``, ``training_checkpoints``."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from headrace.config.schema.fields import F, Field, Section
from headrace.config.schema.types import REQUIRED, Bool, Enum, ListOf, Str

__all__ = [
    "AUTH_METHODS",
    "BDN",
    "EXTERNAL_DATA",
    "MODEL_CACHE",
    "MODEL_CACHE_ROOT",
    "TRAINING_CHECKPOINTS",
    "WEIGHTS",
    "auth_fields",
]

MODEL_CACHE_ROOT = "/app/model_cache"
_BUCKETS = ("s3", "gs", "azure", "r2", "cw")
SCHEMES = ("azure://", "bt://", "cw://", "gs://", "hf://", "https://", "r2://", "s3://")

AUTH_METHODS: dict[str, tuple[str, ...]] = {
    "CUSTOM_SECRET": ("auth_secret_name",),
    "AWS_OIDC": ("aws_oidc_role_arn", "aws_oidc_region"),
    "GCP_OIDC": ("gcp_oidc_service_account", "gcp_oidc_workload_id_provider"),
    "AWS_ASSUME_ROLE": ("aws_assume_role_arn", "aws_assume_role_region"),
}


def auth_fields() -> tuple[Field, ...]:
    """The keys of the roles, for weights as for image registries."""
    return tuple(
        F(name, Str(), None, f"For `{method}`.")
        for method, names in AUTH_METHODS.items()
        if method != "CUSTOM_SECRET"
        for name in names
    )


def _source(uri: str) -> str:
    scheme, found, rest = uri.partition("://")
    scheme += "://"
    if not found:
        raise ValueError(f"{uri[:80]!r} has no scheme; write one of {', '.join(SCHEMES)}")
    if scheme not in SCHEMES:
        raise ValueError(f"unsupported scheme {scheme[:20]!r}; supported: {', '.join(SCHEMES)}")
    shapes = {
        "hf://": "hf://owner/repo[@revision]",
        "https://": "https://host/path",
        "bt://": "bt://project[@job]",
    }
    if not rest or rest.startswith("/"):
        raise ValueError(f"{uri[:80]!r} is incomplete; expected {shapes.get(scheme, scheme + 'bucket/path')}")
    if scheme[:-3] in _BUCKETS and "@" in rest:
        raise ValueError(f"{uri[:80]!r}: '@revision' is for hf:// only; buckets have no revisions")
    return uri


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError(f"is {path[:80]!r}; must be an absolute path that starts with /")
    return path


WEIGHT_AUTH = Section(
    "auth",
    "Credentials of a source; each method needs its own keys and no others.",
    F("auth_method", Enum(*AUTH_METHODS, fold=True), REQUIRED, "How to log in."),
    F("auth_secret_name", Str(), None, "For `CUSTOM_SECRET`: name of the secret."),
    *auth_fields(),
)

_PATTERNS = "`*.safetensors` is the top level only, `**/*.safetensors` any depth."

WEIGHTS = ListOf(
    Section(
        "weights",
        "Files put at a path before the engine starts. A `patch_kwargs.model_path` or "
        "`bis_llm.config.model_path` that begins with a `mount_location` reads from here.",
        F("source", Str(min_length=1, parse=_source), REQUIRED, "Address with a scheme.", to="model"),
        F(
            "mount_location",
            Str(min_length=1, parse=_absolute),
            REQUIRED,
            "Absolute path, unique.",
            to="model",
        ),
        F("auth", WEIGHT_AUTH, None, "Credentials."),
        F("auth_secret_name", Str(), None, "Name of the secret, instead of `auth`.", to="secret_name"),
        F("allow_patterns", ListOf(Str()), None, f"Only these files. {_PATTERNS}"),
        F("ignore_patterns", ListOf(Str()), None, f"Not these files. {_PATTERNS}"),
    )
)


def _revision(text: str) -> str:
    if len(text) == 1:
        raise ValueError(f"is {text!r}; must be empty or have at least 2 characters")
    return text


MODEL_CACHE = ListOf(
    Section(
        "model_cache",
        "The older form of `weights`: files under `/app/model_cache/<volume_folder>`.",
        F("repo_id", Str(min_length=1), REQUIRED, "Hub id or bucket path.", to="model"),
        F(
            "revision",
            Str(parse=_revision, numbers=True),
            "",
            "Revision; required with `use_volume` on the hub.",
        ),
        F("allow_patterns", ListOf(Str()), None, "Only these files."),
        F("ignore_patterns", ListOf(Str()), None, "Not these files."),
        F("use_volume", Bool(), REQUIRED, "Mounted, not baked into an image; the same for all entries."),
        F("volume_folder", Str(min_length=1), None, "Folder; required with `use_volume`."),
        F("kind", Enum("hf", "gcs", "s3", "azure"), "hf", "Kind of place."),
        F("runtime_secret_name", Str(), "hf_access_token", "Name of the secret.", to="secret_name"),
    )
)

TRAINING_CHECKPOINTS = Section(
    "training_checkpoints",
    "Checkpoints of training jobs; either of the two lists, not both.",
    F("download_folder", Str(), "/tmp/training_checkpoints", "Where they land."),
    F(
        "artifact_references",
        ListOf(
            Section(
                "artifact_references",
                "Files of one job.",
                F("training_job_id", Str(min_length=1, numbers=True), REQUIRED, "The job."),
                F("paths", ListOf(Str()), [], "Files, with * and ?."),
            )
        ),
        [],
        "Files of jobs.",
    ),
    F("loops_checkpoint_ids", ListOf(Str(numbers=True)), [], "Checkpoints of loops."),
)

_VOLUME = re.compile(
    r"bdn:(?P<ns>[^/:@\0]+)/(?P<vol>[^/:@\0]+)(?::(?P<tag>[^/:@\0]+)|@(?:b3:)?(?P<digest>[0-9a-fA-F]+))?"
)


def _volume(text: str) -> str:
    if not text.startswith("bdn:"):
        raise ValueError(f"{text[:80]!r} must begin with bdn:, as in bdn:namespace/volume:tag")
    match = _VOLUME.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:80]!r} is no volume; expected bdn:namespace/volume[:tag|@digest]")
    for part in ("ns", "vol", "tag"):
        _identifier(match[part] or "x")
    if match["digest"] and not 12 <= len(match["digest"]) <= 64:
        raise ValueError(
            f"the digest in {text[:80]!r} has {len(match['digest'])} hexadecimal digits; expected 12 to 64"
        )
    return text


def _identifier(text: str) -> str:
    if len(text) > 256 or "/" in text or ".." in text or "\0" in text:
        raise ValueError(f"{text[:40]!r} is no name; at most 256 characters, without '/' and '..'")
    return text


def _mount(path: str) -> str:
    pure = PurePosixPath(_absolute(path))
    if "\0" in path or pure == PurePosixPath("/") or ".." in pure.parts:
        raise ValueError(f"is {path[:80]!r}; expected an absolute path below /, without '..'")
    return str(pure)


def _filter(pattern: str) -> str:
    parts = pattern.removesuffix("/").split("/")
    if pattern != pattern.strip() or pattern.startswith("/") or "\\" in pattern or "\0" in pattern:
        raise ValueError(f"{pattern[:80]!r} must be a relative pattern without backslashes or outer spaces")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{pattern[:80]!r} must be a relative pattern without empty, '.' or '..' parts")
    return pattern


_BDN = "volumes of the hosted network cannot be reached from outside; use `weights`"

BDN = Section(
    "bdn",
    "Volumes of the hosted delivery network.",
    F(
        "mounts",
        ListOf(
            Section(
                "bdn.mounts",
                "A mounted volume.",
                F(
                    "source",
                    Str(min_length=1, parse=_volume),
                    REQUIRED,
                    "`bdn:ns/vol[:tag|@digest]`.",
                    not_yet=_BDN,
                ),
                F("path", Str(min_length=1, parse=_mount), REQUIRED, "Absolute path, unique."),
                F("include", ListOf(Str(parse=_filter)), [], "Only these files."),
                F("exclude", ListOf(Str(parse=_filter)), [], "Not these files."),
            )
        ),
        [],
        "Volumes to mount.",
    ),
    F(
        "access",
        ListOf(
            Section(
                "bdn.access",
                "Rights in a namespace.",
                F(
                    "namespace",
                    Str(min_length=1, parse=_identifier),
                    REQUIRED,
                    "The namespace, once.",
                    no_effect=_BDN,
                ),
                F(
                    "grants",
                    ListOf(Enum("pull", "push", "tag", "inspect", "delete"), min_length=1),
                    REQUIRED,
                    "Operations, each once.",
                ),
            )
        ),
        [],
        "Rights.",
    ),
    F(
        "hotload",
        Section("bdn.hotload", "Loading while running.", F("enabled", Bool(), False, "On.", no_effect=_BDN)),
        {},
        "Loading while running.",
    ),
)

EXTERNAL_DATA = ListOf(
    Section(
        "external_data",
        "Files fetched into the data folder.",
        F(
            "url",
            Str(min_length=1),
            REQUIRED,
            "Address.",
            no_effect="used by model.py, which is not run here",
        ),
        F("local_data_path", Str(min_length=1), REQUIRED, "Path under the data folder."),
        F("backend", Str(), "http_public", "How to fetch."),
        F("name", Str(), None, "Name."),
    )
)
