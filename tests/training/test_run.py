"""Whole runs on a tiny model: what they leave behind, and that stopping them in any way changes nothing."""

import functools
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import command, read_metrics, start

import flexattn_jax
from flexattn_jax.checkpoints.store import load_params
from flexattn_jax.checkpoints.trees import flatten
from flexattn_jax.config import ConfigError
from flexattn_jax.evaluation.demo import demo_questions
from flexattn_jax.evaluation.run import run_questions
from flexattn_jax.evaluation.settings import benchmark_config
from flexattn_jax.inputs.conversations import ConversationError
from flexattn_jax.training.loop import TrainingFault
from flexattn_jax.training.tasks import run_task

STEPS = 14


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Programs are compiled once for all runs of this file, in whichever process."""
    return tmp_path_factory.mktemp("compiled")


def stop_at(process, workdir, step, how):
    """Sends a signal once `step` steps are logged; returns what was printed."""
    deadline = time.monotonic() + 300
    while sum("loss" in entry for entry in read_metrics(workdir)) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    return process.communicate(timeout=120)[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Where `undisturbed` puts its one run."""
    return {"workdir": tmp_path_factory.mktemp("whole") / "run", "said": None}


@pytest.fixture
def undisturbed(whole, settings, compiled):
    """A run to the end, made once."""
    if whole["said"] is None:
        process = start(command(settings, whole["workdir"]), compiled)
        whole["said"] = process.communicate(timeout=300)[0]
        assert process.returncode == 0, whole["said"]
    return whole


def same_end(one, other):
    """Bit-equal parameters, and the same losses at the same steps: the same data in the same order."""
    first, second = (load_params(Path(w) / "model") for w in (one, other))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    key = ("step", "loss", "gradient_norm", "answer_tokens", "eval_loss")
    kept = [[[entry.get(name) for name in key] for entry in read_metrics(w)] for w in (one, other)]
    assert kept[0] == kept[1]


def test_a_run_learns_logs_and_leaves_a_model_that_answers(undisturbed, checkpoint):
    workdir, said = undisturbed["workdir"], undisturbed["said"]
    steps = [entry for entry in read_metrics(workdir) if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, STEPS + 1))
    assert np.mean([e["loss"] for e in steps[-3:]]) < 0.7 * np.mean([e["loss"] for e in steps[:3]])
    assert [e["alpha"] for e in steps[:3]] == [0, 1, 1]
    assert all(0 < e["cells_per_row"] <= 9 and e["tokens_per_second"] for e in steps[1:])
    evaluated = {entry["step"]: entry["eval_loss"] for entry in read_metrics(workdir) if "eval_loss" in entry}
    assert list(evaluated) == [6, 12, STEPS] and evaluated[STEPS] < steps[0]["loss"]
    assert said.count("compiling included") == 1 and re.search(r"step 14/14 .* tokens/s .* left 0:00:00", said)
    listed = [json.loads(line)["sample"] for line in (workdir / "skipped.jsonl").read_text().splitlines()]
    assert listed == ["30:gone", "10:id10"] and "2 samples were left out" in said
    events = b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())
    assert b"gradient_norm" in events and b"cells/0" in events and b"\x89PNG" in events

    vlm = flexattn_jax.load(workdir / "model")
    picture = np.full((40, 50, 3), (200, 30, 30), np.uint8)
    assert isinstance(vlm.answer([picture], ["What is the colour?"], max_new_tokens=4)[0], str)
    before, after = load_params(checkpoint), load_params(workdir / "model")
    jax.tree.map(np.testing.assert_array_equal, before["vision"], after["vision"])
    hd = [np.asarray(p["decoder"]["highres"]["k_proj_hd"]["kernel"]) for p in (before, after)]
    assert np.array_equal(hd[0][0], hd[1][0]) and not np.array_equal(hd[0][1], hd[1][1])


@pytest.mark.slow
@pytest.mark.long
def test_vistogs_two_stages_make_a_model_whose_groups_are_drawn(settings_of, tmp_path):
    model = settings_of("vistog")["start"]["checkpoint"]
    for stage, trained in (("vistog_align", ("connector",)), ("vistog", ("connector", "decoder"))):
        settings, before = settings_of(stage), load_params(model)
        assert settings["model"]["grouping"]["groups"] == 64
        settings["model"]["grouping"]["groups"] = 6
        settings["start"]["checkpoint"] = str(model)
        model = run_task(settings, tmp_path / stage)
        metrics = read_metrics(tmp_path / stage)
        assert metrics[-1]["eval_loss"] < 0.9 * next(entry["loss"] for entry in metrics if "loss" in entry)
        after = load_params(model)
        for path in ("vision/position_embedding", "connector/fc2/kernel", "decoder/embedding"):
            first, second = (flatten(params)[path] for params in (before, after))
            assert np.array_equal(first, second) != path.startswith(trained)
    settings = benchmark_config("vstar").to_dict() | {"data_dir": str(demo_questions()), "checkpoint": str(model)}
    run_questions("vstar", settings | {"limit": 1, "pictures": 2}, tmp_path / "vstar", show_progress=False)
    drawn = sorted(path.name for path in (tmp_path / "vstar").rglob("*-groups.png"))
    assert len(drawn) == 2


