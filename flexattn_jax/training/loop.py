"""The loop around the step: logs, evaluates, saves, stops when asked to, and lets no bad update in."""

from __future__ import annotations

import dataclasses
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexattn_jax.config import ConfigError
from flexattn_jax.processes import Vote
from flexattn_jax.training.checkpoints import Checkpointer
from flexattn_jax.training.data import MadeBatch
from flexattn_jax.training.logging import Clock, RunLog, console_line
from flexattn_jax.training.state import TrainState


class TrainingFault(ValueError):
    """A run that must not go on; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """What a run tells and keeps; changes nothing that is learned, so it may differ when a run goes on."""

    log_every: int = 10  # steps
    eval_every: int = 500  # steps; 0: only at the end
    save_every: int = 500  # steps; evaluated ones compete for the best checkpoint
    keep: int = 2  # newest checkpoints that are kept, beside the best one
    max_bad_steps: int = 10  # steps in a row whose loss or gradient is not finite, before the run stops
    profile_steps: str = ""  # "a:b": write a profile of steps a .. b-1 to workdir/profile
    pictures: int = 4  # evaluation samples whose selected cells are drawn for TensorBoard
    threads: int = 8  # that decode the pictures of a batch
    read_ahead: int = 2  # batches, which is memory

    def __post_init__(self):
        for name, least in {"log_every": 1, "eval_every": 0, "save_every": 1, "keep": 1, "max_bad_steps": 1}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"loop.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.threads < 1 or self.read_ahead < 1 or self.pictures < 0:
            raise ConfigError("loop.threads and loop.read_ahead must be at least 1, loop.pictures at least 0")
        if self.profile_steps and self.profiled is None:
            raise ConfigError(f'loop.profile_steps is {self.profile_steps!r}; write "a:b", a < b, such as "20:25"')

    @property
    def profiled(self) -> tuple[int, int] | None:
        """(first, end) of `profile_steps`."""
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", self.profile_steps)
        if match is None or int(match[1]) >= int(match[2]):
            return None
        return int(match[1]), int(match[2])


class StopRequest:
    """Whether SIGTERM has come to this process, while the `with` block lasts; the loop then saves and ends."""

    def __init__(self):
        self.requested = False

    def __enter__(self) -> StopRequest:
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_: Any) -> None:
        self.requested = True


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop works with.

    step: (state, batch) -> (state, metrics), donating the state.
    evaluate: (state, step) -> mean loss on the held-out samples, or None without any.
    flops: (T, R) -> operations of a step as a share of the devices' peak a second; None where that is not known.
    place: host arrays of a batch to the arrays that `step` takes.
    vote: how several processes agree to stop; None: this is the only one.
    """

    config: LoopConfig
    total_steps: int
    steps_per_epoch: int
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[[TrainState, int], float | None]
    flops: Callable[[int, int], float] | None
    checkpointer: Checkpointer
    log: RunLog
    workdir: Path
    say: Callable[[str], None]
    place: Callable[[Any], Any] = jax.device_put
    vote: Vote | None = None


