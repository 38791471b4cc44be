"""What every hostile input must meet: an answer in time, in one sentence, with nothing damaged."""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hostile.pictures import halves, saved

QUESTION = {"question": "What is it?", "options": ["red", "blue"], "target_object": ["x"], "bbox": [[0, 0, 1, 1]]}


def one_sentence(text: str) -> bool:
    return 0 < len(text) < 1200 and "\n" not in text.strip() and "Traceback" not in text


def in_time(act: Callable[..., Any], *args: Any, seconds: float = 60) -> Any:
    """The outcome of a call that must not hang."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((act(*args), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"{act} hangs"
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: what a full disk does to a program, but with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder and its digest, locks aside."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def vstar_folder(folder: Path, pictures: Mapping[str, bytes] | int = 2) -> Path:
    """A data folder in V* Bench's layout; a question for each picture, or so many questions."""
    if isinstance(pictures, int):
        pictures = {f"q{k}": saved(halves()) for k in range(pictures)}
    for split in ("direct_attributes", "relative_position"):
        (folder / split).mkdir(parents=True)
    for name, data in pictures.items():
        (folder / "direct_attributes" / f"{name}.png").write_bytes(data)
        (folder / "direct_attributes" / f"{name}.json").write_text(json.dumps(QUESTION))
    return folder


def vstar_settings(data: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Settings of eval.py, with a folder that passes for a checkpoint where the model is a fake."""
    checkpoint = tmp_path / "checkpoint"
    if not checkpoint.is_dir():  # once: answers depend on the time of its last change
        checkpoint.mkdir()
        (checkpoint / "config.json").write_text("{}")
    return {
        "benchmark": "vstar", "variant": "", "data_dir": str(data), "checkpoint": str(checkpoint),
        "scorer": "released", "batch_size": 4, "dtype": None, "tensor": 1, "max_new_tokens": 16, "limit": 0,
        "pictures": 0,
        "model_overrides": {},
    } | changes  # fmt: skip
