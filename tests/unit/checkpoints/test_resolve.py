"""What a user may write for a model, and what a wrong word is answered with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headrace.checkpoints import hub
from headrace.checkpoints import resolve as resolving
from headrace.checkpoints.gguf import GGUFCheckpoint
from headrace.checkpoints.resolve import open_checkpoint, resolve
from headrace.errors import MissingFile, UnsupportedCheckpoint
from support.gguf_file import decoder_tensors, write_gguf


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model-q4.gguf", decoder_tensors(np.random.default_rng(0)))


def test_a_file_and_a_folder(gguf_file: Path) -> None:
    assert resolve(str(gguf_file)) == gguf_file
    assert resolve(str(gguf_file.parent)) == gguf_file.parent
    assert isinstance(open_checkpoint(gguf_file), GGUFCheckpoint)
    assert open_checkpoint(gguf_file.parent).path == gguf_file


def test_a_folder_with_several_gguf_files_asks_which(gguf_file: Path) -> None:
    (gguf_file.parent / "model-q8.gguf").write_bytes(gguf_file.read_bytes())
    with pytest.raises(MissingFile, match=r"2 GGUF files.*model-q4\.gguf, model-q8\.gguf"):
        open_checkpoint(gguf_file.parent)


def test_near_files_are_named(gguf_file: Path) -> None:
    with pytest.raises(MissingFile, match=r"did you mean 'model-q4\.gguf'"):
        resolve(str(gguf_file.with_name("model-q5.gguf")))
    with pytest.raises(MissingFile, match=r"folder .*else does not exist either"):
        resolve(str(gguf_file.parent / "nowhere" / "else" / "m.gguf"))


def test_near_packaged_names_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFile, match="did you mean 'smollm2-135m'"):
        resolve("smolm2-135m")
    with pytest.raises(MissingFile, match=r"hub id \(owner/name\) or one of smollm2-135m"):
        resolve("zzz")
    with pytest.raises(MissingFile, match="empty"):
        resolve(" ")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UnsupportedCheckpoint, match=r"no GGUF file; for safetensors give the folder"):
        resolve(str(tmp_path / "model.safetensors"))


def test_a_revision_belongs_to_hub_ids(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="revision 'main' only makes sense for hub ids"):
        resolve(str(tmp_path), "main")


def test_hub_ids_go_to_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str | None]] = []

    def snapshot(model: str, revision: str | None, secret: str) -> Path:
        assert secret == "hf_access_token"
        asked.append((model, revision))
        return tmp_path

    monkeypatch.setattr(resolving, "snapshot", snapshot)
    assert resolve("Qwen/Qwen2.5-0.5B", "main") == tmp_path
    assert asked == [("Qwen/Qwen2.5-0.5B", "main")]
    for path in ("./a/b", "/a/b", "../b", "a/b.gguf"):
        with pytest.raises(MissingFile):
            resolve(path)
    assert len(asked) == 1


def test_without_a_network_the_error_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def offline(*args: object, **kwargs: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        MissingFile, match=r"could not be reached.*no connection\)\. Without a network give a path"
    ):
        hub.snapshot("owner/name")


def test_faults_of_the_hubs_http_library_are_explained_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exceptions are no OSErrors, and another library's with every release of huggingface_hub."""
    import huggingface_hub

    from headrace.checkpoints.hub import headers

    class ConnectError(Exception):
        pass

    def offline(*args: object, **kwargs: object) -> list[str]:
        raise ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    with pytest.raises(MissingFile, match=r"could not be reached.*ConnectError.*Name or service not known"):
        headers("nobody/nothing")
