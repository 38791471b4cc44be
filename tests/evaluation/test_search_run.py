"""eval.py on vsearch: the table of the mini models, what is kept of it, and the models that come with the package."""

import importlib.util
import json
import pathlib
import re

import pytest
from conftest import random_params
from mini_search import mini_config, search_config

from flexattn_jax.api import load
from flexattn_jax.checkpoints.store import save_model
from flexattn_jax.evaluation.harness import HarnessError
from flexattn_jax.evaluation.search_run import packaged_models, run_vsearch
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
    values = settings(models=str(models), data_dir=str(tmp_path / "data"), batch_size=2)
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": "no/where"}, "there is no model in no/where/twin; give the folder of trained models"),
        ({"arms": ("flax",)}, "arms is ('flax',); name some of twin, flex, random, random_swap, all"),
        ({"limit": -1}, "limit and pictures cannot be negative"),
    ],
)
def test_mistakes_are_named(changes, message, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "standard", search_config(preset="standard", pictures=(0, 0, 1, 0)))
    with pytest.raises(HarnessError, match=re.escape(message)):
        run_vsearch(settings(data_dir=str(tmp_path / "data"), **changes), tmp_path / "run")


def test_the_packaged_models_are_small_and_differ_in_what_they_read():
    flex, twin = (load(packaged_models() / arm) for arm in ("flex", "twin"))
    assert flex.config.reads_highres and not twin.config.reads_highres
    assert flex.config.flexattention.capacity == 8 and flex.config.flexattention.num_cells == 64
    assert sum(path.stat().st_size for path in packaged_models().rglob("*") if path.is_file()) < 25e6


@pytest.mark.slow
def test_the_packaged_models_show_what_high_resolution_is_worth(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "standard", search_config(preset="standard", **STANDARD))
    results = run_vsearch(settings(data_dir=str(tmp_path / "data")), tmp_path / "run")
    twin, flex = (results["arms"][arm]["forms"]["direct_attributes"]["accuracy"] for arm in ("twin", "flex"))
    assert flex > 0.85 and flex > twin + 0.25


# The preset itself, with fewer pictures.
STANDARD = {
    name: getattr(PRESETS["standard"], name)
    for name in ("picture_side", "object_sides", "num_objects", "attribute_questions", "relation_questions")
} | {"pictures": (0, 0, 60, 0), "seed": 77}
