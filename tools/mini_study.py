"""Trains and tests the mini models: every arm with several seeds, from one tower. docs/mini.md holds what it found.

    python tools/mini_study.py --out=runs/mini --seeds=0,1,2                        trains what is missing, tests
    python tools/mini_study.py --out=runs/mini --seeds=0 --arms=flex,xattn --train  trains these alone
    python tools/mini_study.py --out=runs/mini --seeds=1 --arms=flex,twin --train --tower=flexattn_jax/assets/mini/flex
                                                                                    with the packaged model's tower

A run that was stopped goes on. `make train-mini` is the part of it that makes one FlexAttention model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import runpy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexattn_jax.api import load
from flexattn_jax.evaluation.metrics import wilson_interval
from flexattn_jax.evaluation.search import Answer, ask_all
from flexattn_jax.files import write_whole
from flexattn_jax.inputs.datasets.vsearch import content_name, decode_example, default_data_dir, load_vsearch
from flexattn_jax.inputs.datasets.vsearch_examples import ATTRIBUTES, FORMS
from flexattn_jax.training.search import SearchSource
from flexattn_jax.training.views import VIEWS, keep_views

ARMS = ("twin", "flex", "released", "all", "random")
CAPACITIES = (1, 2, 8, 16)  # read by weights that were trained with another one
EVERY_CELL = (("flexattention.selector", "all"),)
FINER = (("flexattention.cell_grid", 12), ("flexattention.capacity", 18))  # 12.5 % of the cells; 4 of 36 are 11.1
READ_AGAIN = (("flexattention.revisit", True),)
ROOT = Path(__file__).parents[1]
RECIPE = runpy.run_path(str(ROOT / "configs" / "train_mini.py"))  # its PARTS, and which are whose


@dataclasses.dataclass(frozen=True)
class Test:
    """One reading of one arm: `overrides` of its configuration, and what its rows read in place of their selection."""

    arm: str
    preset: str = "standard"
    split: str = "test"
    data_seed: int = 0
    swap: str | None = None
    overrides: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        parts = [self.arm, self.preset, self.split, f"data{self.data_seed}", self.swap or "own"]
        return "-".join(parts + [f"{key.split('.')[-1]}{value}" for key, value in self.overrides])

    def file(self, seed_folder: Path) -> Path:
        """Where a seed's answers are kept."""
        return seed_folder / "tests" / f"{self.name}.json"


def keeping(capacity: int) -> tuple[tuple[str, int], ...]:
    """Overrides: cells that a row keeps in a layer."""
    return (("flexattention.capacity", capacity),)


def tests() -> Iterator[Test]:
    """Everything that docs/mini.md tells."""
    for preset in ("standard", "crowded"):
        for arm in ARMS:
            yield Test(arm, preset)
        for swap in ("random", "other_question", "objects"):
            yield Test("flex", preset, swap=swap)
        for capacity in CAPACITIES:
            yield Test("flex", preset, overrides=keeping(capacity))
        for overrides in (EVERY_CELL, FINER, READ_AGAIN, (("flexattention.enabled", False),)):
            yield Test("flex", preset, overrides=overrides)
        for arm in ("twin", "flex"):
            yield Test(arm, preset, split="test_art")
        yield Test("flex", preset, data_seed=12345)


def train_arm(arm: str, folder: Path, tower: Path, settings: Sequence[str]) -> None:
    """Trains an arm part by part (configs/train_mini.py), beginning with a model that has the tower."""
    before = tower
    for part in RECIPE["PARTS"]:
        stage = stage_of(arm, part)
        place = folder / stage.replace(",", "-")
        train(stage, place, f"--config.start.checkpoint={before}", *settings)
        before = place / "model"


def stage_of(arm: str, part: str) -> str:
    """What an arm's part is called after the colon of configs/train_mini.py; with "-" for ",", its folder."""
    return arm if part == "answers" else f"{RECIPE['BEGUN_AS'].get(arm, arm)},{part}"


def train(stage: str, workdir: Path, *settings: str) -> None:
    """Runs train.py, unless the model is there; a run that is asked to stop ends the study, too."""
    model = workdir / "model" / "config.json"
    if model.is_file():
        return
    command = [sys.executable, str(ROOT / "train.py"), f"--config={ROOT}/configs/train_mini.py:{stage}"]
    subprocess.run([*command, f"--workdir={workdir}", *settings], check=True)
    if not model.is_file():
        sys.exit(f"{workdir} was stopped before its end; the same command goes on from there")


