"""Two designs beside each other: what one costs over the other, and whether that keeps the project's goals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from rich.table import Table

from flexattn_jax.costs.cases import Case
from flexattn_jax.costs.measure import OK
from flexattn_jax.costs.table import COLUMNS, MEASURED, Row, Spread, shared_label
from flexattn_jax.costs.targets import parse_target

# What is compared: columns of table.COLUMNS, from what a compiler needs to what a device needs.
COMPARED = ("compile_s", "operations", "executable", "temporary", "peak", "tflop", "estimate_ms")


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two rows that differ in one axis.

    axis: field of Case. base: the row that the other one is divided by.
    """

    axis: str
    row: Row
    base: Row

    def label(self, known: str) -> str:
        """Such as "flex:10% / lowres, prefill, v5e:2x2"; what `known` says already, by comma, is left out."""
        own, other = (one.case.name.split(", ") for one in (self.row, self.base))
        shared = [part for part in own if part in other and part not in known.split(", ")]
        return ", ".join([f"{_words(self.row.case, self.axis)} / {_words(self.base.case, self.axis)}", *shared])

    def ratio(self, name: str) -> Spread | None:
        """One column over the other; of measured seconds each pass over the same pass. None where one has no value."""
        if COLUMNS[name].source == MEASURED:
            return self._passes(name.removesuffix("_s"))
        own, other = COLUMNS[name].value(self.row), COLUMNS[name].value(self.base)
        return Spread((own / other,)) if own and other else None

    def _passes(self, name: str) -> Spread | None:
        own, other = (
            {record.number: record.reading["seconds"][name] for record in one.readings if record.status == OK}
            for one in (self.row, self.base)
        )
        found = tuple(own[number] / other[number] for number in sorted(own.keys() & other.keys()))
        return Spread(found) if found else None


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a pair has to keep.

    concerns: the pairs that it is for. name: the column whose ratio is bounded. least, most: its bounds.
    """

    concerns: Callable[[Pair], bool]
    name: str
    least: float
    most: float

    def verdict(self, pair: Pair) -> str:
        """In words; "not known" where the ratio is, and a busy machine is named where it was measured on one."""
        bounds = f"<= {self.most:g}" if not self.least else f"{self.least:g} to {self.most:g}"
        found = pair.ratio(self.name)
        word = "not known" if found is None else "kept" if self.least <= found.median <= self.most else "missed"
        if COLUMNS[self.name].source == MEASURED and (pair.row.busy_readings or pair.base.busy_readings):
            word += " (on a busy machine)"
        return f"{COLUMNS[self.name].heading} {bounds}: {word}"


def _is_flex_on_v5e(pair: Pair) -> bool:
    case = pair.row.case
    return (
        pair.axis == "system"
        and case.system.startswith("flex:")
        and case.layers == "scanned"
        and case.program in ("prefill", "train")
        and parse_target(case.target).kind == "v5e"
    )


def _is_depth(pair: Pair) -> bool:
    depths = (pair.row.case.depth, pair.base.case.depth)
    return pair.axis == "depth" and pair.row.case.layers == "scanned" and depths == (32, 4)


def _is_unrolled_of_four(pair: Pair) -> bool:
    return pair.axis == "layers" and pair.row.case.depth == 4


GOALS = (
    Goal(_is_flex_on_v5e, "compile_s", 0, 1.5),
    Goal(_is_depth, "compile_s", 0, 1.1),
    Goal(_is_unrolled_of_four, "tflop", 0.999, 1.001),  # a scan computes one row's map more, which nobody reads
    Goal(_is_unrolled_of_four, "estimate_ms", 0.85, 1.15),
)


def pairs(found: Sequence[Row]) -> list[Pair]:
    """Every row beside the plainest row that differs in one axis: lowres, scanned, shallowest, cells, no remat."""
    by_case = {row.case: row for row in found}
    result = []
    for row in found:
        for axis, base in _bases(row.case, by_case):
            if base != row.case and base in by_case:
                result.append(Pair(axis, row, by_case[base]))
    order = [axis for axis, _ in _bases(Case("", "", ""), {})]
    return sorted(result, key=lambda pair: order.index(pair.axis))


def _bases(case: Case, cases: dict[Case, Row]) -> list[tuple[str, Case]]:
    """By axis, the case to compare with."""
    depths = [c.depth for c in cases if c.depth and dataclasses.replace(c, depth=case.depth) == case]
    return [
        ("system", dataclasses.replace(case, system="lowres", zoom=None, ranking="cells")),
        ("depth", dataclasses.replace(case, depth=min(depths, default=None))),
        ("layers", dataclasses.replace(case, layers="scanned")),
        ("ranking", dataclasses.replace(case, ranking="cells")),
        ("remat", dataclasses.replace(case, remat="none")),
    ]


def cells(pair: Pair, known: str) -> list[str]:
    """What a table shows of a pair: its label (see there), a ratio a column, and the goals."""
    shown = [str(pair.ratio(name) or "") for name in COMPARED]
    late = next((one for one in (pair.row, pair.base) if one.status != OK), None)
    if late is not None:
        shown[0] = f"{_words(late.case, pair.axis)}: {late.message or late.status}"
    verdicts = [goal.verdict(pair) for goal in GOALS if goal.concerns(pair)]
    return [pair.label(known), *shown, "; ".join(verdicts)]


def headings() -> list[str]:
    """Of the columns of `cells`."""
    return ["one over the other", *(f"{COLUMNS[n].heading} ({COLUMNS[n].source})" for n in COMPARED), "goal"]


def ratio_table(found: Sequence[Row]) -> Table | None:
    """For a terminal; None where no two rows can be compared."""
    compared = pairs(found)
    if not compared:
        return None
    known = shared_label(found)
    table = Table(title="One design over another")
    for number, heading in enumerate(headings()):
        table.add_column(heading, justify="right" if 0 < number <= len(COMPARED) else "left")
    for pair in compared:
        table.add_row(*cells(pair, known))
    return table


def ratio_markdown(found: Sequence[Row]) -> str:
    """As a markdown table; "" where no two rows can be compared."""
    known = shared_label(found)
    lines = [f"| {' | '.join(cells(pair, known))} |" for pair in pairs(found)]
    head = [f"| {' | '.join(headings())} |", "|---" * len(headings()) + "|"]
    return "\n".join(["## One design over another", "", *head, *lines, ""]) if lines else ""


def _words(case: Case, axis: str) -> str:
    value = getattr(case, axis)
    return {"depth": f"{value} layers", "ranking": f"by {value}", "remat": f"remat {value}"}.get(axis, str(value))
