"""Systems beside each other on benchmarks: what eval.py calls for configs/compare.py.

workdir/BENCHMARK/SYSTEM/seedN/     run.json and predictions.jsonl of one model on one benchmark
workdir/BENCHMARK/times.json        what was timed
workdir/compare.md, .csv, results.json, BENCHMARK.png

What is there is not done again. A model that is missing, or lacks weights that its row needs, is a row that says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from flexattn_jax.api import VisionLanguageModel, load
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.checkpoints.store import open_checkpoint
from flexattn_jax.command_line import can_draw_charts
from flexattn_jax.config import ConfigError, VLMConfig, override
from flexattn_jax.evaluation import harness
from flexattn_jax.evaluation.benchmark import Scorer
from flexattn_jax.evaluation.benchmarks import BENCHMARKS
from flexattn_jax.evaluation.compare_costs import count_costs, is_times, time_systems
from flexattn_jax.evaluation.compare_table import draw_chart, print_tables, write_csv, write_markdown
from flexattn_jax.evaluation.figures import bootstrap_interval
from flexattn_jax.evaluation.harness import HarnessError
from flexattn_jax.evaluation.metrics import accuracy
from flexattn_jax.evaluation.predictions import Prediction, PredictionLog
from flexattn_jax.evaluation.report import write_json
from flexattn_jax.evaluation.run import checkpoint_fingerprint, first_of_each_split
from flexattn_jax.evaluation.systems import COMPARISONS, Comparison, System
from flexattn_jax.files import FileError, read_json
from flexattn_jax.inputs.batching import BatchError
from flexattn_jax.inputs.datasets.questions import Question
from flexattn_jax.inputs.tokenizer import TokenizerError, load_tokenizer, tokenize_prompt

# What is wrong with one model: the others are compared all the same.
_ROW_ERRORS = (CheckpointError, ConfigError, BatchError, TokenizerError)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A benchmark as every system is asked it.

    title: as printed.
    known: all questions of the benchmark; questions: those that are asked, the first ones of them.
    settings: what answers depend on beside the model, for run.json.
    answer: (vlm, log) -> None asks what the log has no answer to yet.
    prompts: of the questions.
    """

    title: str
    known: Sequence[Question]
    questions: Sequence[Question]
    settings: Mapping[str, Any]
    answer: Callable[[VisionLanguageModel, PredictionLog], None]
    prompts: Sequence[str]


@dataclasses.dataclass(frozen=True)
class _Model:
    """One trained model read in one way. seed: None where the models come without."""

    seed: int | None
    folder: Path
    config: VLMConfig
    open: Callable[[], VisionLanguageModel]


def run_compare(settings: Mapping[str, Any], workdir: str | Path) -> dict[str, Any]:
    """Asks every system every benchmark, times them, prints tables and writes them below `workdir`.

    Args:
        settings: those of configs/compare.py, as plain types.

    Returns:
        what results.json holds: shares between 0 and 1, operations in 1e9, times in milliseconds, memory in bytes.

    Raises:
        HarnessError and the other user errors of `evaluation.run`.
    """
    workdir, comparison = Path(workdir), COMPARISONS.get(settings["comparison"])
    if comparison is None:
        raise HarnessError(f"comparison is {settings['comparison']!r}; there are {', '.join(COMPARISONS)}")
    models = Path(settings["models"]) if settings["models"] else comparison.packaged
    systems = _chosen(settings["systems"], comparison.systems)
    seeds = _seeds(settings, models)
    harness.check_sizes(settings["batch_size"], 1)
    if settings["passes"] < 0 or settings["limit"] < 0:
        raise HarnessError("passes and limit cannot be negative")
    benchmarks = {name: _asked(name, settings) for name in settings["benchmarks"]}
    if not benchmarks:
        raise HarnessError("benchmarks is empty; name some, such as vsearch or textvqa:ocr")
    found = {name: _find(name, system, comparison, models, seeds, settings) for name, system in systems.items()}
    results: dict[str, Any] = {"benchmark": "compare", "config": dict(settings), "benchmarks": {}}
    for name, asked in benchmarks.items():
        folder = workdir / name.replace(":", "_")
        rows = {key: _row(key, systems[key], *found[key], asked, folder, settings) for key in systems}
        if settings["passes"]:
            _time(rows, found, asked, folder, settings["passes"])
        chances = [1 / len(question.options) for question in asked.questions if question.options]
        results["benchmarks"][name] = {
            "title": asked.title,
            "questions": len(asked.questions),
            "chance": float(np.mean(chances)) if len(chances) == len(asked.questions) else None,
            "systems": rows,
        }
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "results.json", results)
    write_csv(results, workdir / "compare.csv")
    drawn = results["benchmarks"] if can_draw_charts() else {}
    charts = [draw_chart(one, workdir / f"{name.replace(':', '_')}.png") for name, one in drawn.items()]
    write_markdown(results, workdir / "compare.md", [path for path in charts if path])
    print_tables(results)
    print(f"Written: compare.md, compare.csv, results.json and {sum(map(bool, charts))} charts in {workdir}")
    return results


