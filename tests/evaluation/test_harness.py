"""What the harness asks, how it counts, and what one broken question does to the others."""

import dataclasses
import json
import math

import pytest
from evaluation.fakes import CELL_GRID, LAYERS, FakeVLM

from flexattn_jax.evaluation import harness
from flexattn_jax.evaluation.benchmarks import BENCHMARKS
from flexattn_jax.evaluation.harness import HarnessError, evaluate, unpack_cells
from flexattn_jax.evaluation.predictions import PredictionLog
from flexattn_jax.inputs.batching import BatchError
from flexattn_jax.inputs.datasets.vstar import read_vstar

SCORERS = BENCHMARKS["vstar"].scorers


def run(data_dir, workdir, vlm, scorer="released", **kwargs):
    """(predictions by id, errors) of a whole folder."""
    questions, _ = read_vstar(data_dir)
    with PredictionLog(workdir, {}, questions) as log:
        errors = evaluate(lambda: vlm, questions, log, SCORERS[scorer], show_progress=False, **kwargs)
        return dict(log.finished), errors


SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. USER: <image>\n"
)


def test_each_scorer_puts_the_published_words(data_dir, tmp_path):
    texts = {}

    class Spy(FakeVLM):
        def score_prompts(self, images, prompts, continuations):
            texts.setdefault(scorer, (prompts[0], continuations[0]))
            return super().score_prompts(images, prompts, continuations)

        def generate_prompts(self, images, prompts, max_new_tokens):
            texts.setdefault(scorer, (prompts[0], max_new_tokens))
            return super().generate_prompts(images, prompts, max_new_tokens)

    for scorer in SCORERS:
        run(data_dir, tmp_path / scorer, Spy(), scorer=scorer, max_new_tokens=7)
    question = "What about direct_attributes number 0?"
    assert texts["released"] == (
        f"{SYSTEM}{question}\nAnswer the question using a single word or phrase. ASSISTANT:",
        [" Thing 0 is red.", " Thing 0 is blue.", " Thing 0 is green.", " Thing 0 is white."],
    )
    assert texts["official"] == (
        f"{SYSTEM}{question} ASSISTANT:",
        [" Thing 0 is red.</s>", " Thing 0 is blue.</s>", " Thing 0 is green.</s>", " Thing 0 is white.</s>"],
    )
    prompt, max_new_tokens = texts["generate"]
    assert max_new_tokens == 7
    head, *lettered, tail = prompt.removeprefix(SYSTEM).split("\n")
    assert head == question
    assert [line[:3] for line in lettered] == ["A. ", "B. ", "C. ", "D. "]
    assert {line[3:] for line in lettered} == {f"Thing 0 is {c}." for c in ("red", "blue", "green", "white")}
    assert tail == "Answer with the option's letter from the given choices directly. ASSISTANT:"


def test_losses_decide_and_ties_and_nan_are_wrong(data_dir, tmp_path):
    vlm = FakeVLM(
        {
            "attributes number 1": [2.0, 1.0, 3.0, 4.0],
            "attributes number 2": [1.0, 1.0, 3.0, 4.0],
            "attributes number 3": [math.nan, 1.0, 3.0, 4.0],
            "position number 0": [1.0, math.nan],
        }
    )
    found, errors = run(data_dir, tmp_path / "w", vlm, batch_size=3)
    assert errors == [] and len(found) == 10
    outcome = {name: (p.choice, p.score, p.reason) for name, p in found.items()}
    assert outcome["direct_attributes/q0"] == (0, 1, None)
    assert outcome["direct_attributes/q1"] == (1, 0, None)
    assert outcome["direct_attributes/q2"] == (None, 0, "tie")
    assert outcome["direct_attributes/q3"] == (None, 0, "not finite")
    assert outcome["relative_position/q0"] == (None, 0, "not finite")
    assert vlm.calls == [3, 3, 3, 1]


def test_a_letter_is_counted_as_the_option_that_was_shown_under_it(data_dir, tmp_path):
    class Reader(FakeVLM):
        """Answers with the letter under which "red" was shown."""

        def _given(self, prompt, default):
            return next(line[0] for line in prompt.split("\n") if line.endswith("is red."))

    found, _ = run(data_dir, tmp_path / "right", Reader(), scorer="generate")
    assert all(p.score == 1 and p.choice == 0 for p in found.values())
    assert len({p.output for p in found.values()}) > 1  # the right letter is not always the same one

    found, _ = run(data_dir, tmp_path / "a", FakeVLM(), scorer="generate")  # always "A"
    assert 0 < sum(p.score for p in found.values()) < 10
    found, _ = run(data_dir, tmp_path / "wordy", FakeVLM({"What": "A or B"}), scorer="generate")
    assert {(p.choice, p.score, p.reason) for p in found.values()} == {(None, 0, "unparsed")}


