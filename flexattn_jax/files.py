"""Files that come from elsewhere are read with care, and what is written appears whole or not at all.

Here is the one place for what holds of every such file: only regular files are opened (a pipe or a device would hang),
none beyond a limit, JSON must mean one thing, a link must not leave its folder, and compiled programs are kept where
nobody else can put one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

SETTINGS_BYTES = 1 << 24  # a file of settings; the largest published one, a tokeniser's, has 4 MB
DATA_BYTES = 1 << 32  # a file of questions or conversations, some with pictures in base64


class FileError(ValueError):
    """What is wrong with a file, as the end of a sentence that begins with its name: "is not valid JSON"."""


def packaged(name: str) -> Path:
    """A folder of data that ships with the package."""
    return Path(__file__).parent / "assets" / name


def regular(path: Path) -> os.stat_result:
    """The status of a regular file. Raises OSError, or FileError where it is of another kind."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FileError("is a folder, pipe or device, not a file")
    return status


def read_bytes(path: Path, limit: int = SETTINGS_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        FileNotFoundError: it is not there.
        FileError: it is of another kind, too large, or cannot be read.
    """
    try:
        if regular(path).st_size > limit:
            raise FileError(f"is larger than {limit:,} bytes, which no file of this kind is")
        with path.open("rb") as file:
            return file.read(limit)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileError(f"cannot be read ({error.strerror or error})") from error
    except MemoryError as error:
        raise FileError("does not fit in memory") from error
    except ValueError as error:  # a NUL character in the path
        raise error if isinstance(error, FileError) else FileError("is no valid path") from error


def parse_json(data: bytes | str) -> Any:
    """A JSON value. What readers may take in different ways is refused: NaN, infinity, a name twice in one table.

    Raises:
        FileError: see above, or it is no JSON.
    """
    try:
        return json.loads(
            data, object_pairs_hook=_table, parse_constant=_refuse, parse_float=_finite, parse_int=_integer
        )
    except FileError:
        raise
    except MemoryError as error:
        raise FileError("does not fit in memory") from error
    except RecursionError as error:
        raise FileError("is nested too deeply to be genuine JSON") from error
    except ValueError as error:
        raise FileError("is not valid JSON, or only half of it is there") from error


def read_json(path: Path, limit: int = SETTINGS_BYTES) -> Any:
    """The value in a JSON file. Raises what `read_bytes` and `parse_json` raise."""
    return parse_json(read_bytes(path, limit))


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise FileError(f"holds {twice[:80]!r} twice in one table")
    return table


def _refuse(text: str) -> NoReturn:
    raise FileError(f"holds {text[:20]}, which is no number that JSON knows")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _integer(text: str) -> int:
    return int(text) if len(text) <= 40 else _refuse(text)


def printable(text: str) -> str:
    """A message without what names in hostile files could do to a terminal: escapes, and halves of characters."""
    text = text.encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def first_line(error: BaseException, most: int = 300) -> str:
    """What an error of a library says first, at most so many characters; its type where it says nothing."""
    return next((line.strip()[:most] for line in str(error).splitlines() if line.strip()), type(error).__name__)


def leaves_folder(path: Path, folder: Path) -> bool:
    """Whether a link takes `path` out of `folder`."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def write_whole(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all. Raises OSError that names it."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with naming(path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError the name of the file, which a full disk's lacks."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def lock_file(path: Path, wait: bool = False, mode: int = 0o666) -> BinaryIO:
    """Opens and locks a file, made where it is missing; what may be in it stays. Closing it gives the lock back.

    The kernel gives the lock back when the process dies, however it dies.

    Args:
        path: must be no link, which could lead to a stranger's file, and no pipe.
        wait: until no other process holds the lock.
        mode: of a new file.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is False.
        OSError: it cannot be opened.
    """
    refused = OSError(errno.EINVAL, f"its {path.name} is a link, pipe or device, not a file: remove that", str(path))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    except OSError as error:
        raise (refused if path.is_symlink() else error) from None
    file = os.fdopen(descriptor, "r+b", buffering=0)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise refused
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        file.close()
        raise
    return file


def private_folder(path: Path) -> Path:
    """A folder for compiled programs, which are run when they are found again: made with mode 0700 where it is missing.

    Raises:
        FileError: it is a link, another user's, or others may write to it.
        OSError: it cannot be made.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise FileError(
            "must be a folder of yours, no link, that nobody else may write to (chmod 700): the compiled programs in "
            "it are run"
        )
    return path
