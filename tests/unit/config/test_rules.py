from __future__ import annotations

import pytest

from headrace.config.load import RULES, check_text
from headrace.config.resolve import resolve_view
from headrace.config.schema.view import apply
from headrace.config.spec import lookahead_draft_length
from unit.config.cases import CASES, V1, V2, B, Case, P, R, build, encoder, look


@pytest.mark.parametrize("case", CASES, ids=str)
def test_breaking_config_is_refused_with_path_line_and_way_out(case: Case) -> None:
    text = build(case.base, case.bad)
    problems = check_text(text, "c.yaml").report.problems
    found = [problem for problem in problems if problem.path == case.path]
    assert found, f"no problem at {case.path}; got {[str(problem) for problem in problems]}"
    assert any(case.says in problem.message for problem in found), [problem.message for problem in found]
    assert all(problem.place.file == "c.yaml" and problem.place.line >= 1 for problem in problems)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_its_neighbour_just_passes(case: Case) -> None:
    view = check_text(build(case.base, case.good))
    assert [str(problem) for problem in view.report.problems] == []


def test_one_bad_config_breaks_nothing_else() -> None:
    """A case's problem is the only one: rules do not fire on each other's trouble."""
    noisy = {}
    for case in CASES:
        problems = check_text(build(case.base, case.bad)).report.problems
        if len(problems) != 1:
            noisy[case.name] = [str(problem) for problem in problems]
    # Both blocks at once, and flags that are wrong in two ways, are two problems each.
    assert set(noisy) <= {"both-blocks", "paged-fmha", "chunked-flags", "reuse", "external", "no-mode"}, noisy


def test_every_rule_is_broken_by_a_case_or_only_notices() -> None:
    """Rules that can refuse are covered by the table."""
    fired = set()
    for item in RULES:
        for case in CASES:
            view = check_text(build(case.base, case.bad))
            before = len(view.report.problems)
            kept, view.report._problems = view.report._problems, []
            apply([item], view)
            if view.report._problems:
                fired.add(item.name)
            view.report._problems = kept
            assert before == len(kept)
            if item.name in fired:
                break
    silent = {
        "encoders_use_one_gpu",
        "whisper_is_allowed",
        "host_memory",
        "reserved_variables",
        "engine_options_mean_something",
        "mounts_are_read",
    }
    assert {item.name for item in RULES} - fired == silent


@pytest.mark.parametrize(
    ("window", "ngram", "verification", "expected"),
    [
        (1, 8, 1, 13),
        (1, 16, 1, 29),
        (1, 32, 1, 61),
        (3, 8, 3, 41),
        (7, 5, 7, 55),
        (8, 3, 3, 21),
        (5, 5, 5, 39),
        (50, 50, 50, 4899),
        (4, 1, 2, 0),
    ],
)
def test_draft_length(window: int, ngram: int, verification: int, expected: int) -> None:
    assert lookahead_draft_length(window, ngram, verification) == expected


