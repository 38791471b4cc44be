"""What got dearer between two tables: two versions of this code, or two releases of JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from flexattn_jax.config import ConfigError
from flexattn_jax.costs.measure import OK
from flexattn_jax.costs.records import Costs, read_costs
from flexattn_jax.costs.table import COLUMNS, Row, Spread, rows

COMPARED = ("trace_s", "lower_s", "compile_s", "operations", "instructions", "executable", "temporary", "peak", "tflop")
COMPARED += ("hbm", "estimate_ms", "step_s", "host_peak")
COUNTED_TOLERANCE, MEASURED_TOLERANCE = 0.01, 0.05


@dataclasses.dataclass(frozen=True)
class Change:
    """A value that differs by more than its tolerance, and more than its spread explains.

    before, after: as shown in the tables. ratio: after / before; None where one of them has no value.
    """

    case: str
    what: str
    before: str
    after: str
    ratio: float | None

    @property
    def is_dearer(self) -> bool:
        return self.ratio is None or self.ratio > 1


def compare_files(before: Path, after: Path) -> tuple[list[str], list[Change]]:
    """What differs between the environments, in words, and between the values, dearer ones first.

    Raises:
      ConfigError: a file that cannot be read.
    """
    old, new = read_costs(before), read_costs(after)
    try:
        return _environments(old, new), compare(old, new)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ConfigError(f"{before} or {after} holds values of another kind ({error}); measure again") from error


def compare(old: Costs, new: Costs) -> list[Change]:
    """Changes in cases that both hold, dearer ones first."""
    cases = [case for case in dict.fromkeys(r.case for r in old.records) if case in {r.case for r in new.records}]
    changes = []
    for before, after in zip(rows(cases, old), rows(cases, new), strict=True):
        if before.status != after.status:
            ratio = 0.0 if after.status == OK else None
            changes.append(Change(before.case.name, "result", before.status, after.status, ratio))
            continue
        changes += [change for name in COMPARED if (change := _change(before, after, name)) is not None]
    return sorted(changes, key=lambda change: (not change.is_dearer, -(change.ratio or float("inf"))))


def change_table(changes: Sequence[Change]) -> Table:
    """For a terminal."""
    table = Table("case", "what", "before", "after", "after / before")
    for change in changes:
        ratio = "" if not change.ratio else f"{change.ratio:.3f}"
        table.add_row(change.case, change.what, change.before, change.after, ratio)
    return table


def only_in_one(before: Path, after: Path) -> tuple[list[str], list[str]]:
    """Names of the cases that only the first and only the second file hold."""
    old, new = ({r.case.name for r in read_costs(path).records} for path in (before, after))
    return sorted(old - new), sorted(new - old)


def _change(before: Row, after: Row, name: str) -> Change | None:
    column = COLUMNS[name]
    old, new = column.value(before), column.value(after)
    if not old or not new:
        return None
    tolerance = COUNTED_TOLERANCE if column.source == "counted" else MEASURED_TOLERANCE
    if isinstance(old, Spread):
        if min(new.values) <= max(old.values) and min(old.values) <= max(new.values):
            return None  # the readings overlap
        ratio = new.median / old.median
    else:
        ratio = new / old
    if abs(ratio - 1) <= tolerance:
        return None
    return Change(before.case.name, f"{column.heading} ({column.source})", column.show(old), column.show(new), ratio)


def _environments(old: Costs, new: Costs) -> list[str]:
    def flat(environment: dict) -> dict[str, str]:
        found = {name: value for name, value in environment.items() if not isinstance(value, dict)}
        for name in ("versions", "flags"):
            found |= environment.get(name, {})
        return {name: str(value) for name, value in found.items()}

    before, after = flat(old.environment), flat(new.environment)
    return [
        f"{name}: {before.get(name, 'none')} -> {after.get(name, 'none')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
