"""Files of a batch job that survive a kill: appended line by line, each answer in them exactly once."""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from headrace.client.exceptions import InvalidArgument
from headrace.client.lines import full_lines

__all__ = ["BadLine", "BatchLine", "IdSet", "Ledger", "read_lines", "scan"]


class BadLine(InvalidArgument):
    """A line of an input file is no request. ``line`` counts from 1; ``text`` says why, without the file."""

    def __init__(
        self, path: str | os.PathLike[str], line: int, text: str, *, param: str | None = None
    ) -> None:
        super().__init__(f"{path}, line {line}: {text}", param=param)
        self.line, self.text = line, text


class BatchLine(msgspec.Struct):
    """One line of the OpenAI batch input format."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class _Answered(msgspec.Struct):
    custom_id: str


_line = msgspec.json.Decoder(BatchLine)
_answered = msgspec.json.Decoder(_Answered)


class IdSet:
    """Names as 64-bit hashes: 8 bytes each, for files of millions of lines."""

    def __init__(self) -> None:
        self._hashes = array("Q")
        self._sorted: Any = None

    def add(self, name: str) -> None:
        self._hashes.append(_hash(name))

    def __len__(self) -> int:
        return len(self._hashes)

    def freeze(self) -> int | None:
        """Sort for look-ups. The hash of a name that was added twice, or None."""
        import numpy as np

        self._sorted = np.sort(np.frombuffer(self._hashes, dtype=np.uint64)) if self._hashes else []
        if len(self._sorted) < 2:
            return None
        twice = np.nonzero(self._sorted[1:] == self._sorted[:-1])[0]
        return int(self._sorted[twice[0]]) if len(twice) else None

    def __contains__(self, name: str) -> bool:
        value = _hash(name)
        at = bisect.bisect_left(self._sorted, value)
        return at < len(self._sorted) and int(self._sorted[at]) == value


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, BatchLine]]:
    """(line number from 1, line) of a batch input file; empty lines are skipped. Raises BadLine."""
    for number, raw in full_lines(path):
        try:
            line = _line.decode(raw)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise BadLine(path, number, str(error)) from None
        if not line.custom_id:
            raise BadLine(path, number, "custom_id is empty", param="custom_id")
        if line.method != "POST":
            raise BadLine(path, number, f"method is {line.method!r}; expected POST", param="method")
        if not line.url.startswith("/") or line.url.startswith("//"):
            said = f"url is {line.url!r}; expected a path such as /v1/chat/completions"
            raise BadLine(path, number, said, param="url")
        yield number, line


def scan(path: str | os.PathLike[str], urls: frozenset[str] | None = None) -> int:
    """Check a whole input file before anything is sent. The number of its requests.

    Raises BadLine: no JSON, a missing field, a url outside ``urls``, a custom_id that
    an earlier line has.
    """
    seen = IdSet()
    for number, line in read_lines(path):
        if urls is not None and line.url not in urls:
            said = f"url is {line.url!r}; expected {' or '.join(sorted(urls))}"
            raise BadLine(path, number, said, param="url")
        seen.add(line.custom_id)
    if not len(seen):
        raise InvalidArgument(f"{path} holds no requests")
    twice = seen.freeze()
    if twice is not None:
        lines = [(n, one.custom_id) for n, one in read_lines(path) if _hash(one.custom_id) == twice]
        (first, name), (second, _) = lines[:2]
        raise BadLine(path, second, f"custom_id is {name!r}, as in line {first}", param="custom_id")
    return len(seen)


class Ledger:
    """An output file, locked while open. A line is one ``write`` at the end; a torn last line is cut off.

    A process that is killed leaves whole lines, of which at most the last is cut short. (A machine that loses
    power may lose the last seconds, which are then done again.)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise InvalidArgument(f"{self.path} is being written by another process") from None
        self._repair()

    def _repair(self) -> None:
        """Cut the file after its last line break."""
        end = os.fstat(self._file).st_size
        while end:
            start = max(0, end - 65536)
            at = os.pread(self._file, end - start, start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        os.ftruncate(self._file, end)

    def answered(self, into: IdSet) -> int:
        """Add the custom_ids of all lines. How many there are."""
        count = 0
        with open(self.path, "rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    into.add(_answered.decode(raw).custom_id)
                except (msgspec.MsgspecError, ValueError) as error:
                    raise InvalidArgument(
                        f"{self.path}, line {number} is not a result of a batch job: {error}"
                    ) from None
                count += 1
        return count

    def write(self, line: bytes) -> None:
        """Append one line; ``line`` ends with its only line break."""
        view = memoryview(line)
        while view:
            view = view[os.write(self._file, view) :]

    def close(self) -> None:
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
