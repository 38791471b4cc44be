"""From readings to rows: a table for people, markdown, CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from flexattn_jax.costs.cases import Case
from flexattn_jax.costs.lab import BUSY
from flexattn_jax.costs.measure import OK
from flexattn_jax.costs.records import COLD, WARM, Costs, Record


@dataclasses.dataclass(frozen=True)
class Spread:
    """Several readings of one thing."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        shown = _seconds(self.median)
        return (
            shown if len(self.values) == 1 else f"{shown} ({_seconds(min(self.values))}-{_seconds(max(self.values))})"
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """All readings of one case.

    readings: of a cold start, in order; warm: with a cache that an earlier process filled.
    """

    case: Case
    readings: tuple[Record, ...]
    warm: tuple[Record, ...]

    @property
    def status(self) -> str:
        """Of measure.STATUSES; of the first reading, which all others follow."""
        return self.readings[0].status if self.readings else "not measured"

    @property
    def message(self) -> str:
        return self.readings[0].reading.get("message", "") if self.readings else ""

    @property
    def busy_readings(self) -> int:
        """Readings taken while the machine did something else, too."""
        return sum(record.busy > BUSY for record in self.readings)

    def seconds(self, name: str) -> Spread | None:
        """Of "trace", "lower" or "compile", with no cache."""
        return _spread(self.readings, name)

    def warm_seconds(self, name: str) -> Spread | None:
        """The same with a cache that holds the program."""
        return _spread(self.warm, name)

    def value(self, *path: str) -> Any:
        """What the first reading tells under this path, e.g. ("memory", "peak"); None where it does not."""
        found: Any = self.readings[0].reading if self.readings else {}
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        return found


def rows(cases: Sequence[Case], costs: Costs) -> list[Row]:
    """One row a case, in their order."""

    def of(case: Case, kind: str) -> tuple[Record, ...]:
        return tuple(
            sorted((r for r in costs.records if r.case == case and r.kind == kind), key=lambda record: record.number)
        )

    return [Row(case, of(case, COLD), of(case, WARM)) for case in cases]


@dataclasses.dataclass(frozen=True)
class Column:
    """One column: a heading, how it was come by (measured, counted, estimated), the value, and how it is shown."""

    heading: str
    source: str
    value: Callable[[Row], Any]
    show: Callable[[Any], str] = str
    unit: str = ""


def _flops_ratio(row: Row) -> float | None:
    analytic, counted = row.value("analytic_flops"), row.value("stablehlo", "flops")
    return counted / analytic if analytic and counted else None


def _estimate_over_roofline(row: Row) -> float | None:
    estimate, roofline = row.value("estimated_seconds"), row.value("roofline_seconds")
    return estimate / roofline if estimate and roofline else None


def _warm(row: Row) -> Spread | str | None:
    found = row.warm_seconds("compile")
    return found if found is None or row.warm[0].reading.get("cached") else "not cached"


def _step(row: Row) -> Spread | None:
    seconds = row.value("step_seconds")
    return Spread(tuple(seconds)) if seconds else None


def _collectives(row: Row) -> str | None:
    found = row.value("hlo", "collectives")
    if found is None:
        return None
    return ", ".join(f"{e['count']:.0f} {kind} {size(e['bytes'])}" for kind, e in found.items()) or "none"


def _fits(row: Row) -> str:
    return {OK: "fits"}.get(row.status, row.status)


def size(count: float | None) -> str:
    """Bytes for people."""
    if count is None:
        return ""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 2**power:
            return f"{count / 2**power:.3g} {unit}" if count < 1000 * 2**power else f"{count / 2**power:.0f} {unit}"
    return f"{count:.0f} B"


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _milliseconds(value: float) -> str:
    return f"{1000 * value:.3g}"


def _tera(value: float) -> str:
    return f"{value / 1e12:.4g}"


MEASURED, COUNTED, ESTIMATED = "measured", "counted", "estimated"
COLUMNS: dict[str, Column] = {
    "result": Column("result", "", _fits),
    "trace_s": Column("trace s", MEASURED, lambda row: row.seconds("trace")),
    "lower_s": Column("lower s", MEASURED, lambda row: row.seconds("lower")),
    "compile_s": Column("compile s", MEASURED, lambda row: row.seconds("compile")),
    "warm_s": Column("compile s, warm cache", MEASURED, _warm),
    "host_peak": Column("compiler's memory", MEASURED, lambda row: row.value("host_peak_bytes"), size),
    "operations": Column("StableHLO operations", COUNTED, lambda row: row.value("stablehlo", "operations")),
    "stablehlo_bytes": Column("StableHLO size", COUNTED, lambda row: row.value("stablehlo", "bytes"), size),
    "instructions": Column("HLO instructions", COUNTED, lambda row: row.value("hlo", "instructions")),
    "executable": Column("executable", COUNTED, lambda row: row.value("executable_bytes"), size),
    "arguments": Column("arguments", COUNTED, lambda row: row.value("memory", "arguments"), size, "a device"),
    "outputs": Column("outputs", COUNTED, lambda row: row.value("memory", "outputs"), size, "a device"),
    "temporary": Column("temporary", COUNTED, lambda row: row.value("memory", "temporary"), size, "a device"),
    "peak": Column("peak", COUNTED, lambda row: row.value("memory", "peak"), size, "a device"),
    "analytic_tflop": Column("TFLOP from shapes", COUNTED, lambda row: row.value("analytic_flops"), _tera),
    "tflop": Column("TFLOP x turns", COUNTED, lambda row: row.value("stablehlo", "flops"), _tera),
    "flops_ratio": Column("x turns / shapes", COUNTED, _flops_ratio, lambda value: f"{value:.3f}"),
    "xla_tflop": Column("TFLOP, XLA's, bodies once", COUNTED, lambda row: row.value("xla_flops_body_once"), _tera),
    "xla_bytes": Column(
        "bytes accessed, XLA's, bodies once", COUNTED, lambda row: row.value("xla_bytes_body_once"), size, "a device"
    ),
    "hbm": Column("HBM bytes x turns", COUNTED, lambda row: row.value("hlo", "hbm_bytes"), size, "a device"),
    "collectives": Column("collectives", COUNTED, _collectives, unit="a device"),
    "roofline_ms": Column("roofline ms", COUNTED, lambda row: row.value("roofline_seconds"), _milliseconds),
    "estimate_ms": Column("step ms", ESTIMATED, lambda row: row.value("estimated_seconds"), _milliseconds),
    "over_roofline": Column("estimate / roofline", ESTIMATED, _estimate_over_roofline, lambda value: f"{value:.2f}"),
    "step_s": Column("step s", MEASURED, _step),
}
TERMINAL = (
    "compile_s",
    "host_peak",
    "operations",
    "executable",
    "peak",
    "tflop",
    "roofline_ms",
    "estimate_ms",
    "over_roofline",
)


def labels(found: Sequence[Row]) -> list[str]:
    """What tells each row from the others: its case without what all of them share."""
    parts = [row.case.name.split(", ") for row in found]
    shared = set.intersection(*map(set, parts)) if len(parts) > 1 else set()
    return [", ".join(part for part in own if part not in shared) or own[0] for own in parts]


def shared_label(found: Sequence[Row]) -> str:
    """What all rows have in common."""
    parts = [row.case.name.split(", ") for row in found]
    return ", ".join(part for part in parts[0] if all(part in own for own in parts)) if len(parts) > 1 else ""


def rich_table(found: Sequence[Row]) -> Table:
    """The most asked-for columns, for a terminal."""
    table = Table(title=shared_label(found) or None, caption="\n".join(notes(found)), caption_justify="left")
    table.add_column("case")
    names = [name for name in TERMINAL if any(_cell(row, name) for row in found)] or ["compile_s"]
    if any(_cell(row, "step_s") for row in found):
        names.append("step_s")
    for name in names:
        table.add_column(_heading(name), justify="right")
    for label, row in zip(labels(found), found, strict=True):
        cells = [_cell(row, name) for name in names]
        if row.status != OK:
            cells[0] = f"{row.status}: {row.message}" if row.message else row.status
        table.add_row(label, *cells)
    return table


def markdown(found: Sequence[Row]) -> str:
    """All columns that hold anything, as a markdown table with its notes."""
    names = [name for name in COLUMNS if any(_cell(row, name) for row in found)]
    lines = [
        f"| {shared_label(found) or 'case'} | " + " | ".join(_heading(name) for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for label, row in zip(labels(found), found, strict=True):
        cells = [_cell(row, name) for name in names]
        if row.message:
            cells[0] = f"{row.status}: {row.message}"
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (label, *cells)) + " |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(found)), ""])


def csv_text(found: Sequence[Row]) -> str:
    """All columns as plain numbers: bytes, seconds, FLOPs; of several readings the median, the least and the most."""
    out = io.StringIO()
    spreads = [name for name, column in COLUMNS.items() if any(isinstance(column.value(row), Spread) for row in found)]
    heads = [head for name in COLUMNS for head in ([name, f"{name}_min", f"{name}_max"] if name in spreads else [name])]
    fields = [field.name for field in dataclasses.fields(Case)]
    writer = csv.writer(out)
    writer.writerow([*fields, *heads, "readings", "busy_readings", "message"])
    for row in found:
        cells: list[Any] = []
        for name, column in COLUMNS.items():
            value = column.value(row)
            if name in spreads and not isinstance(value, str):
                cells += [value.median, min(value.values), max(value.values)] if value else ["", "", ""]
            else:
                cells += ["" if value is None else value, *(["", ""] if name in spreads else [])]
        own = dataclasses.asdict(row.case)
        writer.writerow([*(own[field] for field in fields), *cells, len(row.readings), row.busy_readings, row.message])
    return out.getvalue()


def notes(found: Sequence[Row]) -> list[str]:
    """What a reader of the figures must know."""
    readings = sum(len(row.readings) for row in found)
    busy = sum(row.busy_readings for row in found)
    lines = ["Measured seconds: median (least-most) of the readings, each in a fresh process, no compilation cache."]
    if busy:
        lines.append(f"{busy} of {readings} readings were taken while other work used the machine: too high.")
    if any(row.value("estimated_seconds") for row in found):
        lines.append("Estimated: by the compiler's cost model, collectives left out; no chip has run it.")
    assumptions = dict.fromkeys((row.case.system, row.case.program, row.value("assumption")) for row in found)
    lines += [f"{system}, {program}: {what}." for system, program, what in assumptions if what]
    return lines


def _heading(name: str) -> str:
    column = COLUMNS[name]
    about = ", ".join(part for part in (column.source, column.unit) if part)
    return f"{column.heading} ({about})" if about else column.heading


def _cell(row: Row, name: str) -> str:
    value = COLUMNS[name].value(row)
    return "" if value is None else COLUMNS[name].show(value)


def _spread(records: Sequence[Record], name: str) -> Spread | None:
    values = tuple(r.reading["seconds"][name] for r in records if r.status == OK)
    return Spread(values) if values else None
