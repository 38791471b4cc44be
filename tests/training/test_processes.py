"""Several processes of one run: what the environment tells of them, and real runs of train.py that talk by gloo."""

import json
import os
import re
import signal
import sys
import time

import jax
import numpy as np
import pytest
from commands import REPOSITORY, begin, command, finish, read_metrics, wait

from flexattn_jax import processes
from flexattn_jax.checkpoints.store import load_params
from flexattn_jax.processes import ProcessFault, described, on_first, together
from flexattn_jax.training.logging import RunLog

SLURM = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (SLURM | {"SLURM_PROCID": "3"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            {"coordinator_address": "h:1", "num_processes": 2, "process_id": 1},
        ),
    ],
)
def test_the_environment_tells_of_several_processes(environment, found):
    assert described(environment | {"JAX_PLATFORMS": "cpu"}) == found


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (SLURM, "2 nodes, but the command was started on one of them alone; start it with srun"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "give all of JAX_COORDINATOR_ADDRESS"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "from 0 to one less"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "from 0 to one less"),
    ],
)
def test_a_run_on_one_host_of_many_is_told_so(environment, message):
    with pytest.raises(ProcessFault, match=message):
        described(environment)


def test_one_process_alone_does_everything_itself():
    assert on_first(lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(KeyError), together((ValueError,)):
        raise KeyError("as it is")


def test_a_fault_among_several_ends_the_process_at_once(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.os, "_exit", codes.append)
    errors = ProcessFault("no such folder"), jax.errors.JaxRuntimeError("connection closed"), KeyError("bug")
    for error in (*errors, OSError(28, "No space left", "file\x1b")):
        with together((ProcessFault,)):
            raise error
    said = capsys.readouterr().err
    assert codes == [2, 1, 1, 2] and "No space left" in said and "\x1b" not in said
    assert "process 0 of 2: no such folder" in said and "Traceback" in said
    assert "another process ended or cannot be reached (connection closed)" in said


def test_other_processes_list_only_what_they_could_not_use(tmp_path):
    first, other = RunLog(tmp_path, 0), RunLog(tmp_path, 0, process=3)
    for log in (first, other):
        log.scalars(1, {"loss": 1.0})
    first.skipped("a", "torn")
    other.skipped("b", "torn")
    assert len(read_metrics(tmp_path)) == 1 and first.skipped_count == 2
    for log in (first, other):
        log.close()


def at_step(run, workdir, step):
    """Waits until that many steps are logged."""
    wait(run, lambda: sum("loss" in entry for entry in read_metrics(workdir)) >= step)


def losses(workdir):
    return {
        (entry["step"], name): entry[name]
        for entry in read_metrics(workdir)
        for name in ("loss", "eval_loss", "answer_tokens")
        if name in entry
    }


def digests(settings, workdir, compiled, count):
    """Of the arrays that `count` processes restore from the newest checkpoint."""
    file = workdir.parent / f"{workdir.name}.json"
    file.write_text(json.dumps(settings))
    words = [sys.executable, str(REPOSITORY / "tests" / "restored.py"), str(file), str(workdir)]
    said, codes = finish(begin(words, compiled, count))
    assert codes == [0] * count, said
    return json.loads(said[0].splitlines()[-1])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def shared(settings):
    """A run of seven steps whose learning rate lets rounding grow but slowly."""
    settings["epochs"], settings["optimizer"]["learning_rate"] = 1.0, 1e-4
    settings["partition"]["largest_replicated"] = 3000
    return settings


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return {"workdir": tmp_path_factory.mktemp("alone") / "run", "done": False}


@pytest.fixture
def one_process(alone, shared, compiled):
    """The same run by one process with all devices."""
    if not alone["done"]:
        said, codes = finish(begin(command(shared, alone["workdir"]), compiled, 1))
        assert codes == [0], said
        alone["done"] = True
    return alone["workdir"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.long)])
def test_several_processes_learn_what_one_does(one_process, shared, compiled, tmp_path, count):
    said, codes = finish(begin(command(shared, tmp_path), compiled, count))
    assert codes == [0] * count, said
    want, found = losses(one_process), losses(tmp_path)
    assert want.keys() == found.keys() and len(want) > 14
    for key, value in want.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key
    assert "step 7/7" in said[0] and not any("step 7/7" in other for other in said[1:])
    listed = {line for file in tmp_path.glob("skipped*.jsonl") for line in file.read_text().splitlines()}
    assert listed == set((one_process / "skipped.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_sigterm_to_any_process_saves_the_same_step_which_any_number_of_processes_restores(
    one_process, shared, compiled, tmp_path
):
    run = begin(command(shared, tmp_path), compiled, 4)
    at_step(run, tmp_path, 2)
    run[2].send_signal(signal.SIGTERM)
    said, codes = finish(run)
    assert codes == [0] * 4, said
    step = int(re.search(r"stopped as asked after step (\d+)", said[0])[1])
    assert str(step) in os.listdir(tmp_path / "checkpoints") and step < 7
    restored = [digests(shared, tmp_path, compiled, count) for count in (4, 2, 1)]
    assert restored[0]["step"] == step and restored[0] == restored[1] == restored[2]
    said, codes = finish(begin(command(shared, tmp_path), compiled, 2))
    assert codes == [0, 0] and f"going on from the checkpoint of step {step}" in said[0], said
    want, found = losses(one_process), losses(tmp_path)
    assert all(found[key] == pytest.approx(value, rel=1e-5) for key, value in want.items())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_params(tmp_path / "model")))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_process_that_dies_stops_the_others_in_bounded_time(shared, compiled, tmp_path, killed):
    shared["epochs"] = 50.0
    run = begin(command(shared, tmp_path), compiled, 2)
    wait(run, (tmp_path / "checksums" / "3.json").is_file)  # a checkpoint is made every three steps, and whole by then
    run[killed].kill()
    began = time.monotonic()
    said, codes = finish(run, timeout=240)
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] not in (0, -signal.SIGKILL)
    assert time.monotonic() - began < 180
    other = said[1 - killed]
    assert "another process ended" in other or "another task died" in other or "heartbeat" in other.lower(), other
    again = begin(command(shared | {"loop": shared["loop"] | {"save_every": 1000}}, tmp_path), compiled, 2)
    at_step(again, tmp_path, 6)
    again[0].send_signal(signal.SIGTERM)
    said, codes = finish(again)
    assert codes == [0, 0] and "going on from the checkpoint of step" in said[0], said
