"""The whole config.yaml: the engine blocks and everything around them."""

from __future__ import annotations

from headrace.config.schema.fields import F, Section
from headrace.config.schema.own import OWN
from headrace.config.schema.patch import BIS_LLM
from headrace.config.schema.platform import (
    BASE_IMAGE,
    BUILD_BLOCK,
    DOCKER_SERVER,
    IMAGE,
    PLATFORM,
    RESOURCES,
    RUNTIME,
)
from headrace.config.schema.top_types import Environment, Metadata, Secrets, python
from headrace.config.schema.trt_llm import TRT_LLM
from headrace.config.schema.types import Anything, Bool, ListOf, Str
from headrace.config.schema.weights import BDN, EXTERNAL_DATA, MODEL_CACHE, TRAINING_CHECKPOINTS, WEIGHTS

__all__ = ["TOP"]

_CODE = "model.py and its packages are not run here: the engine is ours"


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
    F("description", Str(), None, "A description.", no_effect=PLATFORM),
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
    F("build_commands", ListOf(Str()), [], "Commands of the build.", no_effect=IMAGE),
    F("requirements", ListOf(Str()), [], "Python packages; not with `requirements_file`.", no_effect=_CODE),
    F("requirements_file", Str(), None, "File of packages.", no_effect=_CODE),
    F("system_packages", ListOf(Str()), [], "Debian packages.", no_effect=IMAGE),
    F(
        "python_version",
        Str("py39 to py314", parse=python),
        "py313",
        "Python of the image.",
        no_effect=IMAGE,
    ),
    F("examples_filename", Str(), "examples.yaml", "Example inputs.", no_effect=PLATFORM),
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
    F("cache_internal", ListOf(Anything()), [], "Internal.", no_effect=PLATFORM),
    F("live_reload", Bool(), False, "Reload code.", no_effect=_CODE),
    F("apply_library_patches", Bool(), True, "Patches.", no_effect=_CODE),
    F("spec_version", Str(numbers=True), "2.0", "Version of the format.", no_effect=PLATFORM),
    elsewhere={
        **dict.fromkeys(OWN.by_name, "belongs under `model_metadata.headrace`"),
        "inference_stack": "belongs under `trt_llm`",
        "accelerator": "belongs under `resources`",
        "headrace": "belongs under `model_metadata`, where the hosted system accepts it too",
    },
)
