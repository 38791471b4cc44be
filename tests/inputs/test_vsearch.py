"""vsearch as a data set on disk: built once, without TensorFlow, whole or not at all; and in V* Bench's layout."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from flexattn_jax.inputs.datasets import vsearch, vsearch_examples, vsearch_export
from flexattn_jax.inputs.datasets.vsearch import VSearch, VSearchError, decode_example, load_vsearch
from flexattn_jax.inputs.datasets.vsearch_examples import FORMS, PRESETS, generate
from flexattn_jax.inputs.datasets.vstar import read_vstar

ROOT = pathlib.Path(vsearch.__file__).parents[3]
COUNT = 5


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


WITHOUT_TENSORFLOW = """
import sys
from flexattn_jax.inputs.datasets.vsearch import decode_example, load_vsearch
source = load_vsearch(sys.argv[1], "standard", "test", seed=3, pictures=int(sys.argv[2]))
print(len(source), decode_example(source[0]).id, "tensorflow" in sys.modules)
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Holds a split that another process drew."""
    folder = tmp_path_factory.mktemp("data")
    done = run(WITHOUT_TENSORFLOW, folder, COUNT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{COUNT} test-000000 False\n"
    assert "drawing vsearch standard test: 100%" in done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_what_was_drawn_is_read_back_bit_by_bit_and_not_drawn_again(data_dir, monkeypatch, capfd):
    settings = dataclasses.replace(PRESETS["standard"], seed=3, pictures=(0, 0, COUNT, 0))
    drawn = list(generate(settings, "test"))
    monkeypatch.setattr(vsearch_examples, "generate", None)
    source = load_vsearch(data_dir, "standard", "test", seed=3, pictures=COUNT)
    assert [decode_example(source[k]) for k in range(len(source))] == drawn
    assert capfd.readouterr() == ("", "")


KILLED = """
import os, signal, sys
from flexattn_jax.inputs.datasets import vsearch_examples
real = vsearch_examples.generate
def generate(*args):
    for k, example in enumerate(real(*args)):
        if k == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield example
vsearch_examples.generate = generate
from flexattn_jax.inputs.datasets.vsearch import load_vsearch
load_vsearch(sys.argv[1], "crowded", "validation", pictures=6)
"""


def test_a_killed_build_leaves_nothing_that_looks_finished(tmp_path):
    assert run(KILLED, tmp_path).returncode == -9
    assert list(tmp_path.glob("vsearch/crowded-*/incomplete.*"))
    source = load_vsearch(tmp_path, "crowded", "validation", pictures=6)
    assert [decode_example(source[k]).id for k in range(6)] == [f"validation-{k:06d}" for k in range(6)]
    assert not list(tmp_path.glob("vsearch/crowded-*/incomplete.*"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"preset": "hard"}, "preset 'hard'"),
        ({"split": "dev"}, "split 'dev'"),
        ({"pictures": 0}, "0 pictures"),
        ({"preset": "large"}, "preset 'large' has no pictures in split 'test'"),
        ({"seed": -2}, "seed -2"),
    ],
)
def test_mistakes_are_named(tmp_path, arguments, named):
    with pytest.raises(VSearchError, match=named):
        load_vsearch(tmp_path, **arguments)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VSearchError, match="cannot be drawn into"):
        load_vsearch(tmp_path / "file" / "data", pictures=1)


def test_data_goes_to_the_users_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert vsearch.default_data_dir() == tmp_path / "flexattn_jax"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert vsearch.default_data_dir() == pathlib.Path.home() / ".local/share/flexattn_jax"


def test_presets_are_builder_configs_of_all_splits(tmp_path):
    assert list(VSearch.builder_configs) == list(PRESETS)
    builder = VSearch(config="crowded", data_dir=tmp_path, file_format="array_record")
    assert list(builder._split_generators(None)) == list(vsearch_examples.SPLITS)


def test_the_vstar_layout_is_read_without_errors(tmp_path):
    settings = dataclasses.replace(PRESETS["crowded"], pictures=(0, 0, 3, 0))
    drawn = list(generate(settings, "test"))
    counts = vsearch_export.write_vstar_layout(drawn, tmp_path / "vstar")
    questions, errors = read_vstar(tmp_path / "vstar")
    assert errors == []
    assert counts == {FORMS[0]: 24, FORMS[1]: 12}
    asked = {
        f"{q.form}/{example.id}-{k:02d}": (example, q) for example in drawn for k, q in enumerate(example.questions)
    }
    assert {question.id for question in questions} == set(asked)
    for question in questions:
        example, original = asked[question.id]
        targets = [example.objects[target] for target in original.targets]
        assert question.question == original.question
        assert question.options[0] == original.options[original.answer]
        assert sorted(question.options) == sorted(original.options)
        assert question.bbox == tuple(target.box for target in targets)
        assert question.target_object == tuple(target.name for target in targets)
        assert question.image.read_bytes() == example.image


def test_the_layout_is_not_written_over_something(tmp_path):
    (tmp_path / "old.txt").write_text("mine")
    with pytest.raises(VSearchError, match="is not empty"):
        vsearch_export.write_vstar_layout([], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["old.txt"]


def test_the_export_command(data_dir, tmp_path, capsys):
    arguments = [f"--data_dir={data_dir}", "--seed=3", f"--pictures={COUNT}", f"--out={tmp_path / 'vstar'}"]
    assert vsearch_export.main(arguments) == 0
    assert "25 questions of direct_attributes, 25 questions of relative_position" in capsys.readouterr().out
    fields = json.loads((tmp_path / "vstar/relative_position/test-000004-09.json").read_text())
    assert set(fields) == {"target_object", "bbox", "question", "options"}
    assert vsearch_export.main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
