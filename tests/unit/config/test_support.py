from __future__ import annotations

import re
from pathlib import Path

import pytest

import headrace
from headrace.config.load import check_text
from headrace.config.resolve import resolve, resolve_view
from headrace.config.spec import Adapter, EngineSpec
from headrace.config.support import GAPS, gaps, require_supported
from headrace.errors import ConfigError
from unit.config.cases import V1, B, build, look

# Read for some values only: the rest is refused where it is read, or here.
PARTLY = {"quantization", "kv_cache_dtype"}


def read_fields() -> set[str]:
    """Fields of a spec that something below the configuration reads."""
    root = Path(headrace.__file__).parent
    planners = {"plan.py", "inspect.py"}
    found: set[str] = set()
    for file in root.rglob("*.py"):
        inside = file.relative_to(root)
        if inside.parts[0] in ("config", "cli") or (inside.parts[0] == "engines" and file.name in planners):
            continue
        found |= set(re.findall(r"\bspec\.(\w+)", file.read_text("utf-8")))
    return found & set(EngineSpec.__struct_fields__)


def test_no_field_is_dropped_in_silence() -> None:
    read, listed = read_fields(), {gap.field for gap in GAPS}
    assert set(EngineSpec.__struct_fields__) - read - listed == set(), (
        "honour these, or add them to support.GAPS"
    )
    assert (read & listed) - PARTLY == set(), (
        "these are read now: take them out of support.GAPS, or add to PARTLY"
    )


def test_defaults_are_supported() -> None:
    assert gaps(EngineSpec(model="m")) == []
    require_supported(
        EngineSpec(model="m", source="HF", engine="dense", quantization="int4", seed=3, eager=True)
    )


def test_what_would_change_answers_is_refused_together() -> None:
    spec = EngineSpec(
        model="m", quantization="fp3", kv_cache_dtype="int8", adapters=(Adapter(name="a", model="x"),)
    )
    with pytest.raises(ConfigError) as caught:
        require_supported(spec)
    assert len(caught.value.problems) == 3
    assert "'fp3'" in caught.value.problems[0]


def test_resolving_names_them_with_their_place() -> None:
    text = build(V1, {**look(), f"{B}.tensor_parallel_count": 2, "resources.accelerator": "H100:2"})
    found = resolve_view(check_text(text, "c.yaml"))
    blocking = found.report.of_kind("not_yet")
    assert [notice.path for notice in blocking] == [f"{B}.tensor_parallel_count"]
    assert blocking[0].place.line > 1
    assert any("drafts" in notice.message for notice in found.report.of_kind("differs"))
    with pytest.raises(ConfigError, match="tensor_parallel"):
        found.report.require_supported()
    assert resolve("m", tensor_parallel_size=2).report.of_kind("not_yet")[0].path == "tensor_parallel_size"
