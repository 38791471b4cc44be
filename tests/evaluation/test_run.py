"""A whole evaluation: results.json, the table, the command line, and the demo on the real model."""

import importlib.util
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation.fakes import CELL_GRID, LAYERS, FakeVLM
from PIL import Image
from rich.console import Console

from flexattn_jax.evaluation import demo
from flexattn_jax.evaluation import run as run_module
from flexattn_jax.evaluation.predictions import WorkdirError
from flexattn_jax.evaluation.report import print_report
from flexattn_jax.evaluation.run import HarnessError, checkpoint_fingerprint, run_benchmark, run_questions
from flexattn_jax.inputs.datasets.questions import DatasetError
from flexattn_jax.inputs.datasets.vstar import SPLITS, read_vstar

ROOT = Path(__file__).parent.parent.parent


def load_config(arg):
    spec = importlib.util.spec_from_file_location("vstar_config", ROOT / "configs" / "vstar.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


@pytest.fixture
def evaluate(data_dir, tmp_path, monkeypatch):
    """Runs an evaluation of `data_dir` with a fake model; gives the results."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "weights").write_bytes(bytes(range(256)) * 1000)

    def evaluate(vlm=None, workdir="w", **settings):
        loads = []
        vlm = vlm or FakeVLM()
        monkeypatch.setattr(run_module, "load", lambda *args, **kwargs: loads.append((args, kwargs)) or vlm)
        config = load_config("7b").to_dict() | {"data_dir": str(data_dir), "checkpoint": str(checkpoint)}
        results = run_questions("vstar", config | settings, tmp_path / workdir, show_progress=False)
        evaluate.loads = loads
        return results

    evaluate.checkpoint, evaluate.workdir = checkpoint, tmp_path / "w"
    return evaluate


def test_results(evaluate, data_dir, capsys):
    (data_dir / "direct_attributes" / "q4.json").write_text("{")
    (data_dir / "relative_position" / "q4.png").write_bytes(b"")
    vlm = FakeVLM(
        {
            "attributes number 1": [9.0, 1.0, 2.0, 3.0],
            "position number 1": [1.0, 1.0],
            "position number 2": [math.nan, 1],
        }
    )
    results = evaluate(vlm, pictures=3)
    assert json.loads((evaluate.workdir / "results.json").read_text()) == results
    assert {"benchmark", "config", "splits", "overall", "errors", "selection", "timing"} <= set(results)
    assert results["splits"] == {
        "direct_attributes": {
            "n": 4,
            "correct": 3,
            "accuracy": 0.75,
            "ci95": pytest.approx([0.3006, 0.9544], abs=1e-4),
            "chance": 0.25,
        },
        "relative_position": {
            "n": 4,
            "correct": 2,
            "accuracy": 0.5,
            "ci95": pytest.approx([0.1500, 0.8500], abs=1e-4),
            "chance": 0.5,
        },
    }
    assert (results["overall"]["n"], results["overall"]["correct"], results["overall"]["accuracy"]) == (8, 5, 0.625)
    assert [e["id"] for e in results["errors"]] == ["direct_attributes/q4", "relative_position/q4"]
    assert [(u["id"], u["reason"]) for u in results["unresolved"]] == [
        ("relative_position/q1", "tie"),
        ("relative_position/q2", "not finite"),
    ]
    selection = results["selection"]
    assert selection["cells"] == CELL_GRID**2 and list(selection["layers"]) == [str(layer) for layer in LAYERS]
    kept = [vlm._selection(prompt).cells.sum(axis=1) for prompt in vlm.asked]
    assert selection["layers"]["3"]["mean_cells_kept"] == pytest.approx(sum(k[1] for k in kept) / 8)
    assert selection["layers"]["3"]["overflow"] == 8 and selection["overflow"] == 8 * (0 + 1 + 2 + 3)
    assert selection["mean_cells_read"] == pytest.approx(sum(map(sum, kept)) / 8)
    assert results["timing"]["questions_measured"] == 8 and results["timing"]["seconds_per_question"] > 0
    assert results["note"] is None and "USER: <image>" in results["prompt"]
    assert sorted(p.name for p in evaluate.workdir.glob("pictures/*/*.png")) == ["q0.png", "q1.png", "q2.png"]

    printed = capsys.readouterr().out
    for words in (
        "75.0 %",
        "30.1 to 95.4 %",
        "62.5 %",
        "direct_attributes/q4",
        "relative_position/q1: options 1 and 2 have the same loss 1",
        "Layers 2 to 5",
        "s a question on",
    ):
        assert words in " ".join(printed.split()), words
    assert "\x1b" not in printed


def test_resumed_results_are_the_same_and_load_nothing(evaluate, capsys):
    first = evaluate()
    assert len(evaluate.loads) == 1
    again = evaluate(pictures=2)
    assert evaluate.loads == [] and "10 of 10 questions are answered" in capsys.readouterr().out
    assert len(list(evaluate.workdir.glob("pictures/*/*.png"))) == 2  # drawn from the stored selections
    again["config"]["pictures"] = 0
    assert again == first


def test_a_limited_run_grows_into_the_whole_one(evaluate):
    assert evaluate(limit=2)["overall"]["n"] == 4
    vlm = FakeVLM()
    assert evaluate(vlm, batch_size=3)["overall"]["n"] == 10 and len(vlm.asked) == 6


def test_what_answers_depend_on_is_compared(evaluate):
    evaluate(limit=1)
    flex = load_config("7b").model_overrides.to_dict()
    flex["flexattention"]["threshold"] = 72.0
    for change in ({"scorer": "official"}, {"dtype": "bfloat16"}, {"model_overrides": flex}):
        with pytest.raises(WorkdirError, match=f"{next(iter(change))} was .* and is now"):
            evaluate(**change)
    evaluate(workdir="other", model_overrides=flex, dtype="bfloat16")
    (args, kwargs) = evaluate.loads[0]
    assert args == (evaluate.checkpoint,)
    overrides = {"flexattention.threshold": 72.0}
    assert kwargs == {"dtype": "bfloat16", "config_overrides": overrides, "partition": None, "weights": None}
    weights = evaluate.checkpoint / "weights"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(WorkdirError, match="checkpoint was"):
        evaluate(limit=1)


def test_fingerprints_notice_a_change_of_any_file(tmp_path):
    (tmp_path / "a").write_bytes(b"0" * 10)
    names = [checkpoint_fingerprint(tmp_path)]
    assert names[0] == checkpoint_fingerprint(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"")
    names.append(checkpoint_fingerprint(tmp_path))
    (tmp_path / "a").rename(tmp_path / "c")
    names.append(checkpoint_fingerprint(tmp_path))
    stat = (tmp_path / "c").stat()
    (tmp_path / "c").write_bytes(b"1" * 10)
    os.utime(tmp_path / "c", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    names.append(checkpoint_fingerprint(tmp_path))
    os.utime(tmp_path / "c", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    names.append(checkpoint_fingerprint(tmp_path))
    assert len(set(names)) == 5


def test_mistakes(evaluate, data_dir, tmp_path):
    with pytest.raises(DatasetError, match="craigwu/vstar_bench"):
        evaluate(data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(HarnessError, match=r"no checkpoint is given.*senfu/llava-v1.5-7b-flexattn"):
        evaluate(checkpoint="")
    with pytest.raises(HarnessError, match="nowhere does not exist"):
        evaluate(checkpoint=str(tmp_path / "nowhere"))
    with pytest.raises(HarnessError, match=r"has no config\.json"):
        evaluate(checkpoint=str(tmp_path))
    with pytest.raises(HarnessError, match="limit is -1"):
        evaluate(limit=-1)
    with pytest.raises(HarnessError, match="scorer is 'best'"):
        evaluate(scorer="best")
    assert not evaluate.workdir.exists()
    for path in data_dir.glob("*/*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(HarnessError, match=r"no question of .* could be asked"):
        evaluate()
    results = json.loads((evaluate.workdir / "results.json").read_text())
    assert results["overall"] == {"n": 0, "correct": 0, "accuracy": None, "ci95": None, "chance": None}
    assert len(results["errors"]) == 10


def test_a_benchmark_is_found_by_its_name(monkeypatch):
    called = []
    monkeypatch.setitem(run_module.RUNNERS, "vsearch", lambda settings, workdir: called.append((settings, workdir)))
    run_benchmark({"benchmark": "vsearch"}, "w")
    run_benchmark({"benchmark": "vsearch"})
    assert called == [({"benchmark": "vsearch"}, "w"), ({"benchmark": "vsearch"}, "runs/vsearch")]
    with pytest.raises(HarnessError, match=r"there is no benchmark 'vqa9'; there are .*vstar"):
        run_benchmark({"benchmark": "vqa9"})


def test_the_table_on_a_terminal_names_ten_errors_and_survives_odd_names(evaluate, data_dir):
    for k in range(12):
        (data_dir / "direct_attributes" / f"[red]{k}\udce9.json").write_text("{")
        Image.new("RGB", (4, 4)).save(data_dir / "direct_attributes" / f"[red]{k}\udce9.png")
    results = evaluate(FakeVLM(selects=False))
    screen = io.StringIO()
    print_report(results, Console(file=screen, force_terminal=True, width=200))
    text = screen.getvalue()
    assert text.count("  direct_attributes/[red]") == 10 and "and 2 more, named in results.json" in text
    assert "High resolution: no layer read any cell." in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=configs/vstar.py:13b"], "configs/vstar.py has no '13b'; write :mini, "),
        (["--config.batchsize=3"], "there is no setting 'batchsize'; did you mean 'batch_size'?"),
        (["--config=configs/vstar.py:7b", "--config.data_dir=nowhere"], "the data folder 'nowhere' does not exist"),
    ],
)
def test_the_command_ends_with_one_sentence(tmp_path, arguments, message):
    command = [sys.executable, "eval.py", f"--workdir={tmp_path / 'w'}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_the_packaged_questions_are_whole():
    questions, errors = read_vstar(demo.demo_questions())
    assert errors == [] and len(questions) >= 24
    assert {q.split for q in questions} == set(SPLITS)
    for question in questions:
        width, height = Image.open(question.image).size
        assert len(question.bbox) == len(question.target_object) == (2 if question.split == SPLITS[1] else 1)
        for x, y, box_width, box_height in question.bbox:
            assert x >= 0 and x + box_width <= width + 1 and y >= 0 and y + box_height <= height + 1
    attribution = (demo.demo_questions().parent / "ATTRIBUTION.md").read_text()
    assert all(question.image.stem in attribution for question in questions)
    size = sum(path.stat().st_size for path in demo.demo_questions().parent.rglob("*") if path.is_file())
    assert size < 6_000_000


@pytest.mark.slow
def test_the_random_model_answers_about_photographs(tmp_path, monkeypatch, capsys):
    """Random weights written, loaded, and asked about a real photograph of each split."""
    monkeypatch.chdir(tmp_path)
    settings = load_config("random").to_dict() | {"limit": 1, "pictures": 1}
    results = run_questions("vstar", settings, "w", show_progress=False)
    assert results["overall"]["n"] == 2 and results["errors"] == [] and results["unresolved"] == []
    assert results["note"] == demo.NOTE and demo.NOTE in capsys.readouterr().out
    selection = results["selection"]
    assert list(selection["layers"]) == ["9", "10", "11"] and 0.02 < selection["mean_share"] < 0.6
    assert results["timing"]["questions_in_batches_that_compiled"] == 2
    assert (tmp_path / "w" / "pictures" / "direct_attributes" / "bottle_label.png").exists()
    first = (tmp_path / demo.CHECKPOINT / "model.safetensors").read_bytes()
    demo.write_random_checkpoint(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == first
    assert not demo.is_random(tmp_path)


def test_the_demo_checkpoint_is_not_written_over_anything(tmp_path, capsys):
    folder = tmp_path / "new" / "source"
    assert demo.main([str(folder)]) == 0 and demo.is_random(folder)
    before = checkpoint_fingerprint(folder)
    assert demo.main([str(folder)]) == 0 and checkpoint_fingerprint(folder) == before
    assert demo.main([str(tmp_path)]) == 2 and "holds something else" in capsys.readouterr().err
    assert demo.main([]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("scorer", ["official", "generate"])
def test_the_other_scorers_run_on_the_real_model(tmp_path, monkeypatch, scorer):
    monkeypatch.chdir(tmp_path)
    settings = load_config("random").to_dict() | {"limit": 2, "scorer": scorer, "max_new_tokens": 3}
    results = run_questions("vstar", settings, "w", show_progress=False)
    assert results["overall"]["n"] == 4 and results["errors"] == []
    assert results["selection"]["questions"] == 4
