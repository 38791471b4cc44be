"""What compile_costs.py calls: a table from settings, or what changed between two."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from flexattn_jax.command_line import can_draw_charts, exit_code
from flexattn_jax.config import ConfigError
from flexattn_jax.costs.cases import read_settings
from flexattn_jax.costs.charts import draw_charts
from flexattn_jax.costs.compare import change_table, compare_files, only_in_one
from flexattn_jax.costs.lab import measure_table
from flexattn_jax.costs.ratios import ratio_markdown, ratio_table
from flexattn_jax.costs.records import FILE
from flexattn_jax.costs.table import Row, csv_text, markdown, rich_table, rows
from flexattn_jax.files import write_whole

USER_ERRORS = (ConfigError,)
WIDTH = 160  # of tables where the terminal does not tell


def run_costs(values: Mapping[str, Any], workdir: str | Path) -> list[Row]:
    """Measures a table and writes costs.json, costs.md, costs.csv and charts to the folder.

    Args:
      values: of configs/compile_costs.py.
      workdir: a run that was stopped there goes on.

    Raises:
      ConfigError: settings or a folder that cannot be used, in one sentence.
    """
    console, folder = _console(), Path(workdir)
    cases, costs = measure_table(read_settings(values), folder, lambda line: console.print(line, highlight=False))
    found = rows(cases, costs)
    written = [folder / FILE]
    for name, text in (("costs.md", markdown(found) + "\n" + ratio_markdown(found)), ("costs.csv", csv_text(found))):
        write_whole(folder / name, text)
        written.append(folder / name)
    if can_draw_charts():
        written += draw_charts(found, folder)
    console.print(rich_table(found))
    if (compared := ratio_table(found)) is not None:
        console.print(compared)
    console.print("written: " + ", ".join(map(str, written)), highlight=False)
    return found


def run_diff(arguments: Sequence[str]) -> int:
    """`compile_costs.py diff A.json B.json`: prints what changed; the exit code is 1 if anything got dearer."""
    if len(arguments) != 2:
        print(
            "compile_costs.py: write compile_costs.py diff A.json B.json, two files that it has written",
            file=sys.stderr,
        )
        return 2
    dearer: list[bool] = []
    code = exit_code("compile_costs.py", lambda: dearer.append(_diff(*map(Path, arguments))), USER_ERRORS)
    return code or int(dearer[0])


def _diff(before: Path, after: Path) -> bool:
    """Prints what changed; whether anything got dearer."""
    environment, changes = compare_files(before, after)
    gone, new = only_in_one(before, after)
    console = _console()
    for line in environment:
        console.print(line, highlight=False, markup=False)
    if changes:
        console.print(change_table(changes))
    else:
        console.print("nothing changed beyond its spread")
    for what, names in (("only before", gone), ("only after", new)):
        if names:
            console.print(f"{what}: " + "; ".join(names), highlight=False, markup=False)
    return any(change.is_dearer for change in changes)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)