def notices(text: str, kind: str) -> list[tuple[str, str]]:
    view = check_text(text)
    assert view.report.ok, view.report.problems
    return [(notice.path, notice.message) for notice in view.report.of_kind(kind)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("base", "changes", "kind", "path"),
    [
        (
            V1,
            {"resources.accelerator": "H100:3", f"{B}.tensor_parallel_count": 3},
            "warning",
            f"{B}.tensor_parallel_count",
        ),
        (V1, look(), "warning", f"{B}.max_batch_size"),
        (V1, look(lookahead_windows_size=80), "warning", f"{B}.speculator"),
        (V1, encoder(tensor_parallel_count=2), "warning", f"{B}.tensor_parallel_count"),
        (V1, encoder(quantization_type="fp8_kv"), "warning", f"{B}.quantization_type"),
        (V1, {"environment_variables": {"PORT": "1"}}, "warning", "environment_variables.PORT"),
        (V1, {"secrets": {"k": "hf_real"}}, "warning", "secrets.k"),
        (
            V1,
            {"environment_variables": {"HF_TOKEN": "hf_abcdefgh"}},
            "warning",
            "environment_variables.HF_TOKEN",
        ),
        (
            V1,
            {
                "resources.accelerator": "H100:4",
                f"{B}.tensor_parallel_count": 4,
                f"{B}.moe_expert_parallel_option": 3,
            },
            "warning",
            f"{B}.moe_expert_parallel_option",
        ),
        (V1, look(max_batch_size=32), "lifted", f"{B}.speculator"),
        (V1, {f"{B}.quantization_type": "fp4"}, "lifted", f"{B}.quantization_type"),
        (
            V1,
            {f"{B}.quantization_type": "fp4_kv", "resources.accelerator": "L4"},
            "lifted",
            f"{B}.quantization_type",
        ),
        (V1, {f"{B}.base_model": "whisper"}, "lifted", f"{B}.base_model"),
        (V1, encoder(max_seq_len=512), "no_effect", f"{B}.max_seq_len"),
        (
            V1,
            {**encoder(), f"{R}.request_default_max_tokens": 9},
            "no_effect",
            f"{R}.request_default_max_tokens",
        ),
        (
            V1,
            {f"{B}.checkpoint_repository": {"source": "S3", "repo": "s3://b/p", "revision": "v1"}},
            "no_effect",
            f"{B}.checkpoint_repository.revision",
        ),
        (V1, {f"{B}.quantization_type": "weights_int4_kv_int8"}, "differs", f"{B}.quantization_type"),
        (V1, {f"{B}.quantization_type": "smooth_quant"}, "differs", f"{B}.quantization_type"),
        (V1, {f"{B}.base_model": "whisper"}, "not_yet", f"{B}.base_model"),
        (
            V1,
            {f"{B}.checkpoint_repository": {"source": "LOCAL", "repo": "/x"}},
            "lifted",
            f"{B}.checkpoint_repository.source",
        ),
        (
            V1,
            {"trt_llm.version_overrides.bei_version": "1.2"},
            "no_effect",
            "trt_llm.version_overrides.bei_version",
        ),
        (V1, {"resources.memory": "9Gi"}, "no_effect", "resources.memory"),
        (V1, {f"{B}.num_builder_gpus": 2}, "no_effect", f"{B}.num_builder_gpus"),
        (
            V1,
            {"model_metadata": {"tags": ["force-legacy-api-non-openai-compatible"]}},
            "differs",
            "model_metadata.tags",
        ),
        (
            V1,
            {"runtime.health_checks": {"restart_threshold_seconds": 60}},
            "no_effect",
            "runtime.health_checks.restart_threshold_seconds",
        ),
        (V2, {f"{P}.trust_remote_code": True}, "no_effect", f"{P}.trust_remote_code"),
        (V2, {"resources.node_count": 2}, "not_yet", "resources.node_count"),
        (
            V1,
            {"resources.accelerator": "H100:2", f"{B}.sequence_parallel_count": 2},
            "not_yet",
            f"{B}.sequence_parallel_count",
        ),
        (V1, {**encoder(), "resources.accelerator": "H100:8"}, "differs", "resources.accelerator"),
        (V1, {f"{R}.kv_cache_free_gpu_mem_fraction": 0.8}, "differs", f"{R}.kv_cache_free_gpu_mem_fraction"),
    ],
)
def test_notices(base: dict, changes: dict, kind: str, path: str) -> None:
    changes = {
        key.replace(f"{B}.speculator.max_batch_size", f"{B}.max_batch_size"): v for key, v in changes.items()
    }
    if f"{B}.speculator" in changes:
        changes[f"{B}.speculator"].pop("max_batch_size", None)
    assert path in [where for where, _ in notices(build(base, changes), kind)]
    # The same key at its default says nothing.
    assert path not in [where for where, _ in notices(build(base, {}), kind)]


def test_gpus_that_would_stay_idle_are_told() -> None:
    path = f"{R}.tensor_parallel_size"
    assert path in [where for where, _ in notices(build(V2, {}), "warning")]
    assert path not in [where for where, _ in notices(build(V2, {path: 2}), "warning")]


@pytest.mark.parametrize("gpu", ["B200", "B300", "GB300", "RTX_PRO_6000"])
def test_fp4_on_blackwell_needs_no_lifting(gpu: str) -> None:
    assert notices(build(V1, {"resources.accelerator": gpu, f"{B}.quantization_type": "fp4"}), "lifted") == []


def test_all_problems_are_reported_together() -> None:
    text = build(
        V1,
        {f"{B}.max_seq_len": 0, f"{R}.batch_scheduler_policy": "x", "resurces": {}, "python_version": "py2"},
    )
    view = check_text(text, "all.yaml")
    assert len(view.report.problems) == 4
    with pytest.raises(Exception, match="py2") as caught:
        resolve_view(view)
    assert len(caught.value.problems) == 4  # type: ignore[attr-defined]
    assert all(problem.startswith("all.yaml:") for problem in caught.value.problems)  # type: ignore[attr-defined]


def test_variables_that_are_no_credentials_do_not_warn() -> None:
    plain = {"TOKENIZERS_PARALLELISM": "false", "KEY": "/run/key", "TOKEN": "1", "KEYBOARD": "aaaaaaaaaa"}
    assert notices(build(V1, {"environment_variables": plain}), "warning") == []


def test_an_encoder_that_does_not_chunk_runs_into_nothing() -> None:
    text = build(V1, {**encoder(), f"{R}.enable_chunked_context": False})
    found = resolve_view(check_text(text))
    assert [str(notice) for notice in found.report.notices if "chunk" in str(notice)] == []
