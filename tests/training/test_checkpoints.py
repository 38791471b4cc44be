"""Checkpoints that are kept, found damaged, or never finished."""

import os

import jax
import numpy as np
import pytest

from flexattn_jax.training.checkpoints import Checkpointer, CheckpointFault
from flexattn_jax.training.optimizer import OptimizerConfig, build_optimizer
from flexattn_jax.training.state import create_state


def state_of(value):
    params = {"connector": {"kernel": np.full((30, 40), value)}, "decoder": {"scale": np.full(50, value)}}
    config = OptimizerConfig()
    return create_state(params, config, build_optimizer(config, 10), seed=3)


LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(0.0))


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1 .. 4, of which the newest two and the best, step 1, are kept."""
    said = []
    checkpointer = Checkpointer(tmp_path, keep=2, say=said.append)
    for step, loss in ((1, 0.5), (2, 0.9), (3, None), (4, 0.7)):
        checkpointer.save(step, state_of(float(step)), {"next_index": step}, loss)
    checkpointer.close()
    assert not said
    return tmp_path


def reopen(workdir):
    said = []
    return Checkpointer(workdir, keep=2, say=said.append), said


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_the_newest_and_the_best_are_kept_and_come_back_bit_by_bit(saved):
    assert sorted(os.listdir(saved / "checkpoints")) == ["1", "3", "4"]
    assert sorted(os.listdir(saved / "checksums")) == ["1.json", "3.json", "4.json"]
    checkpointer, said = reopen(saved)
    assert (checkpointer.latest_step, checkpointer.best_step, said) == (4, 1, [])
    for step in (4, 1):
        state, data = checkpointer.restore(step, LIKE)
        assert data == {"next_index": step}
        expected = state_of(float(step))
        assert (jax.random.key_data(state.key) == jax.random.key_data(expected.key)).all()
        one, other = (s.replace(key=None) for s in (state, expected))
        jax.tree.map(np.testing.assert_array_equal, one, other)
    checkpointer.save(5, state_of(5.0), {}, 0.6)
    checkpointer.close()
    assert sorted(os.listdir(saved / "checkpoints")) == ["1", "4", "5"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "checksums"])
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_used(saved, damage):
    file = largest_file(saved / "checkpoints" / "4")
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "remove":
        file.unlink()
    else:
        (saved / "checksums" / "4.json").write_text("{")
    checkpointer, said = reopen(saved)
    assert checkpointer.latest_step == 3
    (message,) = said
    assert message.startswith("checkpoint 4 is damaged") and message.endswith("the one of step 3 is used")
    if damage != "checksums":
        assert file.name in message
    assert (saved / "damaged" / "4").is_dir()
    state, _ = checkpointer.restore(3, LIKE)
    assert float(state.trained["decoder"]["scale"][0]) == 3
    checkpointer.save(4, state_of(4.0), {})  # the same step may be saved again
    checkpointer.close()
    assert reopen(saved)[0].latest_step == 4


def test_a_checkpoint_without_checksums_was_never_finished(saved):
    (saved / "checksums" / "4.json").unlink()
    checkpointer, said = reopen(saved)
    assert checkpointer.latest_step == 3 and not (saved / "checkpoints" / "4").exists()
    assert said == ["checkpoint 4 was not finished when the run stopped; the one of step 3 is used"]


def test_nothing_begins_anew_silently_when_every_checkpoint_is_damaged(saved):
    for step in (1, 3, 4):
        os.truncate(largest_file(saved / "checkpoints" / str(step)), 1)
    with pytest.raises(CheckpointFault, match="Take another workdir"):
        reopen(saved)
    assert (saved / "checkpoints" / "4").is_dir()  # nothing was moved
