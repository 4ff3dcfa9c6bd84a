"""Files that clients put here for batch jobs: on local disk, bounded, seen only with the key that made them."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

import msgspec

from headrace.errors import NotFound, PayloadTooLarge

__all__ = ["FileStore", "StoredFile"]


class StoredFile(msgspec.Struct, kw_only=True):
    """OpenAI's file object, and the digest of the key that owns it."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    owner: str = ""

    def shown(self) -> dict[str, object]:
        """What clients see."""
        fields = {name: getattr(self, name) for name in ("id", "bytes", "created_at", "filename", "purpose")}
        return fields | {"object": "file", "status": "processed"}


_decoder = msgspec.json.Decoder(StoredFile)


class FileStore:
    """A folder of ``<id>`` (content) and ``<id>.json`` (what it is).

    Args:
        max_file_bytes, max_files, max_bytes: limits of one upload, of the number, and of all together.
    """

    def __init__(
        self,
        folder: Path,
        max_file_bytes: int = 200 * 2**20,
        max_files: int = 1000,
        max_bytes: int = 10 * 2**30,
    ) -> None:
        self.folder = folder
        self.max_file_bytes, self.max_files, self.max_bytes = max_file_bytes, max_files, max_bytes
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.part"):
            leftover.unlink()
        self._files = {
            found.id: found for found in (_decoder.decode(p.read_bytes()) for p in folder.glob("file-*.json"))
        }

    def path(self, file_id: str) -> Path:
        """Where the content lies."""
        return self.folder / file_id

    def new_path(self) -> Path:
        """A place for content that is still arriving."""
        return self.folder / f"{secrets.token_hex(12)}.part"

    def room(self) -> int:
        """Bytes that one more file may have. Raises PayloadTooLarge when the store is full."""
        left = self.max_bytes - sum(one.bytes for one in self._files.values())
        if left <= 0 or len(self._files) >= self.max_files:
            raise PayloadTooLarge(
                f"the store holds {len(self._files)} files of at most {self.max_files} and "
                f"{self.max_bytes - left} bytes of {self.max_bytes}; delete some",
                code="store_full",
            )
        return min(left, self.max_file_bytes)

    def add(self, content: Path, filename: str, purpose: str, owner: str) -> StoredFile:
        """Take over finished content."""
        stored = StoredFile(
            id=f"file-{secrets.token_hex(12)}",
            bytes=content.stat().st_size,
            created_at=int(time.time()),
            filename=filename[:255],
            purpose=purpose,
            owner=owner,
        )
        os.replace(content, self.path(stored.id))
        save(self.folder / f"{stored.id}.json", msgspec.json.encode(stored))
        self._files[stored.id] = stored
        return stored

    def get(self, file_id: str, owner: str) -> StoredFile:
        """Raises NotFound, also for another key's file."""
        stored = self._files.get(file_id)
        if stored is None or stored.owner != owner:
            raise NotFound(f"no file {file_id[:64]!r}", param="file_id", code="file_not_found")
        return stored

    def delete(self, file_id: str, owner: str) -> None:
        """Raises NotFound."""
        self.get(file_id, owner)
        del self._files[file_id]
        (self.folder / f"{file_id}.json").unlink(missing_ok=True)
        self.path(file_id).unlink(missing_ok=True)

    def all(self, owner: str) -> list[StoredFile]:
        """Newest first."""
        mine = [one for one in self._files.values() if one.owner == owner]
        return sorted(mine, key=lambda one: (one.created_at, one.id), reverse=True)


def save(path: Path, data: bytes) -> None:
    """Replace a small file as a whole."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)
