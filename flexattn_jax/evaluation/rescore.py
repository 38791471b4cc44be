"""Scores the predictions of an evaluation again, without a model and without the benchmark's files.

    python -m flexattn_jax.evaluation.rescore runs/magnifier/predictions.jsonl [--scorer strict] [--out FILE]

Benchmark and scorer are those of run.json beside the file. Another scorer can be named if it asks in the same words:
what the model wrote, or the options' losses, are what they were.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexattn_jax.command_line import exit_code
from flexattn_jax.evaluation.benchmarks import BENCHMARKS
from flexattn_jax.evaluation.predictions import RUN, WorkdirError, read_predictions
from flexattn_jax.evaluation.report import build_results, print_report, write_json
from flexattn_jax.files import FileError, read_json


def rescore(path: str | Path, scorer: str | None = None) -> tuple[dict[str, Any], int]:
    """Scores the predictions in `path` again.

    Args:
        path: predictions.jsonl of a run, with its run.json beside it.
        scorer: another scorer of the same benchmark; None: the run's own.

    Returns:
        what results.json holds (`report.build_results`; questions that could not be asked are not known here), and how
        many predictions have another score than in the file.

    Raises:
        WorkdirError: the files cannot be read, or `scorer` does not fit them.
    """
    path = Path(path)
    run = _read_run(path.parent / RUN)
    name, asked_by = run["benchmark"], run["scorer"]
    scorers, scorer = BENCHMARKS[name].scorers, scorer or asked_by
    fitting = [other for other, one in scorers.items() if one.ask is scorers[asked_by].ask]
    if scorer not in fitting:
        raise WorkdirError(
            f"the questions of {path} were asked for scorer {asked_by!r}, so they can be scored by "
            f"{' or '.join(fitting)}, not by {scorer!r}; run eval.py with --config.scorer={scorer} to ask in its words"
        )
    earlier = read_predictions(path)
    try:
        predictions = [scorers[scorer].score(prediction) for prediction in earlier]
        results = build_results(name, config=run | {"scorer": scorer}, predictions=predictions)
    except (AttributeError, TypeError, IndexError, ValueError) as error:  # say letters without what was written
        raise WorkdirError(f"{path} holds answers of another form than {name}'s ({error}); ask again") from error
    changed = sum(before.score != after.score for before, after in zip(earlier, predictions, strict=True))
    return results, changed


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run = read_json(path)
        benchmark = BENCHMARKS[run["benchmark"]]
        if run["scorer"] in benchmark.scorers and run.get("variant", "") in ("", *benchmark.variants):
            return run
    except FileNotFoundError:
        reason = "is missing"
    except FileError as error:
        reason = str(error)
    except (ValueError, KeyError, TypeError):
        reason = "names no benchmark of questions"
    else:
        reason = "names no scorer or no variant of its benchmark"
    raise WorkdirError(f"{path} {reason}; it must lie beside the predictions, as eval.py wrote it")


def main(arguments: Sequence[str]) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="rescore", description=__doc__.split("\n")[0])
    parser.add_argument("file", help="predictions.jsonl of a run")
    parser.add_argument("--scorer", help="another scorer that asks in the same words")
    parser.add_argument("--out", help="file to write the results to, as results.json")
    options = parser.parse_args(arguments)

    def act() -> None:
        results, changed = rescore(options.file, options.scorer)
        if options.out:
            write_json(Path(options.out), results)
        print_report(results)
        print(f"{changed} of {results['answers']} predictions have another score than in {options.file}")

    return exit_code("rescore", act, (WorkdirError,))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
