"""Keys of the server: from flags, files, the environment and a secret; never shown."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from headrace.cli import serve
from headrace.cli.main import main
from headrace.cli.options import api_keys, specs
from headrace.errors import ConfigError
from support.tiny_folder import write_llama

VALUE = "k3y_value"


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADRACE_SECRETS_DIR", str(tmp_path / "secrets"))
    monkeypatch.delenv("HEADRACE_API_KEYS", raising=False)
    (tmp_path / "secrets").mkdir()


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(["m", *arguments])


def test_keys_of_a_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert api_keys(parse()) == ()
    (tmp_path / "secrets" / "headrace_api_key").write_text(f"{VALUE}\nsecond\n")
    assert api_keys(parse("--api-key", "flag")) == ("flag", VALUE, "second")
    monkeypatch.setenv("TRUSS_SECRET_headrace_api_key", "from-variable")
    assert api_keys(parse()) == ("from-variable",)
    (tmp_path / "secrets" / "headrace_api_key").write_bytes(b"\xff")
    monkeypatch.delenv("TRUSS_SECRET_headrace_api_key")
    with pytest.raises(ConfigError, match="UTF-8"):
        api_keys(parse())


def test_an_empty_secret_does_not_open_the_server(tmp_path: Path) -> None:
    (tmp_path / "secrets" / "headrace_api_key").write_text(" \n \n")
    with pytest.raises(ConfigError, match="headrace_api_key"):
        api_keys(parse())


def test_listed_secrets_that_are_missing_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_llama(folder)
    file = tmp_path / "config.yaml"
    file.write_text(
        "model_name: m\nsecrets:\n  there: null\n  absent: null\n"
        f"trt_llm:\n  build:\n    checkpoint_repository:\n      source: LOCAL\n      repo: {folder}\n"
    )
    monkeypatch.setenv("TRUSS_SECRET_there", VALUE)
    (spec,) = specs(parse(), [str(file)])
    said = capsys.readouterr().err
    assert spec.secrets == ("absent", "there")
    assert "secrets.absent" in said
    assert "secrets.there" not in said
    assert VALUE not in said


def test_what_is_no_origin_ends_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "minilm", "--cors-allow-origin", "example.com"]) == 2
    assert "--cors-allow-origin is 'example.com'" in capsys.readouterr().err
