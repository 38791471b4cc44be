"""Every benchmark from its files to results.json with a model that answers at once: words, scores, figures, exports."""

import importlib.util
import json
from pathlib import Path

import pytest
from evaluation.fakes import FakeVLM
from inputs import layouts

from flexattn_jax.evaluation import demo
from flexattn_jax.evaluation import run as run_module
from flexattn_jax.evaluation.benchmarks import BENCHMARKS
from flexattn_jax.evaluation.harness import HarnessError
from flexattn_jax.evaluation.predictions import WorkdirError
from flexattn_jax.evaluation.rescore import main, rescore
from flexattn_jax.evaluation.run import RUNNERS, run_benchmark

ROOT = Path(__file__).parent.parent.parent
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def load_config(name, *arguments):
    spec = importlib.util.spec_from_file_location(f"{name}_config", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Evaluates a small copy of a benchmark; gives results, the model that was asked, and what was printed."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")

    def run(name, answers=None, variant="", workdir="w", **settings):
        data = tmp_path / name
        if not data.exists():
            layouts.LAYOUTS[name](data)
        vlm = answers if isinstance(answers, FakeVLM) else FakeVLM(answers or {})
        monkeypatch.setattr(run_module, "load", lambda *_, **__: vlm)
        config = load_config(name, *([variant] if variant else [])).to_dict()
        config |= {"data_dir": str(data), "checkpoint": str(checkpoint)} | settings
        results = RUNNERS[name](config, tmp_path / workdir, show_progress=False)
        return results, vlm, capsys.readouterr().out

    run.folder = tmp_path
    return run


def words(prompt):
    assert prompt.endswith(" ASSISTANT:")
    return prompt.split("USER: <image>\n", 1)[1].removesuffix(" ASSISTANT:")


def figure(results, name):
    return next(one for one in results["figures"] if one["name"].startswith(name))


def by_id(run, workdir="w"):
    lines = (run.folder / workdir / "predictions.jsonl").read_text().splitlines()
    return {p["id"]: p for p in map(json.loads, lines)}


@pytest.mark.parametrize("name", sorted(layouts.LAYOUTS))
def test_each_config_runs_resumes_and_is_scored_again(name, run):
    results, vlm, printed = run(name, pictures=1, batch_size=2)
    assert results["answers"] == len(vlm.asked) > 0 and all(len(batch_prompt) > 20 for batch_prompt in vlm.asked)
    assert words(vlm.asked[0]) in printed  # the prompt is printed, so that protocols are not mixed up
    assert len(list((run.folder / "w" / "pictures").rglob("*.png"))) == 1
    assert results["config"]["scorer"] == next(iter(BENCHMARKS[name].scorers))
    again, unasked, _ = run(name, pictures=1, batch_size=3)
    assert unasked.asked == [] and again["overall"] == results["overall"] and again["figures"] == results["figures"]

    scored, changed = rescore(run.folder / "w" / "predictions.jsonl")
    assert changed == 0
    for key in ("overall", "splits", "figures", "unresolved", "answers"):
        assert scored[key] == results[key], key


@pytest.mark.parametrize("name", sorted(layouts.LAYOUTS))
def test_each_config_names_its_variants(name):
    benchmark = BENCHMARKS[name]
    for variant in benchmark.variants:
        config = load_config(name, *([variant] if variant else []))
        assert (config.benchmark, config.variant) == (name, variant) and config.scorer in benchmark.scorers
    with pytest.raises(ValueError, match=f"configs/{name}.py has no 'nonsense'; write configs/{name}.py"):
        load_config(name, "nonsense")


def test_every_benchmark_has_a_config_and_a_runner():
    configs = {path.stem for path in (ROOT / "configs").glob("*.py") if not path.stem.startswith("train")}
    assert set(BENCHMARKS) <= configs and set(BENCHMARKS) <= set(RUNNERS)
    assert set(layouts.LAYOUTS) == set(BENCHMARKS) - {"vstar"}


def test_words_of_the_prompts(run):
    def first(name, variant="", **settings):
        return words(run(name, variant=variant, workdir=f"{name}{variant}{settings}", **settings)[1].asked[0])

    kite = "What color is the kite?"
    assert first("magnifier") == f"{kite}\nA. Red\nB. Blue\nC. Light green\nD. White{LETTER}"
    options = "A. Red, B. Blue, C. Light green, D. White"
    assert first("magnifier", scorer="official") == (
        f"Answer with the option letter from the given choices directly. {kite} {options}"
    )
    assert first("textvqa") == f"what is the brand of this camera?{SHORT}"
    assert first("textvqa", "ocr") == (
        f"What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL, Single-Use{SHORT}"
    )
    assert first("rsvqa") == f"Is there a road?{SHORT}"
    assert first("gqa") == f"Is it overcast?{SHORT}"
    assert first("vqav2") == f"Where is he looking?{SHORT}"
    assert first("pope") == f"Is there a snowboard in the image?{SHORT}"
    assert first("mme") == f"Is there existence?{SHORT}"
    assert first("mmvet") == "What is x in the equation?"
    assert first("refcoco") == (
        "Please provide the bounding box coordinate of the region this sentence describes: the dog's ear."
    )
    assert first("hrbench") == f"What color is bag 0?\nA. red\nB. blue\nC. green\nD. white{LETTER}"
    assert first("mmbench") == (
        'Look at "the\ntail".\nWhich of these is true?\nA. It has a black tail.\nB. It has a white tail.\nC. It flies.'
        + LETTER
    )


