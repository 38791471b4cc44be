"""The benchmarks: how each is read, asked and scored by its published protocol; docs/benchmarks.md has the sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flexattn_jax.evaluation import figures, metrics, parsers, vqa_accuracy
from flexattn_jax.evaluation.benchmark import Ask, Benchmark, Export, Scorer, Verdict
from flexattn_jax.evaluation.predictions import Prediction
from flexattn_jax.inputs.datasets import (
    gqa,
    hrbench,
    magnifier,
    mmbench,
    mme,
    mmvet,
    pope,
    refcoco,
    rsvqa,
    textvqa,
    vqav2,
    vstar,
)
from flexattn_jax.inputs.datasets.questions import Question
from flexattn_jax.inputs.prompts import LETTER_ANSWER, SHORT_ANSWER, format_options
from flexattn_jax.requests import scorer_continuation, scorer_question

_LETTERS_OF_OTTER = "Answer with the option letter from the given choices directly."
_REGION = "Please provide the bounding box coordinate of the region this sentence describes: {}."
_ENOUGH_OVERLAP = 0.5


# Verdicts: what an answer is worth.


def lowest_loss(prediction: Prediction) -> Verdict:
    """The option with the lowest loss; ties and losses that are not finite are wrong."""
    choice = metrics.choose(prediction.losses)
    return Verdict(float(choice.index == prediction.target), choice.index, choice.reason, choice.detail)


def option(prediction: Prediction, parse: Callable[[str, Sequence[str]], int | None]) -> Verdict:
    """The option that `parse` finds in the model's words, given the options in the order shown."""
    order = prediction.order or range(len(prediction.options))
    place = parse(prediction.output, [prediction.options[index] for index in order])
    if place is None:
        detail = f"the answer {_short(prediction.output)!r} names no single option"
        return Verdict(0.0, reason="unparsed", detail=detail)
    return Verdict(float(order[place] == prediction.target), order[place])


def soft(prediction: Prediction, accuracy: Callable[[str, Sequence[str]], float]) -> Verdict:
    """A score of the model's words against several people's; none where these are secret."""
    return Verdict(None if not prediction.answers else accuracy(prediction.output, prediction.answers))


def same_text(prediction: Prediction) -> Verdict:
    """Right if the words are the answer, capitals aside: "Yes." is not "yes"."""
    return Verdict(float(prediction.output.lower() == prediction.answers[0].lower()))


def same_without_period(prediction: Prediction) -> Verdict:
    """GQA's: right if the words in lower case, without periods at the end, are the answer."""
    return Verdict(float(prediction.output.rstrip(".").lower() == prediction.answers[0]))


def yes_unless_no(prediction: Prediction) -> Verdict:
    """POPE's: whatever does not say no says yes."""
    choice = int(parsers.says_no(prediction.output))
    return Verdict(float(choice == prediction.target), choice)


def yes_or_no(prediction: Prediction) -> Verdict:
    """MME's: yes or no at the beginning; anything else is wrong."""
    word = parsers.yes_or_no(prediction.output)
    if word is None:
        detail = f"the answer {_short(prediction.output)!r} does not begin with yes or no"
        return Verdict(0.0, reason="unparsed", detail=detail)
    choice = prediction.options.index(word)
    return Verdict(float(choice == prediction.target), choice)


def overlapping_box(prediction: Prediction) -> Verdict:
    """Right if the written box and the true one share half of their union."""
    if parsers.box(prediction.output) is None:
        return Verdict(0.0, reason="unparsed", detail=f"the answer {_short(prediction.output)!r} is no box")
    return Verdict(float(figures.box_overlap(prediction) >= _ENOUGH_OVERLAP))


def judged_elsewhere(_: Prediction) -> Verdict:
    return Verdict(None)


def _short(text: str) -> str:
    return text.strip().split("\n")[0][:80]


# Prompts: the user's words, before the conversation is put around them.


def question_alone(question: Question, _: Sequence[int] = ()) -> str:
    return question.question


def short_answer(question: Question, _: Sequence[int] = ()) -> str:
    return question.question + SHORT_ANSWER


def lettered_options(question: Question, order: Sequence[int]) -> str:
    return question.question + format_options([question.options[index] for index in order]) + LETTER_ANSWER


def magnifier_lines(question: Question, _: Sequence[int] = ()) -> str:
    """FlexAttention's: the options of the instruction each on a line of its own."""
    words = question.question.replace(" A.", "\nA.")
    for letter in "BCD":
        words = words.replace(f", {letter}.", f"\n{letter}.")
    return words + LETTER_ANSWER


def region(question: Question, _: Sequence[int] = ()) -> str:
    return _REGION.format(question.question)


# Exports.


def _mmvet_answers(_: Path, __: str, predictions: Mapping[str, Prediction]) -> dict[str, str]:
    return {name: prediction.output for name, prediction in predictions.items()}


def _vqav2_answers(data_dir: Path, _: str, predictions: Mapping[str, Prediction]) -> list[dict[str, Any]]:
    """Every question of test2015; those that were not asked get an empty answer, as LLaVA submits them."""
    answers = {int(name): vqa_accuracy.normalize(prediction.output) for name, prediction in predictions.items()}
    return [{"question_id": n, "answer": answers.get(n, "")} for n in vqav2.all_test_questions(data_dir)]


