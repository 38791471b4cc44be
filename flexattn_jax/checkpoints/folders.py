"""Folders that appear under their name only when they are whole."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from flexattn_jax.checkpoints.errors import CheckpointError


def write_json(path: pathlib.Path, values: Any) -> None:
    """Write JSON that a person can read."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], replaceable: Callable[[pathlib.Path], bool] | None = None
) -> Iterator[pathlib.Path]:
    """A fresh folder that becomes `path` when the block ends without an error, and vanishes otherwise.

    Raises CheckpointError when `path` is taken by anything but an empty folder or one that `replaceable` accepts.
    """
    path = pathlib.Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; give another folder to write to.")
    if path.is_dir() and any(path.iterdir()) and not (replaceable and replaceable(path)):
        raise CheckpointError(
            f"{path} is not empty, and is no earlier result that might be replaced; give another folder."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        draft = path.parent / f".{path.name}.incomplete-{os.getpid()}"
        draft.mkdir()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}.") from None
    except ValueError:  # a NUL character
        raise CheckpointError(f"{path} is no valid path; give another folder to write to.") from None
    try:
        yield draft
        if path.exists():
            old = path.parent / f".{path.name}.old-{os.getpid()}"
            path.rename(old)
            draft.rename(path)
            shutil.rmtree(old)
        else:
            draft.rename(path)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written whole: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _remove_leftovers(path: pathlib.Path) -> None:
    """Remove what killed runs have left of this very folder."""
    for draft in path.parent.glob(f".{path.name}.incomplete-*"):
        pid = draft.name.rpartition("-")[2]
        try:
            os.kill(int(pid), 0)
        except ValueError:
            continue
        except ProcessLookupError:
            shutil.rmtree(draft, ignore_errors=True)
        except PermissionError:
            continue
