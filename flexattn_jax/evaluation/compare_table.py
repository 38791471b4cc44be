"""The comparison's tables and charts: on the screen, as markdown, as CSV, and accuracy against cost as PNG."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from flexattn_jax.evaluation.report import percent
from flexattn_jax.files import write_whole

_COSTS = (
    ("tokens read", lambda costs: f"{costs['tokens_read']:.0f}"),
    ("decoder GFLOP", lambda costs: _number(costs["decoder_gflop"])),
    ("answer GFLOP", lambda costs: _number(costs["answer_gflop"])),
)
_TIMES = (
    ("encode, ms", lambda times: _number(times["encode"][0])),
    ("prefill, ms", lambda times: _number(times["prefill"][0])),
    ("decode, ms a token", lambda times: _number(times["decode"][0])),
    ("memory, MB", lambda times: _number(times["memory"] / 1e6)),
)
_NOTE = """\
Accuracy in percent, the mean over models of several seeds, with a 95 % interval (of one model Wilson's; of several a
bootstrap over models and questions). Tokens read: tokens of the picture that the row which answers attends to, mean
over the decoder's layers. Operations are counted (models/flops.py; a multiply-add is two) over the prompt: `decoder`
its layers, `answer` all from the picture to logits. Times are measured, one question alone in a batch: medians. Memory
is what XLA plans for the largest of the programs, weights included."""


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _columns(benchmark: Mapping[str, Any]) -> list[str]:
    return ["system", "accuracy, %", *_splits(benchmark), *(name for name, _ in (*_COSTS, *_TIMES)), "models"]


def _splits(benchmark: Mapping[str, Any]) -> list[str]:
    """Those that all rows have, where there are few; more are in the CSV."""
    names = dict.fromkeys(split for row in benchmark["systems"].values() for split in row["splits"])
    return list(names) if 1 < len(names) <= 3 else []


def _cells(row: Mapping[str, Any], benchmark: Mapping[str, Any]) -> list[str]:
    wrong = f"{len(row['problems'])} missing" if row["problems"] else ""
    models = ", ".join(filter(None, (str(len(row["seeds"])) if row["seeds"] else "", wrong)))
    return [
        row["title"],
        percent(row["overall"]),
        *(percent(row["splits"].get(split)) for split in _splits(benchmark)),
        *(show(row["costs"]) if row["costs"] else "-" for _, show in _COSTS),
        *(show(row["times"]) if row["times"] else "-" for _, show in _TIMES),
        models,
    ]


def _problems(benchmark: Mapping[str, Any]) -> list[str]:
    """A line for each model that is missing or cannot be read; the command that makes it, once for rows that share."""
    lines: dict[str, None] = {}
    for row in benchmark["systems"].values():
        for problem in row["problems"]:
            if problem["command"]:
                lines[f"{problem['reason']}; make it with\n    {problem['command']}"] = None
            else:
                seed = "" if problem["seed"] is None else f", seed {problem['seed']}"
                lines[f"{row['title']}{seed}: {problem['reason']}"] = None
    return list(lines)


def _devices(benchmark: Mapping[str, Any]) -> str:
    devices = sorted({row["times"]["device"] for row in benchmark["systems"].values() if row["times"]})
    return f"Timed on {', '.join(devices)}." if devices else "Nothing was timed."


def print_tables(results: Mapping[str, Any]) -> None:
    """Every benchmark's table, and what is missing; without a terminal in plain text."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=180, color_system=None)
    for benchmark in results["benchmarks"].values():
        table = Table(title=benchmark["title"], box=box.SIMPLE_HEAD)
        for column in _columns(benchmark):
            table.add_column(column, justify="left" if column == "system" else "right")
        for row in benchmark["systems"].values():
            table.add_row(*_cells(row, benchmark), style=None if row["seeds"] else "dim")
        console.print(table)
        console.print(_devices(benchmark), highlight=False)
        for line in _problems(benchmark):
            console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)


def write_markdown(results: Mapping[str, Any], path: Path, charts: Sequence[Path]) -> None:
    """The tables as markdown, with the charts that are there."""
    parts = ["# Comparison", _NOTE]
    for benchmark in results["benchmarks"].values():
        columns = _columns(benchmark)
        lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
        lines += ["| " + " | ".join(_cells(row, benchmark)) + " |" for row in benchmark["systems"].values()]
        chance = f" Chance is {100 * benchmark['chance']:.1f} %." if benchmark["chance"] else ""
        parts += [f"## {benchmark['title']}", f"{benchmark['questions']} questions.{chance} {_devices(benchmark)}"]
        parts += ["\n".join(lines), *(f"- {line}" for line in _problems(benchmark))]
    parts += [f"![accuracy against cost]({chart.name})" for chart in charts]
    write_whole(path, "\n\n".join(parts) + "\n")


