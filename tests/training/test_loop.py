"""The loop around a step that a test can steer."""

import itertools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexattn_jax.config import ConfigError
from flexattn_jax.training.checkpoints import Checkpointer
from flexattn_jax.training.data import MadeBatch, TrainBatch
from flexattn_jax.training.logging import METRICS, Clock, RunLog
from flexattn_jax.training.loop import LoopConfig, Run, StopRequest, TrainingFault, train
from flexattn_jax.training.optimizer import OptimizerConfig, build_optimizer
from flexattn_jax.training.state import create_state


class Batches:
    """Endless; `at` is called with the number of each."""

    def __init__(self, at=lambda number: None):
        self.number, self._at = 0, at

    def __next__(self):
        self._at(self.number)
        self.number += 1
        data = TrainBatch(None, np.zeros((2, 8), np.int32), np.zeros((2, 3), np.int32))
        return MadeBatch(data, (8, 2), np.zeros(2, np.int32), 16, ())

    def get_state(self):
        return {"next_index": self.number}


@pytest.fixture
def make(tmp_path):
    """(losses, **LoopConfig) -> Run of as many steps, what it says; the losses are used in order."""

    def build(losses, **config):
        said, losses = [], np.asarray(losses, np.float32)
        config = LoopConfig(**({"log_every": 1, "save_every": 4} | config))
        checkpointer = Checkpointer(tmp_path, config.keep, said.append)
        opened.append(checkpointer)

        def step(state, batch):
            loss = losses[int(state.step)]
            bad = jnp.where(jnp.isfinite(loss), 0, state.bad_in_a_row + 1)
            state = state.replace(step=state.step + 1, bad_in_a_row=bad)
            zeros = dict.fromkeys(("gradient_norm", "learning_rate", "alpha", "skipped"), 0.0)
            return state, {"loss": loss, "bad_in_a_row": bad} | zeros

        run = Run(
            config=config,
            total_steps=len(losses),
            steps_per_epoch=5,
            step=step,
            evaluate=lambda state, number: 1.0 / number,
            flops=lambda length, readers: 0.25 * length * readers,
            checkpointer=checkpointer,
            log=RunLog(tmp_path, 0),
            workdir=tmp_path,
            say=said.append,
        )
        return run, said

    opened = []
    yield build
    for checkpointer in opened:
        checkpointer.close()


def new_state():
    config = OptimizerConfig(trainable="connector")
    return create_state({"connector": jnp.ones(2)}, config, build_optimizer(config, 5), 0)


def steps_of(folder):
    return sorted(map(int, os.listdir(folder / "checkpoints")))


def test_losses_that_stay_infinite_stop_the_run(make, tmp_path):
    run, said = make([1, np.nan, 2, 3, np.inf, np.inf, np.inf, 1, 1, 1], max_bad_steps=3)
    with StopRequest() as stop, pytest.raises(TrainingFault, match="3 steps in a row, up to step 7") as fault:
        train(run, new_state(), Batches(), stop)
    assert "the newest checkpoint is of step 4. Lower optimizer.learning_rate" in str(fault.value)
    run.checkpointer.wait()
    assert steps_of(tmp_path) == [4]
    left_out = [line for line in said if "left out" in line]
    assert [line.split(":")[0] for line in left_out] == ["step 2", "step 5", "step 6"]
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["loss"] for line in lines][:5] == [1, None, 2, 3, None]


def test_bad_steps_that_come_singly_do_not(make, tmp_path):
    run, _ = make([np.nan, 1, np.nan, 1, np.nan, 1], max_bad_steps=2)
    with StopRequest() as stop:
        state, finished = train(run, new_state(), Batches(), stop)
    assert finished and int(state.step) == 6 and steps_of(tmp_path) == [4, 6]
    assert run.checkpointer.best_step == 6


@pytest.mark.parametrize(("asked", "done"), [(3, 4), (0, 1)])
def test_sigterm_ends_after_the_step_in_work(make, tmp_path, asked, done):
    run, said = make(np.ones(20), save_every=100)
    at = lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == asked else None  # noqa: E731
    with StopRequest() as stop:
        state, finished = train(run, new_state(), Batches(at), stop)
    assert not finished and int(state.step) == done and steps_of(tmp_path) == [done]
    assert f"stopped as asked after step {done}" in said[-1]
    _, data = run.checkpointer.restore(done, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))
    assert data == {"next_index": done}


def test_sigterm_before_the_first_step_saves_nothing(make, tmp_path):
    run, said = make(np.ones(3))
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        state, finished = train(run, new_state(), Batches(), stop)
    assert (finished, int(state.step), steps_of(tmp_path)) == (False, 0, []) and "nothing new to save" in said[0]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_line_tells_speed_utilisation_and_the_time_left(make):
    run, said = make(np.ones(8), log_every=4)
    with StopRequest() as stop:
        train(run, new_state(), Batches(), stop)
    lines = [line for line in said if "tokens/s" in line]
    assert [line.split()[1] for line in lines] == ["4/8", "8/8"]
    assert all("% of peak" in line and "left 0:00:0" in line for line in lines)


def test_evaluation_decides_which_checkpoint_is_kept_as_the_best(make, tmp_path):
    run, _ = make(np.ones(12), save_every=2, eval_every=2, keep=1)
    run = Run(**(run.__dict__ | {"evaluate": lambda state, number: abs(number - 4.0)}))
    with StopRequest() as stop:
        train(run, new_state(), Batches(), stop)
    assert steps_of(tmp_path) == [4, 12] and run.checkpointer.best_step == 4


def test_a_profile_is_written_of_the_steps_asked_for(make, tmp_path):
    run, _ = make(np.ones(4), profile_steps="1:3")
    with StopRequest() as stop:
        train(run, new_state(), Batches(), stop)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert LoopConfig(profile_steps="20:25").profiled == (20, 25)
    for wrong in ("25:20", "a:b", "3:3", "5", "1:" + "9" * 5000):
        with pytest.raises(ConfigError, match="profile_steps"):
            LoopConfig(profile_steps=wrong)


def test_going_on_takes_back_later_lines_and_survives_a_torn_one(tmp_path):
    log = RunLog(tmp_path, 0)
    for step in range(1, 6):
        log.scalars(step, {"loss": float(step)})
    log.skipped("a", "gone")
    log.close()
    for name in (METRICS, "skipped.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 6, "lo')
    log = RunLog(tmp_path, 3)
    log.scalars(4, {"loss": 40.0})
    log.skipped("a", "gone")
    log.skipped("b", "gone too")
    log.close()
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["loss"] for line in lines] == [1, 2, 3, 40]
    assert log.skipped_count == 2
    assert [json.loads(line)["sample"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()] == ["a", "b"]


def test_the_clock_leaves_out_what_was_no_step(monkeypatch):
    now = itertools.chain([0.0, 10.0, 10.0, 30.0, 30.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock()
    clock.add(100)
    clock.add(200)
    clock.pause(4.0)
    assert clock.read() == (3.0, 50.0)
    assert clock.read() == (3.0, 50.0)  # no step since: the last reading
