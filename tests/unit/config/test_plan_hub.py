"""Plans of hub repositories: headers only. The hub is a stand-in with the library's own types; nothing is fetched."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.config.plan.weights import expected_tensors
from headrace.config.spec import EngineSpec
from headrace.engines.inspect import inspect_hub
from headrace.engines.plan import gpu_machine, plan_for
from headrace.errors import MissingFile, UnsupportedCheckpoint
from unit.config.shapes import QWEN3_8B, write_config
from unit.config.test_plan import QWEN8, facts, read_shape

hub = pytest.importorskip("huggingface_hub")


class FakeHub:
    """A repository: its settings in a folder, its tensors by shard."""

    def __init__(self, folder: Path, shards: dict[str, dict[str, tuple[str, tuple[int, ...]]]]) -> None:
        self.folder, self.shards = folder, shards
        self.fetched: list[dict[str, Any]] = []

    def snapshot_download(self, model: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise hub.errors.LocalEntryNotFoundError("not here")
        self.fetched.append(options)
        return str(self.folder)

    def model_info(self, model: str, revision: str | None = None, timeout: float | None = None) -> Any:
        if model == "owner/offline":
            raise OSError("no network")
        names = ["config.json", "LICENSE", "tokenizer.json", "chat_template.jinja", *self.shards]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def get_safetensors_metadata(self, model: str, revision: str | None = None) -> Any:
        types = hub.utils
        files = {
            file: types.SafetensorsFileMetadata({}, {
                name: types.TensorInfo(dtype, list(shape), (0, math.prod(shape) * 2))  # type: ignore[arg-type]
                for name, (dtype, shape) in tensors.items()
            })
            for file, tensors in self.shards.items()
        }  # fmt: skip
        return types.SafetensorsRepoMetadata({}, True, {}, files)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    names = {
        name: ("BF16", tensor.shape)
        for name, tensor in expected_tensors(read_shape(facts(QWEN3_8B)), 2).items()
    }
    half = len(names) // 2
    items = list(names.items())
    shards = {"model-1.safetensors": dict(items[:half]), "model-2.safetensors": dict(items[half:])}
    fake = FakeHub(write_config(tmp_path, QWEN3_8B), shards)
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(hub, "HfApi", lambda **_: fake)
    return fake


def test_headers_of_all_shards_and_no_weights(repository: FakeHub) -> None:
    drawn = plan_for(EngineSpec(model="owner/name"), gpu_machine("H100"))
    assert drawn.weights.parameters == QWEN8
    assert not drawn.weights.estimated
    assert drawn.licence_files == ("LICENSE",)
    assert not any("licence" in sentence or "template" in sentence for sentence in drawn.warnings)
    (options,) = repository.fetched
    assert "*.safetensors" not in options["allow_patterns"]
    assert "tokenizer.json" in options["ignore_patterns"]


def test_without_config_or_network(repository: FakeHub) -> None:
    with pytest.raises(MissingFile, match="could not be reached"):
        plan_for(EngineSpec(model="owner/offline"), gpu_machine("H100"))
    (repository.folder / "config.json").unlink()
    with pytest.raises(UnsupportedCheckpoint, match=r"no config\.json"):
        inspect_hub("owner/name")