def test_magnifiers_published_and_strict_rules_differ_on_wordy_answers(run):
    results, *_ = run("magnifier", {"kite": "Blue", "dogs": "one or A lot"})
    found = by_id(run)
    assert (found["MAG_INS_1"]["choice"], found["MAG_INS_1"]["score"]) == (1, 1)  # the B of "Blue"
    assert (found["MAG_INS_2"]["choice"], found["MAG_INS_2"]["score"]) == (0, 1)  # the A of "A lot"
    assert results["overall"]["accuracy"] == 1
    strict, changed = rescore(run.folder / "w" / "predictions.jsonl", "strict")
    assert changed == 1 and strict["overall"]["correct"] == 1  # "Blue" is the option's text
    assert [u["id"] for u in strict["unresolved"]] == ["MAG_INS_2"]


def test_textvqa_gives_part_of_a_point(run):
    results, _, printed = run("textvqa", {"camera": "Dakota.", "white text": "copenhagen!"})
    assert results["overall"] == {
        **{"n": 2, "correct": pytest.approx(1.3), "accuracy": pytest.approx(0.65), "chance": None},
        "ci95": pytest.approx([0.1522, 0.9505], abs=1e-4),
    }
    assert "65.0 %" in printed and " 1.3 " in printed


def test_vqav2(run):
    results, *_ = run("vqav2", {"looking": "down", "people": "two", "soup": "Yes"})
    # Nine of ten "2"s are matched by "two", which was normalised; three of ten say yes.
    assert {name: one["accuracy"] for name, one in results["splits"].items()} == {
        **{"other": 1, "number": 1, "yes/no": pytest.approx(0.9)},
    }


def test_vqav2s_secret_answers_are_exported_for_every_question_of_test2015(run):
    results, _, printed = run("vqav2", {"day": "Two, the  dogs."}, variant="test-dev")
    content = json.loads((run.folder / "w" / "vqav2_answers.json").read_text())
    assert content == [{"question_id": 1000, "answer": "2 dogs"}, {"question_id": 14000, "answer": ""}]
    assert results["overall"]["n"] == 0 and results["figures"] == []
    assert "1 answers were written for the evaluation server" in printed and "accuracy" not in printed


def test_mmvet_exports_what_its_judge_reads(run):
    _, _, printed = run("mmvet", {"What is x": "x is -1", "What is d": "5\nI think."})
    content = json.loads((run.folder / "w" / "mmvet_answers.json").read_text())
    assert content == {"v1_0": "x is -1", "v1_1": "5\nI think."}
    assert "2 answers were written for MM-Vet's judge model; none is scored here" in " ".join(printed.split())


def test_rsvqa_compares_whole_words(run):
    results, *_ = run("rsvqa", {"Is there a road": "Yes", "more roads": "No.", "small road": "NO"})
    assert {name: one["correct"] for name, one in results["splits"].items()} == {"presence": 2, "comp": 0}
    assert results["overall"]["accuracy"] == pytest.approx(2 / 3)
    assert figure(results, "mean of the types")["value"] == 0.5


def test_gqa(run):
    results, *_ = run("gqa", {"overcast": "No..", "wearing": "Woman", "red or blue": "the red"})
    assert {name: one["correct"] for name, one in results["splits"].items()} == {"verify": 1, "query": 1, "choose": 0}
    assert figure(results, "binary")["value"] == 0.5 and figure(results, "open")["value"] == 1


def test_pope_f1(run):
    results, *_ = run("pope", {"snowboard": "Yes", "zebra": "yes", "person": "no", "fork": "It is not there."})
    assert figure(results, "F1, random")["value"] == pytest.approx(2 / 3)  # precision 1/2, recall 1
    assert figure(results, "precision, random")["value"] == 0.5
    assert figure(results, "F1, popular")["value"] == figure(results, "F1, adversarial")["value"] == 1
    mean = figure(results, "F1, mean")
    assert mean["value"] == pytest.approx(8 / 9) and mean["ci95"][0] <= mean["value"] <= mean["ci95"][1]
    assert figure(results, "answers yes, random")["value"] == 1
    assert results["overall"]["accuracy"] == pytest.approx(5 / 6) and results["overall"]["chance"] == 0.5


