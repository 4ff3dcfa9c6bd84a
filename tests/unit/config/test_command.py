"""The start command of a docker_server: what known servers' flags say in our terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace.config.command import read_command
from headrace.config.resolve import Resolution, resolve
from headrace.errors import ConfigError

TEI = (
    'bash -c "truss-transfer-cli && text-embeddings-router --port 7997 --model-id /app/model_cache/held '
    "--max-client-batch-size 128 --max-concurrent-requests 1024 --max-batch-tokens 16384 --auto-truncate "
    '--pooling last-token --tokenization-workers 3"'
)
FILE = """
model_name: TEI-nomic
docker_server:
  start_command: {command}
  server_port: 7997
  predict_endpoint: {route}
  readiness_endpoint: /health
  liveness_endpoint: /health
model_cache:
  - repo_id: nomic-ai/nomic-embed-text-v1.5
    revision: main
    use_volume: true
    volume_folder: held
"""


def resolved(tmp_path: Path, command: str, route: str = "/v1/embeddings") -> Resolution:
    file = tmp_path / "config.yaml"
    quoted = "'" + command.replace("'", "''") + "'"
    file.write_text(FILE.format(command=quoted, route=route))
    return resolve(str(file))


def told(found: Resolution) -> str:
    return "\n".join(f"{one.kind} {one.path} {one.message}" for one in found.report.notices)


def test_text_embeddings_inference(tmp_path: Path) -> None:
    found = resolved(tmp_path, TEI)
    spec = found.spec
    assert (spec.model, spec.revision, spec.source) == ("nomic-ai/nomic-embed-text-v1.5", "main", "HF")
    assert (spec.max_queue, spec.max_num_batched_tokens, spec.auto_truncate) == (1024, 16384, True)
    assert (spec.pooling, spec.default_route) == ("last", "/v1/embeddings")
    notices = told(found)
    assert "text-embeddings-router is not run" in notices
    assert "--max-client-batch-size" in notices and "--tokenization-workers" in notices


def test_vllm(tmp_path: Path) -> None:
    command = (
        "vllm serve Qwen/Qwen3-8B --max-model-len=4096 --enforce-eager --dtype half --host 0.0.0.0 --odd 3"
    )
    found = resolved(tmp_path, command, "/v1/chat/completions")
    spec = found.spec
    assert (spec.model, spec.max_model_len, spec.eager, spec.dtype) == (
        "Qwen/Qwen3-8B",
        4096,
        True,
        "float16",
    )
    assert spec.default_route is None
    assert "warning docker_server.start_command --odd is not read here" in told(found)


@pytest.mark.parametrize(
    ("command", "model", "flags"),
    [
        ("python -m vllm.entrypoints.openai.api_server --model a/b --seed 3", "a/b", {"--seed": 3}),
        ("/usr/bin/vllm serve --model a/b --max_num_seqs 8", "a/b", {"--max-num-seqs": 8}),
        ("sh -c 'cd /x; exec vllm serve a/b --enforce-eager && echo done'", "a/b", {"--enforce-eager": True}),
        ("text-embeddings-router --auto-truncate false --model-id m", "m", {"--auto-truncate": False}),
        ("text-embeddings-router --model-id m --max-batch-tokens $TOKENS", "m", {"--max-batch-tokens": None}),
        ("vllm serve a/b --max-num-seqs many", "a/b", {"--max-num-seqs": None}),
        ("vllm serve a/b --seed -1", "a/b", {"--seed": -1}),
    ],
)
def test_ways_to_write_it(command: str, model: str, flags: dict[str, Any]) -> None:
    found = read_command(command)
    assert found is not None and found.model == model
    assert {flag.name: flag.value for flag in found.flags} == flags


@pytest.mark.parametrize("command", ["", "python main.py", "vllm bench", 'bash -c "unclosed', "bash -c"])
def test_no_known_server(command: str, tmp_path: Path) -> None:
    assert read_command(command) is None
    if command:
        with pytest.raises(ConfigError, match="names no model"):
            resolved(tmp_path, command)


def test_a_token_in_the_command_is_not_repeated(tmp_path: Path) -> None:
    found = resolved(tmp_path, TEI[:-1] + ' --hf-token hf_sesame --api-key sesame"')
    assert "sesame" not in told(found) and "--hf-token" in told(found)
    assert "sesame" not in repr(found.spec) and found.spec.secret_name != "hf_sesame"


@pytest.mark.parametrize(
    ("text", "value"),
    [("8192", 8192), ("32k", 32000), ("32K", 32768), ("1.5k", 1500), ("2M", 2097152), ("0.3K", None), ("k", None),
     ("1e3", None), ("4kb", None)],
)  # fmt: skip
def test_vllms_short_numbers(text: str, value: int | None) -> None:
    command = read_command(f"vllm serve a/b --max-model-len {text}")
    assert command is not None
    assert [flag.value for flag in command.flags] == [value]


def test_a_model_that_only_the_shell_knows_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no model"):
        resolved(tmp_path, "vllm serve $MODEL --max-model-len 8192")
    found = resolved(tmp_path, "vllm serve a/b --max-model-len $LENGTH")
    assert found.spec.max_model_len is None
    assert "the value of --max-model-len is not read here" in told(found)
