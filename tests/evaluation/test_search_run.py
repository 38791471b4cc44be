"""eval.py on vsearch: the table of the mini models and what is kept of it."""

import dataclasses
import importlib.util
import json
import pathlib
import re

import pytest
from conftest import random_params
from mini_search import mini_config, search_config

from flexattn_jax.checkpoints.store import save_model
from flexattn_jax.evaluation.harness import HarnessError
from flexattn_jax.evaluation.search_run import run_vsearch
from flexattn_jax.inputs.datasets.vsearch_examples import PRESETS
from flexattn_jax.inputs.word_tokenizer import write_word_tokenizer

ROOT = pathlib.Path(__file__).parents[2]


def settings(arg="mini", **changes):
    spec = importlib.util.spec_from_file_location("vstar_config", ROOT / "configs" / "vstar.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg).to_dict() | changes


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two arms of the small relative, with random weights, as training leaves them."""
    folder = tmp_path_factory.mktemp("models")
    write_word_tokenizer(folder / "words")
    for arm, enabled in (("twin", False), ("flex", True)):
        config = mini_config(
            {"flexattention.enabled": enabled, "flexattention.first_layer": 0, "decoder.num_layers": 2}
        )
        save_model(folder / arm / "model", config, random_params(config), like=folder / "words")
    return folder


def test_arms_stand_side_by_side_and_a_second_run_asks_nothing_again(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "standard", search_config(preset="standard", pictures=(0, 0, 3, 0)))
    values = settings(arms=("twin", "flex"), models=str(models), data_dir=str(tmp_path / "data"), batch_size=2)
    results = run_vsearch(values, tmp_path / "run")
    said = capsys.readouterr().out
    assert "low resolution" in said and "FlexAttention" in said and "3 pictures" in said
    assert list(results["arms"]) == ["twin", "flex"] and results["pictures"] == 3
    assert "share_of_cells_a_layer" not in results["arms"]["twin"]
    assert results["arms"]["flex"]["share_of_cells_a_layer"] == pytest.approx(3 / 9)
    assert results["arms"]["twin"]["gflop"] < results["arms"]["flex"]["gflop"]
    for arm in results["arms"].values():
        assert [counts["n"] for counts in arm["forms"].values()] == [9, 6]
    kept = json.loads((tmp_path / "run" / "results.json").read_text())
    assert kept["arms"]["flex"]["forms"] == results["arms"]["flex"]["forms"]

    monkeypatch.setattr("flexattn_jax.evaluation.search_run.ask_all", None)
    again = run_vsearch(values, tmp_path / "run")
    assert again["arms"] == results["arms"]


def test_a_packaged_model_answers_and_arms_that_are_not_packaged_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "standard", dataclasses.replace(PRESETS["standard"], pictures=(0, 0, 2, 0)))
    values = settings("mini,compare", data_dir=str(tmp_path / "data"), batch_size=2, pictures=1)
    results = run_vsearch(values, tmp_path / "run")
    assert set(results["arms"]) <= {"twin", "flex", "random", "random_swap", "all"}
    assert {"twin", "flex", "random_swap"} <= set(results["arms"])
    said = capsys.readouterr().out
    for name in ("twin", "flex", "random", "random_swap", "all"):
        assert (f"no model of `{name}` is packaged" in said) == (name not in results["arms"])
    flex, twin = (results["arms"][name] for name in ("flex", "twin"))
    assert flex["share_of_cells_a_layer"] == pytest.approx(4 / 36) and flex["share_of_dense_flops"] <= 0.25
    assert flex["forms"]["direct_attributes"]["accuracy"] > twin["forms"]["direct_attributes"]["accuracy"]
    assert len(list((tmp_path / "run" / "flex" / "pictures").iterdir())) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": "no/where"}, "there is no model in no/where/flex; give the folder of trained models"),
        (
            {"models": "m", "arms": ("flax",)},
            "arms is ('flax',); name some of twin, flex, released, random, random_swap, all",
        ),
        ({"models": "m", "limit": -1}, "limit and pictures cannot be negative"),
        ({"models": "m", "batch_size": 0}, "batch_size is 0; it must lie in 1..256"),
    ],
)
def test_mistakes_are_named(changes, message, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "standard", search_config(preset="standard", pictures=(0, 0, 1, 0)))
    with pytest.raises(HarnessError, match=re.escape(message)):
        run_vsearch(settings(data_dir=str(tmp_path / "data"), **changes), tmp_path / "run")
