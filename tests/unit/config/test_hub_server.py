"""Hub models over real HTTP from a stand-in: planned and refused from headers, with the token of a secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.config.plan.facts import Facts
from headrace.config.plan.shape import read_shape
from headrace.config.plan.weights import expected_tensors
from support.hub_server import HubServer, safetensors_header
from unit.config.shapes import QWEN3_8B

pytest.importorskip("huggingface_hub")
TOKEN = "hf_t0kenOfTheTest"
HUGE = {**QWEN3_8B, "model_type": "qwen3", "num_hidden_layers": 2000}  # 390 B parameters


@pytest.fixture
def hub() -> Iterator[HubServer]:
    shape = read_shape(Facts(where="x", config=HUGE, container="config"))
    tensors = {name: ("BF16", found.shape) for name, found in expected_tensors(shape, 2).items()}
    header, size = safetensors_header(tensors)
    files = {
        "config.json": json.dumps(HUGE).encode(),
        "tokenizer_config.json": b"{}",
        "model.safetensors": header,
    }
    with HubServer("owner/huge", files, {"model.safetensors": size}, TOKEN) as server:
        yield server


def headrace(hub: HubServer, home: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Exit code and everything that was printed."""
    hidden = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRUSS_SECRET_hf_access_token")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    environment = {
        **kept,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HEADRACE_SECRETS_DIR": str(home / "secrets"),
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-m", "headrace", *arguments],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_what_does_not_fit_is_refused_before_any_download(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "hf_access_token").write_text(TOKEN + "\n")
    code, said = headrace(hub, tmp_path, "serve", "owner/huge", "--port", "0", "--device", "cpu")
    assert code == 2, said
    assert "does not fit cpu" in said
    assert "387" in said  # billions of parameters, of the header
    assert hub.weight_reads() == []
    assert any(path.endswith("model.safetensors") and wanted for _, path, wanted, _ in hub.requests)
    assert {token for *_, token in hub.requests} == {TOKEN}
    assert TOKEN not in said
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_named_secret_and_a_wrong_one(hub: HubServer, tmp_path: Path) -> None:
    plan = ("plan", "owner/huge", "--gpu", "H100", "--json", "--secret-name", "my_token")
    code, said = headrace(hub, tmp_path, *plan, TRUSS_SECRET_my_token=TOKEN)
    assert code == 1, said  # it does not fit, and the plan says so
    assert json.loads(said[said.index("{") : said.rindex("}") + 1])["weights"]["estimated"] is False
    assert TOKEN not in said
    code, said = headrace(hub, tmp_path, *plan)
    assert code == 2
    assert "TRUSS_SECRET_my_token" in said
    code, said = headrace(hub, tmp_path / "other", *plan, TRUSS_SECRET_my_token="wrong_v4lue")
    assert code == 2
    assert "give a token that may read it" in said
    assert "wrong_v4lue" not in said
