from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from headrace.config.foreign import ENGINE_OPTIONS, TEI_FLAGS, VLLM_FLAGS
from headrace.config.schema.top import TOP
from headrace.config.spec import EngineSpec

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generated_docs", ROOT / "scripts" / "generated_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["docs/api.md", "docs/config.md", "docs/migration.md"])
def test_generated_parts_do_not_lag(script: ModuleType, name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    assert "<!-- generated:" in text
    assert script.rewritten(text) == text, "run python scripts/generated_docs.py"


def test_every_key_is_documented(script: ModuleType) -> None:
    text = (ROOT / "docs/migration.md").read_text("utf-8") + (ROOT / "docs/config.md").read_text("utf-8")
    for section in TOP.walk():
        assert section.doc.endswith((".", ")"))
        for field in section.fields:
            assert f"`{field.name}`" in text
            assert field.doc
    for name in EngineSpec.__struct_fields__:
        assert name == "path" or f"`{name}`" in text


def test_links_lead_somewhere(script: ModuleType) -> None:
    text = (ROOT / "docs/migration.md").read_text("utf-8")
    heads = [line.lstrip("# ").lower() for line in text.splitlines() if line.startswith("#")]
    anchors = {re.sub(r"[^a-z0-9_ -]", "", head).replace(" ", "-") for head in heads}
    own = {"headrace", "speculation", "adapter", "calibration"}  # in config.md
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors | own


def test_foreign_flags_lead_to_fields() -> None:
    fields = set(EngineSpec.__struct_fields__)
    for option in (*VLLM_FLAGS, *TEI_FLAGS, *ENGINE_OPTIONS.values()):
        assert option.to in fields or option.to == "" or option.to.startswith("--"), option.name
        assert option.to or option.note, f"{option.name} leads nowhere and says nothing"
