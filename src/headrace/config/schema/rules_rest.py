"""Cross-field rules of everything around ``trt_llm``: weights, images, ``patch_kwargs``, ``bis_llm``."""

from __future__ import annotations

import re
from typing import Any

from headrace.config.command import read_command
from headrace.config.foreign import ENGINE_OPTIONS, TRT_TO_VLLM
from headrace.config.schema.view import Rule, View, rule
from headrace.config.schema.weights import AUTH_METHODS, MODEL_CACHE_ROOT

__all__ = ["REST_RULES"]

REST_RULES: list[Rule] = []
_PATCH = "trt_llm.runtime.patch_kwargs"
_BIS_OPTIONS = "bis_llm.config.engine_config"
_CREDENTIAL = re.compile(r"(^|_)(token|key|secret|password|passwd|credentials?)$", re.IGNORECASE)
_ROLE_KEYS = tuple(
    name for method, names in AUTH_METHODS.items() if method != "CUSTOM_SECRET" for name in names
)


def _entries(view: View, path: str) -> list[tuple[str, dict[str, Any]]]:
    """The valid entries of a list of mappings, with their paths."""
    found = view.get(path, [])
    entries = enumerate(found) if isinstance(found, list) else ()
    return [(f"{path}[{index}]", entry) for index, entry in entries if isinstance(entry, dict)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _unique(view: View, path: str, key: str, what: str) -> None:
    seen: dict[str, str] = {}
    for where, entry in _entries(view, path):
        value = _text(entry.get(key))
        if value and value in seen:
            place = view.place(seen[value])
            view.error(f"{where}.{key}", f"{value!r} is taken by {seen[value]} (line {place.line}); {what}")
        seen.setdefault(value, where)


@rule(REST_RULES)
def one_source_of_weights(view: View) -> None:
    """`weights` and `model_cache` exclude each other."""
    if view.get("weights") and view.get("model_cache"):
        view.error(
            "model_cache", "stands beside weights; keep weights, which replaces it (`truss migrate` rewrites)"
        )


@rule(REST_RULES)
def mounts_are_unique(view: View) -> None:
    """Each `mount_location` of `weights` and each `path` of `bdn.mounts` stands once."""
    _unique(view, "weights", "mount_location", "each source needs a path of its own")
    _unique(view, "bdn.mounts", "path", "each volume needs a path of its own")
    _unique(view, "bdn.access", "namespace", "name each namespace once, with all its grants")
    for where, entry in _entries(view, "bdn.access"):
        grants = entry.get("grants")
        if isinstance(grants, list) and len({str(grant) for grant in grants}) < len(grants):
            view.error(f"{where}.grants", "names an operation twice")


@rule(REST_RULES)
def mounts_are_read(view: View) -> None:
    """Differs: files of `weights` and `model_cache` that no `model_path` lies under are not fetched."""
    paths = [view.get(f"{block}.model_path", "") for block in (_PATCH, "bis_llm.config", _BIS_OPTIONS)]
    command = read_command(view.get("docker_server.start_command", ""))
    paths += [command.model] if command is not None else []
    for where, entry in (*_entries(view, "weights"), *_entries(view, "model_cache")):
        mount = entry.get("mount_location") or f"{MODEL_CACHE_ROOT}/{entry.get('volume_folder') or ''}"
        if isinstance(mount, str) and not any(
            path == mount or path.startswith(f"{mount}/") for path in paths
        ):
            view.notice("differs", where, "is not fetched: no model_path of an engine block lies under it")


@rule(REST_RULES)
def weight_credentials(view: View) -> None:
    """`auth_secret_name` stands beside or inside `auth`, not both; each method needs its own keys only."""
    for where, entry in _entries(view, "weights"):
        auth = entry.get("auth")
        if not isinstance(auth, dict):
            continue
        if entry.get("auth_secret_name") and auth.get("auth_secret_name"):
            view.error(f"{where}.auth_secret_name", "is given twice, also inside auth; keep one of them")
        method = auth.get("auth_method")
        if isinstance(method, str):
            if method != "CUSTOM_SECRET":
                note = "roles belong to the hosted system; here the machine's own credentials are used"
                view.notice("differs", f"{where}.auth.auth_method", note)
            _method_keys(
                view, f"{where}.auth", auth, method, AUTH_METHODS[method], ("auth_secret_name", *_ROLE_KEYS)
            )


def _method_keys(
    view: View, path: str, auth: dict[str, Any], method: str, needed: tuple[str, ...], known: tuple[str, ...]
) -> None:
    missing = [name for name in needed if auth.get(name) in (None, "")]
    foreign = [name for name in known if name not in needed and auth.get(name) not in (None, "")]
    if missing:
        view.error(path, f"{method} needs {', '.join(missing)}")
    if foreign:
        view.error(f"{path}.{foreign[0]}", f"{', '.join(foreign)} cannot stand with {method}; remove it")


@rule(REST_RULES)
def registry_credentials(view: View) -> None:
    """Each method of `base_image.docker_auth` needs its own keys only."""
    auth = view.get("base_image.docker_auth")
    method = auth.get("auth_method") if isinstance(auth, dict) else None
    if not isinstance(method, str) or method in ("AWS_IAM", "REGISTRY_SECRET"):
        return
    needed = ("secret_name",) if method == "GCP_SERVICE_ACCOUNT_JSON" else AUTH_METHODS[method]
    known = _ROLE_KEYS if method == "GCP_SERVICE_ACCOUNT_JSON" else ("secret_name", *_ROLE_KEYS)
    _method_keys(view, "base_image.docker_auth", auth, method, needed, known)


@rule(REST_RULES)
def cached_models(view: View) -> None:
    """`model_cache` with `use_volume` needs `volume_folder`, and `revision` on the hub; all entries agree on
    `use_volume`."""
    entries = _entries(view, "model_cache")
    volumes = {entry.get("use_volume") for _, entry in entries if isinstance(entry.get("use_volume"), bool)}
    if len(volumes) > 1:
        view.error("model_cache", "mixes use_volume true and false; use one of them for all entries")
    for where, entry in entries:
        if entry.get("use_volume") is not True:
            continue
        if not entry.get("volume_folder"):
            view.error(f"{where}.volume_folder", "is required with use_volume: true")
        if entry.get("kind") == "hf" and entry.get("revision") == "":
            view.error(f"{where}.revision", "is required with use_volume: true; pin a branch, tag or commit")


@rule(REST_RULES)
def one_kind_of_training_checkpoint(view: View) -> None:
    """`artifact_references` and `loops_checkpoint_ids` exclude each other."""
    block = "training_checkpoints"
    if view.get(f"{block}.artifact_references") and view.get(f"{block}.loops_checkpoint_ids"):
        view.error(f"{block}.loops_checkpoint_ids", "stands beside artifact_references; keep one of them")


@rule(REST_RULES, "docker_server", when="docker_server")
def docker_server_is_complete(view: View) -> None:
    """`docker_server` needs `start_command` unless `no_build`; port 8080 and users 0 and 60000 are reserved;
    `remote_ssh` does not go with `run_as_user_id`."""
    block = "docker_server"
    if not view.get(f"{block}.no_build") and view.get(f"{block}.start_command") is None:
        view.error(f"{block}.start_command", "is required unless no_build is true")
    if view.get(f"{block}.server_port") == 8080:
        view.error(f"{block}.server_port", "is 8080, which the hosted proxy reserves; choose another")
    if view.get(f"{block}.run_as_user_id") == 60000:
        view.error(f"{block}.run_as_user_id", "is 60000, which the hosted system reserves; choose another")
    if view.get("runtime.remote_ssh.enabled") and view.get(f"{block}.run_as_user_id") is not None:
        view.error("runtime.remote_ssh.enabled", "does not go with docker_server.run_as_user_id; drop one")


@rule(REST_RULES)
def one_list_of_requirements(view: View) -> None:
    """`requirements` and `requirements_file` exclude each other; `build.no_cache` is a flag, not a key."""
    if view.get("requirements") and view.get("requirements_file"):
        view.error("requirements", "stands beside requirements_file; keep one of them")
    if view.get("build.no_cache"):
        view.error("build.no_cache", "cannot stand in the file; it is a flag of `truss push`")


@rule(REST_RULES)
def reserved_variables(view: View) -> None:
    """`PORT` and `HOSTNAME` in `environment_variables` warn: the platform overwrites them; and so do credentials,
    which belong under `secrets`."""
    for name in ("PORT", "HOSTNAME"):
        if name in view.get("environment_variables", {}):
            view.notice("warning", f"environment_variables.{name}", "is overwritten by the hosted platform")
    for name, value in view.get("environment_variables", {}).items():
        if _CREDENTIAL.search(name) and isinstance(value, str) and len(value) >= 8 and "/" not in value:
            note = "looks like a credential in the clear; name it under secrets and set it outside this file"
            view.notice("warning", f"environment_variables.{name}", note)


@rule(REST_RULES)
def drafters_are_complete(view: View) -> None:
    """`speculative_config`: Eagle needs `speculative_model_dir`, MTP needs `num_nextn_predict_layers`."""
    for path in (f"{_PATCH}.speculative_config", "bis_llm.config.speculative_config"):
        needed = {"EAGLE": "speculative_model_dir", "MTP": "num_nextn_predict_layers"}
        name = needed.get(str(view.get(f"{path}.decoding_type")))
        if name and view.get(f"{path}.{name}") is None and not view.invalid(f"{path}.{name}"):
            view.error(path, f"decoding_type {view.get(f'{path}.decoding_type')} needs {name}")


@rule(REST_RULES)
def one_engine_block(view: View) -> None:
    """`trt_llm` and `bis_llm` exclude each other."""
    if view.get("trt_llm") is not None and view.get("bis_llm") is not None:
        view.error("bis_llm", "stands beside trt_llm; a file describes one engine: keep one of them")


@rule(REST_RULES, "bis_llm.config", when="bis_llm")
def bis_names_a_backend(view: View) -> None:
    """`bis_llm.config` is needed, with `engine_backend` or `gpuTRTImage`."""
    config = view.get("bis_llm.config")
    if config is None:
        view.error("bis_llm.config", "is required: it names the checkpoint")
    elif not config.get("engine_backend") and not config.get("gpuTRTImage"):
        view.error(
            "bis_llm.config.engine_backend", "is required (trtllm or vllm) unless gpuTRTImage is given"
        )


@rule(REST_RULES, "bis_llm.config", when="bis_llm.config")
def disaggregation_is_declared(view: View) -> None:
    """`b10_disagg_config` needs `is_disaggregated: true`, and the other way round."""
    block = "bis_llm.config"
    declared, config = view.get(f"{block}.is_disaggregated"), view.get(f"{block}.b10_disagg_config")
    if config is not None and not declared:
        view.error(f"{block}.is_disaggregated", "must be true for b10_disagg_config to stand")
    if declared and config is None and not view.invalid(f"{block}.b10_disagg_config"):
        view.error(f"{block}.b10_disagg_config", "is required with is_disaggregated: both worker counts")


@rule(REST_RULES, "bis_llm.config", when="bis_llm.config.engine_config")
def engine_options_mean_something(view: View) -> None:
    """`engine_config` may use either backend's names; lifted: TensorRT-LLM's names on the vLLM backend."""
    path = _BIS_OPTIONS
    backend = view.get("bis_llm.config.engine_backend", "trtllm")
    for name in view.get(path, {}):
        option = ENGINE_OPTIONS.get(name)
        if backend == "vllm" and name in TRT_TO_VLLM:
            view.notice(
                "lifted", f"{path}.{name}", f"a TensorRT-LLM name, which vLLM calls {TRT_TO_VLLM[name]}"
            )
        elif option is not None and not option.to:
            view.notice("no_effect", f"{path}.{name}", option.note or "no such choice here")