def test_pope_without_a_yes(run):
    results, *_ = run("pope", {"Is there": "no"})
    assert figure(results, "F1, mean")["value"] == figure(results, "precision, random")["value"] == 0


def test_mmbench_is_right_only_in_every_order(run):
    class Letter(FakeVLM):
        """Always right about the tail; A whatever is asked about the day."""

        def _given(self, prompt, default):
            if "black tail" not in prompt:
                return "A"
            return next(line[0] for line in prompt.split("\n") if line.endswith("It has a black tail."))

    results, *_ = run("mmbench", Letter())
    assert figure(results, "right in every order") == {
        **{"name": "right in every order of the options", "value": 0.5, "n": 2, "points": False},
        "ci95": pytest.approx((0.0945, 0.9055), abs=1e-3),
    }
    assert figure(results, "one pass")["value"] == 1 and figure(results, "one pass")["n"] == 2
    assert results["overall"]["accuracy"] == 0.8 and results["overall"]["chance"] == pytest.approx((3 / 3 + 2 / 2) / 5)


def test_a_question_that_was_not_asked_in_every_order_is_no_part_of_that_figure(run):
    results, *_ = run("mmbench", limit=1)
    assert results["overall"]["n"] == 2 and [one["name"] for one in results["figures"]] == ["one pass"]


def test_hrbench_rules_without_a_judge_model(run):
    results, *_ = run("hrbench", {"bag 0": "A bag in blue", "bag 1": "The answer is (B)."})
    found = by_id(run)
    assert found["0"]["choice"] == 0  # the article "A" stands alone
    assert found["4"]["choice"] == 1
    assert results["overall"]["correct"] == 2 and figure(results, "right in every order")["value"] == 0
    strict, changed = rescore(run.folder / "w" / "predictions.jsonl", "strict")
    assert changed == 1 and len(strict["unresolved"]) == 4 and strict["overall"]["correct"] == 1


def test_mme_points(run):
    answers = {"existence": "Yes", "none": "no", "OCR": "Well", "code": "yes", "painting": "Yes", "glassware": "Yes"}
    results, _, printed = run("mme", answers)
    perception, cognition = figure(results, "perception"), figure(results, "cognition")
    # existence 100 + 100, OCR 50 + 0 ("Well" says nothing), artwork 50 + 0; code 100 + 100.
    assert (perception["value"], perception["name"]) == (300, "perception, 3 of 10 categories")
    assert (cognition["value"], cognition["points"]) == (200, True)
    assert [u["id"] for u in results["unresolved"]] == ["OCR/0001/1"] and "300.0 " in printed


def test_refcoco_counts_half_an_overlap(run):
    answers = {"ear": "[0.0, 0.0, 0.1, 0.2]", "all of it": "(0, 0, 1, 0.5)", "half": "on the left"}
    results, *_ = run("refcoco", answers)
    assert {name: (one["n"], one["correct"]) for name, one in results["splits"].items()} == {
        **{"small": (1, 1), "large": (2, 1)},  # exactly a half is enough
    }
    assert figure(results, "mean overlap")["value"] == pytest.approx(0.5)
    assert [u["reason"] for u in results["unresolved"]] == ["unparsed"]


def test_vstars_scorers_agree_where_losses_do_and_differ_where_they_do_not(run, monkeypatch, data_dir):
    """The two scorers ask in other words; the verdict on the same losses is the same."""
    asked = {}

    class Losses(FakeVLM):
        def score_prompts(self, images, prompts, continuations):
            asked.setdefault(scorer, (prompts[0], continuations[0]))
            return super().score_prompts(images, prompts, continuations)

    agreeing, differing = {}, {}
    for scorer in ("released", "official"):
        for found, given in (
            (agreeing, {"number 1": [3.0, 1.0, 2.0, 2.5], "number 2": [1.0, 1.0, 2.0, 2.0]}),
            # A model to which the end of the sentence matters prefers another option once it is counted.
            (differing, {"number 1": [1.0, 2.0, 3.0, 3.0] if scorer == "released" else [2.0, 1.0, 3.0, 3.0]}),
        ):
            config = load_config("vstar", "7b").to_dict() | {"scorer": scorer, "data_dir": str(data_dir)}
            config |= {"checkpoint": str(run.folder / "checkpoint")}
            vlm = Losses({"direct_attributes " + text: losses for text, losses in given.items()})
            monkeypatch.setattr(run_module, "load", lambda *_, vlm=vlm, **__: vlm)
            workdir = f"{scorer}{len(found)}{id(found)}"
            RUNNERS["vstar"](config, run.folder / workdir, show_progress=False)
            found[scorer] = {name: (p["choice"], p["score"]) for name, p in by_id(run, workdir).items()}
    assert agreeing["released"] == agreeing["official"]
    assert agreeing["released"]["direct_attributes/q1"] == (1, 0)
    assert agreeing["released"]["direct_attributes/q2"] == (None, 0)  # a tie
    assert differing["released"]["direct_attributes/q1"] == (0, 1)
    assert differing["official"]["direct_attributes/q1"] == (1, 0)
    path = run.folder / workdir / "predictions.jsonl"
    scored, changed = rescore(path)
    assert changed == 0 and scored["overall"]["n"] == 10 and scored["config"]["scorer"] == "official"
    with pytest.raises(WorkdirError, match="asked for scorer 'official'"):
        rescore(path, "released")
    (released, options), (official, ended) = asked["released"], asked["official"]
    assert words(released) == words(official) + SHORT and [option + "</s>" for option in options] == ended


