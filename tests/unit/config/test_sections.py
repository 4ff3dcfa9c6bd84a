"""Which cases show which rule, by section of the hosted system's reference; and every key refuses another type."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest

from headrace.config.report import Report
from headrace.config.schema.fields import Choice, Field, Section
from headrace.config.schema.top import TOP
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
)
from headrace.config.yaml import load_text
from unit.config.cases import CASES

# Rule -> cases that break it, each with a neighbour that just passes (test_rules.py runs both); * as in file names.
SECTIONS: dict[str, dict[str, str]] = {
    "1.1 trt_llm": {
        "inference_stack is v1 or v2": "stack",
        "build is required; v2 requires runtime": "build-required v2-runtime-required",
        "versions begin with a digit": "version-*",
    },
    "1.2 build": {
        "base_model: three words; old names are renamed": "base-model renamed-*",
        "v1 needs a checkpoint": "checkpoint-v1",
        "max_seq_len: strict, 1 to 1048576": "max-seq-*",
        "max_batch_size: 1 to 2048": "batch-*",
        "max_num_tokens: above 64, to 1048576": "tokens-*",
        "max_beam_width is 1": "beam",
        "tensor_parallel_count: from 1": "tp-zero",
        "moe_expert_parallel_option: -1, or 1 to the ranks": "moe-*",
        "use_paged_context_fmha needs paged_kv_cache": "paged-fmha",
        "num_builder_gpus: from 1": "builder-gpus",
        "names of lora adapters": "lora-name lora-repo",
        "lora_configuration": "lora-rank",
        "unknown keys": "unknown-build",
    },
    "1.3 runtime": {
        "kv_cache_free_gpu_mem_fraction (stricter: to 1)": "kv-fraction",
        "kv_cache_host_memory_bytes: from 1": "kv-host",
        "enable_chunked_context needs both plugin flags": "chunked-flags",
        "batch_scheduler_policy": "policy",
        "request_default_max_tokens: from 1": "default-tokens",
        "webserver_default_route": "route",
        "lora_cache sizes: from 1, optimal not above max": "lora-optimal zero-lora_cache_*",
        "total_token_limit (stricter: from 1)": "zero-total_token_limit",
        "lora_cache_gpu_memory_fraction: (0, 1]": "lora-fraction*",
        "lora_cache keys do not stand under build": "misplaced-*",
    },
    "1.4 v2": {
        "fields of build that must not be set": "v2-build-*",
        "a checkpoint, unless skip_build_result": "v2-checkpoint",
        "ranges of runtime": "v2-seq-* v2-batch-* v2-tokens-* v2-tp-*",
        "names of v1 in v2 and of v2 in v1": "v2-old-name v2-name-in-v1",
        "patch_kwargs repeats nothing and knows its keys": "patch-*",
    },
    "1.5 checkpoint_repository": {
        "source: required, upper case": "source-*",
        "repo: required, in its source's form": "repo-required hf-id hf-dashes gcs-form s3-form azure-form url-form",
    },
    "1.6 quantization": {
        "quantization_type": "type",
        "calibration: 64 to 16384, multiples of 64": "calibration-*",
    },
    "1.7 speculator": {
        "the mode is explicit and LOOKAHEAD_DECODING": "no-mode external",
        "three sizes, from 1": "sizes sizes-* window-zero zero-lookahead_*",
        "num_draft_tokens: from 1": "zero-num_draft_tokens",
        "num_draft_tokens: not below the computed length, not above 2048": "draft-*",
        "both plugin flags; a decoder": "reuse encoder",
    },
    "1.8 cross-field": {
        "ranks equal GPUs": "world world-pp world-sp encoder-gpus",
        "T4 and V100 run encoder_bert only": "T4-* V100-*",
        "FP8 and FP4 types need Ada or Hopper or newer": "A10G-* A100-* A100_40GB-* bert-T4-fp8",
        "tags": "tags legacy-speculator",
        "unknown keys": "unknown-top unknown-trt unknown-runtime",
    },
    "1.9 the rest": {
        "resources and accelerators": "cpu memory accelerator* node-count",
        "runtime": "transport workers egress-*",
        "model_cache": "cache-* weights-and-cache",
        "weights": "weights-* secret-twice auth-*",
        "bdn": "bdn-*",
        "training_checkpoints": "training-both",
        "docker_server": "docker-*",
        "image, packages, variables, secrets": "image-* requirements python no-cache env-list secret-name",
        "model_metadata.headrace": "own-*",
    },
    "1.10 bis_llm": {
        "config, backend, checkpoint and model name": "config backend backend-name checkpoint model-name",
        "engine_config": "option option-type",
        "disaggregation": "disagg-*",
        "speculative_config": "eagle drafts-misplaced",
        "not together with trt_llm": "both-blocks",
        "autoscaling": "metrics autoscaling",
    },
}


def test_every_rule_has_cases_and_every_case_a_rule() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    found: set[str] = set()
    for section, rules in SECTIONS.items():
        for rule, patterns in rules.items():
            for pattern in patterns.split():
                matching = fnmatch.filter(names, pattern)
                assert matching, f"{section}: {rule}: no case is named {pattern}"
                found.update(matching)
    assert set(names) - found == set()


FIELDS = [(section, field) for section in TOP.walk() for field in section.fields]


@pytest.mark.parametrize(
    ("section", "field"), FIELDS, ids=[f"{section.title}.{field.name}" for section, field in FIELDS]
)
def test_every_key_refuses_another_type(section: Section, field: Field) -> None:
    """And names its path and line; null, where it means absence, and the default are fine."""
    wrong = {
        Bool: "perhaps", Int: "many", Float: "much", Enum: "no such word", Str: "[1]", ListOf: "5", MapOf: "5",
        Section: "5", Choice: "5", Anything: None,
    }.get(type(field.type), "[1]")  # fmt: skip
    if wrong is None:
        return  # any value is one
    report = Report()
    node = load_text(f"key: {wrong}\n", "c.yaml", report)
    assert node is not None
    reading = Reading(report)
    assert field.type.read(node.value["key"], f"{section.title}.{field.name}", reading) is INVALID
    (problem,) = report.problems
    assert problem.path == f"{section.title}.{field.name}"
    assert (problem.place.file, problem.place.line) == ("c.yaml", 1)


def _reads(type_: Any, text: str) -> bool:
    report = Report()
    node = load_text(f"key: {text}\n", "c.yaml", report)
    assert node is not None
    return type_.read(node.value["key"], "key", Reading(report)) is not INVALID and report.ok


BOUNDED = [
    (section, field)
    for section, field in FIELDS
    if isinstance(field.type, (Int, Float)) and (field.type.low is not None or field.type.high is not None)
]


@pytest.mark.parametrize(
    ("section", "field"), BOUNDED, ids=[f"{section.title}.{field.name}" for section, field in BOUNDED]
)
def test_every_range_ends_where_it_says(section: Section, field: Field) -> None:
    """The last value inside passes and the first outside is refused, at both ends of every number."""
    kind = field.type
    assert isinstance(kind, (Int, Float))
    step = kind.multiple if isinstance(kind, Int) else 0.001
    if kind.low is not None:
        first = kind.low + (step if isinstance(kind, Float) and kind.above else 0)
        assert _reads(kind, str(first))
        assert not _reads(kind, str(first - step))
    if kind.high is not None:
        assert _reads(kind, str(kind.high))
        assert not _reads(kind, str(kind.high + step))
    if isinstance(kind, Int) and kind.multiple > 1:
        assert not _reads(kind, str((kind.low or kind.multiple) + 1))


WORDS = [(section, field) for section, field in FIELDS if isinstance(field.type, Enum)]


@pytest.mark.parametrize(
    ("section", "field"), WORDS, ids=[f"{section.title}.{field.name}" for section, field in WORDS]
)
def test_every_word_of_a_choice_is_read_and_no_other(section: Section, field: Field) -> None:
    kind = field.type
    assert isinstance(kind, Enum)
    for word in kind.values:
        assert _reads(kind, f"'{word}'")
        assert not word or not _reads(kind, f"'{word}x'")
        assert not word or kind.fold or word.swapcase() == word or not _reads(kind, f"'{word.swapcase()}'")
    for word in kind.old:
        assert not _reads(kind, word)


NEEDED = [(section, field) for section, field in FIELDS if field.default is REQUIRED]


@pytest.mark.parametrize(
    ("section", "field"), NEEDED, ids=[f"{section.title}.{field.name}" for section, field in NEEDED]
)
def test_every_required_key_is_missed(section: Section, field: Field) -> None:
    report = Report()
    node = load_text("{}\n", "c.yaml", report)
    assert node is not None
    section.read(node, "block", Reading(report))
    found = [problem for problem in report.problems if problem.path == f"block.{field.name}"]
    assert found
    assert "required" in found[0].message
