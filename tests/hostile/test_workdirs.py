"""Work folders: full, read-only, of another run or program, shared with strangers. Nothing that is there is damaged."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
from evaluation.fakes import FakeVLM
from hostile.checks import contents, full_disk, in_time, one_sentence, vstar_folder, vstar_settings

from flexattn_jax.command_line import exit_code
from flexattn_jax.costs import lab
from flexattn_jax.evaluation import run as evaluation_run
from flexattn_jax.evaluation.predictions import PREDICTIONS
from flexattn_jax.evaluation.run import USER_ERRORS
from flexattn_jax.files import FileError, lock_file, naming, private_folder, write_whole
from flexattn_jax.training.loop import TrainingFault
from flexattn_jax.training.run import _claim, _locked


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """eval.py on two questions with a model that answers at once; gives the exit code."""
    monkeypatch.setattr(evaluation_run, "load", lambda *_, **__: FakeVLM())
    data = vstar_folder(tmp_path / "data")

    def run(workdir, **changes):
        settings = vstar_settings(data, tmp_path, **changes)
        return exit_code("eval.py", lambda: evaluation_run.run_benchmark(settings, workdir), USER_ERRORS)

    return run


@pytest.mark.parametrize("room", [100, 700, 1500])
def test_eval_on_a_full_disk_says_so_and_goes_on_later(evaluate, tmp_path, capsys, room):
    """The disk fills up while run.json, the predictions or the results are written."""
    with full_disk(room):
        assert evaluate(tmp_path / "w", batch_size=1) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path / "w") in error and one_sentence(error)
    assert not [p for p in (tmp_path / "w").iterdir() if "partial" in p.name]
    assert evaluate(tmp_path / "w", batch_size=1) == 0
    assert json.loads((tmp_path / "w" / "results.json").read_text())["overall"]["n"] == 2


@pytest.mark.parametrize("workdir", ["/proc/nowhere", "/dev/full/x", "data/direct_attributes/q0.png"])
def test_a_workdir_that_cannot_be_made(evaluate, tmp_path, capsys, workdir):
    assert evaluate(tmp_path / workdir) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert workdir in error and one_sentence(error)


def _link(path):
    path.symlink_to(path.parent / "precious")


@pytest.mark.parametrize("make", [_link, os.mkfifo])
def test_a_lock_that_is_no_file(evaluate, tmp_path, capsys, make):
    """A stranger's file behind a link stays as it is, and a pipe does not hang."""
    workdir = tmp_path / "w"
    workdir.mkdir()
    (workdir / "precious").write_text("of weeks")
    make(workdir / ".lock")
    assert in_time(evaluate, workdir) == 2
    error = capsys.readouterr().err
    assert str(workdir) in error and ".lock is a link, pipe or device" in error and one_sentence(error)
    with pytest.raises(TrainingFault, match=r"\.lock is a link, pipe or device"), _locked(workdir):
        pass
    assert set(contents(workdir)) == {"precious"} and (workdir / "precious").read_text() == "of weeks"


def test_a_lock_is_held_by_one_and_leaves_what_is_in_the_file(tmp_path):
    path = tmp_path / ".lock"
    path.write_text("something")
    with lock_file(path), pytest.raises(BlockingIOError):
        lock_file(path)
    with lock_file(path, wait=True):
        assert path.read_text() == "something"


FOREIGN = {
    "a training run's": ({"run.json": '{"start": {"checkpoint": "x"}}'}, "is no evaluation's"),
    "a list": ({"run.json": "[]"}, "is no evaluation's"),
    "damaged": ({"run.json": '{"format": 2'}, "not valid JSON"),
    "nested": ({"run.json": "[" * 100_000}, "nested too deeply"),
    "answers of nobody": ({PREDICTIONS: "{}\n"}, "and no run.json"),
    "another evaluation's": ({"run.json": '{"format": 2, "scorer": "x"}', PREDICTIONS: "{}\n"}, "scorer was"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_eval_leaves_another_runs_folder_as_it_is(evaluate, tmp_path, capsys, name):
    files, message = FOREIGN[name]
    (tmp_path / "w").mkdir()
    for file, content in files.items():
        (tmp_path / "w" / file).write_text(content)
    before = contents(tmp_path / "w")
    assert evaluate(tmp_path / "w") == 2
    error = capsys.readouterr().err
    assert message in error and one_sentence(error) and contents(tmp_path / "w") == before


def test_answers_twice_or_damaged_are_refused(evaluate, tmp_path, capsys):
    assert evaluate(tmp_path / "w") == 0
    path = tmp_path / "w" / PREDICTIONS
    lines = path.read_text().splitlines(keepends=True)
    for middle in (lines[0], '{"id": "direct_attributes/q0"}\n', "[" * 100_000 + "\n", "\0" * 50 + "\n"):
        path.write_text(lines[0] + middle + lines[1])
        before = contents(tmp_path / "w")
        capsys.readouterr()
        assert evaluate(tmp_path / "w") == 2
        assert "line 2 of" in capsys.readouterr().err and contents(tmp_path / "w") == before


def test_a_folder_that_is_no_checkpoint_is_not_walked_through(evaluate, tmp_path, capsys):
    for folder in ("/", str(tmp_path)):
        assert evaluate(tmp_path / "w", checkpoint=folder) == 2
        assert "has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [{"batch_size": 10**9}, {"batch_size": 0}, {"max_new_tokens": 10**9}, {"limit": -1}, {"scorer": "x"},
     {"data_dir": ""}, {"data_dir": "/nowhere"}, {"checkpoint": ""}, {"benchmark": "x"}, {"limit": "x"},
     {"batch_size": 1.5}, {"scorer": ["released"]}, {"model_overrides": 3}],
)  # fmt: skip
def test_impossible_settings_of_eval(evaluate, tmp_path, capsys, changes):
    assert evaluate(tmp_path / "w", **changes) == 2
    assert one_sentence(capsys.readouterr().err) and not (tmp_path / "w" / PREDICTIONS).exists()