def _write(words: Callable[[Question, Sequence[int]], str], **judges: Callable[[Prediction], Verdict]) -> dict:
    """Scorers by name for answers to one prompt."""
    ask = Ask(words)
    return {name: Scorer(ask, judge) for name, judge in judges.items()}


def _shuffled(question: Question) -> tuple[int, ...]:
    return metrics.presentation_order(question.id, question.options)


def _losses(scorer: str) -> Scorer:
    def words(question: Question, _: Sequence[int]) -> str:
        return scorer_question(scorer, question.question)

    return Scorer(Ask(words, continuation=partial(scorer_continuation, scorer)), lowest_loss)


_strict = partial(option, parse=parsers.strict_letter)
_inferred = partial(option, parse=parsers.inferred_option)
_first_letter = partial(option, parse=lambda text, _: parsers.first_letter(text))
_first_letter_or_text = partial(option, parse=parsers.first_letter)

BENCHMARKS: dict[str, Benchmark] = {
    "vstar": Benchmark(
        source=vstar.SOURCE,
        read=lambda data_dir, _: vstar.read_vstar(data_dir),
        scorers={
            "released": _losses("released"),
            "official": _losses("official"),
            "generate": Scorer(Ask(lettered_options, order=_shuffled), _strict),
        },
        max_new_tokens=16,
    ),
    "magnifier": Benchmark(
        source=magnifier.SOURCE,
        read=lambda data_dir, _: magnifier.read_magnifier(data_dir),
        scorers=_write(magnifier_lines, released=_first_letter, strict=_strict)
        | {"official": Scorer(Ask(lambda q, _: f"{_LETTERS_OF_OTTER} {q.question}"), _first_letter_or_text)},
        max_new_tokens=512,
    ),
    "textvqa": Benchmark(
        source=textvqa.SOURCE,
        read=textvqa.read_textvqa,
        variants=textvqa.VARIANTS,
        scorers=_write(short_answer, m4c=partial(soft, accuracy=vqa_accuracy.textvqa_accuracy)),
        max_new_tokens=128,
    ),
    "rsvqa": Benchmark(
        source=rsvqa.SOURCE,
        read=lambda data_dir, _: rsvqa.read_rsvqa(data_dir),
        scorers=_write(short_answer, exact=same_text),
        max_new_tokens=128,
        figures=figures.mean_of_splits,
    ),
    "gqa": Benchmark(
        source=gqa.SOURCE,
        read=lambda data_dir, _: gqa.read_gqa(data_dir),
        scorers=_write(short_answer, official=same_without_period),
        max_new_tokens=128,
        figures=figures.binary_and_open,
    ),
    "vqav2": Benchmark(
        source=vqav2.SOURCE,
        read=vqav2.read_vqav2,
        variants=vqav2.VARIANTS,
        scorers=_write(
            short_answer,
            official=partial(soft, accuracy=vqa_accuracy.vqa_accuracy),
            m4c=partial(soft, accuracy=vqa_accuracy.textvqa_accuracy),
        ),
        max_new_tokens=128,
        exports={"test-dev": Export("vqav2_answers.json", "the evaluation server (eval.ai)", _vqav2_answers)},
    ),
    "pope": Benchmark(
        source=pope.SOURCE,
        read=lambda data_dir, _: pope.read_pope(data_dir),
        scorers=_write(short_answer, official=yes_unless_no),
        max_new_tokens=128,
        figures=figures.pope_figures,
    ),
    "mmbench": Benchmark(
        source=mmbench.SOURCE,
        read=lambda data_dir, _: mmbench.read_mmbench(data_dir),
        scorers=_write(lettered_options, inferred=_inferred, strict=_strict),
        max_new_tokens=1024,
        figures=figures.mmbench_figures,
    ),
    "mme": Benchmark(
        source=mme.SOURCE,
        read=lambda data_dir, _: mme.read_mme(data_dir),
        scorers=_write(short_answer, official=yes_or_no),
        max_new_tokens=128,
        figures=figures.mme_figures,
    ),
    "refcoco": Benchmark(
        source=refcoco.SOURCE,
        read=refcoco.read_refcoco,
        variants=refcoco.VARIANTS,
        scorers=_write(region, released=overlapping_box),
        max_new_tokens=512,
        figures=figures.refcoco_figures,
    ),
    "hrbench": Benchmark(
        source=hrbench.SOURCE,
        read=hrbench.read_hrbench,
        variants=hrbench.VARIANTS,
        scorers=_write(lettered_options, inferred=_inferred, strict=_strict),
        max_new_tokens=1024,
        figures=figures.all_orders_right,
    ),
    "mmvet": Benchmark(
        source=mmvet.SOURCE,
        read=lambda data_dir, _: mmvet.read_mmvet(data_dir),
        scorers=_write(question_alone, judge=judged_elsewhere),
        max_new_tokens=1024,
        exports={"": Export("mmvet_answers.json", "MM-Vet's judge model", _mmvet_answers)},
    ),
}