def write_csv(results: Mapping[str, Any], path: Path) -> None:
    """A line for each system and benchmark, and for each of its splits; numbers as in results.json."""
    names = ["benchmark", "system", "title", "split", "n", "accuracy", "low", "high", "models"]
    costs, times = ("tokens_read", "decoder_gflop", "answer_gflop"), ("encode", "prefill", "decode")
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow([*names, *costs, *(f"{t}_ms{end}" for t in times for end in ("", "_min", "_max")), "memory"])
    for benchmark, found in results["benchmarks"].items():
        for system, row in found["systems"].items():
            for split, counts in {"overall": row["overall"], **row["splits"]}.items():
                counts = counts or {"n": 0, "accuracy": None, "ci95": None}
                low, high = counts["ci95"] or (None, None)
                values = [benchmark, system, row["title"], split, counts["n"], counts["accuracy"], low, high]
                values += [len(row["seeds"]), *((row["costs"] or {}).get(name) for name in costs)]
                spent = row["times"] or {"memory": None} | {name: [None] * 3 for name in times}
                writer.writerow([*values, *(v for name in times for v in spent[name]), spent["memory"]])
    write_whole(path, file.getvalue())


# One colour and marker for each family, in the order of the table; a colour that comes again has hollow markers and
# dashed lines. The colours are Okabe and Ito's, which the colour-blind tell apart.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_MARKERS = "osD^vP*X<>hp"


def draw_chart(benchmark: Mapping[str, Any], path: Path) -> Path | None:
    """Accuracy against counted operations and against measured time; None where no system has answered."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = [row for row in benchmark["systems"].values() if row["overall"] and row["overall"]["n"]]
    if not rows:
        return None
    axes_of = [("decoder, GFLOP over the prompt (counted)", lambda row: row["costs"]["decoder_gflop"])]
    if all(row["times"] for row in rows):
        axes_of.append(("encode and prefill, ms (measured)", _milliseconds))
    figure = Figure(figsize=(5.2 * len(axes_of) + 2.6, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    families = dict.fromkeys(row["family"] for row in rows)
    panels = figure.subplots(1, len(axes_of), sharey=True, squeeze=False)[0]
    for axes, (label, across) in zip(panels, axes_of, strict=True):
        for number, family in enumerate(families):
            _draw_family(axes, number, [row for row in rows if row["family"] == family], across)
        if benchmark["chance"]:
            axes.axhline(100 * benchmark["chance"], color="#999999", linewidth=0.8, linestyle=":")
            axes.annotate(
                "chance",
                (1, 100 * benchmark["chance"]),
                xycoords=("axes fraction", "data"),
                fontsize=7,
                color="#777777",
                ha="right",
                va="bottom",
                xytext=(-3, 1),
                textcoords="offset points",
            )
        axes.set(xscale="log", xlabel=label)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y", color="#EEEEEE")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy, % (95 % interval)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(benchmark["title"], fontsize=10)
    figure.savefig(path, dpi=160)
    return path


def _milliseconds(row: Mapping[str, Any]) -> float:
    return row["times"]["encode"][0] + row["times"]["prefill"][0]


def _draw_family(axes: Any, number: int, rows: Sequence[Mapping[str, Any]], across: Any) -> None:
    rows = sorted(rows, key=across)
    x, y = [across(row) for row in rows], [100 * row["overall"]["accuracy"] for row in rows]
    reach = [[100 * abs(row["overall"]["ci95"][end] - row["overall"]["accuracy"]) for row in rows] for end in (0, 1)]
    again, colour = number // len(_COLOURS), _COLOURS[number % len(_COLOURS)]
    look = {"linestyle": "--", "markerfacecolor": "white"} if again else {}
    marker = _MARKERS[number % len(_MARKERS)]
    look |= {"color": colour, "marker": marker, "markersize": 5.5, "linewidth": 1.1, "elinewidth": 0.8, "capsize": 2}
    axes.errorbar(x, y, reach, label=rows[0]["family"], **look)
    for row, place in zip(rows, zip(x, y, strict=True), strict=True):
        if row["size"]:
            axes.annotate(row["size"], place, xytext=(4, 4), textcoords="offset points", fontsize=6.5, color=colour)