def _chosen(names: Sequence[str], systems: Mapping[str, System]) -> dict[str, System]:
    unknown = [name for name in names if name not in systems]
    if unknown:
        raise HarnessError(f"systems names {unknown[0]!r}; there are {', '.join(systems)}")
    return {name: systems[name] for name in names or systems}


def _seeds(settings: Mapping[str, Any], models: Path | None) -> list[int | None]:
    """Those asked for, or those that are there; [None] for models without seeds."""
    if models is None:
        raise HarnessError(
            "no models are given: --config.models=DIR, which holds seedN/ARM/model as tools/mini_study.py makes them, "
            "or ARM"
        )
    if not models.is_dir():
        raise HarnessError(f"the folder of models {models} does not exist; give the right --config.models")
    if settings["seeds"]:
        if not all(type(seed) is int and seed >= 0 for seed in settings["seeds"]):
            raise HarnessError(f"seeds is {settings['seeds']}; they are whole numbers, such as (0, 1)")
        return list(settings["seeds"])
    numbers = [path.name.removeprefix("seed") for path in models.glob("seed*") if path.is_dir()]
    return sorted(int(number) for number in numbers if number.isdecimal()) or [None]


def _find(
    name: str,
    system: System,
    comparison: Comparison,
    models: Path,
    seeds: Sequence[int | None],
    settings: Mapping[str, Any],
) -> tuple[list[_Model], list[dict[str, Any]]]:
    """The models of one row, and what is wrong with those that are not there: {"seed", "reason", "command"}."""
    found, problems = [], []
    for seed in seeds:
        folder = models / system.arm if seed is None else models / f"seed{seed}" / system.arm
        held = next((f for f in (folder / "model", folder) if (f / "config.json").is_file()), None)
        if held is None:
            place = models if settings["models"] else "runs/mini"  # nobody trains into a package
            recipe = comparison.recipes[system.arm].format(models=place, seed=seed or 0, folder=folder)
            problems.append({"seed": seed, "reason": f"there is no model in {folder}", "command": recipe})
            continue
        try:
            config = override(open_checkpoint(held).config, dict(system.overrides))
        except _ROW_ERRORS as error:
            problems.append({"seed": seed, "reason": str(error), "command": None})
            continue
        open_vlm = partial(load, held, dtype=settings["dtype"], config_overrides=dict(system.overrides))
        found.append(_Model(seed, held, config, open_vlm))
    return found, problems


