"""The mini model on vsearch, alone or beside the models that it is compared with: what eval.py calls for it.

Every arm is the same network, trained on the same pictures for as many steps from the same start; they differ in what
of the high resolution they read. Answers are kept in a folder for each arm, so that a stopped run goes on.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from flexattn_jax.api import VisionLanguageModel, load
from flexattn_jax.config import VLMConfig, dotted
from flexattn_jax.evaluation.harness import HarnessError, check_sizes, unpack_cells
from flexattn_jax.evaluation.metrics import accuracy
from flexattn_jax.evaluation.pictures import write_pictures
from flexattn_jax.evaluation.predictions import CellSelection, Prediction, PredictionLog
from flexattn_jax.evaluation.report import percent, write_json
from flexattn_jax.evaluation.run import checkpoint_fingerprint
from flexattn_jax.evaluation.search import Answer, ask_all, pack_options
from flexattn_jax.files import packaged
from flexattn_jax.inputs.datasets.questions import Question
from flexattn_jax.inputs.datasets.vsearch import decode_example, load_vsearch
from flexattn_jax.inputs.datasets.vsearch_examples import FORMS, Example
from flexattn_jax.models.flops import decoder_flops


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row of the comparison.

    title: as printed.
    model: folder of the trained model, below `config.models`.
    swap: see search.SWAPS; "": the model reads what it selects.
    """

    title: str
    model: str
    swap: str = ""


ARMS = {
    "twin": Arm("low resolution alone (LLaVA-1.5)", "twin"),
    "flex": Arm("FlexAttention", "flex"),
    "released": Arm("FlexAttention, cells may be read again", "released"),
    "random": Arm("random cells, trained so", "random"),
    "random_swap": Arm("random cells, swapped in", "flex", "random"),
    "all": Arm("every cell", "all"),
}


@dataclasses.dataclass(frozen=True)
class _Bytes:
    """A picture in memory; see questions.Picture."""

    content: bytes

    def read(self) -> bytes:
        """The JPEG."""
        return self.content

    def mark(self) -> int:
        """Its length."""
        return len(self.content)


def run_vsearch(settings: Mapping[str, Any], workdir: str | Path) -> dict[str, Any]:
    """Asks each arm all questions of a vsearch split, prints a table and writes `workdir`/results.json.

    Args:
        settings: those of configs/vstar.py:mini, as plain types.
        workdir: of this run.

    Returns:
        what results.json holds: accuracies and shares between 0 and 1, operations a question (counted), seconds a
        question (measured).

    Raises:
        HarnessError and the other user errors of `evaluation.run`.
    """
    workdir, models = Path(workdir), Path(settings["models"] or packaged("mini"))
    unknown = [name for name in settings["arms"] if name not in ARMS]
    if unknown or not settings["arms"]:
        raise HarnessError(f"arms is {settings['arms']}; name some of {', '.join(ARMS)}")
    if settings["limit"] < 0 or settings["pictures"] < 0:
        raise HarnessError("limit and pictures cannot be negative")
    check_sizes(settings["batch_size"], 1)
    folders = {name: _model_folder(ARMS[name], models, settings) for name in settings["arms"]}
    rows = load_vsearch(settings["data_dir"] or None, settings["preset"], settings["split"], settings["seed"])
    count = min(settings["limit"] or len(rows), len(rows))
    examples = [decode_example(rows[k]) for k in range(count)]
    questions = {example.id: as_questions(example) for example in examples}
    results: dict[str, Any] = {"benchmark": "vsearch", "config": dict(settings), "pictures": count, "arms": {}}
    for name, folder in folders.items():
        if folder is None:
            print(f"no model of `{name}` is packaged; `make study` trains it: --config.models=runs/mini/seed0")
            continue
        results["arms"][name] = _run_arm(ARMS[name], folder, settings, workdir / name, examples, questions)
    write_json(workdir / "results.json", results)
    print_table(results)
    print(f"Written: {workdir / 'results.json'}, and for each arm predictions.jsonl", end="")
    print(f" and {settings['pictures']} pictures" if settings["pictures"] else "")
    return results


def _model_folder(arm: Arm, models: Path, settings: Mapping[str, Any]) -> Path | None:
    """Where an arm's model lies; None where several packaged ones are asked for and it is not among them."""
    folder = next((f for f in (models / arm.model / "model", models / arm.model) if f.is_dir()), None)
    if folder is None and (settings["models"] or len(settings["arms"]) == 1):
        raise HarnessError(
            f"there is no model in {models / arm.model}; give the folder of trained models, --config.models=DIR "
            "(docs/mini.md says how they are trained)"
        )
    return folder


def _run_arm(
    arm: Arm,
    checkpoint: Path,
    settings: Mapping[str, Any],
    workdir: Path,
    examples: Sequence[Example],
    questions: Mapping[str, list[Question]],
) -> dict[str, Any]:
    overrides = dotted(settings["model_overrides"])
    weights = settings.get("weights")
    vlm = load(checkpoint, dtype=settings["dtype"], config_overrides=overrides, weights=weights)
    answers_depend_on = {
        "benchmark": "vsearch",
        **{key: settings[key] for key in ("preset", "split", "seed", "dtype")},
        "checkpoint": checkpoint_fingerprint(checkpoint),
        "model_overrides": overrides,
        "swap": arm.swap,
    }
    if weights is not None:
        answers_depend_on["weights"] = weights
    flat = [question for example in examples for question in questions[example.id]]
    with PredictionLog(workdir, answers_depend_on, flat) as log:
        answer_all(vlm, examples, questions, log, arm.title, arm.swap or None, settings["seed"], settings["batch_size"])
        finished = log.finished
    if settings["pictures"] and vlm.config.reads_highres:
        write_pictures(flat, finished, workdir / "pictures", settings["pictures"])
    lengths = [n for example in examples for n in pack_options(vlm.tokenizer, example, vlm.config).answer_lengths]
    return _summary(arm, [finished[q.id] for q in flat], lengths, vlm.config)


