"""Readings as tables, charts and differences."""

import csv
import dataclasses
import io
import pathlib
import subprocess
import sys

import pytest
from costs.tables import costs, reading
from PIL import Image
from rich.console import Console

from flexattn_jax.costs import run
from flexattn_jax.costs.cases import Case, model_config
from flexattn_jax.costs.charts import CHARTS, _panels, draw_charts
from flexattn_jax.costs.compare import compare
from flexattn_jax.costs.records import COLD, WARM, Costs, write_costs
from flexattn_jax.costs.table import COLUMNS, csv_text, markdown, rich_table, rows, size

LOWRES, FLEX = Case("lowres", "prefill", "v5e:2x2"), Case("flex:10%", "prefill", "v5e:2x2")
DETAILS = {
    "analytic_flops": 8e12,
    "assumption": "a layer projects 8 and reads 8 cells",
    "stablehlo": {"operations": 900, "flops": 8.4e12, "bytes": 5000},
    "memory": {"peak": 3 * 2**30, "temporary": 2**20},
    "hlo": {"collectives": {"all-reduce": {"count": 64.0, "bytes": 2.0**28}}, "instructions": 1200},
    "estimated_seconds": 0.03,
    "roofline_seconds": 0.02,
}


def two_rows(**more) -> Costs:
    late = {"status": "time limit", "message": "not done after 60 s"}
    return costs(
        (LOWRES, reading(2.0, **DETAILS)), (LOWRES, reading(4.0)), (LOWRES, reading(3.0)), (FLEX, late), **more
    )


def test_seconds_are_a_median_with_its_spread_and_failures_are_rows():
    lowres, flex = rows([LOWRES, FLEX], two_rows())
    assert str(lowres.seconds("compile")) == "3 (2-4)"
    assert lowres.value("memory", "peak") == 3 * 2**30 and lowres.value("memory", "none", "at all") is None
    assert flex.seconds("compile") is None and flex.status == "time limit"
    assert rows([dataclasses.replace(FLEX, depth=4)], two_rows())[0].status == "not measured"


def test_warm_readings_stand_apart():
    warm = costs((LOWRES, reading(0.5, cached=True)), (FLEX, reading(7.0, cached=False)), kind=WARM)
    both = dataclasses.replace(warm, records=(*two_rows().records, *warm.records))
    row, uncached = rows([LOWRES, FLEX], both)
    assert COLUMNS["warm_s"].value(uncached) == "not cached" and str(COLUMNS["warm_s"].value(row)) == "0.5"
    lines = list(csv.DictReader(io.StringIO(csv_text([row, uncached]))))
    assert [line["warm_s"] for line in lines] == ["0.5", "not cached"] and lines[1]["readings"] == "1"
    assert str(row.warm_seconds("compile")) == "0.5" and row.seconds("compile").median == 3
    assert {record.kind for record in row.readings} == {COLD}


def test_the_terminal_shows_what_differs_and_says_where_figures_come_from():
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(rich_table(rows([LOWRES, FLEX], two_rows())))
    text = console.export_text()
    assert "7b, prefill, scanned, v5e:2x2" in text  # shared, so in the title
    assert "time limit: not done after 60 s" in text
    for part in ("compile s", "(measured)", "(counted)", "(estimated)", "3 (2-4)", "30", "8.4"):
        assert part in text
    assert "flex:10%" in text and "no chip has run it" in text


def test_a_table_of_nothing_but_failures_says_what_failed():
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(rich_table(rows([FLEX], costs((FLEX, {"status": "failed", "message": "signal 7"})))))
    assert "failed: signal 7" in console.export_text()


def test_markdown_has_every_column_and_the_notes():
    text = markdown(rows([LOWRES, FLEX], two_rows(busy=1.0)))
    header, line, *_ = text.splitlines()
    assert header.count("|") == line.count("|") and "estimate / roofline (estimated)" in header
    for part in (
        "| lowres |",
        "1.050",
        "64 all-reduce 256 MiB",
        "1.50",
        "3 GiB",
        "- lowres, prefill: a layer projects 8",
    ):
        assert part in text
    assert "4 of 4 readings were taken while other work used the machine" in text


def test_csv_holds_plain_numbers():
    lines = list(csv.DictReader(io.StringIO(csv_text(rows([LOWRES, FLEX], two_rows())))))
    assert [line["system"] for line in lines] == ["lowres", "flex:10%"]
    first = lines[0]
    assert (first["compile_s"], first["compile_s_min"], first["compile_s_max"]) == ("3.0", "2.0", "4.0")
    assert float(first["peak"]) == 3 * 2**30 and first["readings"] == "3" and first["estimate_ms"] == "0.03"
    assert lines[1]["compile_s"] == "" and lines[1]["result"] == "time limit"


