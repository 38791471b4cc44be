"""One evaluation from settings to results.json: what eval.py calls.

`RUNNERS` lists the benchmarks. One of another kind than a list of questions has a runner of its own there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from flexattn_jax.api import load
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.config import ConfigError, dotted
from flexattn_jax.evaluation import demo, harness
from flexattn_jax.evaluation.benchmarks import BENCHMARKS
from flexattn_jax.evaluation.harness import HarnessError
from flexattn_jax.evaluation.pictures import write_groups, write_pictures
from flexattn_jax.evaluation.predictions import PREDICTIONS, WorkdirError
from flexattn_jax.evaluation.report import build_results, print_report, write_json
from flexattn_jax.evaluation.settings import benchmark_config
from flexattn_jax.evaluation.sharing import SharedLog, own_devices
from flexattn_jax.inputs.batching import BatchError
from flexattn_jax.inputs.datasets.questions import DatasetError, Question
from flexattn_jax.inputs.datasets.vsearch_examples import VSearchError
from flexattn_jax.inputs.datasets.vsearch_scenes import AssetError
from flexattn_jax.inputs.images import ImageError
from flexattn_jax.inputs.tokenizer import TokenizerError
from flexattn_jax.processes import ProcessFault, is_first, on_first, together

RESULTS = "results.json"
PICTURES = "pictures"

# Mistakes of the user's, each of which says what to do; anything else that is raised is a fault of the program.
USER_ERRORS = (
    DatasetError,
    WorkdirError,
    HarnessError,
    ImageError,
    BatchError,
    TokenizerError,
    CheckpointError,
    ConfigError,
    VSearchError,
    AssetError,
    ProcessFault,
)

_SAMPLED_BYTES = 1 << 16
_SAMPLES = 16

Runner = Callable[[Mapping[str, Any], str | Path], dict[str, Any]]  # settings and workdir to what results.json holds


def run_benchmark(settings: Mapping[str, Any], workdir: str | Path = "") -> dict[str, Any]:
    """Runs the benchmark that `settings["benchmark"]` names, in `workdir` or, if that is empty, runs/NAME.

    Raises:
        one of USER_ERRORS.
    """
    name = settings["benchmark"]
    if name not in RUNNERS:
        raise HarnessError(f"there is no benchmark {name!r}; there are {', '.join(RUNNERS)}")
    return RUNNERS[name](settings, workdir or f"runs/{name}")


def run_questions(
    name: str, settings: Mapping[str, Any], workdir: str | Path, show_progress: bool = True
) -> dict[str, Any]:
    """Evaluates a checkpoint on one of `BENCHMARKS`, prints the table and writes `workdir`/results.json.

    Args:
        name: of the benchmark.
        settings: those of `settings.benchmark_config`, as plain types.
        workdir: of this run; holds predictions.jsonl, by which a killed run goes on, and the pictures.
        show_progress: whether to draw a progress bar.

    Returns:
        what results.json holds (`report.build_results`).

    Raises:
        one of USER_ERRORS.
    """
    benchmark, variant = BENCHMARKS[name], settings.get("variant", "")
    limit, pictures = settings["limit"], settings["pictures"]
    usual = benchmark_config(name).to_dict()
    for setting in usual.keys() & settings.keys():
        if usual[setting] is not None and not isinstance(settings[setting], type(usual[setting])):
            kind = type(usual[setting]).__name__
            raise HarnessError(
                f"{setting} is {settings[setting]!r} in the config file; a value of type {kind} is expected"
            )
    for setting in ("limit", "pictures"):
        if settings[setting] < 0:
            raise HarnessError(f"{setting} is {settings[setting]}; it cannot be negative")
    for setting, value, allowed in (
        ("scorer", settings["scorer"], benchmark.scorers),
        ("variant", variant, benchmark.variants),
    ):
        if value not in allowed:
            raise HarnessError(f"{setting} is {value!r}; it must be one of {', '.join(allowed)}")
    harness.check_sizes(settings["batch_size"], settings["max_new_tokens"])
    scorer = benchmark.scorers[settings["scorer"]]
    questions, read_errors = benchmark.read(settings["data_dir"], variant)
    checkpoint = _checkpoint(settings)
    overrides = dotted(settings["model_overrides"])
    answers_depend_on = {
        "benchmark": name,
        "variant": variant,
        "scorer": settings["scorer"],
        "checkpoint": checkpoint_fingerprint(checkpoint),
        "dtype": settings["dtype"],
        "model_overrides": overrides,
    }
    weights = settings.get("weights")
    if weights is not None:
        answers_depend_on["weights"] = weights
    if scorer.ask.continuation is None:
        answers_depend_on["max_new_tokens"] = settings["max_new_tokens"]

    @cache
    def open_vlm():
        partition = own_devices(settings["tensor"])
        return load(
            checkpoint, dtype=settings["dtype"], config_overrides=overrides, partition=partition, weights=weights
        )

    asked = first_of_each_split(questions, limit)
    with together(USER_ERRORS), SharedLog(workdir, answers_depend_on, questions) as shared:
        log = shared.log
        if log.finished and is_first():
            known = sum(question.id in log.finished for question in asked)
            torn = "; the last line was half written and is asked again" if log.torn else ""
            print(f"{known} of {len(asked)} questions are answered in {log.workdir / PREDICTIONS} already{torn}")
        errors = harness.evaluate(
            open_vlm,
            shared.own(asked),
            log,
            scorer,
            batch_size=settings["batch_size"],
            max_new_tokens=settings["max_new_tokens"],
            show_progress=show_progress and is_first(),
        )
        errors = shared.bring_together(errors)

        def finish() -> dict[str, Any]:
            answered = [log.finished[question.id] for question in asked if question.id in log.finished]
            results = build_results(
                name,
                config=dict(settings),
                predictions=answered,
                splits=list(dict.fromkeys(question.split for question in asked)),
                errors=[*read_errors, *errors],
                note=demo.NOTE if demo.is_random(checkpoint) else None,
                prompt=harness.prompt(asked[0], scorer.ask),
            )
            written = [RESULTS, PREDICTIONS]
            if variant in benchmark.exports:
                export = benchmark.exports[variant]
                by_name = {prediction.id: prediction for prediction in answered}
                write_json(log.workdir / export.file_name, export.content(Path(settings["data_dir"]), variant, by_name))
                results["judge"] = export.judge
                written.append(export.file_name)
            write_json(log.workdir / RESULTS, results)
            paths = write_pictures(asked, log.finished, log.workdir / PICTURES, pictures)
            if paths and not any(prediction.selection for prediction in answered) and open_vlm().config.grouping:
                shown = [question for question in asked if question.id in log.finished]
                paths += write_groups(open_vlm(), shown, log.workdir / PICTURES, pictures)
            print_report(results)
            pictured = f" and {len(paths)} pictures in {log.workdir / PICTURES}" if paths else ""
            print(f"Written: {', '.join(str(log.workdir / file) for file in written)}{pictured}")
            if not answered:
                raise HarnessError(
                    f"no question of {settings['data_dir']} could be asked; the reasons are listed above"
                )
            return results

        return on_first(finish)


def checkpoint_fingerprint(checkpoint: str | Path) -> str:
    """A short name for the content of a checkpoint folder, taken without reading all of it.

    Every file counts by its name, size, time of change and a sample of its bytes.
    """
    root = Path(checkpoint)
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        status = path.stat()
        digest.update(f"{path.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        with path.open("rb") as file:
            for k in range(_SAMPLES):
                file.seek(k * status.st_size // _SAMPLES)
                digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def _checkpoint(settings: Mapping[str, Any]) -> Path:
    path = settings["checkpoint"]
    if not path:
        raise HarnessError(
            "no checkpoint is given: --config.checkpoint must be the folder of an imported checkpoint or of published "
            "safetensors, such as senfu/llava-v1.5-7b-flexattn or liuhaotian/llava-v1.5-7b"
        )
    folder = Path(path)
    if not folder.exists() and path == demo.CHECKPOINT:
        print(f"writing a small checkpoint of random weights to {folder}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        demo.write_random_checkpoint(folder)
    if not (folder / "config.json").is_file():  # asked first: of a wrong folder, say /, every file would be read
        wrong = "has no config.json" if folder.exists() else "does not exist"
        raise HarnessError(f"the checkpoint {folder} {wrong}; give the right --config.checkpoint")
    return folder


def first_of_each_split(questions: Sequence[Question], limit: int) -> list[Question]:
    """The first `limit` questions of each split; 0: all."""
    if not limit:
        return list(questions)
    counts: dict[str, int] = {}
    chosen = []
    for question in questions:
        counts[question.split] = counts.get(question.split, 0) + 1
        if counts[question.split] <= limit:
            chosen.append(question)
    return chosen


def _run_vsearch(settings: Mapping[str, Any], workdir: str | Path) -> dict[str, Any]:
    # Imported when it is called, so that no other benchmark waits for tfds.
    from flexattn_jax.evaluation.search_run import run_vsearch

    return run_vsearch(settings, workdir)


def _run_compare(settings: Mapping[str, Any], workdir: str | Path) -> dict[str, Any]:
    from flexattn_jax.evaluation.compare import run_compare

    return run_compare(settings, workdir)


RUNNERS: dict[str, Runner] = {name: partial(run_questions, name) for name in BENCHMARKS}
RUNNERS |= {"vsearch": _run_vsearch, "compare": _run_compare}
