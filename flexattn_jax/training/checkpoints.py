"""A run's checkpoints: written in the background, checked by checksums, one kept good when another is damaged.

workdir/checkpoints/STEP/        orbax: the train state and the place in the data
workdir/checksums/STEP.json      of every file of that folder, written last: without it a checkpoint is not whole
workdir/damaged/STEP/            checkpoints that did not match their checksums
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from flexattn_jax.files import first_line, read_json, write_whole
from flexattn_jax.processes import on_first
from flexattn_jax.training.state import TrainState

_CHUNK = 1 << 22


class CheckpointFault(ValueError):
    """Checkpoints that a run can neither write nor go on from; the message says what to do."""


class Checkpointer:
    """Saves and restores; keeps the newest `keep` checkpoints and the one with the lowest evaluation loss.

    Not for several threads. `poll` is to be called now and then, `close` at the end.
    """

    def __init__(self, workdir: Path, keep: int, say: Callable[[str], None] = print):
        """Looks at what is there: moves damaged checkpoints aside, removes unfinished ones, and says so.

        Raises CheckpointFault when there are checkpoints, and every one of them is damaged.
        """
        self._root, self._sums = workdir / "checkpoints", workdir / "checksums"
        self._pending: int | None = None
        self._sealing: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._losses: dict[int, float] = {}  # of evaluated checkpoints
        on_first(lambda: self._discard_unusable(workdir / "damaged", say))
        self._losses = {int(step): loss for step, loss in on_first(lambda: list(self._losses.items()))}
        policies = [checkpoint_managers.LatestN(keep), _Best(self)]
        options = ocp.CheckpointManagerOptions(preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies))
        self._manager = ocp.CheckpointManager(self._root.absolute(), options=options)

    @property
    def latest_step(self) -> int | None:
        """The newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The checkpoint with the lowest evaluation loss; None if none was evaluated."""
        return min(self._losses, key=self._losses.__getitem__, default=None)

    def save(self, step: int, state: TrainState, data: dict[str, Any], loss: float | None = None) -> None:
        """Begins to save; returns when the state may be changed. Waits for an earlier save that is still on its way.

        Args:
          data: state of the data iterator, as JSON has it.
          loss: of an evaluation of this very state.
        """
        self.wait()
        if loss is not None:
            self._losses[step] = loss
        parts = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
        with _reported(self._root):
            self._manager.save(step, args=parts, force=True)
        self._pending = step

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state and the data iterator's state of a checkpoint.

        Args:
          like: a tree of jax.ShapeDtypeStruct, with shardings where they matter.
        """
        parts = ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
        with _reported(self._root / str(step)):
            restored = self._manager.restore(step, args=parts)
        return restored.state, restored.data

    def poll(self) -> None:
        """Seals a save that has finished. Raises CheckpointFault when it failed, say because the disk is full."""
        if self._failure is not None:
            raise CheckpointFault(f"the checksums in {self._sums} could not be written: {self._failure}")
        if self._pending is None or self._manager.is_saving_in_progress():
            return
        with _reported(self._root):
            self._manager.check_for_errors()
        step, self._pending = self._pending, None
        if jax.process_index() == 0:
            self._sealing = threading.Thread(target=self._seal, args=(step,), daemon=True)
            self._sealing.start()

    def wait(self) -> None:
        """Until everything is on disk and sealed."""
        with _reported(self._root):
            self._manager.wait_until_finished()
        self.poll()
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None
            self.poll()

    def close(self) -> None:
        """Waits and lets go of orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _seal(self, step: int) -> None:
        try:
            record = {"files": _checksums(self._root / str(step)), "eval_loss": self._losses.get(step)}
            write_whole(self._sums / f"{step}.json", json.dumps(record))
            for other in self._sums.glob("*.json"):
                if not (self._root / other.stem).is_dir():
                    other.unlink(missing_ok=True)
        except OSError as error:
            self._failure = error

    def _discard_unusable(self, damaged: Path, say: Callable[[str], None]) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        self._sums.mkdir(exist_ok=True)
        steps = sorted((int(path.name) for path in self._root.iterdir() if path.name.isdecimal()), reverse=True)
        faults = {step: self._fault(step) for step in steps}
        usable = [step for step in steps if faults[step] is None]
        broken = [step for step in steps if faults[step]]
        if broken and not usable:
            raise CheckpointFault(
                f"no checkpoint in {self._root} can be used: {'; '.join(f'{s}: {faults[s]}' for s in broken)}. "
                "Take another workdir to begin afresh"
            )
        for step in steps:
            if faults[step] is None:
                continue
            folder, went_on = self._root / str(step), f"; the one of step {usable[0]} is used" if usable else ""
            if faults[step]:
                damaged.mkdir(exist_ok=True)
                shutil.rmtree(damaged / str(step), ignore_errors=True)
                folder.rename(damaged / str(step))
                say(f"checkpoint {step} is damaged ({faults[step]}) and was moved to {damaged / str(step)}{went_on}")
            else:
                shutil.rmtree(folder)
                say(f"checkpoint {step} was not finished when the run stopped{went_on or '; the run begins again'}")
            (self._sums / f"{step}.json").unlink(missing_ok=True)

    def _fault(self, step: int) -> str | None:
        """None if a checkpoint is as it was written, "" if it was never finished, else what is wrong."""
        try:
            record = read_json(self._sums / f"{step}.json")
            expected, loss = dict(record["files"]), record["eval_loss"]
        except FileNotFoundError:
            return ""
        except (ValueError, KeyError, TypeError):
            return "its checksums cannot be read"
        folder = self._root / str(step)
        try:
            found = _checksums(folder)
        except OSError as error:
            return str(error)
        wrong = [name for name in expected if found.get(name) != expected[name]]
        if not wrong:
            if loss is not None:
                self._losses[step] = loss
            return None
        return f"{len(wrong)} of {len(expected)} files changed or missing, such as {wrong[0]}"


def _checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        sums[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return sums


class _Best:
    """Orbax's policy that keeps the best checkpoint."""

    def __init__(self, checkpointer: Checkpointer):
        self._checkpointer = checkpointer

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        best = self._checkpointer.best_step
        return [checkpoint.step == best for checkpoint in checkpoints]


class _reported:
    """Orbax's and the file system's errors as one CheckpointFault."""

    def __init__(self, where: Path):
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
            return  # another process is gone, which is no fault of the file system
        if isinstance(error, (OSError, ValueError, KeyError, RuntimeError)) and not isinstance(error, CheckpointFault):
            raise CheckpointFault(f"{self._where} cannot be written or read: {first_line(error)}") from error
