"""What a case is, and the good configurations that cases change."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import yaml

V1: dict[str, Any] = {
    "resources": {"accelerator": "H100"},
    "trt_llm": {"build": {"checkpoint_repository": {"source": "HF", "repo": "owner/name"}}},
}
V2: dict[str, Any] = {
    "resources": {"accelerator": "H100:2"},
    "trt_llm": {
        "inference_stack": "v2",
        "build": {"checkpoint_repository": {"source": "HF", "repo": "owner/name"}},
        "runtime": {},
    },
}
BIS: dict[str, Any] = {
    "bis_llm": {"config": {"engine_backend": "vllm", "checkpoint_name": "owner/name", "model_name": "m"}}
}
PLAIN: dict[str, Any] = {"model_metadata": {"headrace": {"model": "owner/name"}}}
LOOKAHEAD = {
    "speculative_decoding_mode": "LOOKAHEAD_DECODING",
    "lookahead_windows_size": 3,
    "lookahead_ngram_size": 8,
    "lookahead_verification_set_size": 3,
}
DOCKER = {
    "start_command": "serve",
    "server_port": 8000,
    "predict_endpoint": "/p",
    "readiness_endpoint": "/r",
    "liveness_endpoint": "/l",
}
B = "trt_llm.build"
R = "trt_llm.runtime"
P = "trt_llm.runtime.patch_kwargs"
C = "bis_llm.config"
DELETE = object()


@dataclass(frozen=True)
class Case:
    """Attributes: path: of the expected problem; says: text that it contains."""

    name: str
    base: dict[str, Any]
    bad: dict[str, Any]
    path: str
    says: str
    good: dict[str, Any] = field(default_factory=dict)
    hosted: bool = True  # the hosted package refuses `bad` too, at parsing

    def __str__(self) -> str:
        return self.name


def build(base: dict[str, Any], changes: dict[str, Any]) -> str:
    """YAML text of a base with dotted keys set."""
    config = copy.deepcopy(base)
    for path, value in changes.items():
        *parents, last = path.split(".")
        block = config
        for name in parents:
            block = block.setdefault(name, {})
        if value is DELETE:
            block.pop(last, None)
        else:
            block[last] = value
    return yaml.safe_dump(config, sort_keys=False)


def look(**changes: Any) -> dict[str, Any]:
    return {f"{B}.speculator": {**LOOKAHEAD, **changes}}


def encoder(**changes: Any) -> dict[str, Any]:
    return {f"{B}.base_model": "encoder", **{f"{B}.{name}": value for name, value in changes.items()}}


def weights(**changes: Any) -> dict[str, Any]:
    return {"weights": [{"source": "hf://o/n@main", "mount_location": "/m", **changes}]}


def cache(**changes: Any) -> dict[str, Any]:
    entry = {"repo_id": "o/n", "revision": "main", "use_volume": True, "volume_folder": "x", **changes}
    return {"model_cache": [{name: value for name, value in entry.items() if value is not DELETE}]}


def auth(method: str, **keys: Any) -> dict[str, Any]:
    return weights(source="s3://b/p", auth={"auth_method": method, **keys})


def docker(**changes: Any) -> dict[str, Any]:
    return {
        "docker_server": {k: v for k, v in {**DOCKER, **changes}.items() if v is not DELETE},
    }


ROLE = {"aws_oidc_role_arn": "arn:x", "aws_oidc_region": "us-east-1"}
GCP = {"gcp_oidc_service_account": "a@b", "gcp_oidc_workload_id_provider": "p"}
ASSUME = {"aws_assume_role_arn": "arn:x", "aws_assume_role_region": "us-east-1"}