@pytest.mark.slow
def test_a_killed_run_ends_bit_equal(undisturbed, settings, compiled, tmp_path):
    step = int(np.random.default_rng(os.getpid()).integers(2, STEPS - 1))
    killed = start(command(settings, tmp_path), compiled)
    said = stop_at(killed, tmp_path, step, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "model").exists(), said
    again = start(command(settings, tmp_path), compiled)
    said = again.communicate(timeout=300)[0]
    assert again.returncode == 0, said
    if step > 6:
        assert "going on from the checkpoint of step" in said
    same_end(undisturbed["workdir"], tmp_path)


@pytest.mark.slow
def test_sigterm_saves_and_a_damaged_save_costs_only_the_steps_since_the_one_before(
    undisturbed, settings, compiled, tmp_path
):
    asked = start(command(settings, tmp_path), compiled)
    said = stop_at(asked, tmp_path, 5, signal.SIGTERM)
    assert asked.returncode == 0, said
    stopped = int(re.search(r"stopped as asked after step (\d+)", said)[1])
    assert str(stopped) in os.listdir(tmp_path / "checkpoints") and stopped < STEPS

    newest = tmp_path / "checkpoints" / str(stopped)
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    again = start(command(settings, tmp_path), compiled)
    said = again.communicate(timeout=300)[0]
    assert again.returncode == 0, said
    assert f"checkpoint {stopped} is damaged" in said and "going on from the checkpoint of step" in said
    same_end(undisturbed["workdir"], tmp_path)


def test_a_finished_run_is_not_run_again_and_other_settings_are_refused(undisturbed, settings):
    workdir = undisturbed["workdir"]
    before = read_metrics(workdir)
    assert run_task(settings, workdir) == workdir / "model"
    assert read_metrics(workdir) == before
    settings["optimizer"]["learning_rate"] = 1e-3
    with pytest.raises(TrainingFault, match=r"optimizer\.learning_rate was 0\.003 and is 0\.001"):
        run_task(settings, workdir)


def test_the_best_checkpoint_can_be_exported_from_a_finished_run(undisturbed, settings, tmp_path):
    workdir = Path(shutil.copytree(undisturbed["workdir"], tmp_path / "copy"))
    losses = {int(file.stem): json.loads(file.read_text())["eval_loss"] for file in (workdir / "checksums").iterdir()}
    assert set(losses) == {12, STEPS} and all(losses.values())
    record = workdir / "checksums" / "12.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"eval_loss": 1e-3}))
    run_task(settings | {"export": "best", "export_dtype": "bfloat16"}, workdir)
    last, best = load_params(undisturbed["workdir"] / "model"), load_params(workdir / "model")
    name = ("decoder", "lm_head", "kernel")
    last, best = (np.asarray(functools.reduce(dict.__getitem__, name, params)) for params in (last, best))
    assert best.dtype == "bfloat16" and not np.array_equal(last.astype(best.dtype), best)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": {"conversations": ""}}, ConversationError, "--config.data.conversations is not given"),
        ({"data": {"pictures": "no/such/folder"}}, ConversationError, "no/such/folder does not exist"),
        ({"data": {"max_length": 60}}, ConversationError, "no sample can be used"),
        ({"start": {"checkpoint": ""}}, ConfigError, "there is nothing to begin with"),
        ({"start": {"redraw": "connect"}}, ConfigError, "start.redraw names 'connect'"),
        ({"optimizer": {"trainable": "vision"}}, ConfigError, "no gradient"),
        ({"optimizer": {"eps": -1.0}}, ConfigError, "optimizer.eps is -1.0"),
        ({"optimizer": {"learning_rate": 1e300}}, ConfigError, "optimizer.learning_rate is 1e+300"),
        ({"epochs": 1e308}, ConfigError, "at most 2147483647 steps"),
        ({"epochs": 1e12}, ConfigError, "at most 2147483647 steps"),
        ({"accumulation": 3}, ConfigError, "multiple of accumulation"),
        ({"loop": {"profile_steps": "5"}}, ConfigError, "loop.profile_steps"),
        ({"data": {"text_lengths": (8,)}}, ValueError, "the limit is 8"),
    ],
)
def test_mistakes_are_one_sentence(settings, tmp_path, change, error, message):
    for name, value in change.items():
        if isinstance(value, dict):
            settings[name].update(value)
        else:
            settings[name] = value
    with pytest.raises(error, match=re.escape(message)):
        run_task(settings, tmp_path)