def test_option_order_in_the_file_does_not_change_what_is_shown(data_dir, tmp_path):
    question = read_vstar(data_dir)[0][0]
    turned = dataclasses.replace(question, options=question.options[::-1])
    ask = SCORERS["generate"].ask
    assert harness.prompt(turned, ask) == harness.prompt(question, ask)


def test_a_broken_picture_is_named_and_the_run_goes_on(data_dir, tmp_path):
    whole = (data_dir / "direct_attributes" / "q1.png").read_bytes()
    (data_dir / "direct_attributes" / "q1.png").write_bytes(whole[: len(whole) // 2])
    (data_dir / "relative_position" / "q0.png").write_bytes(b"")
    (data_dir / "relative_position" / "q1.png").write_text("no picture")
    found, errors = run(data_dir, tmp_path / "w", FakeVLM(), batch_size=4)
    broken = {"direct_attributes/q1", "relative_position/q0", "relative_position/q1"}
    assert {e.id for e in errors} == broken
    assert all(str(data_dir / f"{e.id}.png") in e.reason for e in errors)
    assert len(found) == 7 and not broken & set(found)

    # A repaired picture is asked by the next run; nothing else is asked again.
    for name in broken:
        (data_dir / f"{name}.png").write_bytes(whole)
    again = FakeVLM()
    found, errors = run(data_dir, tmp_path / "w", again)
    assert errors == [] and len(found) == 10 and len(again.asked) == 3


def test_a_question_that_the_model_refuses_does_not_take_its_batch_along(data_dir, tmp_path):
    vlm = FakeVLM({"attributes number 2": BatchError("a prompt has 9999 tokens; shorten it")})
    found, errors = run(data_dir, tmp_path / "w", vlm, batch_size=5)
    assert [e.id for e in errors] == ["direct_attributes/q2"] and "9999 tokens" in errors[0].reason
    assert len(found) == 9
    # A fault of the program is no fault of the question.
    with pytest.raises(ZeroDivisionError):
        run(data_dir, tmp_path / "w2", FakeVLM({"attributes number 2": ZeroDivisionError()}))


def test_selections_are_kept_bit_by_bit(data_dir, tmp_path):
    vlm = FakeVLM()
    found, _ = run(data_dir, tmp_path / "w", vlm)
    prediction = found["direct_attributes/q0"]
    expected = vlm._selection(vlm.asked[0])
    assert prediction.selection.layers == LAYERS
    assert unpack_cells(prediction.selection).shape == (len(LAYERS), CELL_GRID**2)
    assert (unpack_cells(prediction.selection) == expected.cells).all()
    assert prediction.selection.cells_read == expected.cells_read
    found, _ = run(data_dir, tmp_path / "w2", FakeVLM(selects=False))
    assert all(p.selection is None for p in found.values())


def test_compilations_are_noticed(data_dir, tmp_path):
    import jax

    class Compiling(FakeVLM):
        def score_prompts(self, images, prompts, continuations):
            if len(self.calls) == 1:
                jax.jit(lambda x: x * 3.5 + len(self.calls))(1.0)
            return super().score_prompts(images, prompts, continuations)

    found, _ = run(data_dir, tmp_path / "w", Compiling(), batch_size=5)
    assert [p.compiled for p in found.values()] == [False] * 5 + [True] * 5
    assert all(p.seconds > 0 and p.device == jax.devices()[0].device_kind for p in found.values())


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"max_new_tokens": 0}])
def test_impossible_requests(data_dir, tmp_path, wrong):
    with pytest.raises(HarnessError, match=next(iter(wrong))):
        run(data_dir, tmp_path / "w", FakeVLM(), **wrong)


def test_a_finished_run_does_not_load_the_model(data_dir, tmp_path):
    run(data_dir, tmp_path / "w", FakeVLM())
    questions, _ = read_vstar(data_dir)
    with PredictionLog(tmp_path / "w", {}, questions) as log:
        assert evaluate(lambda: 1 / 0, questions, log, SCORERS["released"], show_progress=False) == []
    assert len((tmp_path / "w" / "predictions.jsonl").read_text().splitlines()) == 10
    json.loads((tmp_path / "w" / "predictions.jsonl").read_text().splitlines()[0])
