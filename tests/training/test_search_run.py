"""The stages of configs/train_mini.py on a few small pictures, and the mistakes that can be made with it."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from mini_search import CHANGES, mini_config, search_config

import flexattn_jax
from flexattn_jax.checkpoints.store import load_config, load_params, save_model
from flexattn_jax.checkpoints.trees import flatten, stack_layers
from flexattn_jax.config import dotted, override
from flexattn_jax.evaluation.search import ask_all
from flexattn_jax.inputs.datasets.vsearch import decode_example, load_vsearch
from flexattn_jax.inputs.datasets.vsearch_examples import PRESETS
from flexattn_jax.inputs.word_tokenizer import write_word_tokenizer
from flexattn_jax.training.start import StartConfig, open_start
from flexattn_jax.training.state import draw_params
from flexattn_jax.training.tasks import USER_ERRORS, run_task

CONFIG = Path(__file__).parents[2] / "configs" / "train_mini.py"
FILE = importlib.util.spec_from_file_location("train_mini", CONFIG)
train_mini = importlib.util.module_from_spec(FILE)
FILE.loader.exec_module(train_mini)


@pytest.fixture(autouse=True)
def small_presets(monkeypatch):
    """vsearch in 96 pixels; validation has as many pictures as a preset says, and so few here."""
    for name in ("large", "standard", "crowded"):
        monkeypatch.setitem(PRESETS, name, search_config(name, preset=name, pictures=(8, 3, 4, 1)))


def settings(arg, data_dir, checkpoint=""):
    """Of configs/train_mini.py, for the small model and a run of a few steps."""
    config = train_mini.get_config(arg)
    config.start.checkpoint = str(checkpoint)
    config.data.update(pictures=8, data_dir=str(data_dir), text_lengths=(192,), answer_rows=(64,), eval_samples=4)
    config.tower.update(crops=2, crop_side=48)
    config.batch_size, config.epochs = 4, 2.0
    config.loop.update(log_every=1, eval_every=4, save_every=4, threads=1, pictures=int(arg == "flex"))
    values = config.to_dict()
    if arg == "tower":
        for key, value in CHANGES.items():
            *parents, leaf = key.split(".")
            node = values["model"]
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
    return values


def steps(workdir):
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "loss" in entry]


STAGES = {  # each with the one that it begins with, and the presets that it sees first
    "tower": (None, 0),
    "flex,find": ("tower", 1),
    "flex,both": ("flex,find", 1),
    "flex,small": ("flex,both", 1),
    "flex": ("flex,small", 0),
    "random": ("flex,small", 0),
    "twin,find": ("tower", 0),
}


@pytest.mark.slow
@pytest.mark.long
def test_stage_by_stage_a_model_comes_about_that_answers(tmp_path, capsys):
    data, models = tmp_path / "data", {}
    workdirs = {name: tmp_path / name.replace(",", "-") for name in STAGES}
    for arg, (stage_before, seen) in STAGES.items():
        checkpoint = workdirs[stage_before] / "model" if stage_before else ""
        values = settings(arg, data, checkpoint)
        folder = run_task(values, workdirs[arg])
        assert folder == workdirs[arg] / "model"
        models[arg] = flatten(stack_layers(load_params(folder)))
        total = 4 * len(values["data"]["presets"])  # two epochs of eight pictures of each, four a step
        assert [entry["step"] for entry in steps(workdirs[arg])] == list(range(1, total + 1))
        assert all(np.isfinite(entry["loss"]) for entry in steps(workdirs[arg]))
        said = capsys.readouterr()
        assert ("drawing vsearch" in said.err) == (arg in ("tower", "flex,both"))  # each preset is drawn once
        # Each preset is seen once, whichever way it is read.
        assert said.out.count("seeing 8 pictures once") == seen
        run_task(settings(arg, data, checkpoint), workdirs[arg])  # finished: nothing more is learned
        assert len(steps(workdirs[arg])) == total

    def changed(one, other):
        return {path for path in models[one] if not np.array_equal(models[one][path], models[other][path])}

    drawn = flatten(draw_params(load_config(workdirs["tower"] / "model"), 0, by_width=True))
    moved = {path for path in drawn if not np.array_equal(drawn[path], models["tower"][path])}
    assert moved == {path for path in drawn if path.startswith(("vision/", "connector/"))}
    answers = {path for path in drawn if path.startswith("decoder/")}
    for arg in ("flex,find", "flex,both", "flex,small", "flex", "random"):
        assert changed(arg, STAGES[arg][0]) == answers and load_config(workdirs[arg] / "model").reads_highres
    assert changed("twin,find", "tower") <= answers and not load_config(workdirs["twin,find"] / "model").reads_highres
    for arg in ("flex,find", "flex,small"):
        assert load_config(workdirs[arg] / "model").flexattention.selector == "all"
    assert load_config(workdirs["flex"] / "model").flexattention.selector == "attention"
    assert changed("flex", "random") and load_config(workdirs["random"] / "model").flexattention.selector == "random"

    example = decode_example(load_vsearch(data, "standard", "validation")[0])
    asked = example.questions[0]
    for arg in ("twin,find", "flex"):
        vlm = flexattn_jax.load(workdirs[arg] / "model")
        assert isinstance(vlm.answer([example.image], [asked.question], max_new_tokens=12)[0], str)
        losses = vlm.score([example.image], [asked.question], [asked.options], scorer="official")[0]
        assert len(losses) == len(asked.options) and np.isfinite(losses).all()
    events = b"".join(path.read_bytes() for path in (workdirs["flex"] / "tensorboard").iterdir())
    assert b"cells/0" in events


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_word_tokenizer(folder / "words")
    for name, changes in {"whole": {}, "without": {"flexattention": None, "image_size": 32}}.items():
        config = override(mini_config(), changes)
        save_model(folder / name, config, draw_params(config, 0), like=folder / "words")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "slots", "new"),
    [("dense", 16 + 144, ()), ("xattn", 16, ("cross_attn", "highres")), ("vistog", 16, ("grouping",))],
)
def test_other_ways_to_read_a_picture_are_trained_from_the_same_start(arm, slots, new, checkpoint, tmp_path):
    folder = run_task(settings(arm, tmp_path / "data", checkpoint / "whole"), tmp_path / arm)
    config, learned = load_config(folder), flatten(load_params(folder))
    assert config.num_slots == slots and not config.reads_highres
    assert steps(tmp_path / arm)[-1]["loss"] < steps(tmp_path / arm)[0]["loss"]
    drawn = {path for path in learned if any(part in path for part in new)}
    assert bool(drawn) == bool(new) and all(np.abs(learned[path]).max() > 0 for path in drawn)
    example = decode_example(load_vsearch(tmp_path / "data", "standard", "validation")[0])
    (answers,) = ask_all(flexattn_jax.load(folder), [example])
    assert np.isfinite([answer.losses for answer in answers if len(answer.losses) == 4]).all()


MISTAKES = {
    "tower": [
        ({"start": {"preset": "minni"}}, "unknown preset 'minni'; known: tiny, mini"),
        ({"start": {"preset": ""}}, "there is nothing to begin with"),
        ({"stage": "connector"}, "stage is 'connector'; it must be one of tower, answers"),
        ({"task": "mini"}, "there is no task 'mini'; there are llava, search"),
        (
            {"data": {"presets": ("standard", "hard")}},
            "data.presets is ('standard', 'hard'); name some of large, standard",
        ),
        ({"data": {"presets": ("crowded", "crowded")}}, "each once"),
        ({"data": {"presets": ()}}, "data.presets is ()"),
        ({"data": {"pictures": 0}}, "0 pictures of split 'train' are asked for"),
        ({"data": {"pictures": "many"}}, "data.pictures must be int, not 'many'"),
        ({"data": {"seed": -1}}, "seed -1 must not be negative"),
        ({"data": {"data_dir": str(CONFIG / "data")}}, "vsearch cannot be drawn into"),
        ({"tower": {"crops": 0}}, "tower.crops 0"),
        ({"tower": {"crop_side": 52}}, "tower.crop_side 52 is no multiple of the patch size 8"),
        ({"tower": {"crop_side": 104}}, "tower.crop_side 104 is larger than the pictures, 96"),
        ({"optimizer": {"trainable": "vision,prob"}}, "optimizer.trainable names 'prob'"),
        ({"model": {"vision": {"stem_strides": (4, 3)}}}, "vision.stem_strides (4, 3) must be even"),
        ({"model": {"vision": {"patch_size": 14}}}, "'vision.patch_size'; known there: stem_widths"),
    ],
    "flex": [
        ({"start": {"checkpoint": ""}}, "--config.start.checkpoint is not given; this stage begins with DIR/model of"),
        ({"start": {"checkpoint": "no/where"}}, "no/where does not exist; this stage begins with DIR/model of"),
        ({"data": {"captions": -1}}, "data.captions -1, data.columns 1, data.sides 0: none can be below 0"),
        ({"data": {"questions": False, "captions": 0, "columns": 0}}, "where no question is learned one must be above"),
        ({"model": {"flexattention": {"dropout": 1.5}}}, "flexattention.dropout"),
        ({"data": {"grounding": -1.0}}, "data.grounding is -1.0; it must be a number from 0 on"),
        ({"data": {"grounding": 1.0}, "model": {"flexattention": {"enabled": False}}}, "no maps that select"),
        ({"start": {"checkpoint": "without"}}, "without has no high-resolution projections"),
        ({"optimizer": {"trainable": "vision,decoder"}}, "the vision tower gets no gradient here"),
        ({"data": {"text_lengths": (64,)}}, "the limit is 64"),
        ({"data": {"answer_rows": (8,)}}, "the largest bucket of data.answer_rows is 8"),
        ({"model": {"flexattention": {"variant": "paper"}}}, "texts that share a beginning cannot be read by"),
    ],
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize(("arg", "change", "message"), [(a, *case) for a, cases in MISTAKES.items() for case in cases])
def test_mistakes_are_one_sentence(arg, change, message, checkpoint, data_dir, tmp_path):
    values = settings(arg, data_dir, checkpoint / "whole")
    values["data"]["keep_views"] = False
    if arg == "tower":
        values["start"]["checkpoint"] = ""
    for name, value in change.items():
        if not isinstance(value, dict):
            values[name] = value
            continue
        for key, part in value.items():
            if part == "without":
                part = str(checkpoint / part)
            if isinstance(part, dict):
                values[name].setdefault(key, {}).update(part)
            else:
                values[name][key] = part
    with pytest.raises(USER_ERRORS, match=re.escape(message)) as caught:
        run_task(values, tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arg", ["flex,find", "flex", "twin"])
def test_the_command_that_makes_the_stage_before_is_named(arg, tmp_path):
    for missing in ("", str(tmp_path / "none")):
        with pytest.raises(USER_ERRORS, match=r"python train\.py --config=configs/train_mini\.py:tower --workdir=DIR"):
            run_task(settings(arg, tmp_path, missing), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_stages_are_named_with_those_there_are():
    for unknown in ("flax", "flex,finds"):
        with pytest.raises(
            ValueError, match=r"; write :tower, :tower,more or one of :flex, :released, :all, :random, .*,find ,both"
        ):
            train_mini.get_config(unknown)
    with pytest.raises(ValueError, match="random is one model with flex: write :flex,both"):
        train_mini.get_config("random,both")


@pytest.mark.parametrize("arg", train_mini.ARMS)
def test_the_arms_differ_in_what_they_read_and_in_nothing_else(arg, checkpoint):
    values, flex = (train_mini.get_config(name).to_dict() for name in (arg, "flex"))
    start = StartConfig(**values["start"] | {"checkpoint": str(checkpoint / "whole")})
    found = open_start(start, dotted(values["model"]), 0).config
    assert found.reads_highres == (arg in ("flex", "released", "all", "random"))
    assert found.flexattention.selector == {"all": "all", "random": "random"}.get(arg, "attention")
    assert found.flexattention.revisit == (arg == "released")
    if arg in ("xattn", "vistog"):  # which have parameters of their own
        values["optimizer"]["trainable"] = flex["optimizer"]["trainable"]
    maps_select = arg in ("flex", "released")  # and are taught
    assert [v["data"].pop("grounding") for v in (values, flex)] == [maps_select, True]
    assert values | {"model": None} == flex | {"model": None}
