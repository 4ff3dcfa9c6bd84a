"""The whole config.yaml: the engine blocks and everything around them."""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from headrace.config.accelerators import parse_accelerator
from headrace.config.report import Place
from headrace.config.schema.fields import Choice, F, Section
from headrace.config.schema.own import OWN
from headrace.config.schema.patch import BIS_LLM
from headrace.config.schema.trt_llm import TRT_LLM
from headrace.config.schema.types import (
    INVALID,
    REQUIRED,
    Anything,
    Bool,
    Enum,
    Float,
    Int,
    ListOf,
    MapOf,
    Reading,
    Str,
    Type,
)
from headrace.config.schema.weights import (
    BDN,
    EXTERNAL_DATA,
    MODEL_CACHE,
    TRAINING_CHECKPOINTS,
    WEIGHTS,
    auth_fields,
)
from headrace.config.yaml import Node

__all__ = ["TOP", "memory_bytes"]

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18} | {
    f"{prefix}i": 1024**power for power, prefix in enumerate("KMGTPE", 1)
}
_MOST = 2**80
_CODE = "model.py and its packages are not run here: the engine is ours"
_IMAGE = "no image is built here"
_PROBES = "health is judged by progress of the engine (/health, docs/api.md)"
_PLATFORM = "the platform's own; not needed here"


def memory_bytes(text: str) -> int:
    """``2Gi``, ``512M`` or plain bytes.

    Raises:
        ValueError: with the known units.
    """
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2] not in _UNITS:
        units = ", ".join(unit for unit in _UNITS if unit)
        raise ValueError(f"is {text[:40]!r}; expected bytes with a unit of {units}, such as 16Gi")
    size = float(match[1]) * _UNITS[match[2]]
    if size > _MOST:
        raise ValueError(f"is {text[:40]!r}, more than any machine has; expected bytes, such as 16Gi")
    return int(size)


def _memory(text: str) -> str:
    memory_bytes(text)
    return text


def _cpu(text: str) -> str:
    if not re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)m?", text.strip()):
        raise ValueError(f"is {text[:40]!r}; expected cores such as 4, or thousandths such as 500m")
    return text


def _python(text: str) -> str:
    known = [f"py3{minor}" for minor in range(9, 15)]
    if text not in known:
        raise ValueError(f"is {text[:40]!r}; expected one of {', '.join(known)}")
    return text


def _address(text: str) -> str:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"{text[:60]!r} is no IPv4 address or range such as 10.0.0.0/8") from None
    if network.version != 4:
        raise ValueError(f"{text[:60]!r} is IPv6; only IPv4 is supported")
    return text


def _host(text: str) -> str:
    label = r"[a-zA-Z0-9*](?:[a-zA-Z0-9*-]{0,61}[a-zA-Z0-9*])?"
    if len(text) > 253 or not re.fullmatch(rf"{label}(?:\.{label})*", text):
        raise ValueError(f"{text[:60]!r} is no host name; '*' may stand inside a label")
    return text


def _secret_name(text: str) -> str:
    if not text or len(text) > 253 or text in (".", ".."):
        raise ValueError(f"the secret's name {text[:40]!r} is refused: 1 to 253 characters")
    if not re.fullmatch(r"[-._a-zA-Z0-9]+", text) and not text.startswith("DOCKER_REGISTRY_"):
        raise ValueError(f"the secret's name {text[:40]!r} is refused: letters, digits and - . _ only")
    return text


class Secrets(Type):
    """Names of secrets. Values are placeholders; whatever stands there is never kept or shown."""

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        if not isinstance(node.value, dict):
            return reading.wrong(f"is {node.kind()}; expected a mapping of names to null", path, node.place)
        for name, child in node.value.items():
            inner, place = f"{path}.{name}", node.key_places[name]
            try:
                _secret_name(name)
            except ValueError as error:
                reading.wrong(str(error), inner, place)
            if child.value is not None and not isinstance(child.value, str):
                reading.wrong(f"is {child.kind()}; expected null as a placeholder", inner, child.place)
            elif child.value and child.value.lower() not in _PLACEHOLDERS:
                reading.report.notice(
                    "warning",
                    "the value here is ignored, and a secret does not belong into this file: "
                    "write null and set it in the environment or a file (docs/config.md)",
                    inner,
                    place,
                )
        return dict.fromkeys(node.value)

    def describe(self) -> str:
        return "map of name to null"


_PLACEHOLDERS = {"null", "none", "placeholder", "set token in baseten workspace", "changeme", "xxx", "..."}


