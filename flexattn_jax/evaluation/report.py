"""What an evaluation found: as a dictionary for programs, as a table for people."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flexattn_jax.evaluation import metrics
from flexattn_jax.evaluation.benchmarks import BENCHMARKS
from flexattn_jax.evaluation.harness import unpack_cells
from flexattn_jax.evaluation.predictions import Prediction
from flexattn_jax.files import printable, write_whole
from flexattn_jax.inputs.datasets.questions import QuestionError

_PRINTED_NAMES = 10  # errors and unresolved questions named on the screen; results.json names all


def build_results(
    benchmark: str,
    config: dict[str, Any],
    predictions: Sequence[Prediction],
    splits: Sequence[str] | None = None,
    errors: Sequence[QuestionError] = (),
    note: str | None = None,
    prompt: str | None = None,
) -> dict[str, Any]:
    """The content of results.json. Accuracies, intervals and shares lie between 0 and 1, times are in seconds.

    A question that was asked counts in n, also when a tie, a loss that is not finite or an unreadable answer left it
    without a choice: then it is wrong and listed under "unresolved". A question that could not be asked is listed
    under "errors" and is no part of n.

    Args:
        benchmark: name in `benchmarks.BENCHMARKS`.
        config: the settings; "scorer" is printed.
        predictions: scored ones.
        splits: rows of the table; None: those of the predictions.
        errors: questions that could not be asked.
        note: a warning to print with the figures.
        prompt: that of the first question.
    """
    splits = list(dict.fromkeys(p.split for p in predictions)) if splits is None else splits
    judged = [p for p in predictions if p.score is not None]
    figures = BENCHMARKS[benchmark].figures
    return {
        "benchmark": benchmark,
        "note": note,
        "config": config,
        "prompt": prompt,
        "answers": len(predictions),
        "splits": {split: _counts([p for p in judged if p.split == split]) for split in splits},
        "overall": _counts(judged),
        "figures": [dataclasses.asdict(figure) for figure in figures(judged)] if figures and judged else [],
        "errors": [{"id": error.id, "reason": error.reason} for error in errors],
        "unresolved": [{"id": p.id, "reason": p.reason, "detail": p.detail} for p in predictions if p.reason],
        "selection": _selection(predictions),
        "timing": _timing(predictions),
    }


def _counts(predictions: Sequence[Prediction]) -> dict[str, Any]:
    counts = metrics.accuracy([p.score for p in predictions])
    with_options = bool(predictions) and all(p.options for p in predictions)
    counts["chance"] = float(np.mean([1 / len(p.options) for p in predictions])) if with_options else None
    return counts


def _selection(predictions: Sequence[Prediction]) -> dict[str, Any]:
    chosen = [p.selection for p in predictions if p.selection is not None]
    if not chosen:
        return {"questions": 0}
    kept = np.array([unpack_cells(one).sum(axis=1) for one in chosen])  # (questions, layers)
    overflow = np.array([one.overflow for one in chosen])
    count = chosen[0].cell_grid ** 2
    return {
        "questions": len(chosen),
        "row": "the last row of the prompt",
        "cells": count,
        "mean_cells_kept": float(kept.mean()),
        "mean_share": float(kept.mean() / count),
        "overflow": int(overflow.sum()),
        "mean_cells_read": float(np.mean([one.cells_read for one in chosen])),
        "layers": {
            str(layer): {
                "mean_cells_kept": float(kept[:, k].mean()),
                "share": float(kept[:, k].mean() / count),
                "overflow": int(overflow[:, k].sum()),
            }
            for k, layer in enumerate(chosen[0].layers)
        },
    }


def _timing(predictions: Sequence[Prediction]) -> dict[str, Any]:
    steady = [p.seconds for p in predictions if not p.compiled]
    compiled = [p.seconds for p in predictions if p.compiled]
    return {
        "source": "measured: wall time from the picture's file to the answer, divided by the questions of the batch",
        "device": ", ".join(sorted({p.device for p in predictions})),
        "seconds_per_question": float(np.mean(steady)) if steady else None,
        "questions_measured": len(steady),
        "seconds_in_batches_that_compiled": float(sum(compiled)),
        "questions_in_batches_that_compiled": len(compiled),
    }


def write_json(path: Path, values: Any) -> None:
    """Writes JSON; the file appears whole or not at all."""
    write_whole(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def print_report(results: dict[str, Any], console: Console | None = None) -> None:
    """Prints the table; without a terminal the same in plain text, 100 columns wide."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=100, color_system=None)
    if results["prompt"]:
        console.print(f"The first prompt:\n{escape(printable(results['prompt']))}", highlight=False, soft_wrap=True)
    if results["overall"]["n"] or not results["answers"]:
        console.print(_accuracies(results))
    if results["figures"]:
        console.print(_figures(results["figures"]))
    if results.get("judge"):
        console.print(f"{results['answers']} answers were written for {escape(results['judge'])}; none is scored here.")
    if results["note"]:
        console.print(f"Note: {escape(results['note'])}", style="yellow")
    _print_names(console, "not asked (not in n)", [(e["id"], e["reason"]) for e in results["errors"]])
    unresolved = [(u["id"], u["detail"]) for u in results["unresolved"]]
    _print_names(console, "without a choice (counted wrong)", unresolved)
    console.print(_selection_line(results["selection"]), highlight=False)
    console.print(escape(printable(_timing_line(results["timing"]))), highlight=False)