@pytest.mark.parametrize(
    ("count", "shown"), [(None, ""), (12, "12 B"), (2048, "2 KiB"), (1.5 * 2**30, "1.5 GiB"), (1e15, "931323 GiB")]
)
def test_sizes_for_people(count, shown):
    assert size(count) == shown


def test_charts_are_drawn_where_an_axis_has_several_values(tmp_path):
    cases = [
        dataclasses.replace(LOWRES, depth=depth, layers=way) for depth in (4, 8) for way in ("scanned", "unrolled")
    ]
    found = rows(cases, costs(*((case, reading(case.depth)) for case in cases)))
    (path,) = draw_charts(found, tmp_path)
    assert path.name == "compile_depth.png"
    with Image.open(path) as picture:
        assert picture.width > 300 and len(picture.convert("L").getcolors(256)) > 20
    assert draw_charts(found[:2], tmp_path) == []  # one depth is no axis

    late = {"status": "time limit", "message": "not done after 60 s"}
    panels = _panels(CHARTS[0], [(row, model_config(row.case)) for row in rows(cases, costs((cases[0], late)))])
    assert panels == {}  # nothing but bounds
    bounded = rows(cases, costs((cases[1], late), *((case, reading(case.depth)) for case in cases if case != cases[1])))
    (panel,) = _panels(CHARTS[0], [(row, model_config(row.case)) for row in bounded]).values()
    assert panel["lowres, unrolled"].bounds == [(4, 60.0)] and panel["lowres, unrolled"].points == [(8, 8)]
    assert panel["lowres, scanned"].points == [(4, 4), (8, 8)] and draw_charts(bounded, tmp_path) == [path]

    cases = [dataclasses.replace(FLEX, system=f"flex:{cells}") for cells in (4, 8)]
    found = rows([LOWRES, *cases], costs(*((case, reading(**DETAILS)) for case in (LOWRES, *cases))))
    assert {path.name for path in draw_charts(found, tmp_path)} == {"time_cells.png", "compile_systems.png"}


def test_differences_are_those_that_the_spread_does_not_explain():
    before = costs((LOWRES, reading(2.0, **DETAILS)), (LOWRES, reading(2.4)), (FLEX, reading(5.0)))
    heavier = DETAILS | {"stablehlo": DETAILS["stablehlo"] | {"operations": 990, "flops": 8.4e12}}
    after = costs((LOWRES, reading(2.3, **heavier)), (LOWRES, reading(2.6)), (FLEX, reading(2.5)))
    changes = {(change.case.split(", ")[1], change.what): change for change in compare(before, after)}
    assert set(changes) == {
        ("lowres", "StableHLO operations (counted)"),
        ("flex:10%", "trace s (measured)"),
        ("flex:10%", "lower s (measured)"),
        ("flex:10%", "compile s (measured)"),
    }
    dearer = changes["lowres", "StableHLO operations (counted)"]
    assert dearer.is_dearer and dearer.ratio == pytest.approx(1.1) and (dearer.before, dearer.after) == ("900", "990")
    assert compare(before, after)[0] == dearer  # what got dearer comes first
    assert not changes["flex:10%", "compile s (measured)"].is_dearer
    assert compare(before, before) == []


def test_a_case_that_no_longer_fits_got_dearer():
    full = {"status": "does not fit", "message": "Used 20G of 15.75G hbm"}
    worse, better = costs((LOWRES, reading())), costs((LOWRES, full))
    (change,) = compare(worse, better)
    assert change.is_dearer and (change.what, change.after) == ("result", "does not fit")
    (change,) = compare(better, worse)
    assert not change.is_dearer


def test_the_diff_command_prints_and_tells_by_its_exit_code(tmp_path, capsys):
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    write_costs(before, costs((LOWRES, reading(1.0)), (FLEX, reading(1.0))))
    write_costs(
        after, costs((LOWRES, reading(9.0)), environment={"python": "3", "versions": {"jax": "2"}, "flags": {}})
    )
    assert run.run_diff([str(before), str(after)]) == 1
    out = capsys.readouterr().out
    assert "jax: 1 -> 2" in out and "9.000" in out and "only before: 7b, flex:10%" in out
    assert run.run_diff([str(before), str(before)]) == 0
    assert "nothing changed" in capsys.readouterr().out
    assert run.run_diff([str(before), str(tmp_path / "none.json")]) == 2
    assert "none.json does not exist" in capsys.readouterr().err
    assert run.run_diff([str(before)]) == 2


def test_the_command_says_what_is_wrong_with_a_setting(tmp_path):
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "compile_costs.py", "--config.targets=v9:2x2", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("compile_costs.py: targets has 'v9:2x2'") and done.stderr.count("\n") == 1