class Environment(Type):
    """Variables for the process; every scalar becomes text, booleans as true and false."""

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        if not isinstance(node.value, dict):
            return reading.wrong(f"is {node.kind()}; expected a mapping of names to texts", path, node.place)
        values: dict[str, Any] = {}
        for name, child in node.value.items():
            inner, place = f"{path}.{name}", node.key_places[name]
            reading.places[inner] = place
            if isinstance(child.value, (dict, list)) or child.value is None:
                values[name] = reading.wrong(f"is {child.kind()}; expected text", inner, child.place)
            else:
                values[name] = self._text(child, inner, place, reading)
        return values

    def _text(self, child: Node, path: str, place: Place, reading: Reading) -> str:
        if isinstance(child.value, bool):
            return str(child.value).lower()
        text = str(child.value)
        if not isinstance(child.value, str) and text != child.text:
            reading.report.notice(
                "warning",
                f"YAML reads {child.text[:40]} as {text[:40]}; quote it to keep the text",
                path,
                place,
            )
        return text

    def describe(self) -> str:
        return "map of name to text"


class AcceleratorType(Type):
    """``TYPE[:count]``, or null for none."""

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        if node.value is None:
            return None
        if not isinstance(node.value, str):
            return reading.wrong(
                f"is {node.kind()}; expected TYPE or TYPE:count, such as H100:2", path, node.place
            )
        try:
            found = parse_accelerator(node.value)
        except ValueError as error:
            return reading.wrong(str(error), path, node.place)
        if found.gpu is not None and not found.gpu.hosted:
            note = f"{found.name}: the hosted system has none; plans know it"
            reading.report.notice("lifted", note, path, node.place)
        return str(found)

    def describe(self) -> str:
        return "TYPE[:count]"


class Metadata(Type):
    """Free-form, but for ``tags`` and our own ``headrace`` block."""

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        if not isinstance(node.value, dict):
            return reading.wrong(f"is {node.kind()}; expected a mapping", path, node.place)
        values: dict[str, Any] = {}
        for name, child in node.value.items():
            inner = f"{path}.{name}"
            reading.places[inner] = node.key_places[name]
            if name == "tags":
                values[name] = ListOf(Str(numbers=True)).read(child, inner, reading)
            elif name == "headrace":
                values[name] = OWN.read(child, inner, reading)
            else:
                values[name] = child.plain()
        return values

    def describe(self) -> str:
        return "map"


