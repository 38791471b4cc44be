"""What a run tells: a line on the console, a line of metrics.jsonl, scalars and pictures for TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from flexattn_jax.files import naming, parse_json, write_whole

METRICS = "metrics.jsonl"
SKIPPED = "skipped.jsonl"
_OTHERS = "skipped.{}.jsonl"  # of a process that is not the first


class RunLog:
    """Logs of a workdir. A run that goes on from step k takes back what was logged of later steps.

    Of several processes the first logs; the others list only the samples that they could not use.
    """

    def __init__(self, workdir: Path, first_step: int, process: int = 0):
        self._workdir, self._first = workdir, process == 0
        self._metrics = workdir / METRICS
        self._skipped = workdir / (SKIPPED if self._first else _OTHERS.format(process))
        _drop_later(self._skipped, first_step)  # for a last line that a kill cut short
        self._known = _samples(self._skipped)
        if self._first:
            _drop_later(self._metrics, first_step)
            purge = first_step + 1 if first_step else None
            self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and TensorBoard's scalars; a value that is not finite is null in the JSON."""
        if not self._first:
            return
        finite = {name: value if np.isfinite(value) else None for name, value in values.items()}
        _append(self._metrics, {"step": step} | finite)
        for name, value in finite.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture (height, width, 3) uint8 for TensorBoard."""
        if self._first:
            self._writer.add_image(name, image, step, dataformats="HWC")

    def skipped(self, sample: str, reason: str) -> None:
        """Lists a sample that cannot be used, once."""
        if sample not in self._known:
            self._known.add(sample)
            _append(self._skipped, {"sample": sample, "reason": reason})

    @property
    def skipped_count(self) -> int:
        """Samples listed so far, those of earlier runs in this workdir and of other processes included."""
        return len(self._known.union(*map(_samples, self._workdir.glob(_OTHERS.format("*")))))

    def close(self) -> None:
        """Flushes."""
        if self._first:
            self._writer.close()


class Clock:
    """Speed since the last reading, without what was no training: evaluation, steps that compiled."""

    def __init__(self):
        self._start, self._steps, self._tokens = time.perf_counter(), 0, 0
        self._reading = (float("nan"), float("nan"))

    def add(self, tokens: int) -> None:
        """Counts a step."""
        self._steps, self._tokens = self._steps + 1, self._tokens + tokens

    def pause(self, seconds: float) -> None:
        """Takes out time that was no step's."""
        self._start += seconds

    def read(self) -> tuple[float, float]:
        """(seconds a step, tokens a second) since the last reading, or that one if there was no step; NaN at first."""
        seconds = max(1e-9, time.perf_counter() - self._start)
        if self._steps:
            self._reading = seconds / self._steps, self._tokens / seconds
        self._start, self._steps, self._tokens = time.perf_counter(), 0, 0
        return self._reading


def console_line(step: int, total: int, values: dict[str, float]) -> str:
    """The line that a person watches."""
    parts = [
        f"step {step}/{total}",
        f"epoch {values['epoch']:.3f}",
        f"loss {values['loss']:.4f}",
        f"gradient {values['gradient_norm']:.3g}",
        f"rate {values['learning_rate']:.3g}",
    ]
    known = np.isfinite(values["step_seconds"])
    if known:
        parts += [f"{values['tokens_per_second']:,.0f} tokens/s", f"{values['step_seconds']:.3g} s/step"]
    if "flops_utilisation" in values:
        parts.append(f"{100 * values['flops_utilisation']:.1f} % of peak")
    if "cells_per_row" in values:
        parts.append(f"{values['cells_per_row']:.1f} cells")
    if values["skipped"]:
        parts.append(f"{values['skipped']:.0f} updates skipped")
    if known:
        parts.append(f"left {_duration((total - step) * values['step_seconds'])}")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _append(file: Path, values: dict[str, Any]) -> None:
    with naming(file), file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(values, allow_nan=False) + "\n")


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a last one that a kill cut short is left out."""
    entries = []
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            entries.append(parse_json(line))
        except ValueError:
            continue
    return [entry for entry in entries if isinstance(entry, dict)]


def _samples(file: Path) -> set[str]:
    return {entry["sample"] for entry in _read_lines(file) if isinstance(entry.get("sample"), str)}


def _drop_later(file: Path, step: int) -> None:
    if not file.is_file():
        return
    kept = [entry for entry in _read_lines(file) if not isinstance(entry.get("step"), int) or entry["step"] <= step]
    write_whole(file, "".join(json.dumps(entry) + "\n" for entry in kept))