def _accuracies(results: dict[str, Any]) -> Table:
    title = ", ".join(filter(None, (results["benchmark"], results["config"].get("variant"))))
    table = Table(title=f"{escape(title)}, scorer {results['config'].get('scorer')}", box=box.SIMPLE_HEAD)
    table.add_column("split")
    for name in ("n", "correct", "accuracy", "95 % interval", "chance"):
        table.add_column(name, justify="right")
    for name, counts in results["splits"].items():
        table.add_row(escape(printable(name)), *_cells(counts))
    table.add_section()
    table.add_row("overall", *_cells(results["overall"]), style="bold")
    return table


def _figures(figures: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("figure")
    for name in ("n", "value", "95 % interval"):
        table.add_column(name, justify="right")
    for figure in figures:
        factor, unit = (1, "") if figure["points"] else (100, " %")
        low, high = figure["ci95"] or (None, None)
        interval = "-" if low is None else f"{factor * low:.1f} to {factor * high:.1f}{unit}"
        value = f"{factor * figure['value']:.1f}{unit}"
        table.add_row(escape(printable(figure["name"])), str(figure["n"]), value, interval)
    return table


def percent(counts: Mapping[str, Any] | None) -> str:
    """An accuracy with its interval, such as "56.0 (50.3-61.5)"; "-" where nothing was asked."""
    if counts is None or not counts["n"]:
        return "-"
    low, high = counts["ci95"]
    return f"{100 * counts['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _cells(counts: dict[str, Any]) -> list[str]:
    if not counts["n"]:
        return ["0", "0", "-", "-", "-"]
    low, high = counts["ci95"]
    return [
        str(counts["n"]),
        f"{counts['correct']:.1f}".removesuffix(".0"),
        f"{100 * counts['accuracy']:.1f} %",
        f"{100 * low:.1f} to {100 * high:.1f} %",
        "-" if counts["chance"] is None else f"{100 * counts['chance']:.1f} %",
    ]


def _print_names(console: Console, title: str, entries: Sequence[tuple[str, str]]) -> None:
    if not entries:
        return
    console.print(f"{len(entries)} {title}:", style="red", highlight=False)
    for name, reason in entries[:_PRINTED_NAMES]:
        console.print(escape(printable(f"  {name}: {reason}")), highlight=False, soft_wrap=True)
    if len(entries) > _PRINTED_NAMES:
        console.print(f"  and {len(entries) - _PRINTED_NAMES} more, named in results.json", highlight=False)


def _selection_line(selection: dict[str, Any]) -> str:
    if not selection["questions"]:
        return "High resolution: no layer read any cell."
    layers = selection["layers"]
    kept = " ".join(f"{layer['mean_cells_kept']:.0f}" for layer in layers.values())
    overflow = selection["overflow"]
    dropped = f"{overflow} cells, counted over all rows, came after the strongest that a row keeps, and were left out"
    return (
        f"High resolution: a layer kept {selection['mean_cells_kept']:.1f} of {selection['cells']} cells "
        f"({100 * selection['mean_share']:.1f} %) for the last prompt row; "
        + (dropped if overflow else "none overflowed")
        + f". Layers {next(iter(layers))} to {list(layers)[-1]}: {kept}"
    )


def _timing_line(timing: dict[str, Any]) -> str:
    compiled = timing["questions_in_batches_that_compiled"]
    if timing["seconds_per_question"] is None:
        if not compiled:
            return "Time: nothing was measured."
        return (
            f"Time: {timing['seconds_in_batches_that_compiled'] / compiled:.2f} s a question on {timing['device']}, "
            f"compilation included: each of the {compiled} questions was in a batch that compiled (measured)."
        )
    apart = f"; {compiled} in batches that compiled are left out" if compiled else ""
    return (
        f"Time: {timing['seconds_per_question']:.2f} s a question on {timing['device']}, picture file to answer "
        f"(measured over {timing['questions_measured']} questions{apart})."
    )
