"""Rows in and out of files: JSONL, CSV, text and Parquet in; JSONL, npy and Parquet out. All of them streamed."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import msgspec

from headrace.client.exceptions import InvalidArgument
from headrace.client.lines import full_lines

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["JsonlWriter", "NpyWriter", "ParquetWriter", "Writer", "open_writer", "read_column"]

_json = msgspec.json.Decoder()
_encoder = msgspec.json.Encoder()
_NPY_HEADER = 128  # bytes; rewritten at the end, when the number of rows is known


def read_column(path: str | os.PathLike[str], name: str) -> Iterator[Any]:
    """One value a row of ``.jsonl`` (objects with the field, or bare values), ``.csv``, ``.parquet`` or ``.txt``.

    Raises InvalidArgument that names the line where the field is missing.
    """
    kind = Path(path).suffix.lower()
    if kind == ".csv":
        yield from _csv_column(path, name)
    elif kind == ".parquet":
        yield from _parquet_column(path, name)
    elif kind == ".txt":
        with _utf8(path), open(path, encoding="utf-8-sig") as file:
            yield from (line.rstrip("\n") for line in file)
    elif kind in (".jsonl", ".ndjson"):
        yield from _jsonl_column(path, name)
    else:
        raise InvalidArgument(f"{path}: expected a name that ends in .jsonl, .csv, .parquet or .txt")


def _jsonl_column(path: str | os.PathLike[str], name: str) -> Iterator[Any]:
    for number, line in full_lines(path):
        try:
            value = _json.decode(line)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise InvalidArgument(f"{path}, line {number} is not JSON: {error}") from None
        if isinstance(value, dict):
            if name not in value:
                raise InvalidArgument(
                    f"{path}, line {number} has no {name!r}; it has {', '.join(value) or 'nothing'}"
                )
            value = value[name]
        yield value


@contextmanager
def _utf8(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{path} is not UTF-8: {error}") from None


def _csv_column(path: str | os.PathLike[str], name: str) -> Iterator[str]:
    with _utf8(path), open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            if name not in (rows.fieldnames or ()):
                names = ", ".join(rows.fieldnames or ()) or "nothing"
                raise InvalidArgument(f"{path} has no column {name!r}; it has {names}")
            for row in rows:
                if row[name] is None:
                    raise InvalidArgument(f"{path}, line {rows.line_num} is too short for column {name!r}")
                yield row[name]
        except csv.Error as error:
            raise InvalidArgument(f"{path}, line {rows.line_num}: {error}") from None


def _parquet_column(path: str | os.PathLike[str], name: str) -> Iterator[Any]:
    file = _parquet_file(path)
    if name not in file.schema_arrow.names:
        raise InvalidArgument(f"{path} has no column {name!r}; it has {', '.join(file.schema_arrow.names)}")
    for batch in file.iter_batches(batch_size=4096, columns=[name]):
        yield from batch.column(0).to_pylist()


def _parquet_file(path: str | os.PathLike[str]) -> Any:
    arrow = _pyarrow()
    try:
        return arrow.parquet.ParquetFile(path)
    except arrow.ArrowInvalid as error:
        raise InvalidArgument(f"{path} is not a Parquet file: {error}") from None


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InvalidArgument("Parquet needs pyarrow: pip install 'headrace[parquet]'") from None
    return pyarrow


class Writer:
    """Writes beside the file and puts it in place at the end, so that a file is whole or absent."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """Objects with the same fields."""
        raise NotImplementedError

    def vectors(self, first: int, table: NDArray[np.float32]) -> None:
        """Rows ``first`` and on: float32 [rows, dimensions]."""
        raise NotImplementedError

    def finish(self) -> None:
        raise NotImplementedError

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
            os.replace(self.part, self.path)
        else:
            self.discard()


class JsonlWriter(Writer):
    """One JSON object a line; vectors as ``{"index": i, "embedding": [...]}``."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._file: IO[bytes] = open(self.part, "wb")  # noqa: SIM115 (closed in finish and discard)

    def rows(self, rows: Sequence[dict[str, Any]]) -> None:
        self._file.write(b"".join(_encoder.encode(row) + b"\n" for row in rows))

    def vectors(self, first: int, table: NDArray[np.float32]) -> None:
        self.rows([{"index": first + i, "embedding": row} for i, row in enumerate(table.tolist())])

    def finish(self) -> None:
        self._file.close()

    def discard(self) -> None:
        self._file.close()
        super().discard()


class NpyWriter(Writer):
    """A float32 matrix in numpy's format 1.0, written row by row; ``numpy.load(..., mmap_mode="r")`` reads it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._file: IO[bytes] = open(self.part, "wb")  # noqa: SIM115 (closed in finish and discard)
        self._file.write(b"\0" * _NPY_HEADER)
        self._shape = (0, 0)

    def vectors(self, first: int, table: NDArray[np.float32]) -> None:
        rows, width = self._shape
        if first != rows or (rows and table.shape[1] != width):
            raise InvalidArgument(f"row {first} with {table.shape[1]} numbers does not follow {self._shape}")
        self._file.write(table.astype("<f4", copy=False).tobytes())
        self._shape = (rows + table.shape[0], table.shape[1])

    def finish(self) -> None:
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {self._shape}, }}".encode()
        room = _NPY_HEADER - 10
        self._file.seek(0)
        self._file.write(b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + text.ljust(room - 1) + b"\n")
        self._file.close()

    def discard(self) -> None:
        self._file.close()
        super().discard()


class ParquetWriter(Writer):
    """Columns of the rows; vectors as ``index`` and ``embedding`` (a fixed-size list of float32)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._arrow = _pyarrow()
        self._writer: Any = None

    def rows(self, rows: Sequence[dict[str, Any]]) -> None:
        schema = None if self._writer is None else self._writer.schema
        self._write(self._arrow.Table.from_pylist(list(rows), schema=schema))

    def vectors(self, first: int, table: NDArray[np.float32]) -> None:
        import numpy as np

        arrow = self._arrow
        values = arrow.FixedSizeListArray.from_arrays(arrow.array(table.reshape(-1)), table.shape[1])
        index = arrow.array(np.arange(first, first + len(table)))
        self._write(arrow.table({"index": index, "embedding": values}))

    def _write(self, table: Any) -> None:
        if self._writer is None:
            self._writer = self._arrow.parquet.ParquetWriter(self.part, table.schema)
        self._writer.write_table(table)

    def finish(self) -> None:
        if self._writer is None:
            raise InvalidArgument(f"there are no rows to write to {self.path}")
        self._writer.close()

    def discard(self) -> None:
        if self._writer is not None:
            self._writer.close()
        super().discard()


def open_writer(path: str | os.PathLike[str], *, vectors: bool = True) -> Writer:
    """The writer for a name's ending. Raises InvalidArgument for an unknown one.

    Args:
        vectors: there will be vectors, not rows; npy holds nothing else.
    """
    kinds: dict[str, type[Writer]] = {
        ".jsonl": JsonlWriter,
        ".ndjson": JsonlWriter,
        ".parquet": ParquetWriter,
    }
    if vectors:
        kinds[".npy"] = NpyWriter
    kind = kinds.get(Path(path).suffix.lower())
    if kind is None:
        raise InvalidArgument(f"{path}: expected a name that ends in {', '.join(kinds)}")
    return kind(path)
