"""Charts of a table: each is drawn where its axis has more than one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from flexattn_jax.config import VLMConfig
from flexattn_jax.costs.cases import CHECKS, model_config
from flexattn_jax.costs.table import Row


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart of one value against another, a line for each series and a panel for each program and target.

    across, up: of a row, None where it has no such value. series: the line that a row belongs to.
    """

    name: str
    title: str
    across: Callable[[Row, VLMConfig], float | None]
    across_label: str
    up: Callable[[Row], float | None]
    up_label: str
    series: Callable[[Row], str]


def _compile(row: Row) -> float | None:
    seconds = row.seconds("compile")
    return seconds.median if seconds else None


def _estimate(row: Row) -> float | None:
    seconds = row.value("estimated_seconds")
    return 1000 * seconds if seconds else None


def _peak(row: Row) -> float | None:
    peak = row.value("memory", "peak")
    return peak / 2**30 if peak else None


def _cells(row: Row, config: VLMConfig) -> float | None:
    """Cells that a row keeps; 0 for the model without high resolution."""
    if row.case.system == "lowres":
        return 0
    flex = config.flexattention
    if flex is None or row.case.system.partition(":")[0] != "flex":
        return None
    return flex.num_cells if flex.selector == "all" else flex.row_capacity


CHARTS = (
    Chart(
        "compile_depth",
        "Compile time against depth (measured)",
        lambda row, config: config.decoder.num_layers,
        "decoder layers",
        _compile,
        "compile, s",
        lambda row: f"{row.case.system}, {row.case.layers}",
    ),
    Chart(
        "time_resolution",
        "Step time against resolution (estimated)",
        lambda row, config: config.image_size,
        "side of the picture, pixels",
        _estimate,
        "step, ms",
        lambda row: f"{row.case.system}, {row.case.layers}",
    ),
    Chart(
        "memory_resolution",
        "Peak memory a device against resolution (counted)",
        lambda row, config: config.image_size,
        "side of the picture, pixels",
        _peak,
        "peak, GiB",
        lambda row: f"{row.case.system}, {row.case.layers}",
    ),
    Chart(
        "time_cells",
        "Step time against cells that a row reads (estimated)",
        _cells,
        "cells",
        _estimate,
        "step, ms",
        lambda row: f"by {row.case.ranking}, {row.case.layers}",
    ),
)


def draw_charts(found: Sequence[Row], folder: Path) -> list[Path]:
    """Writes the charts that the rows have values for as PNG, and returns their paths."""
    rows = [(row, model_config(row.case)) for row in found if row.case.program not in CHECKS]
    paths = []
    for chart in CHARTS:
        panels = _panels(chart, rows)
        if panels:
            paths.append(_draw(chart, panels, folder / f"{chart.name}.png"))
    return paths


Panel = dict[str, list[tuple[float, float]]]  # points by series


def _panels(chart: Chart, rows: Sequence[tuple[Row, VLMConfig]]) -> dict[str, Panel]:
    """The points of each panel; panels in which the axis has one value are left out."""
    panels: dict[str, Panel] = {}
    for row, config in rows:
        across, up = chart.across(row, config), chart.up(row)
        if across is not None and up is not None:
            panel = panels.setdefault(f"{row.case.preset} {row.case.program}, {row.case.target}", {})
            panel.setdefault(chart.series(row), []).append((across, up))
    return {
        name: {series: sorted(points) for series, points in panel.items()}
        for name, panel in panels.items()
        if len({x for points in panel.values() for x, _ in points}) > 1
    }


def _draw(chart: Chart, panels: dict[str, Panel], path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for series, points in panel.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=series)
        axes.set(title=name, xlabel=chart.across_label, ylabel=chart.up_label)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    figure.suptitle(chart.title)
    figure.savefig(path, dpi=110)
    return path