def run_test(test: Test, model: Path, file: Path, data_dir: str, pictures: int) -> list[dict[str, Any]]:
    """Asks all questions, or reads what was answered before; one record a question."""
    if file.is_file():
        return json.loads(file.read_text())
    rows = load_vsearch(data_dir or None, test.preset, test.split, test.data_seed)
    examples = [decode_example(rows[k]) for k in range(min(len(rows), pictures or len(rows)))]
    vlm = load(model, config_overrides=dict(test.overrides))
    digest = content_name(test.preset, test.split, test.data_seed, len(rows))
    source = SearchSource(rows, vlm.tokenizer, vlm.config, digest)
    folder = Path(data_dir or default_data_dir()) / VIEWS  # every arm has the same tower
    kept = keep_views(source, digest, vlm.config, vlm.params["vision"], folder)
    views = [kept[k].sample.views for k in range(len(examples))]
    asked = ask_all(vlm, examples, test.swap, batch_size=16, views=views)
    records = [_record(answer) for batch in asked for answer in batch]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(records))
    return records


def _record(answer: Answer) -> dict[str, Any]:
    record = {"form": answer.form, "correct": answer.correct, "size": answer.size}
    if answer.kept is not None:
        record["cells"] = float(answer.kept.sum(axis=-1).mean())
        record["asked"] = any(answer.hit_asked)
        record["others"] = answer.hit_others_any
        record["distinct"] = answer.distinct
    return record


def summarise(records: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Accuracy over all seeds' questions with an interval, the seeds' own, and how often cells hold what is asked."""
    summary: dict[str, Any] = {}
    for form in FORMS:
        seeds = [[r for r in seed if r["form"] == form] for seed in records]
        right = sum(r["correct"] for seed in seeds for r in seed)
        n = sum(map(len, seeds))
        summary[form] = {
            "n": n,
            "accuracy": right / n,
            "ci95": wilson_interval(right, n),
            "seeds": [float(np.mean([r["correct"] for r in seed])) for seed in seeds],
        }
    flat = [r for seed in records for r in seed if r["form"] == ATTRIBUTES]
    if "cells" in flat[0]:
        for name in ("cells", "asked", "others", "distinct"):
            summary[name] = float(np.mean([r[name] for r in flat]))
    sizes = sorted({r["size"] // 4 * 4 for r in flat})
    summary["by_size"] = {
        size: [float(np.mean([r["correct"] for r in flat if r["size"] // 4 * 4 == size])), size] for size in sizes
    }
    return summary


def main() -> None:
    """Trains, tests, prints, and writes results.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS), help="of configs/train_mini.py; others are not tested")
    parser.add_argument(
        "--tower", type=Path, help="a model whose tower and connector to take; without, they are trained"
    )
    parser.add_argument("--train", action="store_true", help="train, and test nothing")
    parser.add_argument("--data_dir", default="", help="where vsearch is drawn to; empty: the user's data folder")
    parser.add_argument("--pictures", type=int, default=0, help="of each test; 0: all")
    arguments = parser.parse_args()
    data = [f"--config.data.data_dir={arguments.data_dir}"]
    seeds, arms = [int(seed) for seed in arguments.seeds.split(",")], arguments.arms.split(",")
    tower = arguments.tower
    if tower is None:
        first, tower = arguments.out / "tower", arguments.out / "tower-more" / "model"
        train("tower", first, *data)
        train("tower,more", tower.parent, f"--config.start.checkpoint={first / 'model'}", *data)
    for seed in seeds:
        for arm in arms:
            folder = arguments.out / f"seed{seed}"
            train_arm(arm, folder, tower, [*data, f"--config.seed={seed}"])
    if arguments.train:
        return
    results = {}
    for test in (test for test in tests() if test.arm in arms):
        records = []
        for seed in seeds:
            folder = arguments.out / f"seed{seed}"
            model = folder / test.arm / "model"
            records.append(run_test(test, model, test.file(folder), arguments.data_dir, arguments.pictures))
        summary = results[test.name] = summarise(records)
        shown = [f"{form} {100 * summary[form]['accuracy']:.1f} (n {summary[form]['n']})" for form in FORMS]
        hits = f", asked {summary['asked']:.2f}, others {summary['others']:.2f}" if "asked" in summary else ""
        print(f"{test.name}: {', '.join(shown)}{hits}", flush=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