def test_train_leaves_what_it_has_not_written(tmp_path):
    """Without run.json, checkpoints that carry no checksums would be taken for unfinished ones and removed."""
    for name in ("checkpoints/500", "model"):
        workdir = tmp_path / name.replace("/", "_")
        (workdir / name).mkdir(parents=True)
        (workdir / name / "weights").write_text("of weeks")
        before = contents(workdir)
        with pytest.raises(TrainingFault, match=r"no run\.json") as caught:
            _claim(workdir, {"seed": 1})
        assert one_sentence(str(caught.value)) and contents(workdir) == before
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    _claim(fresh, {"seed": 1})
    _claim(fresh, {"seed": 1})
    with pytest.raises(TrainingFault, match="seed was 1 and is 2"):
        _claim(fresh, {"seed": 2})
    for content in ("[1]", "{", "[" * 100_000, '{"seed": NaN}'):
        (fresh / "run.json").write_text(content)
        with pytest.raises(TrainingFault, match="is damaged"):
            _claim(fresh, {"seed": 1})


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_whole(path, "old")
    with full_disk(100), pytest.raises(OSError) as caught:
        write_whole(path, "x" * 1000)
    assert caught.value.filename == str(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError) as caught, naming(path):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(path)


def test_compiled_programs_live_where_nobody_else_writes(tmp_path):
    folder = private_folder(tmp_path / "cache")
    assert folder.stat().st_mode & 0o777 == 0o700 and private_folder(folder) == folder
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "file").touch(mode=0o600)
    for name in ("link", "open", "file"):
        with pytest.raises(FileError, match="a folder of yours"):
            private_folder(tmp_path / name)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to somebody else")
def test_a_strangers_folder_is_no_cache(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o700)
    os.chown(tmp_path / "cache", 12345, 12345)
    with pytest.raises(FileError, match="a folder of yours"):
        private_folder(tmp_path / "cache")


def test_compile_costs_removes_no_folder_of_the_users():
    """It was called "cache" once, a name that a work folder may hold for other reasons."""
    assert lab._CACHE.startswith(".")


# What the edge of every command makes of what a machine can lack.
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device", "/w/x.json"), 2, "/w/x.json cannot be read or written (No space left"),
        (PermissionError(13, "Permission denied", "/w"), 2, "/w cannot be read or written (Permission denied)"),
        (MemoryError(), 2, "memory is full"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), 2, "memory is full"),
        (ValueError("a\x1b[2J" + "x" * 100_000), 2, "characters more"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_what_a_machine_lacks_is_one_sentence(capsys, error, code, message):
    def act():
        raise error

    assert exit_code("x.py", act, (ValueError,)) == code
    printed = capsys.readouterr().err
    assert message in printed and "\x1b" not in printed and len(printed) < 7000


def test_what_a_terminal_cannot_show_ends_no_command(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert exit_code("x.py", lambda: print("é 中"), ()) == 0
    assert sys.stdout.buffer.getvalue() == b"? ?\n"


def test_a_fault_of_the_program_is_not_hidden():
    def act():
        raise KeyError("a fault")

    with pytest.raises(KeyError):
        exit_code("x.py", act, (ValueError,))


def test_no_pickle_is_ever_loaded():
    """Nobody imports it or torch, and numpy is told so wherever it reads."""
    package = Path(evaluation_run.__file__).parents[1]
    for path in package.rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text and "import torch" not in text and "allow_pickle=True" not in text, path
        assert text.count("np.load(") == text.count("allow_pickle=False"), path
