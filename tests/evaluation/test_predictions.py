"""Kills, torn lines and other runs' folders."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evaluation.fakes import FakeVLM

from flexattn_jax.evaluation.benchmarks import BENCHMARKS
from flexattn_jax.evaluation.harness import evaluate
from flexattn_jax.evaluation.predictions import PREDICTIONS, PredictionLog, WorkdirError
from flexattn_jax.inputs.datasets.vstar import read_vstar

TESTS = Path(__file__).parent.parent


def run(data_dir, workdir, vlm=None, settings=None, batch_size=2):
    questions, _ = read_vstar(data_dir)
    vlm = vlm or FakeVLM()
    with PredictionLog(workdir, settings or {"scorer": "released"}, questions) as log:
        scorer = BENCHMARKS["vstar"].scorers["released"]
        evaluate(lambda: vlm, questions, log, scorer, batch_size=batch_size, show_progress=False)
        return log, vlm


def lines(workdir):
    return [json.loads(line) for line in (workdir / PREDICTIONS).read_text().splitlines()]


def test_a_killed_run_goes_on_where_it_stopped(data_dir, tmp_path):
    workdir = tmp_path / "w"
    script = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from evaluation.test_predictions import run; from evaluation.fakes import FakeVLM\n"
        "run(sys.argv[3], sys.argv[4], FakeVLM(seconds=0.25))\n"
    )
    arguments = [str(TESTS), str(TESTS.parent), str(data_dir), str(workdir)]
    process = subprocess.Popen([sys.executable, "-c", script, *arguments])
    try:
        limit = time.monotonic() + 60
        while not (workdir / PREDICTIONS).exists() or len((workdir / PREDICTIONS).read_bytes()) == 0:
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.01)
        with pytest.raises(WorkdirError, match="another evaluation is writing"):
            run(data_dir, workdir)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = [line["id"] for line in lines(workdir)]
    assert 0 < len(before) < 10

    _, vlm = run(data_dir, workdir)
    after = [line["id"] for line in lines(workdir)]
    assert after[: len(before)] == before
    assert sorted(after) == sorted(question.id for question in read_vstar(data_dir)[0])
    assert len(vlm.asked) == 10 - len(before)


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_torn_last_line_is_asked_again(data_dir, tmp_path, cut):
    run(data_dir, tmp_path / "w")
    path = tmp_path / "w" / PREDICTIONS
    whole = path.read_bytes()
    os.truncate(path, len(whole) - cut)
    log, vlm = run(data_dir, tmp_path / "w")
    assert log.torn and len(vlm.asked) == 1
    again, expected = lines(tmp_path / "w"), [json.loads(line) for line in whole.splitlines()]
    for line in (*again, *expected):
        line.pop("seconds")
    assert again == expected


def test_a_last_line_of_zeros_is_asked_again_and_damage_before_it_is_refused(data_dir, tmp_path):
    run(data_dir, tmp_path / "w")
    path = tmp_path / "w" / PREDICTIONS
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(rows[:-1]) + b"\0" * 100 + b"\n")
    log, vlm = run(data_dir, tmp_path / "w")
    assert log.torn and len(vlm.asked) == 1 and len(lines(tmp_path / "w")) == 10
    path.write_bytes(rows[0] + b"{}\n" + b"".join(rows[2:]))
    with pytest.raises(WorkdirError, match=r"line 2 .* is damaged"):
        run(data_dir, tmp_path / "w")


def test_another_runs_folder_is_refused(data_dir, tmp_path):
    run(data_dir, tmp_path / "w", settings={"scorer": "released", "checkpoint": "a"})
    kept = (tmp_path / "w" / PREDICTIONS).read_bytes()
    with pytest.raises(WorkdirError, match=r'scorer was "released" and is now "official".*choose another --workdir'):
        run(data_dir, tmp_path / "w", settings={"scorer": "official", "checkpoint": "a"})
    with pytest.raises(WorkdirError, match='checkpoint was "a" and is now "b"'):
        run(data_dir, tmp_path / "w", settings={"scorer": "released", "checkpoint": "b"})
    assert (tmp_path / "w" / PREDICTIONS).read_bytes() == kept
    (tmp_path / "w" / "run.json").unlink()
    with pytest.raises(WorkdirError, match=r"it has predictions.jsonl and no run.json"):
        run(data_dir, tmp_path / "w", settings={"scorer": "released", "checkpoint": "a"})


def test_answers_to_other_questions_are_refused(data_dir, tmp_path):
    run(data_dir, tmp_path / "w")
    path = data_dir / "direct_attributes" / "q3.json"
    fields = json.loads(path.read_text())
    # The right answer moved: the stored index of the chosen option would now mean another text.
    path.write_text(json.dumps(fields | {"options": fields["options"][::-1]}))
    with pytest.raises(WorkdirError, match="direct_attributes/q3 is for another question"):
        run(data_dir, tmp_path / "w")


def test_a_folder_without_answers_may_be_used_by_any_run(data_dir, tmp_path):
    questions, _ = read_vstar(data_dir)
    with PredictionLog(tmp_path / "w", {"scorer": "released"}, questions):
        pass
    run(data_dir, tmp_path / "w", settings={"scorer": "official"})
    assert len(lines(tmp_path / "w")) == 10


def test_losses_that_are_not_finite_survive_the_file(data_dir, tmp_path):
    values = [float("nan"), float("inf"), 1.0, 2.0]
    log, _ = run(data_dir, tmp_path / "w", FakeVLM({"attributes number 0": values}))
    assert lines(tmp_path / "w")[0]["losses"] == ["nan", "inf", 1.0, 2.0]
    questions, _ = read_vstar(data_dir)
    with PredictionLog(tmp_path / "w", {"scorer": "released"}, questions) as again:
        read = again.finished["direct_attributes/q0"]
        assert str(read.losses) == str(tuple(values))
        assert again.finished["direct_attributes/q1"] == log.finished["direct_attributes/q1"]
