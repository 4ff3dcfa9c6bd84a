"""Blocks of config.yaml about the machine, the container and what the platform does with it."""

from __future__ import annotations

from typing import Any

from headrace.config.schema.fields import Choice, F, Section
from headrace.config.schema.top_types import AcceleratorType, absolute_or_empty, address, cpu, host, memory
from headrace.config.schema.types import REQUIRED, Anything, Bool, Enum, Float, Int, ListOf, MapOf, Str
from headrace.config.schema.weights import auth_fields

__all__ = ["BASE_IMAGE", "BUILD_BLOCK", "DOCKER_SERVER", "IMAGE", "PLATFORM", "RESOURCES", "RUNTIME"]

IMAGE = "no image is built here"
_PROBES = "health is judged by progress of the engine (/health, docs/api.md)"
PLATFORM = "the platform's own; not needed here"


RESOURCES = Section(
    "resources",
    "The machine.",
    F(
        "cpu",
        Str("cores", parse=cpu, numbers=True),
        "1",
        "Cores.",
        no_effect="all cores of the machine are used",
    ),
    F(
        "memory",
        Str("bytes", parse=memory, numbers=True),
        "2Gi",
        "Host memory.",
        no_effect="the machine's own",
    ),
    F("accelerator", AcceleratorType(), None, "GPUs; `plan` uses it, the server takes what the machine has."),
    F("use_gpu", Bool(), None, "Derived from `accelerator`.", no_effect="the machine decides"),
    F("instance_type", Str(), None, "Instance instead of the above.", no_effect=PLATFORM),
    F("node_count", Int(1), None, "Machines.", not_yet="one machine only"),
    F(
        "fabric",
        Section(
            "fabric",
            "Network between machines.",
            F("use_rdma", Bool(), None, "RDMA.", no_effect=PLATFORM),
            F("preferences", ListOf(Str()), None, "Kinds, in order.", no_effect=PLATFORM),
        ),
        None,
        "Network between machines.",
    ),
)


def _transport(kind: str) -> Section:
    pings = (
        (
            F("ping_interval_seconds", Float(), None, "Seconds between pings.", no_effect="30 s here"),
            F(
                "ping_timeout_seconds",
                Float(),
                None,
                "Seconds to wait for the answer.",
                no_effect="30 s here",
            ),
        )
        if kind == "websocket"
        else ()
    )
    note = "" if kind == "http" else "the server speaks HTTP; WebSockets only on the routes that need them"
    return Section(
        f"transport ({kind})",
        f"Transport by {kind}.",
        F("kind", Enum("http", "websocket", "grpc"), "http", "Which.", differs=note),
        *pings,
    )


def _probe(name: str, doc: str) -> Any:
    return F(name, Int(0, strict=False), None, doc, no_effect=_PROBES)


RUNTIME = Section(
    "runtime",
    "How the platform runs the server.",
    F(
        "predict_concurrency",
        Int(1, strict=False),
        1,
        "Requests at once.",
        no_effect="bounded by max_queue here",
    ),
    F("streaming_read_timeout", Int(0, strict=False), 60, "Seconds between two events.", no_effect=PLATFORM),
    F("enable_tracing_data", Bool(), False, "Traces.", no_effect="set by flags of headrace serve"),
    F("enable_debug_logs", Bool(), False, "Debug logs.", no_effect="set HEADRACE_LOG=debug"),
    F(
        "transport",
        Choice("kind", {kind: _transport(kind) for kind in ("http", "websocket", "grpc")}, "http"),
        {},
        "Transport.",
    ),
    F(
        "is_websocket_endpoint",
        Bool(),
        None,
        "Old form of `transport.kind: websocket`.",
        differs="see `transport`",
    ),
    F(
        "health_checks",
        Section(
            "health_checks",
            "Probes of the platform.",
            _probe("restart_check_delay_seconds", "Before the first restart check."),
            _probe("restart_threshold_seconds", "Unhealthy before a restart."),
            _probe("stop_traffic_threshold_seconds", "Unhealthy before traffic stops."),
            _probe("startup_threshold_seconds", "To start."),
        ),
        {},
        "Probes.",
    ),
    F(
        "oidc",
        Section("oidc", "Token.", F("enabled", Bool(), None, "Mount a token.", no_effect=PLATFORM)),
        {},
        "Token.",
    ),
    F(
        "remote_ssh",
        Section("remote_ssh", "SSH.", F("enabled", Bool(), False, "SSH into instances.", no_effect=PLATFORM)),
        {},
        "SSH.",
    ),
    F(
        "egress_restrictions",
        Section(
            "egress_restrictions",
            "Where the container may connect to.",
            F("ip_allow_list", ListOf(Str(parse=address)), None, "IPv4 ranges.", no_effect=PLATFORM),
            F("fqdn_allow_list", ListOf(Str(parse=host)), None, "Host names.", no_effect=PLATFORM),
        ),
        None,
        "Egress.",
    ),
    F("truss_server_version_override", Str(numbers=True), None, "Version.", no_effect=PLATFORM),
    F("num_workers", Int(1, 1, strict=False), 1, "Only 1 is allowed; use replicas.", no_effect=PLATFORM),
    elsewhere={
        "served_model_name": "belongs under `trt_llm.runtime`",
        "kv_cache_free_gpu_mem_fraction": "belongs under `trt_llm.runtime`",
    },
)

