from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import msgspec
import pytest

from headrace.config import env
from headrace.config.load import check_text
from headrace.config.resolve import redacted, resolve_view
from headrace.config.secrets import Secret, find_secret, hide, require_secret
from headrace.errors import ConfigError
from unit.config.cases import V1, build

VALUE = "hf_s3cr3tValue"


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADRACE_SECRETS_DIR", str(tmp_path))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TRUSS_SECRET_hf_access_token"):
        monkeypatch.delenv(name, raising=False)


def test_value_never_shows(caplog: pytest.LogCaptureFixture) -> None:
    secret = Secret(VALUE, "name")
    shown = [
        repr(secret),
        str(secret),
        f"{secret}",
        f"{secret!r:>40}",
        f"{secret:>40}",
        f"{secret}",
        str([secret]),
        str({1: secret}),
    ]
    with caplog.at_level(logging.INFO):
        logging.getLogger("x").info("secret %s %r", secret, secret)
    shown += [caplog.text, json.dumps({"a": secret}, default=str)]
    assert all(VALUE not in text for text in shown)
    with pytest.raises(TypeError):
        json.dumps(secret)
    with pytest.raises(TypeError):
        msgspec.json.encode(secret)
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    assert secret.reveal() == VALUE
    assert secret == Secret(VALUE)
    assert hide(f"401 for {VALUE}!", [secret]) == "401 for ***!"
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError(f"failed with {secret}")
    assert VALUE not in str(caught.value)


def test_lookup_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_secret("hf_access_token") is None
    (tmp_path / "hf_access_token").write_text("from-file\n")
    steps = [("file", "from-file")]
    for variable in ("HUGGING_FACE_HUB_TOKEN", "HF_TOKEN", "TRUSS_SECRET_hf_access_token"):
        steps.append((variable, variable.lower()))
    for variable, value in steps:
        if variable != "file":
            monkeypatch.setenv(variable, value)
        found = find_secret("hf_access_token")
        assert found is not None
        assert found.reveal() == value
        assert variable in found.origin
    assert find_secret("other") is None


@pytest.mark.parametrize("name", ["", "..", "a/b", "../etc/passwd", "a b", "x" * 300, "a\nb"])
def test_names_cannot_leave_the_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="refused"):
        find_secret(name)


def test_missing_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="TRUSS_SECRET_aws_secret_json"):
        require_secret("aws_secret_json", "reading s3://b/p")
    (tmp_path / "bad").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        find_secret("bad")
    (tmp_path / "empty").write_text("\n")
    assert find_secret("empty") is None
    (tmp_path / "multi").write_text('{"a": 1}\n\n')
    found = find_secret("multi")
    assert found is not None
    assert found.reveal() == '{"a": 1}\n'


def test_values_in_the_file_are_dropped_and_never_shown() -> None:
    text = build(
        V1,
        {
            "secrets": {"hf_access_token": VALUE, "other": None, "listed": [VALUE]},
            "environment_variables": {"MY_API_KEY": VALUE, "PLAIN": "shown"},
        },
    )
    view = check_text(text)
    assert VALUE not in json.dumps(view.report.as_dict())
    assert VALUE not in str([str(problem) for problem in view.report.problems])
    view = check_text(text.replace(f"  listed:\n  - {VALUE}\n", ""))
    resolution = resolve_view(view)
    assert resolution.spec.secrets == ("hf_access_token", "other")
    shown = json.dumps(redacted(resolution.spec))
    assert VALUE not in shown
    assert "shown" in shown


def test_environment_is_one_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "h"))
    assert env.home() == tmp_path / "h"
    monkeypatch.delenv("HEADRACE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert env.home() == tmp_path / "headrace"
    monkeypatch.setenv("HEADRACE_LOG", "loud")
    with pytest.raises(ConfigError, match="HEADRACE_LOG"):
        env.log_level()
    source = Path(env.__file__).parent
    readers = [file.name for file in source.rglob("*.py") if "os.environ" in file.read_text("utf-8")]
    assert readers == ["env.py"]
