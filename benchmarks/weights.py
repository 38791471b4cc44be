"""What bfloat16 and int8 weights change in a trained model's answers: one evaluation for each, side by side.

    python benchmarks/weights.py --config=configs/vstar.py:mini [--config.models=DIR] [--workdir DIR]

Takes every setting of eval.py. Each way of storing weights is evaluated in a folder of its own, which goes on where it
stopped; the table has the accuracy by split, and how many questions got another answer than with float32.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from absl import flags
from common import write
from rich.console import Console
from rich.table import Table

from flexattn_jax.command_line import run_command
from flexattn_jax.evaluation.metrics import accuracy
from flexattn_jax.evaluation.predictions import PREDICTIONS, Prediction, read_predictions
from flexattn_jax.evaluation.run import USER_ERRORS, run_benchmark

WAYS = {
    "float32": {"dtype": "float32", "weights": None},
    "bfloat16": {"dtype": "bfloat16", "weights": None},
    "int8, float32": {"dtype": "float32", "weights": "int8"},
    "int8, bfloat16": {"dtype": "bfloat16", "weights": "int8"},
}
_CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "vstar.py"
_WORKDIR = flags.DEFINE_string("workdir", "runs/benchmarks/weights", "Folder of the evaluations and weights.json.")


def answers(folder: pathlib.Path) -> Iterator[tuple[tuple[str, str], Prediction]]:
    """((arm or "", id of the question), prediction) of an evaluation."""
    for file in sorted(folder.rglob(PREDICTIONS)):
        for prediction in read_predictions(file):
            yield (file.parent.relative_to(folder).as_posix(), prediction.id), prediction


def _compare(settings: dict) -> None:
    workdir, found = pathlib.Path(_WORKDIR.value), {}
    for name, way in WAYS.items():
        folder = workdir / name.replace(", ", "_")
        run_benchmark(settings | way, folder)
        found[name] = dict(answers(folder))
    rows, base = {}, found["float32"]
    for name, predictions in found.items():
        splits = sorted({one.split for one in predictions.values()})
        by_split = {
            split: accuracy([one.score for one in predictions.values() if one.split == split]) for split in splits
        }
        changed = sum(
            (one.choice, one.output) != (base[key].choice, base[key].output)
            for key, one in predictions.items()
            if key in base
        )
        rows[name] = {"splits": by_split, "other_answers": changed, "questions": len(predictions)}
    table = Table("weights", *rows["float32"]["splits"], "other answers", title="measured")
    for name, row in rows.items():
        shares = [f"{entry['accuracy']:.3f} (n {entry['n']})" for entry in row["splits"].values()]
        table.add_row(name, *shares, f"{row['other_answers']} of {row['questions']}")
    Console(width=120).print(table)
    write(workdir / "weights.json", rows)


if __name__ == "__main__":
    run_command(_compare, _CONFIG, USER_ERRORS)