RESOURCES = Section(
    "resources",
    "The machine.",
    F(
        "cpu",
        Str("cores", parse=_cpu, numbers=True),
        "1",
        "Cores.",
        no_effect="all cores of the machine are used",
    ),
    F(
        "memory",
        Str("bytes", parse=_memory, numbers=True),
        "2Gi",
        "Host memory.",
        no_effect="the machine's own",
    ),
    F("accelerator", AcceleratorType(), None, "GPUs; `plan` uses it, the server takes what the machine has."),
    F("use_gpu", Bool(), None, "Derived from `accelerator`.", no_effect="the machine decides"),
    F("instance_type", Str(), None, "Instance instead of the above.", no_effect=_PLATFORM),
    F("node_count", Int(1), None, "Machines.", not_yet="one machine only"),
    F(
        "fabric",
        Section(
            "fabric",
            "Network between machines.",
            F("use_rdma", Bool(), None, "RDMA.", no_effect=_PLATFORM),
            F("preferences", ListOf(Str()), None, "Kinds, in order.", no_effect=_PLATFORM),
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
    F("streaming_read_timeout", Int(0, strict=False), 60, "Seconds between two events.", no_effect=_PLATFORM),
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
        Section("oidc", "Token.", F("enabled", Bool(), None, "Mount a token.", no_effect=_PLATFORM)),
        {},
        "Token.",
    ),
    F(
        "remote_ssh",
        Section(
            "remote_ssh", "SSH.", F("enabled", Bool(), False, "SSH into instances.", no_effect=_PLATFORM)
        ),
        {},
        "SSH.",
    ),
    F(
        "egress_restrictions",
        Section(
            "egress_restrictions",
            "Where the container may connect to.",
            F("ip_allow_list", ListOf(Str(parse=_address)), None, "IPv4 ranges.", no_effect=_PLATFORM),
            F("fqdn_allow_list", ListOf(Str(parse=_host)), None, "Host names.", no_effect=_PLATFORM),
        ),
        None,
        "Egress.",
    ),
    F("truss_server_version_override", Str(numbers=True), None, "Version.", no_effect=_PLATFORM),
    F("num_workers", Int(1, 1, strict=False), 1, "Only 1 is allowed; use replicas.", no_effect=_PLATFORM),
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


def _absolute_or_empty(text: str) -> str:
    if text and not text.startswith("/"):
        raise ValueError(f"is {text[:80]!r}; expected an absolute path")
    return text


BASE_IMAGE = Section(
    "base_image",
    "Image of the container.",
    F("image", Str(), "", "Image.", no_effect=_IMAGE),
    F("python_executable_path", Str(parse=_absolute_or_empty), "", "Python in it.", no_effect=_IMAGE),
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
        no_effect=_IMAGE,
    ),
    F(
        "predict_endpoint",
        Str(),
        REQUIRED,
        "Where `/predict` goes, if it is a route of an encoder.",
        to="default_route",
    ),
    F("readiness_endpoint", Str(), REQUIRED, "Readiness probe.", no_effect=_IMAGE),
    F("liveness_endpoint", Str(), REQUIRED, "Liveness probe.", no_effect=_IMAGE),
    F("run_as_user_id", Int(1, strict=False), None, "User; neither 0 nor 60000.", no_effect=_IMAGE),
    F("no_build", Bool(), None, "Use the image as it is.", no_effect=_IMAGE),
)

BUILD_BLOCK = Section(
    "build (image)",
    "How the image is built.",
    F("model_server", Enum("TrussServer", "TRT_LLM"), "TrussServer", "Server.", no_effect=_IMAGE),
    F("arguments", MapOf(Anything()), {}, "Arguments.", no_effect=_IMAGE),
    F("secret_to_path_mapping", MapOf(Str()), {}, "Secrets during the build.", no_effect=_IMAGE),
    F("no_cache", Bool(), False, "Not allowed in the file."),
)

TOP = Section(
    "config.yaml",
    "The whole file.",
    F(
        "model_name",
        Str(numbers=True),
        None,
        "Name of the deployment; the served name when no other is given.",
        to="served_names",
    ),
    F("description", Str(), None, "A description.", no_effect=_PLATFORM),
    F(
        "model_metadata",
        Metadata(),
        {},
        "`tags`, `example_model_input`, `repo_id`, free keys, and `headrace` (below).",
    ),
    F("resources", RESOURCES, {}, "The machine."),
    F("runtime", RUNTIME, {}, "How the platform runs the server."),
    F("secrets", Secrets(), {}, "Names of secrets that are needed.", to="secrets"),
    F("environment_variables", Environment(), {}, "Variables for the process.", to="environment"),
    F("trt_llm", TRT_LLM, None, "The engine."),
    F("bis_llm", BIS_LLM, None, "The engine, newer form."),
    F("weights", WEIGHTS, [], "Weights at paths; not together with `model_cache`."),
    F("model_cache", MODEL_CACHE, [], "The older form of `weights`.", aliases=("hf_cache",)),
    F("bdn", BDN, {}, "Volumes of the hosted network."),
    F(
        "training_checkpoints",
        TRAINING_CHECKPOINTS,
        None,
        "Checkpoints of training jobs.",
        not_yet="no training API here",
    ),
    F("external_data", EXTERNAL_DATA, None, "Files for model.py."),
    F("base_image", BASE_IMAGE, None, "Image of the container."),
    F("docker_server", DOCKER_SERVER, None, "A server of one's own."),
    F("build", BUILD_BLOCK, {}, "How the image is built."),
    F("build_commands", ListOf(Str()), [], "Commands of the build.", no_effect=_IMAGE),
    F("requirements", ListOf(Str()), [], "Python packages; not with `requirements_file`.", no_effect=_CODE),
    F("requirements_file", Str(), None, "File of packages.", no_effect=_CODE),
    F("system_packages", ListOf(Str()), [], "Debian packages.", no_effect=_IMAGE),
    F(
        "python_version",
        Str("py39 to py314", parse=_python),
        "py313",
        "Python of the image.",
        no_effect=_IMAGE,
    ),
    F("examples_filename", Str(), "examples.yaml", "Example inputs.", no_effect=_PLATFORM),
    F("data_dir", Str(), "data", "Data folder.", no_effect=_CODE),
    F("external_package_dirs", ListOf(Str()), [], "Packages.", no_effect=_CODE),
    F("input_type", Str(), "Any", "Legacy.", no_effect=_CODE),
    F("model_framework", Str(), "custom", "Legacy.", no_effect=_CODE),
    F("model_type", Str(), "Model", "Legacy.", no_effect=_CODE),
    F("model_module_dir", Str(), "model", "Folder of model.py.", no_effect=_CODE),
    F("model_class_filename", Str(), "model.py", "File of the class.", no_effect=_CODE),
    F("model_class_name", Str(), "Model", "Name of the class.", no_effect=_CODE),
    F("bundled_packages_dir", Str(), "packages", "Packages.", no_effect=_CODE),
    F("use_local_src", Bool(), False, "Legacy.", no_effect=_CODE),
    F("cache_internal", ListOf(Anything()), [], "Internal.", no_effect=_PLATFORM),
    F("live_reload", Bool(), False, "Reload code.", no_effect=_CODE),
    F("apply_library_patches", Bool(), True, "Patches.", no_effect=_CODE),
    F("spec_version", Str(numbers=True), "2.0", "Version of the format.", no_effect=_PLATFORM),
    elsewhere={
        "inference_stack": "belongs under `trt_llm`",
        "accelerator": "belongs under `resources`",
        "headrace": "belongs under `model_metadata`, where the hosted system accepts it too",
    },
)

assert INVALID is not None
