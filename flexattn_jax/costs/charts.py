"""Charts of a table: each is drawn where its axis has more than one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flexattn_jax.config import VLMConfig
from flexattn_jax.costs.cases import CHECKS, model_config
from flexattn_jax.costs.measure import LATE
from flexattn_jax.costs.table import Row, Spread


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart of one value against another, a line for each series and a panel for each program and target.

    across, up: of a row, None where it has no such value. series: the line that a row belongs to.
    least: of a row without a value for `up`, what is known to be below it; None: nothing is.
    """

    name: str
    title: str
    across: Callable[[Row, VLMConfig], float | None]
    across_label: str
    up: Callable[[Row], float | None]
    up_label: str
    series: Callable[[Row], str]
    least: Callable[[Row], float | None] = lambda row: None


def _limit(row: Row) -> float | None:
    return row.readings[0].limit if row.status == LATE else None


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
    return flex.row_capacity


CHARTS = (
    Chart(
        "compile_depth",
        "Compile time against depth (measured)",
        lambda row, config: config.decoder.num_layers,
        "decoder layers",
        _compile,
        "compile, s",
        lambda row: f"{row.case.system}, {row.case.layers}",
        _limit,
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
            paths.append(_draw_lines(chart, panels, folder / f"{chart.name}.png"))
    bars = _bars([row for row, _ in rows])
    if bars:
        paths.append(_draw_bars(bars, folder / "compile_systems.png"))
    return paths


@dataclasses.dataclass
class Line:
    """Points of a series, and those of which only a lower bound is known."""

    points: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    bounds: list[tuple[float, float]] = dataclasses.field(default_factory=list)


Panel = dict[str, Line]  # by series


def _panels(chart: Chart, rows: Sequence[tuple[Row, VLMConfig]]) -> dict[str, Panel]:
    """The lines of each panel; panels in which no line has two points are left out."""
    panels: dict[str, Panel] = {}
    for row, config in rows:
        across, up, least = chart.across(row, config), chart.up(row), chart.least(row)
        if across is None or (up is None and least is None):
            continue
        line = panels.setdefault(_title(row), {}).setdefault(chart.series(row), Line())
        if up is not None:
            line.points.append((across, up))
        else:
            line.bounds.append((across, least))
    return {
        name: panel
        for name, panel in panels.items()
        if any(len({x for x, _ in line.points}) > 1 for line in panel.values())
    }


def _bars(rows: Sequence[Row]) -> dict[str, dict[str, Spread]]:
    """Compile seconds by panel and system, of scanned rows that differ in their system alone."""
    panels: dict[str, dict[str, Spread]] = {}
    for row in rows:
        seconds, case = row.seconds("compile"), row.case
        plain = case.layers == "scanned" and case.ranking == "cells" and not (case.depth or case.zoom or case.options)
        if seconds and plain and case.remat in ("none", "full"):
            panels.setdefault(_title(row), {}).setdefault(case.system, seconds)
    return {name: panel for name, panel in panels.items() if len(panel) > 1}


def _title(row: Row) -> str:
    return f"{row.case.preset} {row.case.program}, {row.case.target}"


def _draw_lines(chart: Chart, panels: dict[str, Panel], path: Path) -> Path:
    figure = _figure(5 * len(panels), 4)
    for axes, (name, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, (series, line) in enumerate(panel.items()):
            colour = f"C{number}"
            axes.plot(*_columns(line.points), marker="o", label=series, color=colour)
            axes.plot(*_columns(line.bounds), "^", markerfacecolor="none", color=colour)
        if any(line.bounds for line in panel.values()):
            axes.plot([], [], "^", markerfacecolor="none", color="grey", label="not done by then")
        axes.set(title=name, xlabel=chart.across_label, ylabel=chart.up_label)
        axes.set_xticks(sorted({x for line in panel.values() for x, _ in line.points + line.bounds}))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize="small")
    return _save(figure, chart.title, path)


def _draw_bars(panels: dict[str, dict[str, Spread]], path: Path) -> Path:
    """Medians as bars, least and most as whiskers."""
    figure = _figure(4.5 * len(panels), 0.4 * max(map(len, panels.values())) + 1.6)
    for axes, (name, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        medians = [spread.median for spread in panel.values()]
        below = [spread.median - min(spread.values) for spread in panel.values()]
        above = [max(spread.values) - spread.median for spread in panel.values()]
        axes.barh(list(panel), medians, xerr=(below, above), capsize=3, color="C0")
        axes.invert_yaxis()
        axes.set(title=name, xlabel="compile, s")
        axes.grid(axis="x", alpha=0.3)
    return _save(figure, "Compile time of scanned layers by system (measured; whiskers: least and most)", path)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    points = sorted(points)
    return [x for x, _ in points], [y for _, y in points]


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(width, 6.5), height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, title: str, path: Path) -> Path:
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    return path
