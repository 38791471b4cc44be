"""An evaluation on several devices and by several processes, as real runs of eval.py that talk by gloo."""

import json
import os
import signal
import sys

import pytest
from commands import REPOSITORY, begin, finish, wait
from conftest import FIXTURES, random_params
from evaluation.conftest import make_data

from flexattn_jax.checkpoints.store import save_model
from flexattn_jax.config import override, preset
from flexattn_jax.inputs.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow
TOKENIZER = FIXTURES / "inputs" / "huggingface"
COUNT = 7  # questions of each split: 14 do not divide by 4 devices or batches of 3


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with a checkpoint of random weights, questions, and compiled programs."""
    folder = tmp_path_factory.mktemp("shared")
    changes = {"decoder.vocab_size": load_tokenizer(TOKENIZER).vocab_size, "decoder.num_layers": 3}
    config = override(preset("tiny"), changes | {"decoder.num_kv_heads": 2, "flexattention.threshold": 60.0})
    save_model(folder / "checkpoint", config, random_params(config, seed=5), like=TOKENIZER)
    make_data(folder / "data", COUNT)
    return folder


def words(shared, workdir, *more):
    given = {"data_dir": shared / "data", "checkpoint": shared / "checkpoint", "batch_size": 3, "pictures": 2}
    return [
        sys.executable,
        str(REPOSITORY / "eval.py"),
        f"--config={REPOSITORY / 'configs' / 'vstar.py'}:7b",
        *(f"--config.{name}={value}" for name, value in given.items()),
        f"--workdir={workdir}",
        *more,
    ]


def answers(workdir):
    """What was answered to each question, each asked once."""
    lines = [json.loads(line) for line in (workdir / "predictions.jsonl").read_text().splitlines()]
    found = {line["id"]: (line["choice"], line["selection"]["cells"], line["losses"]) for line in lines}
    assert len(found) == len(lines) == 2 * COUNT
    return found


@pytest.fixture(scope="module")
def alone(shared):
    """What one device answers."""
    said, codes = finish(begin(words(shared, shared / "alone"), shared, 1, devices=1))
    assert codes == [0], said
    return answers(shared / "alone")


def check(found, alone):
    assert found.keys() == alone.keys()
    for name, (choice, cells, losses) in alone.items():
        assert found[name][:2] == (choice, cells), name
        assert found[name][2] == pytest.approx(losses, rel=1e-4), name


@pytest.mark.parametrize(("count", "tensor"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])
def test_any_number_of_devices_and_processes_gives_the_answers_of_one(shared, alone, tmp_path, count, tensor):
    said, codes = finish(begin(words(shared, tmp_path, f"--config.tensor={tensor}"), shared, count))
    assert codes == [0] * count, said
    check(answers(tmp_path), alone)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["overall"]["n"] == 2 * COUNT and results["errors"] == []
    assert not list(tmp_path.glob("process-*")) and len(list(tmp_path.glob("pictures/*/*.png"))) == 2
    assert "Written:" in said[0] and not any("Written:" in other for other in said[1:])


def test_pictures_that_cannot_be_read_are_counted_once(shared, tmp_path):
    data = make_data(tmp_path / "data", COUNT)
    for k in (0, 3, 4):
        (data / "direct_attributes" / f"q{k}.png").write_bytes(b"torn")
    said, codes = finish(begin(words(shared, tmp_path / "w", f"--config.data_dir={data}"), shared, 2))
    assert codes == [0, 0], said
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert results["overall"]["n"] == 2 * COUNT - 3 and len(results["errors"]) == 3


def test_a_killed_process_ends_the_run_and_any_number_goes_on(shared, alone, tmp_path):
    run = begin(words(shared, tmp_path, "--config.batch_size=1"), shared, 2)
    other = tmp_path / "process-1" / "predictions.jsonl"
    wait(run, lambda: other.is_file() and other.read_text().count("\n") >= 1)
    os.kill(run[1].pid, signal.SIGKILL)
    said, codes = finish(run, timeout=240)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGKILL), said
    assert "another process ended" in said[0] or "another task died" in said[0] or "heartbeat" in said[0].lower(), said
    said, codes = finish(begin(words(shared, tmp_path), shared, 1))
    assert codes == [0] and "are answered" in said[0], said
    check(answers(tmp_path), alone)