REGISTRY_METHODS = (
    "GCP_SERVICE_ACCOUNT_JSON",
    "AWS_IAM",
    "AWS_OIDC",
    "GCP_OIDC",
    "REGISTRY_SECRET",
    "AWS_ASSUME_ROLE",
)


BASE_IMAGE = Section(
    "base_image",
    "Image of the container.",
    F("image", Str(), "", "Image.", no_effect=IMAGE),
    F("python_executable_path", Str(parse=absolute_or_empty), "", "Python in it.", no_effect=IMAGE),
    F(
        "docker_auth",
        Section(
            "docker_auth",
            "Credentials of the registry; each method needs its own keys and no others.",
            F("auth_method", Enum(*REGISTRY_METHODS, fold=True), REQUIRED, "How to log in."),
            F("registry", Str(), "", "The registry."),
            F("secret_name", Str(), None, "For `GCP_SERVICE_ACCOUNT_JSON`: name of the secret."),
            *auth_fields(),
            F("aws_access_key_id_secret_name", Str(), "aws_access_key_id", "For `AWS_IAM`."),
            F("aws_secret_access_key_secret_name", Str(), "aws_secret_access_key", "For `AWS_IAM`."),
        ),
        None,
        "Registry.",
    ),
)

DOCKER_SERVER = Section(
    "docker_server",
    "A server of one's own in an image. Its command is not run here: the engine is ours.",
    F(
        "start_command",
        Str(),
        None,
        "Command; required unless `no_build`. Not run: the model and flags of `vllm serve` and "
        "`text-embeddings-router` are read from it.",
        to="model",
    ),
    F(
        "server_port",
        Int(1, 65535, strict=False),
        REQUIRED,
        "Port; 8080 is reserved there.",
        no_effect=IMAGE,
    ),
    F(
        "predict_endpoint",
        Str(),
        REQUIRED,
        "Where `/predict` goes, if it is a route of an encoder.",
        to="default_route",
    ),
    F("readiness_endpoint", Str(), REQUIRED, "Readiness probe.", no_effect=IMAGE),
    F("liveness_endpoint", Str(), REQUIRED, "Liveness probe.", no_effect=IMAGE),
    F("run_as_user_id", Int(1, strict=False), None, "User; neither 0 nor 60000.", no_effect=IMAGE),
    F("no_build", Bool(), None, "Use the image as it is.", no_effect=IMAGE),
)

BUILD_BLOCK = Section(
    "build (image)",
    "How the image is built.",
    F("model_server", Enum("TrussServer", "TRT_LLM"), "TrussServer", "Server.", no_effect=IMAGE),
    F("arguments", MapOf(Anything()), {}, "Arguments.", no_effect=IMAGE),
    F("secret_to_path_mapping", MapOf(Str()), {}, "Secrets during the build.", no_effect=IMAGE),
    F("no_cache", Bool(), False, "Not allowed in the file."),
)
