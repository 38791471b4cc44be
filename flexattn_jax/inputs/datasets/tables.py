"""Tab-separated tables whose rows hold pictures in base64, read without holding the pictures in memory.

Tables of several gigabytes are usual here, so a row's picture is found again by its place in the file.
"""

from __future__ import annotations

import base64
import binascii
import csv
import dataclasses
import string
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from flexattn_jax.files import FileError, regular
from flexattn_jax.inputs.datasets.questions import DatasetError, EntryError, Source
from flexattn_jax.inputs.images import ImageError

# What pandas.read_table, by which the published scripts read these tables, takes for "no value" (pandas documentation,
# read_csv, na_values); LLaVA's script adds "nan" and "none" in any case.
_NO_VALUE = frozenset(
    [
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A"),
        *("NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    ]
)
_LARGEST_FIELD = 1 << 27  # characters; a picture of 8K pixels has 15 million


@dataclasses.dataclass(frozen=True)
class EncodedPicture:
    """A picture that is held as base64."""

    name: str  # for messages
    data: str = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return self.name

    def mark(self) -> int:
        return zlib.crc32(self.data.encode(errors="surrogatepass"))  # JSON can hold halves of characters

    def read(self) -> bytes:
        return decode(self.data)


@dataclasses.dataclass(frozen=True)
class TablePicture:
    """A picture in a table's row, read again from the file when it is wanted."""

    path: Path
    row: int  # counted from 1, for messages
    offset: int  # of the row's first byte
    column: int
    quoted: bool
    checksum: int

    def __str__(self) -> str:
        return f"the picture of row {self.row} of {self.path}"

    def mark(self) -> int:
        return self.checksum

    def read(self) -> bytes:
        try:
            _, fields = next(_rows(self.path, self.quoted, self.offset))
            return decode(fields[self.column])
        except (OSError, FileError, StopIteration, IndexError, UnicodeDecodeError, csv.Error) as error:
            raise ImageError("it is not where it was when the table was read; do not change the file") from error


@dataclasses.dataclass(frozen=True)
class Row:
    """A row: texts by the column's name, and the picture."""

    number: int
    values: dict[str, str]
    picture: TablePicture

    def text(self, name: str) -> str | None:
        """A column's text; None where the table has no value (or no such column)."""
        value = self.values.get(name)
        if value is None or value.strip() in _NO_VALUE or value.lower() in ("nan", "none"):
            return None
        return value


def read_table(path: Path, source: Source, columns: tuple[str, ...] = ()) -> Iterator[Row]:
    """The rows of a table.

    Args:
        path: the file.
        source: of the benchmark, for messages.
        columns: names of the columns, of a table without a head and without quotes; else the first row names them. One
            of them must be "image".

    Raises:
        DatasetError: no table of this kind.
    """
    quoted, names = not columns, list(columns)
    number = 0
    try:
        for offset, fields in _rows(path, quoted, 0):
            if not names:
                names = fields
                if "image" not in names:
                    raise DatasetError(f"{path} has no column 'image', so it is not {source.name}'s table. {source}")
                name, count = Counter(names).most_common(1)[0]
                if count > 1:
                    raise DatasetError(
                        f"{path} has {count} columns {name[:80]!r}, so that it is open which counts; download it again "
                        f"from {source.home}"
                    )
                continue
            number += 1
            if len(fields) != len(names):
                raise DatasetError(
                    f"row {number} of {path} has {len(fields)} columns, where {len(names)} are expected; the file is "
                    f"damaged or only half there: download it again from {source.home}"
                )
            values = dict(zip(names, fields, strict=True))
            image = values.pop("image")
            picture = TablePicture(path, number, offset, names.index("image"), quoted, zlib.crc32(image.encode()))
            yield Row(number, values | {"image": image}, picture)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror})") from error
    except FileError as error:
        raise DatasetError(f"{path} {error}; download it again from {source.home}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path} is no whole table in UTF-8; download it again from {source.home}") from error
    if not number:
        raise DatasetError(f"{path} holds no rows; download it again from {source.home}")


def decode(data: str) -> bytes:
    """Base64, of either alphabet, as bytes. Raises ImageError."""
    try:
        return base64.b64decode(data.translate(_STANDARD), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("it is not in base64, or only half of it is there; download the file again") from error


_STANDARD = str.maketrans({"-": "+", "_": "/", "\n": None, "\r": None, " ": None})


def _rows(path: Path, quoted: bool, offset: int) -> Iterator[tuple[int, list[str]]]:
    """(offset in bytes, fields) of each row from `offset` on."""
    regular(path)
    with path.open("rb") as file:
        file.seek(offset)
        if not quoted:
            for line in _lines(file):
                yield offset, line.decode().rstrip("\r\n").split("\t")
                offset += len(line)
            return
        consumed = 0

        def lines() -> Iterator[str]:
            nonlocal consumed
            for line in _lines(file):
                consumed += len(line)
                yield line.decode("utf-8-sig" if offset + consumed == len(line) else "utf-8")

        csv.field_size_limit(_LARGEST_FIELD)  # of the process: the module offers no other
        for fields in csv.reader(lines(), delimiter="\t"):
            start, offset, consumed = offset, offset + consumed, 0
            if fields:
                yield start, fields


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, none of which may fill the memory."""
    while line := file.readline(_LARGEST_FIELD + 1):
        if len(line) > _LARGEST_FIELD:
            raise csv.Error("a line is too long")
        yield line


def options(row: Row, letters: str = "ABCD") -> tuple[str, ...]:
    """The options of a row, up to the first letter without a text, as LLaVA's script reads them."""
    found = []
    for letter in letters:
        option = row.text(letter)
        if option is None:
            break
        found.append(option)
    if len(found) < 2:
        raise EntryError(f"it has {len(found)} options under {', '.join(letters)}; a choice needs 2")
    return tuple(found)


def target(row: Row, count: int) -> int:
    """The index of the correct option."""
    answer = (row.text("answer") or "").strip()
    letters = string.ascii_uppercase[:count]
    if len(answer) != 1 or answer not in letters:
        raise EntryError(f"'answer' is {answer!r}; it must be one of {', '.join(letters)}")
    return letters.index(answer)
