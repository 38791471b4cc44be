"""Draws what tools/mini_study.py has left: learning, and accuracy against object size and against cells read.

    python tools/mini_charts.py --out=runs/mini --picture=docs/pictures/mini_study.png

Of all seeds and tests that are there; what is missing is not drawn, and said.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mini_study import CAPACITIES, EVERY_CELL, RECIPE, Test, keeping, stage_of

from flexattn_jax.config import preset
from flexattn_jax.evaluation.metrics import wilson_interval
from flexattn_jax.inputs.datasets.vsearch_examples import ATTRIBUTES
from flexattn_jax.training.logging import METRICS

COLOURS = {  # Okabe and Ito's
    "flex": "#D55E00",
    "released": "#CC79A7",
    "twin": "#0072B2",
    "random": "#009E73",
    "all": "#E69F00",
}
TITLES = {
    "flex": "FlexAttention, no cell twice",
    "released": "FlexAttention, cells may be read again",
    "twin": "low resolution alone",
    "random": "random cells in place of its own",
    "all": "every cell, the same weights",
}
SIZES = (32, 36, 40, 44, 48)  # of `standard`, px: where a column of the middle chart begins; the last one ends it


def main() -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, type=Path, help="of tools/mini_study.py")
    parser.add_argument("--picture", required=True, type=Path)
    arguments = parser.parse_args()
    seeds = sorted(path for path in arguments.out.glob("seed*") if path.is_dir())
    if not seeds:
        raise SystemExit(f"{arguments.out} holds no seed*: run tools/mini_study.py --out={arguments.out} first")
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    learning, sizes, cells = figure.subplots(1, 3)
    draw_learning(learning, seeds)
    draw_sizes(sizes, seeds)
    draw_cells(cells, seeds)
    for axes in (learning, sizes, cells):
        axes.grid(axis="y", color="#EEEEEE")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(arguments.picture, dpi=150)


def draw_learning(axes: Any, seeds: Sequence[Path]) -> None:
    """Loss on validation pictures against steps, part after part, a line for each seed."""
    borders = set()
    for arm in ("flex", "twin"):
        found = [part for seed in seeds for part in losses(seed, arm)]
        if not found:
            print(f"no {METRICS} of {arm}: its learning is not drawn")
        for i, (_, points) in enumerate(found):
            label = None if i else TITLES[arm]
            axes.plot(*zip(*points, strict=True), color=COLOURS[arm], marker=".", linewidth=1, label=label)
        borders |= {first for first, _ in found} - {0}
    for border in borders:
        axes.axvline(border, color="#BBBBBB", linewidth=0.6, linestyle=":")
    parts = ", ".join(RECIPE["PARTS"])
    axes.set(xlabel=f"steps: {parts}", ylabel="loss on validation pictures", ylim=0, title="learning")


def losses(seed: Path, arm: str) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """For each part that has been trained, the step before it, and steps with their losses."""
    first = 0
    for part in RECIPE["PARTS"]:
        file = seed / stage_of(arm, part).replace(",", "-") / METRICS
        if not file.is_file():
            return
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        points = [(first + line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
        if points:
            yield first, points
        first += max(line["step"] for line in lines)


def draw_sizes(axes: Any, seeds: Sequence[Path]) -> None:
    """Accuracy against the longer side of the object that is asked about."""
    tests = {arm: Test(arm) for arm in ("flex", "released", "twin")}
    tests |= {"random": Test("flex", swap="random"), "all": Test("flex", overrides=EVERY_CELL)}
    for name, test in tests.items():
        records = asked(seeds, test)
        if not records:
            continue
        points = []
        for low, high in itertools.pairwise(SIZES):
            within = [r["correct"] for r in records if low <= r["size"] < high + (high == SIZES[-1])]
            if within:
                points.append(((low + high) / 2, sum(within), len(within)))
        draw_accuracy(axes, points, COLOURS[name], TITLES[name])
    axes.set(xlabel="object's longer side, px of 512", ylabel="colour of 4, % (95 % interval)", title="object size")
    axes.axhline(25, color="#999999", linewidth=0.8, linestyle=":")


def draw_cells(axes: Any, seeds: Sequence[Path]) -> None:
    """Accuracy against the cells that a row reads in a layer, with weights trained for one number of them."""
    mini = preset("mini").flexattention
    trained, every = mini.capacity, mini.num_cells
    for preset_name, style in (("standard", "-"), ("crowded", "--")):
        tests = {k: Test("flex", preset_name, overrides=keeping(k)) for k in CAPACITIES}
        tests |= {trained: Test("flex", preset_name), every: Test("flex", preset_name, overrides=EVERY_CELL)}
        having = [seed for seed in seeds if all(test.file(seed).is_file() for test in tests.values())]
        if not having:
            print(f"no seed was tested with every number of cells on {preset_name}: not drawn")
            continue
        answers = {count: asked(having, test) for count, test in sorted(tests.items())}
        points = [(count, sum(r["correct"] for r in records), len(records)) for count, records in answers.items()]
        label = f"{preset_name}, {len(having)} seed" + "s" * (len(having) > 1)
        draw_accuracy(axes, points, COLOURS["flex"], label, style)
    axes.axvline(trained, color="#BBBBBB", linewidth=0.6, linestyle=":")
    axes.set(xscale="log", xlabel=f"cells read in a layer, of {every} (trained with {trained})", title="cells read")
    ticks = sorted({*CAPACITIES, trained, every})
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()


def asked(seeds: Sequence[Path], test: Test) -> list[Mapping[str, Any]]:
    """Records of all seeds' questions for a colour; nothing, and a message, where no seed was tested."""
    files = [test.file(seed) for seed in seeds]
    found = [record for file in files if file.is_file() for record in json.loads(file.read_text())]
    if not found:
        print(f"no seed has tests/{test.name}.json: it is not drawn")
    return [record for record in found if record["form"] == ATTRIBUTES]


def draw_accuracy(
    axes: Any, points: Sequence[tuple[float, int, int]], colour: str, label: str, style: str = "-"
) -> None:
    """Points (x, right, all) with their intervals."""
    x, accuracy = [point[0] for point in points], [100 * right / n for _, right, n in points]
    ends = zip(*(wilson_interval(right, n) for _, right, n in points), strict=True)
    reach = [[abs(100 * end - y) for end, y in zip(side, accuracy, strict=True)] for side in ends]
    look = {"color": colour, "linestyle": style, "marker": "o", "markersize": 4, "capsize": 2, "linewidth": 1.1}
    axes.errorbar(x, accuracy, reach, label=label, **look)


if __name__ == "__main__":
    main()