def answer_all(
    vlm: VisionLanguageModel,
    examples: Sequence[Example],
    questions: Mapping[str, list[Question]],
    log: PredictionLog,
    title: str,
    swap: str | None = None,
    seed: int = 0,
    batch_size: int = 4,
) -> None:
    """Asks what `log` has no answer to yet, and adds the answers; swap, seed, batch_size: see `ask_all`."""
    left = [e for e in examples if any(q.id not in log.finished for q in questions[e.id])]
    if not left:
        return
    by_id = {question.id: question for asked in questions.values() for question in asked}
    began, compiled = time.perf_counter(), True
    with Progress(transient=True) as progress:
        bar = progress.add_task(title, total=len(left))
        for answers in ask_all(vlm, left, swap, seed, batch_size):
            seconds, began = (time.perf_counter() - began) / len(answers), time.perf_counter()
            log.append([_prediction(a, by_id[a.id], log, seconds, compiled, vlm.config) for a in answers])
            compiled = False
            progress.advance(bar, len({a.id.rsplit("/", 1)[0] for a in answers}))


def as_questions(example: Example) -> list[Question]:
    """All questions about a picture in the form that other benchmarks have; a split is a form of question."""
    picture = _Bytes(example.image)
    return [
        Question(
            id=f"{example.id}/{number}",
            split=asked.form,
            image=picture,
            question=asked.question,
            options=asked.options,
            target=asked.answer,
            target_object=tuple(example.objects[t].name for t in asked.targets),
            bbox=tuple(tuple(map(float, example.objects[t].box)) for t in asked.targets),
        )
        for number, asked in enumerate(example.questions)
    ]


def _prediction(
    answer: Answer, question: Question, log: PredictionLog, seconds: float, compiled: bool, config: VLMConfig
) -> Prediction:
    selection = None
    if answer.kept is not None:
        flex = config.flexattention
        selection = CellSelection(
            layers=tuple(range(flex.first_layer + 1, config.decoder.num_layers)),
            cells=tuple(np.packbits(row).tobytes().hex() for row in answer.kept),
            cell_grid=flex.cell_grid,
            grid=config.highres_grid,
            overflow=(0,) * len(answer.kept),
            cells_read=answer.distinct,
        )
    best = int(np.argmin(answer.losses))
    return Prediction(
        id=answer.id,
        split=answer.form,
        digest=log.digest(question),
        question=question.question,
        options=question.options,
        target=question.target,
        answers=(),
        unit="",
        losses=answer.losses,
        output=None,
        order=None,
        seconds=seconds,
        compiled=compiled,
        device=jax.devices()[0].device_kind,
        selection=selection,
        score=float(answer.correct),
        choice=best if answer.losses.count(answer.losses[best]) == 1 else None,
    )


def _summary(
    arm: Arm, predictions: Sequence[Prediction], lengths: Sequence[tuple[int, int]], config: VLMConfig
) -> dict[str, Any]:
    """Accuracy by form, what was read, and what an answer costs.

    Args:
      lengths: of each question, positions of the prompt with its right answer, and those of the answer alone.
    """
    steady = [p.seconds for p in predictions if not p.compiled]
    summary: dict[str, Any] = {
        "title": arm.title,
        "forms": {form: accuracy([p.score for p in predictions if p.split == form]) for form in FORMS},
        "seconds_per_question": float(np.mean(steady)) if steady else None,
    }
    operations, dense = [], []
    for prediction, (length, answer) in zip(predictions, lengths, strict=True):
        chosen = prediction.selection
        projected = 0 if chosen is None else chosen.cells_read
        # The deciding row stands for the others, all of which keep as many cells under selection="top_k".
        reads = 0 if chosen is None else answer * int(unpack_cells(chosen).sum())
        operations.append(decoder_flops(config, length, projected, reads))
        # Every high-resolution token in the sequence, as in LLaVA-1.5-HD.
        dense.append(decoder_flops(config, length + config.highres_grid**2))
    summary["gflop"] = float(np.mean(operations)) / 1e9
    summary["share_of_dense_flops"] = float(np.sum(operations) / np.sum(dense))
    read = [p.selection for p in predictions if p.selection is not None]
    if read:
        count = config.flexattention.num_cells
        summary["share_of_cells_a_layer"] = float(np.mean([unpack_cells(s).mean() for s in read]))
        summary["share_of_cells_projected"] = float(np.mean([s.cells_read / len(s.layers) / count for s in read]))
    return summary


def print_table(results: Mapping[str, Any]) -> None:
    """The comparison as a table; without a terminal in plain text."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120, color_system=None)
    config = results["config"]
    title = (
        f"vsearch {config['preset']}, split {config['split']}, seed {config['seed']}, {results['pictures']} pictures"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("model", no_wrap=True)
    for column in ("colour, %", "side, %", "cells, %", "decoder GFLOP", "of dense, %", "ms"):
        table.add_column(column, justify="right")
    for arm in results["arms"].values():
        table.add_row(arm["title"], *(percent(arm["forms"][form]) for form in FORMS), *_costs(arm))
    console.print(table)


def _costs(arm: Mapping[str, Any]) -> list[str]:
    share, seconds = arm.get("share_of_cells_a_layer", 0.0), arm["seconds_per_question"]
    dense = f"{100 * arm['share_of_dense_flops']:.1f}"
    return [f"{100 * share:.1f}", f"{arm['gflop']:.3f}", dense, "-" if seconds is None else f"{1000 * seconds:.1f}"]