def train(run: Run, state: TrainState, batches: Any, stop: StopRequest) -> tuple[TrainState, bool]:
    """Trains from `state` to the last step, or until asked to stop; saves at the end in both cases.

    Args:
      batches: grain iterator at the place that belongs to `state`.

    Returns:
      The state, and whether the last step was reached.

    Raises:
      TrainingFault: too many steps in a row were not finite. Nothing is saved of them.
      CheckpointFault: a checkpoint cannot be written.
    """
    config, first, clock = run.config, int(state.step), Clock()
    seen: set[tuple[int, int]] = set()
    profile = _Profile(config.profiled, run.workdir / "profile")
    previous: dict[str, jax.Array] | None = None
    for number in range(first, run.total_steps):
        # Asked before the step and read after it has been sent off, so that no device waits for the answer.
        asked = run.vote.cast(stop.requested) if run.vote is not None else None
        if number == first and (stop.requested if asked is None else bool(asked)):
            run.say("stopped before the first step; nothing new to save")
            return state, False
        profile.at(number)
        made: MadeBatch = next(batches)
        for sample, reason in made.skipped:
            run.log.skipped(sample, reason)
        began = time.perf_counter()
        state, metrics = run.step(state, run.place(made.data))
        if made.shape in seen:
            clock.add(made.tokens)
        else:
            seen.add(made.shape)
            jax.block_until_ready(metrics)
            seconds = time.perf_counter() - began
            clock.pause(seconds)
            length, rows = made.shape
            run.say(f"first batch of length {length}, {rows} reading rows: {seconds:.1f} s, compiling included")
        if previous is not None:  # one step late, so that the device is never waited for
            _check_finite(previous, number, run)
        previous, done = metrics, number + 1
        last = done == run.total_steps
        if last or done % config.log_every == 0:
            _report(run, done, metrics, clock, made.shape)
        if last:
            _check_finite(metrics, done, run)
        began, loss = time.perf_counter(), None
        if last or (config.eval_every and done % config.eval_every == 0):
            loss = run.evaluate(state, done)
            if loss is not None:
                run.log.scalars(done, {"eval_loss": loss})
                run.say(f"step {done}/{run.total_steps}  evaluation loss {loss:.4f}")
        stopping = stop.requested if asked is None else bool(asked)
        if last or stopping or done % config.save_every == 0:
            run.checkpointer.save(done, state, batches.get_state(), loss if _finite(loss) else None)
        run.checkpointer.poll()
        clock.pause(time.perf_counter() - began)
        if stopping and not last:
            run.checkpointer.wait()
            run.say(f"stopped as asked after step {done}; the state is saved, the same command goes on from there")
            profile.stop()
            return state, False
    profile.stop()
    run.checkpointer.wait()
    return state, True


def _report(run: Run, step: int, metrics: dict[str, jax.Array], clock: Clock, shape: tuple[int, int]) -> None:
    values = {name: float(value) for name, value in metrics.items()}
    values["epoch"] = step / run.steps_per_epoch
    values["step_seconds"], values["tokens_per_second"] = clock.read()
    if run.flops is not None:
        values["flops_utilisation"] = run.flops(*shape) / values["step_seconds"]
    run.log.scalars(step, values)
    run.say(console_line(step, run.total_steps, values))


def _check_finite(metrics: dict[str, jax.Array], step: int, run: Run) -> None:
    bad = int(metrics["bad_in_a_row"])
    if not bad:
        return
    loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
    if bad >= run.config.max_bad_steps:
        newest = run.checkpointer.latest_step
        raise TrainingFault(
            f"the loss or its gradient was not finite in {bad} steps in a row, up to step {step} (loss {loss}, "
            f"gradient {norm}); their updates were left out, and the newest checkpoint is "
            f"{f'of step {newest}' if newest is not None else 'the one that the run began with'}. Lower "
            "optimizer.learning_rate, or look at the data"
        )
    run.say(f"step {step}: loss {loss}, gradient {norm}; the update is left out")


def _finite(value: float | None) -> bool:
    return value is not None and bool(np.isfinite(value))


class _Profile:
    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._steps, self._folder, self._active = steps, folder, False

    def at(self, step: int) -> None:
        if self._steps is None:
            return
        if not self._active and self._steps[0] <= step < self._steps[1]:
            jax.profiler.start_trace(str(self._folder))
            self._active = True
        elif step >= self._steps[1]:
            self.stop()

    def stop(self) -> None:
        if self._active:
            jax.profiler.stop_trace()
            self._active = False


def mean_loss(
    eval_step: Callable[[TrainState, Any], tuple[jax.Array, jax.Array]],
    state: TrainState,
    batches: Iterator[MadeBatch],
    log: RunLog,
    place: Callable[[Any], Any] = jax.device_put,
) -> float:
    """Mean loss over the answer tokens of all batches; NaN if there are none."""
    total = tokens = 0.0
    for made in batches:
        for sample, reason in made.skipped:
            log.skipped(sample, reason)
        loss, count = eval_step(state, place(made.data))
        total, tokens = total + float(loss), tokens + float(count)
    return total / tokens if tokens else float("nan")
