"""The comparison over small random mini models: its rows, its numbers, what is missing, and going on."""

import csv
import dataclasses
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import random_params
from mini_search import mini_config, search_config
from PIL import Image

from flexattn_jax.checkpoints.store import save_model
from flexattn_jax.config import override
from flexattn_jax.evaluation import compare
from flexattn_jax.evaluation.compare_costs import count_costs
from flexattn_jax.evaluation.harness import HarnessError
from flexattn_jax.evaluation.predictions import CellSelection, WorkdirError, read_predictions
from flexattn_jax.evaluation.run import run_benchmark
from flexattn_jax.evaluation.systems import COMPARISONS
from flexattn_jax.inputs.datasets.vsearch_examples import PRESETS
from flexattn_jax.inputs.word_tokenizer import write_word_tokenizer
from flexattn_jax.models.flops import decoder_flops

ROOT = Path(__file__).parents[2]
ARMS = {
    "twin": {"flexattention.enabled": False},
    "flex": {},
    "dense": {"flexattention.enabled": False, "dense.tiles": 1},
}
PICTURES, QUESTIONS = 2, 5
STANDARD = PRESETS["standard"]


def load_config(*arguments):
    spec = importlib.util.spec_from_file_location("compare_config", ROOT / "configs" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    """vsearch in 96 pixels."""
    monkeypatch.setitem(PRESETS, "standard", search_config(pictures=(0, 0, 3, 0)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two seeds of LLaVA-1.5 and FlexAttention, one of LLaVA-1.5-HD."""
    folder = tmp_path_factory.mktemp("models")
    write_word_tokenizer(folder / "words")
    for seed in (0, 1):
        for arm in ("twin", "flex", "dense")[: 3 - seed]:
            config = mini_config(ARMS[arm])
            stored = random_params(config, seed=seed)
            save_model(folder / f"seed{seed}" / arm / "model", config, stored, like=folder / "words")
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def settings(models, data_dir):
    config = load_config()
    config.models, config.vsearch.data_dir = str(models), str(data_dir)
    config.limit, config.passes = PICTURES, 1
    return lambda *systems, **changes: config.to_dict() | {"systems": systems} | changes


def check_rows(rows, workdir):
    """The accuracies are those of the predictions on disk."""
    for name, row in rows.items():
        if not row["seeds"]:
            continue
        files = [workdir / "vsearch" / name / f"seed{seed}" / "predictions.jsonl" for seed in row["seeds"]]
        each = [read_predictions(file) for file in files]
        scores = np.array([[p.score for p in one] for one in each])
        assert scores.shape == (len(row["seeds"]), PICTURES * QUESTIONS)
        assert row["overall"]["n"] == scores.shape[1]
        assert row["overall"]["accuracy"] == pytest.approx(scores.mean())
        assert row["overall"]["seeds"] == pytest.approx(scores.mean(axis=1))
        assert set(row["splits"]) == {p.split for p in each[0]}
        low, high = row["overall"]["ci95"]
        assert low <= row["overall"]["accuracy"] <= high


def check_repeated(asked, workdir, results):
    """Nothing is asked or timed again."""

    def refuse(*_, **__):
        raise AssertionError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compare, "load", refuse)
        assert run_benchmark(asked, workdir) == results


def test_a_table_without_times_that_goes_on(settings, tmp_path, capsys):
    asked = settings("lowres", "xattn", passes=0)
    results = run_benchmark(asked, tmp_path)
    rows = results["benchmarks"]["vsearch"]["systems"]
    assert (rows["lowres"]["seeds"], rows["xattn"]["seeds"]) == ([0, 1], []) and rows["lowres"]["times"] is None
    check_rows(rows, tmp_path)
    said = capsys.readouterr().out
    assert "vsearch standard, split test, 2 pictures" in said and said.count("there is no model in") == 2
    check_repeated(asked, tmp_path, results)
    # Times of another program's making.
    good = {"encode": [1, 1, 2], "prefill": [1, 1, 2], "decode": [1, 1, 2], "memory": 5, "device": "", "passes": 1}
    damaged = [
        good | {"decode": [1, 1]},
        good | {"prefill": ["1", 1, 2]},
        good | {"memory": None},
        good | {"device": 3},
    ]
    for content in ("[]", '{"lowres": 3}', "{", *(json.dumps({"lowres": times}) for times in damaged)):
        (tmp_path / "vsearch" / "times.json").write_text(content)
        with pytest.raises(HarnessError, match=r"times\.json .*; remove it to time the systems again"):
            run_benchmark(asked | {"passes": 1}, tmp_path)
    # More of the same questions go on with those that were asked.
    more = run_benchmark(asked | {"limit": 3, "systems": ("lowres",), "seeds": (0,)}, tmp_path)
    assert more["benchmarks"]["vsearch"]["systems"]["lowres"]["overall"]["n"] == 3 * QUESTIONS


@pytest.mark.slow
def test_a_table_with_what_is_missing(settings, models, tmp_path, capsys):
    asked = settings("lowres", "flex", "dense", "fastv_8", "xattn")
    results = run_benchmark(asked, tmp_path / "w")
    found = results["benchmarks"]["vsearch"]
    rows = found["systems"]
    assert {name: row["seeds"] for name, row in rows.items()} == {
        **{"lowres": [0, 1], "flex": [0, 1], "dense": [0], "fastv_8": [0, 1], "xattn": []}
    }
    check_rows(rows, tmp_path / "w")
    for row in rows.values():
        for part in ("encode", "prefill", "decode") if row["seeds"] else ():
            middle, least, most = row["times"][part]
            assert 0 < least <= middle <= most
    assert [rows[name]["costs"]["tokens_read"] for name in ("lowres", "dense")] == [16, 16 + 144]
    # Two of three layers have 16 tokens, the last 8; FlexAttention's last layer reads 3 cells of 16 tokens beside 16.
    assert rows["fastv_8"]["costs"]["tokens_read"] == pytest.approx((2 * 16 + 8) / 3)
    assert rows["flex"]["costs"]["tokens_read"] == pytest.approx(16 + 3 * 16 / 3)
    costs = {name: row["costs"]["decoder_gflop"] for name, row in rows.items() if row["costs"]}
    assert costs["fastv_8"] < costs["lowres"] < costs["flex"] < costs["dense"]
    assert rows["dense"]["times"]["memory"] > rows["lowres"]["times"]["memory"] > 4 * 30_000

    (missing,), (never, again) = rows["dense"]["problems"], rows["xattn"]["problems"]
    assert missing["seed"] == 1 and missing["reason"] == f"there is no model in {models / 'seed1' / 'dense'}"
    recipe = f"python tools/mini_study.py --out={models} --arms=xattn --seeds="
    assert never["command"] == f"{recipe}0 --train" and again["command"] == f"{recipe}1 --train"
    said = capsys.readouterr().out
    assert never["command"] in said and "vsearch standard, split test, 2 pictures" in said

    text = (tmp_path / "w" / "compare.md").read_text()
    assert text.count("\n| ") == 1 + len(rows) and never["command"] in text
    assert "![accuracy against cost](vsearch.png)" in text
    lines = list(csv.DictReader((tmp_path / "w" / "compare.csv").open()))
    assert [line["system"] for line in lines if line["split"] == "overall"] == list(rows)
    overall = {line["system"]: line for line in lines if line["split"] == "overall"}
    assert float(overall["flex"]["accuracy"]) == rows["flex"]["overall"]["accuracy"] and overall["xattn"]["n"] == "0"
    assert float(overall["flex"]["prefill_ms"]) == rows["flex"]["times"]["prefill"][0]
    picture = Image.open(tmp_path / "w" / "vsearch.png")
    assert picture.width > 1000 and len(picture.convert("L").getcolors()) > 20
    stored = json.loads((tmp_path / "w" / "results.json").read_text())
    assert stored["benchmarks"]["vsearch"] == json.loads(json.dumps(found))

    check_repeated(asked, tmp_path / "w", results)


@pytest.mark.slow
def test_several_questions_at_once_and_one_by_one_are_the_same_answers(settings, tmp_path, monkeypatch):
    """Models that cannot be asked in one pass behind the picture's prefix are asked in another way."""
    at_once = run_benchmark(settings("lowres", passes=0, seeds=(0,)), tmp_path / "at_once")
    monkeypatch.setattr(compare, "_shares_a_beginning", lambda config: False)
    one_by_one = run_benchmark(settings("lowres", passes=0, seeds=(0,)), tmp_path / "one_by_one")
    first, second = (
        {p.id: p for p in read_predictions(tmp_path / w / "vsearch" / "lowres" / "seed0" / "predictions.jsonl")}
        for w in ("at_once", "one_by_one")
    )
    assert first.keys() == second.keys()
    for name, prediction in first.items():
        np.testing.assert_allclose(prediction.losses, second[name].losses, atol=1e-4)
        assert prediction.score == second[name].score
    rows = [r["benchmarks"]["vsearch"]["systems"]["lowres"] for r in (at_once, one_by_one)]
    assert rows[0] == rows[1]


def test_a_row_whose_weights_do_not_fit_says_so_and_the_others_are_read(settings, tmp_path, monkeypatch):
    systems = dict(COMPARISONS["mini"].systems)
    crossed = {"flexattention.enabled": False, "crossattention.width": 32, "crossattention.num_heads": 4}
    systems["crossed"] = compare.System("crossed", "crossed", "twin", crossed)
    systems["many"] = compare.System("many", "many", "twin", {"reduction.method": "tome", "reduction.tokens": 400})
    monkeypatch.setitem(COMPARISONS, "mini", compare.Comparison(systems, COMPARISONS["mini"].recipes))
    results = run_benchmark(settings("lowres", "crossed", "many", passes=0, seeds=(0,)), tmp_path)
    rows = results["benchmarks"]["vsearch"]["systems"]
    assert "not stored: decoder/layers/cross_attn" in rows["crossed"]["problems"][0]["reason"]
    assert "reduction.tokens 400 is above the 16 tokens" in rows["many"]["problems"][0]["reason"]
    assert rows["lowres"]["seeds"] == [0] and rows["lowres"]["problems"] == []


def test_intervals_of_one_model_are_wilsons_and_of_several_hold_both_kinds_of_chance():
    def answered(scores):
        return [SimpleNamespace(id=str(k), score=score) for k, score in enumerate(scores)]

    rng = np.random.default_rng(0)
    one = answered(rng.random(200) < 0.6)
    assert compare.pooled_accuracy([one])["ci95"] == pytest.approx([0.52, 0.65], abs=0.05)
    low, high = compare.pooled_accuracy([one, one, one])["ci95"]
    alone = compare.pooled_accuracy([one])["ci95"]
    # Three times the same answers tell no more than once.
    assert high - low == pytest.approx(alone[1] - alone[0], rel=0.15)
    worse = answered(rng.random(200) < 0.2)
    pooled = compare.pooled_accuracy([one, worse])
    assert pooled["ci95"][1] - pooled["ci95"][0] > 1.5 * (high - low)
    assert pooled["accuracy"] == pytest.approx(np.mean(pooled["seeds"]))
    assert compare.pooled_accuracy([one, one[:50]])["n"] == 50


def test_counted_costs_are_means_over_prompts():
    config = mini_config({"flexattention.enabled": False})
    counted = count_costs(config, [10, 10, 40], [])
    by_hand = (2 * decoder_flops(config, 26) + decoder_flops(config, 56)) / 3e9
    assert counted["decoder_gflop"] == pytest.approx(by_hand) and counted["answer_gflop"] > counted["decoder_gflop"]
    kept = CellSelection((1, 2), ("e000", "7000"), 3, 12, (0, 0), 5)  # 3 of 9 cells each, 16 tokens a cell
    released, paper = (
        count_costs(mini_config({"flexattention.variant": name}), [10], [SimpleNamespace(selection=kept)])
        for name in ("released", "paper")
    )
    # 96 tokens' keys, weights and weighed features of each head, and one product with W'_V in the layer that reads.
    assert released["decoder_gflop"] - decoder_flops(config, 26) / 1e9 == pytest.approx(
        (96 * (2 * 32 * 16 + 2 * 32 + 2 * config.decoder.num_heads * 32) + 2 * 32 * 32) / 1e9
    )
    # All 26 rows read, and all values are projected.
    assert paper["decoder_gflop"] - decoder_flops(config, 26) / 1e9 == pytest.approx(
        96 * (4 * 32 * 16 + 26 * 4 * 32) / 1e9
    )
    crossed = override(config, {"crossattention.width": 32, "crossattention.num_heads": 4, "crossattention.tiles": 1})
    assert count_costs(crossed, [10], [])["tokens_read"] == 16 + 144


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_row_has_a_recipe_and_the_config_takes_it(name):
    comparison = COMPARISONS[name]
    assert {system.arm for system in comparison.systems.values()} <= set(comparison.recipes)
    assert len({system.title for system in comparison.systems.values()}) == len(comparison.systems)
    assert load_config(name).comparison == name
    for system in comparison.systems.values():
        filled = comparison.recipes[system.arm].format(models="MODELS", seed=0, folder="FOLDER")
        assert ("MODELS" in filled or "FOLDER" in filled) and "{" not in filled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": "", "comparison": "7b", "systems": ()}, "no models are given: --config.models=DIR"),
        ({"models": "nowhere"}, "the folder of models nowhere does not exist"),
        ({"systems": ("flexx",)}, "systems names 'flexx'; there are lowres, dense"),
        ({"benchmarks": ("vsearch", "vqa")}, "there is no benchmark 'vqa'; there are vsearch, vstar"),
        ({"benchmarks": ("textvqa:words",)}, "textvqa has no variant 'words'; it has"),
        ({"benchmarks": ()}, "benchmarks is empty"),
        ({"benchmarks": (1,)}, "there is no benchmark '1'"),
        ({"comparison": "nosuch"}, "comparison is 'nosuch'; there are mini, "),
        ({"seeds": ("a",)}, r"seeds is \('a',\); they are whole numbers"),
        ({"passes": -1}, "passes and limit cannot be negative"),
    ],
)
def test_mistakes(settings, tmp_path, changes, message):
    with pytest.raises(HarnessError, match=message):
        run_benchmark(settings("lowres") | changes, tmp_path)


def test_without_models_the_packaged_ones_are_read(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "standard", dataclasses.replace(STANDARD, pictures=(0, 0, 1, 0)))
    packaged = ("lowres", "dense", "xattn", "vistog", "flex")
    results = run_benchmark(settings(*packaged, "random", passes=0, limit=1) | {"models": ""}, tmp_path)
    rows = results["benchmarks"]["vsearch"]["systems"]
    for name in packaged:
        assert rows[name]["seeds"] == [None] and not rows[name]["problems"], name
    assert all(rows[name]["overall"]["accuracy"] > rows["vistog"]["overall"]["accuracy"] for name in ("dense", "xattn"))
    command = "python tools/mini_study.py --out=runs/mini --arms=random --seeds=0 --train"
    assert [problem["command"] for problem in rows["random"]["problems"]] == [command]


def test_other_models_in_the_same_workdir_are_refused(settings, models, tmp_path):
    run_benchmark(settings("lowres", passes=0, seeds=(0,), limit=1), tmp_path)
    with pytest.raises(WorkdirError, match=r"holds another run \(.*seed was 0 and is now 1"):
        changed = settings("lowres", passes=0, seeds=(0,), limit=1)
        run_benchmark(changed | {"vsearch": changed["vsearch"] | {"seed": 1}}, tmp_path)


def test_without_matplotlib_no_chart_is_drawn_and_that_is_said(settings, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *of: None if name == "matplotlib" else find(name, *of))
    run_benchmark(settings("lowres", passes=0, limit=1), tmp_path)
    said = capsys.readouterr().out
    assert "they need matplotlib" in said and "and 0 charts in" in said
    assert (tmp_path / "compare.md").is_file() and not list(tmp_path.glob("*.png"))