def _row(
    name: str,
    system: System,
    models: Sequence[_Model],
    problems: Sequence[Mapping[str, Any]],
    asked: Asked,
    folder: Path,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Answers the benchmark with all models of a row; what became of it."""
    problems, predictions, config = list(problems), {}, None
    for model in models:
        depends = dict(asked.settings) | {
            "checkpoint": checkpoint_fingerprint(model.folder),
            "dtype": settings["dtype"],
            "model_overrides": dict(system.overrides),
        }
        place = folder / name / ("model" if model.seed is None else f"seed{model.seed}")
        try:
            with PredictionLog(place, depends, asked.known) as log:
                if any(question.id not in log.finished for question in asked.questions):
                    print(f"{asked.title}: {system.title}, {place.name}", flush=True)
                    asked.answer(model.open(), log)
                answered = [log.finished[question.id] for question in asked.questions if question.id in log.finished]
        except _ROW_ERRORS as error:
            problems.append({"seed": model.seed, "reason": str(error), "command": None})
            continue
        predictions[model.seed], config = answered, model.config
    row: dict[str, Any] = {
        **{"title": system.title, "family": system.family, "size": system.size, "problems": problems},
        **{"seeds": list(predictions), "overall": None, "splits": {}, "costs": None, "times": None},
    }
    if not predictions:
        return row
    tokenizer = load_tokenizer(next(model.folder for model in models if model.seed in predictions))
    lengths = [len(tokenize_prompt(tokenizer, prompt)) - 1 for prompt in asked.prompts]
    splits = dict.fromkeys(question.split for question in asked.questions)
    each = list(predictions.values())
    row["overall"] = pooled_accuracy(each)
    row["splits"] = {s: pooled_accuracy([[p for p in one if p.split == s] for one in each]) for s in splits}
    row["costs"] = count_costs(config, lengths, [prediction for one in each for prediction in one])
    return row


def pooled_accuracy(seeds: Sequence[Sequence[Prediction]]) -> dict[str, Any]:
    """The mean accuracy of several models on the same questions, and each model's own.

    Of one model the interval is Wilson's. Of several it is a bootstrap over models and questions at once, since the
    models' answers to one question are not independent; each draws with replacement, for all of the other.

    Args:
      seeds: of each model, its answers; questions that some model was not asked are left out.
    """
    if len(seeds) == 1:
        counts = accuracy([p.score for p in seeds[0] if p.score is not None])
        return {"n": counts["n"], "accuracy": counts["accuracy"], "ci95": counts["ci95"], "seeds": [counts["accuracy"]]}
    scores = [{p.id: p.score for p in one if p.score is not None} for one in seeds]
    shared = [name for name in scores[0] if all(name in one for one in scores)]
    if not shared:
        return {"n": 0, "accuracy": None, "ci95": None, "seeds": []}
    table = np.array([[one[name] for name in shared] for one in scores], float)  # (models, questions)

    def draw(rng: np.random.Generator) -> float:
        models, questions = (rng.multinomial(n, np.full(n, 1 / n)) / n for n in table.shape)
        return float(models @ table @ questions)

    return {
        "n": len(shared),
        "accuracy": float(table.mean()),
        "ci95": list(bootstrap_interval(draw)),
        "seeds": table.mean(axis=1).tolist(),
    }


def _time(
    rows: Mapping[str, dict[str, Any]],
    found: Mapping[str, tuple[list[_Model], list[dict[str, Any]]]],
    asked: Asked,
    folder: Path,
    passes: int,
) -> None:
    """Fills in `times` of the rows that have answers, from times.json or by timing their first model."""
    models = {name: found[name][0][0] for name, row in rows.items() if row["seeds"]}
    file = folder / "times.json"
    try:
        kept = read_json(file)
        if not isinstance(kept, dict) or not all(map(is_times, kept.values())):
            raise FileError("holds no times")
    except FileNotFoundError:
        kept = {}
    except FileError as error:
        raise HarnessError(f"{file} {error}; remove it to time the systems again") from None
    marks = {
        name: f"{checkpoint_fingerprint(model.folder)} {passes} {model.open.keywords}" for name, model in models.items()
    }
    left = {name: model.open for name, model in models.items() if kept.get(name, {}).get("of") != marks[name]}
    if left:
        picture = harness.open_picture(asked.questions[0])
        with Progress(transient=True) as progress:
            bar = progress.add_task(f"{asked.title}: timing", total=passes * len(left))
            new = time_systems(left, picture, asked.prompts[0], passes, partial(progress.advance, bar))
        kept |= {name: times | {"of": marks[name]} for name, times in new.items()}
        write_json(file, kept)
    for name in models:
        rows[name]["times"] = {key: value for key, value in kept[name].items() if key != "of"}


def _asked(name: str, settings: Mapping[str, Any]) -> Asked:
    """Opens a benchmark, "vsearch" or NAME or NAME:VARIANT of BENCHMARKS. Raises HarnessError, DatasetError."""
    if name == "vsearch":
        return _vsearch(settings)
    benchmark_name, _, variant = str(name).partition(":")
    benchmark = BENCHMARKS.get(benchmark_name)
    if benchmark is None:
        raise HarnessError(f"there is no benchmark {benchmark_name!r}; there are vsearch, {', '.join(BENCHMARKS)}")
    variant = variant or benchmark.variants[0]
    if variant not in benchmark.variants:
        raise HarnessError(f"{benchmark_name} has no variant {variant!r}; it has {', '.join(benchmark.variants)}")
    known, _ = benchmark.read(settings["data_dirs"][benchmark_name], variant)
    scorer_name, scorer = next(iter(benchmark.scorers.items()))
    questions = first_of_each_split(known, settings["limit"])
    depends = {"benchmark": benchmark_name, "variant": variant, "scorer": scorer_name}
    tokens = benchmark.max_new_tokens
    if scorer.ask.continuation is None:
        depends["max_new_tokens"] = tokens
    answer = partial(_one_by_one, questions, scorer, settings["batch_size"], tokens)
    return Asked(name, known, questions, depends, answer, [harness.prompt(q, scorer.ask) for q in questions])


def _vsearch(settings: Mapping[str, Any]) -> Asked:
    # Imported when they are needed, so that no other benchmark waits for tfds.
    from flexattn_jax.evaluation.search_run import answer_all, as_questions
    from flexattn_jax.inputs.datasets.vsearch import decode_example, load_vsearch

    drawn = dict(settings["vsearch"])
    rows = load_vsearch(drawn.pop("data_dir") or None, drawn["preset"], drawn["split"], drawn["seed"])
    every = [decode_example(row) for row in rows]
    by_picture = {example.id: as_questions(example) for example in every}
    examples = every[: settings["limit"] or None]
    known, questions = ([q for example in some for q in by_picture[example.id]] for some in (every, examples))
    scorer = BENCHMARKS["vstar"].scorers["official"]  # the losses that `ask_all` takes of all questions at once

    def answer(vlm: VisionLanguageModel, log: PredictionLog) -> None:
        if _shares_a_beginning(vlm.config):
            answer_all(vlm, examples, by_picture, log, "pictures", batch_size=settings["batch_size"])
        else:
            _one_by_one(questions, scorer, settings["batch_size"], 1, vlm, log)

    title = f"vsearch {drawn['preset']}, split {drawn['split']}, {len(examples)} pictures"
    prompts = [harness.prompt(question, scorer.ask) for question in questions]
    return Asked(title, known, questions, {"benchmark": "vsearch", **drawn}, answer, prompts)


def _shares_a_beginning(config: VLMConfig) -> bool:
    """Whether the model can be asked several questions behind one picture in one pass (docs/vsearch.md)."""
    drops = config.reduction is not None and config.reduction.in_decoder
    return not drops and not (config.reads_highres and config.flexattention.variant == "paper")


def _one_by_one(
    questions: Sequence[Question],
    scorer: Scorer,
    batch_size: int,
    max_new_tokens: int,
    vlm: VisionLanguageModel,
    log: PredictionLog,
) -> None:
    harness.evaluate(lambda: vlm, questions, log, scorer, batch_size=batch_size, max_new_tokens=max_new_tokens)