def test_scoring_again_asks_for_a_scorer_with_the_same_words(run, capsys):
    run("magnifier", {"kite": "Blue"})
    path = str(run.folder / "w" / "predictions.jsonl")
    assert main([path, "--scorer", "strict", "--out", str(run.folder / "again.json")]) == 0
    printed = capsys.readouterr().out
    assert "magnifier, scorer strict" in printed and "predictions have another score than in" in printed
    assert json.loads((run.folder / "again.json").read_text())["config"]["scorer"] == "strict"
    assert main([path, "--scorer", "official"]) == 2
    error = capsys.readouterr().err
    assert "asked for scorer 'released', so they can be scored by released or strict, not by 'official'" in error
    assert (
        main([path, "--out", str(run.folder / "no" / "such")]) == 2
        and "cannot be read or written" in capsys.readouterr().err
    )


def test_scoring_again_says_what_is_wrong_with_the_files(run, capsys):
    run("magnifier")
    folder = run.folder / "w"
    assert main([str(run.folder / "predictions.jsonl")]) == 2 and "run.json is missing" in capsys.readouterr().err
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    (folder / "predictions.jsonl").write_text(f'{lines[0]}\n{{"id": 3}}\n')
    assert main([str(folder / "predictions.jsonl")]) == 2 and "line 2 of" in capsys.readouterr().err
    (folder / "run.json").write_text('{"benchmark": "vsearch", "scorer": "x"}')
    assert main([str(folder / "predictions.jsonl")]) == 2 and "names no benchmark" in capsys.readouterr().err


def test_requests_that_cannot_be_met(run):
    with pytest.raises(HarnessError, match="scorer is 'best'; it must be one of released, strict, official"):
        run("magnifier", scorer="best")
    with pytest.raises(HarnessError, match="variant is '2k'; it must be one of 4k, 8k"):
        run_benchmark(load_config("hrbench").to_dict() | {"variant": "2k"})
    run("hrbench")
    with pytest.raises(WorkdirError, match='variant was "4k" and is now "8k"'):
        run("hrbench", variant="8k")


def test_a_damaged_picture_in_a_table_is_named_and_the_run_goes_on(run):
    layouts.hrbench(run.folder / "hrbench")
    path = run.folder / "hrbench" / "hr_bench_4k.tsv"
    lines = path.read_text().split("\n")
    lines[3] = lines[3][:-200]
    lines[5] = lines[5].replace(layouts.encoded(0), "%%%")
    path.write_text("\n".join(lines))
    results, *_ = run("hrbench")
    assert results["overall"]["n"] == 6 and [e["id"] for e in results["errors"]] == ["2", "4"]
    assert all(
        f"the picture of row {row} of {path}" in e["reason"] for row, e in zip((3, 5), results["errors"], strict=True)
    )


@pytest.mark.slow
def test_written_answers_do_not_depend_on_the_batch(tmp_path, monkeypatch):
    """The real model on random weights, prompts of different lengths, one at a time and three at once."""
    monkeypatch.chdir(tmp_path)
    demo.write_random_checkpoint(tmp_path / "checkpoint")
    layouts.mme(tmp_path / "mme")
    settings = load_config("mme").to_dict() | {"data_dir": "mme", "checkpoint": "checkpoint", "max_new_tokens": 5}
    outputs = []
    for size in (1, 3):
        RUNNERS["mme"](settings | {"batch_size": size}, tmp_path / str(size), show_progress=False)
        lines = (tmp_path / str(size) / "predictions.jsonl").read_text().splitlines()
        outputs.append({p["id"]: (p["output"], p["selection"]["cells"]) for p in map(json.loads, lines)})
    assert outputs[0] == outputs[1] and len(outputs[0]) == 8
