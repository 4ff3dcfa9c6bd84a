"""What importing costs: the light rooms load neither torch nor transformers."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

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
    "headrace.scheduling.token_budget",
    "headrace.serving",
    "headrace.serving.app",
    "headrace.text",
    "headrace.text.tokenizer",
    "headrace.types",
]


def test_light_rooms_import_no_torch() -> None:
    """One after another in one process: the first that loads something heavy is named."""
    code = (
        "import importlib, sys\n"
        f"for module in {LIGHT}:\n"
        "    importlib.import_module(module)\n"
        "    heavy = {'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)\n"
        "    assert not heavy, f'{module} imports {heavy}'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


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


ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path for folder in ("benchmarks", "scripts", "tools") for path in (ROOT / folder).glob("*.py")
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_scripts_import_names_that_exist(script: Path) -> None:
    """Also those that they import only where they run: on a GPU, say."""
    found = [
        node for node in ast.walk(ast.parse(script.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)
    ]
    for node in found:
        if (node.module or "").partition(".")[0] == "headrace":
            module = importlib.import_module(node.module or "")
            for name in node.names:
                submodule = f"{node.module}.{name.name}"
                assert hasattr(module, name.name) or importlib.util.find_spec(submodule), submodule
