"""What importing costs: the light rooms load neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIGHT = [
    "headrace",
    "headrace.cli",
    "headrace.cli.main",
    "headrace.client",
    "headrace.config",
    "headrace.config.spec",
    "headrace.engines.client",
    "headrace.engines.dispatch",
    "headrace.engines.process",
    "headrace.errors",
    "headrace.kvcache.blocks",
    "headrace.llm",
    "headrace.messages",
    "headrace.router",
    "headrace.scheduling.scheduler",
    "headrace.serving",
    "headrace.serving.app",
    "headrace.text",
    "headrace.text.tokenizer",
    "headrace.types",
]


@pytest.mark.parametrize("module", LIGHT)
def test_light_rooms_import_no_torch(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print([m for m in ('torch', 'transformers', 'sentence_transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_are_a_list_that_resolves() -> None:
    import headrace

    assert headrace.__all__ == ["LLM", "AsyncEngine", "SamplingParams", "__version__"]
    for name in headrace.__all__:
        assert getattr(headrace, name) is not None


def test_the_python_api_without_its_extra_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "try:\n    from headrace import LLM\n"
        "except ModuleNotFoundError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "headrace[serve]"' in result.stdout
    assert "'tokenizers'" in result.stdout
